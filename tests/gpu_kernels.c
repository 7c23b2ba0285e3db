/* gpu_kernels.c - every entry of the CUDA device against the CPU's on fresh random inputs; with --time, their speed.
 * Exits 0 if all agree and 1 if not; without a GPU it says why and exits 77. It tests kernels, not layers.
 *
 * A test keeps three slabs of memory with the same layout: `exact` (CPU, f32), `plain` (CPU, the dtype) and one on the GPU.
 * A slab starts as NaN. After a kernel ran on all three, outputs are compared, every other byte of the GPU's slab must be
 * what it was, and a second run must give the same bytes. */
#include <cuda_runtime_api.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cpu/half.h"
#include "device.h"

enum { SKIPPED = 77, MOST_OUTPUTS = 4, ROOM = 192 << 20, PI_DIGITS = 314159265 };

/* ---- slabs ------------------------------------------------------------------------------------------------------- */

/* A device, the memory of its slab, and the dtype in which it computes. */
typedef struct world {
    usp_device *device;
    usp_stream stream;
    char *base;
    usp_dtype dtype;
} world;

/* Element [b, t, h, x] is number first + b stride_batch + t stride_token + h stride_head + x from `at`. Every element has
 * four bytes of room, whatever the dtype, so that a view has one place in all slabs. */
typedef struct view {
    const char *name;
    size_t at, bytes;
    int64_t tokens, first, stride_batch, stride_token, stride_head;
    int batch, heads, dim;
    int wide;   /* fp32 in every world */
    int strict; /* computed in fp32 all the way: no rounding of a 16-bit dtype is forgiven */
} view;

typedef struct test {
    world exact, plain, gpu;
    char *before, *after, *again; /* the GPU's slab on the host */
    char *free_to_write;          /* by byte of the slab */
    size_t used;
    const view *output[MOST_OUTPUTS];
    int outputs;
    char name[160];
    uint64_t random;
    int checks, failures;
    double worst; /* largest error over its budget */
} test;

static void fail(test *t, const char *what, const char *why)
{
    t->failures++;
    printf("FAILED %s: %s: %s\n", t->name, what, why);
}

static void begin_case(test *t, usp_dtype dtype)
{
    t->used = 0;
    t->exact.dtype = USP_F32;
    t->plain.dtype = t->gpu.dtype = dtype;
}

/* Every slab's next `bytes` bytes, poisoned. */
static size_t take(test *t, size_t bytes)
{
    size_t at = t->used;
    t->used += (bytes + 255) / 256 * 256;
    if (t->used > ROOM) {
        fprintf(stderr, "%s does not fit the slab\n", t->name);
        exit(1);
    }
    memset(t->exact.base + at, 0xff, t->used - at);
    memset(t->plain.base + at, 0xff, t->used - at);
    return at;
}

/* The same bytes in every slab: integers and fp32 tables. */
static size_t put(test *t, const void *data, size_t bytes)
{
    size_t at = take(t, bytes);
    memcpy(t->exact.base + at, data, bytes);
    memcpy(t->plain.base + at, data, bytes);
    return at;
}

/* ---- views ------------------------------------------------------------------------------------------------------- */

typedef enum arrangement { BSHD, BHSD, SBHD, PACKED, ODD, ARRANGEMENTS } arrangement;

/* PACKED: the middle one of three tensors side by side. ODD: rows apart, and the first one not on any boundary. */
static view make_view(test *t, const char *name, arrangement how, int64_t tokens, int batch, int heads, int dim)
{
    view v = {.name = name, .tokens = tokens, .batch = batch, .heads = heads, .dim = dim};
    int64_t row = how == ODD ? dim + 3 : dim;
    v.stride_head = how == BHSD ? tokens * row : row;
    v.stride_token = how == BHSD ? row : how == SBHD ? batch * heads * row : heads * row * (how == PACKED ? 3 : 1);
    v.stride_batch = how == SBHD ? heads * row : how == BHSD ? heads * tokens * row : tokens * v.stride_token;
    v.first = how == PACKED ? heads * row : how == ODD ? 1 : 0;
    v.bytes = 4 * (size_t)(batch * tokens * heads * row * (how == PACKED ? 3 : 1) + 8);
    v.at = take(t, v.bytes);
    return v;
}

/* Dense fp32 [tokens, batch, heads, dim]. */
static view make_wide(test *t, const char *name, int64_t tokens, int batch, int heads, int dim)
{
    view v = make_view(t, name, SBHD, tokens, batch, heads, dim);
    v.wide = 1;
    return v;
}

static usp_dtype dtype_of(const world *w, const view *v) { return v->wide ? USP_F32 : w->dtype; }

static void *bytes_at(const world *w, size_t at) { return w->base + at; }

static usp_tensor tensor_of(const world *w, const view *v)
{
    char *data = w->base + v->at + v->first * (int64_t)usp_dtype_size(dtype_of(w, v));
    return (usp_tensor){data, v->stride_batch, v->stride_token, v->stride_head};
}

static float load(usp_dtype dtype, const char *slab, size_t at, int64_t element)
{
    float value;
    usp_row_to_float(dtype, slab + at + element * (int64_t)usp_dtype_size(dtype), &value, 1);
    return value;
}

static void store(usp_dtype dtype, char *slab, size_t at, int64_t element, float value)
{
    usp_row_from_float(dtype, &value, slab + at + element * (int64_t)usp_dtype_size(dtype), 1);
}

/* Numbers the elements of a view; `element` is where number i lies. */
static int64_t count_of(const view *v) { return v->tokens * v->batch * v->heads * v->dim; }

static int64_t element_of(const view *v, int64_t i)
{
    int64_t x = i % v->dim, head = i / v->dim % v->heads, batch = i / v->dim / v->heads % v->batch;
    int64_t token = i / v->dim / v->heads / v->batch;
    return v->first + batch * v->stride_batch + token * v->stride_token + head * v->stride_head + x;
}

/* ---- random numbers ---------------------------------------------------------------------------------------------- */

static uint64_t next_random(uint64_t *state)
{
    uint64_t x = *state += 0x9e3779b97f4a7c15u;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

/* About N(0, 1): sixteen bits each of four. */
static float next_normal(uint64_t *state)
{
    uint64_t bits = next_random(state);
    int sum = (int)(bits & 0xffff) + (int)(bits >> 16 & 0xffff) + (int)(bits >> 32 & 0xffff) + (int)(bits >> 48);
    return ((float)sum - 131070.0f) / 37837.0f;
}

/* The same numbers, all of which the dtype can hold, for every world. */
static void fill(test *t, const view *v, float size)
{
    usp_dtype dtype = dtype_of(&t->plain, v);
    for (int64_t i = 0; i < count_of(v); i++) {
        int64_t element = element_of(v, i);
        store(dtype, t->plain.base, v->at, element, size * next_normal(&t->random));
        store(dtype_of(&t->exact, v), t->exact.base, v->at, element, load(dtype, t->plain.base, v->at, element));
    }
}

/* ---- running and comparing --------------------------------------------------------------------------------------- */

typedef usp_status (*call_fn)(const world *world, const void *args);

static int finished(test *t, const char *what, usp_status status)
{
    int busy = 1;
    while (status == USP_OK && busy) status = t->gpu.device->ops->query(t->gpu.device, t->gpu.stream, &busy);
    if (status != USP_OK) fail(t, what, usp_last_error());
    return status == USP_OK;
}

static int run_gpu(test *t, const char *what, call_fn call, const void *args, char *result)
{
    const usp_device_ops *ops = t->gpu.device->ops;
    usp_status status = ops->copy(t->gpu.device, t->gpu.base, t->before, t->used, t->gpu.stream);
    if (status == USP_OK) status = call(&t->gpu, args);
    if (!finished(t, what, status)) return 0;
    return finished(t, what, ops->copy(t->gpu.device, result, t->gpu.base, t->used, t->gpu.stream));
}

/* Largest difference from `exact`, infinite for a NaN; *size grows to the largest finite value of `exact`. */
static double largest_error(const test *t, const view *v, const char *slab, usp_dtype dtype, double *size)
{
    double worst = 0;
    for (int64_t i = 0; i < count_of(v); i++) {
        int64_t element = element_of(v, i);
        double x = load(dtype, slab, v->at, element), y = load(dtype_of(&t->exact, v), t->exact.base, v->at, element);
        if (isfinite(y) && fabs(y) > *size) *size = fabs(y);
        if (x == y) continue;
        double error = fabs(x - y);
        if (!(error <= worst)) worst = isnan(error) ? INFINITY : error;
    }
    return worst;
}

/* A plain computation in the dtype rounds its result at least once, also where the result is a running sum in fp32. */
static void compare(test *t, const view *v)
{
    static const double roundoff[] = {[USP_F32] = 0, [USP_F16] = 0x1p-11, [USP_BF16] = 0x1p-8};
    double size = 0, plain = largest_error(t, v, t->plain.base, dtype_of(&t->plain, v), &size);
    double error = largest_error(t, v, t->after, dtype_of(&t->gpu, v), &size);
    if (!v->strict) plain = fmax(plain, roundoff[t->plain.dtype] * size);
    double budget = 2 * plain + 1e-5 * size;
    t->checks++;
    if (budget > 0 && error / budget > t->worst) t->worst = error / budget;
    if (error <= budget) return;
    char why[120];
    snprintf(why, sizeof why, "error %.3g, budget %.3g, largest value %.3g", error, budget, size);
    fail(t, v->name, why);
}

static void mark_outputs(test *t)
{
    memset(t->free_to_write, 0, t->used);
    for (int n = 0; n < t->outputs; n++) {
        const view *v = t->output[n];
        size_t bytes = usp_dtype_size(dtype_of(&t->gpu, v));
        for (int64_t i = 0; i < count_of(v); i++)
            memset(t->free_to_write + v->at + (size_t)element_of(v, i) * bytes, 1, bytes);
    }
}

static void check_untouched(test *t, const char *what)
{
    for (size_t i = 0; i < t->used; i++) {
        if (t->free_to_write[i] || t->before[i] == t->after[i]) continue;
        fail(t, what, "wrote outside its output");
        return;
    }
}

/* fp32 outputs are inputs of what comes next: everybody goes on from the exact ones. */
static void adopt_outputs(test *t)
{
    for (int n = 0; n < t->outputs; n++) {
        const view *v = t->output[n];
        if (v->wide) memcpy(t->plain.base + v->at, t->exact.base + v->at, v->bytes);
    }
}

/* Runs one entry in all worlds and checks what the views given by `outputs` (ended by NULL) hold then. */
static void run(test *t, const char *what, call_fn call, const void *args, const view *const *outputs)
{
    for (t->outputs = 0; outputs[t->outputs]; t->outputs++) t->output[t->outputs] = outputs[t->outputs];
    memcpy(t->before, t->plain.base, t->used);
    if (call(&t->exact, args) != USP_OK || call(&t->plain, args) != USP_OK) {
        fail(t, what, usp_last_error());
    } else if (run_gpu(t, what, call, args, t->after) && run_gpu(t, what, call, args, t->again)) {
        mark_outputs(t);
        check_untouched(t, what);
        for (int n = 0; n < t->outputs; n++) compare(t, t->output[n]);
        if (memcmp(t->after, t->again, t->used) != 0) fail(t, what, "two runs differ");
    }
    adopt_outputs(t);
}

/* ---- softmax: cases ---------------------------------------------------------------------------------------------- */

typedef struct segment {
    int start, length, stride;
} segment;

enum { SEGMENTS = 3, KEY_BLOCKS = 2, NO_LIMIT = INT32_MAX };

typedef struct softmax_case {
    const char *name;
    usp_dtype dtype;
    arrangement how;
    int batch, heads, key_heads, group, offset, dim, value_dim;
    segment query[SEGMENTS], key[KEY_BLOCKS][SEGMENTS]; /* a second block of keys is folded into the first */
    int low, high;                                      /* NO_LIMIT: none */
    int work_rows;
} softmax_case;

#define USP_CAUSAL NO_LIMIT, 0
#define USP_FULL NO_LIMIT, NO_LIMIT
static const softmax_case softmax_cases[] = {
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
    {"zigzag, two blocks", USP_BF16, BSHD, 1, 2, 2, 1, 0, 128, 128,
     {{70, 70, 1}, {280, 71, 1}}, {{{70, 70, 1}, {280, 71, 1}}, {{0, 70, 1}, {351, 69, 1}}}, USP_CAUSAL, 128},
    {"zigzag, two blocks, f16", USP_F16, PACKED, 2, 2, 1, 2, 0, 64, 64,
     {{64, 64, 1}, {256, 64, 1}}, {{{64, 64, 1}, {256, 64, 1}}, {{128, 64, 1}, {192, 64, 1}}}, USP_CAUSAL, 64},
    {"stripe, two blocks", USP_BF16, BSHD, 1, 2, 2, 1, 0, 64, 64,
     {{1, 80, 4}, {3, 79, 4}}, {{{1, 80, 4}, {3, 79, 4}}, {{0, 80, 4}, {2, 80, 4}}}, USP_CAUSAL, 128},
    {"stripe, f32", USP_F32, BSHD, 1, 2, 2, 1, 0, 64, 64,
     {{1, 50, 3}, {0, 51, 3}}, {{{2, 50, 3}}, {{0, 51, 3}}}, USP_CAUSAL, 47},
    {"window", USP_BF16, BSHD, 1, 2, 2, 1, 0, 128, 128, {{0, 400, 1}}, {{{0, 400, 1}}}, 65, 0, 128},
    {"window of both sides", USP_F16, BSHD, 1, 2, 2, 1, 0, 64, 64, {{0, 300, 1}}, {{{0, 350, 1}}}, 7, 20, 128},
    {"window, striped", USP_BF16, BSHD, 1, 2, 2, 1, 0, 64, 64, {{0, 120, 3}}, {{{1, 200, 2}}}, 30, 5, 100},
    {"rows without keys", USP_BF16, BSHD, 1, 2, 2, 1, 0, 128, 128, {{0, 200, 1}}, {{{150, 100, 1}}}, USP_CAUSAL, 128},
    {"rows without keys, f32", USP_F32, ODD, 2, 1, 1, 1, 0, 20, 12, {{0, 99, 1}}, {{{60, 50, 1}}}, USP_CAUSAL, 31},
    {"second block not allowed", USP_BF16, BSHD, 1, 2, 2, 1, 0, 64, 64,
     {{0, 128, 1}}, {{{0, 128, 1}}, {{128, 128, 1}}}, USP_CAUSAL, 128},
    {"first block not allowed", USP_BF16, BSHD, 1, 2, 2, 1, 0, 64, 64,
     {{0, 128, 1}}, {{{128, 128, 1}}, {{0, 128, 1}}}, USP_CAUSAL, 128},
    {"one query", USP_BF16, BSHD, 3, 2, 2, 1, 0, 128, 128, {{500, 1, 1}}, {{{0, 700, 1}}}, USP_CAUSAL, 128},
    {"one key", USP_F16, BSHD, 1, 2, 2, 1, 0, 64, 64, {{0, 70, 1}}, {{{30, 1, 1}}}, USP_CAUSAL, 128},
    {"no keys", USP_BF16, BSHD, 1, 2, 2, 1, 0, 64, 64, {{0, 70, 1}}, {{{0, 0, 1}}}, USP_CAUSAL, 128},
    {"long", USP_BF16, BSHD, 1, 1, 1, 1, 0, 128, 128, {{0, 1500, 1}}, {{{0, 1500, 1}}}, USP_CAUSAL, 128},
};
#undef USP_CAUSAL
#undef USP_FULL

/* ---- softmax: tiles ---------------------------------------------------------------------------------------------- */

typedef struct plan {
    size_t work, tile;
    int works;
} plan;

static int64_t total_length(const segment *s)
{
    int64_t sum = 0;
    for (int i = 0; i < SEGMENTS; i++) sum += s[i].length;
    return sum;
}

static int64_t limit(int value, int sign) { return sign * (int64_t)value; }

static int32_t to_int32(int64_t x) { return (int32_t)(x < INT32_MIN ? INT32_MIN : x > INT32_MAX ? INT32_MAX : x); }

/* The tile of one work item and one segment, whose first column is `first`; 0 if no pair is allowed. Offsets column - row
 * of the pairs lie in [position - last, position - first row]. */
static int make_tile(const usp_work *work, segment s, int first, int64_t low, int64_t high, usp_tile *tile)
{
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
static plan make_plan(test *t, const segment *rows, const segment *columns, const softmax_case *c, int keys_are_rows)
{
    static usp_work work[4096];
    static usp_tile tile[4096];
    int works = 0, tiles = 0;
    int64_t low = limit(c->low, -1), high = limit(c->high, 1);
    for (int r = 0, begin = 0; r < SEGMENTS; begin += rows[r++].length) {
        for (int at = begin; at < begin + rows[r].length; at += c->work_rows) {
            int left = begin + rows[r].length - at;
            usp_work *w = &work[works++];
            *w = (usp_work){at, left < c->work_rows ? left : c->work_rows, rows[r].start - begin * rows[r].stride,
                            rows[r].stride, tiles, 0};
            for (int s = 0, first = 0; s < SEGMENTS; first += columns[s++].length) {
                if (!make_tile(w, columns[s], first, keys_are_rows ? -high : low, keys_are_rows ? -low : high, &tile[tiles]))
                    continue;
                tile[tiles].low = to_int32(low), tile[tiles].high = to_int32(high);
                w->tiles++, tiles++;
            }
        }
    }
    plan p = {.works = works};
    p.work = put(t, work, sizeof *work * (size_t)works);
    p.tile = put(t, tile, sizeof *tile * (size_t)tiles);
    return p;
}

/* ---- softmax: calls ---------------------------------------------------------------------------------------------- */

typedef struct softmax_test {
    const softmax_case *c;
    int blocks; /* of keys */
    int folds;  /* backward_key: 2: the same contribution twice, by way of the running sums */
    int block;  /* of the call */
    view q, k[KEY_BLOCKS], v[KEY_BLOCKS], out, dout, acc, lse, delta;
    view dq, dq_sum, dk, dk_sum, dv, dv_sum;
    plan query_plan[KEY_BLOCKS], key_plan[KEY_BLOCKS];
} softmax_test;

static usp_softmax softmax_args(const world *w, const softmax_test *s, int block, const plan *p)
{
    const softmax_case *c = s->c;
    return (usp_softmax){
        .dtype = w->dtype, .batch = c->batch, .heads = c->heads, .key_heads = c->key_heads, .dim = c->dim,
        .value_dim = c->value_dim, .kv = {c->group, c->offset}, .scale = 1 / sqrtf((float)c->dim),
        .queries = s->q.tokens, .keys = s->k[block].tokens, .q = tensor_of(w, &s->q), .k = tensor_of(w, &s->k[block]),
        .v = tensor_of(w, &s->v[block]),
        .tiles = {bytes_at(w, p->work), bytes_at(w, p->tile), p->works}, .acc = bytes_at(w, s->acc.at),
        .lse = bytes_at(w, s->lse.at), .out = tensor_of(w, &s->out), .dout = tensor_of(w, &s->dout),
        .delta = bytes_at(w, s->delta.at), .dq_sum = tensor_of(w, &s->dq_sum), .dk_sum = tensor_of(w, &s->dk_sum),
        .dv_sum = tensor_of(w, &s->dv_sum), .dq = tensor_of(w, &s->dq), .dk = tensor_of(w, &s->dk),
        .dv = tensor_of(w, &s->dv)};
}

static usp_status softmax_forward(const world *w, const void *args)
{
    const softmax_test *s = args;
    usp_status status = USP_OK;
    for (int i = 0; i < s->blocks && status == USP_OK; i++) {
        usp_softmax a = softmax_args(w, s, i, &s->query_plan[i]);
        a.first = i == 0, a.last = i == s->blocks - 1;
        status = w->device->ops->softmax_forward(w->device, &a, w->stream);
    }
    return status;
}

static usp_status softmax_delta(const world *w, const void *args)
{
    const softmax_test *s = args;
    usp_softmax a = softmax_args(w, s, 0, &s->query_plan[0]);
    return w->device->ops->softmax_delta(w->device, &a, bytes_at(w, s->delta.at), w->stream);
}

static usp_status softmax_backward_query(const world *w, const void *args)
{
    const softmax_test *s = args;
    usp_status status = USP_OK;
    for (int i = 0; i < s->blocks && status == USP_OK; i++) {
        usp_softmax a = softmax_args(w, s, i, &s->query_plan[i]);
        a.first = i == 0, a.last = i == s->blocks - 1;
        status = w->device->ops->softmax_backward_query(w->device, &a, w->stream);
    }
    return status;
}

static usp_status softmax_backward_key(const world *w, const void *args)
{
    const softmax_test *s = args;
    usp_status status = USP_OK;
    for (int i = 0; i < s->folds && status == USP_OK; i++) {
        usp_softmax a = softmax_args(w, s, s->block, &s->key_plan[s->block]);
        a.first = i == 0, a.last = i == s->folds - 1;
        status = w->device->ops->softmax_backward_key(w->device, &a, w->stream);
    }
    return status;
}

/* lse and delta are [batch, heads, queries]. */
static view make_statistic(test *t, const char *name, const softmax_case *c, int64_t queries)
{
    view v = make_view(t, name, BHSD, queries, c->batch, c->heads, 1);
    v.wide = v.strict = 1;
    return v;
}

static void make_gradients(test *t, softmax_test *s, int block)
{
    const softmax_case *c = s->c;
    int64_t keys = s->k[block].tokens;
    s->block = block;
    s->dk = make_view(t, "dk", c->how, keys, c->batch, c->key_heads, c->dim);
    s->dv = make_view(t, "dv", c->how, keys, c->batch, c->key_heads, c->value_dim);
    s->dk_sum = make_view(t, "sum of dk", c->how, keys, c->batch, c->key_heads, c->dim);
    s->dv_sum = make_view(t, "sum of dv", c->how, keys, c->batch, c->key_heads, c->value_dim);
    s->dk_sum.wide = s->dv_sum.wide = 1;
}

static void make_keys(test *t, softmax_test *s, int block)
{
    const softmax_case *c = s->c;
    int64_t keys = total_length(c->key[block]);
    s->k[block] = make_view(t, "k", c->how, keys, c->batch, c->key_heads, c->dim);
    s->v[block] = make_view(t, "v", c->how, keys, c->batch, c->key_heads, c->value_dim);
    fill(t, &s->k[block], 1);
    fill(t, &s->v[block], 1);
    s->query_plan[block] = make_plan(t, c->query, c->key[block], c, 0);
    s->key_plan[block] = make_plan(t, c->key[block], c->query, c, 1);
}

static softmax_test make_softmax(test *t, const softmax_case *c)
{
    softmax_test s = {.c = c, .blocks = total_length(c->key[1]) > 0 ? 2 : 1};
    int64_t queries = total_length(c->query);
    s.q = make_view(t, "q", c->how, queries, c->batch, c->heads, c->dim);
    s.out = make_view(t, "out", c->how, queries, c->batch, c->heads, c->value_dim);
    s.dout = make_view(t, "dout", c->how, queries, c->batch, c->heads, c->value_dim);
    s.dq = make_view(t, "dq", c->how, queries, c->batch, c->heads, c->dim);
    s.dq_sum = make_view(t, "sum of dq", c->how, queries, c->batch, c->heads, c->dim);
    s.dq_sum.wide = 1;
    s.acc = make_wide(t, "acc", queries, c->batch, c->heads, c->value_dim);
    s.lse = make_statistic(t, "lse", c, queries);
    s.delta = make_statistic(t, "delta", c, queries);
    fill(t, &s.q, 1);
    fill(t, &s.dout, 1);
    for (int i = 0; i < s.blocks; i++) make_keys(t, &s, i);
    return s;
}

/* The gradients of every key block, once and folded twice. */
static void check_softmax_keys(test *t, softmax_test *s)
{
    for (int i = 0; i < s->blocks; i++) {
        make_gradients(t, s, i);
        for (s->folds = 1; s->folds <= 2; s->folds++) {
            const view *once[] = {&s->dk, &s->dv, NULL}, *twice[] = {&s->dk, &s->dv, &s->dk_sum, &s->dv_sum, NULL};
            run(t, "softmax_backward_key", softmax_backward_key, s, s->folds == 1 ? once : twice);
        }
    }
}

static void check_softmax(test *t, const softmax_case *c)
{
    snprintf(t->name, sizeof t->name, "softmax, %s", c->name);
    begin_case(t, c->dtype);
    softmax_test s = make_softmax(t, c);
    const view *one[] = {&s.out, &s.lse, NULL}, *two[] = {&s.out, &s.lse, &s.acc, NULL};
    run(t, "softmax_forward", softmax_forward, &s, s.blocks == 1 ? one : two);
    fill(t, &s.out, 1);
    run(t, "softmax_delta", softmax_delta, &s, (const view *[]){&s.delta, NULL});
    const view *query_one[] = {&s.dq, NULL}, *query_two[] = {&s.dq, &s.dq_sum, NULL};
    run(t, "softmax_backward_query", softmax_backward_query, &s, s.blocks == 1 ? query_one : query_two);
    check_softmax_keys(t, &s);
}

/* ---- linear: cases ----------------------------------------------------------------------------------------------- */

enum { CHUNKS = 3 };

typedef enum decay_kind { NO_DECAY, SLOW, FAST } decay_kind;

typedef struct linear_case {
    const char *name;
    usp_dtype dtype;
    arrangement how;
    int batch, heads, q_heads, k_heads, v_heads, offset, dim, value_dim; /* heads of the layer that are here, from `offset` */
    int chunk[CHUNKS], block;                                            /* rows */
    int reverse, shift, transposed, causal;
    decay_kind decay;
    float scale;
} linear_case;

static const linear_case linear_cases[] = {
    {"plain", USP_BF16, BSHD, 2, 2, 2, 2, 2, 0, 128, 128, {256}, 128, 0, 1, 0, 1, NO_DECAY, 1},
    {"slow", USP_BF16, BSHD, 1, 4, 4, 4, 4, 0, 128, 128, {640, 300}, 256, 0, 1, 0, 1, SLOW, 0.088f},
    {"fast", USP_BF16, BSHD, 1, 4, 4, 4, 4, 0, 128, 128, {500}, 128, 0, 1, 0, 1, FAST, 1},
    {"reverse", USP_BF16, BSHD, 2, 2, 2, 2, 2, 0, 128, 128, {300, 190, 1}, 128, 1, 0, 0, 1, SLOW, 1},
    {"reverse, transposed", USP_BF16, BHSD, 1, 2, 2, 2, 2, 0, 128, 128, {333}, 128, 1, 1, 1, 1, SLOW, 0.5f},
    {"transposed", USP_BF16, PACKED, 2, 2, 2, 2, 2, 0, 128, 64, {257, 255}, 192, 0, 1, 1, 1, FAST, 1},
    {"d 64", USP_BF16, SBHD, 2, 2, 2, 2, 2, 0, 64, 64, {130, 64}, 64, 0, 0, 0, 1, SLOW, 1},
    {"d 64, e 128", USP_BF16, BSHD, 1, 2, 2, 2, 2, 0, 64, 128, {400}, 512, 1, 1, 1, 1, SLOW, 1},
    {"f16", USP_F16, BSHD, 1, 2, 2, 2, 2, 0, 128, 128, {512}, 256, 0, 1, 0, 1, SLOW, 1},
    {"f16, transposed", USP_F16, PACKED, 1, 2, 2, 2, 2, 0, 64, 128, {100, 90, 70}, 64, 1, 1, 1, 1, FAST, 1},
    {"f16, d 128, e 64", USP_F16, BHSD, 1, 2, 2, 2, 2, 0, 128, 64, {200}, 128, 0, 1, 0, 1, NO_DECAY, 1},
    {"f16, d 64", USP_F16, BSHD, 1, 2, 2, 2, 2, 0, 64, 64, {200}, 128, 0, 0, 0, 1, SLOW, 1},
    {"shared keys", USP_BF16, BSHD, 1, 3, 6, 2, 3, 3, 64, 64, {200}, 128, 0, 1, 0, 1, SLOW, 1},
    {"shared queries", USP_BF16, BSHD, 2, 4, 2, 2, 4, 0, 128, 128, {150}, 64, 1, 1, 0, 1, SLOW, 1},
    {"both directions", USP_BF16, BSHD, 1, 2, 2, 2, 2, 0, 128, 128, {300, 20}, 128, 0, 0, 0, 0, NO_DECAY, 1},
    {"odd rows", USP_BF16, ODD, 2, 2, 2, 2, 2, 0, 128, 128, {200, 77}, 128, 0, 1, 0, 1, SLOW, 1},
    {"d 5, e 17", USP_F32, ODD, 2, 2, 2, 2, 2, 0, 5, 17, {100, 31}, 64, 0, 1, 0, 1, SLOW, 1},
    {"d 17, e 5", USP_BF16, BSHD, 1, 2, 2, 2, 2, 0, 17, 5, {100, 31}, 64, 1, 0, 1, 1, FAST, 1},
    {"d 96", USP_F16, PACKED, 1, 2, 2, 1, 2, 0, 96, 96, {130}, 64, 0, 1, 0, 1, SLOW, 1},
    {"d 256", USP_BF16, BSHD, 1, 1, 1, 1, 1, 0, 256, 256, {140}, 64, 1, 1, 0, 1, SLOW, 1},
    {"f32", USP_F32, BSHD, 1, 2, 2, 2, 2, 0, 64, 64, {200, 100}, 128, 0, 1, 1, 1, SLOW, 1},
    {"f32, both directions", USP_F32, BHSD, 1, 2, 1, 2, 2, 0, 20, 36, {70, 20}, 64, 1, 0, 0, 0, NO_DECAY, 0.3f},
    {"one row", USP_BF16, BSHD, 1, 2, 2, 2, 2, 0, 128, 128, {1, 65}, 64, 0, 1, 0, 1, FAST, 1},
    {"long", USP_BF16, BSHD, 1, 1, 1, 1, 1, 0, 128, 128, {4096}, 512, 0, 1, 0, 1, SLOW, 1},
};

/* ---- linear: calls ----------------------------------------------------------------------------------------------- */

typedef struct linear_test {
    const linear_case *c;
    int blocks, chunks;
    int64_t tokens;
    size_t block, step, decay;
    view q, k, v, out, acc, states, chunk_states, final;
    int first, last; /* of the call */
} linear_test;

static usp_head_map map_of(const linear_case *c, int heads)
{
    int layer_heads = c->q_heads > c->k_heads ? c->q_heads : c->k_heads;
    layer_heads = layer_heads > c->v_heads ? layer_heads : c->v_heads;
    return (usp_head_map){layer_heads / heads, c->offset};
}

static usp_linear linear_args(const world *w, const linear_test *l, const view *states)
{
    const linear_case *c = l->c;
    return (usp_linear){.dtype = w->dtype, .batch = c->batch, .heads = c->heads, .dim = c->dim, .value_dim = c->value_dim,
                        .q_map = map_of(c, c->q_heads), .k_map = map_of(c, c->k_heads), .v_map = map_of(c, c->v_heads),
                        .scale = c->scale, .log_decay = c->decay == NO_DECAY ? NULL : bytes_at(w, l->decay),
                        .causal = c->causal, .reverse = c->reverse, .shift = c->shift, .transposed = c->transposed,
                        .block = bytes_at(w, l->block), .blocks = l->blocks, .tokens = l->tokens,
                        .q = tensor_of(w, &l->q), .k = tensor_of(w, &l->k), .v = tensor_of(w, &l->v),
                        .states = bytes_at(w, states->at), .first = l->first, .last = l->last,
                        .acc = bytes_at(w, l->acc.at), .out = tensor_of(w, &l->out)};
}

static usp_status linear_totals(const world *w, const void *args)
{
    const linear_test *l = args;
    usp_linear a = linear_args(w, l, &l->states);
    return w->device->ops->linear_totals(w->device, &a, w->stream);
}

static usp_status linear_scan(const world *w, const void *args)
{
    const linear_test *l = args;
    const linear_case *c = l->c;
    usp_scan a = {.batch = c->batch, .heads = c->heads, .elements = (int64_t)c->dim * c->value_dim,
                  .log_decay = c->decay == NO_DECAY ? NULL : bytes_at(w, l->decay), .reverse = c->reverse,
                  .step = bytes_at(w, l->step), .states = l->blocks, .groups = l->chunks, .data = bytes_at(w, l->states.at),
                  .initial = l->first ? NULL : bytes_at(w, l->chunk_states.at),
                  .final = l->last ? bytes_at(w, l->final.at) : NULL};
    return w->device->ops->linear_scan(w->device, &a, w->stream);
}

static usp_status linear_output(const world *w, const void *args)
{
    const linear_test *l = args;
    usp_linear a = linear_args(w, l, &l->states);
    return w->device->ops->linear_output(w->device, &a, w->stream);
}

static usp_status linear_apply(const world *w, const void *args)
{
    const linear_test *l = args;
    usp_linear a = linear_args(w, l, &l->chunk_states);
    return w->device->ops->linear_apply(w->device, &a, w->stream);
}

/* Blocks of c->block rows, a shorter one at the end of every chunk. */
static void make_blocks(test *t, linear_test *l)
{
    static usp_block block[4096];
    static usp_scan_step step[4096];
    const linear_case *c = l->c;
    int begin = 0;
    for (; l->chunks < CHUNKS && c->chunk[l->chunks] > 0; begin += c->chunk[l->chunks++]) {
        for (int at = 0; at < c->chunk[l->chunks]; at += c->block) {
            int left = c->chunk[l->chunks] - at, count = left < c->block ? left : c->block;
            block[l->blocks] = (usp_block){begin + at, count, l->chunks, at, c->chunk[l->chunks], 0};
            step[l->blocks++] = (usp_scan_step){count, l->chunks};
        }
    }
    l->tokens = begin;
    l->block = put(t, block, sizeof *block * (size_t)l->blocks);
    l->step = put(t, step, sizeof *step * (size_t)l->blocks);
}

static void make_decay(test *t, linear_test *l)
{
    float decay[64];
    for (int h = 0; h < l->c->heads; h++)
        decay[h] = l->c->decay == SLOW ? -0.001f * (float)(1 + 3 * h) : -0.3f * (float)(1 + h);
    l->decay = put(t, decay, sizeof *decay * (size_t)l->c->heads);
}

static view make_states(test *t, const char *name, const linear_case *c, int count)
{
    view v = make_wide(t, name, count, c->batch, c->heads, c->dim * c->value_dim);
    v.strict = 1;
    return v;
}

static linear_test make_linear(test *t, const linear_case *c)
{
    linear_test l = {.c = c};
    make_blocks(t, &l);
    make_decay(t, &l);
    l.q = make_view(t, "q", c->how, l.tokens, c->batch, c->q_heads, c->dim);
    l.k = make_view(t, "k", c->how, l.tokens, c->batch, c->k_heads, c->dim);
    l.v = make_view(t, "v", c->how, l.tokens, c->batch, c->v_heads, c->value_dim);
    l.out = make_view(t, "out", c->how, l.tokens, c->batch, c->heads, c->value_dim);
    l.acc = make_wide(t, "acc", l.tokens, c->batch, c->heads, c->value_dim);
    l.states = make_states(t, "states", c, l.blocks);
    l.chunk_states = make_states(t, "states of chunks", c, l.chunks);
    l.final = make_states(t, "final states", c, l.chunks);
    fill(t, &l.q, 1);
    fill(t, &l.k, 1);
    fill(t, &l.v, 1);
    fill(t, &l.chunk_states, 10);
    return l;
}

/* The four ways to begin and end running sums, one of which is the output's and one the sums'. */
static void check_linear_rows(test *t, linear_test *l, const char *what, call_fn call, int strict)
{
    for (int way = 0; way < 4; way++) {
        l->first = way / 2, l->last = way % 2;
        l->acc.strict = strict;
        run(t, what, call, l, (const view *[]){l->last ? &l->out : &l->acc, NULL});
    }
}

static void check_linear(test *t, const linear_case *c)
{
    snprintf(t->name, sizeof t->name, "linear, %s", c->name);
    begin_case(t, c->dtype);
    linear_test l = make_linear(t, c);
    run(t, "linear_totals", linear_totals, &l, (const view *[]){&l.states, NULL});
    for (int way = 0; way < 4; way++) {
        l.first = way / 2, l.last = way % 2;
        run(t, "linear_scan", linear_scan, &l, (const view *[]){&l.states, l.last ? &l.final : NULL, NULL});
    }
    fill(t, &l.states, 10);
    fill(t, &l.acc, 30);
    if (c->causal) check_linear_rows(t, &l, "linear_output", linear_output, 0);
    check_linear_rows(t, &l, "linear_apply", linear_apply, 1);
}

/* ---- copies ------------------------------------------------------------------------------------------------------ */

typedef struct copy_test {
    view from, to;
    usp_dtype from_dtype, to_dtype;
    int accumulate;
} copy_test;

static usp_tensor typed_tensor(const world *w, const view *v, usp_dtype dtype)
{
    world typed = *w;
    typed.dtype = dtype;
    return tensor_of(&typed, v);
}

static usp_status copy_rows(const world *w, const void *args)
{
    const copy_test *c = args;
    usp_copy a = {.tokens = c->from.tokens, .batch = c->from.batch, .heads = c->from.heads, .dim = c->from.dim,
                  .from_dtype = c->from_dtype, .to_dtype = c->to_dtype, .accumulate = c->accumulate,
                  .from = typed_tensor(w, &c->from, c->from_dtype), .to = typed_tensor(w, &c->to, c->to_dtype)};
    return w->device->ops->copy_rows(w->device, &a, w->stream);
}

/* Copies agree to the last bit; `before` of the GPU is the plain slab, which the CPU has changed meanwhile. */
static void check_copy(test *t, const copy_test *c)
{
    memcpy(t->before, t->plain.base, t->used);
    if (copy_rows(&t->plain, c) != USP_OK) fail(t, "copy_rows", usp_last_error());
    if (!run_gpu(t, "copy_rows", copy_rows, c, t->after)) return;
    t->checks++;
    if (memcmp(t->plain.base, t->after, t->used) != 0) fail(t, "copy_rows", "differs from the CPU's");
}

static void check_copies(test *t, arrangement how, usp_dtype from, usp_dtype to)
{
    static const int dims[] = {1, 5, 64, 96};
    for (size_t i = 0; i < sizeof dims / sizeof *dims; i++) {
        for (int accumulate = 0; accumulate <= (to == USP_F32); accumulate++) {
            snprintf(t->name, sizeof t->name, "copy of dtype %d to %d, arrangement %d, dim %d", from, to, how, dims[i]);
            begin_case(t, from);
            copy_test c = {.from_dtype = from, .to_dtype = to, .accumulate = accumulate};
            c.from = make_view(t, "from", how, 37, 2, 3, dims[i]);
            c.to = make_view(t, "to", (how + 1) % ARRANGEMENTS, 37, 2, 3, dims[i]);
            fill(t, &c.from, 100);
            t->plain.dtype = to;
            fill(t, &c.to, 1);
            check_copy(t, &c);
        }
    }
}

/* ---- the rest of the table --------------------------------------------------------------------------------------- */

static void expect(test *t, int condition, const char *what)
{
    t->checks++;
    if (!condition) fail(t, what, usp_last_error());
}

static void check_streams(test *t)
{
    usp_device *gpu = t->gpu.device;
    const usp_device_ops *ops = gpu->ops;
    usp_stream stream;
    usp_event *event;
    int busy = 1;
    expect(t, ops->stream_create(gpu, &stream) == USP_OK, "stream_create");
    expect(t, ops->event_create(gpu, &event) == USP_OK, "event_create");
    memset(t->before, 7, 1 << 20);
    expect(t, ops->copy(gpu, t->gpu.base, t->before, 1 << 20, t->gpu.stream) == USP_OK, "copy to the GPU");
    expect(t, ops->zero(gpu, t->gpu.base, 1 << 19, t->gpu.stream) == USP_OK, "zero");
    expect(t, ops->event_record(gpu, event, t->gpu.stream) == USP_OK, "event_record");
    expect(t, ops->event_wait(gpu, event, stream) == USP_OK, "event_wait");
    expect(t, ops->copy(gpu, t->after, t->gpu.base, 1 << 20, stream) == USP_OK, "copy from the GPU");
    while (busy && ops->query(gpu, stream, &busy) == USP_OK) continue;
    expect(t, !busy, "query");
    expect(t, ops->event_query(gpu, event, &busy) == USP_OK && !busy, "event_query");
    expect(t, t->after[0] == 0 && t->after[(1 << 19) - 1] == 0 && t->after[1 << 19] == 7, "what was copied and zeroed");
    ops->event_destroy(gpu, event);
    ops->stream_destroy(gpu, stream);
}

/* A graph of a kernel, replayed, gives what the kernel gave. */
static void check_capture(test *t)
{
    usp_device *gpu = t->gpu.device;
    cudaStream_t stream = t->gpu.stream;
    cudaGraph_t graph = NULL;
    cudaGraphExec_t replay = NULL;
    int before = 1, during = 0;
    begin_case(t, USP_BF16);
    linear_test l = make_linear(t, &linear_cases[0]);
    memcpy(t->before, t->plain.base, t->used);
    expect(t, run_gpu(t, "eager", linear_totals, &l, t->after), "eager run");
    expect(t, gpu->ops->copy(gpu, t->gpu.base, t->before, t->used, stream) == USP_OK, "copy");
    expect(t, gpu->ops->capturing(gpu, stream, &before) == USP_OK && !before, "capturing before a capture");
    expect(t, cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal) == cudaSuccess, "begin of a capture");
    expect(t, linear_totals(&t->gpu, &l) == USP_OK, "captured kernel");
    expect(t, gpu->ops->capturing(gpu, stream, &during) == USP_OK && during, "capturing during a capture");
    expect(t, cudaStreamEndCapture(stream, &graph) == cudaSuccess, "end of a capture");
    expect(t, cudaGraphInstantiate(&replay, graph, 0) == cudaSuccess, "graph");
    expect(t, cudaGraphLaunch(replay, stream) == cudaSuccess, "replay");
    expect(t, gpu->ops->copy(gpu, t->again, t->gpu.base, t->used, stream) == USP_OK, "copy of the replay");
    expect(t, finished(t, "replay", USP_OK), "end of the replay");
    expect(t, memcmp(t->after, t->again, t->used) == 0, "replay equals eager");
    cudaGraphExecDestroy(replay);
    cudaGraphDestroy(graph);
}

typedef struct scale_test {
    view data;
    float factor;
} scale_test;

static usp_status scale(const world *w, const void *args)
{
    const scale_test *s = args;
    return w->device->ops->scale(w->device, bytes_at(w, s->data.at), count_of(&s->data), s->factor, w->stream);
}

static void check_scale(test *t, int count)
{
    snprintf(t->name, sizeof t->name, "scale of %d", count);
    begin_case(t, USP_F32);
    scale_test s = {.data = make_wide(t, "data", count, 1, 1, 1), .factor = -0.3f};
    fill(t, &s.data, 1);
    run(t, "scale", scale, &s, (const view *[]){&s.data, NULL});
}

static void check_memory(test *t)
{
    usp_device *gpu = t->gpu.device;
    void *memory = NULL;
    expect(t, gpu->ops->alloc(gpu, 0, &memory) == USP_OK, "alloc of nothing");
    gpu->ops->free(gpu, memory);
    expect(t, gpu->ops->alloc(gpu, (size_t)1 << 60, &memory) == USP_NO_MEMORY, "alloc of too much");
    expect(t, gpu->ops->alloc(gpu, 1000, &memory) == USP_OK && (uintptr_t)memory % 256 == 0, "alloc after a failure");
    gpu->ops->free(gpu, memory);
}

static void check_all(test *t)
{
    check_memory(t);
    check_streams(t);
    check_capture(t);
    check_scale(t, 0);
    check_scale(t, 100003);
    for (int how = 0; how < ARRANGEMENTS; how++)
        for (int pair = 0; pair < 9; pair++)
            check_copies(t, (arrangement)how, (usp_dtype)(pair / 3), (usp_dtype)(pair % 3));
    for (size_t i = 0; i < sizeof linear_cases / sizeof *linear_cases; i++) check_linear(t, &linear_cases[i]);
    for (size_t i = 0; i < sizeof softmax_cases / sizeof *softmax_cases; i++) check_softmax(t, &softmax_cases[i]);
    printf("%d checks, %d failed, largest error %.2f of its budget\n", t->checks, t->failures, t->worst);
}

/* ---- speed ------------------------------------------------------------------------------------------------------- */

enum { TIMED = 25, WARM = 5 };

static int by_size(const void *a, const void *b)
{
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

/* Median milliseconds of one call. Short calls are timed many at once, so that none waits for the host. */
static float time_call(test *t, call_fn call, const void *args)
{
    cudaEvent_t begin, end;
    float ms[TIMED] = {0};
    int calls = 1;
    cudaEventCreate(&begin);
    cudaEventCreate(&end);
    for (int i = -WARM; i < TIMED; i++) {
        float *sample = &ms[i > 0 ? i : 0];
        cudaEventRecord(begin, t->gpu.stream);
        for (int n = 0; n < calls; n++)
            if (call(&t->gpu, args) != USP_OK) fail(t, "timed call", usp_last_error());
        cudaEventRecord(end, t->gpu.stream);
        cudaEventSynchronize(end);
        cudaEventElapsedTime(sample, begin, end);
        *sample /= (float)calls;
        if (i < 0) calls = *sample < 0.1f ? 20 : 1;
    }
    cudaEventDestroy(begin);
    cudaEventDestroy(end);
    qsort(ms, TIMED, sizeof *ms, by_size);
    return ms[TIMED / 2];
}

static usp_status copy_half(const world *w, const void *args)
{
    size_t bytes = *(const size_t *)args;
    return w->device->ops->copy(w->device, w->base, w->base + bytes, bytes, w->stream);
}

static usp_status softmax_backward(const world *w, const void *args)
{
    usp_status status = softmax_delta(w, args);
    if (status == USP_OK) status = softmax_backward_query(w, args);
    return status == USP_OK ? softmax_backward_key(w, args) : status;
}

/* Timed views lie in the GPU's slab alone. */
static view timed_view(test *t, int64_t tokens, int heads, int dim, int wide)
{
    view v = {.tokens = tokens, .batch = 1, .heads = heads, .dim = dim, .wide = wide, .at = t->used};
    v.stride_head = dim, v.stride_token = (int64_t)heads * dim, v.stride_batch = tokens * v.stride_token;
    v.bytes = (size_t)v.stride_batch * (wide ? 4 : 2);
    t->used += (v.bytes + 255) / 256 * 256;
    return v;
}

static size_t upload(test *t, const void *data, size_t bytes)
{
    size_t at = t->used;
    t->used += (bytes + 255) / 256 * 256;
    cudaMemcpy(t->gpu.base + at, data, bytes, cudaMemcpyHostToDevice);
    return at;
}

/* A random stretch, repeated: no tensor is constant, and none costs the host long. */
static void fill_gpu(test *t, size_t bytes)
{
    enum { STRETCH = 1 << 20 };
    uint16_t *numbers = (uint16_t *)t->before;
    for (int i = 0; i < STRETCH; i++) numbers[i] = usp_float_to_bfloat(next_normal(&t->random));
    for (size_t at = 0; at < bytes; at += STRETCH * sizeof *numbers) {
        size_t left = bytes - at;
        cudaMemcpy(t->gpu.base + at, numbers, left < STRETCH * 2 ? left : STRETCH * 2, cudaMemcpyHostToDevice);
    }
}

static void move_plan(test *t, plan *p, size_t end)
{
    char *work = t->plain.base + p->work, *tile = t->plain.base + p->tile;
    p->work = upload(t, work, sizeof(usp_work) * (size_t)p->works);
    p->tile = upload(t, tile, end - (size_t)(tile - t->plain.base));
}

static void time_softmax(test *t, int heads, int key_heads, int dim, int tokens, int causal)
{
    softmax_case c = {.dtype = USP_BF16, .batch = 1, .heads = heads, .key_heads = key_heads, .group = heads / key_heads,
                      .dim = dim, .value_dim = dim, .query = {{0, tokens, 1}}, .key = {{{0, tokens, 1}}}, .low = NO_LIMIT,
                      .high = causal ? 0 : NO_LIMIT, .work_rows = USP_WORK_ROWS};
    softmax_test s = {.c = &c, .blocks = 1, .folds = 1};
    size_t middle, end;
    begin_case(t, USP_BF16);
    s.query_plan[0] = make_plan(t, c.query, c.key[0], &c, 0);
    middle = t->used;
    s.key_plan[0] = make_plan(t, c.key[0], c.query, &c, 1);
    end = t->used;
    t->used = 0;
    s.q = timed_view(t, tokens, heads, dim, 0), s.dout = timed_view(t, tokens, heads, dim, 0);
    s.k[0] = timed_view(t, tokens, key_heads, dim, 0), s.v[0] = timed_view(t, tokens, key_heads, dim, 0);
    fill_gpu(t, t->used);
    s.out = timed_view(t, tokens, heads, dim, 0), s.dq = timed_view(t, tokens, heads, dim, 0);
    s.dk = timed_view(t, tokens, key_heads, dim, 0), s.dv = timed_view(t, tokens, key_heads, dim, 0);
    s.lse = timed_view(t, tokens, heads, 1, 1), s.delta = timed_view(t, tokens, heads, 1, 1);
    s.acc = s.dq_sum = s.dk_sum = s.dv_sum = timed_view(t, 0, heads, dim, 1);
    move_plan(t, &s.query_plan[0], middle);
    move_plan(t, &s.key_plan[0], end);
    double area = (double)tokens * tokens / (causal ? 2 : 1), flops = 4 * area * heads * dim;
    float forward = time_call(t, softmax_forward, &s), backward = time_call(t, softmax_backward, &s);
    float query = time_call(t, softmax_backward_query, &s), key = time_call(t, softmax_backward_key, &s);
    printf("%5d:%-3d %4d %7d %7s %10.3f %10.3f %8.0f %8.0f   dq %.3f, dk dv %.3f ms\n", heads, key_heads, dim, tokens,
           causal ? "causal" : "full", forward, backward, flops / forward / 1e9, 2.5 * flops / backward / 1e9, query, key);
}

static usp_status linear_forward(const world *w, const void *args)
{
    linear_test l = *(const linear_test *)args;
    usp_status status = linear_totals(w, &l);
    if (status == USP_OK) status = linear_scan(w, &l);
    return status == USP_OK ? linear_output(w, &l) : status;
}

/* The forward states stand in for those of the backward pass: dq from them, dk and dv from the scan of q dout^T. All heads
 * have one size here, so k and v may stand in for dout. */
static usp_status linear_backward(const world *w, const void *args)
{
    const linear_test *l = args;
    linear_case reversed = *l->c, turned = *l->c, both = *l->c;
    linear_test a = *l;
    usp_status status;
    reversed.reverse = both.reverse = 1, turned.transposed = both.transposed = 1;
    a.c = &turned, status = linear_output(w, &a);
    a.c = &reversed;
    if (status == USP_OK) status = linear_totals(w, &a);
    if (status == USP_OK) status = linear_scan(w, &a);
    if (status == USP_OK) status = linear_output(w, &a);
    a.c = &both;
    return status == USP_OK ? linear_output(w, &a) : status;
}

static void time_linear(test *t, int tokens, int block, double bytes_per_ms)
{
    enum { HEADS = 16, DIM = 128 };
    linear_case c = {.dtype = USP_BF16, .batch = 1, .heads = HEADS, .q_heads = HEADS, .k_heads = HEADS, .v_heads = HEADS,
                     .dim = DIM, .value_dim = DIM, .chunk = {tokens}, .block = block, .shift = 1, .causal = 1, .decay = SLOW,
                     .scale = 1};
    linear_test l = {.c = &c, .first = 1, .last = 1};
    begin_case(t, USP_BF16);
    make_blocks(t, &l);
    make_decay(t, &l);
    size_t tables = t->used;
    cudaMemcpy(t->gpu.base, t->plain.base, tables, cudaMemcpyHostToDevice);
    l.q = timed_view(t, tokens, HEADS, DIM, 0), l.k = timed_view(t, tokens, HEADS, DIM, 0);
    l.v = timed_view(t, tokens, HEADS, DIM, 0);
    fill_gpu(t, t->used);
    cudaMemcpy(t->gpu.base, t->plain.base, tables, cudaMemcpyHostToDevice);
    l.out = timed_view(t, tokens, HEADS, DIM, 0), l.acc = timed_view(t, 0, HEADS, DIM, 1);
    l.states = timed_view(t, l.blocks, HEADS, DIM * DIM, 1), l.final = timed_view(t, 1, HEADS, DIM * DIM, 1);
    l.chunk_states = timed_view(t, 1, HEADS, DIM * DIM, 1);
    double floor = 4.0 * (double)l.q.bytes / bytes_per_ms;
    float forward = time_call(t, linear_forward, &l), backward = time_call(t, linear_backward, &l);
    float totals = time_call(t, linear_totals, &l), scan = time_call(t, linear_scan, &l);
    float output = time_call(t, linear_output, &l), apply = time_call(t, linear_apply, &l);
    printf("%7d %6d %10.3f %6.1f %10.3f %6.1f   totals %.3f, scan %.3f, output %.3f, apply %.3f ms\n", tokens, block, forward,
           forward / floor, backward, backward / (floor * 7 / 4), totals, scan, output, apply);
}

static void time_all(test *t)
{
    static const struct {
        int heads, key_heads, dim;
    } shapes[] = {{16, 16, 128}, {32, 32, 64}, {32, 8, 128}};
    size_t half = (size_t)1 << 30;
    fill_gpu(t, 2 * half);
    double bytes_per_ms = 2.0 * (double)half / time_call(t, copy_half, &half);
    printf("device copy: %.2f TB/s read and written\n\n", bytes_per_ms / 1e9);
    printf("linear, batch 1, 16 heads, d 128, bf16; x: times the time of moving 4 (forward) or 7 (backward) tensors\n");
    printf(" tokens  block forward ms      x backward ms     x\n");
    for (int tokens = 2048; tokens <= 65536; tokens *= tokens == 16384 ? 4 : 8)
        for (int block = 64; block <= 512; block *= 2) time_linear(t, tokens, block, bytes_per_ms);
    printf("\nsoftmax, batch 1, bf16; TFLOP/s by 4 (forward) and 10 (backward) x pairs x d\n");
    printf("    heads    d  tokens    mask forward ms backward ms fwd TF/s bwd TF/s\n");
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
        for (int way = 0; way < 4; way++)
            time_softmax(t, shapes[i].heads, shapes[i].key_heads, shapes[i].dim, way / 2 ? 16384 : 4096, way % 2 == 0);
}

/* ---- program ----------------------------------------------------------------------------------------------------- */

static char *host_slab(void)
{
    char *slab = calloc(1, ROOM);
    if (!slab) exit(1);
    return slab;
}

static int run_tests(test *t, size_t gpu_bytes, void (*tests)(test *))
{
    const usp_device_ops *ops = t->gpu.device->ops;
    if (ops->alloc(t->gpu.device, gpu_bytes, (void **)&t->gpu.base) != USP_OK ||
        ops->stream_create(t->gpu.device, &t->gpu.stream) != USP_OK) {
        fprintf(stderr, "%s\n", usp_last_error());
        return 1;
    }
    t->exact.base = host_slab(), t->plain.base = host_slab(), t->before = host_slab(), t->after = host_slab();
    t->again = host_slab(), t->free_to_write = host_slab();
    tests(t);
    free(t->exact.base), free(t->plain.base), free(t->before), free(t->after), free(t->again), free(t->free_to_write);
    ops->stream_destroy(t->gpu.device, t->gpu.stream);
    ops->free(t->gpu.device, t->gpu.base);
    return t->failures > 0;
}

int main(int argc, char **argv)
{
    int timing = argc == 2 && strcmp(argv[1], "--time") == 0;
    usp_world_config defaults = {.struct_size = sizeof defaults};
    usp_host host = usp_host_from_config(&defaults);
    test t = {.random = PI_DIGITS};
    if (argc > 1 && !timing) {
        fprintf(stderr, "usage: %s [--time]\n", argv[0]);
        return 2;
    }
    if (usp_device_create_cuda(&host, &t.gpu.device) != USP_OK) {
        printf("skipped: %s\n", usp_last_error());
        return SKIPPED;
    }
    if (usp_device_create_cpu(&host, &t.exact.device) != USP_OK) {
        fprintf(stderr, "%s\n", usp_last_error());
        return 1;
    }
    t.plain.device = t.exact.device;
    int result = run_tests(&t, timing ? (size_t)8 << 30 : ROOM, timing ? time_all : check_all);
    t.exact.device->ops->destroy(t.exact.device);
    t.gpu.device->ops->destroy(t.gpu.device);
    return result;
}
