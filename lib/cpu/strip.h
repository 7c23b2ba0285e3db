/* strip.h - a block of rows of one head and the columns that stream past it: what softmax attention's passes share. */
#ifndef USP_CPU_STRIP_H
#define USP_CPU_STRIP_H
#include "kernels.h"

typedef struct usp_strip {
    _Alignas(64) int32_t row_at[USP_CPU_BLOCK]; /* what the view points to, padding repeating the last row */
    _Alignas(64) int32_t row_low[USP_CPU_BLOCK];
    _Alignas(64) int32_t row_high[USP_CPU_BLOCK];
    _Alignas(64) int32_t row_across[USP_CPU_BLOCK];
    _Alignas(64) float max[USP_CPU_BLOCK]; /* forward: running; backward: of the queries, rows or columns */
    _Alignas(64) float sum[USP_CPU_BLOCK];
    _Alignas(64) float factor[USP_CPU_BLOCK];
    _Alignas(64) float delta[USP_CPU_BLOCK];
    int32_t column_low[USP_CPU_BLOCK], column_high[USP_CPU_BLOCK]; /* where the arguments give none */
    uint64_t dropout[USP_CPU_BLOCK];                               /* of the queries, rows or columns */
    float *row[2];    /* [dim][width], [value_dim][width]: this side, transposed */
    float *column[2]; /* [block][dim], [block][value_dim]: the other side */
    float *score[2];  /* [block][width]: weights, and their gradient */
    float *slope;     /* [block][width]: of the soft cap */
    float *total[2];  /* [width][dim], [width][value_dim]: what the strip sums up; forward uses the second */
    const usp_panel *panel;
    const usp_softmax *args;
    usp_pair_view view;
    int keys_are_rows;
    int dim, value_dim; /* padded */
    int block, width;   /* columns of a tile at most; rows, padded */
    int begin, count;   /* rows of the tensors */
    int batch, head, key_head;
} usp_strip;

/* What of a tile one step takes: columns, and whether some pairs are not allowed. */
typedef struct usp_strip_step {
    int begin, count, masked;
} usp_strip_step;

typedef void (*usp_strip_fn)(usp_strip *s, const usp_work *work);
typedef void (*usp_strip_step_fn)(usp_strip *s, const usp_strip_step *step);

void usp_strip_init(usp_strip *s, const usp_panel *panel, const usp_softmax *args);
/* Every strip of every work item; every step of its tiles in which some pair may be allowed. */
void usp_strip_walk(usp_strip *s, const usp_tiles *tiles, usp_strip_fn run);
void usp_strip_tiles(usp_strip *s, const usp_work *work, const usp_tiles *tiles, usp_strip_step_fn visit);

/* Loads the q.k (which 0) or the dout.v (which 1) side of rows or columns, multiplied by `scale`. */
void usp_strip_rows(usp_strip *s, int which, const usp_tensor *tensor, int head, float scale);
void usp_strip_columns(usp_strip *s, int which, const usp_tensor *tensor, int head, const usp_strip_step *step,
                       float scale);
/* score[which][j][i] = columns[j] . rows[i] */
void usp_strip_multiply(usp_strip *s, int which, const usp_strip_step *step);

/* Soft cap and bias of scores; the slope of the cap to the gradient of scores; dropped weights are 0, others grow. */
void usp_strip_bend(usp_strip *s, const usp_strip_step *step);
void usp_strip_unbend(usp_strip *s, const usp_strip_step *step);
void usp_strip_drop(usp_strip *s, float *weights, const usp_strip_step *step);

#endif
