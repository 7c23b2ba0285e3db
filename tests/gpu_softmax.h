/* gpu_softmax.h - what tests of softmax attention on the CUDA device are made of: a case, its tensors and lists of
 * work, and the calls of a pass. */
#ifndef USP_TESTS_GPU_SOFTMAX_H
#define USP_TESTS_GPU_SOFTMAX_H
#include "gpu_test.h"

typedef struct usp_gpu_segment {
    int start, length, stride;
} usp_gpu_segment;

enum { USP_GPU_SEGMENTS = 3, USP_GPU_KEY_BLOCKS = 2, USP_GPU_NO_LIMIT = INT32_MAX };

typedef struct usp_gpu_softmax_case {
    const char *name;
    usp_dtype dtype;
    usp_gpu_arrangement how;
    int batch, heads, key_heads, group, offset, dim, value_dim;
    usp_gpu_segment query[USP_GPU_SEGMENTS],
        key[USP_GPU_KEY_BLOCKS][USP_GPU_SEGMENTS]; /* a second block of keys is folded into the first */
    int low, high;                                 /* USP_GPU_NO_LIMIT: none */
    int work_rows;
} usp_gpu_softmax_case;

typedef struct usp_gpu_plan {
    size_t work, tile;
    int works;
} usp_gpu_plan;

typedef struct usp_gpu_softmax {
    const usp_gpu_softmax_case *c;
    int blocks;     /* of keys */
    int folds;      /* backward_key: 2: the same contribution twice, by way of the running sums */
    int block;      /* of the call */
    int grid;       /* of one launch on the GPU */
    int processors; /* that kernels are told the GPU has; 0: the truth */
    usp_gpu_view q, k[USP_GPU_KEY_BLOCKS], v[USP_GPU_KEY_BLOCKS], out, dout, acc, lse, delta;
    usp_gpu_view dq, dq_sum, dk, dk_sum, dv, dv_sum;
    usp_gpu_plan query_plan[USP_GPU_KEY_BLOCKS], key_plan[USP_GPU_KEY_BLOCKS];
} usp_gpu_softmax;

/* Tensors, filled, and lists; then dk and dv of a block of keys, for which the next backward_key is. */
usp_gpu_softmax usp_gpu_make_softmax(usp_gpu_test *t, const usp_gpu_softmax_case *c, int grid);
void usp_gpu_make_gradients(usp_gpu_test *t, usp_gpu_softmax *s, int block);

/* usp_gpu_call: all key blocks one after the other, but backward_key. */
usp_status usp_gpu_softmax_forward(const usp_gpu_world *w, const void *args);
usp_status usp_gpu_softmax_delta(const usp_gpu_world *w, const void *args);
usp_status usp_gpu_softmax_backward_query(const usp_gpu_world *w, const void *args);
usp_status usp_gpu_softmax_backward_key(const usp_gpu_world *w, const void *args);

#endif
