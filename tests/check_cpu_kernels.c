/* check_cpu_kernels.c - compares every kernel of the CPU device, on every panel this processor runs, with plain loops
 * in double precision. It needs no test framework; the exit status is the verdict.
 *
 *   check_cpu_kernels [ROUNDS [SEED]]     random shapes; 24 rounds of seed 1
 *   check_cpu_kernels --time              speeds instead */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cpu_kernels.h"

static void check_memory(check *c) {
    const usp_device_ops *ops = c->device->ops;
    void *a = NULL, *b = NULL, *none = NULL;
    usp_check_verdict(c, ops->alloc(c->device, 100, &a) == USP_OK && (uintptr_t)a % 256 == 0, "alloc");
    usp_check_verdict(c, ops->alloc_host(c->device, 0, &b) == USP_OK && b, "alloc of nothing");
    usp_check_verdict(c, ops->alloc(c->device, SIZE_MAX, &none) == USP_NO_MEMORY, "alloc of too much");
    memset(a, 7, 100);
    usp_check_verdict(c, ops->zero(c->device, a, 99, NULL) == USP_OK && !((char *)a)[98] && ((char *)a)[99], "zero");
    ops->free(c->device, a), ops->free_host(c->device, b), ops->free(c->device, none);
}

static void check_device(check *c) {
    const usp_device_ops *ops = c->device->ops;
    usp_kernel_shape good = {USP_SOFTMAX, USP_BF16, 1, 1, 512, 1, 0}, bad = {USP_LINEAR, USP_F32, 1, 1, 64, 513, 0};
    usp_event *event = NULL;
    int busy = 1;
    usp_check_verdict(c, ops->supports(c->device, &good) == USP_OK, "512 x 1 is refused");
    usp_check_verdict(c, ops->supports(c->device, &bad) == USP_UNSUPPORTED, "513 is not refused");
    usp_check_verdict(c, strstr(usp_last_error(), "513") != NULL, "the sentence does not name 513");
    usp_check_verdict(c, ops->event_create(c->device, &event) == USP_OK && event, "event_create");
    usp_check_verdict(c, ops->event_query(c->device, event, &busy) == USP_OK && !busy, "event_query");
    ops->event_destroy(c->device, event);
    check_memory(c);
}

static void check_scale(check *c) {
    float x[5];
    double truth[5];
    for (int i = 0; i < 5; i++) x[i] = (float)usp_check_uniform(c), truth[i] = (double)(x[i] * -0.75f);
    truth[4] = (double)x[4];
    c->device->ops->scale(c->device, x, 4, -0.75f, NULL);
    for (int i = 0; i < 5; i++) usp_check_verdict(c, (double)x[i] == truth[i], "element %d of a scaled vector", i);
}

static void check_round(check *c, usp_dtype dtype) {
    const int dims[] = {5, 17, 64, 128, 1, 80, 200, 512};
    int wide = usp_check_pick(c, 8) == 0, choices = wide ? 8 : 4, length = wide ? 60 : 150;
    int dim = dims[usp_check_pick(c, choices)], value_dim = dims[usp_check_pick(c, choices)];
    usp_check_softmax(c, dtype, dim, value_dim, usp_check_pick(c, length), usp_check_pick(c, length));
    usp_check_softmax_poison(c);
    usp_check_linear(c, dtype, dim, value_dim, usp_check_pick(c, length), 0);
    usp_check_linear(c, dtype, 1 + usp_check_pick(c, 70), 1 + usp_check_pick(c, 70), 1 + usp_check_pick(c, length), 1);
    usp_check_copies(c);
    usp_check_scan(c);
    usp_check_viewed(c);
}

static void check_panel(check *c, int rounds) {
    check_device(c);
    check_scale(c);
    usp_check_exponential(c);
    usp_check_softmax_exactness(c);
    for (int i = 0; i < rounds; i++) check_round(c, (usp_dtype)(i % 3));
    usp_check_softmax(c, USP_F32, 64, 64, 300, 400);
    usp_check_softmax(c, USP_BF16, 192, 128, 90, 130);
    usp_check_softmax(c, USP_F32, 512, 256, 40, 40);
    usp_check_linear(c, USP_F32, 64, 512, 400, 0);
    usp_check_linear(c, USP_F32, 512, 64, 100, 0);
}

int main(int argc, char **argv) {
    usp_host host = usp_host_from_config(NULL);
    const usp_panel *panels[] = {usp_panel_portable(), usp_panel_avx2(), usp_panel_avx512()};
    int timed = argc > 1 && strcmp(argv[1], "--time") == 0;
    int rounds = argc > 1 ? atoi(argv[1]) : 24, seed = argc > 2 ? atoi(argv[2]) : 1;
    check c = {.random = (uint64_t)seed * 0x9e3779b97f4a7c15ull};
    if (usp_device_create_cpu(&host, &c.device)) return 1;
    if (!timed) usp_check_halves(&c);
    for (size_t i = 0; i < sizeof panels / sizeof *panels; i++) {
        if (!panels[i]) continue;
        ((usp_cpu_device *)c.device)->panel = panels[i];
        if (timed)
            usp_check_speeds(&c);
        else
            check_panel(&c, rounds);
    }
    c.device->ops->destroy(c.device);
    if (!timed) printf("%d checks, %d failed; largest f32 error %.2g\n", c.checks, c.failures, c.worst_f32);
    return c.failures != 0;
}
