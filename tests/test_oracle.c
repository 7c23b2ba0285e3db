/* test_oracle.c - the truth itself: its gradients by finite differences, for every mask and all that changes scores,
 * and small answers by hand. Runs no layer. */
#include "dropout.h"
#include "oracle.h"
#include "stage.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { ROOM = 192, HEADS = 4 };

/* Where the numbers of a problem begin to be differentiated, in this order. */
enum { Q, K, V, INITIAL, INPUTS };

/* A tiny problem with all its numbers, and the weights of the loss: dout of out, dlse of lse, dfinal of the state. */
typedef struct problem {
    usp_oracle o;
    double input[INPUTS][ROOM], dout[ROOM], dlse[ROOM], dfinal[ROOM];
    double out[ROOM], lse[ROOM], gradient[INPUTS][ROOM], final[ROOM], dsinks[HEADS], max_logit[HEADS];
    float decay[HEADS], slopes[HEADS], sinks[HEADS];
} problem;

static void answer(problem *p) {
    usp_oracle *o = &p->o;
    int fades = o->linear && o->causal;
    o->q = p->input[Q], o->k = p->input[K], o->v = p->input[V];
    o->initial_state = fades ? p->input[INITIAL] : NULL;
    o->dfinal_state = o->linear ? p->dfinal : NULL;
    o->decay = fades ? p->decay : NULL;
    o->dout = p->dout;
    o->dlse = o->linear ? NULL : p->dlse;
    o->out = p->out, o->lse = p->lse, o->final_state = p->final;
    o->dq = p->gradient[Q], o->dk = p->gradient[K], o->dv = p->gradient[V], o->dinitial_state = p->gradient[INITIAL];
    o->dsinks = p->dsinks, o->max_logit = p->max_logit;
    usp_oracle_run(o);
}

static int64_t rows_of(const usp_oracle *o) {
    return o->batch * o->tokens * usp_oracle_heads(o);
}

static int64_t states_of(const usp_oracle *o) {
    return (int64_t)o->batch * usp_oracle_heads(o) * o->dim * o->value_dim;
}

/* Queries that see nothing have no lse that could change. */
static double loss(problem *p) {
    double sum = 0;
    answer(p);
    for (int64_t i = 0; i < rows_of(&p->o) * p->o.value_dim; i++) sum += p->dout[i] * p->out[i];
    for (int64_t i = 0; !p->o.linear && i < rows_of(&p->o); i++)
        if (isfinite(p->lse[i])) sum += p->dlse[i] * p->lse[i];
    for (int64_t i = 0; p->o.linear && i < states_of(&p->o); i++) sum += p->dfinal[i] * p->final[i];
    return sum;
}

static void expect_near(const char *name, int64_t i, double given, double numeric, double error) {
    cr_expect(fabs(numeric - given) < error * fmax(1, fabs(given)), "%s[%d]: %.12g, by differences %.12g", name, (int)i,
              given, numeric);
}

static void expect_gradient(problem *p, const char *name, int input, int64_t count) {
    const double step = 1e-5;
    cr_assert(count <= ROOM, "%s has %d numbers", name, (int)count);
    for (int64_t i = 0; i < count; i++) {
        double x = p->input[input][i];
        p->input[input][i] = x + step;
        double above = loss(p);
        p->input[input][i] = x - step;
        double below = loss(p);
        p->input[input][i] = x;
        answer(p);
        expect_near(name, i, p->gradient[input][i], (above - below) / (2 * step), 1e-7);
    }
}

/* Sinks are floats: the step is what the float makes of it. */
static void expect_sink_gradient(problem *p) {
    for (int h = 0; h < usp_oracle_heads(&p->o); h++) {
        float x = p->sinks[h], high = x + 0x1p-10f, low = x - 0x1p-10f;
        p->sinks[h] = high;
        double above = loss(p);
        p->sinks[h] = low;
        double below = loss(p);
        p->sinks[h] = x;
        answer(p);
        expect_near("dsinks", h, p->dsinks[h], (above - below) / ((double)high - (double)low), 1e-5);
    }
}

static problem *problem_of(const usp_oracle *o) {
    problem *p = calloc(1, sizeof *p);
    p->o = *o;
    for (int i = 0; i < ROOM; i++) {
        for (int t = 0; t < INPUTS; t++) p->input[t][i] = usp_random_at(1, (uint64_t)t, (uint64_t)i);
        p->dout[i] = usp_random_at(1, 20, (uint64_t)i);
        p->dfinal[i] = usp_random_at(1, 21, (uint64_t)i);
        p->dlse[i] = usp_random_at(1, 22, (uint64_t)i);
    }
    for (int h = 0; h < HEADS; h++) {
        p->decay[h] = -0.3f * (float)h;
        p->slopes[h] = 0.2f + 0.1f * (float)h;
        p->sinks[h] = (float)usp_random_at(1, 23, (uint64_t)h);
    }
    return p;
}

/* What makes scores other than products. */
enum { SLOPES = 1, SINKS = 2 };

static void expect_gradients_with(const usp_oracle *o, int extras) {
    problem *p = problem_of(o);
    if (extras & SLOPES) p->o.slopes = p->slopes;
    if (extras & SINKS) p->o.sinks = p->sinks;
    expect_gradient(p, "dq", Q, o->batch * o->tokens * o->heads * o->dim);
    expect_gradient(p, "dk", K, o->batch * o->keys * o->key_heads * o->dim);
    expect_gradient(p, "dv", V, o->batch * o->keys * o->value_heads * o->value_dim);
    if (o->linear && o->causal) expect_gradient(p, "dinitial", INITIAL, states_of(o));
    if (extras & SINKS) expect_sink_gradient(p);
    free(p);
}

static void expect_gradients(const usp_oracle *o) {
    expect_gradients_with(o, 0);
}

static usp_oracle plain_oracle(void) {
    return (usp_oracle){.batch = 2,
                        .heads = 2,
                        .key_heads = 1,
                        .value_heads = 1,
                        .dim = 3,
                        .value_dim = 2,
                        .tokens = 5,
                        .keys = 5,
                        .scale = 0.7};
}

Test(oracle, finite_differences) {
    usp_oracle o = plain_oracle();
    expect_gradients(&o);
    o.causal = 1;
    expect_gradients(&o);
    o.causal = 0;
    o.keys = 7;
    expect_gradients(&o);
    o.keys = 5;
    o.linear = 1;
    expect_gradients(&o);
    o.causal = 1;
    expect_gradients(&o);
    o.heads = 1;
    o.value_heads = 2;
    expect_gradients(&o);
}

Test(oracle, finite_differences_of_scores) {
    usp_oracle o = plain_oracle();
    o.causal = 1;
    expect_gradients_with(&o, SINKS);
    expect_gradients_with(&o, SLOPES);
    o.soft_cap = 0.8;
    expect_gradients(&o);
    o.soft_cap = 0;
    o.dropout = 0.4f;
    o.dropout_state = usp_dropout_words;
    expect_gradients(&o);
    o.soft_cap = 1.5;
    expect_gradients_with(&o, SINKS | SLOPES);
    o.causal = 0;
    expect_gradients_with(&o, SINKS | SLOPES);
}

Test(oracle, finite_differences_of_windows) {
    usp_oracle o = plain_oracle();
    o.tokens = o.keys = 8;
    o.causal = 1;
    o.left = 2;
    expect_gradients_with(&o, SINKS);
    o.causal = 0;
    o.right = 1;
    expect_gradients_with(&o, SLOPES);
    o.keys = 6;
    o.bottom_right = 1;
    expect_gradients_with(&o, SINKS | SLOPES);
    o.right = USP_NO_KEYS;
    expect_gradients(&o);
}

/* Among them an empty one; behind the last one two tokens that belong to none. */
static const int64_t ends[] = {2, 2, 5, 8}, key_ends[] = {1, 3, 4, 6}, prefixes[] = {2, 0, 2, 1},
                     parents[] = {-1, 0, 1, 0};

Test(oracle, finite_differences_of_documents) {
    usp_oracle o = plain_oracle();
    o.tokens = o.keys = 10;
    o.documents = 4;
    o.ends = ends;
    o.causal = 1;
    expect_gradients_with(&o, SINKS | SLOPES);
    o.prefixes = prefixes;
    expect_gradients_with(&o, SINKS);
    o.prefixes = NULL;
    o.parents = parents;
    expect_gradients_with(&o, SINKS);
    o.parents = NULL;
    o.keys = 7;
    o.key_ends = key_ends;
    expect_gradients(&o);
    o.causal = 0;
    o.bottom_right = 1;
    o.left = 2;
    expect_gradients_with(&o, SLOPES);
}

/* A state begins anew with each document; what lies behind the last one has none. */
Test(oracle, finite_differences_of_linear_documents) {
    usp_oracle o = plain_oracle();
    o.tokens = o.keys = 10;
    o.documents = 4;
    o.ends = ends;
    o.linear = o.causal = 1;
    expect_gradients(&o);
    o.tokens = o.keys = 8;
    expect_gradients(&o);
    o.documents = 1;
    expect_gradients(&o);
}

/* ---- by hand ----------------------------------------------------------------------------------------------------- */

/* One head, one dim, two tokens. */
static problem *pair_of(double q, double k) {
    usp_oracle o = plain_oracle();
    o.batch = o.heads = o.dim = o.value_dim = 1;
    o.causal = 1;
    o.tokens = o.keys = 2;
    o.scale = 0.5;
    problem *p = problem_of(&o);
    for (int i = 0; i < 2; i++) p->input[Q][i] = q, p->input[K][i] = k, p->dout[i] = 1, p->dlse[i] = 0;
    p->input[V][0] = 3, p->input[V][1] = 5, p->input[INITIAL][0] = 0;
    return p;
}

/* Causal softmax over two equal keys is the mean of their values. */
Test(oracle, by_hand) {
    problem *p = pair_of(1, 2);
    answer(p);
    cr_expect(fabs(p->out[0] - 3) < 1e-15 && fabs(p->out[1] - 4) < 1e-15);
    cr_expect(fabs(p->lse[0] - 1) < 1e-15 && fabs(p->lse[1] - 1 - log(2)) < 1e-15);
    cr_expect(fabs(p->max_logit[0] - 1) < 1e-15);
    p->o.linear = 1;
    answer(p);
    cr_expect(fabs(p->out[0] - 3) < 1e-15 && fabs(p->out[1] - 8) < 1e-15 && fabs(p->final[0] - 16) < 1e-15);
    free(p);
}

/* A sink as high as each key is one more key of value 0; a cap of 1 makes of the score 1 tanh(1). */
Test(oracle, scores_by_hand) {
    problem *p = pair_of(1, 2);
    p->sinks[0] = 1;
    p->o.sinks = p->sinks;
    answer(p);
    cr_expect(fabs(p->out[0] - 1.5) < 1e-15 && fabs(p->out[1] - 8. / 3) < 1e-15);
    p->o.sinks = NULL;
    p->o.soft_cap = 1;
    answer(p);
    cr_expect(fabs(p->lse[0] - tanh(1)) < 1e-15);
    p->o.soft_cap = 0;
    p->slopes[0] = 0.25f;
    p->o.slopes = p->slopes;
    answer(p);
    cr_expect(fabs(p->out[1] - (3 * exp(-0.25) + 5) / (exp(-0.25) + 1)) < 1e-14);
    free(p);
}

/* A row of dots and stars for each query. */
static void expect_allowed(const usp_oracle *o, const char *picture) {
    for (int64_t q = 0; q < o->tokens; q++)
        for (int64_t k = 0; k < o->keys; k++)
            cr_expect(usp_oracle_allows(o, q, k) == (picture[q * o->keys + k] == '*'), "query %d, key %d", (int)q,
                      (int)k);
}

Test(oracle, masks_by_hand) {
    static const int64_t of_tree[] = {1, 2, 4, 5}, of_keys[] = {0, 3, 3, 4};
    usp_oracle o = plain_oracle();
    o.left = o.right = 1;
    expect_allowed(&o, "**...***...***...***...**");
    o.keys = 3;
    o.bottom_right = 1;
    o.left = o.right = 0;
    o.causal = 1;
    expect_allowed(&o, "......*..**.***");
    o.keys = 5;
    o.bottom_right = 0;
    o.documents = 4;
    o.ends = of_tree;
    o.parents = parents;
    expect_allowed(&o, "*....**...***..****.*...*");
    o.parents = NULL;
    o.prefixes = (int64_t[]){1, 0, 2, 0};
    expect_allowed(&o, "*.....*.....**...**.....*");
    o.prefixes = NULL;
    o.keys = 4;
    o.key_ends = of_keys;
    expect_allowed(&o, "....*..............*");
}

/* The part that is dropped is the rate, within 5 deviations; another offset drops other pairs. */
Test(oracle, dropout_drops_its_part) {
    const uint64_t words[] = {1, 2}, others[] = {1, 3};
    const uint32_t limit = usp_dropout_limit(0.25f);
    int64_t dropped = 0, unlike = 0, count = 0;
    for (uint32_t line = 0; line < 8; line++)
        for (uint32_t i = 0; i < 200; i++) {
            uint64_t row = usp_dropout_row(words[0], words[1], line, i);
            uint64_t other = usp_dropout_row(others[0], others[1], line, i);
            for (uint32_t j = 0; j < 200; j++, count++) {
                int drop = usp_dropout_number(row, j) < limit;
                dropped += drop;
                unlike += drop != (usp_dropout_number(other, j) < limit);
            }
        }
    double n = (double)count;
    cr_expect(fabs((double)dropped - 0.25 * n) < 5 * sqrt(n * 0.25 * 0.75), "%lld of %lld", (long long)dropped,
              (long long)count);
    cr_expect(fabs((double)unlike - 0.375 * n) < 5 * sqrt(n * 0.375 * 0.625), "%lld of %lld", (long long)unlike,
              (long long)count);
}

/* Neighbours are dropped as if each were drawn alone: pairs of one query, of one key, of two heads, and the four of two
 * queries and two keys, within 5 deviations. */
Test(oracle, dropout_of_neighbours_is_unrelated) {
    const uint32_t limit = usp_dropout_limit(0.25f), lines = 8, size = 200;
    int64_t keys = 0, queries = 0, heads = 0, corners = 0;
    for (uint32_t at = 0; at < lines * size * size; at++) {
        uint32_t line = at / size / size, i = at / size % size, j = at % size;
        uint64_t row = usp_dropout_row(1, 2, line, i), below = usp_dropout_row(1, 2, line, i + 1);
        if (usp_dropout_number(row, j) >= limit) continue;
        int right = usp_dropout_number(row, j + 1) < limit, down = usp_dropout_number(below, j) < limit;
        keys += right;
        queries += down;
        heads += usp_dropout_number(usp_dropout_row(1, 2, line + 1, i), j) < limit;
        corners += right && down && usp_dropout_number(below, j + 1) < limit;
    }
    const int64_t found[] = {keys, queries, heads, corners};
    for (int i = 0; i < 4; i++) {
        double part = i < 3 ? 1.0 / 16 : 1.0 / 256, n = (double)lines * size * size;
        cr_expect(fabs((double)found[i] - part * n) < 5 * sqrt(n * part), "%d: %lld", i, (long long)found[i]);
    }
}
