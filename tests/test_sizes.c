/* test_sizes.c - sizes that are products of what callers give, at the edge of what 64 bits count: one number less is
 * taken, one more is refused by name. Nothing that is taken is ever allocated: something else is wrong there. */
#include "expect.h"
#include "size.h"
#include "stage.h"

#include <string.h>

enum { SECONDS = 60, TOKENS = 32 };

static void judge(usp_rank *rank, const char *what, int row, usp_status status, usp_status expected, const char *says) {
    if (status == expected && strstr(usp_last_error(), says)) return;
    usp_say(rank, "%s %d: %s, \"%s\" where it should say \"%s\"", what, row, usp_status_string(status),
            usp_last_error(), says);
}

/* ---- the product itself ------------------------------------------------------------------------------------------ */

Test(sizes, products) {
    static const struct {
        int64_t before;
        uint64_t factor[3];
        int64_t after; /* -1: refused */
    } rows[] = {
        {0, {3, 5, 7}, 105},
        {10, {0, 5, UINT64_MAX}, 10},
        {0, {UINT64_MAX, UINT64_MAX, 0}, 0},
        {0, {INT64_MAX, 1, 1}, INT64_MAX},
        {1, {INT64_MAX, 1, 1}, -1},
        {0, {(uint64_t)INT64_MAX + 1, 1, 1}, -1},
        {0, {UINT64_MAX, 1, 1}, -1},
        {0, {UINT64_C(1) << 31, UINT64_C(1) << 31, 1}, INT64_C(1) << 62},
        {0, {UINT64_C(1) << 31, UINT64_C(1) << 31, 2}, -1},
        {0, {UINT64_C(1) << 32, UINT64_C(1) << 32, 1}, -1}, /* wraps to 0 */
        {0, {UINT64_C(1) << 33, (UINT64_C(1) << 31) + 1, 1}, -1},
        {INT64_MAX - 6, {2, 3, 1}, INT64_MAX},
        {INT64_MAX - 5, {2, 3, 1}, -1},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        const uint64_t *f = rows[i].factor;
        int64_t size = rows[i].before;
        usp_status status = usp_size_add(&size, (const usp_factor[]){{"one", f[0]}, {"two", f[1]}, {"three", f[2]}}, 3);
        if (rows[i].after >= 0)
            cr_expect(status == USP_OK && size == rows[i].after, "row %zu: %lld", i, (long long)size);
        if (rows[i].after < 0)
            cr_expect(status == USP_INVALID && strstr(usp_last_error(), "one ") &&
                          strstr(usp_last_error(), " x three "),
                      "row %zu: %s", i, usp_last_error());
    }
}

/* ---- scatter and gather ------------------------------------------------------------------------------------------ */

static int edges_of_tensors(usp_rank *rank, void *argument) {
    usp_mesh *mesh = NULL;
    usp_sequence *sequence = NULL;
    usp_sequence_config config = {.struct_size = sizeof config, .tokens = TOKENS};
    int64_t most = INT64_MAX / TOKENS; /* of batch x token_bytes: ranks own TOKENS / size each, in all sizes run here */
    const struct {
        int64_t batch;
        size_t token_bytes;
        usp_status status;
        const char *says;
    } rows[] = {{-1, 4, USP_INVALID, "batch is -1"},
                {INT64_MIN, 1, USP_INVALID, "batch is -9"},
                {most, 1, USP_INVALID, "is NULL"},
                {most + 1, 1, USP_INVALID, "batch 288230376151711744 x token_bytes 1 x"},
                {1, (size_t)most, USP_INVALID, "is NULL"},
                {1, (size_t)most + 1, USP_INVALID, "token_bytes 288230376151711744"},
                {INT64_MAX, 1, USP_INVALID, "64 bits"},
                {1, SIZE_MAX, USP_INVALID, "64 bits"},
                {INT64_C(1) << 32, (size_t)1 << 32, USP_INVALID, "64 bits"},
                {INT64_C(1) << 62, 4, USP_INVALID, "64 bits"},
                {0, SIZE_MAX, USP_OK, ""},
                {INT64_MAX, 0, USP_OK, ""}};
    (void)argument;
    if (usp_mesh_create(rank->world, 1, rank->size, &mesh) != USP_OK ||
        usp_sequence_create(mesh, &config, &sequence) != USP_OK)
        return usp_say(rank, "%s", usp_last_error());
    for (int i = 0; i < (int)(sizeof rows / sizeof *rows); i++) {
        judge(rank, "scatter", i, usp_sequence_scatter(sequence, rows[i].batch, rows[i].token_bytes, NULL, NULL),
              rows[i].status, rows[i].says);
        judge(rank, "gather", i, usp_sequence_gather(sequence, rows[i].batch, rows[i].token_bytes, NULL, NULL),
              rows[i].status, rows[i].says);
    }
    usp_sequence_destroy(sequence);
    usp_mesh_destroy(mesh);
    usp_count(rank);
    return 0;
}

Test(sizes, scatter_and_gather) {
    usp_expect_ranks(1, SECONDS, edges_of_tensors, NULL);
    usp_expect_ranks(4, SECONDS, edges_of_tensors, NULL);
}

/* ---- strides ----------------------------------------------------------------------------------------------------- */

/* From its first element to its last q of 2 batches has `rest` elements but for the step of a batch. */
static int edges_of_strides(usp_rank *rank, void *argument) {
    usp_stage stage;
    const usp_case c = {.batch = 2, .tokens = TOKENS};
    (void)argument;
    if (usp_stage_open(rank, &c, &stage) != USP_OK || usp_stage_fill(&stage))
        return usp_say(rank, "%s", usp_last_error());
    const usp_tensor q = usp_stage_forward_arguments(&stage, 1).q;
    int64_t rest = (stage.tokens - 1) * q.stride_token + (stage.c.heads - 1) * q.stride_head + stage.c.head_dim;
    int64_t most = INT64_MAX / (int64_t)sizeof(float) - rest;
    const struct {
        usp_tensor q;
        usp_status status;
        const char *says;
    } rows[] = {{{q.data, most, q.stride_token, q.stride_head}, USP_WORKSPACE, "workspace"},
                {{q.data, most + 1, q.stride_token, q.stride_head}, USP_INVALID, "usp_forward.q has strides"},
                {{q.data, -most, q.stride_token, q.stride_head}, USP_WORKSPACE, "workspace"},
                {{q.data, -most - 1, q.stride_token, q.stride_head}, USP_INVALID, "usp_forward.q has strides"},
                {{q.data, INT64_MIN, q.stride_token, q.stride_head}, USP_INVALID, "64 bits"},
                {{q.data, q.stride_batch, INT64_MAX, q.stride_head}, USP_INVALID, "64 bits"},
                {{q.data, q.stride_batch, INT64_MIN, q.stride_head}, USP_INVALID, "64 bits"},
                {{q.data, q.stride_batch, q.stride_token, INT64_MAX / 4}, USP_INVALID, "64 bits"},
                {{q.data, 0, 0, 0}, USP_WORKSPACE, "workspace"}};
    for (int i = 0; i < (int)(sizeof rows / sizeof *rows); i++) {
        usp_forward f = usp_stage_forward_arguments(&stage, 1);
        f.q = rows[i].q;
        judge(rank, "strides", i, usp_layer_forward(stage.layer, &f, stage.workspace.device, 0, rank->stream),
              rows[i].status, rows[i].says);
    }
    usp_stage_close(&stage);
    usp_count(rank);
    return 0;
}

Test(sizes, strides) {
    usp_expect_ranks(1, SECONDS, edges_of_strides, NULL);
}

/* ---- memory ------------------------------------------------------------------------------------------------------ */

static int edges_of_memory(usp_rank *rank, void *argument) {
    void *memory = NULL;
    (void)argument;
    usp_heap_arm(rank->heap, 1);
    judge(rank, "memory", 0, usp_world_alloc(rank->world, INT64_MAX, &memory), USP_NO_MEMORY, "cannot allocate");
    usp_heap_disarm(rank->heap);
    judge(rank, "memory", 1, usp_world_alloc(rank->world, SIZE_MAX, &memory), USP_NO_MEMORY, "cannot allocate");
    judge(rank, "memory", 2, usp_world_alloc_shared(rank->world, SIZE_MAX, &memory), USP_NO_MEMORY, "cannot allocate");
    usp_count(rank);
    return 0;
}

Test(sizes, memory) {
    usp_expect_ranks(1, SECONDS, edges_of_memory, NULL);
    usp_expect_ranks(2, SECONDS, edges_of_memory, NULL);
}

/* ---- layers ------------------------------------------------------------------------------------------------------ */

static int countless(usp_rank *rank, void *argument) {
    usp_mesh *mesh = NULL;
    usp_sequence *sequence = NULL;
    usp_sequence_config longest = {
        .struct_size = sizeof longest, .layout = USP_LAYOUT_CONTIGUOUS, .tokens = INT32_MAX - 1};
    (void)argument;
    if (usp_mesh_create(rank->world, 1, rank->size, &mesh) != USP_OK ||
        usp_sequence_create(mesh, &longest, &sequence) != USP_OK)
        return usp_say(rank, "%s", usp_last_error());
    for (int attention = USP_SOFTMAX; attention <= USP_LINEAR; attention++) {
        usp_layer *layer = NULL;
        usp_layer_config config = {.struct_size = sizeof config,
                                   .attention = (usp_attention)attention,
                                   .mask = USP_MASK_CAUSAL,
                                   .batch = 65536,
                                   .heads = 65536,
                                   .head_dim = 256};
        judge(rank, "layer", attention, usp_layer_create(mesh, sequence, &config, &layer), USP_INVALID,
              "usp_layer_config.batch 65536 x heads 65536");
        if (layer) usp_say(rank, "a layer came of it");
    }
    usp_sequence_destroy(sequence);
    usp_mesh_destroy(mesh);
    usp_count(rank);
    return 0;
}

Test(sizes, layers) {
    usp_expect_ranks(2, SECONDS, countless, NULL);
}
