/* test_properties.c - what must hold of any result: independence of mesh and layout, equality bit for bit, linearity,
 * errors that do not grow; of masks that say the same in other words. Compares with no table of cases. */
#include "bodies.h"
#include "expect.h"
#include "formulas.h"
#include "masks.h"
#include "replans.h"
#include "spread.h"

#include <math.h>

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

/* Hosts of two ranks. */
Test(properties, same_bits_over_two_transports) {
    for (int i = 1; i < 5; i++) {
        const usp_ranks ranks = {.size = sizes[i], .host = 2, .seconds = SECONDS};
        usp_report report;
        usp_ranks_run(&ranks, usp_body_lanes, NULL, &report);
        cr_expect(report.failures == 0 && report.done > 0, "%d ranks\n%s", sizes[i], report.text);
    }
}

Test(properties, same_bits_in_groups_of_heads) {
    on_sizes(sizes, 4, usp_body_groups);
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

/* ---- masks ------------------------------------------------------------------------------------------------------- */

Test(masks, one_result_on_every_mesh_layout_and_route) {
    on_sizes(sizes + 1, 4, usp_body_masks);
}

Test(masks, the_same_in_other_words) {
    on_sizes(sizes, 5, usp_body_twins);
}

Test(masks, packed_documents_are_documents_alone) {
    on_sizes(sizes, 5, usp_body_packed);
}

Test(masks, a_window_of_all_tokens) {
    on_sizes(sizes, 5, usp_body_whole_window);
}

Test(masks, a_chain_of_documents) {
    on_sizes(sizes, 5, usp_body_chain);
}

Test(masks, sinks_of_nothing) {
    on_sizes(sizes, 4, usp_body_no_sinks);
}

Test(masks, dropout_of_next_to_nothing) {
    on_sizes(sizes, 4, usp_body_little_dropout);
}

Test(masks, the_same_pairs_are_dropped) {
    on_sizes(sizes, 5, usp_body_dropped);
}

Test(masks, planned_again_is_made_anew) {
    on_sizes(sizes, 4, usp_body_replanned);
}

Test(masks, errors_do_not_grow_with_lse_and_ring) {
    usp_offsets one = {{0}}, eight = one;
    usp_expect_ranks(1, SECONDS, usp_body_offsets, &one);
    usp_expect_ranks(8, SECONDS, usp_body_offsets, &eight);
    for (int i = 0; i < USP_OFFSETS; i++)
        cr_expect(one.dq[i] > 0 && eight.dq[i] <= 1.5 * one.dq[i], "offset %d: RMS error %.3g with ring 8, %.3g alone",
                  i, eight.dq[i], one.dq[i]);
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
