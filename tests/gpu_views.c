/* gpu_views.c - softmax attention of tensors whose heads, batch entries or tokens share a place, or lie backward: any
 * strides are legal for what is read, and backward ones for what is written. The copy engine of Hopper takes neither:
 * its kernels must leave such calls to others. */
#include <stdio.h>
#include <string.h>

#include "../cuda/softmax.h"
#include "gpu_softmax.h"

/* ---- cases ------------------------------------------------------------------------------------------------------- */

enum { ONE_HEAD = 1, ONE_ENTRY = 2, ONE_TOKEN = 4, HEADS_BACK = 8, ENTRIES_BACK = 16, TOKENS_BACK = 32 };
enum { ALL_ONE = ONE_HEAD | ONE_ENTRY | ONE_TOKEN, ALL_BACK = HEADS_BACK | ENTRIES_BACK | TOKENS_BACK };

/* How q and dout lie; k and v; out, dq, dk and dv; the sums of dq. Whether Hopper's kernels take the passes. */
typedef struct view_case {
    const char *name;
    int queries, keys, results, sums;
    int forward, backward;
} view_case;

static const view_case cases[] = {
    {"as they were made", 0, 0, 0, 0, 1, 1},
    {"keys of one head", 0, ONE_HEAD, 0, 0, 0, 0},
    {"keys of one batch entry", 0, ONE_ENTRY, 0, 0, 0, 0},
    {"one key", 0, ONE_TOKEN, 0, 0, 0, 0},
    {"queries of one head", ONE_HEAD, 0, 0, 0, 0, 0},
    {"queries of one batch entry", ONE_ENTRY, 0, 0, 0, 0, 0},
    {"one query", ONE_TOKEN, 0, 0, 0, 0, 0},
    {"everything is one", ALL_ONE, ALL_ONE, 0, 0, 0, 0},
    {"keys, tokens backward", 0, TOKENS_BACK, 0, 0, 0, 0},
    {"keys, heads backward", 0, HEADS_BACK, 0, 0, 0, 0},
    {"queries, tokens backward", TOKENS_BACK, 0, 0, 0, 0, 0},
    {"queries, batch backward", ENTRIES_BACK, 0, 0, 0, 0, 0},
    {"results backward", 0, 0, ALL_BACK, 0, 1, 1},
    {"results, heads backward", 0, 0, HEADS_BACK, 0, 1, 1},
    {"sums of dq backward", 0, 0, 0, ALL_BACK, 1, 0},
    {"everything backward", ALL_BACK, ALL_BACK, ALL_BACK, ALL_BACK, 0, 0},
};

/* Strides count where there is more than one. */
static const view_case single = {"strides of what there is one of", ALL_ONE, ALL_ONE, 0, ALL_BACK, 1, 1};

#define CAUSAL .left = USP_GPU_NO_LIMIT, .right = 0
static const usp_gpu_softmax_case shapes[] = {
    {"d 64", USP_BF16, BSHD, 2, 4, 2, 2, 0, 64, 64, 150, {170}, CAUSAL},
    {"d 128", USP_F16, BHSD, 2, 4, 2, 2, 0, 128, 128, 130, {130}, CAUSAL},
};
static const usp_gpu_softmax_case single_shape = {"one of all", USP_BF16, BSHD, 1, 1, 1, 1, 0, 64, 64, 1, {1}, CAUSAL};
#undef CAUSAL

/* ---- views ------------------------------------------------------------------------------------------------------- */

static void turn_back(usp_gpu_view *v, int64_t count, int64_t *stride) {
    v->first += (count - 1) * *stride;
    *stride = -*stride;
}

static void lay(usp_gpu_view *v, int how) {
    if (how & ONE_HEAD) v->stride_head = 0;
    if (how & ONE_ENTRY) v->stride_batch = 0;
    if (how & ONE_TOKEN) v->stride_token = 0;
    if (how & HEADS_BACK) turn_back(v, v->heads, &v->stride_head);
    if (how & ENTRIES_BACK) turn_back(v, v->batch, &v->stride_batch);
    if (how & TOKENS_BACK) turn_back(v, v->tokens, &v->stride_token);
}

/* Where it does not lie any more is poison again. */
static void lay_input(usp_gpu_test *t, usp_gpu_view *v, int how) {
    lay(v, how);
    memset(t->exact.base + v->at, 0xff, v->bytes);
    memset(t->plain.base + v->at, 0xff, v->bytes);
    usp_gpu_fill(t, v, 1);
}

static void lay_all(usp_gpu_test *t, usp_gpu_softmax *s, const view_case *c) {
    lay_input(t, &s->q, c->queries), lay_input(t, &s->dout, c->queries);
    lay_input(t, &s->k[0], c->keys), lay_input(t, &s->v[0], c->keys);
    lay(&s->out, c->results), lay(&s->dq, c->results);
    lay(&s->dk[0], c->results), lay(&s->dv[0], c->results);
    lay(&s->dq_sum, c->sums);
}

/* ---- checks ------------------------------------------------------------------------------------------------------ */

/* Whether Hopper's kernels say what they should; of its copy engine they are told only that there is one. */
static void check_family(usp_gpu_test *t, const usp_gpu_softmax *s, const view_case *c) {
    static char engine;
    const usp_gpu hopper = {90, 132, 227 * 1024, &engine};
    usp_softmax a = usp_gpu_softmax_args(&t->gpu, s, 0);
    usp_gpu_expect(t, !usp_softmax_wgmma.fits(&hopper, &a, USP_CALL_FORWARD) == !c->forward, "forward on Hopper");
    usp_gpu_expect(t, !usp_softmax_wgmma.fits(&hopper, &a, USP_CALL_BACKWARD) == !c->backward, "backward on Hopper");
}

static void check_views(usp_gpu_test *t, const usp_gpu_softmax_case *shape, const view_case *c, int portable) {
    snprintf(t->name, sizeof t->name, "views, %s, %s%s", c->name, shape->name, portable ? ", portable" : "");
    usp_gpu_begin_case(t, shape->dtype);
    usp_gpu_softmax s = usp_gpu_make_softmax(t, shape);
    const usp_gpu_view *outputs[] = {&s.out, &s.lse,    &s.delta, &s.dq,    &s.top,
                                     &s.sum, &s.dq_sum, &s.dk[0], &s.dv[0], NULL};
    lay_all(t, &s, c);
    s.portable = portable;
    s.dq.unordered = s.dq_sum.unordered = !portable;
    s.dq.own = s.dk[0].own = (c->keys & ONE_TOKEN) || shape->keys[0] == 1; /* they are 0, and what rounding leaves */
    check_family(t, &s, c);
    usp_gpu_run(t, "a pass", usp_gpu_softmax_pass, &s, outputs);
}

void usp_gpu_check_views(usp_gpu_test *t) {
    for (int portable = 0; portable < 2; portable++) {
        for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
            for (size_t n = 0; n < sizeof cases / sizeof *cases; n++) check_views(t, &shapes[i], &cases[n], portable);
        check_views(t, &single_shape, &single, portable);
    }
}
