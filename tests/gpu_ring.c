/* gpu_ring.c - forward softmax attention that is given all stages of a ring, whose keys arrive whenever they do:
 * between calls, and while one runs. What has not arrived is poison. Whatever came when, the results have the bits of
 * stage by stage, and these are right. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "gpu_softmax.h"

/* ---- cases ------------------------------------------------------------------------------------------------------- */

#define CAUSAL .left = USP_GPU_NO_LIMIT, .right = 0
#define FULL .left = USP_GPU_NO_LIMIT, .right = USP_GPU_NO_LIMIT
static const usp_gpu_softmax_case cases[] = {
    {"causal", USP_BF16, BSHD, 1, 2, 2, 1, 0, 128, 128, 300, {130, 100, 70}, CAUSAL},
    {"zigzag", USP_BF16, BSHD, 1, 4, 2, 2, 0, 128, 128, 260, {260, 260}, CAUSAL, .shift = 260, .scatter = 1},
    {"full, f16", USP_F16, PACKED, 2, 3, 1, 3, 0, 64, 64, 200, {333, 70, 129}, FULL},
    {"many heads", USP_BF16, BHSD, 2, 9, 9, 1, 0, 64, 64, 140, {60, 80, 90}, CAUSAL, .shift = 90},
    {"first stage not allowed", USP_BF16, BSHD, 1, 2, 2, 1, 0, 64, 64, 128, {128, 128, 30}, .left = -128, .right = 300},
    {"middle stage not allowed", USP_BF16, BSHD, 1, 2, 2, 1, 0, 128, 128, 90, {50, 60, 70}, .left = -110, .right = 200},
    {"last stages not allowed", USP_F16, BSHD, 1, 2, 2, 1, 0, 128, 128, 128, {128, 70, 60}, CAUSAL},
    {"rows without keys", USP_BF16, BSHD, 1, 2, 2, 1, 0, 128, 128, 300, {60, 50}, CAUSAL, .shift = -200},
    {"window", USP_BF16, BSHD, 1, 2, 1, 2, 0, 128, 128, 400, {150, 150, 100}, .left = 65, .right = 3},
    {"documents", USP_F16, BSHD, 2, 2, 2, 1, 0, 64, 64, 300, {120, 100, 80}, CAUSAL, .documents = 40},
    {"tree", USP_BF16, BSHD, 1, 2, 2, 1, 0, 128, 128, 200, {90, 50, 60}, FULL, .random = 1, .tree = 1},
    {"d 192, e 128", USP_BF16, BSHD, 1, 2, 1, 2, 0, 192, 128, 160, {90, 80, 30}, CAUSAL, .shift = 40},
    {"d 256", USP_F16, BSHD, 1, 2, 2, 1, 0, 256, 256, 150, {70, 90, 85}, CAUSAL, .shift = 95},
    {"d 256, documents", USP_BF16, BSHD, 1, 2, 2, 1, 0, 256, 256, 200, {130, 70}, CAUSAL, .documents = 60},
    {"large scores", USP_BF16, BSHD, 1, 2, 2, 1, 0, 128, 128, 200, {70, 60, 70}, CAUSAL, .size = 50},
    {"sinks and peaks", USP_BF16, BSHD, 2, 3, 3, 1, 0, 128, 128, 200, {90, 40, 70}, CAUSAL, .sinks = 1, .peaks = 1},
    {"soft cap", USP_F16, BSHD, 1, 2, 2, 1, 0, 128, 128, 200, {90, 40, 70}, CAUSAL, .size = 3, .soft_cap = 4},
    {"slopes", USP_BF16, BSHD, 1, 4, 2, 2, 0, 64, 64, 200, {90, 40, 70}, CAUSAL, .slopes = 1},
    {"dropout", USP_BF16, BSHD, 1, 2, 2, 1, 0, 128, 128, 200, {90, 40, 70}, FULL, .dropout = 0.2f},
    {"all of it",
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
     {90, 40, 70},
     CAUSAL,
     .size = 2,
     .soft_cap = 5,
     .slopes = 1,
     .sinks = 1,
     .peaks = 1,
     .dropout = 0.2f},
    {"odd rows, for other kernels", USP_BF16, ODD, 1, 2, 2, 1, 0, 64, 64, 101, {50, 30, 21}, CAUSAL},
};
#undef CAUSAL
#undef FULL

/* Which stage is there, and told, before each of three calls; a call's own stage is always there. */
static const int arrivals[][USP_GPU_KEY_BLOCKS] = {{0, 1, 2}, {2, 2, 2}, {1, 1, 2}, {0, 2, 2}, {1, 2, 2}};
enum { ARRIVALS = sizeof arrivals / sizeof *arrivals, UNTOLD = -1, DRAWN = -2 };

/* ---- stages that arrive ------------------------------------------------------------------------------------------ */

typedef struct ring {
    usp_gpu_softmax s;
    size_t hidden[USP_GPU_KEY_BLOCKS][2]; /* keys and values that have not arrived */
    size_t told, words;                   /* the number that tells, the others behind it; numbers to copy from */
    size_t numbers;
    int plan; /* of `arrivals`, UNTOLD or DRAWN */
} ring;

static struct running {
    const usp_gpu_world *world;
    const ring *ring;
    int here;
    uint64_t random;
} running;

static usp_status bring_up_to(int stage, int told) {
    const usp_gpu_world *w = running.world;
    const ring *r = running.ring;
    const usp_device_ops *ops = w->device->ops;
    usp_status status = USP_OK;
    for (; running.here < stage && status == USP_OK; running.here++) {
        const usp_gpu_view *of[] = {&r->s.k[running.here + 1], &r->s.v[running.here + 1]};
        for (int i = 0; i < 2 && status == USP_OK; i++)
            status = ops->copy(w->device, usp_gpu_at(w, of[i]->at), usp_gpu_at(w, r->hidden[running.here + 1][i]),
                               of[i]->bytes, w->stream);
    }
    if (status != USP_OK || !told) return status;
    return ops->copy(w->device, usp_gpu_at(w, r->told), usp_gpu_at(w, r->numbers + (size_t)running.here * 4), 4,
                     w->stream);
}

void usp_gpu_ring_bring(void) {
    if (!running.ring || running.ring->plan != DRAWN || running.here + 1 == running.ring->s.blocks) return;
    running.random = running.random * 6364136223846793005u + 1442695040888963407u;
    if (running.random >> 62 == 0) bring_up_to(running.here + 1, 1);
}

static usp_softmax_ring ring_of(const usp_gpu_world *w, const usp_gpu_softmax *s, int32_t *told) {
    usp_softmax_ring all = {.stages = s->blocks, .arrived = told, .reached = told + 1};
    for (int i = 0; i < s->blocks; i++) {
        usp_softmax a = usp_gpu_softmax_args(w, s, i);
        all.stage[i] = (usp_softmax_stage){a.keys, a.k, a.v, a.pairs, a.by_query};
    }
    return all;
}

static usp_status forward(const usp_gpu_world *w, const void *args) {
    const ring *r = args;
    const usp_device_ops *ops = w->device->ops;
    usp_softmax_ring all = ring_of(w, &r->s, usp_gpu_at(w, r->told));
    running.world = w, running.ring = r, running.here = 0;
    usp_status status = ops->zero(w->device, usp_gpu_at(w, r->told), r->words, w->stream);
    for (int t = 0; t < r->s.blocks && status == USP_OK; t++) {
        int planned = r->plan >= 0 ? arrivals[r->plan][t] : t, last = r->s.blocks - 1;
        usp_softmax a = usp_gpu_softmax_args(w, &r->s, t);
        a.ring = &all, all.at = t;
        status = bring_up_to(planned < last ? planned : last, r->plan != UNTOLD);
        if (status == USP_OK) status = ops->softmax_forward(w->device, &a, w->stream);
    }
    running.ring = NULL;
    return status;
}

/* ---- checks ------------------------------------------------------------------------------------------------------ */

static int same_view(const usp_gpu_test *t, const usp_gpu_view *v) {
    for (int64_t i = 0; i < usp_gpu_count(v); i++) {
        float a = usp_gpu_get(t, v, t->after, i), b = usp_gpu_get(t, v, t->again, i);
        if (memcmp(&a, &b, sizeof a) != 0 && (a == a || b == b)) return 0;
    }
    return 1;
}

static void hide_keys(usp_gpu_test *t, const ring *r) {
    for (int i = 1; i < r->s.blocks; i++) {
        const usp_gpu_view *of[] = {&r->s.k[i], &r->s.v[i]};
        for (int n = 0; n < 2; n++) {
            memcpy(t->before + r->hidden[i][n], t->before + of[n]->at, of[n]->bytes);
            memset(t->before + of[n]->at, 0xff, of[n]->bytes);
        }
    }
}

/* The same keys by stages, into t->after, and by every plan: the same results but for what NaNs say. */
static void compare_plans(usp_gpu_test *t, ring *r, const char *what, int during) {
    const usp_gpu_view *results[] = {&r->s.out, &r->s.lse, &r->s.top, &r->s.sum, &r->s.peak};
    if (!usp_gpu_run_alone(t, what, usp_gpu_softmax_forward, &r->s, t->after)) return;
    hide_keys(t, r);
    for (r->plan = during ? DRAWN : UNTOLD; r->plan < ARRIVALS; r->plan++) {
        t->checks++;
        if (!usp_gpu_run_alone(t, what, forward, r, t->again)) continue;
        for (int i = 0; i < (r->s.c->peaks ? 5 : 4); i++) {
            char why[120];
            snprintf(why, sizeof why, "not the bits of stage by stage, arrivals %d", r->plan);
            if (!same_view(t, results[i])) usp_gpu_fail(t, results[i]->name, why);
        }
    }
}

static void check_case(usp_gpu_test *t, const usp_gpu_softmax_case *c, int processors, int during) {
    ring r = {.plan = 0};
    snprintf(t->name, sizeof t->name, "ring, %s, d %d, as if of %d processors", c->name, c->dim, processors);
    usp_gpu_begin_case(t, c->dtype);
    r.s = usp_gpu_make_softmax(t, c);
    r.s.processors = processors;
    usp_gpu_join_pairs(t, &r.s);
    for (int i = 1; i < r.s.blocks; i++)
        r.hidden[i][0] = usp_gpu_take(t, r.s.k[i].bytes), r.hidden[i][1] = usp_gpu_take(t, r.s.v[i].bytes);
    r.words = sizeof(int32_t) * (size_t)(2 + c->batch * c->heads * r.s.query_plan[0].capacity);
    r.told = usp_gpu_take(t, r.words);
    r.numbers = usp_gpu_put(t, (int32_t[]){0, 1, 2}, 3 * sizeof(int32_t));
    const usp_gpu_view *outputs[] = {&r.s.out, &r.s.lse, &r.s.top, &r.s.sum, &r.s.acc, c->peaks ? &r.s.peak : NULL,
                                     NULL};
    usp_gpu_run(t, "stage by stage", usp_gpu_softmax_forward, &r.s, outputs);
    memcpy(t->before, t->plain.base, t->used);
    compare_plans(t, &r, "finite numbers", during);
    memcpy(t->before, t->plain.base, t->used);
    usp_gpu_set(t, &r.s.v[r.s.blocks - 1], t->before, 5 % usp_gpu_count(&r.s.v[r.s.blocks - 1]), NAN);
    usp_gpu_set(t, &r.s.v[0], t->before, 77, NAN);
    compare_plans(t, &r, "with NaNs", during);
}

void usp_gpu_check_ring(usp_gpu_test *t, int during) {
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        check_case(t, &cases[i], 0, during);
        if (!during) check_case(t, &cases[i], 1, during);
    }
}
