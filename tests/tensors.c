/* tensors.c - numbers, views and errors for tests (see tensors.h). Computes no attention. */
#include "tensors.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- numbers ----------------------------------------------------------------------------------------------------- */

uint64_t usp_random_next(uint64_t *state) {
    uint64_t x = *state += UINT64_C(0x9e3779b97f4a7c15);
    x = (x ^ (x >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    x = (x ^ (x >> 27)) * UINT64_C(0x94d049bb133111eb);
    return x ^ (x >> 31);
}

int usp_random_below(uint64_t *state, int below) {
    return (int)(usp_random_next(state) % (uint64_t)below);
}

/* The sum of four uniform numbers, with variance 1. */
double usp_random_at(uint64_t seed, uint64_t tensor, uint64_t index) {
    uint64_t state = (seed * 64 + tensor) * UINT64_C(0xd1342543de82ef95) + index;
    uint64_t bits = usp_random_next(&state);
    double sum =
        (double)(bits & 0xffff) + (double)(bits >> 16 & 0xffff) + (double)(bits >> 32 & 0xffff) + (double)(bits >> 48);
    return (sum / 65535.0 - 2.0) * 1.7320508075688772;
}

/* To `digits` binary digits, but no finer than 2^least; overflow beyond `most` gives infinity. */
static double round_digits(double x, int digits, int least, double most) {
    int exponent;
    if (x == 0 || !isfinite(x)) return x;
    frexp(x, &exponent);
    int last = exponent - digits > least ? exponent - digits : least;
    double result = ldexp(nearbyint(ldexp(x, -last)), last);
    return fabs(result) > most ? copysign(INFINITY, x) : result;
}

double usp_round_f16(double x) {
    return round_digits(x, 11, -24, 65504.0);
}

double usp_round_bf16(double x) {
    return round_digits(x, 8, -133, 3.3895313892515355e38);
}

double usp_round_to(usp_dtype dtype, double x) {
    if (dtype == USP_F16) return usp_round_f16(x);
    return dtype == USP_BF16 ? usp_round_bf16(x) : (double)(float)x;
}

double usp_unit_roundoff(usp_dtype dtype) {
    return dtype == USP_F32 ? 0x1p-24 : dtype == USP_F16 ? 0x1p-11 : 0x1p-8;
}

static uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static uint16_t f16_bits(double x) {
    int exponent;
    uint16_t sign = signbit(x) ? 0x8000 : 0;
    double r = fabs(usp_round_f16(x));
    if (isnan(r)) return sign | 0x7e00;
    if (isinf(r)) return sign | 0x7c00;
    if (r < 0x1p-14) return sign | (uint16_t)(r * 0x1p24);
    double fraction = frexp(r, &exponent);
    return sign | (uint16_t)((exponent + 14) << 10 | ((int)(fraction * 2048) & 1023));
}

static double f16_value(uint16_t bits) {
    int exponent = bits >> 10 & 31, fraction = bits & 1023;
    double x = exponent == 31  ? (fraction ? NAN : INFINITY)
               : exponent == 0 ? fraction * 0x1p-24
                               : ldexp(1024 + fraction, exponent - 25);
    return bits & 0x8000 ? -x : x;
}

void usp_store(usp_dtype dtype, void *to, double x) {
    float single = (float)usp_round_to(dtype, x);
    uint16_t half = dtype == USP_F16 ? f16_bits(x) : (uint16_t)(bits_of(single) >> 16);
    memcpy(to, dtype == USP_F32 ? (void *)&single : (void *)&half, usp_dtype_size(dtype));
}

double usp_load(usp_dtype dtype, const void *from) {
    float single;
    uint16_t half;
    uint32_t wide;
    if (dtype == USP_F32) {
        memcpy(&single, from, sizeof single);
        return (double)single;
    }
    memcpy(&half, from, sizeof half);
    if (dtype == USP_F16) return f16_value(half);
    wide = (uint32_t)half << 16;
    memcpy(&single, &wide, sizeof single);
    return (double)single;
}

/* ---- buffers ----------------------------------------------------------------------------------------------------- */

static usp_status begin(usp_world *world, usp_stream stream, size_t bytes, usp_buffer *buffer) {
    *buffer = (usp_buffer){.world = world, .stream = stream, .bytes = bytes};
    buffer->host = malloc(bytes + 1);
    if (!buffer->host) return USP_NO_MEMORY;
    memset(buffer->host, 0xff, bytes + 1);
    return USP_OK;
}

usp_status usp_buffer_create(usp_world *world, usp_stream stream, size_t bytes, usp_buffer *buffer) {
    usp_status status = begin(world, stream, bytes, buffer);
    if (status == USP_OK) status = usp_world_alloc(world, bytes + 1, &buffer->device);
    return status == USP_OK ? usp_buffer_upload(buffer) : status;
}

usp_status usp_buffer_create_shared(usp_world *world, usp_stream stream, size_t bytes, usp_buffer *buffer) {
    usp_status status = begin(world, stream, bytes, buffer);
    if (status == USP_OK) status = usp_world_alloc_shared(world, bytes, &buffer->device);
    buffer->shared = 1;
    return status == USP_OK ? usp_buffer_upload(buffer) : status;
}

usp_status usp_buffer_upload(const usp_buffer *buffer) {
    return usp_world_copy(buffer->world, buffer->device, buffer->host, buffer->bytes, buffer->stream);
}

usp_status usp_buffer_download(const usp_buffer *buffer) {
    usp_status status = usp_world_copy(buffer->world, buffer->host, buffer->device, buffer->bytes, buffer->stream);
    return status == USP_OK ? usp_world_synchronize(buffer->world, buffer->stream) : status;
}

void usp_buffer_destroy(usp_buffer *buffer) {
    if (buffer->device && buffer->shared) usp_world_free_shared(buffer->world, buffer->device);
    if (buffer->device && !buffer->shared) usp_world_free(buffer->world, buffer->device);
    free(buffer->host);
    *buffer = (usp_buffer){0};
}

int usp_buffer_is_poison(const usp_buffer *buffer) {
    for (size_t i = 0; i < buffer->bytes; i++)
        if (buffer->host[i] != 0xff) return 0;
    return 1;
}

/* ---- views ------------------------------------------------------------------------------------------------------- */

usp_view usp_view_make(usp_arrangement arrangement, usp_dtype dtype, int batch, int64_t tokens, int heads, int dim) {
    usp_view view = {.dtype = dtype, .batch = batch, .heads = heads, .dim = dim, .tokens = tokens};
    int64_t pad = arrangement == USP_PADDED ? 3 : 0;
    view.offset = pad > 0;
    if (arrangement == USP_BHSD) {
        view.stride_token = dim;
        view.stride_head = tokens * dim;
        view.stride_batch = heads * view.stride_head;
    } else if (arrangement == USP_SBHD) {
        view.stride_head = dim;
        view.stride_batch = (int64_t)heads * dim;
        view.stride_token = batch * view.stride_batch;
    } else {
        view.stride_head = dim + pad;
        view.stride_token = heads * view.stride_head + 2 * pad;
        view.stride_batch = tokens * view.stride_token + 3 * pad;
    }
    return view;
}

usp_view usp_view_packed(usp_dtype dtype, int batch, int64_t tokens, int heads, int dim, int first_head,
                         int row_heads) {
    return (usp_view){.dtype = dtype,
                      .batch = batch,
                      .heads = heads,
                      .dim = dim,
                      .tokens = tokens,
                      .offset = (int64_t)first_head * dim,
                      .stride_head = dim,
                      .stride_token = (int64_t)row_heads * dim,
                      .stride_batch = tokens * row_heads * dim};
}

static int64_t element_of(const usp_view *v, int b, int64_t t, int h, int x) {
    return v->offset + b * v->stride_batch + t * v->stride_token + h * v->stride_head + x;
}

size_t usp_view_bytes(const usp_view *view) {
    if (view->tokens == 0) return 16;
    int64_t elements = element_of(view, view->batch - 1, view->tokens - 1, view->heads - 1, view->dim);
    return (size_t)elements * usp_dtype_size(view->dtype);
}

void *usp_view_at(const usp_view *view, const usp_buffer *buffer, int b, int64_t t, int h, int x) {
    return buffer->host + (size_t)element_of(view, b, t, h, x) * usp_dtype_size(view->dtype);
}

usp_tensor usp_view_tensor(const usp_view *view, const usp_buffer *buffer) {
    unsigned char *first = (unsigned char *)buffer->device + (size_t)view->offset * usp_dtype_size(view->dtype);
    return (usp_tensor){first, view->stride_batch, view->stride_token, view->stride_head};
}

void usp_view_fill(const usp_view *view, const usp_buffer *buffer, const usp_tokens *tokens, uint64_t seed,
                   uint64_t tensor) {
    for (int64_t t = 0; t < view->tokens; t++) {
        int64_t token = tokens->first + usp_sequence_to_global(tokens->sequence, tokens->rank, t);
        for (int b = 0; b < view->batch; b++)
            for (int h = 0; h < view->heads; h++)
                for (int x = 0; x < view->dim; x++) {
                    int64_t index = ((b * tokens->whole + token) * view->heads + h) * view->dim + x;
                    usp_store(view->dtype, usp_view_at(view, buffer, b, t, h, x),
                              usp_random_at(seed, tensor, (uint64_t)index));
                }
    }
}

void usp_view_read(const usp_view *view, const usp_buffer *buffer, float *dense) {
    for (int b = 0; b < view->batch; b++)
        for (int64_t t = 0; t < view->tokens; t++)
            for (int h = 0; h < view->heads; h++)
                for (int x = 0; x < view->dim; x++)
                    *dense++ = (float)usp_load(view->dtype, usp_view_at(view, buffer, b, t, h, x));
}

void usp_view_poison(const usp_view *view, const usp_buffer *buffer) {
    for (int b = 0; b < view->batch; b++)
        for (int64_t t = 0; t < view->tokens; t++)
            for (int h = 0; h < view->heads; h++)
                memset(usp_view_at(view, buffer, b, t, h, 0), 0xff, (size_t)view->dim * usp_dtype_size(view->dtype));
}

void usp_whole_fill(usp_dtype dtype, double *whole, int64_t count, uint64_t seed, uint64_t tensor) {
    for (int64_t i = 0; i < count; i++) whole[i] = usp_round_to(dtype, usp_random_at(seed, tensor, (uint64_t)i));
}

/* ---- errors ------------------------------------------------------------------------------------------------------ */

/* Inputs are about N(0,1), so a tensor below NOTHING is 0 in truth (the gradient of a softmax over one key): nothing
 * but rounding, measured against 1. */
enum { FEW_ELEMENTS = 4096 };
static const double NOTHING = 1e-12;

static double yardstick(double truth, double floor) {
    return truth < NOTHING ? 1 : fmax(truth, floor);
}

static double difference(double given, double truth) {
    if (isinf(truth) || isinf(given)) return given == truth ? 0 : INFINITY;
    return isnan(given) ? INFINITY : fabs(given - truth);
}

usp_error usp_error_over(const float *given, const double *truth, int64_t count, double floor) {
    usp_error error = {.worst = -1};
    double squares = 0, true_squares = 0;
    for (int64_t i = 0; i < count; i++) {
        double d = difference((double)given[i], truth[i]), size = isfinite(truth[i]) ? fabs(truth[i]) : 0;
        squares += d * d;
        true_squares += size * size;
        error.true_max = fmax(error.true_max, size);
        if (error.worst < 0 || d > error.max) {
            error.worst = i;
            error.max = d;
        }
    }
    if (count > 0) error.rms = sqrt(squares / (double)count) / yardstick(sqrt(true_squares / (double)count), floor);
    return error;
}

usp_error usp_error_of(const float *given, const double *truth, int64_t count) {
    return usp_error_over(given, truth, count, 0);
}

/* The largest error of the plain computation. Where a tensor has few elements that may be small by luck: then at least
 * that of one rounding. */
static double plain_error(usp_dtype dtype, const double *truth, const double *plain, int64_t count, double true_max) {
    double most = count < FEW_ELEMENTS ? usp_unit_roundoff(dtype) * true_max : 0;
    for (int64_t i = 0; i < count; i++) most = fmax(most, difference(plain[i], truth[i]));
    return most;
}

int usp_within_budget_over(const char *name, usp_dtype dtype, const float *given, const double *truth,
                           const double *plain, int64_t count, double floor, char *why, size_t capacity) {
    usp_error error = usp_error_over(given, truth, count, floor);
    if (count == 0) return 0;
    if (dtype == USP_F32) {
        if (error.rms <= 1e-5) return 0;
        snprintf(why, capacity, "%s: RMS error %.3g (limit 1e-5); worst at %lld: %.9g instead of %.9g", name, error.rms,
                 (long long)error.worst, (double)given[error.worst], truth[error.worst]);
        return 1;
    }
    double limit =
        2 * plain_error(dtype, truth, plain, count, error.true_max) + 1e-5 * yardstick(error.true_max, 10 * floor);
    if (error.max <= limit) return 0;
    snprintf(why, capacity, "%s: max error %.3g (limit %.3g) at %lld: %.9g instead of %.9g", name, error.max, limit,
             (long long)error.worst, (double)given[error.worst], truth[error.worst]);
    return 1;
}

int usp_within_budget(const char *name, usp_dtype dtype, const float *given, const double *truth, const double *plain,
                      int64_t count, char *why, size_t capacity) {
    return usp_within_budget_over(name, dtype, given, truth, plain, count, 0, why, capacity);
}
