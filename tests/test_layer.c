/* test_layer.c - every table of cases on every mesh of 1 to 8 thread-ranks, compared with the double-precision oracle.
 * Properties, costs and bad input are in the other files. */
#include "bodies.h"
#include "expect.h"
#include "layer.h"

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

Test(layer, masks_on_few_ranks) {
    run_table(&usp_mask_table, small_sizes, 4);
}

Test(layer, masks_on_many_ranks) {
    run_table(&usp_mask_table, large_sizes, 2);
}

Test(layer, linear_on_few_ranks) {
    run_table(&usp_linear_table, small_sizes, 4);
}

Test(layer, linear_on_many_ranks) {
    run_table(&usp_linear_table, large_sizes, 2);
}

Test(layer, features_on_every_layout_in_every_dtype) {
    const int sizes[] = {1, 2, 3, 4, 6, 8};
    usp_references references = {0};
    for (int i = 0; i < 6; i++) usp_expect_ranks(sizes[i], SECONDS, usp_body_features, &references);
    usp_references_free(&references);
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

/* ---- what kernels are told --------------------------------------------------------------------------------------- */

/* A CPU whose entries note whether calls say `deterministic` as the layer does. */
typedef struct listener {
    usp_device_ops ops; /* first: what the device points to */
    const usp_device_ops *real;
    int expected, calls, wrong;
} listener;

static const usp_device_ops *listen(usp_device *device, int deterministic) {
    listener *l = (listener *)(uintptr_t)device->ops;
    l->calls++;
    l->wrong += deterministic != l->expected;
    return l->real;
}

static usp_status heard_supports(usp_device *device, const usp_kernel_shape *shape) {
    return listen(device, shape->deterministic)->supports(device, shape);
}

static usp_status heard_forward(usp_device *device, const usp_softmax *a, usp_stream stream) {
    return listen(device, a->deterministic)->softmax_forward(device, a, stream);
}

static usp_status heard_backward(usp_device *device, const usp_softmax *a, usp_stream stream) {
    return listen(device, a->deterministic)->softmax_backward(device, a, stream);
}

static usp_status heard_totals(usp_device *device, const usp_linear *a, usp_stream stream) {
    return listen(device, a->deterministic)->linear_totals(device, a, stream);
}

static usp_status heard_output(usp_device *device, const usp_linear *a, usp_stream stream) {
    return listen(device, a->deterministic)->linear_output(device, a, stream);
}

static usp_status heard_apply(usp_device *device, const usp_linear *a, usp_stream stream) {
    return listen(device, a->deterministic)->linear_apply(device, a, stream);
}

static int told_deterministic(usp_rank *rank, void *argument) {
    usp_device *device = rank->world->device;
    const usp_device_ops *real = device->ops;
    int failed = 0;
    for (int i = 0; i < 4 && !failed; i++) {
        usp_case c = {.tokens = 61, .mask = USP_MASK_CAUSAL, .ring = rank->size, .deterministic = i % 2};
        listener l = {.ops = *real, .real = real, .expected = i % 2};
        c.attention = i / 2 ? USP_LINEAR : USP_SOFTMAX;
        l.ops.supports = heard_supports, l.ops.softmax_forward = heard_forward;
        l.ops.softmax_backward = heard_backward;
        l.ops.linear_totals = heard_totals, l.ops.linear_output = heard_output, l.ops.linear_apply = heard_apply;
        device->ops = &l.ops;
        failed = usp_check_case(rank, &c, argument);
        device->ops = real;
        if (!failed && (l.calls < 4 || l.wrong)) failed = usp_say(rank, "%d of %d calls say another", l.wrong, l.calls);
    }
    return failed;
}

Test(layer, kernels_are_told_deterministic) {
    usp_references references = {0};
    usp_expect_ranks(2, SECONDS, told_deterministic, &references);
    usp_references_free(&references);
}
