/* gpu_softmax.c - softmax attention on the CUDA device against the CPU's: masks, folds, heads, dims, and what softmax
 * may have beside them. What is kept between calls is in a unit of each device: passes are run as a whole. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "../cuda/softmax.h"
#include "../lib/dropout.h"
#include "../lib/slices.h"
#include "gpu_softmax.h"

/* ---- cases ------------------------------------------------------------------------------------------------------- */

#define CAUSAL .left = USP_GPU_NO_LIMIT, .right = 0
#define FULL .left = USP_GPU_NO_LIMIT, .right = USP_GPU_NO_LIMIT
static const usp_gpu_softmax_case softmax_cases[] = {
    {"causal", USP_BF16, BSHD, 2, 2, 2, 1, 0, 128, 128, 300, {300}, CAUSAL},
    {"causal", USP_F16, BHSD, 1, 3, 3, 1, 0, 64, 64, 257, {257}, CAUSAL},
    {"causal", USP_F32, BSHD, 1, 2, 2, 1, 0, 64, 64, 130, {130}, CAUSAL},
    {"full packed", USP_BF16, PACKED, 2, 2, 2, 1, 0, 128, 128, 192, {333}, FULL},
    {"full f16", USP_F16, SBHD, 2, 2, 2, 1, 0, 128, 64, 65, {129}, FULL, .work_rows = 64},
    {"grouped heads", USP_BF16, BSHD, 1, 8, 2, 4, 0, 64, 64, 200, {200}, CAUSAL},
    {"grouped heads, offset", USP_BF16, BSHD, 1, 5, 3, 3, 2, 128, 128, 150, {150}, CAUSAL},
    {"many heads", USP_BF16, BSHD, 3, 7, 7, 1, 0, 64, 64, 70, {70}, CAUSAL},
    {"one key head, f32", USP_F32, PACKED, 2, 4, 1, 4, 0, 17, 5, 70, {90}, FULL, .work_rows = 33},
    {"d 5", USP_BF16, BSHD, 1, 2, 2, 1, 0, 5, 5, 100, {100}, CAUSAL},
    {"d 8", USP_BF16, BSHD, 1, 2, 2, 1, 0, 8, 8, 100, {100}, CAUSAL},
    {"d 17, e 96", USP_F16, ODD, 1, 2, 2, 1, 0, 17, 96, 140, {140}, CAUSAL},
    {"d 96", USP_BF16, BSHD, 1, 2, 2, 1, 0, 96, 96, 200, {200}, CAUSAL},
    {"d 192, e 128", USP_BF16, BSHD, 1, 2, 2, 1, 0, 192, 128, 160, {160}, CAUSAL},
    {"d 64, e 128", USP_BF16, BSHD, 1, 2, 2, 1, 0, 64, 128, 160, {160}, CAUSAL},
    {"d 256", USP_BF16, BSHD, 1, 1, 1, 1, 0, 256, 256, 140, {140}, CAUSAL},
    {"d 256, long", USP_F16, BHSD, 1, 2, 1, 2, 0, 256, 256, 330, {330}, CAUSAL},
    {"d 192, e 128, documents", USP_F16, BSHD, 2, 4, 2, 2, 0, 192, 128, 190, {110, 80}, CAUSAL, .documents = 50},
    {"d 192, e 128, full", USP_BF16, PACKED, 1, 3, 2, 2, 1, 192, 128, 130, {230}, FULL, .wide_keys = 1},
    {"d 256, window, two blocks", USP_BF16, BSHD, 1, 2, 1, 2, 0, 256, 256, 150, {70, 150}, .left = 60, .right = 3},
    {"d 160, e 72", USP_BF16, SBHD, 2, 2, 2, 1, 0, 160, 72, 99, {140}, FULL, .scatter = 1, .work_rows = 100},
    {"d 72, e 200, tree", USP_F16, BSHD, 1, 2, 2, 1, 0, 72, 200, 140, {90, 50}, FULL, .random = 1, .tree = 1},
    {"d 256, rows without keys", USP_BF16, BSHD, 1, 2, 2, 1, 0, 256, 256, 140, {60}, CAUSAL, .shift = -80, .dlse = 1},
    {"d 256, f32", USP_F32, BHSD, 1, 1, 1, 1, 0, 256, 64, 70, {70}, CAUSAL},
    {"d 512", USP_F16, BSHD, 1, 1, 1, 1, 0, 512, 512, 70, {70}, CAUSAL},
    {"d 512, f32, dropout", USP_F32, BSHD, 1, 1, 1, 1, 0, 512, 512, 40, {50}, FULL, .dropout = 0.25f},
    {"odd rows, d 128", USP_BF16, ODD, 2, 2, 2, 1, 0, 128, 128, 130, {150}, FULL},
    {"window", USP_BF16, BSHD, 1, 2, 2, 1, 0, 128, 128, 400, {400}, .left = 65, .right = 0},
    {"window of both sides", USP_F16, BSHD, 1, 2, 2, 1, 0, 64, 64, 300, {350}, .left = 7, .right = 20},
    {"window, scattered",
     USP_BF16,
     BSHD,
     1,
     2,
     2,
     1,
     0,
     64,
     64,
     120,
     {200},
     .left = 30,
     .right = 5,
     .scatter = 1,
     .work_rows = 100},
    {"scattered, three blocks",
     USP_BF16,
     BSHD,
     1,
     2,
     2,
     1,
     0,
     128,
     128,
     141,
     {141, 70, 91},
     CAUSAL,
     .shift = 60,
     .scatter = 1},
    {"three blocks, f16",
     USP_F16,
     PACKED,
     2,
     2,
     1,
     2,
     0,
     64,
     64,
     128,
     {128, 30, 128},
     CAUSAL,
     .shift = 100,
     .work_rows = 64},
    {"two blocks, f32", USP_F32, BSHD, 1, 2, 2, 1, 0, 64, 64, 101, {50, 51}, CAUSAL, .scatter = 1, .work_rows = 47},
    {"two blocks, odd rows", USP_BF16, ODD, 1, 2, 2, 1, 0, 64, 64, 101, {50, 51}, CAUSAL},
    {"documents", USP_BF16, BSHD, 2, 2, 2, 1, 0, 128, 128, 500, {500}, CAUSAL, .documents = 70},
    {"short documents, two blocks", USP_F16, BSHD, 1, 2, 2, 1, 0, 64, 64, 300, {170, 130}, FULL, .documents = 9},
    {"documents, scattered", USP_BF16, BSHD, 1, 2, 1, 2, 0, 64, 64, 300, {300}, CAUSAL, .scatter = 1, .documents = 40},
    {"random intervals", USP_BF16, BSHD, 1, 2, 2, 1, 0, 128, 128, 300, {310}, FULL, .random = 1},
    {"random intervals, two blocks", USP_F16, BSHD, 1, 2, 2, 1, 0, 64, 64, 200, {110, 200}, FULL, .random = 1},
    {"random intervals, f32", USP_F32, ODD, 1, 2, 2, 1, 0, 40, 72, 90, {50, 61, 20}, FULL, .random = 1},
    {"tree", USP_BF16, BSHD, 1, 2, 2, 1, 0, 128, 128, 300, {300}, CAUSAL, .tree = 1},
    {"tree, random intervals", USP_F16, BSHD, 1, 4, 2, 2, 0, 64, 64, 200, {150, 90}, FULL, .random = 1, .tree = 1},
    {"tree, f32", USP_F32, BSHD, 1, 2, 2, 1, 0, 24, 24, 99, {99}, CAUSAL, .tree = 1},
    {"rows without keys", USP_BF16, BSHD, 1, 2, 2, 1, 0, 128, 128, 200, {100}, CAUSAL, .shift = -150},
    {"rows without keys, f32", USP_F32, ODD, 2, 1, 1, 1, 0, 20, 12, 99, {50}, CAUSAL, .shift = -60, .work_rows = 31},
    {"second block not allowed", USP_BF16, BSHD, 1, 2, 2, 1, 0, 64, 64, 128, {128, 128}, CAUSAL},
    {"first block not allowed", USP_BF16, BSHD, 1, 2, 2, 1, 0, 64, 64, 128, {128, 128}, .left = -128, .right = 300},
    {"one query", USP_BF16, BSHD, 3, 2, 2, 1, 0, 128, 128, 1, {700}, CAUSAL, .shift = 500},
    {"one key", USP_F16, BSHD, 1, 2, 2, 1, 0, 64, 64, 70, {1}, CAUSAL, .shift = -30, .dlse = 1},
    {"no keys", USP_BF16, BSHD, 1, 2, 2, 1, 0, 64, 64, 70, {0}, CAUSAL},
    {"long", USP_BF16, BSHD, 1, 1, 1, 1, 0, 128, 128, 1500, {1500}, CAUSAL},
    {"large scores, three blocks", USP_BF16, BSHD, 1, 2, 2, 1, 0, 128, 128, 200, {70, 60, 70}, CAUSAL, .size = 50},
    {"fp32 gradients of keys", USP_BF16, BSHD, 1, 4, 2, 2, 0, 128, 128, 200, {90, 110}, CAUSAL, .wide_keys = 1},
    {"fp32 gradients of keys, odd", USP_F16, ODD, 1, 2, 2, 1, 0, 40, 40, 90, {90}, CAUSAL, .wide_keys = 1},
    {"peaks", USP_BF16, BSHD, 2, 3, 3, 1, 0, 128, 128, 200, {90, 110}, CAUSAL, .peaks = 1},
    {"peaks, f32", USP_F32, BSHD, 1, 2, 2, 1, 0, 32, 32, 90, {50, 40}, CAUSAL, .shift = -20, .peaks = 1},
    {"sinks", USP_BF16, BSHD, 2, 3, 3, 1, 0, 128, 128, 200, {90, 110}, CAUSAL, .sinks = 1},
    {"sinks, f32", USP_F32, BSHD, 1, 2, 2, 1, 0, 32, 32, 90, {90}, .left = 9, .right = 0, .sinks = 1, .dlse = 1},
    {"gradient of lse", USP_BF16, BSHD, 1, 2, 2, 1, 0, 64, 64, 200, {200}, CAUSAL, .dlse = 1},
    {"soft cap", USP_BF16, BSHD, 1, 2, 2, 1, 0, 128, 128, 200, {200}, CAUSAL, .size = 3, .soft_cap = 4},
    {"soft cap, f32", USP_F32, BSHD, 1, 2, 2, 1, 0, 32, 32, 90, {90}, CAUSAL, .size = 3, .soft_cap = 2},
    {"slopes", USP_BF16, BSHD, 1, 4, 2, 2, 0, 64, 64, 200, {200}, CAUSAL, .slopes = 1},
    {"slopes, f32", USP_F32, BSHD, 1, 2, 2, 1, 0, 32, 32, 90, {100}, FULL, .shift = 5, .slopes = 1},
    {"dropout", USP_BF16, BSHD, 2, 4, 2, 2, 0, 128, 128, 200, {200}, CAUSAL, .dropout = 0.2f},
    {"dropout, two blocks, f16", USP_F16, BSHD, 1, 2, 2, 1, 0, 64, 64, 200, {90, 110}, FULL, .dropout = 0.5f},
    {"little dropout", USP_BF16, BSHD, 1, 2, 2, 1, 0, 128, 128, 400, {400}, CAUSAL, .dropout = 0.01f},
    {"much dropout, f16", USP_F16, BSHD, 1, 2, 2, 1, 0, 64, 64, 300, {400}, FULL, .dropout = 0.95f},
    {"dropout, f32", USP_F32, BSHD, 1, 2, 2, 1, 0, 32, 32, 90, {90}, CAUSAL, .dropout = 0.1f},
    {"all of it",
     USP_BF16,
     BSHD,
     2,
     4,
     2,
     2,
     0,
     128,
     128,
     250,
     {100, 90, 60},
     .left = 100,
     .right = 0,
     .scatter = 1,
     .documents = 120,
     .tree = 1,
     .size = 2,
     .soft_cap = 5,
     .slopes = 1,
     .sinks = 1,
     .dlse = 1,
     .peaks = 1,
     .dropout = 0.2f,
     .wide_keys = 1},
    {"all of it", USP_F16,    BSHD,      1,          4,
     4,           1,          0,         64,         64,
     250,         {250},      CAUSAL,    .size = 2,  .soft_cap = 5,
     .slopes = 1, .sinks = 1, .dlse = 1, .peaks = 1, .dropout = 0.2f},
    {"all of it",
     USP_F32,
     ODD,
     1,
     4,
     2,
     2,
     0,
     30,
     50,
     120,
     {70, 51},
     CAUSAL,
     .scatter = 1,
     .random = 1,
     .tree = 1,
     .size = 2,
     .soft_cap = 5,
     .slopes = 1,
     .sinks = 1,
     .dlse = 1,
     .peaks = 1,
     .dropout = 0.2f},
    {"slopes, scattered", USP_BF16, BSHD, 1, 8, 4, 2, 0, 128, 128, 300, {300}, FULL, .scatter = 1, .slopes = 1},
    {"slopes, both sides", USP_BF16, BSHD, 1, 8, 4, 2, 0, 128, 128, 400, {400}, FULL, .slopes = 1},
    {"slopes, both sides, two blocks",
     USP_F16,
     BHSD,
     2,
     8,
     8,
     1,
     0,
     64,
     64,
     270,
     {150, 260},
     FULL,
     .shift = 90,
     .slopes = 1},
    {"slopes, two chunks", USP_BF16, BSHD, 1, 2, 2, 1, 0, 64, 64, 400, {400, 256}, CAUSAL, .gap = 930000, .slopes = 1},
    {"slopes, apart", USP_F16, BSHD, 1, 4, 4, 1, 0, 128, 128, 400, {500}, CAUSAL, .apart = 3, .slopes = 1},
    {"soft cap, near 0", USP_BF16, BSHD, 1, 2, 2, 1, 0, 128, 128, 200, {520, 300}, FULL, .soft_cap = 30},
    {"soft cap, near 0, f16", USP_F16, BSHD, 1, 2, 2, 1, 0, 64, 64, 200, {900}, FULL, .soft_cap = 11.5f},
    {"soft cap, partly near 0",
     USP_F16,
     BSHD,
     1,
     2,
     2,
     1,
     0,
     64,
     64,
     200,
     {900},
     FULL,
     .size = 1.1f,
     .soft_cap = 11.5f},
    {"soft cap, nearer to 0", USP_BF16, BSHD, 1, 2, 2, 1, 0, 128, 128, 200, {520, 300}, FULL, .soft_cap = 80},
    {"soft cap, nearer to 0, f16",
     USP_F16,
     BSHD,
     1,
     2,
     2,
     1,
     0,
     64,
     64,
     900,
     {900},
     .left = 450,
     .right = 0,
     .soft_cap = 80},
    {"soft cap, partly nearer", USP_BF16, BSHD, 1, 2, 2, 1, 0, 64, 64, 200, {900}, FULL, .size = 1.2f, .soft_cap = 46},
    {"soft cap, tiny", USP_BF16, BSHD, 1, 2, 2, 1, 0, 128, 128, 200, {520}, FULL, .size = 6e-10f, .soft_cap = 1e-8f},
    {"soft cap, a row that begins late",
     USP_BF16,
     BSHD,
     1,
     2,
     2,
     1,
     0,
     64,
     64,
     129,
     {903},
     .left = 300,
     .right = 600,
     .shift = 300,
     .scatter = 1,
     .soft_cap = 80},
};
#undef CAUSAL
#undef FULL

/* ---- calls ------------------------------------------------------------------------------------------------------- */

static usp_tiles tiles_at(const usp_gpu_world *w, const usp_gpu_plan *p) {
    return (usp_tiles){usp_gpu_at(w, p->work), usp_gpu_at(w, p->tile), usp_gpu_at(w, p->count), p->capacity};
}

static usp_pairs pairs_at(const usp_gpu_world *w, const usp_gpu_softmax *s, int block) {
    return (usp_pairs){.query = usp_gpu_at(w, s->query_at),
                       .low = usp_gpu_at(w, s->low_at),
                       .high = usp_gpu_at(w, s->high_at),
                       .key = usp_gpu_at(w, s->key_at[block]),
                       .last = s->c->tree ? usp_gpu_at(w, s->last_at[block]) : NULL,
                       .diagonal = usp_gpu_at(w, s->diagonal_at)};
}

/* acc is not needed where all is done in one fold. */
static void set_kept(usp_softmax *a, const usp_gpu_world *w, const usp_gpu_softmax *s) {
    a->top = usp_gpu_at(w, s->top.at), a->sum = usp_gpu_at(w, s->sum.at);
    a->acc = a->first && a->last ? NULL : usp_gpu_at(w, s->acc.at);
    a->peak = s->c->peaks ? usp_gpu_at(w, s->peak.at) : NULL;
    a->out = usp_gpu_tensor(w, &s->out), a->lse = usp_gpu_at(w, s->lse.at);
}

static void set_gradients(usp_softmax *a, const usp_gpu_world *w, const usp_gpu_softmax *s, int block) {
    a->dout = usp_gpu_tensor(w, &s->dout), a->delta = usp_gpu_at(w, s->delta.at);
    a->dq_sum = usp_gpu_tensor(w, &s->dq_sum), a->dq = usp_gpu_tensor(w, &s->dq);
    a->turns = usp_gpu_at(w, s->turns.at);
    a->key_dtype = s->c->wide_keys ? USP_F32 : w->dtype;
    a->dk = usp_gpu_tensor(w, &s->dk[block]), a->dv = usp_gpu_tensor(w, &s->dv[block]);
    a->dlse = s->c->dlse ? usp_gpu_at(w, s->dlse.at) : NULL;
}

static void set_extras(usp_softmax *a, const usp_gpu_world *w, const usp_gpu_softmax *s) {
    const usp_gpu_softmax_case *c = s->c;
    a->soft_cap = c->soft_cap;
    a->slopes = c->slopes ? usp_gpu_at(w, s->slopes_at) : NULL;
    a->sinks = c->sinks ? usp_gpu_at(w, s->sinks_at) : NULL;
    if (c->dropout > 0)
        a->dropout = (usp_dropout){usp_dropout_rate(c->dropout), 3, c->heads + 5, usp_gpu_at(w, s->state_at)};
}

usp_softmax usp_gpu_softmax_args(const usp_gpu_world *w, const usp_gpu_softmax *s, int block) {
    const usp_gpu_softmax_case *c = s->c;
    usp_softmax a = {.dtype = w->dtype,
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
                     .pairs = pairs_at(w, s, block),
                     .by_query = tiles_at(w, &s->query_plan[block]),
                     .by_key = tiles_at(w, &s->key_plan[block]),
                     .deterministic = s->deterministic,
                     .first = block == 0,
                     .last = block == s->blocks - 1,
                     .scratch = w->scratch};
    set_kept(&a, w, s);
    set_gradients(&a, w, s, block);
    set_extras(&a, w, s);
    return a;
}

/* On a GPU as if it had other processors, or none of Hopper's own instructions: what the device's entry calls. */
static usp_status attend(const usp_gpu_world *w, const usp_gpu_softmax *s, const usp_softmax *a, int backward) {
    const usp_device_ops *ops = w->device->ops;
    if (ops->kind != USP_DEVICE_CUDA || (!s->processors && !s->portable))
        return (backward ? ops->softmax_backward : ops->softmax_forward)(w->device, a, w->stream);
    usp_gpu gpu = *usp_cuda_gpu(w->device);
    if (s->processors) gpu.processors = s->processors;
    if (s->portable) gpu.capability = 80;
    return (backward ? usp_cuda_softmax_backward : usp_cuda_softmax_forward)(&gpu, a, w->stream);
}

static usp_status attend_slices(const usp_gpu_world *w, const usp_gpu_softmax *s, const usp_softmax *whole) {
    usp_status status = USP_OK;
    for (int i = 0; i < s->slices && status == USP_OK; i++) {
        usp_softmax a = usp_slice_of(whole, (usp_slice){i, s->slices});
        status = attend(w, s, &a, 1);
    }
    return status;
}

static usp_status attend_blocks(const usp_gpu_world *w, const usp_gpu_softmax *s, int backward) {
    usp_status status = USP_OK;
    for (int i = 0; i < s->blocks && status == USP_OK; i++) {
        usp_softmax a = usp_gpu_softmax_args(w, s, i);
        status = backward && s->slices ? attend_slices(w, s, &a) : attend(w, s, &a, backward);
    }
    return status;
}

usp_status usp_gpu_softmax_forward(const usp_gpu_world *w, const void *args) {
    return attend_blocks(w, args, 0);
}

usp_status usp_gpu_softmax_backward(const usp_gpu_world *w, const void *args) {
    return attend_blocks(w, args, 1);
}

usp_status usp_gpu_softmax_delta(const usp_gpu_world *w, const void *args) {
    const usp_gpu_softmax *s = args;
    usp_softmax a = usp_gpu_softmax_args(w, s, 0);
    return w->device->ops->softmax_delta(w->device, &a, usp_gpu_at(w, s->delta.at), w->stream);
}

usp_status usp_gpu_softmax_pass(const usp_gpu_world *w, const void *args) {
    const usp_gpu_softmax *s = args;
    const usp_device_ops *ops = w->device->ops;
    usp_softmax a = usp_gpu_softmax_args(w, s, 0);
    usp_status status = usp_gpu_softmax_forward(w, s);
    if (status == USP_OK && s->c->peaks)
        status = ops->softmax_peaks(w->device, &a, usp_gpu_at(w, s->most.at), w->stream);
    if (status == USP_OK) status = usp_gpu_softmax_delta(w, s);
    if (status == USP_OK && s->c->sinks)
        status = ops->softmax_sinks(w->device, &a, usp_gpu_at(w, s->dsinks.at), w->stream);
    return status == USP_OK ? usp_gpu_softmax_backward(w, s) : status;
}

/* ---- tensors ----------------------------------------------------------------------------------------------------- */

/* [batch, heads, queries], fp32. */
static usp_gpu_view make_statistic(usp_gpu_test *t, const char *name, const usp_gpu_softmax_case *c) {
    usp_gpu_view v = usp_gpu_make_view(t, name, BHSD, c->queries, c->batch, c->heads, 1);
    v.wide = 1;
    return v;
}

static void make_kept(usp_gpu_test *t, usp_gpu_softmax *s) {
    const usp_gpu_softmax_case *c = s->c;
    s->acc = usp_gpu_make_wide(t, "acc", c->queries, c->batch, c->heads, c->value_dim);
    s->dq_sum = usp_gpu_make_view(t, "sum of dq", c->how, c->queries, c->batch, c->heads, c->dim);
    s->top = make_statistic(t, "top", c), s->sum = make_statistic(t, "sum", c);
    s->turns = make_statistic(t, "turns", c);
    s->acc.own = s->dq_sum.own = s->turns.own = s->top.own = s->sum.own = s->dq_sum.wide = 1;
    s->lse = make_statistic(t, "lse", c), s->peak = make_statistic(t, "peak", c);
    s->delta = make_statistic(t, "delta", c), s->dlse = make_statistic(t, "dlse", c);
    s->lse.strict = s->peak.strict = 1;
    s->dsinks = usp_gpu_make_wide(t, "dsinks", 1, 1, c->heads, 1);
    s->most = usp_gpu_make_wide(t, "largest scores", 1, 1, c->heads, 1);
    usp_gpu_fill(t, &s->dlse, 1);
}

/* Slopes as ALiBi has them, and others from the third head on; sinks on both sides of usual scores, and one that weighs
 * nothing. */
static void make_tables(usp_gpu_test *t, usp_gpu_softmax *s) {
    float slopes[16] = {0.5f, 0.25f, 0, -0.3f, 0.7f, 3}, sinks[16];
    uint64_t state[2] = {0x123456789abcdefu + t->random, 42};
    for (int h = 0; h < 16; h++) {
        if (h > 5) slopes[h] = exp2f(-(float)(h + 1));
        sinks[h] = h == 1 ? -INFINITY : 3 * usp_gpu_normal(&t->random);
    }
    s->slopes_at = usp_gpu_put(t, slopes, sizeof slopes);
    s->sinks_at = usp_gpu_put(t, sinks, sizeof sinks);
    s->state_at = usp_gpu_put(t, state, sizeof state);
}

static void make_keys(usp_gpu_test *t, usp_gpu_softmax *s, int block) {
    const usp_gpu_softmax_case *c = s->c;
    int keys = c->keys[block];
    s->k[block] = usp_gpu_make_view(t, "k", c->how, keys, c->batch, c->key_heads, c->dim);
    s->v[block] = usp_gpu_make_view(t, "v", c->how, keys, c->batch, c->key_heads, c->value_dim);
    s->dk[block] = usp_gpu_make_view(t, "dk", c->how, keys, c->batch, c->key_heads, c->dim);
    s->dv[block] = usp_gpu_make_view(t, "dv", c->how, keys, c->batch, c->key_heads, c->value_dim);
    s->dk[block].wide = s->dv[block].wide = c->wide_keys;
    usp_gpu_fill(t, &s->k[block], 1);
    usp_gpu_fill(t, &s->v[block], 1);
}

usp_gpu_softmax usp_gpu_make_softmax(usp_gpu_test *t, const usp_gpu_softmax_case *c) {
    usp_gpu_softmax s = {.c = c, .blocks = c->keys[2] > 0 ? 3 : c->keys[1] > 0 ? 2 : 1};
    s.q = usp_gpu_make_view(t, "q", c->how, c->queries, c->batch, c->heads, c->dim);
    s.out = usp_gpu_make_view(t, "out", c->how, c->queries, c->batch, c->heads, c->value_dim);
    s.dout = usp_gpu_make_view(t, "dout", c->how, c->queries, c->batch, c->heads, c->value_dim);
    s.dq = usp_gpu_make_view(t, "dq", c->how, c->queries, c->batch, c->heads, c->dim);
    usp_gpu_fill(t, &s.q, c->size > 0 ? c->size : 1);
    usp_gpu_fill(t, &s.dout, 1);
    make_kept(t, &s);
    make_tables(t, &s);
    for (int i = 0; i < s.blocks; i++) make_keys(t, &s, i);
    usp_gpu_make_pairs(t, &s);
    return s;
}

/* ---- checks ------------------------------------------------------------------------------------------------------ */

/* How kernels are asked for. A GPU of one processor is always full, so that portable kernels run with all rows of a
 * block, else with half; and its only block takes job after job of kernels whose blocks stay. */
static const struct way {
    const char *name;
    int processors, portable, deterministic;
} ways[] = {{"as it is", 0, 0, 0},      {"of one processor", 1, 0, 0},
            {"deterministic", 0, 0, 1}, {"deterministic, of one processor", 1, 0, 1},
            {"portable", 0, 1, 0},      {"portable, of one processor", 1, 1, 0}};
enum { WAYS = sizeof ways / sizeof *ways };

static void check_pass(usp_gpu_test *t, const usp_gpu_softmax_case *c, const struct way *way) {
    snprintf(t->name, sizeof t->name, "softmax, %s, d %d, dtype %d, %s", c->name, c->dim, c->dtype, way->name);
    usp_gpu_begin_case(t, c->dtype);
    usp_gpu_softmax s = usp_gpu_make_softmax(t, c);
    const usp_gpu_view *outputs[USP_GPU_OUTPUTS + 1] = {&s.out, &s.lse, &s.delta, &s.dq, &s.top, &s.sum, &s.dq_sum};
    int count = 7;
    s.processors = way->processors, s.portable = way->portable, s.deterministic = way->deterministic;
    s.dq.unordered = s.dq_sum.unordered = !way->portable && !way->deterministic;
    if (way->deterministic) outputs[count++] = &s.turns;
    if (s.blocks > 1) outputs[count++] = &s.acc;
    if (c->peaks) outputs[count++] = &s.peak, outputs[count++] = &s.most;
    if (c->sinks) outputs[count++] = &s.dsinks;
    for (int i = 0; i < s.blocks; i++) outputs[count++] = &s.dk[i], outputs[count++] = &s.dv[i];
    usp_gpu_run(t, "a pass", usp_gpu_softmax_pass, &s, outputs);
}

/* By itself it is right to the last bits. */
static void check_delta(usp_gpu_test *t, const usp_gpu_softmax_case *c) {
    snprintf(t->name, sizeof t->name, "softmax delta, %s, d %d, dtype %d", c->name, c->dim, c->dtype);
    usp_gpu_begin_case(t, c->dtype);
    usp_gpu_softmax s = usp_gpu_make_softmax(t, c);
    usp_gpu_fill(t, &s.out, 1);
    s.delta.strict = 1;
    usp_gpu_run(t, "softmax_delta", usp_gpu_softmax_delta, &s, (const usp_gpu_view *[]){&s.delta, NULL});
}

void usp_gpu_check_passes(usp_gpu_test *t) {
    for (size_t i = 0; i < sizeof softmax_cases / sizeof *softmax_cases; i++)
        if (softmax_cases[i].dtype != USP_F32) check_pass(t, &softmax_cases[i], &ways[0]);
}

void usp_gpu_check_softmax(usp_gpu_test *t) {
    for (size_t i = 0; i < sizeof softmax_cases / sizeof *softmax_cases; i++) {
        int many = softmax_cases[i].dtype != USP_F32 ? WAYS : 1;
        for (int way = 0; way < many; way++) check_pass(t, &softmax_cases[i], &ways[way]);
        check_delta(t, &softmax_cases[i]);
    }
}
