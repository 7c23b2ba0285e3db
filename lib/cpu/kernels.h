/* kernels.h - what the files of the CPU device share: the panel (dense fp32 pieces, one build per instruction set), the
 * kernels of the device table, and where a row of a tensor lies. Nothing here allocates or checks arguments. */
#ifndef USP_CPU_KERNELS_H
#define USP_CPU_KERNELS_H
#include "../device.h"

enum {
    USP_CPU_DIM = 512, /* largest head dim: bounds a row of floats, which lies on the stack */
    USP_CPU_LANE = 16, /* rows of a tile are padded to this many floats, and begin 64-byte aligned */
    USP_CPU_ROWS = 8,  /* products are computed for this many rows at a time */
    USP_CPU_BLOCK = 64 /* rows and columns of a score tile at most */
};

/* Which pairs of a tile are allowed: row i and column j that see each other, row.low[i] <= column.at[j] <= row.high[i]
 * and column.low[j] <= row.at[i] <= column.high[j]. Biases count from `across`. Rows are padded to USP_CPU_LANE. */
typedef struct usp_marks {
    const int32_t *at, *low, *high, *across;
} usp_marks;

typedef struct usp_pair_view {
    usp_marks row, column;
} usp_pair_view;

/* c[i][j] (+)= sum over l < k of a(i, l) * b[l][j], a(i, l) = a[i * a_row + l * a_step], i < m, j < n. m is a multiple
 * of USP_CPU_ROWS, n, b_row and c_row of USP_CPU_LANE. Each sum runs over l in ascending order,
 * and is then added: many short sums lose less than a long one. */
typedef struct usp_product {
    int m, n, k;
    const float *a;
    int a_row, a_step;
    const float *b;
    int b_row;
    float *c;
    int c_row, accumulate;
    const usp_pair_view
        *view; /* if given, terms of pairs (i, l) that are not allowed are left out, whatever they are */
} usp_product;

/* A tile of scores [columns][width]: lane i of each line belongs to row i of the work, padded to `width`. */
typedef struct usp_scores {
    float *data;
    int columns, width;
} usp_scores;

/* What is kept of queries: the base of their scores, what makes weights probabilities, and delta. */
typedef struct usp_stats {
    const float *top, *factor, *delta;
} usp_stats;

typedef struct usp_panel {
    const char *name;
    void (*multiply)(const usp_product *);
    void (*load)(usp_dtype, const void *from, float *to, int n);
    void (*store)(usp_dtype, const float *from, void *to, int n);
    /* x[i][c] *= factor[i], i < rows, c < columns (a multiple of USP_CPU_LANE) */
    void (*scale)(float *x, const float *factor, int rows, int columns);
    /* Whether none of n (a multiple of USP_CPU_LANE) is NaN or infinite. */
    int (*finite)(const float *x, int n);
    /* score[j][i] = fill for pairs that are not allowed */
    void (*mask)(usp_scores, const usp_pair_view *, float fill);
    /* score = cap tanh(score / cap), slope = 1 - tanh^2 */
    void (*cap)(usp_scores, float *slope, float cap);
    /* score -= slope |row.across - column.across| */
    void (*bias)(usp_scores, const usp_pair_view *, float slope);
    /* score = 0 for pairs that are dropped, score / (1 - rate) for others. `query` holds what usp_dropout_row says of
     * rows, or of columns. */
    void (*drop)(usp_scores, const usp_pair_view *, const uint64_t *query, float rate, int by_column);
    /* Online softmax: m = max(max, scores); score = exp(score - m); factor = exp(max - m); sum = sum * factor + scores;
     * max = m. All zero where m is -inf. */
    void (*fold)(usp_scores, float *max, float *sum, float *factor);
    /* score = exp(score - top) * factor; gradient = score * (gradient - delta). The three are of rows, or of columns.
     */
    void (*weigh)(usp_scores, float *gradient, const usp_stats *, int by_column);
} usp_panel;

/* Each is NULL where the compiler or the processor does not have it; the portable one always exists. */
const usp_panel *usp_panel_portable(void);
const usp_panel *usp_panel_avx2(void);
const usp_panel *usp_panel_avx512(void);

typedef struct usp_cpu_device {
    usp_device base;
    const usp_panel *panel;
} usp_cpu_device;

static inline const usp_panel *usp_cpu_panel(const usp_device *device) {
    return ((const usp_cpu_device *)device)->panel;
}

static inline int usp_cpu_pad(int n) {
    return (n + USP_CPU_LANE - 1) / USP_CPU_LANE * USP_CPU_LANE;
}

/* Rows and columns of a tile such that all tiles of a kernel, at most 224 KiB, stay in the processor's cache. */
static inline int usp_cpu_block(int dim, int value_dim) {
    int widest = dim > value_dim ? dim : value_dim;
    return widest <= 128 ? 64 : widest <= 256 ? 32 : 16;
}

static inline void *usp_cpu_row(const usp_tensor *tensor, usp_dtype dtype, int64_t token, int batch, int head) {
    int64_t element = token * tensor->stride_token + batch * tensor->stride_batch + head * tensor->stride_head;
    return (char *)tensor->data + element * (int64_t)usp_dtype_size(dtype);
}

static inline int usp_cpu_head(usp_head_map map, int head) {
    return (head + map.offset) / map.group;
}

usp_status usp_cpu_copy_rows(usp_device *, const usp_copy *, int count, usp_stream);
usp_status usp_cpu_softmax_forward(usp_device *, const usp_softmax *, usp_stream);
usp_status usp_cpu_softmax_delta(usp_device *, const usp_softmax *, float *delta, usp_stream);
usp_status usp_cpu_softmax_backward(usp_device *, const usp_softmax *, usp_stream);
usp_status usp_cpu_softmax_sinks(usp_device *, const usp_softmax *, float *gradient, usp_stream);
usp_status usp_cpu_softmax_peaks(usp_device *, const usp_softmax *, float *most, usp_stream);
usp_status usp_cpu_linear_totals(usp_device *, const usp_linear *, usp_stream);
usp_status usp_cpu_linear_scan(usp_device *, const usp_scan *, usp_stream);
usp_status usp_cpu_linear_output(usp_device *, const usp_linear *, usp_stream);
usp_status usp_cpu_linear_apply(usp_device *, const usp_linear *, usp_stream);

#endif
