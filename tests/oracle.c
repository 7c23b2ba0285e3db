/* oracle.c - attention by its definition, in double precision: softmax row by row, linear attention token by token.
 * Knows nothing of ranks; written to be read, not to be fast. */
#include "oracle.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

int usp_oracle_heads(const usp_oracle *o) {
    int most = o->heads > o->key_heads ? o->heads : o->key_heads;
    return most > o->value_heads ? most : o->value_heads;
}

/* An operand of a product. */
static double rounded(const usp_oracle *o, double x) {
    return o->round && !o->exact_operands ? o->round(x) : x;
}

static double dot(const double *a, const double *b, int n) {
    double sum = 0;
    for (int i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

static void add_scaled(double *to, double factor, const double *from, int n) {
    for (int i = 0; i < n; i++) to[i] += factor * from[i];
}

static void round_all(const usp_oracle *o, double *x, int64_t n) {
    for (int64_t i = 0; i < n && o->round; i++) x[i] = o->round(x[i]);
}

/* Where output head h of batch b finds its rows: row t is base + t * step. */
typedef struct rows {
    int64_t q, k, v, out;                     /* first rows, in elements */
    int64_t q_step, k_step, v_step, out_step; /* elements from token to token */
} rows;

static rows rows_of(const usp_oracle *o, int b, int h) {
    int all = usp_oracle_heads(o);
    rows r = {.q_step = (int64_t)o->heads * o->dim,
              .k_step = (int64_t)o->key_heads * o->dim,
              .v_step = (int64_t)o->value_heads * o->value_dim,
              .out_step = (int64_t)all * o->value_dim};
    r.q = b * o->tokens * r.q_step + (int64_t)h * o->heads / all * o->dim;
    r.k = b * o->keys * r.k_step + (int64_t)h * o->key_heads / all * o->dim;
    r.v = b * o->keys * r.v_step + (int64_t)h * o->value_heads / all * o->value_dim;
    r.out = b * o->tokens * r.out_step + (int64_t)h * o->value_dim;
    return r;
}

/* ---- softmax ----------------------------------------------------------------------------------------------------- */

static int64_t allowed_keys(const usp_oracle *o, int64_t query) {
    int64_t end = o->causal ? query + 1 : o->keys;
    return end < o->keys ? end : o->keys;
}

/* score[j] of one query, and their log-sum-exp. */
static double scores_of(const usp_oracle *o, rows r, int64_t i, double *score) {
    int64_t keys = allowed_keys(o, i);
    double most = -INFINITY, sum = 0;
    for (int64_t j = 0; j < keys; j++) {
        score[j] = o->scale * dot(o->q + r.q + i * r.q_step, o->k + r.k + j * r.k_step, o->dim);
        most = fmax(most, score[j]);
    }
    for (int64_t j = 0; j < keys; j++) sum += exp(score[j] - most);
    return keys > 0 ? most + log(sum) : -INFINITY;
}

static void softmax_row(const usp_oracle *o, rows r, int64_t i, double *score, double *lse) {
    double *out = o->out + r.out + i * r.out_step;
    int64_t keys = allowed_keys(o, i);
    *lse = scores_of(o, r, i, score);
    memset(out, 0, (size_t)o->value_dim * sizeof(double));
    for (int64_t j = 0; j < keys; j++)
        add_scaled(out, rounded(o, exp(score[j] - *lse)), o->v + r.v + j * r.v_step, o->value_dim);
    round_all(o, out, o->value_dim);
}

static void softmax_row_backward(const usp_oracle *o, rows r, int64_t i, double *score) {
    const double *dout = o->dout + r.out + i * r.out_step, *q = o->q + r.q + i * r.q_step;
    int64_t keys = allowed_keys(o, i);
    double lse = scores_of(o, r, i, score);
    double delta = dot(dout, o->out + r.out + i * r.out_step, o->value_dim);
    for (int64_t j = 0; j < keys; j++) {
        double p = exp(score[j] - lse);
        double dp = dot(dout, o->v + r.v + j * r.v_step, o->value_dim);
        double ds = o->scale * rounded(o, p * (dp - delta));
        add_scaled(o->dv + r.v + j * r.v_step, rounded(o, p), dout, o->value_dim);
        add_scaled(o->dq + r.q + i * r.q_step, ds, o->k + r.k + j * r.k_step, o->dim);
        add_scaled(o->dk + r.k + j * r.k_step, ds, q, o->dim);
    }
}

static void softmax_head(const usp_oracle *o, int b, int h, double *score) {
    rows r = rows_of(o, b, h);
    for (int64_t i = 0; i < o->tokens; i++) {
        softmax_row(o, r, i, score, o->lse + (b * o->tokens + i) * o->heads + h);
        softmax_row_backward(o, r, i, score);
    }
}

/* ---- linear ------------------------------------------------------------------------------------------------------ */

/* state = factor * state + a b^T */
static void push(const usp_oracle *o, double *state, double factor, const double *a, const double *b) {
    for (int x = 0; x < o->dim; x++)
        for (int y = 0; y < o->value_dim; y++)
            state[x * o->value_dim + y] = factor * state[x * o->value_dim + y] + a[x] * b[y];
}

/* to += factor * state b, over value_dim: dq, dk */
static void apply(const usp_oracle *o, double *to, double factor, const double *state, const double *b) {
    for (int x = 0; x < o->dim; x++)
        for (int y = 0; y < o->value_dim; y++) to[x] += factor * rounded(o, state[x * o->value_dim + y]) * b[y];
}

/* to += factor * state^T a, over dim: out, dv */
static void apply_transposed(const usp_oracle *o, double *to, double factor, const double *state, const double *a) {
    for (int x = 0; x < o->dim; x++)
        for (int y = 0; y < o->value_dim; y++) to[y] += factor * rounded(o, state[x * o->value_dim + y]) * a[x];
}

/* Walks the tokens upward: out and dq from the state; `state` ends as the final state. */
static void linear_up(const usp_oracle *o, rows r, double lambda, double *state) {
    if (!o->causal)
        for (int64_t j = 0; j < o->keys; j++) push(o, state, 1, o->k + r.k + j * r.k_step, o->v + r.v + j * r.v_step);
    for (int64_t i = 0; i < o->tokens; i++) {
        if (o->causal) push(o, state, lambda, o->k + r.k + i * r.k_step, o->v + r.v + i * r.v_step);
        apply_transposed(o, o->out + r.out + i * r.out_step, o->scale, state, o->q + r.q + i * r.q_step);
        apply(o, o->dq + r.q + i * r.q_step, o->scale, state, o->dout + r.out + i * r.out_step);
    }
}

/* Walks the tokens downward with the adjoint of the state: dk and dv; it ends as the gradient of the initial state. */
static void linear_down(const usp_oracle *o, rows r, double lambda, double *adjoint) {
    double *scaled = malloc((size_t)o->dim * sizeof(double));
    for (int64_t i = o->tokens - 1; i >= 0; i--) {
        for (int x = 0; x < o->dim; x++) scaled[x] = o->scale * o->q[r.q + i * r.q_step + x];
        push(o, adjoint, 1, scaled, o->dout + r.out + i * r.out_step);
        if (!o->causal) continue;
        apply(o, o->dk + r.k + i * r.k_step, 1, adjoint, o->v + r.v + i * r.v_step);
        apply_transposed(o, o->dv + r.v + i * r.v_step, 1, adjoint, o->k + r.k + i * r.k_step);
        for (int x = 0; x < o->dim * o->value_dim; x++) adjoint[x] *= lambda;
    }
    for (int64_t j = 0; !o->causal && j < o->keys; j++) {
        apply(o, o->dk + r.k + j * r.k_step, 1, adjoint, o->v + r.v + j * r.v_step);
        apply_transposed(o, o->dv + r.v + j * r.v_step, 1, adjoint, o->k + r.k + j * r.k_step);
    }
    free(scaled);
}

/* What a computation in blocks would lose: the decayed operand of a state is stored in the lower precision. */
static void blocked_states(const usp_oracle *o, rows r, double lambda, double *final, double *dinitial) {
    double *a = malloc((size_t)o->dim * sizeof(double));
    double all = pow(lambda, (double)o->tokens);
    for (int x = 0; x < o->dim * o->value_dim; x++) final[x] *= all;
    for (int64_t j = 0; j < o->keys; j++) {
        double weight = o->causal ? pow(lambda, (double)(o->keys - 1 - j)) : 1;
        for (int x = 0; x < o->dim; x++) a[x] = rounded(o, weight * o->k[r.k + j * r.k_step + x]);
        push(o, final, 1, a, o->v + r.v + j * r.v_step);
    }
    for (int x = 0; x < o->dim * o->value_dim; x++) dinitial[x] *= all;
    for (int64_t i = 0; i < o->tokens; i++) {
        double weight = o->scale * pow(lambda, (double)(i + 1));
        for (int x = 0; x < o->dim; x++) a[x] = rounded(o, weight * o->q[r.q + i * r.q_step + x]);
        push(o, dinitial, 1, a, o->dout + r.out + i * r.out_step);
    }
    free(a);
}

static void linear_head(const usp_oracle *o, int b, int h) {
    int heads = usp_oracle_heads(o);
    int64_t elements = (int64_t)o->dim * o->value_dim, at = ((int64_t)b * heads + h) * elements;
    size_t bytes = (size_t)elements * sizeof(double);
    double lambda = o->decay ? exp((double)o->decay[h]) : 1;
    double *state = o->final_state + at, *adjoint = o->dinitial_state + at;
    rows r = rows_of(o, b, h);
    if (o->initial_state) memcpy(state, o->initial_state + at, bytes);
    if (o->dfinal_state) memcpy(adjoint, o->dfinal_state + at, bytes);
    linear_up(o, r, lambda, state);
    linear_down(o, r, lambda, adjoint);
    if (!o->round || o->exact_operands) return;
    memset(state, 0, bytes);
    memset(adjoint, 0, bytes);
    if (o->initial_state) memcpy(state, o->initial_state + at, bytes);
    if (o->dfinal_state) memcpy(adjoint, o->dfinal_state + at, bytes);
    blocked_states(o, r, lambda, state, adjoint);
}

/* ---- both -------------------------------------------------------------------------------------------------------- */

void usp_oracle_run(const usp_oracle *o) {
    int heads = usp_oracle_heads(o);
    int64_t out = o->batch * o->tokens * heads * o->value_dim, q = o->batch * o->tokens * o->heads * o->dim;
    int64_t k = o->batch * o->keys * o->key_heads * o->dim, v = o->batch * o->keys * o->value_heads * o->value_dim;
    size_t states = (size_t)o->batch * (size_t)heads * (size_t)o->dim * (size_t)o->value_dim;
    double *score = malloc(((size_t)o->keys + 1) * sizeof(double));
    memset(o->out, 0, (size_t)out * sizeof(double));
    memset(o->dq, 0, (size_t)q * sizeof(double));
    memset(o->dk, 0, (size_t)k * sizeof(double));
    memset(o->dv, 0, (size_t)v * sizeof(double));
    memset(o->final_state, 0, states * sizeof(double));
    memset(o->dinitial_state, 0, states * sizeof(double));
    for (int b = 0; b < o->batch; b++)
        for (int h = 0; h < heads; h++) {
            if (o->linear)
                linear_head(o, b, h);
            else
                softmax_head(o, b, h, score);
        }
    if (o->linear) round_all(o, o->out, out);
    round_all(o, o->dq, q);
    round_all(o, o->dk, k);
    round_all(o, o->dv, v);
    free(score);
}
