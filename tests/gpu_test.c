/* gpu_test.c - slabs, views, comparison and clock of the tests of the CUDA device.
 * It decides what counts as agreement: see compare. */
#include <cuda_runtime_api.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cpu/half.h"
#include "gpu_test.h"

/* ---- slabs ------------------------------------------------------------------------------------------------------- */

void usp_gpu_fail(usp_gpu_test *t, const char *what, const char *why) {
    t->failures++;
    printf("FAILED %s: %s: %s\n", t->name, what, why);
}

void usp_gpu_begin_case(usp_gpu_test *t, usp_dtype dtype) {
    t->used = 0;
    t->cases++;
    t->exact.dtype = USP_F32;
    t->plain.dtype = t->gpu.dtype = dtype;
}

size_t usp_gpu_take(usp_gpu_test *t, size_t bytes) {
    size_t at = t->used;
    t->used += (bytes + 255) / 256 * 256;
    if (t->used > USP_GPU_ROOM) {
        fprintf(stderr, "%s does not fit the slab\n", t->name);
        exit(1);
    }
    memset(t->exact.base + at, 0xff, t->used - at);
    memset(t->plain.base + at, 0xff, t->used - at);
    return at;
}

size_t usp_gpu_put_part(usp_gpu_test *t, const void *data, size_t bytes, size_t room) {
    size_t at = usp_gpu_take(t, room);
    memcpy(t->exact.base + at, data, bytes);
    memcpy(t->plain.base + at, data, bytes);
    return at;
}

size_t usp_gpu_put(usp_gpu_test *t, const void *data, size_t bytes) {
    return usp_gpu_put_part(t, data, bytes, bytes);
}

/* ---- views ------------------------------------------------------------------------------------------------------- */

usp_gpu_view usp_gpu_make_view(usp_gpu_test *t, const char *name, usp_gpu_arrangement how, int64_t tokens, int batch,
                               int heads, int dim) {
    usp_gpu_view v = {.name = name, .tokens = tokens, .batch = batch, .heads = heads, .dim = dim};
    int64_t row = how == ODD ? dim + 3 : dim;
    v.stride_head = how == BHSD ? tokens * row : row;
    v.stride_token = how == BHSD ? row : how == SBHD ? batch * heads * row : heads * row * (how == PACKED ? 3 : 1);
    v.stride_batch = how == SBHD ? heads * row : how == BHSD ? heads * tokens * row : tokens * v.stride_token;
    v.first = how == PACKED ? heads * row : how == ODD ? 1 : 0;
    v.bytes = 4 * (size_t)(batch * tokens * heads * row * (how == PACKED ? 3 : 1) + 8);
    v.at = usp_gpu_take(t, v.bytes);
    return v;
}

usp_gpu_view usp_gpu_make_wide(usp_gpu_test *t, const char *name, int64_t tokens, int batch, int heads, int dim) {
    usp_gpu_view v = usp_gpu_make_view(t, name, SBHD, tokens, batch, heads, dim);
    v.wide = 1;
    return v;
}

static usp_dtype dtype_of(const usp_gpu_world *w, const usp_gpu_view *v) {
    return v->wide ? USP_F32 : w->dtype;
}

void *usp_gpu_at(const usp_gpu_world *w, size_t at) {
    return w->base + at;
}

usp_tensor usp_gpu_tensor(const usp_gpu_world *w, const usp_gpu_view *v) {
    char *data = w->base + v->at + v->first * (int64_t)usp_dtype_size(dtype_of(w, v));
    return (usp_tensor){data, v->stride_batch, v->stride_token, v->stride_head};
}

static float load(usp_dtype dtype, const char *slab, size_t at, int64_t element) {
    float value;
    usp_row_to_float(dtype, slab + at + element * (int64_t)usp_dtype_size(dtype), &value, 1);
    return value;
}

static void store(usp_dtype dtype, char *slab, size_t at, int64_t element, float value) {
    usp_row_from_float(dtype, &value, slab + at + element * (int64_t)usp_dtype_size(dtype), 1);
}

/* Numbers the elements of a view; `element` is where number i lies. */
int64_t usp_gpu_count(const usp_gpu_view *v) {
    return v->tokens * v->batch * v->heads * v->dim;
}

static int64_t element_of(const usp_gpu_view *v, int64_t i) {
    int64_t x = i % v->dim, head = i / v->dim % v->heads, batch = i / v->dim / v->heads % v->batch;
    int64_t token = i / v->dim / v->heads / v->batch;
    return v->first + batch * v->stride_batch + token * v->stride_token + head * v->stride_head + x;
}

float usp_gpu_get(const usp_gpu_test *t, const usp_gpu_view *v, const char *slab, int64_t i) {
    return load(dtype_of(&t->gpu, v), slab, v->at, element_of(v, i));
}

void usp_gpu_set(const usp_gpu_test *t, const usp_gpu_view *v, char *slab, int64_t i, float value) {
    store(dtype_of(&t->gpu, v), slab, v->at, element_of(v, i), value);
}

/* ---- random numbers ---------------------------------------------------------------------------------------------- */

static uint64_t next_random(uint64_t *state) {
    uint64_t x = *state += 0x9e3779b97f4a7c15u;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

/* About N(0, 1): sixteen bits each of four. */
float usp_gpu_normal(uint64_t *state) {
    uint64_t bits = next_random(state);
    int sum = (int)(bits & 0xffff) + (int)(bits >> 16 & 0xffff) + (int)(bits >> 32 & 0xffff) + (int)(bits >> 48);
    return ((float)sum - 131070.0f) / 37837.0f;
}

void usp_gpu_fill(usp_gpu_test *t, const usp_gpu_view *v, float size) {
    usp_dtype dtype = dtype_of(&t->plain, v);
    for (int64_t i = 0; i < usp_gpu_count(v); i++) {
        int64_t element = element_of(v, i);
        store(dtype, t->plain.base, v->at, element, size * usp_gpu_normal(&t->random));
        store(dtype_of(&t->exact, v), t->exact.base, v->at, element, load(dtype, t->plain.base, v->at, element));
    }
}

/* ---- running and comparing --------------------------------------------------------------------------------------- */

int usp_gpu_finish(usp_gpu_test *t, const char *what, usp_status status) {
    int busy = 1;
    while (status == USP_OK && busy) status = t->gpu.device->ops->query(t->gpu.device, t->gpu.stream, &busy);
    if (status != USP_OK) usp_gpu_fail(t, what, usp_last_error());
    return status == USP_OK;
}

int usp_gpu_run_alone(usp_gpu_test *t, const char *what, usp_gpu_call call, const void *args, char *result) {
    const usp_device_ops *ops = t->gpu.device->ops;
    usp_status status = ops->copy(t->gpu.device, t->gpu.base, t->before, t->used, t->gpu.stream);
    if (status == USP_OK) status = call(&t->gpu, args);
    if (!usp_gpu_finish(t, what, status)) return 0;
    return usp_gpu_finish(t, what, ops->copy(t->gpu.device, result, t->gpu.base, t->used, t->gpu.stream));
}

/* Largest difference from `exact`, infinite for a NaN; *size grows to the largest finite value of `exact`. */
static double largest_error(const usp_gpu_test *t, const usp_gpu_view *v, const char *slab, usp_dtype dtype,
                            double *size) {
    double worst = 0;
    for (int64_t i = 0; i < usp_gpu_count(v); i++) {
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
static void compare(usp_gpu_test *t, const usp_gpu_view *v) {
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
    usp_gpu_fail(t, v->name, why);
}

static void mark_outputs(usp_gpu_test *t) {
    memset(t->free_to_write, 0, t->used);
    for (int n = 0; n < t->outputs; n++) {
        const usp_gpu_view *v = t->output[n];
        size_t bytes = usp_dtype_size(dtype_of(&t->gpu, v));
        for (int64_t i = 0; i < usp_gpu_count(v); i++)
            memset(t->free_to_write + v->at + (size_t)element_of(v, i) * bytes, 1, bytes);
    }
}

static void check_untouched(usp_gpu_test *t, const char *what) {
    for (size_t i = 0; i < t->used; i++) {
        if (t->free_to_write[i] || t->before[i] == t->after[i]) continue;
        usp_gpu_fail(t, what, "wrote outside its output");
        return;
    }
}

/* fp32 outputs are inputs of what comes next: everybody goes on from the exact ones. */
static void adopt_outputs(usp_gpu_test *t) {
    for (int n = 0; n < t->outputs; n++) {
        const usp_gpu_view *v = t->output[n];
        if (v->wide) memcpy(t->plain.base + v->at, t->exact.base + v->at, v->bytes);
    }
}

/* Of sums in any order the first run's are taken for the second one's. */
static void forgive_unordered(usp_gpu_test *t) {
    for (int n = 0; n < t->outputs; n++)
        if (t->output[n]->unordered)
            memcpy(t->again + t->output[n]->at, t->after + t->output[n]->at, t->output[n]->bytes);
}

/* Kinds of cases follow each other at regular distances: not every so manieth, but any. */
int usp_gpu_is_drawn(const usp_gpu_test *t) {
    uint64_t number = (uint64_t)t->cases * UINT64_C(0x9e3779b97f4a7c15) >> 40;
    return t->every == 0 || number % (uint64_t)t->every == 0;
}

void usp_gpu_run(usp_gpu_test *t, const char *what, usp_gpu_call call, const void *args,
                 const usp_gpu_view *const *outputs) {
    if (!usp_gpu_is_drawn(t)) return;
    for (t->outputs = 0; outputs[t->outputs]; t->outputs++) t->output[t->outputs] = outputs[t->outputs];
    memcpy(t->before, t->plain.base, t->used);
    if (call(&t->exact, args) != USP_OK || call(&t->plain, args) != USP_OK) {
        usp_gpu_fail(t, what, usp_last_error());
    } else if (usp_gpu_run_alone(t, what, call, args, t->after) && usp_gpu_run_alone(t, what, call, args, t->again)) {
        mark_outputs(t);
        check_untouched(t, what);
        for (int n = 0; n < t->outputs; n++)
            if (!t->output[n]->own) compare(t, t->output[n]);
        forgive_unordered(t);
        if (memcmp(t->after, t->again, t->used) != 0) usp_gpu_fail(t, what, "two runs differ");
    }
    adopt_outputs(t);
}

void usp_gpu_expect(usp_gpu_test *t, int condition, const char *what) {
    t->checks++;
    if (!condition) usp_gpu_fail(t, what, usp_last_error());
}

/* ---- speed ------------------------------------------------------------------------------------------------------- */

enum { TIMED = 25, WARM = 5 };

static int by_size(const void *a, const void *b) {
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

float usp_gpu_time(usp_gpu_test *t, usp_gpu_call call, const void *args) {
    cudaEvent_t begin, end;
    float ms[TIMED] = {0};
    int calls = 1;
    cudaEventCreate(&begin);
    cudaEventCreate(&end);
    for (int i = -WARM; i < TIMED; i++) {
        float *sample = &ms[i > 0 ? i : 0];
        cudaEventRecord(begin, t->gpu.stream);
        for (int n = 0; n < calls; n++)
            if (call(&t->gpu, args) != USP_OK) usp_gpu_fail(t, "timed call", usp_last_error());
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

static usp_gpu_spread spread_of(float (*x)[TIMED]) {
    qsort(*x, TIMED, sizeof **x, by_size);
    return (usp_gpu_spread){(*x)[TIMED / 4], (*x)[TIMED / 2], (*x)[TIMED - 1 - TIMED / 4]};
}

usp_gpu_turns usp_gpu_time_by_turns(usp_gpu_test *t, const usp_gpu_call call[2], const void *args) {
    cudaEvent_t mark[3];
    float ms[2][TIMED] = {0}, ratio[TIMED];
    for (int i = 0; i < 3; i++) cudaEventCreate(&mark[i]);
    for (int i = -WARM; i < TIMED; i++) {
        int at = i > 0 ? i : 0;
        cudaEventRecord(mark[0], t->gpu.stream);
        for (int n = 0; n < 2; n++) {
            if (call[n](&t->gpu, args) != USP_OK) usp_gpu_fail(t, "timed call", usp_last_error());
            cudaEventRecord(mark[n + 1], t->gpu.stream);
        }
        cudaEventSynchronize(mark[2]);
        for (int n = 0; n < 2; n++) cudaEventElapsedTime(&ms[n][at], mark[n], mark[n + 1]);
        ratio[at] = ms[0][at] / ms[1][at];
    }
    for (int i = 0; i < 3; i++) cudaEventDestroy(mark[i]);
    return (usp_gpu_turns){{spread_of(&ms[0]), spread_of(&ms[1])}, spread_of(&ratio)};
}

usp_gpu_view usp_gpu_timed_view(usp_gpu_test *t, int64_t tokens, int heads, int dim, int wide) {
    usp_gpu_view v = {.tokens = tokens, .batch = 1, .heads = heads, .dim = dim, .wide = wide, .at = t->used};
    v.stride_head = dim, v.stride_token = (int64_t)heads * dim, v.stride_batch = tokens * v.stride_token;
    v.bytes = (size_t)v.stride_batch * (wide ? 4 : 2);
    t->used += (v.bytes + 255) / 256 * 256;
    return v;
}

size_t usp_gpu_upload(usp_gpu_test *t, const void *data, size_t bytes) {
    size_t at = t->used;
    t->used += (bytes + 255) / 256 * 256;
    cudaMemcpy(t->gpu.base + at, data, bytes, cudaMemcpyHostToDevice);
    return at;
}

/* A random stretch, repeated: no tensor is constant, and none costs the host long. */
void usp_gpu_fill_alone(usp_gpu_test *t, size_t bytes) {
    enum { STRETCH = 1 << 20 };
    uint16_t *numbers = (uint16_t *)t->before;
    for (int i = 0; i < STRETCH; i++) numbers[i] = usp_float_to_bfloat(usp_gpu_normal(&t->random));
    for (size_t at = 0; at < bytes; at += STRETCH * sizeof *numbers) {
        size_t left = bytes - at;
        cudaMemcpy(t->gpu.base + at, numbers, left < STRETCH * 2 ? left : STRETCH * 2, cudaMemcpyHostToDevice);
    }
}
