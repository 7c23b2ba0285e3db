/* softmax.c - softmax attention on the CPU: forward, delta, and the two halves of backward.
 *
 * A strip is a block of rows (those that own the running sums) of one head. The other side's columns stream past it, a
 * tile of scores at a time, so every product broadcasts one operand and reads lanes of the other: scores are stored
 * [column][row], the strip's own rows transposed once. It knows no ranks or schedules and allocates nothing. */
#include <math.h>
#include <string.h>

#include "../error.h"
#include "kernels.h"

typedef struct usp_softmax_strip {
    _Alignas(64) int32_t position[USP_CPU_BLOCK];
    _Alignas(64) float max[USP_CPU_BLOCK]; /* forward */
    _Alignas(64) float sum[USP_CPU_BLOCK];
    _Alignas(64) float factor[USP_CPU_BLOCK];
    _Alignas(64) float lse[USP_CPU_BLOCK]; /* backward: of the queries, rows or columns */
    _Alignas(64) float delta[USP_CPU_BLOCK];
    float *row[2];    /* [dim][width], [value_dim][width]: this side, transposed, the first one times scale */
    float *column[2]; /* [block][dim], [block][value_dim]: the other side */
    float *score[2];  /* [block][width]: weights, and their gradient */
    float *total[2];  /* [width][dim], [width][value_dim]: what the strip sums up; forward uses the second */
    const usp_panel *panel;
    const usp_softmax *args;
    int dim, value_dim; /* padded */
    int block, width;   /* columns of a tile at most; rows, padded */
    int begin, count;   /* rows of the tensors */
    int batch, head, key_head;
} usp_softmax_strip;

/* ---- strips ------------------------------------------------------------------------------------------------------ */

static void strip_init(usp_softmax_strip *s, const usp_panel *panel, const usp_softmax *args) {
    s->panel = panel;
    s->args = args;
    s->dim = usp_cpu_pad(args->dim);
    s->value_dim = usp_cpu_pad(args->value_dim);
    s->block = usp_cpu_block(args->dim, args->value_dim);
}

/* Lays the tiles out for `count` rows of the work item from its row `first` on. */
static void strip_place(usp_softmax_strip *s, const usp_work *work, int first) {
    float *free = s->args->scratch;
    s->begin = work->begin + first;
    s->count = work->count - first < s->block ? work->count - first : s->block;
    s->width = usp_cpu_pad(s->count);
    for (int i = 0; i < 2; i++) {
        int dim = i ? s->value_dim : s->dim;
        s->row[i] = free, free += dim * s->width;
        s->column[i] = free, free += dim * s->block;
        s->total[i] = free, free += dim * s->width;
        s->score[i] = free, free += s->block * s->width;
    }
    for (int i = 0; i < s->width; i++) {
        int64_t row = s->begin + (i < s->count ? i : s->count - 1); /* padding repeats the last row */
        s->position[i] = (int32_t)(work->origin + row * work->stride);
    }
}

static void load_rows(usp_softmax_strip *s, float *to, const usp_tensor *tensor, int head, int dim, float scale) {
    float line[USP_CPU_DIM];
    if (s->count < s->width) memset(to, 0, sizeof *to * (size_t)(dim * s->width));
    for (int i = 0; i < s->count; i++) {
        s->panel->load(s->args->dtype, usp_cpu_row(tensor, s->args->dtype, s->begin + i, s->batch, head), line, dim);
        for (int c = 0; c < dim; c++) to[c * s->width + i] = scale * line[c];
    }
}

/* Rows of zeros follow up to a multiple of USP_CPU_ROWS, as products want. */
static void load_columns(usp_softmax_strip *s, float *to, const usp_tensor *tensor, int head, int dim, int begin,
                         int count) {
    int stride = usp_cpu_pad(dim), rows = (count + USP_CPU_ROWS - 1) / USP_CPU_ROWS * USP_CPU_ROWS;
    for (int j = 0; j < count; j++, to += stride) {
        s->panel->load(s->args->dtype, usp_cpu_row(tensor, s->args->dtype, begin + j, s->batch, head), to, dim);
        memset(to + dim, 0, sizeof *to * (size_t)(stride - dim));
    }
    memset(to, 0, sizeof *to * (size_t)((rows - count) * stride));
}

/* score[j][i] = columns[j] . rows[i] over `dim`, for the q.k (which 0) or the dout.v (which 1) part. */
static void multiply_scores(usp_softmax_strip *s, int which, int count) {
    usp_product p = {.m = (count + USP_CPU_ROWS - 1) / USP_CPU_ROWS * USP_CPU_ROWS, .n = s->width};
    p.k = which ? s->args->value_dim : s->args->dim;
    p.a = s->column[which], p.a_row = which ? s->value_dim : s->dim, p.a_step = 1;
    p.b = s->row[which], p.b_row = s->width;
    p.c = s->score[which], p.c_row = s->width;
    s->panel->multiply(&p);
}

/* ---- tiles ------------------------------------------------------------------------------------------------------- */

/* What of a tile one step takes: columns, and which pairs are allowed if not all are (`masked`). */
typedef struct usp_tile_step {
    int begin, count, masked;
    usp_band band;
} usp_tile_step;

/* total[which][i] += sum over columns j of score[j][i] * column[which][j]. The score of a masked pair is 0, but 0 times
 * NaN is NaN: with such columns a product leaves those pairs out. */
static void multiply_totals(usp_softmax_strip *s, const float *score, int which, const usp_tile_step *step) {
    int dim = which ? s->value_dim : s->dim;
    usp_product p = {.m = s->width, .n = dim, .k = step->count, .accumulate = 1};
    p.a = score, p.a_row = 1, p.a_step = s->width;
    p.b = s->column[which], p.b_row = dim;
    p.c = s->total[which], p.c_row = dim;
    if (step->masked && !s->panel->finite(p.b, step->count * dim)) p.band = &step->band;
    s->panel->multiply(&p);
}

typedef void (*usp_tile_step_fn)(usp_softmax_strip *s, const usp_tile_step *step);

static int64_t least(int64_t a, int64_t b) {
    return a < b ? a : b;
}

static int64_t most(int64_t a, int64_t b) {
    return a > b ? a : b;
}

/* Decides from the corners of the step whether no pair (0), every pair (1) or some pairs (2) may be allowed. */
static int step_kind(const usp_softmax_strip *s, const usp_tile_step *step) {
    int64_t row0 = s->position[0], row1 = s->position[s->count - 1];
    const usp_band *band = &step->band;
    int64_t column0 = band->origin, column1 = column0 + (int64_t)(step->count - 1) * band->stride;
    int64_t lowest = least(column0, column1) - most(row0, row1), highest = most(column0, column1) - least(row0, row1);
    if (highest < band->low || lowest > band->high) return 0;
    return lowest >= band->low && highest <= band->high ? 1 : 2;
}

static void mask_scores(const usp_softmax_strip *s, float *score, const usp_tile_step *step, float fill) {
    usp_scores scores = {score, step->count, s->width};
    if (step->masked) s->panel->mask(scores, &step->band, fill);
}

/* Cuts a tile where the column index is a multiple of the block, so that a row's sums do not depend on how rows are
 * grouped into work items. */
static void walk_tile(usp_softmax_strip *s, const usp_tile *tile, int rows_are_keys, usp_tile_step_fn visit) {
    for (int begin = tile->begin, end; begin < tile->end; begin = end) {
        end = (int)least(tile->end, ((int64_t)begin / s->block + 1) * s->block);
        usp_tile_step step = {.begin = begin, .count = end - begin, .band = {s->position, .stride = tile->stride}};
        step.band.origin = (int32_t)(tile->origin + (int64_t)begin * tile->stride);
        step.band.low = rows_are_keys ? (int32_t)most(-(int64_t)tile->high, INT32_MIN) : tile->low;
        step.band.high = rows_are_keys ? (int32_t)least(-(int64_t)tile->low, INT32_MAX) : tile->high;
        int kind = begin >= tile->full_begin && end <= tile->full_end ? 1 : step_kind(s, &step);
        step.masked = kind == 2;
        if (kind) visit(s, &step);
    }
}

static void walk_tiles(usp_softmax_strip *s, const usp_work *work, int rows_are_keys, usp_tile_step_fn visit) {
    const usp_tile *tile = s->args->tiles.tile + work->first_tile;
    for (int t = 0; t < work->tiles; t++) walk_tile(s, tile + t, rows_are_keys, visit);
}

typedef void (*usp_softmax_strip_fn)(usp_softmax_strip *s, const usp_work *work);

/* Every strip of every work item for s->head. */
static void walk_strips(usp_softmax_strip *s, usp_softmax_strip_fn run) {
    const usp_tiles *tiles = &s->args->tiles;
    for (int w = 0; w < tiles->works; w++)
        for (int first = 0; first < tiles->work[w].count; first += s->block) {
            strip_place(s, tiles->work + w, first);
            run(s, tiles->work + w);
        }
}

/* lse and delta are [batch, heads, queries]. */
static int64_t stat_at(const usp_softmax_strip *s, int head, int64_t query) {
    return ((int64_t)s->batch * s->args->heads + head) * s->args->queries + query;
}

/* ---- forward ----------------------------------------------------------------------------------------------------- */

static float *acc_row(const usp_softmax_strip *s, int i) {
    const usp_softmax *a = s->args;
    return a->acc + (((int64_t)(s->begin + i) * a->batch + s->batch) * a->heads + s->head) * a->value_dim;
}

/* Takes the running (acc, lse) up as sums with maximum lse and weight 1. */
static void forward_begin(usp_softmax_strip *s) {
    const usp_softmax *a = s->args;
    memset(s->total[1], 0, sizeof(float) * (size_t)(s->width * s->value_dim));
    for (int i = 0; i < s->width; i++) {
        float lse = a->first || i >= s->count ? -INFINITY : a->lse[stat_at(s, s->head, s->begin + i)];
        s->max[i] = lse;
        s->sum[i] = lse != -INFINITY;
        if (lse == -INFINITY) continue;
        memcpy(s->total[1] + i * s->value_dim, acc_row(s, i), sizeof(float) * (size_t)a->value_dim);
    }
}

static void forward_step(usp_softmax_strip *s, const usp_tile_step *step) {
    const usp_softmax *a = s->args;
    usp_scores scores = {s->score[0], step->count, s->width};
    load_columns(s, s->column[0], &a->k, s->key_head, a->dim, step->begin, step->count);
    load_columns(s, s->column[1], &a->v, s->key_head, a->value_dim, step->begin, step->count);
    multiply_scores(s, 0, step->count);
    mask_scores(s, s->score[0], step, -INFINITY);
    s->panel->fold(scores, s->max, s->sum, s->factor);
    s->panel->scale(s->total[1], s->factor, s->width, s->value_dim);
    multiply_totals(s, s->score[0], 1, step);
}

/* Only a row without keys has sum 0: a NaN, which no maximum sees, stays one. */
static void forward_end(usp_softmax_strip *s) {
    const usp_softmax *a = s->args;
    for (int i = 0; i < s->width; i++) s->factor[i] = s->sum[i] == 0 ? 0 : 1 / s->sum[i];
    s->panel->scale(s->total[1], s->factor, s->width, s->value_dim);
    for (int i = 0; i < s->count; i++) {
        int64_t query = s->begin + i;
        const float *row = s->total[1] + i * s->value_dim;
        a->lse[stat_at(s, s->head, query)] = s->sum[i] == 0 ? -INFINITY : s->max[i] + logf(s->sum[i]);
        if (a->last)
            s->panel->store(a->dtype, row, usp_cpu_row(&a->out, a->dtype, query, s->batch, s->head), a->value_dim);
        else
            memcpy(acc_row(s, i), row, sizeof *row * (size_t)a->value_dim);
    }
}

static void forward_strip(usp_softmax_strip *s, const usp_work *work) {
    load_rows(s, s->row[0], &s->args->q, s->head, s->args->dim, s->args->scale);
    forward_begin(s);
    walk_tiles(s, work, 0, forward_step);
    forward_end(s);
}

/* Every strip of every query head, with its key head. */
static usp_status run_query_heads(usp_device *device, const usp_softmax *args, usp_softmax_strip_fn run) {
    usp_softmax_strip strip;
    strip_init(&strip, usp_cpu_panel(device), args);
    for (strip.batch = 0; strip.batch < args->batch; strip.batch++)
        for (strip.head = 0; strip.head < args->heads; strip.head++) {
            strip.key_head = usp_cpu_head(args->kv, strip.head);
            walk_strips(&strip, run);
        }
    return USP_OK;
}

usp_status usp_cpu_softmax_forward(usp_device *device, const usp_softmax *args, usp_stream stream) {
    (void)stream;
    return run_query_heads(device, args, forward_strip);
}

/* ---- delta ------------------------------------------------------------------------------------------------------- */

static float dot(const float *a, const float *b, int n) {
    float lane[USP_CPU_LANE] = {0}, sum = 0;
    int i = 0;
    for (; i + USP_CPU_LANE <= n; i += USP_CPU_LANE)
        for (int l = 0; l < USP_CPU_LANE; l++) lane[l] += a[i + l] * b[i + l];
    for (; i < n; i++) sum += a[i] * b[i];
    for (int l = 0; l < USP_CPU_LANE; l++) sum += lane[l];
    return sum;
}

usp_status usp_cpu_softmax_delta(usp_device *device, const usp_softmax *a, float *delta, usp_stream stream) {
    const usp_panel *panel = usp_cpu_panel(device);
    float out[USP_CPU_DIM], dout[USP_CPU_DIM];
    (void)stream;
    for (int b = 0; b < a->batch; b++)
        for (int h = 0; h < a->heads; h++)
            for (int64_t t = 0; t < a->queries; t++) {
                panel->load(a->dtype, usp_cpu_row(&a->out, a->dtype, t, b, h), out, a->value_dim);
                panel->load(a->dtype, usp_cpu_row(&a->dout, a->dtype, t, b, h), dout, a->value_dim);
                *delta++ = dot(dout, out, a->value_dim);
            }
    return USP_OK;
}

/* ---- backward ---------------------------------------------------------------------------------------------------- */

/* lse and delta of `count` queries; rows without any key, and padding, get a weight of 0. */
static void load_stats(usp_softmax_strip *s, int head, int begin, int count, int padded) {
    for (int i = 0; i < padded; i++) {
        float lse = i < count ? s->args->lse[stat_at(s, head, begin + i)] : -INFINITY;
        s->lse[i] = lse == -INFINITY ? INFINITY : lse;
        s->delta[i] = lse == -INFINITY ? 0 : s->args->delta[stat_at(s, head, begin + i)];
    }
}

/* Weights P in score[0] and P (dout.v - delta) in score[1], both 0 where masked, whatever lse, delta and dout.v are. */
static void backward_scores(usp_softmax_strip *s, const usp_tile_step *step, int by_column) {
    usp_scores scores = {s->score[0], step->count, s->width};
    multiply_scores(s, 0, step->count);
    multiply_scores(s, 1, step->count);
    s->panel->weigh(scores, s->score[1], s->lse, s->delta, by_column);
    for (int i = 0; i < 2; i++) mask_scores(s, s->score[i], step, 0);
}

static void clear_totals(usp_softmax_strip *s) {
    memset(s->total[0], 0, sizeof(float) * (size_t)(s->width * s->dim));
    memset(s->total[1], 0, sizeof(float) * (size_t)(s->width * s->value_dim));
}

/* One gradient's rows: scale * total, plus the running sum unless it begins here, to the running sum or the result. */
static void store_gradient(const usp_softmax_strip *s, int which, float scale, int head, const usp_tensor *sum,
                           const usp_tensor *result) {
    const usp_softmax *a = s->args;
    int dim = which ? a->value_dim : a->dim, stride = which ? s->value_dim : s->dim;
    float before[USP_CPU_DIM] = {0};
    for (int i = 0; i < s->count; i++) {
        float *row = s->total[which] + i * stride;
        int64_t token = s->begin + i;
        if (!a->first) s->panel->load(USP_F32, usp_cpu_row(sum, USP_F32, token, s->batch, head), before, dim);
        for (int c = 0; c < dim; c++) row[c] = before[c] + scale * row[c];
        const usp_tensor *to = a->last ? result : sum;
        usp_dtype dtype = a->last ? a->dtype : USP_F32;
        s->panel->store(dtype, row, usp_cpu_row(to, dtype, token, s->batch, head), dim);
    }
}

static void query_step(usp_softmax_strip *s, const usp_tile_step *step) {
    const usp_softmax *a = s->args;
    load_columns(s, s->column[0], &a->k, s->key_head, a->dim, step->begin, step->count);
    load_columns(s, s->column[1], &a->v, s->key_head, a->value_dim, step->begin, step->count);
    backward_scores(s, step, 0);
    multiply_totals(s, s->score[1], 0, step);
}

static void query_strip(usp_softmax_strip *s, const usp_work *work) {
    const usp_softmax *a = s->args;
    load_rows(s, s->row[0], &a->q, s->head, a->dim, a->scale);
    load_rows(s, s->row[1], &a->dout, s->head, a->value_dim, 1);
    load_stats(s, s->head, s->begin, s->count, s->width);
    clear_totals(s);
    walk_tiles(s, work, 0, query_step);
    store_gradient(s, 0, a->scale, s->head, &a->dq_sum, &a->dq);
}

usp_status usp_cpu_softmax_backward_query(usp_device *device, const usp_softmax *args, usp_stream stream) {
    (void)stream;
    return run_query_heads(device, args, query_strip);
}

static void key_step(usp_softmax_strip *s, const usp_tile_step *step) {
    const usp_softmax *a = s->args;
    load_columns(s, s->column[0], &a->q, s->head, a->dim, step->begin, step->count);
    load_columns(s, s->column[1], &a->dout, s->head, a->value_dim, step->begin, step->count);
    load_stats(s, s->head, step->begin, step->count, step->count);
    backward_scores(s, step, 1);
    multiply_totals(s, s->score[1], 0, step);
    multiply_totals(s, s->score[0], 1, step);
}

/* Sums over all query heads that read this key head, in ascending order. */
static void key_strip(usp_softmax_strip *s, const usp_work *work) {
    const usp_softmax *a = s->args;
    load_rows(s, s->row[0], &a->k, s->key_head, a->dim, a->scale);
    load_rows(s, s->row[1], &a->v, s->key_head, a->value_dim, 1);
    clear_totals(s);
    for (s->head = 0; s->head < a->heads; s->head++)
        if (usp_cpu_head(a->kv, s->head) == s->key_head) walk_tiles(s, work, 1, key_step);
    store_gradient(s, 0, a->scale, s->key_head, &a->dk_sum, &a->dk);
    store_gradient(s, 1, 1, s->key_head, &a->dv_sum, &a->dv);
}

usp_status usp_cpu_softmax_backward_key(usp_device *device, const usp_softmax *args, usp_stream stream) {
    usp_softmax_strip strip;
    (void)stream;
    strip_init(&strip, usp_cpu_panel(device), args);
    for (strip.batch = 0; strip.batch < args->batch; strip.batch++)
        for (strip.key_head = 0; strip.key_head < args->key_heads; strip.key_head++) walk_strips(&strip, key_strip);
    return USP_OK;
}
