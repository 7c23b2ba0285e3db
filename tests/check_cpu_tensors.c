/* check_cpu_tensors.c - random tensors of any strides with their truth in double precision, and what a result may be
 * off. */
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cpu_kernels.h"

/* ---- verdicts ---------------------------------------------------------------------------------------------------- */

void usp_check_verdict(check *c, int good, const char *format, ...) {
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

int usp_check_pick(check *c, int n) {
    return (int)(draw(c) % (uint64_t)n);
}

double usp_check_uniform(check *c) {
    return (double)draw(c) / 4503599627370496.0 - 1;
}

double usp_check_bell(check *c) {
    return usp_check_uniform(c) + usp_check_uniform(c) + usp_check_uniform(c);
}

void *usp_check_memory(size_t bytes) {
    void *p = malloc(bytes ? bytes : 1);
    if (!p) exit(99);
    return p;
}

float *usp_check_poisoned(size_t floats) {
    return memset(usp_check_memory(floats * sizeof(float)), 255, floats * sizeof(float));
}

double usp_check_dot(const double *a, const double *b, int n) {
    double sum = 0;
    for (int i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

/* ---- 16-bit numbers ---------------------------------------------------------------------------------------------- */

double usp_check_decode(usp_dtype dtype, uint16_t bits) {
    int mantissa_bits = dtype == USP_F16 ? 10 : 7, bias = dtype == USP_F16 ? 15 : 127;
    int exponent_mask = dtype == USP_F16 ? 31 : 255;
    int exponent = bits >> mantissa_bits & exponent_mask, mantissa = bits & ((1 << mantissa_bits) - 1);
    double sign = bits & 0x8000 ? -1 : 1;
    if (exponent == exponent_mask) return mantissa ? (double)NAN : sign * (double)INFINITY;
    if (exponent == 0) return sign * ldexp(mantissa, 1 - bias - mantissa_bits);
    return sign * ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits);
}

uint16_t usp_check_encode(usp_dtype dtype, double value) {
    int mantissa_bits = dtype == USP_F16 ? 10 : 7, bias = dtype == USP_F16 ? 15 : 127;
    uint16_t sign = signbit(value) ? 0x8000 : 0, infinity = dtype == USP_F16 ? 0x7c00 : 0x7f80;
    double size = fabs(value);
    if (isnan(size)) return sign | infinity | 1 << (mantissa_bits - 1);
    if (isinf(size)) return sign | infinity;
    int exponent = size > 0 ? ilogb(size) : -bias;
    if (exponent < 1 - bias) exponent = 1 - bias;
    int64_t steps = (int64_t)nearbyint(ldexp(size, mantissa_bits - exponent)); /* of the last place */
    int64_t bits = steps + ((int64_t)(exponent + bias - 1) << mantissa_bits);
    return (uint16_t)(sign | (bits > infinity ? infinity : bits));
}

/* ---- tensors ----------------------------------------------------------------------------------------------------- */

size_t usp_check_count(const tensor *t) {
    return (size_t)t->tokens * (size_t)t->batch * (size_t)t->heads * (size_t)t->dim;
}

/* Dimensions in random order with random gaps, at any address; all bytes 255, which is NaN. */
static tensor tensor_make(check *c, usp_dtype dtype, int tokens, int batch, int heads, int dim) {
    tensor t = {.dtype = dtype, .tokens = tokens, .batch = batch, .heads = heads, .dim = dim};
    int64_t *stride[3] = {&t.view.stride_token, &t.view.stride_batch, &t.view.stride_head};
    int64_t extent[3] = {tokens, batch, heads};
    int64_t next = dim + usp_check_pick(c, 3);
    for (int left = 3; left; left--) {
        int k = usp_check_pick(c, left);
        *stride[k] = next;
        next = next * extent[k] + usp_check_pick(c, 4);
        stride[k] = stride[left - 1];
        extent[k] = extent[left - 1];
    }
    t.size = (size_t)next * usp_dtype_size(dtype) + 8;
    t.bytes = memset(usp_check_memory(t.size), 255, t.size);
    t.view.data = t.bytes + 1 + usp_check_pick(c, 6);
    t.truth = usp_check_memory(usp_check_count(&t) * sizeof(double));
    return t;
}

void usp_check_tensor_free(tensor *t) {
    free(t->bytes);
    free(t->truth);
}

double *usp_check_truth(const tensor *t, int token, int b, int h) {
    return t->truth + (((size_t)token * (size_t)t->batch + (size_t)b) * (size_t)t->heads + (size_t)h) * (size_t)t->dim;
}

static char *element_at(const tensor *t, int token, int b, int h, int i) {
    return (char *)usp_cpu_row(&t->view, t->dtype, token, b, h) + (size_t)i * usp_dtype_size(t->dtype);
}

/* The truth is what the dtype can hold. */
void usp_check_write(const tensor *t, int token, int b, int h, int i, double value) {
    float single = (float)value;
    uint16_t half = t->dtype == USP_F32 ? 0 : usp_check_encode(t->dtype, value);
    memcpy(element_at(t, token, b, h, i), t->dtype == USP_F32 ? (void *)&single : (void *)&half,
           usp_dtype_size(t->dtype));
    usp_check_truth(t, token, b, h)[i] = usp_check_read(t, token, b, h, i);
}

double usp_check_read(const tensor *t, int token, int b, int h, int i) {
    float single = 0;
    uint16_t half = 0;
    memcpy(t->dtype == USP_F32 ? (void *)&single : (void *)&half, element_at(t, token, b, h, i),
           usp_dtype_size(t->dtype));
    return t->dtype == USP_F32 ? (double)single : usp_check_decode(t->dtype, half);
}

tensor usp_check_random(check *c, usp_dtype dtype, int tokens, int batch, int heads, int dim, double size) {
    tensor t = tensor_make(c, dtype, tokens, batch, heads, dim);
    for (int token = 0; token < tokens; token++)
        for (int b = 0; b < batch; b++)
            for (int h = 0; h < heads; h++)
                for (int i = 0; i < dim; i++) usp_check_write(&t, token, b, h, i, size * usp_check_bell(c));
    return t;
}

tensor usp_check_output(check *c, usp_dtype dtype, int tokens, int batch, int heads, int dim) {
    tensor t = tensor_make(c, dtype, tokens, batch, heads, dim);
    memset(t.truth, 0, usp_check_count(&t) * sizeof(double));
    return t;
}

usp_tensor usp_check_rows(const tensor *t, int64_t first) {
    usp_tensor view = t->view;
    view.data = usp_cpu_row(&t->view, t->dtype, first, 0, 0);
    return view;
}

/* ---- comparison -------------------------------------------------------------------------------------------------- */

typedef struct error {
    double square, truth, count;
    int bad;
} error;

/* A NaN must be one, and an infinity that one. */
static void error_add(error *e, double got, double truth) {
    e->count++;
    if (isfinite(truth) && isfinite(got)) {
        e->square += (got - truth) * (got - truth);
        e->truth += truth * truth;
    } else {
        e->bad += isnan(truth) ? !isnan(got) : got != truth;
    }
}

/* A tensor counts as at least 0.01 large; one that is 0 in truth, as gradients are where all rows have one key and
 * cancel to nothing, may be 1e-5 off. */
static void error_judge(check *c, const error *e, usp_dtype dtype, const char *what) {
    const double limit[] = {2e-6, 6e-4, 5e-3};
    double own = e->square > 0 ? sqrt(e->square / e->count) : 0;
    double rms = e->square > 0 ? sqrt(e->square / fmax(e->truth, 1e-4 * e->count)) : 0;
    int fine = e->truth > 0 ? rms <= limit[dtype] : own <= 1e-5;
    if (dtype == USP_F32 && e->truth > 0 && rms > c->worst_f32) c->worst_f32 = rms;
    usp_check_verdict(c, !e->bad && fine, "%s, dtype %d: RMS error %.3g, relative %.3g; %d should (not) be finite",
                      what, (int)dtype, own, rms, e->bad);
}

static int untouched(const tensor *t) {
    for (size_t i = 0; i < t->size; i++)
        if (t->bytes[i] != 255) return 0;
    return 1;
}

void usp_check_compare(check *c, const tensor *t, const char *what) {
    error e = {0, 0, 0, 0};
    for (int token = 0; token < t->tokens; token++)
        for (int b = 0; b < t->batch; b++)
            for (int h = 0; h < t->heads; h++) {
                for (int i = 0; i < t->dim; i++)
                    error_add(&e, usp_check_read(t, token, b, h, i), usp_check_truth(t, token, b, h)[i]);
                memset(element_at(t, token, b, h, 0), 255, (size_t)t->dim * usp_dtype_size(t->dtype));
            }
    error_judge(c, &e, t->dtype, what);
    usp_check_verdict(c, untouched(t), "%s: bytes beside the tensor were written", what);
}

void usp_check_floats(check *c, const float *got, const double *truth, size_t n, const char *what) {
    error e = {0, 0, 0, 0};
    for (size_t i = 0; i < n; i++) error_add(&e, (double)got[i], truth[i]);
    error_judge(c, &e, USP_F32, what);
}

/* ---- scratch ----------------------------------------------------------------------------------------------------- */

enum { GUARD = 256 };

static size_t scratch_bytes(check *c, usp_attention attention, usp_dtype dtype, int dim, int value_dim) {
    usp_kernel_shape shape = {attention, dtype, 1, 1, dim, value_dim, 0};
    return c->device->ops->needs(c->device, &shape).scratch;
}

void *usp_check_scratch(check *c, usp_attention attention, usp_dtype dtype, int dim, int value_dim) {
    size_t bytes = (scratch_bytes(c, attention, dtype, dim, value_dim) + 2 * GUARD - 1) / GUARD * GUARD;
    void *scratch = aligned_alloc(GUARD, bytes);
    if (!scratch) exit(99);
    return memset(scratch, 255, bytes);
}

void usp_check_scratch_free(check *c, void *scratch, usp_attention attention, usp_dtype dtype, int dim, int value_dim) {
    const unsigned char *guard = (const unsigned char *)scratch + scratch_bytes(c, attention, dtype, dim, value_dim);
    int whole = 1;
    for (int i = 0; i < GUARD; i++) whole &= guard[i] == 255;
    usp_check_verdict(c, whole, "kernels of dims %d, %d wrote behind their scratch", dim, value_dim);
    free(scratch);
}
