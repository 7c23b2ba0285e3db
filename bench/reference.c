/* reference.c - one row at a time: a query row against all keys, or a key row against all queries.
 * Both are the same sum over the other side's tokens, so forward and backward are one loop. */
#include "reference.h"
#include "number.h"
#include <dropout.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum {
    QUERY_HEADS = 4,    /* sampled (batch, head) pairs of out and dq */
    KEY_HEADS = 2,      /* and of dk and dv, where a pair costs a table of all queries */
    SAMPLED_TOKENS = 8, /* tokens of a rank */
    EXACT_TOKENS = 2048 /* up to here all row statistics are in double */
};

/* Rows of one side, for one head of the output. Query rows: x = q, y = dout, dx = dq, dy = out. Key rows: x = k, y = v,
 * dx = dk, dy = dv. */
typedef struct usp_rows {
    int keys; /* 1: these are key rows */
    int64_t count;
    int64_t *token, *local;    /* [count]: global and own index */
    double *x, *y, *dx, *dy;   /* [count, dim] and [count, value_dim] */
    double *dx_size, *dy_size; /* [count]: squares of the natural size of an element of dx, dy */
    double *lse, *delta, *max; /* [count], query rows of softmax */
} usp_rows;

/* What a query and a key say to each other. */
typedef struct usp_pair {
    double weight, grad;           /* of y in dy, of x in dx */
    double weight_size, grad_size; /* squares of their natural sizes */
} usp_pair;

/* ---- arithmetic ------------------------------------------------------------------------------------------------ */

static double dot(const double *a, const double *b, int count) {
    double sum[4] = {0};
    int i = 0;
    for (; i + 4 <= count; i += 4)
        for (int lane = 0; lane < 4; lane++) sum[lane] += a[i + lane] * b[i + lane];
    for (; i < count; i++) sum[0] += a[i] * b[i];
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

static void add_scaled(double *sum, double factor, const double *x, int count) {
    for (int i = 0; i < count; i++) sum[i] += factor * x[i];
}

static double scale_of(const usp_reference *r) {
    const usp_case *c = r->config;
    return r->layer->scale > 0 ? (double)r->layer->scale : c->kind == USP_SOFTMAX ? 1 / sqrt(c->dim) : 1;
}

/* ---- pairs: what the layer's fields mean, by their definitions --------------------------------------------------- */

/* How far a window reaches. */
static int64_t reach(int64_t window) {
    return window == USP_NO_KEYS ? 0 : window ? window : INT64_MAX;
}

static int allowed(const usp_reference *r, int64_t query, int64_t key) {
    if (r->document && (r->document[query] < 0 || r->document[query] != r->document[key])) return 0;
    if (r->config->mask == USP_MASK_CAUSAL && key > query) return 0;
    return query - key <= reach(r->layer->window_left) && key - query <= reach(r->layer->window_right);
}

/* The score of a pair from scale q.k, and its derivative. */
static double score_of(const usp_reference *r, int head, int64_t distance, double product, double *slope) {
    double cap = r->layer->soft_cap, bend = cap > 0 ? tanh(product / cap) : 0;
    *slope = cap > 0 ? 1 - bend * bend : 1;
    return (cap > 0 ? cap * bend : product) - (r->layer->slopes ? r->layer->slopes[head] * fabs((double)distance) : 0);
}

/* By what dropout multiplies the pair's probability. */
static double kept(const usp_reference *r, int batch, int head, int64_t query, int64_t key) {
    float rate = usp_dropout_rate(r->layer->dropout);
    if (!(rate > 0)) return 1;
    uint32_t line = (uint32_t)(batch * r->config->heads + head);
    uint64_t row = usp_dropout_row(r->dropout_state[0], r->dropout_state[1], line, (uint32_t)query);
    return usp_dropout_number(row, (uint32_t)key) < usp_dropout_limit(rate) ? 0 : 1 / (1 - (double)rate);
}

/* P = exp(s - lse), dS = P (kept dP - delta); dP has variance value_dim for inputs of variance 1. Sizes are those of a
 * pair of which one does not know whether it is kept. */
static usp_pair softmax_pair(const usp_reference *r, double score, double slope, double keep, double dp,
                             const double *statistics) {
    double p = exp(score - statistics[0]), delta = statistics[1], factor = scale_of(r) * slope * p;
    double spread = 1 / (1 - (double)r->layer->dropout);
    return (usp_pair){.weight = keep * p,
                      .grad = factor * (keep * dp - delta),
                      .weight_size = spread * p * p,
                      .grad_size = factor * factor * (spread * (dp * dp + r->config->value_dim) + delta * delta)};
}

/* out = sum lambda^distance (q.k) v; q.k has variance dim. */
static usp_pair linear_pair(const usp_reference *r, double score, double dp, double decay) {
    double scale = scale_of(r);
    return (usp_pair){.weight = decay * score,
                      .grad = scale * decay * dp,
                      .weight_size = decay * decay * (score * score + scale * scale * r->config->dim),
                      .grad_size = scale * scale * decay * decay * (dp * dp + r->config->value_dim)};
}

/* ---- rows ------------------------------------------------------------------------------------------------------ */

static void close_rows(usp_rows *rows) {
    free(rows->token);
    free(rows->x);
}

static usp_status open_rows(const usp_case *c, int keys, int64_t count, usp_tool_error *error, usp_rows *rows) {
    size_t n = (size_t)count, d = (size_t)c->dim, e = (size_t)c->value_dim;
    *rows = (usp_rows){.keys = keys, .count = count};
    rows->token = usp_tool_alloc(error, n, 2 * sizeof *rows->token);
    rows->x = usp_tool_alloc(error, n, (2 * d + 2 * e + 5) * sizeof *rows->x);
    if (!rows->token || !rows->x) {
        close_rows(rows);
        return USP_NO_MEMORY;
    }
    rows->local = rows->token + n;
    rows->y = rows->x + n * d;
    rows->dx = rows->y + n * e;
    rows->dy = rows->dx + n * d;
    rows->dx_size = rows->dy + n * e;
    rows->dy_size = rows->dx_size + n;
    rows->lse = rows->dy_size + n;
    rows->delta = rows->lse + n;
    rows->max = rows->delta + n;
    return USP_OK;
}

static void place_row(const usp_reference *r, usp_rows *rows, int64_t row, int64_t local) {
    rows->local[row] = local;
    rows->token[row] = usp_sequence_to_global(r->sequence, r->rank, local);
}

/* First, last, the two beside the middle (where the halves of a zigzag meet), and random ones. */
static void sample_tokens(const usp_reference *r, uint64_t seed, int64_t tokens, usp_rows *rows) {
    const int64_t fixed[4] = {0, tokens - 1, tokens / 2, (tokens - 1) / 2};
    for (int64_t i = 0; i < rows->count; i++) {
        int64_t random = (int64_t)(usp_number_hash(seed, (uint64_t)i) % (uint64_t)tokens);
        place_row(r, rows, i, tokens <= SAMPLED_TOKENS ? i : i < 4 ? fixed[i] : random);
    }
}

/* The input that a result has the heads and dimension of. */
static usp_input shape_of(usp_result_tensor tensor) {
    static const usp_input like[] = {USP_INPUT_DOUT, USP_INPUT_Q, USP_INPUT_K, USP_INPUT_V};
    return like[tensor];
}

/* The head of an input that output head `head` reads. */
static int read_head(const usp_case *c, usp_input input, int head) {
    return (int)((int64_t)head * usp_inputs_heads(c, input) / usp_inputs_out_heads(c));
}

static void load_side(const usp_case *c, int keys, int batch, int64_t token, int head, double *x, double *y) {
    usp_input first = keys ? USP_INPUT_K : USP_INPUT_Q, second = keys ? USP_INPUT_V : USP_INPUT_DOUT;
    usp_inputs_row(c, first, batch, token, read_head(c, first, head), x);
    usp_inputs_row(c, second, batch, token, read_head(c, second, head), y);
}

static void load_rows(const usp_case *c, int batch, int head, usp_rows *rows) {
    for (int64_t i = 0; i < rows->count; i++)
        load_side(c, rows->keys, batch, rows->token[i], head, rows->x + i * c->dim, rows->y + i * c->value_dim);
}

/* ---- row statistics: lse and delta = sum of P dP --------------------------------------------------------------- */

/* Before finish_statistics `lse` is the sum of exp(score - max), and `delta` that of exp(score - max) dP. */
static void fold_statistics(usp_rows *rows, int64_t row, double score, double dp) {
    if (score > rows->max[row]) {
        double shrink = exp(rows->max[row] - score);
        rows->lse[row] *= shrink;
        rows->delta[row] *= shrink;
        rows->max[row] = score;
    }
    double weight = exp(score - rows->max[row]);
    rows->lse[row] += weight;
    rows->delta[row] += weight * dp;
}

static void finish_statistics(usp_rows *rows) {
    for (int64_t i = 0; i < rows->count; i++) {
        rows->delta[i] /= rows->lse[i];
        rows->lse[i] = rows->max[i] + log(rows->lse[i]);
    }
}

static void fold_key(const usp_reference *r, int batch, int head, usp_rows *rows, int64_t row, int64_t key,
                     const double *x) {
    int d = r->config->dim, e = r->config->value_dim;
    int64_t query = rows->token[row];
    double slope, product = scale_of(r) * dot(rows->x + row * d, x, d);
    if (!allowed(r, query, key)) return;
    double score = score_of(r, head, query - key, product, &slope);
    fold_statistics(rows, row, score, kept(r, batch, head, query, key) * dot(rows->y + row * e, x + d, e));
}

static usp_status compute_statistics(const usp_reference *r, int batch, int head, usp_tool_error *error,
                                     usp_rows *rows) {
    const usp_case *c = r->config;
    int d = c->dim, e = c->value_dim;
    double *key = usp_tool_alloc(error, (size_t)(d + e), sizeof *key);
    if (!key) return USP_NO_MEMORY;
    for (int64_t i = 0; i < rows->count; i++) rows->lse[i] = rows->delta[i] = 0, rows->max[i] = -INFINITY;
    for (int64_t t = 0; t < c->seq; t++) {
        load_side(c, 1, batch, t, head, key, key + d);
        for (int64_t i = 0; i < rows->count; i++) fold_key(r, batch, head, rows, i, t, key);
    }
    for (int64_t i = 0; i < rows->count && r->sinks; i++) fold_statistics(rows, i, r->sinks[head], 0);
    finish_statistics(rows);
    free(key);
    return USP_OK;
}

/* (lse, delta) of all own queries of a head, in double from the whole tensors. [local_tokens, 2] */
static usp_status exact_table(const usp_reference *r, int batch, int head, usp_tool_error *error, double *table) {
    usp_rows rows;
    USP_TRY(open_rows(r->config, 0, usp_sequence_local_tokens(r->sequence, r->rank), error, &rows));
    for (int64_t i = 0; i < rows.count; i++) place_row(r, &rows, i, i);
    load_rows(r->config, batch, head, &rows);
    usp_status status = compute_statistics(r, batch, head, error, &rows);
    for (int64_t i = 0; i < rows.count; i++) {
        table[2 * i] = rows.lse[i];
        table[2 * i + 1] = rows.delta[i];
    }
    close_rows(&rows);
    return status;
}

/* The same from the layer's out and lse. */
static usp_status layer_table(const usp_reference *r, int batch, int head, usp_tool_error *error, double *table) {
    const usp_case *c = r->config;
    const float *lse = r->lse;
    int64_t tokens = usp_sequence_local_tokens(r->sequence, r->rank);
    double *dout = usp_tool_alloc(error, (size_t)c->value_dim, sizeof *dout);
    if (!dout) return USP_NO_MEMORY;
    for (int64_t t = 0; t < tokens; t++) {
        size_t first = (size_t)(((batch * tokens + t) * c->heads + head) * c->value_dim);
        usp_inputs_row(c, USP_INPUT_DOUT, batch, usp_sequence_to_global(r->sequence, r->rank, t), head, dout);
        table[2 * t] = lse[((int64_t)batch * c->heads + head) * tokens + t];
        table[2 * t + 1] = 0;
        for (int i = 0; i < c->value_dim; i++)
            table[2 * t + 1] += dout[i] * usp_number_load(c->dtype, r->out, first + (size_t)i);
    }
    free(dout);
    return USP_OK;
}

/* Collective. (lse, delta) of every query of the sequence for one head; NULL for linear, which needs none. */
static usp_status gather_table(const usp_reference *r, int batch, int head, usp_tool_error *error, double **table) {
    size_t local = (size_t)usp_sequence_local_tokens(r->sequence, r->rank);
    *table = NULL;
    if (r->config->kind == USP_LINEAR) return USP_OK;
    double *whole = usp_tool_alloc(error, (size_t)r->config->seq + local, 2 * sizeof *whole);
    if (!whole) return USP_NO_MEMORY;
    double *mine = whole + 2 * r->config->seq;
    usp_status status = r->config->seq <= EXACT_TOKENS ? exact_table(r, batch, head, error, mine)
                                                       : layer_table(r, batch, head, error, mine);
    if (status == USP_OK) status = usp_sequence_gather(r->sequence, 1, 2 * sizeof *whole, mine, whole);
    if (status == USP_OK)
        *table = whole;
    else
        free(whole);
    return status;
}

/* ---- results of rows ------------------------------------------------------------------------------------------- */

/* What a row and token `token` of the other side say to each other; statistics: those of all queries, for key rows. */
static usp_pair pair_of(const usp_reference *r, int batch, int head, const usp_rows *rows, int64_t row, int64_t token,
                        const double *other, const double *statistics) {
    int d = r->config->dim, e = r->config->value_dim;
    int64_t query = rows->keys ? token : rows->token[row], key = rows->keys ? rows->token[row] : token;
    double product = scale_of(r) * dot(rows->x + row * d, other, d), dp = dot(rows->y + row * e, other + d, e);
    if (r->config->kind == USP_LINEAR) {
        const float *decay = r->layer->decay;
        return linear_pair(r, product, dp, decay ? exp(decay[head] * (double)(query - key)) : 1);
    }
    const double own[2] = {rows->lse[row], rows->delta[row]};
    double slope, score = score_of(r, head, query - key, product, &slope);
    return softmax_pair(r, score, slope, kept(r, batch, head, query, key), dp,
                        rows->keys ? statistics + 2 * token : own);
}

static void accumulate_pair(const usp_reference *r, int batch, int head, usp_rows *rows, int64_t row, int64_t token,
                            const double *other, const double *statistics) {
    int d = r->config->dim, e = r->config->value_dim;
    int64_t own = rows->token[row];
    if (!(rows->keys ? allowed(r, token, own) : allowed(r, own, token))) return;
    usp_pair pair = pair_of(r, batch, head, rows, row, token, other, statistics);
    add_scaled(rows->dx + row * d, pair.grad, other, d);
    add_scaled(rows->dy + row * e, pair.weight, other + d, e);
    rows->dx_size[row] += pair.grad_size;
    rows->dy_size[row] += pair.weight_size;
}

/* Adds what all tokens of the other side give to the rows, for one head of the output. Collective for key rows. */
static usp_status accumulate(const usp_reference *r, int batch, int head, usp_tool_error *error, usp_rows *rows) {
    const usp_case *c = r->config;
    double *table = NULL;
    load_rows(c, batch, head, rows);
    if (rows->keys)
        USP_TRY(gather_table(r, batch, head, error, &table));
    else if (c->kind == USP_SOFTMAX)
        USP_TRY(compute_statistics(r, batch, head, error, rows));
    double *other = usp_tool_alloc(error, (size_t)(c->dim + c->value_dim), sizeof *other);
    for (int64_t t = 0; t < c->seq && other; t++) {
        load_side(c, !rows->keys, batch, t, head, other, other + c->dim);
        for (int64_t i = 0; i < rows->count; i++) accumulate_pair(r, batch, head, rows, i, t, other, table);
    }
    usp_status status = other ? USP_OK : USP_NO_MEMORY;
    free(other);
    free(table);
    return status;
}

/* ---- comparison ------------------------------------------------------------------------------------------------ */

double usp_reference_tolerance(usp_dtype dtype) {
    return dtype == USP_F32 ? 1e-4 : 4 * usp_number_epsilon(dtype);
}

static void compare(const usp_case *c, double found, double expected, double size, usp_verdict *verdict) {
    double error = fabs(found - expected) / (fabs(expected) + size);
    if (!isfinite(error)) error = INFINITY;
    verdict->checked++;
    verdict->wrong += !(error <= usp_reference_tolerance(c->dtype));
    if (error > verdict->max_error) verdict->max_error = error;
}

static void compare_rows(const usp_reference *r, usp_result_tensor tensor, int batch, int head, const usp_rows *rows,
                         usp_verdict *verdict) {
    const void *tensors[] = {r->out, r->dq, r->dk, r->dv};
    const float *lse = r->lse;
    const usp_case *c = r->config;
    int is_x = tensor == USP_CHECK_DQ || tensor == USP_CHECK_DK;
    int heads = usp_inputs_heads(c, shape_of(tensor)), dim = usp_inputs_dim(c, shape_of(tensor));
    int64_t tokens = usp_sequence_local_tokens(r->sequence, r->rank);
    const double *expected = is_x ? rows->dx : rows->dy, *size = is_x ? rows->dx_size : rows->dy_size;
    for (int64_t i = 0; i < rows->count; i++) {
        int64_t first = ((batch * tokens + rows->local[i]) * heads + head) * dim;
        for (int k = 0; k < dim; k++)
            compare(c, usp_number_load(c->dtype, tensors[tensor], (size_t)(first + k)), expected[i * dim + k],
                    sqrt(size[i]), verdict);
        if (tensor == USP_CHECK_OUT && c->kind == USP_SOFTMAX)
            compare(c, lse[((int64_t)batch * heads + head) * tokens + rows->local[i]], rows->lse[i], 1, verdict);
    }
}

/* All output heads that read head `head` of the checked tensor's input add to the row. */
static usp_status check_head(const usp_reference *r, usp_result_tensor tensor, int batch, int head, uint64_t seed,
                             usp_tool_error *error, usp_verdict *verdict) {
    int64_t tokens = usp_sequence_local_tokens(r->sequence, r->rank);
    usp_rows rows;
    USP_TRY(
        open_rows(r->config, tensor >= USP_CHECK_DK, tokens < SAMPLED_TOKENS ? tokens : SAMPLED_TOKENS, error, &rows));
    sample_tokens(r, seed, tokens, &rows);
    usp_status status = USP_OK;
    for (int h = 0; h < usp_inputs_out_heads(r->config) && status == USP_OK; h++)
        if (read_head(r->config, shape_of(tensor), h) == head) status = accumulate(r, batch, h, error, &rows);
    if (status == USP_OK) compare_rows(r, tensor, batch, head, &rows, verdict);
    close_rows(&rows);
    return status;
}

usp_status usp_reference_check(const usp_reference *r, usp_result_tensor tensor, usp_tool_error *error,
                               usp_verdict *verdict) {
    int heads = usp_inputs_heads(r->config, shape_of(tensor)), pairs = heads * r->config->batch;
    int most = tensor >= USP_CHECK_DK ? KEY_HEADS : QUERY_HEADS, count = pairs < most ? pairs : most;
    for (int i = 0; i < count; i++) {
        int pair = count == 1 ? 0 : (int)((int64_t)i * (pairs - 1) / (count - 1));
        uint64_t seed = (uint64_t)tensor * 1000003 + (uint64_t)pair;
        USP_TRY(check_head(r, tensor, pair / heads, pair % heads, seed, error, verdict));
    }
    return USP_OK;
}

/* dsinks = - sum over all queries of the sink's probability times delta, which has variance value_dim. */
usp_status usp_reference_check_sinks(const usp_reference *r, usp_tool_error *error, usp_verdict *verdict) {
    const usp_case *c = r->config;
    const float *found = r->dsinks;
    for (int head = 0; head < c->heads && head < KEY_HEADS; head++) {
        double sum = 0, squares = 0;
        for (int batch = 0; batch < c->batch; batch++) {
            double *table = NULL;
            USP_TRY(gather_table(r, batch, head, error, &table));
            for (int64_t t = 0; t < c->seq; t++) {
                double p = exp(r->sinks[head] - table[2 * t]), delta = table[2 * t + 1];
                sum -= p * delta;
                squares += p * p * (delta * delta + c->value_dim);
            }
            free(table);
        }
        compare(c, found[head], sum, sqrt(squares), verdict);
    }
    return USP_OK;
}
