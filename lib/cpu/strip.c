/* strip.c - lays strips out, loads them, and walks work items, tiles and steps. */
#include <string.h>

#include "../dropout.h"
#include "strip.h"

/* ---- marks ------------------------------------------------------------------------------------------------------- */

/* The marks of queries or keys from row `begin` on. Keys have bounds in trees only. */
static usp_marks marks_of(const usp_strip *s, int keys, int64_t begin) {
    const usp_pairs *p = &s->args->pairs;
    const int32_t *across = s->args->slopes ? p->diagonal : p->query;
    if (!keys) return (usp_marks){p->query + begin, p->low + begin, p->high + begin, across + begin};
    return (usp_marks){p->key + begin, s->column_low, p->last ? p->last + begin : s->column_high, p->key + begin};
}

/* Of rows, padded. */
static void mark_rows(usp_strip *s) {
    usp_marks from = marks_of(s, s->keys_are_rows, s->begin);
    for (int i = 0; i < s->width; i++) {
        int row = i < s->count ? i : s->count - 1;
        s->row_at[i] = from.at[row];
        s->row_low[i] = from.low[row];
        s->row_high[i] = from.high[row];
        s->row_across[i] = from.across[row];
    }
    s->view.row = (usp_marks){s->row_at, s->row_low, s->row_high, s->row_across};
}

/* Extremes of marks. */
typedef struct extremes {
    int32_t first, last, low, last_low, first_high, high;
} extremes;

static extremes extremes_of(const usp_marks *m, int count) {
    extremes e = {m->at[0], m->at[0], m->low[0], m->low[0], m->high[0], m->high[0]};
    for (int i = 1; i < count; i++) {
        e.first = m->at[i] < e.first ? m->at[i] : e.first;
        e.last = m->at[i] > e.last ? m->at[i] : e.last;
        e.low = m->low[i] < e.low ? m->low[i] : e.low;
        e.last_low = m->low[i] > e.last_low ? m->low[i] : e.last_low;
        e.first_high = m->high[i] < e.first_high ? m->high[i] : e.first_high;
        e.high = m->high[i] > e.high ? m->high[i] : e.high;
    }
    return e;
}

/* May no pair (0), every pair (1) or some pairs (2) of the step be allowed? */
static int step_kind(const usp_strip *s, const usp_strip_step *step) {
    extremes r = extremes_of(&s->view.row, s->count), c = extremes_of(&s->view.column, step->count);
    if (c.last < r.low || c.first > r.high || r.last < c.low || r.first > c.high) return 0;
    return r.last_low <= c.first && c.last <= r.first_high && c.last_low <= r.first && r.last <= c.first_high ? 1 : 2;
}

/* ---- strips ------------------------------------------------------------------------------------------------------ */

void usp_strip_init(usp_strip *s, const usp_panel *panel, const usp_softmax *args) {
    s->panel = panel;
    s->args = args;
    s->keys_are_rows = 0;
    s->dim = usp_cpu_pad(args->dim);
    s->value_dim = usp_cpu_pad(args->value_dim);
    s->block = usp_cpu_block(args->dim, args->value_dim);
    for (int i = 0; i < USP_CPU_BLOCK; i++) s->column_low[i] = INT32_MIN, s->column_high[i] = INT32_MAX;
}

/* Lays the tiles out for `count` rows of the work item from its row `first` on. */
static void place(usp_strip *s, const usp_work *work, int first) {
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
    s->slope = free;
    mark_rows(s);
}

void usp_strip_walk(usp_strip *s, const usp_tiles *tiles, usp_strip_fn run) {
    for (int w = 0; w < tiles->count->works; w++)
        for (int first = 0; first < tiles->work[w].count; first += s->block) {
            place(s, tiles->work + w, first);
            run(s, tiles->work + w);
        }
}

/* ---- tiles ------------------------------------------------------------------------------------------------------- */

static int least(int a, int b) {
    return a < b ? a : b;
}

/* The numbers that dropout draws for each query of the step. */
static void seed_dropout(usp_strip *s, const usp_strip_step *step) {
    const usp_dropout *d = &s->args->dropout;
    const int32_t *query = s->keys_are_rows ? s->view.column.at : s->view.row.at;
    uint32_t line = (uint32_t)(s->batch * d->heads + d->first_head + s->head);
    for (int i = 0; i < (s->keys_are_rows ? step->count : s->width) && d->rate > 0; i++)
        s->dropout[i] = usp_dropout_row(d->state[0], d->state[1], line, (uint32_t)query[i]);
}

/* Cuts a tile where the column index is a multiple of the block, so that a row's sums do not depend on how rows are
 * grouped into work items. */
static void walk_tile(usp_strip *s, const usp_tile *tile, usp_strip_step_fn visit) {
    for (int begin = tile->begin, end; begin < tile->end; begin = end) {
        end = least(tile->end, (begin / s->block + 1) * s->block);
        usp_strip_step step = {.begin = begin, .count = end - begin};
        s->view.column = marks_of(s, !s->keys_are_rows, begin);
        int kind = begin >= tile->full_begin && end <= tile->full_end ? 1 : step_kind(s, &step);
        step.masked = kind == 2;
        if (!kind) continue;
        seed_dropout(s, &step);
        visit(s, &step);
    }
}

void usp_strip_tiles(usp_strip *s, const usp_work *work, const usp_tiles *tiles, usp_strip_step_fn visit) {
    for (int t = 0; t < work->tiles; t++) walk_tile(s, tiles->tile + work->first_tile + t, visit);
}

/* ---- loads and products ------------------------------------------------------------------------------------------ */

void usp_strip_rows(usp_strip *s, int which, const usp_tensor *tensor, int head, float scale) {
    int dim = which ? s->args->value_dim : s->args->dim;
    float line[USP_CPU_DIM], *to = s->row[which];
    if (s->count < s->width) memset(to, 0, sizeof *to * (size_t)(dim * s->width));
    for (int i = 0; i < s->count; i++) {
        s->panel->load(s->args->dtype, usp_cpu_row(tensor, s->args->dtype, s->begin + i, s->batch, head), line, dim);
        for (int c = 0; c < dim; c++) to[c * s->width + i] = scale * line[c];
    }
}

/* Rows of zeros follow up to a multiple of USP_CPU_ROWS, as products want. */
void usp_strip_columns(usp_strip *s, int which, const usp_tensor *tensor, int head, const usp_strip_step *step,
                       float scale) {
    int dim = which ? s->args->value_dim : s->args->dim, stride = which ? s->value_dim : s->dim;
    int rows = (step->count + USP_CPU_ROWS - 1) / USP_CPU_ROWS * USP_CPU_ROWS;
    float *to = s->column[which], factor[USP_CPU_BLOCK];
    for (int j = 0; j < step->count; j++, to += stride) {
        s->panel->load(s->args->dtype, usp_cpu_row(tensor, s->args->dtype, step->begin + j, s->batch, head), to, dim);
        memset(to + dim, 0, sizeof *to * (size_t)(stride - dim));
    }
    memset(to, 0, sizeof *to * (size_t)((rows - step->count) * stride));
    for (int j = 0; j < step->count; j++) factor[j] = scale;
    s->panel->scale(s->column[which], factor, step->count, stride);
}

void usp_strip_multiply(usp_strip *s, int which, const usp_strip_step *step) {
    usp_product p = {.m = (step->count + USP_CPU_ROWS - 1) / USP_CPU_ROWS * USP_CPU_ROWS, .n = s->width};
    p.k = which ? s->args->value_dim : s->args->dim;
    p.a = s->column[which], p.a_row = which ? s->value_dim : s->dim, p.a_step = 1;
    p.b = s->row[which], p.b_row = s->width;
    p.c = s->score[which], p.c_row = s->width;
    s->panel->multiply(&p);
}

/* ---- what few layers ask for ------------------------------------------------------------------------------------- */

void usp_strip_bend(usp_strip *s, const usp_strip_step *step) {
    const usp_softmax *a = s->args;
    usp_scores scores = {s->score[0], step->count, s->width};
    if (a->soft_cap > 0) s->panel->cap(scores, s->slope, a->soft_cap);
    if (a->slopes) s->panel->bias(scores, &s->view, a->slopes[s->head]);
}

void usp_strip_unbend(usp_strip *s, const usp_strip_step *step) {
    for (int i = 0; i < step->count * s->width && s->args->soft_cap > 0; i++) s->score[1][i] *= s->slope[i];
}

void usp_strip_drop(usp_strip *s, float *weights, const usp_strip_step *step) {
    usp_scores scores = {weights, step->count, s->width};
    float rate = s->args->dropout.rate;
    if (rate > 0) s->panel->drop(scores, &s->view, s->dropout, rate, s->keys_are_rows);
}
