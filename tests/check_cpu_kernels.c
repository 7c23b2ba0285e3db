/* check_cpu_kernels.c - compares every kernel of the CPU device, on every panel this processor runs, with plain loops
 * in double precision. It needs no test framework; the exit status is the verdict.
 *
 *   check_cpu_kernels [ROUNDS [SEED]]     random shapes; 24 rounds of seed 1
 *   check_cpu_kernels --time              speeds instead */
#define _POSIX_C_SOURCE 200809L
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "../lib/cpu/half.h"
#include "../lib/cpu/kernels.h"
#include "planned.h"

/* ---- verdicts ---------------------------------------------------------------------------------------------------- */

typedef struct check {
    usp_device *device;
    uint64_t random;
    int checks, failures;
    double worst_f32; /* largest relative RMS error of an f32 result */
} check;

static void verdict(check *c, int good, const char *format, ...) {
    c->checks++;
    if (good) return;
    c->failures++;
    va_list args;
    va_start(args, format);
    fprintf(stderr, "FAILED on %s: ", usp_cpu_panel(c->device)->name);
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
    va_end(args);
}

static uint64_t draw(check *c) {
    c->random ^= c->random << 13;
    c->random ^= c->random >> 7;
    c->random ^= c->random << 17;
    return c->random * 0x2545f4914f6cdd1dull >> 11;
}

static int pick(check *c, int n) {
    return (int)(draw(c) % (uint64_t)n);
}

static double uniform(check *c) {
    return (double)draw(c) / 4503599627370496.0 - 1; /* -1 .. 1 */
}

static void *memory(size_t bytes) {
    void *p = malloc(bytes ? bytes : 1);
    if (!p) exit(99);
    return p;
}

/* ---- 16-bit numbers, by arithmetic ------------------------------------------------------------------------------- */

static double decode(usp_dtype dtype, uint16_t bits) {
    int mantissa_bits = dtype == USP_F16 ? 10 : 7, bias = dtype == USP_F16 ? 15 : 127;
    int exponent_mask = dtype == USP_F16 ? 31 : 255;
    int exponent = bits >> mantissa_bits & exponent_mask, mantissa = bits & ((1 << mantissa_bits) - 1);
    double sign = bits & 0x8000 ? -1 : 1;
    if (exponent == exponent_mask) return mantissa ? (double)NAN : sign * (double)INFINITY;
    if (exponent == 0) return sign * ldexp(mantissa, 1 - bias - mantissa_bits);
    return sign * ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits);
}

static uint16_t encode(usp_dtype dtype, double value) {
    int mantissa_bits = dtype == USP_F16 ? 10 : 7, bias = dtype == USP_F16 ? 15 : 127;
    uint16_t sign = signbit(value) ? 0x8000 : 0, infinity = dtype == USP_F16 ? 0x7c00 : 0x7f80;
    double size = fabs(value);
    if (isinf(size)) return sign | infinity;
    int exponent = size > 0 ? ilogb(size) : -bias;
    if (exponent < 1 - bias) exponent = 1 - bias;
    int64_t steps = (int64_t)nearbyint(ldexp(size, mantissa_bits - exponent)); /* of the last place */
    int64_t bits = steps + ((int64_t)(exponent + bias - 1) << mantissa_bits);
    return (uint16_t)(sign | (bits > infinity ? infinity : bits));
}

static void check_pattern(check *c, usp_dtype dtype, uint16_t bits) {
    float value = dtype == USP_F16 ? usp_half_to_float(bits) : usp_bfloat_to_float(bits);
    uint16_t back = dtype == USP_F16 ? usp_float_to_half(value) : usp_float_to_bfloat(value);
    double truth = decode(dtype, bits);
    if (isnan(truth)) {
        verdict(c, isnan(value) && isnan(decode(dtype, back)) && (back & 0x8000) == (bits & 0x8000),
                "NaN %04x of dtype %d is lost", bits, (int)dtype);
        return;
    }
    verdict(c, (double)value == truth && !signbit(value) == !signbit(truth), "%04x of dtype %d gives %g, not %g", bits,
            (int)dtype, (double)value, truth);
    verdict(c, back == bits, "%04x of dtype %d comes back as %04x", bits, (int)dtype, back);
}

/* Halfway between a number and the next one, and its neighbours: where rounding goes wrong. */
static void check_rounding(check *c, usp_dtype dtype, uint16_t bits) {
    double low = decode(dtype, bits), high = decode(dtype, (uint16_t)(bits + 1));
    if (isnan(low) || isnan(high) || isinf(low)) return;
    if (isinf(high)) high = low + (low - decode(dtype, (uint16_t)(bits - 1)));
    float middle = (float)((low + high) / 2), values[3];
    values[0] = nextafterf(middle, -INFINITY), values[1] = middle, values[2] = nextafterf(middle, INFINITY);
    for (int i = 0; i < 3; i++) {
        uint16_t got = dtype == USP_F16 ? usp_float_to_half(values[i]) : usp_float_to_bfloat(values[i]);
        verdict(c, got == encode(dtype, (double)values[i]), "%a as dtype %d is %04x, not %04x", (double)values[i],
                (int)dtype, got, encode(dtype, (double)values[i]));
    }
}

static void check_halves(check *c) {
    for (int dtype = USP_F16; dtype <= USP_BF16; dtype++)
        for (uint32_t bits = 0; bits < 65536; bits++) {
            check_pattern(c, (usp_dtype)dtype, (uint16_t)bits);
            check_rounding(c, (usp_dtype)dtype, (uint16_t)bits);
        }
}

/* ---- tensors ----------------------------------------------------------------------------------------------------- */

typedef struct tensor {
    usp_tensor view;
    usp_dtype dtype;
    int tokens, batch, heads, dim;
    unsigned char *bytes;
    size_t size;
    double *truth; /* [tokens][batch][heads][dim] */
} tensor;

static size_t tensor_count(const tensor *t) {
    return (size_t)t->tokens * (size_t)t->batch * (size_t)t->heads * (size_t)t->dim;
}

/* Dimensions in random order with random gaps, at any address; all bytes 255, which is NaN. */
static tensor tensor_make(check *c, usp_dtype dtype, int tokens, int batch, int heads, int dim) {
    tensor t = {.dtype = dtype, .tokens = tokens, .batch = batch, .heads = heads, .dim = dim};
    int64_t *stride[3] = {&t.view.stride_token, &t.view.stride_batch, &t.view.stride_head};
    int64_t extent[3] = {tokens, batch, heads};
    int64_t next = dim + pick(c, 3);
    for (int left = 3; left; left--) {
        int k = pick(c, left);
        *stride[k] = next;
        next = next * extent[k] + pick(c, 4);
        stride[k] = stride[left - 1];
        extent[k] = extent[left - 1];
    }
    t.size = (size_t)next * usp_dtype_size(dtype) + 8;
    t.bytes = memory(t.size);
    memset(t.bytes, 255, t.size);
    t.view.data = t.bytes + 1 + pick(c, 6);
    t.truth = memory(tensor_count(&t) * sizeof(double));
    return t;
}

static void tensor_free(tensor *t) {
    free(t->bytes);
    free(t->truth);
}

static double *truth_at(const tensor *t, int token, int b, int h) {
    return t->truth + (((size_t)token * (size_t)t->batch + (size_t)b) * (size_t)t->heads + (size_t)h) * (size_t)t->dim;
}

static void write_element(const tensor *t, int token, int b, int h, int i, double value) {
    char *at = (char *)usp_cpu_row(&t->view, t->dtype, token, b, h) + (size_t)i * usp_dtype_size(t->dtype);
    float single = (float)value;
    uint16_t half = t->dtype == USP_F32 ? 0 : encode(t->dtype, value);
    memcpy(at, t->dtype == USP_F32 ? (void *)&single : (void *)&half, usp_dtype_size(t->dtype));
}

static double read_element(const tensor *t, int token, int b, int h, int i) {
    const char *at = (char *)usp_cpu_row(&t->view, t->dtype, token, b, h) + (size_t)i * usp_dtype_size(t->dtype);
    float single = 0;
    uint16_t half = 0;
    memcpy(t->dtype == USP_F32 ? (void *)&single : (void *)&half, at, usp_dtype_size(t->dtype));
    return t->dtype == USP_F32 ? (double)single : decode(t->dtype, half);
}

typedef double (*element_fn)(check *, const tensor *, int token, int b, int h, int i, double size);

static void tensor_each(check *c, const tensor *t, element_fn visit, double size) {
    for (int token = 0; token < t->tokens; token++)
        for (int b = 0; b < t->batch; b++)
            for (int h = 0; h < t->heads; h++)
                for (int i = 0; i < t->dim; i++) truth_at(t, token, b, h)[i] = visit(c, t, token, b, h, i, size);
}

/* Roughly normal; the truth is what the dtype can hold. */
static double random_element(check *c, const tensor *t, int token, int b, int h, int i, double size) {
    write_element(t, token, b, h, i, size * (uniform(c) + uniform(c) + uniform(c)));
    return read_element(t, token, b, h, i);
}

static tensor tensor_random(check *c, usp_dtype dtype, int tokens, int batch, int heads, int dim, double size) {
    tensor t = tensor_make(c, dtype, tokens, batch, heads, dim);
    tensor_each(c, &t, random_element, size);
    return t;
}

/* An output: poisoned, its truth zero until a reference adds to it. */
static tensor tensor_output(check *c, usp_dtype dtype, int tokens, int batch, int heads, int dim) {
    tensor t = tensor_make(c, dtype, tokens, batch, heads, dim);
    memset(t.truth, 0, tensor_count(&t) * sizeof(double));
    return t;
}

/* ---- comparison -------------------------------------------------------------------------------------------------- */

typedef struct error {
    double square, truth, count;
    int bad;
} error;

static void error_add(error *e, double got, double truth) {
    e->count++;
    if (truth == got) {
        e->truth += isfinite(truth) ? truth * truth : 0;
        return;
    }
    if (!isfinite(got) || !isfinite(truth)) e->bad++;
    e->square += (got - truth) * (got - truth);
    e->truth += truth * truth;
}

/* A tensor counts as at least 0.01 large; one that is 0 in truth, as gradients are where all rows have one key and
 * cancel to nothing, may be 1e-5 off. */
static void error_judge(check *c, const error *e, usp_dtype dtype, const char *what) {
    const double limit[] = {2e-6, 6e-4, 5e-3};
    double own = e->square > 0 ? sqrt(e->square / e->count) : 0;
    double rms = e->square > 0 ? sqrt(e->square / fmax(e->truth, 1e-4 * e->count)) : 0;
    int fine = e->truth > 0 ? rms <= limit[dtype] : own <= 1e-5;
    if (dtype == USP_F32 && e->truth > 0 && rms > c->worst_f32) c->worst_f32 = rms;
    verdict(c, !e->bad && fine, "%s: RMS error %.3g, relative %.3g, %d not finite", what, own, rms, e->bad);
}

static int untouched(const tensor *t) {
    for (size_t i = 0; i < t->size; i++)
        if (t->bytes[i] != 255) return 0;
    return 1;
}

/* Compares an output with its truth, then poisons its elements again: every other byte must still be poison. */
static void compare(check *c, const tensor *t, const char *what) {
    error e = {0, 0, 0, 0};
    for (int token = 0; token < t->tokens; token++)
        for (int b = 0; b < t->batch; b++)
            for (int h = 0; h < t->heads; h++) {
                for (int i = 0; i < t->dim; i++)
                    error_add(&e, read_element(t, token, b, h, i), truth_at(t, token, b, h)[i]);
                memset(usp_cpu_row(&t->view, t->dtype, token, b, h), 255, (size_t)t->dim * usp_dtype_size(t->dtype));
            }
    error_judge(c, &e, t->dtype, what);
    verdict(c, untouched(t), "%s: bytes beside the tensor were written", what);
}

static void compare_floats(check *c, const float *got, const double *truth, size_t n, const char *what) {
    error e = {0, 0, 0, 0};
    for (size_t i = 0; i < n; i++) error_add(&e, (double)got[i], truth[i]);
    error_judge(c, &e, USP_F32, what);
}

static float *poisoned(size_t n) {
    float *p = memory(n * sizeof *p);
    memset(p, 255, n * sizeof *p);
    return p;
}

/* ---- scratch ----------------------------------------------------------------------------------------------------- */

enum { GUARD = 256 };

/* What the device says its kernels work in, poisoned, and a guard behind it. */
static void *scratch_make(check *c, usp_attention attention, usp_dtype dtype, int dim, int value_dim) {
    usp_kernel_shape shape = {attention, dtype, 1, 1, dim, value_dim, 0};
    size_t bytes = c->device->ops->scratch(c->device, &shape);
    void *scratch = aligned_alloc(GUARD, bytes + GUARD);
    if (!scratch) exit(99);
    return memset(scratch, 255, bytes + GUARD);
}

static void scratch_free(check *c, void *scratch, usp_attention attention, usp_dtype dtype, int dim, int value_dim) {
    usp_kernel_shape shape = {attention, dtype, 1, 1, dim, value_dim, 0};
    const unsigned char *guard = (const unsigned char *)scratch + c->device->ops->scratch(c->device, &shape);
    int whole = 1;
    for (int i = 0; i < GUARD; i++) whole &= guard[i] == 255;
    verdict(c, whole, "kernels of dims %d, %d wrote behind their scratch", dim, value_dim);
    free(scratch);
}

/* ---- copy -------------------------------------------------------------------------------------------------------- */

/* A copy has one right answer, bit for bit. */
static double exact_element(check *c, const tensor *t, int token, int b, int h, int i, double size) {
    double got = read_element(t, token, b, h, i), truth = truth_at(t, token, b, h)[i] + size;
    verdict(c, got == truth, "copied element %d is %g, not %g", i, got, truth);
    return truth;
}

static void check_copy(check *c) {
    usp_dtype from_dtype = (usp_dtype)pick(c, 3), to_dtype = (usp_dtype)pick(c, 3);
    const int dims[] = {1, 5, 16, 17, 64, 300};
    int accumulate = to_dtype == USP_F32 && pick(c, 2);
    tensor from = tensor_random(c, from_dtype, pick(c, 6), 1 + pick(c, 2), 1 + pick(c, 3), dims[pick(c, 6)], 3);
    tensor to = tensor_random(c, to_dtype, from.tokens, from.batch, from.heads, from.dim, 3);
    usp_copy args = {.tokens = from.tokens, .batch = from.batch, .heads = from.heads, .dim = from.dim};
    args.from_dtype = from_dtype, args.to_dtype = to_dtype, args.from = from.view, args.to = to.view;
    args.accumulate = accumulate;
    for (size_t i = 0; i < tensor_count(&to); i++) {
        double sum = (accumulate ? to.truth[i] : 0) + from.truth[i];
        to.truth[i] = to_dtype == USP_F32 ? (double)(float)sum : decode(to_dtype, encode(to_dtype, sum));
    }
    c->device->ops->copy_rows(c->device, &args, NULL);
    int wrong = c->failures;
    tensor_each(c, &to, exact_element, 0);
    compare(c, &to, "copy");
    if (c->failures > wrong) fprintf(stderr, "    by a copy from dtype %d to %d\n", (int)from_dtype, (int)to_dtype);
    tensor_free(&from), tensor_free(&to);
}

/* ---- softmax: one side's segments, and tiles --------------------------------------------------------------------- */

enum { SEGMENTS = 3 };

typedef struct side {
    int segments, tokens;
    int begin[SEGMENTS + 1];                /* index of each segment's first token */
    int origin[SEGMENTS], stride[SEGMENTS]; /* position = origin + index * stride */
} side;

static side side_random(check *c, int tokens) {
    side s = {.segments = 1 + pick(c, SEGMENTS), .tokens = tokens};
    int position = pick(c, 9);
    for (int i = 0; i < s.segments; i++) {
        int left = tokens - s.begin[i];
        int length = i + 1 == s.segments ? left : pick(c, left + 1);
        s.begin[i + 1] = s.begin[i] + length;
        s.stride[i] = 1 + pick(c, 3) * pick(c, 2);
        s.origin[i] = position - s.begin[i] * s.stride[i];
        position += length * s.stride[i] + pick(c, 9);
    }
    return s;
}

static int position_of(const side *s, int index, int *segment) {
    int i = 0;
    while (index >= s->begin[i + 1]) i++;
    if (segment) *segment = i;
    return s->origin[i] + index * s->stride[i];
}

typedef struct band {
    int32_t low, high;
} band;

static band band_random(check *c) {
    const band kinds[] = {{INT32_MIN, 0}, {INT32_MIN, INT32_MAX}, {-pick(c, 90), pick(c, 40)},
                          {-40, -10},     {INT32_MIN, -1},        {1, INT32_MAX}};
    return kinds[pick(c, 6)];
}

typedef struct problem {
    usp_softmax args;
    side query, key;
    band band[SEGMENTS][SEGMENTS]; /* of query segment, key segment */
    tensor q, k, v, out, dout, dq, dk, dv, dq_sum, dk_sum, dv_sum;
    double *lse, *delta; /* [batch, heads, queries] */
    float *lse_single, *delta_single, *acc;
    usp_work *work;
    usp_tile *tile;
} problem;

static int allowed(const problem *p, int query, int key) {
    int qs, ks;
    int offset = -position_of(&p->query, query, &qs) + position_of(&p->key, key, &ks);
    return offset >= p->band[qs][ks].low && offset <= p->band[qs][ks].high;
}

static int pair_allowed(const problem *p, int rows_are_keys, int row, int column) {
    return rows_are_keys ? allowed(p, column, row) : allowed(p, row, column);
}

/* How many rows of [begin, begin + count) may be paired with the column. */
static int allowed_rows(const problem *p, int rows_are_keys, int begin, int count, int column) {
    int sum = 0;
    for (int i = begin; i < begin + count; i++) sum += pair_allowed(p, rows_are_keys, i, column);
    return sum;
}

/* The tile of a work item and a segment of columns within [from, to); 0 if no pair is allowed. */
static int make_tile(check *c, const problem *p, int rows_are_keys, const usp_work *work, int segment, int from, int to,
                     usp_tile *tile) {
    const side *columns = rows_are_keys ? &p->query : &p->key;
    int row_segment, begin = to, end = from, full = 0, best = 0;
    position_of(rows_are_keys ? &p->key : &p->query, work->begin, &row_segment);
    memset(tile, 0, sizeof *tile);
    for (int j = from; j < to; j++) {
        int rows = allowed_rows(p, rows_are_keys, work->begin, work->count, j);
        if (rows && j < begin) begin = j;
        if (rows) end = j + 1;
        full = rows == work->count ? full + 1 : 0;
        if (full > best) best = full, tile->full_begin = j + 1 - full, tile->full_end = j + 1;
    }
    if (!pick(c, 4)) tile->full_begin = tile->full_end = 0;
    tile->begin = begin, tile->end = end;
    tile->origin = columns->origin[segment], tile->stride = columns->stride[segment];
    band limits = rows_are_keys ? p->band[segment][row_segment] : p->band[row_segment][segment];
    tile->low = limits.low, tile->high = limits.high;
    return begin < end;
}

/* All tiles of one work item over the columns [from, to), some of them cut in two. */
static void make_work(check *c, problem *p, int rows_are_keys, usp_work *work, int from, int to) {
    const side *columns = rows_are_keys ? &p->query : &p->key;
    for (int s = 0; s < columns->segments; s++) {
        int begin = columns->begin[s] > from ? columns->begin[s] : from;
        int end = columns->begin[s + 1] < to ? columns->begin[s + 1] : to;
        if (begin >= end) continue;
        int cut = begin + pick(c, 2) * pick(c, end - begin);
        usp_tile *tile = p->tile + work->first_tile;
        if (cut > begin) work->tiles += make_tile(c, p, rows_are_keys, work, s, begin, cut, tile + work->tiles);
        work->tiles += make_tile(c, p, rows_are_keys, work, s, cut, end, tile + work->tiles);
    }
}

static void make_tiles(check *c, problem *p, int rows_are_keys, int from, int to) {
    const side *rows = rows_are_keys ? &p->key : &p->query;
    int works = 0, tiles = 0;
    for (int s = 0; s < rows->segments; s++)
        for (int begin = rows->begin[s]; begin < rows->begin[s + 1]; begin += p->work[works - 1].count) {
            int left = rows->begin[s + 1] - begin, count = 1 + pick(c, USP_WORK_ROWS);
            usp_work work = {.begin = begin,
                             .count = left < count ? left : count,
                             .origin = rows->origin[s],
                             .stride = rows->stride[s],
                             .first_tile = tiles};
            make_work(c, p, rows_are_keys, &work, from, to);
            tiles += work.tiles;
            p->work[works++] = work;
        }
    p->args.tiles = (usp_tiles){p->work, p->tile, works};
}

/* ---- softmax: reference ------------------------------------------------------------------------------------------ */

static double dot(const double *a, const double *b, int n) {
    double sum = 0;
    for (int i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

static int key_head(const problem *p, int h) {
    return (h + p->args.kv.offset) / p->args.kv.group;
}

static double score(const problem *p, int b, int h, int query, int key) {
    return (double)p->args.scale * dot(truth_at(&p->q, query, b, h), truth_at(&p->k, key, b, key_head(p, h)), p->q.dim);
}

static size_t stat(const problem *p, int b, int h, int query) {
    return ((size_t)b * (size_t)p->q.heads + (size_t)h) * (size_t)p->q.tokens + (size_t)query;
}

static void reference_forward(problem *p, int b, int h, int query) {
    double max = -(double)INFINITY, sum = 0, *out = truth_at(&p->out, query, b, h);
    for (int j = 0; j < p->k.tokens; j++)
        if (allowed(p, query, j)) max = fmax(max, score(p, b, h, query, j));
    for (int j = 0; j < p->k.tokens; j++) {
        if (!allowed(p, query, j)) continue;
        double weight = exp(score(p, b, h, query, j) - max);
        sum += weight;
        for (int i = 0; i < p->v.dim; i++) out[i] += weight * truth_at(&p->v, j, b, key_head(p, h))[i];
    }
    for (int i = 0; i < p->v.dim && sum > 0; i++) out[i] /= sum;
    p->lse[stat(p, b, h, query)] = sum > 0 ? max + log(sum) : -(double)INFINITY;
    p->delta[stat(p, b, h, query)] = dot(out, truth_at(&p->dout, query, b, h), p->v.dim);
}

static void reference_backward(problem *p, int b, int h, int query) {
    double lse = p->lse[stat(p, b, h, query)], delta = p->delta[stat(p, b, h, query)], scale = (double)p->args.scale;
    const double *dout = truth_at(&p->dout, query, b, h), *q = truth_at(&p->q, query, b, h);
    double *dq = truth_at(&p->dq, query, b, h);
    for (int j = 0, g = key_head(p, h); j < p->k.tokens; j++) {
        if (!allowed(p, query, j)) continue;
        double weight = exp(score(p, b, h, query, j) - lse);
        double slope = weight * (dot(dout, truth_at(&p->v, j, b, g), p->v.dim) - delta);
        for (int i = 0; i < p->v.dim; i++) truth_at(&p->dv, j, b, g)[i] += weight * dout[i];
        for (int i = 0; i < p->q.dim; i++) truth_at(&p->dk, j, b, g)[i] += scale * slope * q[i];
        for (int i = 0; i < p->q.dim; i++) dq[i] += scale * slope * truth_at(&p->k, j, b, g)[i];
    }
}

/* ---- softmax: problems ------------------------------------------------------------------------------------------- */

static void problem_tensors(check *c, problem *p, int heads, int key_heads) {
    const usp_softmax *a = &p->args;
    int queries = p->query.tokens, keys = p->key.tokens;
    p->q = tensor_random(c, a->dtype, queries, a->batch, heads, a->dim, 1);
    p->k = tensor_random(c, a->dtype, keys, a->batch, key_heads, a->dim, 1);
    p->v = tensor_random(c, a->dtype, keys, a->batch, key_heads, a->value_dim, 1);
    p->dout = tensor_random(c, a->dtype, queries, a->batch, heads, a->value_dim, 1);
    p->out = tensor_output(c, a->dtype, queries, a->batch, heads, a->value_dim);
    p->dq = tensor_output(c, a->dtype, queries, a->batch, heads, a->dim);
    p->dk = tensor_output(c, a->dtype, keys, a->batch, key_heads, a->dim);
    p->dv = tensor_output(c, a->dtype, keys, a->batch, key_heads, a->value_dim);
    p->dq_sum = tensor_output(c, USP_F32, queries, a->batch, heads, a->dim);
    p->dk_sum = tensor_output(c, USP_F32, keys, a->batch, key_heads, a->dim);
    p->dv_sum = tensor_output(c, USP_F32, keys, a->batch, key_heads, a->value_dim);
}

static void problem_args(problem *p) {
    usp_softmax *a = &p->args;
    a->q = p->q.view, a->k = p->k.view, a->v = p->v.view, a->out = p->out.view, a->dout = p->dout.view;
    a->dq = p->dq.view, a->dk = p->dk.view, a->dv = p->dv.view;
    a->dq_sum = p->dq_sum.view, a->dk_sum = p->dk_sum.view, a->dv_sum = p->dv_sum.view;
    a->lse = p->lse_single, a->delta = p->delta_single, a->acc = p->acc;
}

static problem problem_make(check *c, usp_dtype dtype, int dim, int value_dim, int queries, int keys) {
    problem p = {.query = side_random(c, queries), .key = side_random(c, keys)};
    usp_softmax *a = &p.args;
    int group = 1 + pick(c, 3), heads = 1 + pick(c, 4);
    a->dtype = dtype, a->batch = 1 + pick(c, 2), a->heads = heads, a->dim = dim, a->value_dim = value_dim;
    a->kv = (usp_head_map){group, pick(c, group)};
    a->key_heads = (heads - 1 + a->kv.offset) / group + 1 + !pick(c, 4);
    a->scale = (float)(1 / sqrt(dim)), a->queries = queries, a->keys = keys;
    for (int i = 0; i < SEGMENTS * SEGMENTS; i++) p.band[i / SEGMENTS][i % SEGMENTS] = band_random(c);
    problem_tensors(c, &p, heads, a->key_heads);
    size_t stats = (size_t)(a->batch * heads) * (size_t)queries;
    p.lse = memory(stats * sizeof(double)), p.delta = memory(stats * sizeof(double));
    p.lse_single = poisoned(stats), p.delta_single = poisoned(stats), p.acc = poisoned(stats * (size_t)value_dim);
    p.work = memory(sizeof *p.work * (size_t)(queries + keys));
    p.tile = memory(sizeof *p.tile * (size_t)(queries + keys) * SEGMENTS * 2);
    a->scratch = scratch_make(c, USP_SOFTMAX, dtype, dim, value_dim);
    problem_args(&p);
    return p;
}

static void problem_free(check *c, problem *p) {
    tensor *all[] = {&p->q,  &p->k,  &p->v,      &p->out,    &p->dout,  &p->dq,
                     &p->dk, &p->dv, &p->dq_sum, &p->dk_sum, &p->dv_sum};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) tensor_free(all[i]);
    free(p->lse), free(p->delta), free(p->lse_single), free(p->delta_single), free(p->acc);
    free(p->work), free(p->tile);
    scratch_free(c, p->args.scratch, USP_SOFTMAX, p->args.dtype, p->args.dim, p->args.value_dim);
}

static void problem_reference(problem *p) {
    for (int b = 0; b < p->args.batch; b++)
        for (int h = 0; h < p->args.heads; h++)
            for (int t = 0; t < p->q.tokens; t++) {
                reference_forward(p, b, h, t);
                reference_backward(p, b, h, t);
            }
}

/* ---- softmax: checks --------------------------------------------------------------------------------------------- */

typedef usp_status (*softmax_fn)(usp_device *, const usp_softmax *, usp_stream);

/* Folds the columns in `calls` calls, cut anywhere. */
static void run_softmax(check *c, problem *p, softmax_fn run, int rows_are_keys, int calls) {
    int columns = rows_are_keys ? p->q.tokens : p->k.tokens, from = 0;
    for (int i = 0; i < calls; i++) {
        int to = i + 1 == calls ? columns : from + pick(c, columns - from + 1);
        make_tiles(c, p, rows_are_keys, from, to);
        p->args.first = i == 0, p->args.last = i + 1 == calls;
        run(c->device, &p->args, NULL);
        from = to;
    }
}

static void check_forward(check *c, problem *p, int calls) {
    size_t stats = (size_t)(p->args.batch * p->args.heads) * (size_t)p->q.tokens;
    memset(p->lse_single, 255, stats * sizeof(float));
    run_softmax(c, p, c->device->ops->softmax_forward, 0, calls);
    compare_floats(c, p->lse_single, p->lse, stats, "lse");
    compare(c, &p->out, calls == 1 ? "out" : "out of several calls");
}

/* The running sum (acc) rather than the result, and that head h does not depend on the heads beside it. */
static void check_head_alone(check *c, problem *p) {
    size_t rows = (size_t)(p->q.tokens * p->args.batch), dim = (size_t)p->v.dim, heads = (size_t)p->args.heads;
    int h = pick(c, p->args.heads), same = 1;
    float *acc = poisoned(rows * dim), *lse = poisoned(rows);
    make_tiles(c, p, 0, 0, p->k.tokens);
    p->args.first = 1, p->args.last = 0;
    c->device->ops->softmax_forward(c->device, &p->args, NULL);
    usp_softmax alone = p->args;
    alone.heads = 1, alone.kv.offset += h, alone.acc = acc, alone.lse = lse;
    alone.q.data = usp_cpu_row(&p->q.view, p->q.dtype, 0, 0, h);
    c->device->ops->softmax_forward(c->device, &alone, NULL);
    for (size_t i = 0; i < rows; i++)
        same &= !memcmp(acc + i * dim, p->acc + (i * heads + (size_t)h) * dim, dim * sizeof(float));
    verdict(c, same, "a head's running sum depends on the heads beside it");
    for (int b = 0; b < p->args.batch; b++) {
        const float *beside = p->lse_single + stat(p, b, h, 0);
        same = !memcmp(lse + b * p->q.tokens, beside, (size_t)p->q.tokens * sizeof(float));
        verdict(c, same, "a head's lse depends on the heads beside it");
    }
    free(acc), free(lse);
}

static void check_delta(check *c, problem *p) {
    size_t n = (size_t)(p->args.batch * p->args.heads) * (size_t)p->q.tokens;
    double *truth = memory(n * sizeof(double));
    float *delta = poisoned(n);
    tensor out = tensor_random(c, p->q.dtype, p->q.tokens, p->q.batch, p->q.heads, p->v.dim, 1);
    usp_softmax args = p->args;
    args.out = out.view;
    for (int b = 0; b < p->args.batch; b++)
        for (int h = 0; h < p->args.heads; h++)
            for (int t = 0; t < p->q.tokens; t++)
                truth[stat(p, b, h, t)] = dot(truth_at(&out, t, b, h), truth_at(&p->dout, t, b, h), p->v.dim);
    c->device->ops->softmax_delta(c->device, &args, delta, NULL);
    compare_floats(c, delta, truth, n, "delta");
    tensor_free(&out);
    free(truth), free(delta);
}

static void check_backward(check *c, problem *p, int calls) {
    size_t n = (size_t)(p->args.batch * p->args.heads) * (size_t)p->q.tokens;
    for (size_t i = 0; i < n; i++) p->lse_single[i] = (float)p->lse[i], p->delta_single[i] = (float)p->delta[i];
    run_softmax(c, p, c->device->ops->softmax_backward_query, 0, calls);
    compare(c, &p->dq, "dq");
    run_softmax(c, p, c->device->ops->softmax_backward_key, 1, calls);
    compare(c, &p->dk, "dk");
    compare(c, &p->dv, "dv");
}

static void check_softmax(check *c, usp_dtype dtype, int dim, int value_dim, int queries, int keys) {
    problem p = problem_make(c, dtype, dim, value_dim, queries, keys);
    problem_reference(&p);
    for (int calls = 1; calls <= 3; calls++) {
        check_forward(c, &p, calls);
        check_backward(c, &p, calls);
    }
    check_head_alone(c, &p);
    check_delta(c, &p);
    problem_free(c, &p);
}

/* ---- linear: problems -------------------------------------------------------------------------------------------- */

enum { BLOCKS = 12 };

typedef struct linear {
    usp_linear args;
    tensor q, k, v, out;
    usp_block block[BLOCKS];
    int chunks;
    float *states, *acc, *log_decay;
    double *truth; /* of states */
} linear;

/* Chunks one after the other, each cut into blocks of any lengths, a few of them empty. */
static void linear_blocks(check *c, linear *l, int tokens) {
    int begin = 0, first = 0, distance = 0;
    for (int i = 0; i < BLOCKS; i++) {
        int count = i + 1 == BLOCKS ? tokens - begin : pick(c, 4) * pick(c, (tokens - begin) / 3 + 1);
        count = count > tokens - begin ? tokens - begin : count;
        l->block[i] = (usp_block){begin, count, l->chunks, distance, 0, 0};
        begin += count, distance += count;
        if (i + 1 < BLOCKS && pick(c, 3)) continue;
        for (; first <= i; first++) l->block[first].chunk_rows = distance;
        l->chunks++, distance = 0;
    }
}

static size_t state_size(const linear *l) {
    return (size_t)l->args.dim * (size_t)l->args.value_dim;
}

static size_t states_size(const linear *l) {
    return (size_t)(BLOCKS * l->args.batch * l->args.heads) * state_size(l);
}

static double *state_truth(const linear *l, int index, int b, int h) {
    return l->truth + (size_t)((index * l->args.batch + b) * l->args.heads + h) * state_size(l);
}

static size_t state_element(const linear *l, int i, int e) {
    return (size_t)(l->args.transposed ? e * l->args.dim + i : i * l->args.value_dim + e);
}

static void linear_decay(check *c, linear *l) {
    l->log_decay = memory((size_t)l->args.heads * sizeof(float));
    for (int h = 0; h < l->args.heads; h++) l->log_decay[h] = pick(c, 4) ? -(float)pow(10, -3 * fabs(uniform(c))) : 0;
    l->args.log_decay = pick(c, 4) ? l->log_decay : NULL;
}

static linear linear_make(check *c, usp_dtype dtype, int dim, int value_dim, int tokens) {
    linear l = {.args = {.dtype = dtype, .dim = dim, .value_dim = value_dim, .tokens = tokens, .causal = 1}};
    usp_linear *a = &l.args;
    int group = 1 + pick(c, 3);
    a->batch = 1 + pick(c, 2), a->heads = 1 + pick(c, 4), a->scale = 0.5f + (float)pick(c, 2);
    a->q_map = (usp_head_map){1, 0};
    a->k_map = (usp_head_map){group, pick(c, group)};
    a->v_map = (usp_head_map){2, pick(c, 2)};
    a->reverse = pick(c, 2), a->shift = pick(c, 2), a->transposed = pick(c, 2), a->blocks = BLOCKS;
    linear_blocks(c, &l, tokens);
    linear_decay(c, &l);
    a->scratch = scratch_make(c, USP_LINEAR, dtype, dim, value_dim);
    l.q = tensor_random(c, dtype, tokens, a->batch, a->heads, dim, 1);
    l.k = tensor_random(c, dtype, tokens, a->batch, (a->heads - 1 + a->k_map.offset) / group + 1, dim, 1);
    l.v = tensor_random(c, dtype, tokens, a->batch, (a->heads - 1 + a->v_map.offset) / 2 + 1, value_dim, 1);
    l.out = tensor_output(c, dtype, tokens, a->batch, a->heads, value_dim);
    l.acc = poisoned(tensor_count(&l.out)), l.states = poisoned(states_size(&l));
    l.truth = memory(states_size(&l) * sizeof(double));
    return l;
}

static void linear_args(linear *l) {
    usp_linear *a = &l->args;
    a->q = l->q.view, a->k = l->k.view, a->v = l->v.view, a->out = l->out.view;
    a->block = l->block, a->states = l->states, a->acc = l->acc;
}

static void linear_free(check *c, linear *l) {
    tensor_free(&l->q), tensor_free(&l->k), tensor_free(&l->v), tensor_free(&l->out);
    free(l->states), free(l->acc), free(l->log_decay), free(l->truth);
    scratch_free(c, l->args.scratch, USP_LINEAR, l->args.dtype, l->args.dim, l->args.value_dim);
}

static double decay(const linear *l, int h, int64_t n) {
    return l->args.log_decay ? exp((double)l->log_decay[h] * (double)n) : 1;
}

static const double *mapped(const tensor *t, usp_head_map map, int token, int b, int h) {
    return truth_at(t, token, b, (h + map.offset) / map.group);
}

/* ---- linear: checks ---------------------------------------------------------------------------------------------- */

static void check_totals(check *c, linear *l) {
    const usp_linear *a = &l->args;
    memset(l->truth, 0, states_size(l) * sizeof(double));
    for (int n = 0; n < BLOCKS * a->batch * a->heads; n++) {
        int index = n / (a->batch * a->heads), b = n / a->heads % a->batch, h = n % a->heads;
        usp_block block = l->block[index];
        double *state = state_truth(l, index, b, h);
        for (int j = block.begin; j < block.begin + block.count; j++) {
            double weight = decay(l, h, (a->reverse ? j - block.begin : block.begin + block.count - 1 - j) + a->shift);
            const double *k = mapped(&l->k, a->k_map, j, b, h), *v = mapped(&l->v, a->v_map, j, b, h);
            for (int i = 0; i < a->dim; i++)
                for (int e = 0; e < a->value_dim; e++) state[state_element(l, i, e)] += weight * k[i] * v[e];
        }
    }
    memset(l->states, 255, states_size(l) * sizeof(float));
    c->device->ops->linear_totals(c->device, a, NULL);
    compare_floats(c, l->states, l->truth, states_size(l), "totals");
}

/* row += scale * weight * q_i^T state. */
static void add_state(const linear *l, double *row, int token, int b, int h, int index, double weight) {
    const double *q = mapped(&l->q, l->args.q_map, token, b, h), *state = state_truth(l, index, b, h);
    for (int i = 0; i < l->args.dim; i++)
        for (int e = 0; e < l->args.value_dim; e++)
            row[e] += (double)l->args.scale * weight * q[i] * state[state_element(l, i, e)];
}

static void reference_output(const linear *l, double *row, int token, int b, int h, const usp_block *block) {
    const usp_linear *a = &l->args;
    int first = a->reverse ? token : block->begin, end = a->reverse ? block->begin + block->count : token + 1;
    int before = a->reverse ? block->begin + block->count - 1 - token : token - block->begin;
    for (int j = first; j < end; j++) {
        double qk = dot(mapped(&l->q, a->q_map, token, b, h), mapped(&l->k, a->k_map, j, b, h), a->dim);
        const double *v = mapped(&l->v, a->v_map, j, b, h);
        for (int e = 0; e < a->value_dim; e++) row[e] += (double)a->scale * decay(l, h, abs(token - j)) * qk * v[e];
    }
    add_state(l, row, token, b, h, (int)(block - l->block), decay(l, h, before + a->shift));
}

static void reference_apply(const linear *l, double *row, int token, int b, int h, const usp_block *block) {
    int before = block->distance + token - block->begin;
    if (l->args.reverse) before = block->chunk_rows - 1 - before;
    add_state(l, row, token, b, h, block->chunk, l->args.causal ? decay(l, h, before + l->args.shift) : 1);
}

typedef void (*output_fn)(const linear *, double *row, int token, int b, int h, const usp_block *block);

/* Runs an entry on random states, and on a random running sum unless `first`, into the result or the running sum. */
static void check_output(check *c, linear *l, output_fn reference, int apply, int first, int last) {
    const usp_device_ops *ops = c->device->ops;
    for (size_t i = 0; i < states_size(l); i++) l->states[i] = (float)uniform(c), l->truth[i] = (double)l->states[i];
    for (size_t i = 0; i < tensor_count(&l->out); i++) {
        l->acc[i] = first ? NAN : (float)uniform(c);
        l->out.truth[i] = first ? 0 : (double)l->acc[i];
    }
    for (const usp_block *block = l->block; block < l->block + BLOCKS; block++)
        for (int t = block->begin; t < block->begin + block->count; t++)
            for (int n = 0; n < l->args.batch * l->args.heads; n++)
                reference(l, truth_at(&l->out, t, n / l->args.heads, n % l->args.heads), t, n / l->args.heads,
                          n % l->args.heads, block);
    l->args.first = first, l->args.last = last;
    (apply ? ops->linear_apply : ops->linear_output)(c->device, &l->args, NULL);
    if (last)
        compare(c, &l->out, apply ? "apply" : "output");
    else
        compare_floats(c, l->acc, l->out.truth, tensor_count(&l->out), apply ? "apply to acc" : "output to acc");
}

static void check_linear(check *c, usp_dtype dtype, int dim, int value_dim, int tokens) {
    linear l = linear_make(c, dtype, dim, value_dim, tokens);
    linear_args(&l);
    check_totals(c, &l);
    for (int i = 0; i < 4; i++) check_output(c, &l, reference_output, 0, i & 1, i >> 1);
    for (int i = 0; i < 4; i++) check_output(c, &l, reference_apply, 1, i & 1, i >> 1);
    l.args.causal = 0;
    check_output(c, &l, reference_apply, 1, 1, 1);
    linear_free(c, &l);
}

/* ---- linear: scan ------------------------------------------------------------------------------------------------ */

enum { STATES = 9, GROUPS = 4 };

static void reference_scan(const usp_scan *a, const float *data, double *truth, double *final, size_t row,
                           size_t stride) {
    double log_decay = a->log_decay ? (double)a->log_decay[row / (size_t)a->elements % (size_t)a->heads] : 0;
    for (int g = 0; g < a->groups; g++) {
        double x = a->initial ? (double)a->initial[(size_t)g * stride + row] : 0;
        for (int n = 0; n < a->states; n++) {
            int i = a->reverse ? a->states - 1 - n : n;
            if (a->step[i].group != g) continue;
            truth[(size_t)i * stride + row] = x;
            x = exp(log_decay * a->step[i].length) * x + (double)data[(size_t)i * stride + row];
        }
        final[(size_t)g * stride + row] = x;
    }
}

static void check_scan(check *c) {
    const int elements[] = {1, 7, 64, 1500};
    usp_scan a = {.batch = 1 + pick(c, 2), .heads = 1 + pick(c, 3), .elements = elements[pick(c, 4)]};
    size_t stride = (size_t)(a.batch * a.heads) * (size_t)a.elements;
    float *data = poisoned(STATES * stride), *initial = poisoned(GROUPS * stride), *final = poisoned(GROUPS * stride);
    double *truth = memory(STATES * stride * sizeof(double)), *final_truth = memory(GROUPS * stride * sizeof(double));
    float log_decay[3];
    usp_scan_step step[STATES];
    for (int i = 0, group = 0; i < STATES; i++, group += group + 1 < GROUPS && !pick(c, 2))
        step[i] = (usp_scan_step){pick(c, 50), group}; /* later groups may have no state */
    for (size_t i = 0; i < STATES * stride; i++) data[i] = (float)uniform(c);
    for (size_t i = 0; i < GROUPS * stride; i++) initial[i] = (float)uniform(c);
    for (int h = 0; h < 3; h++) log_decay[h] = -0.1f * (float)pick(c, 3);
    a.step = step, a.states = STATES, a.groups = GROUPS, a.data = data;
    a.reverse = pick(c, 2), a.log_decay = pick(c, 3) ? log_decay : NULL;
    a.initial = pick(c, 2) ? initial : NULL, a.final = pick(c, 2) ? final : NULL;
    for (size_t row = 0; row < stride; row++) reference_scan(&a, data, truth, final_truth, row, stride);
    c->device->ops->linear_scan(c->device, &a, NULL);
    compare_floats(c, data, truth, STATES * stride, "scan");
    if (a.final) compare_floats(c, final, final_truth, GROUPS * stride, "final state of a scan");
    free(data), free(initial), free(final), free(truth), free(final_truth);
}

/* ---- device ------------------------------------------------------------------------------------------------------ */

static void check_device(check *c) {
    const usp_device_ops *ops = c->device->ops;
    usp_kernel_shape good = {USP_SOFTMAX, USP_BF16, 1, 1, 512, 1, 0}, bad = {USP_LINEAR, USP_F32, 1, 1, 64, 513, 0};
    void *a = NULL, *b = NULL, *none = NULL;
    usp_event *event = NULL;
    int busy = 1;
    verdict(c, ops->supports(c->device, &good) == USP_OK, "512 x 1 is refused");
    verdict(c, ops->supports(c->device, &bad) == USP_UNSUPPORTED, "513 is not refused");
    verdict(c, strstr(usp_last_error(), "513") != NULL, "the sentence does not name 513");
    verdict(c, ops->alloc(c->device, 100, &a) == USP_OK && (uintptr_t)a % 256 == 0, "alloc");
    verdict(c, ops->alloc(c->device, 0, &b) == USP_OK && b, "alloc of nothing");
    verdict(c, ops->alloc(c->device, SIZE_MAX, &none) == USP_NO_MEMORY, "alloc of too much");
    verdict(c, ops->event_create(c->device, &event) == USP_OK && event, "event_create");
    verdict(c, ops->event_query(c->device, event, &busy) == USP_OK && !busy, "event_query");
    memset(a, 7, 100);
    verdict(c, ops->zero(c->device, a, 100, NULL) == USP_OK && !((char *)a)[0] && !((char *)a)[99], "zero");
    ops->event_destroy(c->device, event);
    ops->free(c->device, a), ops->free(c->device, b), ops->free(c->device, none);
}

/* The panel's exponential, through weigh with lse 0: nothing for -inf, NaN for NaN, else within 1.5e-7. */
static void check_exponential(check *c) {
    _Alignas(64) float score[USP_CPU_LANE], slope[USP_CPU_LANE] = {0}, zero[USP_CPU_LANE] = {0};
    usp_scores scores = {score, 1, USP_CPU_LANE};
    for (int round = 0; round < 20000; round++) {
        float x[USP_CPU_LANE] = {-INFINITY, NAN, -1000, 0};
        for (int i = 4; i < USP_CPU_LANE; i++) x[i] = (float)(-43.5 + 43.5 * uniform(c));
        memcpy(score, x, sizeof x);
        usp_cpu_panel(c->device)->weigh(scores, slope, zero, zero, 0);
        verdict(c, score[0] == 0 && isnan(score[1]) && score[2] == 0 && score[3] == 1, "exp of -inf, NaN, -1000 or 0");
        double worst = 0;
        for (int i = 4; i < USP_CPU_LANE; i++) worst = fmax(worst, fabs((double)score[i] / exp((double)x[i]) - 1));
        verdict(c, worst <= 1.5e-7, "exp near %g has relative error %g", (double)x[4], worst);
    }
}

enum { BAND_TERMS = 21 };

/* Whether the sums of a product are those of the terms within its band: finite where these are. */
static int sums_are_right(const usp_product *p) {
    int right = 1;
    for (int i = 0; i < p->m; i++)
        for (int j = 0; j < p->n; j++) {
            double truth = 0;
            float sum = p->c[i * p->c_row + j];
            for (int l = 0; l < p->k; l++) {
                int offset = p->band->origin + l * p->band->stride - p->band->position[i];
                if (offset < p->band->low || offset > p->band->high) continue;
                truth += (double)p->a[i * p->a_row + l * p->a_step] * (double)p->b[l * p->b_row + j];
            }
            right &= isfinite(truth) ? fabs(truth - (double)sum) < 1e-5 : !isfinite(sum);
        }
    return right;
}

/* A product of which a band leaves terms out, with a NaN or infinity in one of them or in one that stays. */
static void check_banded(check *c) {
    _Alignas(64) float a[BAND_TERMS * USP_CPU_ROWS], b[BAND_TERMS * USP_CPU_LANE], sum[USP_CPU_ROWS * USP_CPU_LANE];
    const float odd[] = {NAN, INFINITY, -INFINITY};
    int32_t position[USP_CPU_ROWS];
    const usp_panel *panel = usp_cpu_panel(c->device);
    usp_band allowed_terms = {position, pick(c, 9), 1 + pick(c, 2), -pick(c, 9), pick(c, 5)};
    usp_product p = {.m = USP_CPU_ROWS, .n = USP_CPU_LANE, .k = BAND_TERMS, .band = &allowed_terms};
    p.a = a, p.a_row = 1, p.a_step = USP_CPU_ROWS, p.b = b, p.b_row = p.c_row = USP_CPU_LANE, p.c = sum;
    for (int i = 0; i < USP_CPU_ROWS; i++) position[i] = 3 * i;
    for (int i = 0; i < BAND_TERMS * USP_CPU_ROWS; i++) a[i] = (float)uniform(c);
    for (int i = 0; i < BAND_TERMS * USP_CPU_LANE; i++) b[i] = (float)uniform(c);
    verdict(c, panel->finite(b, BAND_TERMS * USP_CPU_LANE), "numbers are not finite");
    b[pick(c, BAND_TERMS * USP_CPU_LANE)] = odd[pick(c, 3)];
    verdict(c, !panel->finite(b, BAND_TERMS * USP_CPU_LANE), "a NaN or infinity is finite");
    panel->multiply(&p);
    verdict(c, sums_are_right(&p), "a banded product is wrong");
}

/* ---- speed ------------------------------------------------------------------------------------------------------- */

static double seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* Billions of operations a second of one entry over `pairs` pairs a head, each `products` products of length dim. */
static double speed(check *c, problem *p, softmax_fn run, double pairs, int products) {
    double begin = seconds(), end = begin;
    int runs = 0;
    for (; end - begin < 0.2; runs++, end = seconds()) run(c->device, &p->args, NULL);
    return 2e-9 * products * pairs * p->args.dim * p->args.heads * p->args.batch * runs / (end - begin);
}

static void print_speed(check *c, usp_dtype dtype, int dim, int causal) {
    const usp_device_ops *ops = c->device->ops;
    const int tokens = 1024;
    problem p = problem_make(c, dtype, dim, dim, tokens, tokens);
    usp_planned plan;
    usp_mask mask = causal ? USP_MASK_CAUSAL : USP_MASK_FULL;
    if (usp_planned_open(&plan, USP_DEVICE_CPU, USP_SOFTMAX, mask, tokens, tokens)) exit(99);
    double pairs = causal ? tokens * (tokens + 1) / 2.0 : (double)tokens * tokens, rate[3];
    p.args.first = p.args.last = 1;
    p.args.tiles = usp_schedule_query_tiles(plan.schedule, 0);
    rate[0] = speed(c, &p, ops->softmax_forward, pairs, 2);
    rate[1] = speed(c, &p, ops->softmax_backward_query, pairs, 3);
    p.args.tiles = usp_schedule_key_tiles(plan.schedule, 0);
    rate[2] = speed(c, &p, ops->softmax_backward_key, pairs, 4);
    printf("%-9s dtype %d d %3d %-6s forward %6.1f, dq %6.1f, dk+dv %6.1f GFLOP/s\n", usp_cpu_panel(c->device)->name,
           (int)dtype, dim, causal ? "causal" : "full", rate[0], rate[1], rate[2]);
    usp_planned_close(&plan);
    problem_free(c, &p);
}

static void print_linear_speed(check *c, int dim) {
    const usp_device_ops *ops = c->device->ops;
    usp_status (*const entry[2])(usp_device *, const usp_linear *, usp_stream) = {ops->linear_totals,
                                                                                  ops->linear_output};
    linear l = linear_make(c, USP_F32, dim, dim, 128 * BLOCKS);
    linear_args(&l);
    l.args.transposed = 0, l.args.first = l.args.last = 1;
    for (int i = 0; i < BLOCKS; i++) l.block[i] = (usp_block){128 * i, 128, 0, 128 * i, 128 * BLOCKS, 0};
    memset(l.states, 0, states_size(&l) * sizeof(float));
    for (int e = 0; e < 2; e++) {
        double begin = seconds(), end = begin, each = e ? 2 * dim * (128 + dim) : 2 * dim * dim;
        double rows = 128 * BLOCKS * l.args.heads * l.args.batch;
        int runs = 0;
        for (; end - begin < 0.2; runs++, end = seconds()) entry[e](c->device, &l.args, NULL);
        printf("%-9s dtype 0 d %3d linear %s %6.1f GFLOP/s\n", usp_cpu_panel(c->device)->name, dim,
               e ? "output" : "totals", 1e-9 * each * rows * runs / (end - begin));
    }
    linear_free(c, &l);
}

/* ---- main -------------------------------------------------------------------------------------------------------- */

static void check_panel(check *c, int rounds) {
    const int dims[] = {5, 17, 64, 128, 1, 80, 200, 512};
    check_device(c);
    check_exponential(c);
    for (int i = 0; i < rounds; i++) {
        int wide = pick(c, 8) == 0, choices = wide ? 8 : 4, length = wide ? 60 : 150;
        usp_dtype dtype = (usp_dtype)(i % 3);
        check_softmax(c, dtype, dims[pick(c, choices)], dims[pick(c, choices)], pick(c, length), pick(c, length));
        check_linear(c, dtype, dims[pick(c, choices)], dims[pick(c, choices)], pick(c, length));
        check_copy(c);
        check_scan(c);
        check_banded(c);
    }
    check_softmax(c, USP_F32, 64, 64, 300, 400);
    check_softmax(c, USP_F32, 512, 256, 40, 40);
    check_linear(c, USP_F32, 64, 512, 400);
    check_linear(c, USP_F32, 512, 64, 100);
}

static void time_panel(check *c) {
    for (int k = 0; k < 4; k++) print_speed(c, USP_F32, 64 << (k & 1), k >> 1);
    print_speed(c, USP_BF16, 64, 1);
    print_speed(c, USP_F16, 64, 1);
    print_linear_speed(c, 64);
    print_linear_speed(c, 128);
}

int main(int argc, char **argv) {
    usp_host host = usp_host_from_config(NULL);
    const usp_panel *panels[] = {usp_panel_portable(), usp_panel_avx2(), usp_panel_avx512()};
    int timed = argc > 1 && strcmp(argv[1], "--time") == 0;
    int rounds = argc > 1 ? atoi(argv[1]) : 24, seed = argc > 2 ? atoi(argv[2]) : 1;
    check c = {.random = (uint64_t)seed * 0x9e3779b97f4a7c15ull};
    if (usp_device_create_cpu(&host, &c.device)) return 1;
    check_halves(&c);
    for (size_t i = 0; i < sizeof panels / sizeof *panels; i++) {
        if (!panels[i]) continue;
        ((usp_cpu_device *)c.device)->panel = panels[i];
        if (timed)
            time_panel(&c);
        else
            check_panel(&c, rounds);
    }
    c.device->ops->destroy(c.device);
    if (!timed) printf("%d checks, %d failed; largest f32 error %.2g\n", c.checks, c.failures, c.worst_f32);
    return c.failures != 0;
}
