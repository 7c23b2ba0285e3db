/* gpu_poison.c - a NaN or an infinity in one element of one token, on the GPU alone: results that depend on it are not
 * finite (for a NaN), all others keep every bit. What depends on what is counted here from positions alone. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "../cuda/launch.h"
#include "gpu_linear.h"
#include "gpu_softmax.h"

/* Where the element is, and what it became. whole: with all others of its token and head. */
typedef struct poison {
    const usp_gpu_view *view;
    int token, batch, head, element;
    float value;
    int whole;
    int other_ways; /* how results are rounded that do not depend on it may */
} poison;

static int hits(const poison *p, int element) {
    return p->whole || element == p->element;
}

typedef int (*depends_fn)(const void *test, const poison *p, int token, int head, int element);

/* Sums in any order, and those of steps that are summed pair by pair, differ by rounding; so does all where other rows
 * of a warp tell how a soft cap is found. `largest`: of the clean run. */
static int differs(const usp_gpu_view *v, const poison *p, float clean, float now, float largest) {
    if (p->other_ways) return !(fabsf(now - clean) <= fabsf(clean) / 64 + largest / 256);
    if (!v->unordered) return isnan(clean) || memcmp(&clean, &now, sizeof now) != 0;
    return !(fabsf(now - clean) <= fabsf(clean) / 64 + 1e-4f);
}

static float largest_of(usp_gpu_test *t, const usp_gpu_view *v) {
    float largest = 0;
    for (int64_t i = 0; i < usp_gpu_count(v); i++) {
        float x = fabsf(usp_gpu_get(t, v, t->after, i));
        if (isfinite(x)) largest = fmaxf(largest, x);
    }
    return largest;
}

/* t->after is the clean run, t->again the poisoned one. */
static void compare_runs(usp_gpu_test *t, const usp_gpu_view *v, const poison *p, depends_fn depends,
                         const void *test) {
    int lost = 0, spread = 0;
    float largest = largest_of(t, v);
    for (int64_t i = 0; i < usp_gpu_count(v); i++) {
        int element = (int)(i % v->dim), head = (int)(i / v->dim % v->heads);
        int batch = (int)(i / v->dim / v->heads % v->batch), token = (int)(i / v->dim / v->heads / v->batch);
        float clean = usp_gpu_get(t, v, t->after, i), now = usp_gpu_get(t, v, t->again, i);
        if (batch == p->batch && depends(test, p, token, head, element))
            lost += isnan(p->value) && isfinite(now);
        else
            spread += differs(v, p, clean, now, largest);
    }
    char why[160];
    snprintf(why, sizeof why, "%g in %s, token %d, head %d: lost in %d elements, changed %d that do not depend on it",
             (double)p->value, p->view->name, p->token, p->head, lost, spread);
    t->checks++;
    if (lost || spread) usp_gpu_fail(t, v->name, why);
}

/* A clean run, then one with the poison in `before`, which is clean again afterwards. */
static int run_both(usp_gpu_test *t, usp_gpu_call call, const void *args, const poison *p) {
    const usp_gpu_view *v = p->view;
    int64_t row = (((int64_t)p->token * v->batch + p->batch) * v->heads + p->head) * v->dim;
    float kept[1024];
    int fine = usp_gpu_is_drawn(t) && usp_gpu_run_alone(t, "clean", call, args, t->after);
    for (int x = 0; x < v->dim; x++) {
        kept[x] = usp_gpu_get(t, v, t->before, row + x);
        if (hits(p, x)) usp_gpu_set(t, v, t->before, row + x, p->value);
    }
    fine = fine && usp_gpu_run_alone(t, "poisoned", call, args, t->again);
    for (int x = 0; x < v->dim; x++) usp_gpu_set(t, v, t->before, row + x, kept[x]);
    return fine;
}

/* ---- softmax: what depends on what ------------------------------------------------------------------------------- */

typedef struct softmax_pass {
    usp_gpu_softmax s;
    int of; /* key block of the view that is compared */
} softmax_pass;

static int sees(const softmax_pass *pass, int query, int block, int key) {
    return usp_gpu_sees(&pass->s, query, block, key);
}

static int key_head(const softmax_pass *pass, int head) {
    return (head + pass->s.c->offset) / pass->s.c->group;
}

static int sees_any(const softmax_pass *pass, int query) {
    for (int block = 0; block < pass->s.blocks; block++)
        for (int key = 0; key < pass->s.k[block].tokens; key++)
            if (sees(pass, query, block, key)) return 1;
    return 0;
}

/* Does a query see the poisoned key or value? */
static int sees_it(const softmax_pass *pass, const poison *p, const usp_gpu_view *in, int query, int head) {
    for (int block = 0; block < pass->s.blocks; block++)
        if (p->view == &in[block]) return key_head(pass, head) == p->head && sees(pass, query, block, p->token);
    return 0;
}

static int is_it(const poison *p, const usp_gpu_view *in, int query, int head) {
    return p->view == in && query == p->token && head == p->head;
}

static int lse_depends(const void *test, const poison *p, int query, int head, int element) {
    const softmax_pass *pass = test;
    (void)element;
    return sees_it(pass, p, pass->s.k, query, head) || (is_it(p, &pass->s.q, query, head) && sees_any(pass, query));
}

static int out_depends(const void *test, const poison *p, int query, int head, int element) {
    const softmax_pass *pass = test;
    return lse_depends(test, p, query, head, 0) || (hits(p, element) && sees_it(pass, p, pass->s.v, query, head));
}

/* out is 0 where no key is seen: nothing of dout counts there. */
static int delta_depends(const void *test, const poison *p, int query, int head, int element) {
    const softmax_pass *pass = test;
    (void)element;
    return out_depends(test, p, query, head, p->element) ||
           (is_it(p, &pass->s.dout, query, head) && sees_any(pass, query));
}

static int dq_depends(const void *test, const poison *p, int query, int head, int element) {
    return delta_depends(test, p, query, head, element) && sees_any(test, query);
}

/* Over the queries that see the key, whether or not each depends. */
static int any_query(const void *test, const poison *p, int key, int head, depends_fn depends, int element) {
    const softmax_pass *pass = test;
    for (int h = 0; h < pass->s.c->heads; h++)
        for (int query = 0; query < pass->s.q.tokens && key_head(pass, h) == head; query++)
            if (sees(pass, query, pass->of, key) && depends(test, p, query, h, element)) return 1;
    return 0;
}

static int dk_depends(const void *test, const poison *p, int key, int head, int element) {
    return any_query(test, p, key, head, delta_depends, element);
}

/* P depends on lse alone; dout counts element by element. */
static int weighted_dout_depends(const void *test, const poison *p, int query, int head, int element) {
    const softmax_pass *pass = test;
    return lse_depends(test, p, query, head, 0) || (hits(p, element) && is_it(p, &pass->s.dout, query, head));
}

static int dv_depends(const void *test, const poison *p, int key, int head, int element) {
    return any_query(test, p, key, head, weighted_dout_depends, element);
}

/* ---- softmax: runs ----------------------------------------------------------------------------------------------- */

#define CAUSAL .left = USP_GPU_NO_LIMIT, .right = 0
#define FULL .left = USP_GPU_NO_LIMIT, .right = USP_GPU_NO_LIMIT
static const usp_gpu_softmax_case softmax_cases[] = {
    {"causal", USP_BF16, BSHD, 2, 2, 2, 1, 0, 128, 128, 300, {300}, CAUSAL},
    {"causal, f16", USP_F16, BHSD, 1, 2, 1, 2, 0, 64, 64, 257, {257}, CAUSAL},
    {"d 64, e 96", USP_BF16, BSHD, 1, 3, 2, 2, 1, 64, 96, 150, {150}, CAUSAL},
    {"d 192, e 128", USP_BF16, BSHD, 1, 2, 1, 2, 0, 192, 128, 150, {150}, CAUSAL},
    {"d 256", USP_F16, BSHD, 1, 2, 2, 1, 0, 256, 256, 120, {130}, .left = 40, .right = 30},
    {"d 192, e 128, full steps, then masked ones",
     USP_BF16,
     BSHD,
     1,
     1,
     1,
     1,
     0,
     192,
     128,
     448,
     {448},
     .left = 300,
     .right = 0},
    {"d 256, full steps, then masked ones",
     USP_F16,
     BSHD,
     1,
     1,
     1,
     1,
     0,
     256,
     256,
     448,
     {448},
     .left = 300,
     .right = 0},
    {"f32", USP_F32, BSHD, 1, 2, 2, 1, 0, 20, 36, 130, {130}, CAUSAL},
    {"odd rows", USP_BF16, ODD, 1, 2, 1, 2, 0, 128, 128, 130, {130}, CAUSAL},
    {"full", USP_BF16, BSHD, 1, 2, 2, 1, 0, 64, 64, 70, {90}, FULL},
    {"window", USP_BF16, BSHD, 1, 2, 2, 1, 0, 128, 128, 300, {300}, .left = 65, .right = 3},
    {"documents", USP_F16, BSHD, 1, 2, 2, 1, 0, 64, 64, 300, {300}, CAUSAL, .documents = 40},
    {"tree, scattered", USP_BF16, BSHD, 1, 2, 2, 1, 0, 64, 64, 200, {200}, CAUSAL, .shift = 0, .scatter = 1, .tree = 1},
    {"random intervals, f32", USP_F32, BSHD, 1, 2, 2, 1, 0, 20, 20, 90, {50, 61}, FULL, .random = 1, .tree = 1},
    {"rows without keys", USP_F16, BSHD, 1, 2, 2, 1, 0, 64, 64, 200, {100}, CAUSAL, .shift = -150},
    {"scattered, two blocks",
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
     {141, 140},
     CAUSAL,
     .shift = 70,
     .scatter = 1},
    {"slopes, both sides", USP_BF16, BSHD, 1, 1, 1, 1, 0, 64, 64, 256, {256}, FULL, .slopes = 1},
    {"soft cap, near 0", USP_BF16, BSHD, 1, 1, 1, 1, 0, 64, 64, 256, {500}, FULL, .soft_cap = 80},
    {"slopes and soft cap", USP_BF16, BSHD, 1, 2, 2, 1, 0, 128, 128, 150, {150}, CAUSAL, .soft_cap = 4, .slopes = 1},
};
#undef CAUSAL
#undef FULL

static void poison_softmax(usp_gpu_test *t, softmax_pass *pass, const poison *p) {
    if (!run_both(t, usp_gpu_softmax_pass, &pass->s, p)) return;
    compare_runs(t, &pass->s.out, p, out_depends, pass);
    compare_runs(t, &pass->s.lse, p, lse_depends, pass);
    compare_runs(t, &pass->s.delta, p, delta_depends, pass);
    compare_runs(t, &pass->s.dq, p, dq_depends, pass);
    for (pass->of = 0; pass->of < pass->s.blocks; pass->of++) {
        compare_runs(t, &pass->s.dk[pass->of], p, dk_depends, pass);
        compare_runs(t, &pass->s.dv[pass->of], p, dv_depends, pass);
    }
}

/* The first token, the last, one at the begin of a tile and one inside; with a NaN and an infinity. */
static void poison_view(usp_gpu_test *t, softmax_pass *pass, const usp_gpu_view *view) {
    int tokens = (int)view->tokens, places[] = {0, 64 < tokens ? 64 : tokens / 2, tokens / 3, tokens - 1};
    int cap_alone = pass->s.c->soft_cap > 0 && !pass->s.c->slopes;
    for (int i = 0; i < 8; i++)
        poison_softmax(t, pass,
                       &(poison){view, places[i / 2], view->batch - 1, i / 2 % view->heads, (5 * i + 3) % view->dim,
                                 i % 2 ? INFINITY : NAN, 0, cap_alone});
}

static void check_softmax(usp_gpu_test *t, const usp_gpu_softmax_case *c, int processors, int portable) {
    softmax_pass pass;
    snprintf(t->name, sizeof t->name, "poison, softmax, %s, as if of %d processors%s", c->name, processors,
             portable ? ", portable" : "");
    usp_gpu_begin_case(t, c->dtype);
    pass.s = usp_gpu_make_softmax(t, c);
    pass.s.processors = processors, pass.s.portable = portable, pass.s.dq.unordered = !portable;
    memcpy(t->before, t->plain.base, t->used);
    poison_view(t, &pass, &pass.s.q);
    poison_view(t, &pass, &pass.s.dout);
    for (int i = 0; i < pass.s.blocks; i++) {
        poison_view(t, &pass, &pass.s.k[i]);
        poison_view(t, &pass, &pass.s.v[i]);
    }
}

/* ---- linear ------------------------------------------------------------------------------------------------------ */

static const usp_gpu_linear_case linear_cases[] = {
    {"slow", USP_BF16, BSHD, 2, 2, 2, 2, 2, 0, 128, 128, {300, 190}, 128, 0, 1, 0, 1, USP_GPU_SLOW, 0.088f},
    {"reverse", USP_BF16, BSHD, 1, 2, 2, 2, 2, 0, 64, 128, {300, 77}, 128, 1, 0, 0, 1, USP_GPU_SLOW, 1},
    {"transposed", USP_BF16, PACKED, 1, 2, 2, 2, 2, 0, 128, 64, {257}, 192, 0, 1, 1, 1, USP_GPU_FAST, 1},
    {"shared keys", USP_BF16, BSHD, 1, 3, 6, 2, 3, 3, 64, 64, {200}, 128, 1, 1, 1, 1, USP_GPU_NO_DECAY, 1},
    {"f16", USP_F16, BSHD, 1, 2, 2, 2, 2, 0, 128, 128, {200}, 64, 0, 1, 0, 1, USP_GPU_SLOW, 1},
    {"odd rows", USP_BF16, ODD, 1, 2, 2, 2, 2, 0, 128, 128, {130}, 128, 0, 1, 0, 1, USP_GPU_SLOW, 1},
    {"f32, reverse", USP_F32, BSHD, 1, 2, 2, 2, 2, 0, 20, 70, {70, 20}, 64, 1, 0, 1, 1, USP_GPU_SLOW, 1},
};

/* Totals, states before blocks and the output as sums; then, on top of them, what the states before chunks give. */
static usp_status run_linear(const usp_gpu_world *w, const void *args) {
    usp_gpu_linear l = *(const usp_gpu_linear *)args;
    l.first = 1, l.last = 0;
    usp_status status = usp_gpu_linear_totals(w, &l);
    if (status == USP_OK) status = usp_gpu_linear_scan(w, &l);
    if (status == USP_OK) status = usp_gpu_linear_output(w, &l);
    l.first = 0, l.last = 1;
    return status == USP_OK ? usp_gpu_linear_apply(w, &l) : status;
}

static int chunk_of(const usp_gpu_linear *l, int token) {
    int chunk = 0;
    for (; token >= l->c->chunk[chunk]; chunk++) token -= l->c->chunk[chunk];
    return chunk;
}

static int chunk_begin(const usp_gpu_linear *l, int chunk) {
    return chunk > 0 ? chunk_begin(l, chunk - 1) + l->c->chunk[chunk - 1] : 0;
}

/* Is the layer head one of those that read the poisoned head? */
static int reads_it(const usp_gpu_linear *l, const poison *p, int head) {
    const usp_gpu_linear_case *c = l->c;
    int most = c->q_heads > c->k_heads ? c->q_heads : c->k_heads;
    most = most > c->v_heads ? most : c->v_heads;
    return (head + c->offset) / (most / p->view->heads) == p->head;
}

/* Whether the token is poisoned, or after the poisoned one in time and in its chunk. */
static int is_after(const usp_gpu_linear *l, const poison *p, int token) {
    return chunk_of(l, token) == chunk_of(l, p->token) && (l->c->reverse ? token <= p->token : token >= p->token);
}

static int row_depends(const void *test, const poison *p, int token, int head, int element) {
    const usp_gpu_linear *l = test;
    if (!reads_it(l, p, head)) return 0;
    if (p->view == &l->q) return token == p->token;
    return is_after(l, p, token) && (p->view == &l->k || hits(p, element));
}

/* Element [d][e] of the state before a block, in time. */
static int state_depends(const void *test, const poison *p, int block, int head, int element) {
    const usp_gpu_linear *l = test;
    const usp_gpu_linear_case *c = l->c;
    int d = c->transposed ? element % c->dim : element / c->value_dim;
    int e = c->transposed ? element / c->dim : element % c->value_dim, chunk = 0, first = 0;
    for (; block >= first + (c->chunk[chunk] + c->block - 1) / c->block; chunk++)
        first += (c->chunk[chunk] + c->block - 1) / c->block;
    int begin = chunk_begin(l, chunk) + (block - first) * c->block, chunk_end = chunk_begin(l, chunk + 1);
    int end = begin + c->block < chunk_end ? begin + c->block : chunk_end;
    if (p->view == &l->q || !reads_it(l, p, head) || chunk_of(l, p->token) != chunk) return 0;
    if (c->reverse ? p->token < end : p->token >= begin) return 0;
    return hits(p, p->view == &l->k ? d : e);
}

/* f16 kernels bring the state of 16 value columns to one unit, whose choice is in the last bits of them all: there all
 * columns are poisoned. */
static void poison_linear(usp_gpu_test *t, const usp_gpu_linear *l, const usp_gpu_view *view) {
    int tokens = (int)view->tokens, places[] = {0, 63, 70 % tokens, tokens / 2, tokens - 1};
    for (int i = 0; i < 10; i++) {
        poison p = {view,
                    places[i / 2],
                    view->batch - 1,
                    i / 2 % view->heads,
                    (7 * i + 2) % view->dim,
                    i % 2 ? INFINITY : NAN,
                    l->c->dtype == USP_F16,
                    0};
        if (!run_both(t, run_linear, l, &p)) continue;
        compare_runs(t, &l->acc, &p, row_depends, l);
        compare_runs(t, &l->out, &p, row_depends, l);
        compare_runs(t, &l->states, &p, state_depends, l);
    }
}

static void check_linear(usp_gpu_test *t, const usp_gpu_linear_case *c) {
    snprintf(t->name, sizeof t->name, "poison, linear, %s", c->name);
    usp_gpu_begin_case(t, c->dtype);
    usp_gpu_linear l = usp_gpu_make_linear(t, c, USP_CUDA_GRID);
    memcpy(t->before, t->plain.base, t->used);
    poison_linear(t, &l, &l.q);
    poison_linear(t, &l, &l.k);
    poison_linear(t, &l, &l.v);
}

/* ---- the kind ---------------------------------------------------------------------------------------------------- */

/* A GPU of one processor is always full, so that softmax kernels run with all rows of a block; else with half. */
void usp_gpu_check_poison(usp_gpu_test *t) {
    for (size_t i = 0; i < sizeof softmax_cases / sizeof *softmax_cases; i++)
        for (int way = 0; way < 4; way++) check_softmax(t, &softmax_cases[i], way % 2, way / 2);
    for (size_t i = 0; i < sizeof linear_cases / sizeof *linear_cases; i++) check_linear(t, &linear_cases[i]);
}
