/* test_properties.c - what must hold of any result: independence of mesh and layout, equality bit for bit, linearity,
 * errors that do not grow; and of the oracle itself, by finite differences. Compares with no table of cases. */
#include "bodies.h"
#include "expect.h"
#include "oracle.h"
#include "spread.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { SECONDS = 120 };

static void on_sizes(const int *sizes, int count, usp_body body) {
    for (int i = 0; i < count; i++) usp_expect_ranks(sizes[i], SECONDS, body, NULL);
}

static const int sizes[] = {1, 2, 4, 6, 8};

/* ---- layers ------------------------------------------------------------------------------------------------------ */

Test(properties, independent_of_mesh_and_layout) {
    on_sizes(sizes + 2, 3, usp_body_independent);
}

Test(properties, same_bits_with_more_ulysses_ranks) {
    for (int ring = 1; ring <= 4; ring++) {
        usp_across across = {.ring = ring};
        for (int ulysses = 1; ulysses * ring <= 8 && ulysses <= 4; ulysses *= 2) {
            const usp_ranks ranks = {.size = ulysses * ring, .seconds = SECONDS};
            usp_report report;
            usp_ranks_run(&ranks, usp_body_across_ulysses, &across, &report);
            cr_expect(report.failures == 0, "ring %d, ulysses %d\n%s", ring, ulysses, report.text);
            cr_expect(ulysses == 1 || report.done == USP_ACROSS_CASES, "only %d compared", report.done);
        }
        usp_across_free(&across);
    }
}

Test(properties, same_bits_in_any_arrangement) {
    on_sizes(sizes, 3, usp_body_arrangements);
}

Test(properties, nan_is_never_forgotten) {
    on_sizes(sizes, 4, usp_body_not_a_number);
}

Test(properties, nan_reaches_only_what_depends_on_it) {
    on_sizes(sizes, 4, usp_body_spread);
}

Test(properties, same_bits_again) {
    on_sizes(sizes, 4, usp_body_repeats);
}

Test(properties, same_bits_in_registered_memory) {
    on_sizes(sizes, 3, usp_body_shared_memory);
}

Test(properties, exchange_there_and_back) {
    on_sizes(sizes, 5, usp_body_round_trip);
}

Test(properties, layer_is_its_parts) {
    on_sizes(sizes, 5, usp_body_parts);
}

Test(properties, linear_in_v) {
    on_sizes(sizes, 3, usp_body_linearity);
}

Test(properties, meshes_change_from_layer_to_layer) {
    on_sizes(sizes + 1, 4, usp_body_switch);
}

Test(properties, states_by_chain_and_gather) {
    on_sizes(sizes, 5, usp_body_states);
}

Test(properties, a_sequence_in_two_halves) {
    on_sizes(sizes, 3, usp_body_continue);
}

static void expect_no_growth(const char *kind, const double *one, const double *eight) {
    static const char *const names[USP_ITEMS] = {"out", "lse", "dq", "dk", "dv", "final_state", "dinitial_state"};
    for (int i = 0; i < USP_ITEMS; i++)
        cr_expect(eight[i] <= 1.2 * one[i], "%s %s: RMS error %.3g with ring 8, %.3g with ring 1", kind, names[i],
                  eight[i], one[i]);
}

Test(properties, errors_do_not_grow_with_the_ring) {
    usp_references references = {0};
    usp_growth one = {.references = &references}, eight = one;
    usp_expect_ranks(1, SECONDS, usp_body_growth, &one);
    usp_expect_ranks(8, SECONDS, usp_body_growth, &eight);
    expect_no_growth("softmax", one.softmax, eight.softmax);
    expect_no_growth("linear", one.linear, eight.linear);
    usp_references_free(&references);
}

/* ---- the oracle -------------------------------------------------------------------------------------------------- */

enum { TENSORS = 5, ROOM = 128 };

/* A tiny problem with all its numbers: q, k, v, initial state, decay; and the weights of the loss. */
typedef struct problem {
    usp_oracle o;
    double input[TENSORS - 1][ROOM], dout[ROOM], dfinal[ROOM], result[7][ROOM];
    float decay[4];
} problem;

static void answer(problem *p) {
    usp_oracle *o = &p->o;
    o->q = p->input[0];
    o->k = p->input[1];
    o->v = p->input[2];
    o->initial_state = o->linear && o->causal ? p->input[3] : NULL;
    o->dfinal_state = o->linear ? p->dfinal : NULL;
    o->decay = o->linear && o->causal ? p->decay : NULL;
    o->dout = p->dout;
    o->out = p->result[0];
    o->lse = p->result[1];
    o->dq = p->result[2];
    o->dk = p->result[3];
    o->dv = p->result[4];
    o->dinitial_state = p->result[5];
    o->final_state = p->result[6];
    usp_oracle_run(o);
}

static double loss(problem *p) {
    double sum = 0;
    answer(p);
    int64_t outs = p->o.batch * p->o.tokens * usp_oracle_heads(&p->o) * p->o.value_dim;
    int64_t states = (int64_t)p->o.batch * usp_oracle_heads(&p->o) * p->o.dim * p->o.value_dim;
    for (int64_t i = 0; i < outs; i++) sum += p->dout[i] * p->o.out[i];
    for (int64_t i = 0; p->o.linear && i < states; i++) sum += p->dfinal[i] * p->o.final_state[i];
    return sum;
}

static void expect_gradient(problem *p, const char *name, int input, int gradient, int64_t count) {
    const double step = 1e-5;
    for (int64_t i = 0; i < count; i++) {
        double x = p->input[input][i];
        p->input[input][i] = x + step;
        double above = loss(p);
        p->input[input][i] = x - step;
        double below = loss(p);
        p->input[input][i] = x;
        answer(p);
        double numeric = (above - below) / (2 * step), given = p->result[gradient][i];
        cr_expect(fabs(numeric - given) < 1e-7 * fmax(1, fabs(given)), "%s[%d]: %.12g, by differences %.12g", name,
                  (int)i, given, numeric);
    }
}

static void expect_gradients(usp_oracle o) {
    problem *p = calloc(1, sizeof *p);
    p->o = o;
    for (int i = 0; i < ROOM; i++) {
        for (int t = 0; t < TENSORS - 1; t++) p->input[t][i] = usp_random_at(1, (uint64_t)t, (uint64_t)i);
        p->dout[i] = usp_random_at(1, 20, (uint64_t)i);
        p->dfinal[i] = usp_random_at(1, 21, (uint64_t)i);
    }
    for (int h = 0; h < 4; h++) p->decay[h] = -0.3f * (float)h;
    expect_gradient(p, "dq", 0, 2, o.batch * o.tokens * o.heads * o.dim);
    expect_gradient(p, "dk", 1, 3, o.batch * o.keys * o.key_heads * o.dim);
    expect_gradient(p, "dv", 2, 4, o.batch * o.keys * o.value_heads * o.value_dim);
    if (o.linear && o.causal)
        expect_gradient(p, "dinitial", 3, 5, (int64_t)o.batch * usp_oracle_heads(&o) * o.dim * o.value_dim);
    free(p);
}

Test(oracle, finite_differences) {
    usp_oracle o = {.batch = 2,
                    .heads = 2,
                    .key_heads = 1,
                    .value_heads = 1,
                    .dim = 3,
                    .value_dim = 2,
                    .tokens = 5,
                    .keys = 5,
                    .scale = 0.7};
    expect_gradients(o);
    o.causal = 1;
    expect_gradients(o);
    o.causal = 0;
    o.keys = 7;
    expect_gradients(o);
    o.keys = 5;
    o.linear = 1;
    expect_gradients(o);
    o.causal = 1;
    expect_gradients(o);
    o.heads = 1;
    o.value_heads = 2;
    expect_gradients(o);
}

/* Causal softmax over two equal keys is the mean of their values. */
Test(oracle, by_hand) {
    double q[] = {1, 1}, k[] = {2, 2}, v[] = {3, 5}, one[2] = {1, 1}, out[2], lse[2], d[3][2], state[2][1];
    usp_oracle o = {.causal = 1,
                    .batch = 1,
                    .heads = 1,
                    .key_heads = 1,
                    .value_heads = 1,
                    .dim = 1,
                    .value_dim = 1,
                    .tokens = 2,
                    .keys = 2,
                    .scale = 0.5,
                    .q = q,
                    .k = k,
                    .v = v,
                    .dout = one,
                    .out = out,
                    .lse = lse,
                    .dq = d[0],
                    .dk = d[1],
                    .dv = d[2],
                    .final_state = state[0],
                    .dinitial_state = state[1]};
    usp_oracle_run(&o);
    cr_expect(fabs(out[0] - 3) < 1e-15 && fabs(out[1] - 4) < 1e-15);
    cr_expect(fabs(lse[0] - 1) < 1e-15 && fabs(lse[1] - 1 - log(2)) < 1e-15);
    o.linear = 1;
    usp_oracle_run(&o);
    cr_expect(fabs(out[0] - 3) < 1e-15 && fabs(out[1] - 8) < 1e-15 && fabs(state[0][0] - 16) < 1e-15);
}

/* ---- numbers ----------------------------------------------------------------------------------------------------- */

Test(numbers, rounding) {
    cr_expect(usp_round_bf16(1.00390625) == 1.0 && usp_round_bf16(1.01171875) == 1.015625);
    cr_expect(usp_round_f16(1.00048828125) == 1.0 && usp_round_f16(65519) == 65504 && isinf(usp_round_f16(65520)));
    cr_expect(usp_round_f16(0x1p-25) == 0 && usp_round_f16(0x1.8p-24) == 0x1p-23);
    for (int bits = 0; bits < 65536; bits++) {
        uint16_t half = (uint16_t)bits, again;
        for (int dtype = USP_F16; dtype <= USP_BF16; dtype++) {
            double x = usp_load((usp_dtype)dtype, &half);
            usp_store((usp_dtype)dtype, &again, x);
            cr_expect(isnan(x) || again == half, "%#x becomes %#x", half, again);
        }
    }
}

/* The comparison itself must be able to fail. */
Test(numbers, budget) {
    float given[] = {1, 2, 3, 4};
    double truth[] = {1, 2, 3, 4}, plain[] = {1, 2, 3.01, 4};
    char why[256];
    cr_expect(usp_within_budget("x", USP_F32, given, truth, NULL, 4, why, sizeof why) == 0);
    given[3] = 4.0001f;
    cr_expect(usp_within_budget("x", USP_F32, given, truth, NULL, 4, why, sizeof why) == 1);
    cr_expect(usp_within_budget("x", USP_BF16, given, truth, plain, 4, why, sizeof why) == 0);
    given[3] = 4.1f;
    cr_expect(usp_within_budget("x", USP_BF16, given, truth, plain, 4, why, sizeof why) == 1);
    given[3] = NAN;
    cr_expect(usp_within_budget("x", USP_BF16, given, truth, plain, 4, why, sizeof why) == 1);
    cr_expect(usp_within_budget("x", USP_F32, given, truth, NULL, 4, why, sizeof why) == 1);
    given[3] = -INFINITY;
    truth[3] = -INFINITY;
    cr_expect(usp_within_budget("x", USP_F32, given, truth, NULL, 4, why, sizeof why) == 0);
}
