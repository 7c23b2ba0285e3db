/* oracle.c - attention by its definition, in double precision: softmax row by row, linear attention token by token.
 * Knows nothing of ranks; written to be read, not to be fast. */
#include "oracle.h"
#include "dropout.h"

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

/* ---- masks ------------------------------------------------------------------------------------------------------- */

/* A document's tokens among queries or keys. */
typedef struct extent {
    int64_t begin, end;
} extent;

static extent extent_of(const int64_t *ends, int64_t d) {
    return (extent){d ? ends[d - 1] : 0, ends[d]};
}

/* `documents` where a token belongs to none. */
static int64_t document_of(const int64_t *ends, int64_t documents, int64_t token) {
    int64_t d = 0;
    while (d < documents && ends[d] <= token) d++;
    return d;
}

/* Is `elder` the document itself or an ancestor of it? */
static int is_family(const usp_oracle *o, int64_t document, int64_t elder) {
    while (document >= 0 && document != elder) document = o->parents ? o->parents[document] : -1;
    return document == elder;
}

int usp_oracle_allows(const usp_oracle *o, int64_t query, int64_t key) {
    const int64_t *key_ends = o->key_ends ? o->key_ends : o->ends;
    extent queries = {0, o->tokens}, keys = {0, o->keys};
    int64_t prefix = 0;
    if (o->documents) {
        int64_t d = document_of(o->ends, o->documents, query), e = document_of(key_ends, o->documents, key);
        if (d == o->documents || e == o->documents || !is_family(o, d, e)) return 0;
        queries = extent_of(o->ends, d), keys = extent_of(key_ends, d);
        prefix = o->prefixes ? o->prefixes[d] : 0;
    }
    int64_t diagonal = o->bottom_right ? keys.end - (queries.end - query) : keys.begin + query - queries.begin;
    if (o->left && key < diagonal - (o->left > 0 ? o->left : 0)) return 0;
    if (!o->causal) return !o->right || key <= diagonal + (o->right > 0 ? o->right : 0);
    return key <= diagonal || (key >= keys.begin && key < keys.begin + prefix);
}

/* Where ALiBi counts from. */
static int64_t diagonal_of(const usp_oracle *o, int64_t query) {
    const int64_t *key_ends = o->key_ends ? o->key_ends : o->ends;
    int64_t d = o->documents ? document_of(o->ends, o->documents, query) : 0;
    if (!o->documents || d == o->documents) return o->bottom_right ? query + o->keys - o->tokens : query;
    extent queries = extent_of(o->ends, d), keys = extent_of(key_ends, d);
    return o->bottom_right ? keys.end - (queries.end - query) : keys.begin + query - queries.begin;
}

/* ---- softmax ----------------------------------------------------------------------------------------------------- */

/* One query's pairs: which are allowed, their scores, the slope of the soft cap, and what dropout makes of a weight. */
typedef struct pairs {
    unsigned char *allowed;
    double *score, *slope, *kept;
} pairs;

static void score_pair(const usp_oracle *o, rows r, int b, int h, int64_t i, int64_t j, const pairs *p) {
    double s = o->scale * dot(o->q + r.q + i * r.q_step, o->k + r.k + j * r.k_step, o->dim);
    p->slope[j] = p->kept[j] = 1;
    if (o->soft_cap > 0) {
        double bent = tanh(s / o->soft_cap);
        s = o->soft_cap * bent;
        p->slope[j] = 1 - bent * bent;
    }
    if (o->slopes) s -= (double)o->slopes[h] * fabs((double)(diagonal_of(o, i) - j));
    p->score[j] = s;
    if (o->dropout == 0) return;
    uint64_t row =
        usp_dropout_row(o->dropout_state[0], o->dropout_state[1], (uint32_t)(b * usp_oracle_heads(o) + h), (uint32_t)i);
    int keep = usp_dropout_number(row, (uint32_t)j) >= usp_dropout_limit(o->dropout);
    p->kept[j] = keep ? 1 / (1 - (double)usp_dropout_rate(o->dropout)) : 0;
}

/* Scores of one query, their log-sum-exp with the sink, and their largest. */
static double scores_of(const usp_oracle *o, rows r, int b, int h, int64_t i, const pairs *p, double *largest) {
    double sink = o->sinks ? (double)o->sinks[h] : -INFINITY, most = sink, sum = 0;
    for (int64_t j = 0; j < o->keys; j++) {
        p->allowed[j] = (unsigned char)usp_oracle_allows(o, i, j);
        if (!p->allowed[j]) continue;
        score_pair(o, r, b, h, i, j, p);
        most = p->score[j] > most || isnan(p->score[j]) ? p->score[j] : most;
        if (p->score[j] > *largest) *largest = p->score[j];
    }
    if (most == -INFINITY) return -INFINITY;
    for (int64_t j = 0; j < o->keys; j++)
        if (p->allowed[j]) sum += exp(p->score[j] - most);
    return most + log(sum + exp(sink - most));
}

static void softmax_row(const usp_oracle *o, rows r, int b, int h, int64_t i, const pairs *p, double *lse) {
    double *out = o->out + r.out + i * r.out_step;
    double largest = -INFINITY;
    *lse = scores_of(o, r, b, h, i, p, &largest);
    if (o->max_logit && largest > o->max_logit[h]) o->max_logit[h] = largest;
    memset(out, 0, (size_t)o->value_dim * sizeof(double));
    for (int64_t j = 0; j < o->keys; j++)
        if (p->allowed[j])
            add_scaled(out, rounded(o, exp(p->score[j] - *lse) * p->kept[j]), o->v + r.v + j * r.v_step, o->value_dim);
    round_all(o, out, o->value_dim);
}

static void softmax_row_backward(const usp_oracle *o, rows r, int b, int h, int64_t i, const pairs *p) {
    const double *dout = o->dout + r.out + i * r.out_step, *q = o->q + r.q + i * r.q_step;
    double largest = 0, lse = scores_of(o, r, b, h, i, p, &largest);
    double delta = dot(dout, o->out + r.out + i * r.out_step, o->value_dim);
    if (o->dlse) delta -= o->dlse[(b * o->tokens + i) * o->heads + h];
    for (int64_t j = 0; j < o->keys; j++) {
        if (!p->allowed[j]) continue;
        double weight = exp(p->score[j] - lse);
        double dp = p->kept[j] * dot(dout, o->v + r.v + j * r.v_step, o->value_dim);
        double ds = o->scale * rounded(o, weight * (dp - delta) * p->slope[j]);
        add_scaled(o->dv + r.v + j * r.v_step, rounded(o, weight * p->kept[j]), dout, o->value_dim);
        add_scaled(o->dq + r.q + i * r.q_step, ds, o->k + r.k + j * r.k_step, o->dim);
        add_scaled(o->dk + r.k + j * r.k_step, ds, q, o->dim);
    }
    if (o->sinks && o->dsinks && lse != -INFINITY) o->dsinks[h] -= exp((double)o->sinks[h] - lse) * delta;
}

static void softmax_head(const usp_oracle *o, int b, int h, const pairs *p) {
    rows r = rows_of(o, b, h);
    for (int64_t i = 0; i < o->tokens; i++) {
        softmax_row(o, r, b, h, i, p, o->lse + (b * o->tokens + i) * o->heads + h);
        softmax_row_backward(o, r, b, h, i, p);
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

/* Does a state end between token i - 1 and token i? */
static int is_cut(const usp_oracle *o, int64_t i) {
    return i > 0 && i < o->tokens && o->documents &&
           document_of(o->ends, o->documents, i - 1) != document_of(o->ends, o->documents, i);
}

/* Tokens behind the last document have no state. */
static int is_nobody(const usp_oracle *o, int64_t i) {
    return o->documents && document_of(o->ends, o->documents, i) == o->documents;
}

static void clear(const usp_oracle *o, double *state) {
    memset(state, 0, (size_t)o->dim * (size_t)o->value_dim * sizeof(double));
}

/* Walks the tokens upward: out and dq from the state; `state` ends as the final state. */
static void linear_up(const usp_oracle *o, rows r, double lambda, double *state) {
    if (!o->causal)
        for (int64_t j = 0; j < o->keys; j++) push(o, state, 1, o->k + r.k + j * r.k_step, o->v + r.v + j * r.v_step);
    for (int64_t i = 0; i < o->tokens; i++) {
        if (is_cut(o, i)) clear(o, state);
        if (is_nobody(o, i)) continue;
        if (o->causal) push(o, state, lambda, o->k + r.k + i * r.k_step, o->v + r.v + i * r.v_step);
        apply_transposed(o, o->out + r.out + i * r.out_step, o->scale, state, o->q + r.q + i * r.q_step);
        apply(o, o->dq + r.q + i * r.q_step, o->scale, state, o->dout + r.out + i * r.out_step);
    }
}

/* Walks the tokens downward with the adjoint of the state: dk and dv; it ends as the gradient of the initial state. */
static void linear_down(const usp_oracle *o, rows r, double lambda, double *adjoint) {
    double *scaled = malloc((size_t)o->dim * sizeof(double));
    for (int64_t i = o->tokens - 1; i >= 0; i--) {
        if (is_cut(o, i + 1)) clear(o, adjoint);
        if (is_nobody(o, i)) continue;
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

/* Is the token in the document of the last one, or of the first one? */
static int reaches_end(const usp_oracle *o, int64_t i) {
    for (int64_t j = i + 1; j < o->tokens; j++)
        if (is_cut(o, j)) return 0;
    return !is_nobody(o, i);
}

static int reaches_begin(const usp_oracle *o, int64_t i) {
    for (int64_t j = 1; j <= i; j++)
        if (is_cut(o, j)) return 0;
    return !is_nobody(o, i);
}

/* What a computation in blocks would lose: the decayed operand of a state is stored in the lower precision. */
static void blocked_states(const usp_oracle *o, rows r, double lambda, double *final, double *dinitial) {
    double *a = malloc((size_t)o->dim * sizeof(double));
    int64_t first = 0, last = o->tokens; /* tokens that reach the final state; that the initial state reaches */
    while (first < o->tokens && reaches_end(o, first) == 0) first++;
    while (last > 0 && reaches_begin(o, last - 1) == 0) last--;
    double all = last == o->tokens && first == 0 ? pow(lambda, (double)o->tokens) : 0;
    for (int x = 0; x < o->dim * o->value_dim; x++) final[x] *= all;
    for (int64_t j = first; j < o->keys; j++) {
        double weight = o->causal ? pow(lambda, (double)(o->keys - 1 - j)) : 1;
        for (int x = 0; x < o->dim; x++) a[x] = rounded(o, weight * o->k[r.k + j * r.k_step + x]);
        push(o, final, 1, a, o->v + r.v + j * r.v_step);
    }
    for (int x = 0; x < o->dim * o->value_dim; x++) dinitial[x] *= all;
    for (int64_t i = 0; i < last; i++) {
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
    size_t keys = (size_t)o->keys + 1;
    double *numbers = malloc(3 * keys * sizeof(double));
    pairs p = {malloc(keys), numbers, numbers + keys, numbers + 2 * keys};
    for (int h = 0; h < heads && o->dsinks; h++) o->dsinks[h] = 0;
    for (int h = 0; h < heads && o->max_logit; h++) o->max_logit[h] = -INFINITY;
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
                softmax_head(o, b, h, &p);
        }
    if (o->linear) round_all(o, o->out, out);
    round_all(o, o->dq, q);
    round_all(o, o->dk, k);
    round_all(o, o->dv, v);
    free(p.allowed);
    free(numbers);
}
