/* gpu_repeats.c - softmax attention launched again and again, where its results do not depend on timing: forward, dk
 * and dv, and all of a backward pass that is deterministic, in slices of its heads too. Every launch gives the first
 * one's bytes, over poison. */
#include <stdio.h>
#include <string.h>

#include "gpu_softmax.h"

enum { LAUNCHES = 1000, EMULATED = 4, RESULTS = 6 };

/* ---- cases ------------------------------------------------------------------------------------------------------- */

/* Jobs of different weights, more than there are multiprocessors; for a device that is not a GPU a few. */
#define CAUSAL .left = USP_GPU_NO_LIMIT, .right = 0
static const usp_gpu_softmax_case on_gpu[] = {
    {"causal", USP_F16, BSHD, 1, 16, 16, 1, 0, 128, 128, 2048, {2048}, CAUSAL},
    {"documents", USP_BF16, BSHD, 2, 8, 2, 4, 0, 64, 64, 2000, {2000}, CAUSAL, .documents = 300},
    {"d 192, e 128", USP_BF16, BSHD, 1, 8, 8, 1, 0, 192, 128, 1500, {1500}, CAUSAL},
    {"wide heads", USP_F16, BSHD, 1, 8, 8, 1, 0, 256, 256, 1500, {1500}, CAUSAL},
};
static const usp_gpu_softmax_case emulated[] = {
    {"causal", USP_F16, BSHD, 1, 2, 2, 1, 0, 128, 128, 400, {400}, CAUSAL},
    {"documents", USP_BF16, BSHD, 1, 4, 2, 2, 0, 64, 64, 300, {300}, CAUSAL, .documents = 70},
    {"d 192, e 128", USP_BF16, BSHD, 1, 1, 1, 1, 0, 192, 128, 300, {300}, CAUSAL},
    {"wide heads", USP_F16, BSHD, 1, 1, 1, 1, 0, 256, 256, 150, {150}, CAUSAL},
};
#undef CAUSAL
enum { CASES = sizeof on_gpu / sizeof *on_gpu };

/* ---- launches ---------------------------------------------------------------------------------------------------- */

/* What is launched, and what it writes: results first, then what may have any bytes. */
typedef struct repeat {
    const char *what;
    usp_gpu_call call;
    int deterministic, results, count;
    const usp_gpu_view *view[RESULTS];
    int slices; /* that every other launch comes in */
} repeat;

static size_t bytes_of(const usp_gpu_view *v) {
    return v->wide ? v->bytes : v->bytes / 2;
}

/* No call that is first and last too writes acc: it is all poison. */
static usp_status poison(usp_gpu_test *t, const usp_gpu_softmax *s, const repeat *r) {
    const usp_gpu_world *w = &t->gpu;
    usp_status status = USP_OK;
    for (int i = 0; i < r->count && status == USP_OK; i++) {
        size_t bytes = bytes_of(r->view[i]), most = s->acc.bytes;
        status = w->device->ops->copy(w->device, usp_gpu_at(w, r->view[i]->at), usp_gpu_at(w, s->acc.at),
                                      bytes < most ? bytes : most, w->stream);
    }
    return status;
}

/* One launch, whose results are left in `to`, one behind the other. */
static int launch(usp_gpu_test *t, const usp_gpu_softmax *s, const repeat *r, char *to) {
    const usp_gpu_world *w = &t->gpu;
    usp_status status = poison(t, s, r);
    if (status == USP_OK) status = r->call(w, s);
    for (int i = 0; i < r->results && status == USP_OK; i++) {
        size_t bytes = bytes_of(r->view[i]);
        status = w->device->ops->copy(w->device, to, usp_gpu_at(w, r->view[i]->at), bytes, w->stream);
        to += bytes;
    }
    return usp_gpu_finish(t, r->what, status);
}

static const char *differing_view(const repeat *r, const char *a, const char *b) {
    int i = 0;
    for (; i < r->results - 1 && memcmp(a, b, bytes_of(r->view[i])) == 0; i++)
        a += bytes_of(r->view[i]), b += bytes_of(r->view[i]);
    return r->view[i]->name;
}

/* `now` is page-locked, or the copies would take longer than the launches. */
static void launch_again(usp_gpu_test *t, usp_gpu_softmax *s, const repeat *r, char *now) {
    int launches = t->gpu.device->ops->kind == USP_DEVICE_CUDA ? LAUNCHES : EMULATED;
    size_t bytes = 0;
    char why[120];
    s->deterministic = r->deterministic;
    s->slices = 0;
    for (int i = 0; i < r->results; i++) bytes += bytes_of(r->view[i]);
    t->checks++;
    if (!launch(t, s, r, t->after)) return;
    for (int i = 1; i < launches; i++) {
        s->slices = i % 2 ? r->slices : 0;
        if (!launch(t, s, r, now)) return;
        if (memcmp(t->after, now, bytes) == 0) continue;
        snprintf(why, sizeof why, "%s of launch %d is not that of the first one", differing_view(r, t->after, now), i);
        usp_gpu_fail(t, r->what, why);
        return;
    }
}

/* ---- checks ------------------------------------------------------------------------------------------------------ */

/* Of so few processors that a head's blocks of keys add in another order where fewer heads are worked on beside it, if
 * that is all they follow from. */
static void slice_again(usp_gpu_test *t, usp_gpu_softmax *s, const repeat *r, char *now) {
    s->processors = 2 * s->c->heads;
    launch_again(t, s, r, now);
}

/* A pass leaves what the backward calls read. */
static void check_repeats(usp_gpu_test *t, const usp_gpu_softmax_case *c, char *now) {
    snprintf(t->name, sizeof t->name, "softmax launched again, %s, d %d", c->name, c->dim);
    usp_gpu_begin_case(t, c->dtype);
    usp_gpu_softmax s = usp_gpu_make_softmax(t, c);
    const repeat forward = {"forward", usp_gpu_softmax_forward, 0, 4, 4, {&s.out, &s.lse, &s.top, &s.sum}, 0};
    const repeat keys = {"backward", usp_gpu_softmax_backward, 0, 2, 4, {&s.dk[0], &s.dv[0], &s.dq, &s.dq_sum}, 0};
    const repeat all = {"deterministic", usp_gpu_softmax_backward, 1, 3, 4, {&s.dk[0], &s.dv[0], &s.dq, &s.dq_sum}, 0};
    repeat sliced = all;
    sliced.what = "deterministic, in slices", sliced.slices = 2;
    memcpy(t->before, t->plain.base, t->used);
    if (!usp_gpu_run_alone(t, "a pass", usp_gpu_softmax_pass, &s, t->after)) return;
    launch_again(t, &s, &forward, now);
    launch_again(t, &s, &keys, now);
    s.deterministic = 1;
    if (!usp_gpu_run_alone(t, "a pass", usp_gpu_softmax_pass, &s, t->after)) return;
    launch_again(t, &s, &all, now);
    if (c->batch == 1 && c->heads == c->key_heads && c->heads > 1) slice_again(t, &s, &sliced, now);
}

void usp_gpu_check_repeats(usp_gpu_test *t) {
    const usp_device_ops *ops = t->gpu.device->ops;
    const usp_gpu_softmax_case *cases = ops->kind == USP_DEVICE_CUDA ? on_gpu : emulated;
    void *now = NULL;
    if (ops->alloc_host(t->gpu.device, USP_GPU_ROOM, &now) != USP_OK) {
        usp_gpu_fail(t, "alloc_host", usp_last_error());
        return;
    }
    for (int i = 0; i < CASES; i++) check_repeats(t, &cases[i], now);
    ops->free_host(t->gpu.device, now);
}
