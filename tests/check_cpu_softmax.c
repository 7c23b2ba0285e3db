/* check_cpu_softmax.c - softmax attention of the CPU against plain loops: all entries, folds in several blocks, what a
 * NaN reaches, and that neither folds nor large scores cost precision. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cpu_kernels.h"

/* ---- entries ----------------------------------------------------------------------------------------------------- */

/* The largest of what forward kept, bit for bit. */
static void check_peaks(check *c, const problem *p) {
    int heads = p->args.heads, queries = p->q.tokens;
    float *most = usp_check_poisoned((size_t)heads);
    c->device->ops->softmax_peaks(c->device, &p->args, most, NULL);
    for (int h = 0; h < heads; h++) {
        float truth = -INFINITY;
        for (int n = 0; n < p->args.batch * queries; n++)
            truth = fmaxf(truth, p->peak_got[(n / queries * heads + h) * queries + n % queries]);
        usp_check_verdict(c, most[h] == truth, "head %d's largest score is %g, not %g", h, (double)most[h],
                          (double)truth);
    }
    free(most);
}

static void check_forward(check *c, problem *p, int blocks) {
    usp_check_forward(c, p, blocks, 0);
    usp_check_compare(c, &p->out, blocks == 1 ? "out" : "out of several blocks");
    usp_check_floats(c, p->lse_got, p->lse, usp_check_stats(p), "lse");
    usp_check_floats(c, p->peak_got, p->peak, usp_check_stats(p), "peak");
    check_peaks(c, p);
}

/* What is summed cancels: an error is one of all that is. */
static void check_sinks(check *c, const problem *p) {
    float *dsinks = usp_check_poisoned((size_t)p->args.heads);
    if (p->has.sinks) c->device->ops->softmax_sinks(c->device, &p->args, dsinks, NULL);
    for (int h = 0; h < p->args.heads && p->has.sinks; h++) {
        double got = (double)dsinks[h], off = fabs(got - p->dsinks[h]);
        usp_check_verdict(c, isnan(p->dsinks[h]) ? isnan(got) : off <= 1e-6 * p->dsinks_size[h],
                          "gradient of a sink is %g, not %g, of %g in all", got, p->dsinks[h], p->dsinks_size[h]);
    }
    free(dsinks);
}

static void check_backward(check *c, problem *p, int blocks) {
    usp_check_backward(c, p, blocks, 0);
    usp_check_compare(c, &p->dq, blocks == 1 ? "dq" : "dq of several blocks");
    usp_check_compare(c, &p->dk, "dk");
    usp_check_compare(c, &p->dv, "dv");
    check_sinks(c, p);
}

/* Of a random `out`: that of forward is rounded. */
static void check_delta(check *c, const problem *p) {
    size_t n = usp_check_stats(p), at = 0;
    double *truth = usp_check_memory(n * sizeof(double));
    float *delta = usp_check_poisoned(n);
    tensor out = usp_check_random(c, p->q.dtype, p->q.tokens, p->q.batch, p->q.heads, p->v.dim, 1);
    usp_softmax args = p->args;
    args.out = out.view;
    for (int b = 0; b < out.batch; b++)
        for (int h = 0; h < out.heads; h++)
            for (int t = 0; t < out.tokens; t++, at++) {
                truth[at] = usp_check_dot(usp_check_truth(&out, t, b, h), usp_check_truth(&p->dout, t, b, h), out.dim);
                if (p->has.dlse) truth[at] -= (double)p->dlse[at];
            }
    c->device->ops->softmax_delta(c->device, &args, delta, NULL);
    usp_check_floats(c, delta, truth, n, "delta");
    usp_check_tensor_free(&out);
    free(truth), free(delta);
}

/* Head h alone, of the arguments of a whole fold. */
static usp_softmax alone(const usp_softmax *a, int h, const usp_tensor *q, float *kept) {
    usp_softmax one = *a;
    int64_t rows = a->batch * a->queries;
    one.heads = 1, one.kv.offset += h, one.dropout.first_head += h, one.q = *q;
    one.slopes = a->slopes ? a->slopes + h : NULL;
    one.top = kept, one.sum = kept + rows, one.peak = kept + 2 * rows, one.acc = kept + 3 * rows;
    return one;
}

/* The running sum of head h does not depend on the heads beside it. */
static void check_head_alone(check *c, problem *p) {
    int h = usp_check_pick(c, p->args.heads), same = 1;
    size_t rows = (size_t)(p->q.tokens * p->q.batch), dim = (size_t)p->v.dim, heads = (size_t)p->q.heads;
    float *kept = usp_check_poisoned(rows * (3 + dim));
    usp_tensor q = p->q.view;
    q.data = usp_cpu_row(&p->q.view, p->q.dtype, 0, 0, h);
    usp_check_forward(c, p, 1, 0);
    p->args.acc = p->acc, p->args.last = 0;
    usp_softmax one = alone(&p->args, h, &q, kept);
    c->device->ops->softmax_forward(c->device, &p->args, NULL);
    c->device->ops->softmax_forward(c->device, &one, NULL);
    for (size_t i = 0; i < rows; i++)
        same &= !memcmp(one.acc + i * dim, p->acc + (i * heads + (size_t)h) * dim, dim * sizeof(float));
    for (size_t b = 0, n = (size_t)p->q.tokens; b < (size_t)p->q.batch; b++) {
        same &= !memcmp(one.top + b * n, p->top + (b * heads + (size_t)h) * n, n * sizeof(float));
        same &= !memcmp(one.sum + b * n, p->sum + (b * heads + (size_t)h) * n, n * sizeof(float));
    }
    usp_check_verdict(c, same, "what is kept of a head depends on the heads beside it");
    free(kept);
}

static extras extras_draw(check *c) {
    int plain = !usp_check_pick(c, 3), share = 1 + usp_check_pick(c, 3);
    if (plain) return (extras){0};
    return (extras){!usp_check_pick(c, share), !usp_check_pick(c, share), !usp_check_pick(c, share),
                    !usp_check_pick(c, share), !usp_check_pick(c, share)};
}

void usp_check_softmax(check *c, usp_dtype dtype, int dim, int value_dim, int queries, int keys) {
    problem p = usp_check_problem(c, dtype, dim, value_dim, queries, keys, extras_draw(c));
    int wrong = c->failures;
    usp_check_reference(&p);
    for (int blocks = 1; blocks <= 4; blocks++) {
        check_forward(c, &p, blocks);
        check_backward(c, &p, blocks);
    }
    check_delta(c, &p);
    check_head_alone(c, &p);
    if (c->failures > wrong)
        fprintf(stderr, "    dims %d, %d, %d queries, %d keys, tree %d, cap %d slopes %d sinks %d dlse %d dropout %d\n",
                dim, value_dim, queries, keys, p.pairs.tree, p.has.cap, p.has.slopes, p.has.sinks, p.has.dlse,
                p.has.dropout);
    usp_check_problem_free(c, &p);
}

/* ---- what a NaN reaches ------------------------------------------------------------------------------------------ */

/* The references' loops carry it to what depends on it. */
void usp_check_softmax_poison(check *c) {
    usp_dtype dtype = (usp_dtype)usp_check_pick(c, 3);
    extras has = {usp_check_pick(c, 2), usp_check_pick(c, 2), usp_check_pick(c, 2), usp_check_pick(c, 2), 0};
    int queries = 1 + usp_check_pick(c, 150), keys = 1 + usp_check_pick(c, 150), wrong = c->failures;
    problem p = usp_check_problem(c, dtype, 1 + usp_check_pick(c, 40), 1 + usp_check_pick(c, 40), queries, keys, has);
    const tensor *inputs[] = {&p.q, &p.k, &p.v, &p.dout}, *t = inputs[usp_check_pick(c, 4)];
    usp_check_write(t, usp_check_pick(c, t->tokens), usp_check_pick(c, t->batch), usp_check_pick(c, t->heads),
                    usp_check_pick(c, t->dim), (double)NAN);
    usp_check_reference(&p);
    check_forward(c, &p, 1 + usp_check_pick(c, 3));
    check_backward(c, &p, 1 + usp_check_pick(c, 3));
    if (c->failures > wrong)
        fprintf(stderr, "    where %s has a NaN\n", t == &p.q ? "q" : t == &p.k ? "k" : t == &p.v ? "v" : "dout");
    usp_check_problem_free(c, &p);
}

/* ---- exactness --------------------------------------------------------------------------------------------------- */

enum { SHARED = 7 }; /* the dimension in which all keys are large, and dq is a difference of large numbers */

/* Relative RMS error of a tensor in its other dimensions. */
static double error_of(const tensor *t) {
    double square = 0, truth = 0;
    for (int n = 0; n < t->tokens * t->batch * t->heads; n++) {
        int token = n / t->heads / t->batch, b = n / t->heads % t->batch, h = n % t->heads;
        const double *row = usp_check_truth(t, token, b, h);
        for (int i = 0; i < t->dim; i++) {
            double off = usp_check_read(t, token, b, h, i) - row[i];
            if (i != SHARED) square += off * off, truth += row[i] * row[i];
        }
    }
    return sqrt(square / truth);
}

/* Keys share an offset that makes every score about `size` larger. */
static problem make_large(check *c, double size, int sign) {
    problem p = usp_check_problem(c, USP_F32, 64, 64, 150, 320, (extras){0});
    for (int n = 0; n < p.q.tokens * p.q.batch * p.q.heads; n++)
        usp_check_write(&p.q, n / p.q.heads / p.q.batch, n / p.q.heads % p.q.batch, n % p.q.heads, SHARED, 1);
    for (int n = 0; n < p.k.tokens * p.k.batch * p.k.heads; n++)
        usp_check_write(&p.k, n / p.k.heads / p.k.batch, n / p.k.heads % p.k.batch, n % p.k.heads, SHARED,
                        sign * size / (double)p.args.scale);
    for (int i = 0; i < p.pairs.queries; i++) p.pairs.low[i] = INT32_MIN, p.pairs.high[i] = INT32_MAX;
    p.pairs.tree = 0;
    usp_check_reference(&p);
    return p;
}

/* As layers do: delta is of what forward wrote. */
static double pass_error(check *c, problem *p, int blocks) {
    usp_check_forward(c, p, blocks, 1);
    c->device->ops->softmax_delta(c->device, &p->args, p->delta_got, NULL);
    for (size_t i = 0; i < usp_check_stats(p); i++) p->delta[i] = (double)p->delta_got[i];
    usp_check_backward(c, p, blocks, 1);
    return error_of(&p->dq);
}

/* The error of dq, which lies in the scores, does not grow with the number of folds. */
static void check_size(check *c, double size, int sign) {
    const int blocks[] = {1, 2, 16};
    problem p = make_large(c, size, sign);
    double error[3];
    for (int i = 0; i < 3; i++) error[i] = pass_error(c, &p, blocks[i]);
    if (usp_cpu_panel(c->device) == usp_panel_portable())
        printf("lse %+.0e: error of dq %.2e in one block, %.2e in 2, %.2e in 16\n", sign * size, error[0], error[1],
               error[2]);
    for (int i = 1; i < 3; i++)
        usp_check_verdict(c, error[i] <= 1.5 * error[0], "lse %+.0e: dq is %.2e off in %d blocks, %.2e in one",
                          sign * size, error[i], blocks[i], error[0]);
    usp_check_verdict(c, error[0] <= 2e-6 + 4e-7 * size, "lse %+.0e: dq is %.2e off", sign * size, error[0]);
    usp_check_problem_free(c, &p);
}

void usp_check_softmax_exactness(check *c) {
    for (double size = 1e2; size <= 1e5; size *= 10)
        for (int sign = -1; sign <= 1; sign += 2) check_size(c, size, sign);
}
