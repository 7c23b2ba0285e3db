/* gpu_linear.h - what tests of linear attention on the CUDA device are made of: a case, its tensors and blocks, and the
 * calls of a pass. */
#ifndef USP_TESTS_GPU_LINEAR_H
#define USP_TESTS_GPU_LINEAR_H
#include "gpu_test.h"

enum { USP_GPU_CHUNKS = 3 };

typedef enum usp_gpu_decay { USP_GPU_NO_DECAY, USP_GPU_SLOW, USP_GPU_FAST } usp_gpu_decay;

typedef struct usp_gpu_linear_case {
    const char *name;
    usp_dtype dtype;
    usp_gpu_arrangement how;
    int batch, heads, q_heads, k_heads, v_heads, offset, dim,
        value_dim;                    /* heads of the layer that are here, from `offset` */
    int chunk[USP_GPU_CHUNKS], block; /* rows */
    int reverse, shift, transposed, causal;
    usp_gpu_decay decay;
    float scale;
} usp_gpu_linear_case;

typedef struct usp_gpu_linear {
    const usp_gpu_linear_case *c;
    const int *document; /* rows of documents, ended by 0, again and again, over all chunks; NULL: one document */
    int blocks, chunks;
    int64_t tokens;
    size_t block, step, decay, begins, ends;
    usp_gpu_view q, k, v, out, acc, states, chunk_states, final;
    int first, last; /* of the call */
    int grid;        /* of one launch on the GPU */
} usp_gpu_linear;

/* Tensors, filled, and blocks. */
usp_gpu_linear usp_gpu_make_linear(usp_gpu_test *t, const usp_gpu_linear_case *c, int grid);

/* usp_gpu_call. */
usp_status usp_gpu_linear_totals(const usp_gpu_world *w, const void *args);
usp_status usp_gpu_linear_scan(const usp_gpu_world *w, const void *args);
usp_status usp_gpu_linear_output(const usp_gpu_world *w, const void *args);
usp_status usp_gpu_linear_apply(const usp_gpu_world *w, const void *args);

#endif
