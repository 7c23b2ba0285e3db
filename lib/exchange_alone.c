/* exchange_alone.c - the head exchange of one operand, as a call of its own. */
#include "arguments.h"
#include "error.h"
#include "exchange.h"

/* One operand; toward tokens parts of a shared head are summed. The block is the caller's tensor of own heads. */
static usp_bundle open(const usp_layer *layer, usp_operand operand, const usp_tensor *tokens, const usp_tensor *heads,
                       int to_heads, usp_arena *arena) {
    usp_dtype dtype = layer->config.dtype;
    int sums = !to_heads && layer->shared[operand];
    usp_bundle bundle = {
        .parts = 1, .keys = usp_is_key(operand), .sums = sums, .wire = sums ? USP_F32 : dtype, .slice = {0, 1}};
    bundle.part[0] = (usp_bundle_part){operand, layer->dim[operand], dtype, dtype, *tokens, *heads};
    usp_bundle_carve(layer, &bundle, arena);
    return bundle;
}

size_t usp_exchange_alone_bytes(const usp_layer *layer, usp_arena *shape) {
    const usp_tensor none = {0};
    size_t most = 0;
    for (int i = 0; i < 2 * USP_OPERANDS && layer->mesh.ulysses > 1; i++) {
        usp_arena arena = {0};
        open(layer, (usp_operand)(i / 2), &none, &none, i % 2, &arena);
        if (arena.used > most) most = arena.used;
        usp_arena_note(shape, arena.shape);
    }
    return most;
}

/* With one ulysses rank everything stays: both ends have the same rows and heads. */
static usp_status move_bundle(usp_layer *layer, const usp_bundle *bundle, int to_heads, usp_stream stream) {
    (to_heads ? usp_bundle_pack : usp_bundle_lift)(layer, bundle);
    USP_TRY(usp_copies_run(layer, stream));
    usp_bundle_post(layer, bundle, usp_messages_begin(layer, USP_AXIS_ULYSSES), to_heads);
    USP_TRY(usp_messages_run(layer, stream));
    usp_bundle_keep(layer, bundle, to_heads);
    USP_TRY(usp_copies_run(layer, stream));
    USP_TRY(usp_messages_join(layer, USP_AXIS_ULYSSES, stream));
    if (to_heads)
        usp_bundle_land(layer, bundle);
    else
        USP_TRY(usp_bundle_unpack(layer, bundle, stream));
    return usp_copies_run(layer, stream);
}

static usp_status move(usp_layer *layer, usp_operand operand, const usp_tensor *tokens, const usp_tensor *heads,
                       int to_heads, void *workspace, size_t bytes, usp_stream stream) {
    USP_TRY(usp_world_poll(layer->world));
    USP_REQUIRE(operand >= USP_QUERY && operand <= USP_OUT, "operand is %d: no such operand", (int)operand);
    USP_REQUIRE(tokens && heads, "tokens or heads is NULL");
    USP_TRY(usp_check_ends(layer, operand, tokens, heads, to_heads));
    USP_TRY(usp_check_workspace(layer, USP_EXCHANGE_WORKSPACE, workspace, bytes, layer->sizes.exchange_workspace));
    usp_arena arena = usp_arena_at(workspace);
    usp_bundle bundle = open(layer, operand, tokens, heads, to_heads, &arena);
    return usp_world_conclude(layer->world, move_bundle(layer, &bundle, to_heads, stream));
}

usp_status usp_layer_tokens_to_heads(usp_layer *layer, usp_operand operand, const usp_tensor *tokens,
                                     const usp_tensor *heads, void *workspace, size_t bytes, usp_stream stream) {
    USP_REQUIRE(layer, "layer is NULL");
    USP_TRY(usp_guard_enter(layer->world));
    return usp_guard_leave(layer->world, move(layer, operand, tokens, heads, 1, workspace, bytes, stream));
}

usp_status usp_layer_heads_to_tokens(usp_layer *layer, usp_operand operand, const usp_tensor *heads,
                                     const usp_tensor *tokens, void *workspace, size_t bytes, usp_stream stream) {
    USP_REQUIRE(layer, "layer is NULL");
    USP_TRY(usp_guard_enter(layer->world));
    return usp_guard_leave(layer->world, move(layer, operand, tokens, heads, 0, workspace, bytes, stream));
}
