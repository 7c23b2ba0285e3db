/* softmax.c - softmax attention on the CPU: forward and the two halves of backward.
 *
 * A strip is a block of rows (those that own the running sums) of one head. The other side's columns stream past it, a
 * tile of scores at a time, so every product broadcasts one operand and reads lanes of the other: scores are stored
 * [column][row], the strip's own rows transposed once. Queries are multiplied by the scale as they are loaded,
 * whichever side they are, so that a pair's score has the same bits in every pass. It knows no ranks and allocates
 * nothing. */
#include "strip.h"
#include <math.h>
#include <string.h>

/* ---- products ---------------------------------------------------------------------------------------------------- */

/* total[which][i] += sum over columns j of score[j][i] * column[which][j]. The score of a masked pair is 0, but 0 times
 * NaN is NaN: with such columns a product leaves those pairs out. */
static void multiply_totals(usp_strip *s, const float *score, int which, const usp_strip_step *step) {
    int dim = which ? s->value_dim : s->dim;
    usp_product p = {.m = s->width, .n = dim, .k = step->count, .accumulate = 1};
    p.a = score, p.a_row = 1, p.a_step = s->width;
    p.b = s->column[which], p.b_row = dim;
    p.c = s->total[which], p.c_row = dim;
    if (step->masked && !s->panel->finite(p.b, step->count * dim)) p.view = &s->view;
    s->panel->multiply(&p);
}

static void mask_scores(const usp_strip *s, float *score, const usp_strip_step *step, float fill) {
    usp_scores scores = {score, step->count, s->width};
    if (step->masked) s->panel->mask(scores, &s->view, fill);
}

/* lse, top, sum and delta are [batch, heads, queries]. */
static int64_t stat_at(const usp_strip *s, int head, int64_t query) {
    return ((int64_t)s->batch * s->args->heads + head) * s->args->queries + query;
}

/* Every strip of every query head, with its key head. */
static void run_query_heads(usp_device *device, const usp_softmax *args, usp_strip_fn run) {
    usp_strip strip;
    usp_strip_init(&strip, usp_cpu_panel(device), args);
    for (strip.batch = 0; strip.batch < args->batch; strip.batch++)
        for (strip.head = 0; strip.head < args->heads; strip.head++) {
            strip.key_head = usp_cpu_head(args->kv, strip.head);
            usp_strip_walk(&strip, &args->by_query, run);
        }
}

/* ---- forward ----------------------------------------------------------------------------------------------------- */

static float *acc_row(const usp_strip *s, int i) {
    const usp_softmax *a = s->args;
    return a->acc + (((int64_t)(s->begin + i) * a->batch + s->batch) * a->heads + s->head) * a->value_dim;
}

/* Takes up what was folded so far. */
static void forward_begin(usp_strip *s) {
    const usp_softmax *a = s->args;
    memset(s->total[1], 0, sizeof(float) * (size_t)(s->width * s->value_dim));
    for (int i = 0; i < s->width; i++) {
        int folded = !a->first && i < s->count;
        s->max[i] = folded ? a->top[stat_at(s, s->head, s->begin + i)] : -INFINITY;
        s->sum[i] = folded ? a->sum[stat_at(s, s->head, s->begin + i)] : 0;
        if (folded) memcpy(s->total[1] + i * s->value_dim, acc_row(s, i), sizeof(float) * (size_t)a->value_dim);
    }
}

static void forward_step(usp_strip *s, const usp_strip_step *step) {
    const usp_softmax *a = s->args;
    usp_scores scores = {s->score[0], step->count, s->width};
    usp_strip_columns(s, 0, &a->k, s->key_head, step, 1);
    usp_strip_columns(s, 1, &a->v, s->key_head, step, 1);
    usp_strip_multiply(s, 0, step);
    usp_strip_bend(s, step);
    mask_scores(s, s->score[0], step, -INFINITY);
    s->panel->fold(scores, s->max, s->sum, s->factor);
    s->panel->scale(s->total[1], s->factor, s->width, s->value_dim);
    usp_strip_drop(s, s->score[0], step);
    multiply_totals(s, s->score[0], 1, step);
}

/* The sink weighs in the sum, and its score may be the largest. A row without keys but with a sink has sum 1. */
static void add_sink(usp_strip *s) {
    float sink = s->args->sinks[s->head];
    for (int i = 0; i < s->width; i++) {
        float top = s->max[i] > sink ? s->max[i] : sink, base = top == -INFINITY ? 0 : top;
        s->factor[i] = expf(s->max[i] - base);
        s->sum[i] = s->sum[i] * s->factor[i] + expf(sink - base);
        s->max[i] = top;
    }
    s->panel->scale(s->total[1], s->factor, s->width, s->value_dim);
}

/* Only a row without keys has sum 0: a NaN, which no maximum sees, stays one. */
static void write_results(usp_strip *s) {
    const usp_softmax *a = s->args;
    for (int i = 0; i < s->width; i++) s->factor[i] = s->sum[i] == 0 ? 0 : 1 / s->sum[i];
    s->panel->scale(s->total[1], s->factor, s->width, s->value_dim);
    for (int i = 0; i < s->count; i++) {
        int64_t query = s->begin + i;
        s->panel->store(a->dtype, s->total[1] + i * s->value_dim,
                        usp_cpu_row(&a->out, a->dtype, query, s->batch, s->head), a->value_dim);
        if (a->lse) a->lse[stat_at(s, s->head, query)] = s->sum[i] == 0 ? -INFINITY : s->max[i] + logf(s->sum[i]);
    }
}

static void forward_end(usp_strip *s) {
    const usp_softmax *a = s->args;
    for (int i = 0; i < s->count && a->peak; i++) a->peak[stat_at(s, s->head, s->begin + i)] = s->max[i];
    if (a->last && a->sinks) add_sink(s);
    for (int i = 0; i < s->count; i++) {
        a->top[stat_at(s, s->head, s->begin + i)] = s->max[i];
        a->sum[stat_at(s, s->head, s->begin + i)] = s->sum[i];
        if (!a->last) memcpy(acc_row(s, i), s->total[1] + i * s->value_dim, sizeof(float) * (size_t)a->value_dim);
    }
    if (a->last) write_results(s);
}

static void forward_strip(usp_strip *s, const usp_work *work) {
    usp_strip_rows(s, 0, &s->args->q, s->head, s->args->scale);
    forward_begin(s);
    usp_strip_tiles(s, work, &s->args->by_query, forward_step);
    forward_end(s);
}

usp_status usp_cpu_softmax_forward(usp_device *device, const usp_softmax *args, usp_stream stream) {
    (void)stream;
    run_query_heads(device, args, forward_strip);
    return USP_OK;
}

/* ---- backward ---------------------------------------------------------------------------------------------------- */

/* What is kept of `count` queries; rows without any key, and padding, get a weight of 0. */
static void load_stats(usp_strip *s, int head, int begin, int count, int padded) {
    const usp_softmax *a = s->args;
    for (int i = 0; i < padded; i++) {
        int64_t at = stat_at(s, head, begin + (i < count ? i : 0));
        int empty = i >= count || a->sum[at] == 0;
        s->max[i] = empty ? INFINITY : a->top[at];
        s->factor[i] = empty ? 0 : 1 / a->sum[at];
        s->delta[i] = empty ? 0 : a->delta[at];
    }
}

/* Weights P in score[0] and their gradient in score[1], both 0 where masked, whatever top, delta and dout.v are. */
static void backward_scores(usp_strip *s, const usp_strip_step *step, int by_column) {
    usp_scores scores = {s->score[0], step->count, s->width};
    const usp_stats stats = {s->max, s->factor, s->delta};
    usp_strip_multiply(s, 0, step);
    usp_strip_multiply(s, 1, step);
    usp_strip_bend(s, step);
    usp_strip_drop(s, s->score[1], step);
    s->panel->weigh(scores, s->score[1], &stats, by_column);
    usp_strip_unbend(s, step);
    for (int i = 0; i < 2; i++) mask_scores(s, s->score[i], step, 0);
}

static void clear_totals(usp_strip *s) {
    memset(s->total[0], 0, sizeof(float) * (size_t)(s->width * s->dim));
    memset(s->total[1], 0, sizeof(float) * (size_t)(s->width * s->value_dim));
}

/* Rows of a gradient to a tensor. */
static void store_rows(const usp_strip *s, int which, int head, const usp_tensor *to, usp_dtype dtype) {
    int dim = which ? s->args->value_dim : s->args->dim, stride = which ? s->value_dim : s->dim;
    for (int i = 0; i < s->count; i++)
        s->panel->store(dtype, s->total[which] + i * stride, usp_cpu_row(to, dtype, s->begin + i, s->batch, head), dim);
}

static void query_step(usp_strip *s, const usp_strip_step *step) {
    const usp_softmax *a = s->args;
    usp_strip_columns(s, 0, &a->k, s->key_head, step, 1);
    usp_strip_columns(s, 1, &a->v, s->key_head, step, 1);
    backward_scores(s, step, 0);
    multiply_totals(s, s->score[1], 0, step);
}

/* scale * total, plus the running sum unless it begins here. */
static void store_query_gradient(usp_strip *s) {
    const usp_softmax *a = s->args;
    float before[USP_CPU_DIM] = {0};
    for (int i = 0; i < s->count; i++) {
        float *row = s->total[0] + i * s->dim;
        if (!a->first)
            s->panel->load(USP_F32, usp_cpu_row(&a->dq_sum, USP_F32, s->begin + i, s->batch, s->head), before, a->dim);
        for (int c = 0; c < a->dim; c++) row[c] = before[c] + a->scale * row[c];
    }
    store_rows(s, 0, s->head, a->last ? &a->dq : &a->dq_sum, a->last ? a->dtype : USP_F32);
}

static void query_strip(usp_strip *s, const usp_work *work) {
    const usp_softmax *a = s->args;
    usp_strip_rows(s, 0, &a->q, s->head, a->scale);
    usp_strip_rows(s, 1, &a->dout, s->head, 1);
    load_stats(s, s->head, s->begin, s->count, s->width);
    clear_totals(s);
    usp_strip_tiles(s, work, &a->by_query, query_step);
    store_query_gradient(s);
}

static void key_step(usp_strip *s, const usp_strip_step *step) {
    const usp_softmax *a = s->args;
    usp_strip_columns(s, 0, &a->q, s->head, step, a->scale);
    usp_strip_columns(s, 1, &a->dout, s->head, step, 1);
    load_stats(s, s->head, step->begin, step->count, step->count);
    backward_scores(s, step, 1);
    multiply_totals(s, s->score[1], 0, step);
    usp_strip_drop(s, s->score[0], step);
    multiply_totals(s, s->score[0], 1, step);
}

/* Sums over all query heads that read this key head, in ascending order. */
static void key_strip(usp_strip *s, const usp_work *work) {
    const usp_softmax *a = s->args;
    usp_strip_rows(s, 0, &a->k, s->key_head, 1);
    usp_strip_rows(s, 1, &a->v, s->key_head, 1);
    clear_totals(s);
    for (s->head = 0; s->head < a->heads; s->head++)
        if (usp_cpu_head(a->kv, s->head) == s->key_head) usp_strip_tiles(s, work, &a->by_key, key_step);
    store_rows(s, 0, s->key_head, &a->dk, a->key_dtype);
    store_rows(s, 1, s->key_head, &a->dv, a->key_dtype);
}

usp_status usp_cpu_softmax_backward(usp_device *device, const usp_softmax *args, usp_stream stream) {
    usp_strip strip;
    (void)stream;
    run_query_heads(device, args, query_strip);
    usp_strip_init(&strip, usp_cpu_panel(device), args);
    strip.keys_are_rows = 1;
    for (strip.batch = 0; strip.batch < args->batch; strip.batch++)
        for (strip.key_head = 0; strip.key_head < args->key_heads; strip.key_head++)
            usp_strip_walk(&strip, &args->by_key, key_strip);
    return USP_OK;
}
