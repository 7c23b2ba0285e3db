/* gpu_softmax.h - what tests of softmax attention on the CUDA device are made of: a case, its tensors, pairs and lists
 * of work, and the calls of a pass. */
#ifndef USP_TESTS_GPU_SOFTMAX_H
#define USP_TESTS_GPU_SOFTMAX_H
#include "gpu_test.h"

enum { USP_GPU_KEY_BLOCKS = 3, USP_GPU_ROWS = 2048, USP_GPU_NO_LIMIT = INT32_MAX };

/* A query sees keys from `left` before its diagonal to `right` behind it, inside its document; or, `random`, any
 * interval, which may be empty. */
typedef struct usp_gpu_softmax_case {
    const char *name;
    usp_dtype dtype;
    usp_gpu_arrangement how;
    int batch, heads, key_heads, group, offset, dim, value_dim;
    int queries, keys[USP_GPU_KEY_BLOCKS]; /* blocks of keys are folded one after the other */
    int left, right;                       /* USP_GPU_NO_LIMIT: none */
    int shift;                             /* the first query's position; the first key's is 0 */
    int scatter;                           /* 1: neighbouring rows have far positions */
    int apart;                             /* how far neighbouring rows' positions are from each other; 0: 1 */
    int gap;       /* before row 300, as of two chunks of a rank; later blocks come before all */
    int documents; /* their mean length; 0: one */
    int random;
    int tree;       /* 1: keys have a last query */
    int work_rows;  /* 0: USP_WORK_ROWS */
    float size;     /* of q; 0: 1 */
    float soft_cap; /* 0: none */
    int slopes, sinks, dlse, peaks;
    float dropout;
    int wide_keys; /* 1: dk and dv are fp32 */
} usp_gpu_softmax_case;

/* What is allowed, on the host. */
typedef struct usp_gpu_pairs {
    int32_t query[USP_GPU_ROWS], low[USP_GPU_ROWS], high[USP_GPU_ROWS], diagonal[USP_GPU_ROWS];
    int32_t key[USP_GPU_KEY_BLOCKS][USP_GPU_ROWS], last[USP_GPU_KEY_BLOCKS][USP_GPU_ROWS];
} usp_gpu_pairs;

/* Places of lists in the slabs. */
typedef struct usp_gpu_plan {
    size_t work, tile, count;
    int capacity;
} usp_gpu_plan;

typedef struct usp_gpu_softmax {
    const usp_gpu_softmax_case *c;
    int blocks;     /* of keys */
    int processors; /* that kernels are told the GPU has; 0: the truth */
    int portable;   /* kernels that run on every GPU, and sum in one order */
    int deterministic;
    int slices; /* of the heads of one batch entry, that backward works on one after the other; 0: 1 */
    usp_gpu_pairs pairs;
    size_t query_at, low_at, high_at, diagonal_at, key_at[USP_GPU_KEY_BLOCKS], last_at[USP_GPU_KEY_BLOCKS];
    size_t slopes_at, sinks_at, state_at;
    usp_gpu_plan query_plan[USP_GPU_KEY_BLOCKS], key_plan[USP_GPU_KEY_BLOCKS];
    usp_gpu_view q, k[USP_GPU_KEY_BLOCKS], v[USP_GPU_KEY_BLOCKS], out, dout, acc, top, sum, lse, dlse, delta, peak;
    usp_gpu_view dq, dq_sum, dk[USP_GPU_KEY_BLOCKS], dv[USP_GPU_KEY_BLOCKS], dsinks, most, turns;
} usp_gpu_softmax;

/* Pairs of a case, there and in the slabs, and lists of work for every block of keys. gpu_pairs.c. */
void usp_gpu_make_pairs(usp_gpu_test *t, usp_gpu_softmax *s);
int usp_gpu_sees(const usp_gpu_softmax *s, int query, int block, int key);

/* Tensors, filled; pairs and lists. */
usp_gpu_softmax usp_gpu_make_softmax(usp_gpu_test *t, const usp_gpu_softmax_case *c);
usp_softmax usp_gpu_softmax_args(const usp_gpu_world *w, const usp_gpu_softmax *s, int block);

/* usp_gpu_call. All blocks of keys one after the other; a pass is all of it. */
usp_status usp_gpu_softmax_forward(const usp_gpu_world *w, const void *args);
usp_status usp_gpu_softmax_delta(const usp_gpu_world *w, const void *args);
usp_status usp_gpu_softmax_backward(const usp_gpu_world *w, const void *args);
usp_status usp_gpu_softmax_pass(const usp_gpu_world *w, const void *args);

#endif
