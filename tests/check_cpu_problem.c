/* check_cpu_problem.c - random problems of softmax attention: their tensors, what is wanted by plain loops in double
 * precision, and the kernels' calls. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "../lib/dropout.h"
#include "cpu_kernels.h"

/* ---- problems ---------------------------------------------------------------------------------------------------- */

static void make_tensors(check *c, problem *p) {
    const usp_softmax *a = &p->args;
    int queries = p->pairs.queries, keys = p->pairs.keys;
    p->q = usp_check_random(c, a->dtype, queries, a->batch, a->heads, a->dim, 1);
    p->k = usp_check_random(c, a->dtype, keys, a->batch, a->key_heads, a->dim, 1);
    p->v = usp_check_random(c, a->dtype, keys, a->batch, a->key_heads, a->value_dim, 1);
    p->dout = usp_check_random(c, a->dtype, queries, a->batch, a->heads, a->value_dim, 1);
    p->out = usp_check_output(c, a->dtype, queries, a->batch, a->heads, a->value_dim);
    p->dq = usp_check_output(c, a->dtype, queries, a->batch, a->heads, a->dim);
    p->dk = usp_check_output(c, a->key_dtype, keys, a->batch, a->key_heads, a->dim);
    p->dv = usp_check_output(c, a->key_dtype, keys, a->batch, a->key_heads, a->value_dim);
    p->dq_sum = usp_check_output(c, USP_F32, queries, a->batch, a->heads, a->dim);
}

static void make_kept(check *c, problem *p) {
    size_t n = usp_check_stats(p), heads = (size_t)p->args.heads;
    double **truth[] = {&p->lse, &p->peak, &p->delta};
    float **got[] = {&p->top, &p->sum, &p->lse_got, &p->peak_got, &p->delta_got, &p->dlse};
    for (int i = 0; i < 3; i++) *truth[i] = usp_check_memory(n * sizeof(double));
    for (int i = 0; i < 6; i++) *got[i] = usp_check_poisoned(n);
    for (size_t i = 0; i < n; i++) p->dlse[i] = (float)usp_check_bell(c);
    p->acc = usp_check_poisoned(n * (size_t)p->args.value_dim);
    p->dsinks = usp_check_memory(heads * sizeof(double)), p->dsinks_size = usp_check_memory(heads * sizeof(double));
}

/* Rooms for as many items as rows, and as many tiles as pairs. */
static void make_rooms(problem *p) {
    list *both[] = {&p->by_query, &p->by_key};
    size_t queries = (size_t)p->pairs.queries, keys = (size_t)p->pairs.keys;
    for (int i = 0; i < 2; i++) {
        both[i]->work = usp_check_memory(sizeof(usp_work) * (queries + keys + 1));
        both[i]->tile = usp_check_memory(sizeof(usp_tile) * queries * keys);
    }
}

static void draw_extras(check *c, problem *p) {
    usp_softmax *a = &p->args;
    for (int h = 0; h < 4; h++) {
        p->slopes[h] = (float)fabs(usp_check_uniform(c)) / 8;
        p->sinks[h] = usp_check_pick(c, 5) ? (float)(2 * usp_check_bell(c)) : -INFINITY;
    }
    p->state[0] = (uint64_t)usp_check_pick(c, INT32_MAX) << 20, p->state[1] = (uint64_t)usp_check_pick(c, 99);
    if (p->has.cap) a->soft_cap = 0.5f + (float)usp_check_pick(c, 3);
    if (p->has.dropout)
        a->dropout = (usp_dropout){usp_dropout_rate(0.1f * (float)(1 + usp_check_pick(c, 6))), usp_check_pick(c, 3),
                                   a->heads + 2, NULL};
}

problem usp_check_problem(check *c, usp_dtype dtype, int dim, int value_dim, int queries, int keys, extras has) {
    problem p = {.has = has};
    usp_softmax *a = &p.args;
    int group = 1 + usp_check_pick(c, 3), heads = 1 + usp_check_pick(c, 4);
    a->dtype = dtype, a->batch = 1 + usp_check_pick(c, 2), a->heads = heads, a->dim = dim, a->value_dim = value_dim;
    a->kv = (usp_head_map){group, usp_check_pick(c, group)};
    a->key_heads = (heads - 1 + a->kv.offset) / group + 1 + !usp_check_pick(c, 4);
    a->scale = (float)(1 / sqrt(dim)), a->queries = queries, a->keys = keys;
    a->key_dtype = usp_check_pick(c, 2) ? USP_F32 : dtype, a->deterministic = usp_check_pick(c, 2);
    usp_check_pairs_make(c, &p.pairs, queries, keys);
    make_tensors(c, &p);
    make_kept(c, &p);
    make_rooms(&p);
    draw_extras(c, &p);
    a->scratch = usp_check_scratch(c, USP_SOFTMAX, dtype, dim, value_dim);
    return p;
}

void usp_check_problem_free(check *c, problem *p) {
    tensor *tensors[] = {&p->q, &p->k, &p->v, &p->out, &p->dout, &p->dq, &p->dk, &p->dv, &p->dq_sum};
    void *plain[] = {p->lse,         p->peak,        p->delta,         p->dsinks,       p->dsinks_size, p->top,
                     p->sum,         p->dlse,        p->acc,           p->lse_got,      p->peak_got,    p->delta_got,
                     p->by_key.tile, p->by_key.work, p->by_query.tile, p->by_query.work};
    for (size_t i = 0; i < sizeof tensors / sizeof *tensors; i++) usp_check_tensor_free(tensors[i]);
    for (size_t i = 0; i < sizeof plain / sizeof *plain; i++) free(plain[i]);
    usp_check_pairs_free(&p->pairs);
    usp_check_scratch_free(c, p->args.scratch, USP_SOFTMAX, p->args.dtype, p->args.dim, p->args.value_dim);
}

/* ---- reference --------------------------------------------------------------------------------------------------- */

/* A query row. */
typedef struct row {
    problem *p;
    int b, h, query;
} row;

/* Score of a pair; `slope`: what the cap does to its gradient. */
static double score(const row *r, int key, double *slope) {
    const problem *p = r->p;
    const double *q = usp_check_truth(&p->q, r->query, r->b, r->h);
    const double *k = usp_check_truth(&p->k, key, r->b, usp_cpu_head(p->args.kv, r->h));
    double s = (double)p->args.scale * usp_check_dot(q, k, p->args.dim), cap = (double)p->args.soft_cap, bent = 0;
    if (p->has.cap) bent = tanh(s / cap), s = cap * bent;
    if (p->has.slopes) s -= (double)p->slopes[r->h] * fabs((double)p->pairs.diagonal[r->query] - p->pairs.key[key]);
    *slope = 1 - bent * bent;
    return s;
}

/* What dropout makes of a weight of 1. */
static double kept(const row *r, int key) {
    const problem *p = r->p;
    const usp_dropout *d = &p->args.dropout;
    if (!p->has.dropout) return 1;
    uint32_t line = (uint32_t)(r->b * d->heads + d->first_head + r->h);
    uint64_t word_row = usp_dropout_row(p->state[0], p->state[1], line, (uint32_t)p->pairs.query[r->query]);
    uint32_t number = usp_dropout_number(word_row, (uint32_t)p->pairs.key[key]);
    return (double)number >= (double)d->rate * 32768 ? 1 / (1 - (double)d->rate) : 0;
}

static size_t stat_at(const row *r) {
    return ((size_t)r->b * (size_t)r->p->args.heads + (size_t)r->h) * (size_t)r->p->q.tokens + (size_t)r->query;
}

static void reference_forward(const row *r) {
    problem *p = r->p;
    double top = -(double)INFINITY, sum = 0, slope, *out = usp_check_truth(&p->out, r->query, r->b, r->h);
    double sink = p->has.sinks ? (double)p->sinks[r->h] : -(double)INFINITY;
    for (int j = 0; j < p->k.tokens; j++)
        if (usp_check_allowed(&p->pairs, r->query, j)) top = fmax(top, score(r, j, &slope));
    p->peak[stat_at(r)] = top;
    top = fmax(top, sink);
    for (int j = 0; j < p->k.tokens; j++) {
        if (!usp_check_allowed(&p->pairs, r->query, j)) continue;
        double weight = exp(score(r, j, &slope) - top),
               *v = usp_check_truth(&p->v, j, r->b, usp_cpu_head(p->args.kv, r->h));
        sum += weight;
        for (int i = 0; i < p->v.dim; i++) out[i] += weight * kept(r, j) * v[i];
    }
    if (isfinite(sink)) sum += exp(sink - top);
    for (int i = 0; i < p->v.dim && sum != 0; i++) out[i] /= sum;
    p->lse[stat_at(r)] = sum != 0 ? top + log(sum) : -(double)INFINITY;
}

static void reference_delta(const row *r) {
    problem *p = r->p;
    const double *out = usp_check_truth(&p->out, r->query, r->b, r->h);
    double delta = usp_check_dot(out, usp_check_truth(&p->dout, r->query, r->b, r->h), p->v.dim);
    if (p->has.dlse) delta -= (double)p->dlse[stat_at(r)];
    p->delta[stat_at(r)] = delta;
    if (!p->has.sinks || p->lse[stat_at(r)] == -(double)INFINITY) return;
    double share = exp((double)p->sinks[r->h] - p->lse[stat_at(r)]) * delta;
    p->dsinks[r->h] -= share, p->dsinks_size[r->h] += fabs(share);
}

static void reference_backward(const row *r) {
    problem *p = r->p;
    double scale = (double)p->args.scale, *dq = usp_check_truth(&p->dq, r->query, r->b, r->h);
    const double *dout = usp_check_truth(&p->dout, r->query, r->b, r->h);
    const double *q = usp_check_truth(&p->q, r->query, r->b, r->h);
    for (int j = 0, g = usp_cpu_head(p->args.kv, r->h); j < p->k.tokens; j++) {
        if (!usp_check_allowed(&p->pairs, r->query, j)) continue;
        double slope, weight = exp(score(r, j, &slope) - p->lse[stat_at(r)]), keep = kept(r, j);
        double dweight = keep * usp_check_dot(dout, usp_check_truth(&p->v, j, r->b, g), p->v.dim);
        double dscore = scale * slope * weight * (dweight - p->delta[stat_at(r)]);
        const double *k = usp_check_truth(&p->k, j, r->b, g);
        double *dk = usp_check_truth(&p->dk, j, r->b, g), *dv = usp_check_truth(&p->dv, j, r->b, g);
        for (int i = 0; i < p->v.dim; i++) dv[i] += weight * keep * dout[i];
        for (int i = 0; i < p->q.dim; i++) dk[i] += dscore * q[i];
        for (int i = 0; i < p->q.dim; i++) dq[i] += dscore * k[i];
    }
}

void usp_check_reference(problem *p) {
    for (int h = 0; h < p->args.heads; h++) p->dsinks[h] = p->dsinks_size[h] = 0;
    for (int b = 0; b < p->args.batch; b++)
        for (int h = 0; h < p->args.heads; h++)
            for (int t = 0; t < p->q.tokens; t++) {
                const row r = {p, b, h, t};
                reference_forward(&r);
                reference_delta(&r);
                reference_backward(&r);
            }
}

/* ---- calls ------------------------------------------------------------------------------------------------------- */

/* Pointers into the problem, which may have moved since it was made; what few layers ask for, where it is asked for. */
static void set_args(problem *p) {
    usp_softmax *a = &p->args;
    a->q = p->q.view, a->out = p->out.view, a->dout = p->dout.view, a->dq = p->dq.view, a->dq_sum = p->dq_sum.view;
    a->top = p->top, a->sum = p->sum, a->lse = p->lse_got, a->peak = p->peak_got, a->delta = p->delta_got;
    a->slopes = p->has.slopes ? p->slopes : NULL, a->sinks = p->has.sinks ? p->sinks : NULL;
    a->dlse = p->has.dlse ? p->dlse : NULL, a->dropout.state = p->has.dropout ? p->state : NULL;
}

/* The arguments of keys [from, to). */
static void set_block(check *c, problem *p, int from, int to) {
    usp_softmax *a = &p->args;
    const pairs *s = &p->pairs;
    a->keys = to - from;
    a->acc = a->first && a->last && usp_check_pick(c, 2) ? NULL : p->acc;
    a->k = usp_check_rows(&p->k, from), a->v = usp_check_rows(&p->v, from);
    a->dk = usp_check_rows(&p->dk, from), a->dv = usp_check_rows(&p->dv, from);
    a->pairs = (usp_pairs){s->query, s->low, s->high, s->key + from, s->tree ? s->last + from : NULL, s->diagonal};
    usp_check_lists(c, p, from, to, a->first || a->last);
}

typedef usp_status (*softmax_fn)(usp_device *, const usp_softmax *, usp_stream);

static void run_blocks(check *c, problem *p, softmax_fn run, int blocks, int equal) {
    int keys = p->k.tokens, from = 0;
    set_args(p);
    for (int i = 0; i < blocks; i++) {
        int to = equal ? keys * (i + 1) / blocks : from + usp_check_pick(c, keys - from + 1);
        if (i + 1 == blocks) to = keys;
        p->args.first = i == 0, p->args.last = i + 1 == blocks;
        set_block(c, p, from, to);
        run(c->device, &p->args, NULL);
        from = to;
    }
}

void usp_check_forward(check *c, problem *p, int blocks, int equal) {
    size_t bytes = usp_check_stats(p) * sizeof(float);
    float *all[] = {p->top, p->sum, p->lse_got, p->peak_got};
    for (int i = 0; i < 4; i++) memset(all[i], 255, bytes);
    memset(p->acc, 255, bytes * (size_t)p->args.value_dim);
    run_blocks(c, p, c->device->ops->softmax_forward, blocks, equal);
}

void usp_check_backward(check *c, problem *p, int blocks, int equal) {
    for (size_t i = 0; i < usp_check_stats(p); i++) p->delta_got[i] = (float)p->delta[i];
    memset(p->dq_sum.bytes, 255, p->dq_sum.size);
    run_blocks(c, p, c->device->ops->softmax_backward, blocks, equal);
}
