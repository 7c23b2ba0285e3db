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

/* ---- kernels that fold several stages at once -------------------------------------------------------------------- */

/* A CPU that folds, in each call, all stages whose arrival was told: as a GPU's kernels may. */
typedef struct folder {
    usp_device_ops ops; /* first: what the device points to */
    const usp_device_ops *real;
    int folded, ahead, wrong; /* stages of the pass; of them, sooner than in their own call; calls that fit nothing */
} folder;

static usp_kernel_needs many_stages(usp_device *device, const usp_kernel_shape *shape) {
    usp_kernel_needs needs = ((folder *)(uintptr_t)device->ops)->real->needs(device, shape);
    needs.stages = USP_SOFTMAX_STAGES;
    return needs;
}

static usp_status fold_stage(usp_device *device, folder *f, const usp_softmax *a, usp_stream stream) {
    const usp_softmax_stage *stage = &a->ring->stage[f->folded];
    usp_softmax one = *a;
    one.keys = stage->keys, one.k = stage->k, one.v = stage->v;
    one.pairs = stage->pairs, one.by_query = stage->by_query;
    one.first = f->folded == 0, one.last = f->folded + 1 == a->ring->stages;
    f->ahead += f->folded > a->ring->at;
    f->folded++;
    return f->real->softmax_forward(device, &one, stream);
}

static usp_status fold_what_is_here(usp_device *device, const usp_softmax *a, usp_stream stream) {
    folder *f = (folder *)(uintptr_t)device->ops;
    const usp_softmax_ring *ring = a->ring;
    usp_status status = USP_OK;
    if (!ring) return f->real->softmax_forward(device, a, stream);
    int here = *ring->arrived > ring->at ? *ring->arrived : ring->at;
    if (ring->at == 0) f->folded = 0, f->wrong += ring->reached[0] != 0;
    f->wrong += a->k.data != ring->stage[ring->at].k.data || a->first != (ring->at == 0) ||
                a->last != (ring->at + 1 == ring->stages);
    while (f->folded < ring->stages && f->folded <= here && status == USP_OK) status = fold_stage(device, f, a, stream);
    return status;
}

/* Every route and layout; documents leave stages without keys. */
static int folds_ahead(usp_rank *rank, void *argument) {
    static const usp_route routes[] = {USP_ROUTE_AUTO, USP_ROUTE_RELAY, USP_ROUTE_DIRECT, USP_ROUTE_GATHERED};
    static const usp_layout layouts[] = {USP_LAYOUT_ZIGZAG, USP_LAYOUT_CONTIGUOUS, USP_LAYOUT_STRIPE};
    usp_device *device = rank->world->device;
    const usp_device_ops *real = device->ops;
    folder f = {.ops = *real, .real = real};
    int failed = 0;
    f.ops.needs = many_stages, f.ops.softmax_forward = fold_what_is_here;
    device->ops = &f.ops;
    for (int i = 0; i < 48 && !failed; i++) {
        usp_case c = {.tokens = 311, .mask = i / 12 % 2 ? USP_MASK_FULL : USP_MASK_CAUSAL, .return_lse = 1};
        c.route = routes[i % 4], c.layout = layouts[i / 4 % 3], c.documents = i / 24 ? 4 : 0;
        c.ulysses = i % 2 && rank->size % 2 == 0 ? 2 : 1;
        c.ring = rank->size / c.ulysses, c.sinks = c.max_logit = i % 3 == 0;
        failed = usp_check_case(rank, &c, argument);
    }
    device->ops = real;
    if (!failed && (!f.ahead || f.wrong)) failed = usp_say(rank, "%d stages ahead, %d wrong", f.ahead, f.wrong);
    return failed;
}

Test(layer, kernels_fold_all_stages_that_are_here) {
    for (int size = 2; size <= 5; size++) {
        usp_references references = {0};
        usp_expect_ranks(size, SECONDS, folds_ahead, &references);
        usp_references_free(&references);
    }
}
