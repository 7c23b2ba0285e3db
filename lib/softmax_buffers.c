/* softmax_buffers.c - carves the workspace of softmax attention, and decides how many places stages have. */
#include "softmax_buffers.h"

static float *carve_floats(int64_t count, usp_arena *arena) {
    return usp_carve(arena, (size_t)count * sizeof(float));
}

static char *carve_keys(const usp_layer *layer, int64_t rows, usp_dtype dtype, usp_arena *arena) {
    return usp_carve(arena, (size_t)usp_parcels_bytes(layer, rows, dtype));
}

int64_t usp_softmax_rows(const usp_layer *layer) {
    return layer->plan->query_limit * layer->config.batch * usp_layer_own_heads(layer);
}

static int32_t *carve_turns(const usp_layer *layer, usp_arena *arena) {
    int64_t turns = (layer->plan->query_limit + USP_TURN_ROWS - 1) / USP_TURN_ROWS;
    return usp_carve(arena, (size_t)(turns * layer->config.batch * usp_layer_own_heads(layer)) * sizeof(int32_t));
}

/* The number that tells arrivals, that of items which are done, and how far each one is. */
size_t usp_softmax_ring_bytes(const usp_layer *layer) {
    int64_t lines = (int64_t)layer->config.batch * usp_layer_own_heads(layer);
    return (size_t)(2 + lines * layer->plan->query_works) * sizeof(int32_t);
}

/* Two places, of keys that arrive and keys that are here. Or one for each stage, where the kernels of forward may be
 * given them all: they fold what is here, and then no stage may take another one's place. */
static void carve_stages(const usp_layer *layer, usp_pass pass, usp_softmax_buffers *b, usp_arena *arena) {
    const usp_route_plan *route = &layer->plan->route;
    usp_dtype dtype = layer->config.dtype;
    int others = route->stages - 1, all = pass == USP_PASS_FORWARD && route->stages <= layer->needs.stages;
    int places = all || others < 2 ? others : 2;
    if (all) b->arrived = usp_carve(arena, usp_softmax_ring_bytes(layer));
    if (layer->mesh.ulysses == 1) b->own = carve_keys(layer, layer->plan->key_limit, dtype, arena);
    for (b->places = 0; b->places < places; b->places++) {
        int i = b->places, shared = i > 0 && !all;
        b->packed[i] = shared ? b->packed[0] : carve_keys(layer, route->pack_limit, dtype, arena);
        b->stage[i] = carve_keys(layer, route->limit, dtype, arena);
    }
}

/* Exchanged gradients are fp32 blocks, which need no running sums beside them. */
usp_softmax_buffers usp_softmax_carve(const usp_layer *layer, usp_pass pass, int exchanged, usp_arena *arena) {
    usp_softmax_buffers b = {.scratch = usp_carve(arena, layer->needs.scratch)};
    const usp_route_plan *route = &layer->plan->route;
    int backward = pass == USP_PASS_BACKWARD, numbers = layer->config.sinks || layer->config.max_logit;
    if (layer->config.max_logit && !backward) b.peak = carve_floats(usp_softmax_rows(layer), arena);
    if (numbers) b.heads = carve_floats((int64_t)(layer->mesh.ring + 1) * usp_layer_own_heads(layer), arena);
    int several = route->stages > 1, sums = several ? !backward || !exchanged : backward && layer->needs.query_sums;
    if (backward && layer->needs.query_sums && layer->config.deterministic) b.turns = carve_turns(layer, arena);
    if (sums) b.acc = carve_floats(usp_softmax_rows(layer) * layer->dim[backward ? USP_QUERY : USP_OUT], arena);
    if (several) carve_stages(layer, pass, &b, arena);
    if (!several || !backward) return b;
    if (!exchanged) b.home = (float *)(void *)carve_keys(layer, layer->plan->key_limit, USP_F32, arena);
    for (int i = 0; i < b.places; i++) b.leaving[i] = carve_keys(layer, route->limit, USP_F32, arena);
    b.arriving = carve_keys(layer, route->reader_limit, USP_F32, arena);
    return b;
}

usp_key_memory usp_softmax_keys(const usp_softmax_buffers *b, int t) {
    if (t == 0) return (usp_key_memory){.own = b->own};
    int at = (t - 1) % b->places;
    return (usp_key_memory){b->own, b->packed[at], t == 1 ? b->own : b->stage[(t - 2) % b->places], b->stage[at]};
}
