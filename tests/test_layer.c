/* test_layer.c - every table of cases on every mesh of 1 to 8 thread-ranks, compared with the double-precision oracle.
 * Properties, costs and bad input are in the other files. */
#include "bodies.h"
#include "expect.h"

enum { SECONDS = 240 };

static void run_table(const usp_table *table, const int *sizes, int count) {
    usp_references references = {0};
    usp_table_run run = {.table = table, .references = &references};
    for (int i = 0; i < count; i++) usp_expect_ranks(sizes[i], SECONDS, usp_body_table, &run);
    usp_references_free(&references);
}

static const int small_sizes[] = {1, 2, 3, 4}, large_sizes[] = {6, 8}, some_sizes[] = {1, 2, 4, 6};

Test(layer, softmax_on_few_ranks) {
    run_table(&usp_softmax_table, small_sizes, 4);
}

Test(layer, softmax_on_many_ranks) {
    run_table(&usp_softmax_table, large_sizes, 2);
}

Test(layer, linear_on_few_ranks) {
    run_table(&usp_linear_table, small_sizes, 4);
}

Test(layer, linear_on_many_ranks) {
    run_table(&usp_linear_table, large_sizes, 2);
}

Test(layer, half_precision) {
    run_table(&usp_half_table, some_sizes, 4);
}

Test(layer, many_blocks) {
    run_table(&usp_large_table, small_sizes, 4);
}

Test(layer, wide_heads) {
    run_table(&usp_wide_table, some_sizes + 1, 1);
}

Test(layer, data_copies) {
    usp_references references = {0};
    usp_table_run run = {.table = &usp_half_table, .copies = 2, .references = &references};
    usp_expect_ranks(4, SECONDS, usp_body_table, &run);
    run.copies = 3;
    usp_expect_ranks(6, SECONDS, usp_body_table, &run);
    usp_references_free(&references);
}

static int without_tokens(usp_rank *rank, void *argument) {
    const usp_case c = usp_case_states_alone(rank->size);
    return usp_check_case(rank, &c, argument);
}

Test(layer, many_ranks_without_tokens) {
    usp_references references = {0};
    usp_expect_ranks(24, SECONDS, without_tokens, &references);
    usp_references_free(&references);
}

Test(layer, data_copies_that_differ) {
    usp_references references = {0};
    for (int size = 2; size <= 6; size += 2) usp_expect_ranks(size, SECONDS, usp_body_unlike_copies, &references);
    usp_references_free(&references);
}
