/* test_cost.c - the bytes a layer says it moves are the bytes that move, on every axis, for every tabled case; it moves
 * them in no more exchanges, copies and waits than it must. Looks at no result. */
#include "costs.h"
#include "expect.h"

enum { SECONDS = 240 };

static const int sizes[] = {1, 2, 3, 4, 6, 8};

static void on_sizes(usp_body body) {
    for (int i = 0; i < 6; i++) usp_expect_ranks(sizes[i], SECONDS, body, NULL);
}

/* On rings of five too, which the bodies that count on even shapes do without. */
static void run_table(const usp_table *table) {
    for (int i = 0; i < 6; i++) usp_expect_ranks(sizes[i], SECONDS, usp_body_costs, (void *)(uintptr_t)table);
    usp_expect_ranks(5, SECONDS, usp_body_costs, (void *)(uintptr_t)table);
}

Test(cost, softmax) {
    run_table(&usp_softmax_table);
}

Test(cost, linear) {
    run_table(&usp_linear_table);
}

Test(cost, half_precision) {
    run_table(&usp_half_table);
}

Test(cost, many_blocks) {
    run_table(&usp_large_table);
}

Test(cost, wide_heads) {
    run_table(&usp_wide_table);
}

Test(cost, linear_traffic_does_not_depend_on_length) {
    on_sizes(usp_body_constant_traffic);
}

Test(cost, states_alone) {
    usp_expect_ranks(24, SECONDS, usp_body_states_alone, NULL);
}

Test(cost, formulas) {
    on_sizes(usp_body_formulas);
}

Test(cost, states_travel_by_chain_or_gather) {
    on_sizes(usp_body_travel);
}

Test(cost, flops) {
    on_sizes(usp_body_flops);
}

Test(cost, one_exchange_in_and_one_out) {
    for (int i = 1; i < 6; i++) usp_expect_ranks(sizes[i], SECONDS, usp_body_exchanges, NULL);
}

Test(cost, no_copy_without_ulysses) {
    for (int i = 0; i < 4; i++) usp_expect_ranks(sizes[i], SECONDS, usp_body_copies, NULL);
}

Test(cost, intra_chunk_work_waits_for_no_state) {
    for (int i = 1; i < 4; i++) usp_expect_ranks(sizes[i], SECONDS, usp_body_overlap, NULL);
}
