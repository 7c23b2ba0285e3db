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

Test(cost, masks) {
    run_table(&usp_mask_table);
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

/* ---- memory ------------------------------------------------------------------------------------------------------ */

/* Sizes of a softmax layer with 64 tokens a ring rank. */
static int sizes_of(usp_rank *rank, int ulysses, int ring, usp_route route, usp_sizes *of) {
    const usp_case c = {.ulysses = ulysses,
                        .ring = ring,
                        .copies = rank->size / ulysses / ring,
                        .tokens = 64 * ring,
                        .layout = USP_LAYOUT_CONTIGUOUS,
                        .route = route,
                        .heads = 8,
                        .kv_heads = 4,
                        .head_dim = 16};
    usp_stage stage;
    if (usp_stage_open(rank, &c, &stage) != USP_OK) return usp_say(rank, "%s", usp_last_error());
    *of = stage.sizes;
    usp_stage_close(&stage);
    return 0;
}

/* What a ring adds where there is no exchange: the own keys packed, those that arrive and that arrived (gathered: all
 * others at once), running sums; backward also the gradients of keys at home, leaving and arriving. */
static int expect_ring_memory(usp_rank *rank, int ring, usp_route route) {
    usp_sizes alone, with;
    int gathered = route == USP_ROUTE_GATHERED;
    size_t keys = 64 * 2 * 4 * 16 * sizeof(float), sums = 64 * 8 * 16 * sizeof(float);
    size_t others = gathered ? (size_t)ring - 1 : ring > 2 ? 2 : 1, read = gathered ? (size_t)ring - 1 : 1;
    if (sizes_of(rank, 1, 1, route, &alone) || sizes_of(rank, 1, ring, route, &with)) return 1;
    size_t forward = with.forward_saving_workspace - alone.forward_saving_workspace;
    size_t backward = with.backward_workspace - alone.backward_workspace;
    size_t more = (1 + others) * keys + sums, gradients = (1 + others + read) * keys;
    if (forward != more || backward != more + gradients)
        usp_say(rank, "ring %d, route %d: the ring takes %zu and %zu bytes, not %zu and %zu", ring, (int)route, forward,
                backward, more, more + gradients);
    if (with.forward_workspace != with.forward_saving_workspace + with.saved)
        usp_say(rank, "ring %d: a forward that saves does not need `saved` less", ring);
    usp_count(rank);
    return 0;
}

static int ring_memory(usp_rank *rank, void *argument) {
    (void)argument;
    for (int ring = 2; ring <= rank->size; ring++)
        for (int route = USP_ROUTE_RELAY; route <= USP_ROUTE_GATHERED && rank->size % ring == 0; route++)
            if (expect_ring_memory(rank, ring, (usp_route)route)) return 1;
    return 0;
}

Test(cost, memory_is_taken_once) {
    for (int i = 1; i < 6; i++) usp_expect_ranks(sizes[i], SECONDS, ring_memory, NULL);
}

/* ---- work -------------------------------------------------------------------------------------------------------- */

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
