/* gpu_softmax.c - softmax attention on the CUDA device against the CPU's: bands, segments, folds, heads, dims. Lists of
 * work come from lib/schedule.c where it can make them, else from the contract of lib/device.h alone. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "../cuda/launch.h"
#include "../cuda/softmax.h"
#include "gpu_softmax.h"
#include "planned.h"

/* ---- softmax: cases ---------------------------------------------------------------------------------------------- */

#define USP_CAUSAL USP_GPU_NO_LIMIT, 0
#define USP_FULL USP_GPU_NO_LIMIT, USP_GPU_NO_LIMIT
static const usp_gpu_softmax_case softmax_cases[] = {
    {"causal", USP_BF16, BSHD, 2, 2, 2, 1, 0, 128, 128, {{0, 300, 1}}, {{{0, 300, 1}}}, USP_CAUSAL, 128},
    {"causal", USP_F16, BHSD, 1, 3, 3, 1, 0, 64, 64, {{0, 257, 1}}, {{{0, 257, 1}}}, USP_CAUSAL, 128},
    {"causal", USP_F32, BSHD, 1, 2, 2, 1, 0, 64, 64, {{0, 130, 1}}, {{{0, 130, 1}}}, USP_CAUSAL, 128},
    {"full packed", USP_BF16, PACKED, 2, 2, 2, 1, 0, 128, 128, {{0, 192, 1}}, {{{0, 333, 1}}}, USP_FULL, 128},
    {"full f16", USP_F16, SBHD, 2, 2, 2, 1, 0, 128, 64, {{0, 65, 1}}, {{{0, 129, 1}}}, USP_FULL, 64},
    {"grouped heads", USP_BF16, BSHD, 1, 8, 2, 4, 0, 64, 64, {{0, 200, 1}}, {{{0, 200, 1}}}, USP_CAUSAL, 128},
    {"grouped heads, offset", USP_BF16, BSHD, 1, 5, 3, 3, 2, 128, 128, {{0, 150, 1}}, {{{0, 150, 1}}}, USP_CAUSAL, 128},
    {"one key head, f32", USP_F32, PACKED, 2, 4, 1, 4, 0, 17, 5, {{0, 70, 1}}, {{{0, 90, 1}}}, USP_FULL, 33},
    {"d 5", USP_BF16, BSHD, 1, 2, 2, 1, 0, 5, 5, {{0, 100, 1}}, {{{0, 100, 1}}}, USP_CAUSAL, 128},
    {"d 17, e 96", USP_F16, ODD, 1, 2, 2, 1, 0, 17, 96, {{0, 140, 1}}, {{{0, 140, 1}}}, USP_CAUSAL, 128},
    {"d 96", USP_BF16, BSHD, 1, 2, 2, 1, 0, 96, 96, {{0, 200, 1}}, {{{0, 200, 1}}}, USP_CAUSAL, 128},
    {"d 192, e 128", USP_BF16, BSHD, 1, 2, 2, 1, 0, 192, 128, {{0, 160, 1}}, {{{0, 160, 1}}}, USP_CAUSAL, 128},
    {"d 64, e 128", USP_BF16, BSHD, 1, 2, 2, 1, 0, 64, 128, {{0, 160, 1}}, {{{0, 160, 1}}}, USP_CAUSAL, 128},
    {"d 256", USP_BF16, BSHD, 1, 1, 1, 1, 0, 256, 256, {{0, 140, 1}}, {{{0, 140, 1}}}, USP_CAUSAL, 128},
    {"d 256, f32", USP_F32, BHSD, 1, 1, 1, 1, 0, 256, 64, {{0, 70, 1}}, {{{0, 70, 1}}}, USP_CAUSAL, 128},
    {"odd rows, d 128", USP_BF16, ODD, 2, 2, 2, 1, 0, 128, 128, {{0, 130, 1}}, {{{0, 150, 1}}}, USP_FULL, 128},
    {"zigzag, two blocks",
     USP_BF16,
     BSHD,
     1,
     2,
     2,
     1,
     0,
     128,
     128,
     {{70, 70, 1}, {280, 71, 1}},
     {{{70, 70, 1}, {280, 71, 1}}, {{0, 70, 1}, {351, 69, 1}}},
     USP_CAUSAL,
     128},
    {"zigzag, two blocks, f16",
     USP_F16,
     PACKED,
     2,
     2,
     1,
     2,
     0,
     64,
     64,
     {{64, 64, 1}, {256, 64, 1}},
     {{{64, 64, 1}, {256, 64, 1}}, {{128, 64, 1}, {192, 64, 1}}},
     USP_CAUSAL,
     64},
    {"stripe, two blocks",
     USP_BF16,
     BSHD,
     1,
     2,
     2,
     1,
     0,
     64,
     64,
     {{1, 80, 4}, {3, 79, 4}},
     {{{1, 80, 4}, {3, 79, 4}}, {{0, 80, 4}, {2, 80, 4}}},
     USP_CAUSAL,
     128},
    {"stripe, f32",
     USP_F32,
     BSHD,
     1,
     2,
     2,
     1,
     0,
     64,
     64,
     {{1, 50, 3}, {0, 51, 3}},
     {{{2, 50, 3}}, {{0, 51, 3}}},
     USP_CAUSAL,
     47},
    {"window", USP_BF16, BSHD, 1, 2, 2, 1, 0, 128, 128, {{0, 400, 1}}, {{{0, 400, 1}}}, 65, 0, 128},
    {"window of both sides", USP_F16, BSHD, 1, 2, 2, 1, 0, 64, 64, {{0, 300, 1}}, {{{0, 350, 1}}}, 7, 20, 128},
    {"window, striped", USP_BF16, BSHD, 1, 2, 2, 1, 0, 64, 64, {{0, 120, 3}}, {{{1, 200, 2}}}, 30, 5, 100},
    {"rows without keys", USP_BF16, BSHD, 1, 2, 2, 1, 0, 128, 128, {{0, 200, 1}}, {{{150, 100, 1}}}, USP_CAUSAL, 128},
    {"rows without keys, f32", USP_F32, ODD, 2, 1, 1, 1, 0, 20, 12, {{0, 99, 1}}, {{{60, 50, 1}}}, USP_CAUSAL, 31},
    {"second block not allowed",
     USP_BF16,
     BSHD,
     1,
     2,
     2,
     1,
     0,
     64,
     64,
     {{0, 128, 1}},
     {{{0, 128, 1}}, {{128, 128, 1}}},
     USP_CAUSAL,
     128},
    {"first block not allowed",
     USP_BF16,
     BSHD,
     1,
     2,
     2,
     1,
     0,
     64,
     64,
     {{0, 128, 1}},
     {{{128, 128, 1}}, {{0, 128, 1}}},
     USP_CAUSAL,
     128},
    {"one query", USP_BF16, BSHD, 3, 2, 2, 1, 0, 128, 128, {{500, 1, 1}}, {{{0, 700, 1}}}, USP_CAUSAL, 128},
    {"one key", USP_F16, BSHD, 1, 2, 2, 1, 0, 64, 64, {{0, 70, 1}}, {{{30, 1, 1}}}, USP_CAUSAL, 128},
    {"no keys", USP_BF16, BSHD, 1, 2, 2, 1, 0, 64, 64, {{0, 70, 1}}, {{{0, 0, 1}}}, USP_CAUSAL, 128},
    {"long", USP_BF16, BSHD, 1, 1, 1, 1, 0, 128, 128, {{0, 1500, 1}}, {{{0, 1500, 1}}}, USP_CAUSAL, 128},
};
#undef USP_CAUSAL
#undef USP_FULL

/* ---- softmax: tiles ---------------------------------------------------------------------------------------------- */

static int64_t total_length(const usp_gpu_segment *s) {
    int64_t sum = 0;
    for (int i = 0; i < USP_GPU_SEGMENTS; i++) sum += s[i].length;
    return sum;
}

static int64_t limit(int value, int sign) {
    return sign * (int64_t)value;
}

static int32_t to_int32(int64_t x) {
    return (int32_t)(x < INT32_MIN ? INT32_MIN : x > INT32_MAX ? INT32_MAX : x);
}

/* The tile of one work item and one usp_gpu_segment, whose first column is `first`; 0 if no pair is allowed. Offsets
 * column - row of the pairs lie in [position - last, position - first row]. */
static int make_tile(const usp_work *work, usp_gpu_segment s, int first, int64_t low, int64_t high, usp_tile *tile) {
    int64_t top = work->origin + (int64_t)work->begin * work->stride;
    int64_t bottom = top + (int64_t)(work->count - 1) * work->stride;
    *tile = (usp_tile){.origin = s.start - first * s.stride, .stride = s.stride};
    int any = 0, full = 0;
    for (int j = first; j < first + s.length; j++) {
        int64_t position = tile->origin + (int64_t)j * s.stride;
        if (position - top < low || position - bottom > high) continue;
        if (!any++) tile->begin = tile->full_begin = tile->full_end = j;
        tile->end = j + 1;
        if (position - bottom < low || position - top > high) continue;
        if (!full++) tile->full_begin = j;
        tile->full_end = j + 1;
    }
    return any > 0;
}

/* Offsets are key - query in tiles: where rows are keys, column - row is the negative of that. */
static usp_gpu_plan make_plan(usp_gpu_test *t, const usp_gpu_segment *rows, const usp_gpu_segment *columns,
                              const usp_gpu_softmax_case *c, int keys_are_rows) {
    static usp_work work[4096];
    static usp_tile tile[4096];
    int works = 0, tiles = 0;
    int64_t low = limit(c->low, -1), high = limit(c->high, 1);
    for (int r = 0, begin = 0; r < USP_GPU_SEGMENTS; begin += rows[r++].length) {
        for (int at = begin; at < begin + rows[r].length; at += c->work_rows) {
            int left = begin + rows[r].length - at;
            usp_work *w = &work[works++];
            *w = (usp_work){at,
                            left < c->work_rows ? left : c->work_rows,
                            rows[r].start - begin * rows[r].stride,
                            rows[r].stride,
                            tiles,
                            0};
            for (int s = 0, first = 0; s < USP_GPU_SEGMENTS; first += columns[s++].length) {
                if (!make_tile(w, columns[s], first, keys_are_rows ? -high : low, keys_are_rows ? -low : high,
                               &tile[tiles]))
                    continue;
                tile[tiles].low = to_int32(low), tile[tiles].high = to_int32(high);
                w->tiles++, tiles++;
            }
        }
    }
    usp_gpu_plan p = {.works = works};
    p.work = usp_gpu_put(t, work, sizeof *work * (size_t)works);
    p.tile = usp_gpu_put(t, tile, sizeof *tile * (size_t)tiles);
    return p;
}

/* Can lib/schedule.c plan the case? It makes whole causal and full sequences in items of USP_WORK_ROWS rows; the other
 * cases have what it never makes alone or not at all: gaps, windows, two blocks in one fold, shorter items. */
static int is_planned(const usp_gpu_softmax_case *c) {
    const usp_gpu_segment *q = &c->query[0], *k = &c->key[0][0];
    int whole = q->start == 0 && k->start == 0 && q->stride == 1 && k->stride == 1 && k->length > 0 &&
                total_length(c->query) == q->length && total_length(c->key[0]) == k->length &&
                total_length(c->key[1]) == 0;
    int causal = c->high == 0 && q->length == k->length;
    return whole && c->low == USP_GPU_NO_LIMIT && (causal || c->high == USP_GPU_NO_LIMIT) &&
           c->work_rows == USP_WORK_ROWS;
}

static void take_plans(usp_gpu_test *t, usp_gpu_softmax *s) {
    usp_planned p;
    usp_mask mask = s->c->high == 0 ? USP_MASK_CAUSAL : USP_MASK_FULL;
    if (usp_planned_open(&p, USP_DEVICE_CPU, USP_SOFTMAX, mask, s->q.tokens, s->k[0].tokens) == USP_OK) {
        usp_tiles query = usp_schedule_query_tiles(p.schedule, 0), key = usp_schedule_key_tiles(p.schedule, 0);
        size_t tiles = sizeof(usp_tile) * (size_t)p.schedule->tiles;
        size_t at = usp_gpu_put(t, p.schedule->device_tile, tiles);
        s->query_plan[0] =
            (usp_gpu_plan){usp_gpu_put(t, query.work, sizeof *query.work * (size_t)query.works), at, query.works};
        s->key_plan[0] =
            (usp_gpu_plan){usp_gpu_put(t, key.work, sizeof *key.work * (size_t)key.works),
                           at + (size_t)((const char *)key.tile - (const char *)p.schedule->device_tile), key.works};
    } else {
        usp_gpu_fail(t, "lists", usp_last_error());
    }
    usp_planned_close(&p);
}

/* ---- softmax: calls ---------------------------------------------------------------------------------------------- */

static usp_softmax softmax_args(const usp_gpu_world *w, const usp_gpu_softmax *s, int block, const usp_gpu_plan *p) {
    const usp_gpu_softmax_case *c = s->c;
    return (usp_softmax){.dtype = w->dtype,
                         .batch = c->batch,
                         .heads = c->heads,
                         .key_heads = c->key_heads,
                         .dim = c->dim,
                         .value_dim = c->value_dim,
                         .kv = {c->group, c->offset},
                         .scale = 1 / sqrtf((float)c->dim),
                         .queries = s->q.tokens,
                         .keys = s->k[block].tokens,
                         .q = usp_gpu_tensor(w, &s->q),
                         .k = usp_gpu_tensor(w, &s->k[block]),
                         .v = usp_gpu_tensor(w, &s->v[block]),
                         .tiles = {usp_gpu_at(w, p->work), usp_gpu_at(w, p->tile), p->works},
                         .acc = usp_gpu_at(w, s->acc.at),
                         .lse = usp_gpu_at(w, s->lse.at),
                         .out = usp_gpu_tensor(w, &s->out),
                         .dout = usp_gpu_tensor(w, &s->dout),
                         .delta = usp_gpu_at(w, s->delta.at),
                         .dq_sum = usp_gpu_tensor(w, &s->dq_sum),
                         .dk_sum = usp_gpu_tensor(w, &s->dk_sum),
                         .dv_sum = usp_gpu_tensor(w, &s->dv_sum),
                         .dq = usp_gpu_tensor(w, &s->dq),
                         .dk = usp_gpu_tensor(w, &s->dk),
                         .dv = usp_gpu_tensor(w, &s->dv),
                         .scratch = w->scratch};
}

/* The device's entry; on a GPU with fewer thread blocks a launch, or as if of other processors, what it calls. */
static usp_status attend(const usp_gpu_world *w, const usp_gpu_softmax *s, const usp_softmax *a,
                         usp_softmax_call call) {
    const usp_device_ops *ops = w->device->ops;
    usp_status (*const entry[])(usp_device *, const usp_softmax *, usp_stream) = {
        ops->softmax_forward, ops->softmax_backward_query, ops->softmax_backward_key};
    if (ops->kind != USP_DEVICE_CUDA || (s->grid == USP_CUDA_GRID && !s->processors))
        return entry[call](w->device, a, w->stream);
    usp_gpu gpu = *usp_cuda_gpu(w->device);
    if (s->processors) gpu.processors = s->processors;
    return usp_cuda_softmax(&gpu, a, call, s->grid, w->stream);
}

usp_status usp_gpu_softmax_forward(const usp_gpu_world *w, const void *args) {
    const usp_gpu_softmax *s = args;
    usp_status status = USP_OK;
    for (int i = 0; i < s->blocks && status == USP_OK; i++) {
        usp_softmax a = softmax_args(w, s, i, &s->query_plan[i]);
        a.first = i == 0, a.last = i == s->blocks - 1;
        status = attend(w, s, &a, USP_CALL_FORWARD);
    }
    return status;
}

usp_status usp_gpu_softmax_delta(const usp_gpu_world *w, const void *args) {
    const usp_gpu_softmax *s = args;
    usp_softmax a = softmax_args(w, s, 0, &s->query_plan[0]);
    return w->device->ops->softmax_delta(w->device, &a, usp_gpu_at(w, s->delta.at), w->stream);
}

usp_status usp_gpu_softmax_backward_query(const usp_gpu_world *w, const void *args) {
    const usp_gpu_softmax *s = args;
    usp_status status = USP_OK;
    for (int i = 0; i < s->blocks && status == USP_OK; i++) {
        usp_softmax a = softmax_args(w, s, i, &s->query_plan[i]);
        a.first = i == 0, a.last = i == s->blocks - 1;
        status = attend(w, s, &a, USP_CALL_BACKWARD_QUERY);
    }
    return status;
}

usp_status usp_gpu_softmax_backward_key(const usp_gpu_world *w, const void *args) {
    const usp_gpu_softmax *s = args;
    usp_status status = USP_OK;
    for (int i = 0; i < s->folds && status == USP_OK; i++) {
        usp_softmax a = softmax_args(w, s, s->block, &s->key_plan[s->block]);
        a.first = i == 0, a.last = i == s->folds - 1;
        status = attend(w, s, &a, USP_CALL_BACKWARD_KEY);
    }
    return status;
}

/* lse and delta are [batch, heads, queries]. */
static usp_gpu_view make_statistic(usp_gpu_test *t, const char *name, const usp_gpu_softmax_case *c, int64_t queries) {
    usp_gpu_view v = usp_gpu_make_view(t, name, BHSD, queries, c->batch, c->heads, 1);
    v.wide = v.strict = 1;
    return v;
}

void usp_gpu_make_gradients(usp_gpu_test *t, usp_gpu_softmax *s, int block) {
    const usp_gpu_softmax_case *c = s->c;
    int64_t keys = s->k[block].tokens;
    s->block = block;
    s->dk = usp_gpu_make_view(t, "dk", c->how, keys, c->batch, c->key_heads, c->dim);
    s->dv = usp_gpu_make_view(t, "dv", c->how, keys, c->batch, c->key_heads, c->value_dim);
    s->dk_sum = usp_gpu_make_view(t, "sum of dk", c->how, keys, c->batch, c->key_heads, c->dim);
    s->dv_sum = usp_gpu_make_view(t, "sum of dv", c->how, keys, c->batch, c->key_heads, c->value_dim);
    s->dk_sum.wide = s->dv_sum.wide = 1;
}

static void make_keys(usp_gpu_test *t, usp_gpu_softmax *s, int block) {
    const usp_gpu_softmax_case *c = s->c;
    int64_t keys = total_length(c->key[block]);
    s->k[block] = usp_gpu_make_view(t, "k", c->how, keys, c->batch, c->key_heads, c->dim);
    s->v[block] = usp_gpu_make_view(t, "v", c->how, keys, c->batch, c->key_heads, c->value_dim);
    usp_gpu_fill(t, &s->k[block], 1);
    usp_gpu_fill(t, &s->v[block], 1);
    if (is_planned(c)) {
        take_plans(t, s);
        return;
    }
    s->query_plan[block] = make_plan(t, c->query, c->key[block], c, 0);
    s->key_plan[block] = make_plan(t, c->key[block], c->query, c, 1);
}

usp_gpu_softmax usp_gpu_make_softmax(usp_gpu_test *t, const usp_gpu_softmax_case *c, int grid) {
    usp_gpu_softmax s = {.c = c, .grid = grid, .blocks = total_length(c->key[1]) > 0 ? 2 : 1};
    int64_t queries = total_length(c->query);
    s.q = usp_gpu_make_view(t, "q", c->how, queries, c->batch, c->heads, c->dim);
    s.out = usp_gpu_make_view(t, "out", c->how, queries, c->batch, c->heads, c->value_dim);
    s.dout = usp_gpu_make_view(t, "dout", c->how, queries, c->batch, c->heads, c->value_dim);
    s.dq = usp_gpu_make_view(t, "dq", c->how, queries, c->batch, c->heads, c->dim);
    s.dq_sum = usp_gpu_make_view(t, "sum of dq", c->how, queries, c->batch, c->heads, c->dim);
    s.dq_sum.wide = 1;
    s.acc = usp_gpu_make_wide(t, "acc", queries, c->batch, c->heads, c->value_dim);
    s.lse = make_statistic(t, "lse", c, queries);
    s.delta = make_statistic(t, "delta", c, queries);
    usp_gpu_fill(t, &s.q, 1);
    usp_gpu_fill(t, &s.dout, 1);
    for (int i = 0; i < s.blocks; i++) make_keys(t, &s, i);
    return s;
}

/* The gradients of every key block, once and folded twice. */
static void check_softmax_keys(usp_gpu_test *t, usp_gpu_softmax *s) {
    for (int i = 0; i < s->blocks; i++) {
        usp_gpu_make_gradients(t, s, i);
        for (s->folds = 1; s->folds <= 2; s->folds++) {
            const usp_gpu_view *once[] = {&s->dk, &s->dv, NULL},
                               *twice[] = {&s->dk, &s->dv, &s->dk_sum, &s->dv_sum, NULL};
            usp_gpu_run(t, "softmax_backward_key", usp_gpu_softmax_backward_key, s, s->folds == 1 ? once : twice);
        }
    }
}

static void check_softmax(usp_gpu_test *t, const usp_gpu_softmax_case *c, int grid, int processors) {
    snprintf(t->name, sizeof t->name, "softmax, %s, %d thread blocks a launch, as if of %d processors", c->name, grid,
             processors);
    usp_gpu_begin_case(t, c->dtype);
    usp_gpu_softmax s = usp_gpu_make_softmax(t, c, grid);
    s.processors = processors;
    const usp_gpu_view *one[] = {&s.out, &s.lse, NULL}, *two[] = {&s.out, &s.lse, &s.acc, NULL};
    usp_gpu_run(t, "softmax_forward", usp_gpu_softmax_forward, &s, s.blocks == 1 ? one : two);
    usp_gpu_fill(t, &s.out, 1);
    usp_gpu_run(t, "softmax_delta", usp_gpu_softmax_delta, &s, (const usp_gpu_view *[]){&s.delta, NULL});
    const usp_gpu_view *query_one[] = {&s.dq, NULL}, *query_two[] = {&s.dq, &s.dq_sum, NULL};
    usp_gpu_run(t, "softmax_backward_query", usp_gpu_softmax_backward_query, &s, s.blocks == 1 ? query_one : query_two);
    check_softmax_keys(t, &s);
}

/* ---- the kind ------------------------------------------------------------------------------------------------------
 */

/* A GPU of one processor is always full, so that tensor-core kernels run with all rows of a block; else with half.
 * Cases of two key blocks also in launches of so few thread blocks that each has one work item. */
void usp_gpu_check_softmax(usp_gpu_test *t) {
    for (size_t i = 0; i < sizeof softmax_cases / sizeof *softmax_cases; i++) {
        check_softmax(t, &softmax_cases[i], USP_CUDA_GRID, 0);
        if (softmax_cases[i].dtype != USP_F32) check_softmax(t, &softmax_cases[i], USP_CUDA_GRID, 1);
        if (total_length(softmax_cases[i].key[1]) > 0) check_softmax(t, &softmax_cases[i], 1, 0);
    }
}
