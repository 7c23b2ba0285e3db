/* state_exchange.c - states of linear attention between ring ranks: gathered or in a chain, and what that costs. */
#include "state_exchange.h"
#include "error.h"

/* ---- states ------------------------------------------------------------------------------------------------------ */

int64_t usp_state_size(const usp_layer *layer) {
    return usp_layer_state_elements(layer) * layer->config.batch * usp_layer_own_heads(layer);
}

float *usp_state_carve(const usp_layer *layer, int64_t states, usp_arena *arena) {
    return usp_carve(arena, (size_t)(states * usp_state_size(layer)) * sizeof(float));
}

static int64_t state_bytes(const usp_layer *layer) {
    return usp_state_size(layer) * (int64_t)sizeof(float);
}

static float *state_at(const usp_layer *layer, float *states, int64_t index) {
    return states ? states + index * usp_state_size(layer) : NULL;
}

static int uses_chain(const usp_layer *layer) {
    return layer->config.state_exchange == USP_STATE_CHAIN ||
           (layer->config.state_exchange == USP_STATE_AUTO && layer->mesh.ring > 8);
}

usp_flow usp_flow_carve(const usp_layer *layer, int kept, usp_arena *arena) {
    const usp_chunk_list *chunks = &layer->plan->chunks;
    usp_flow f = {.blocks = usp_state_carve(layer, chunks->block_capacity, arena)};
    if (uses_chain(layer)) {
        f.carry = usp_state_carve(layer, 1, arena);
        f.totals = usp_state_carve(layer, chunks->own_chunk_limit, arena);
        if (!kept) f.incoming = usp_state_carve(layer, chunks->own_chunk_limit, arena);
    } else {
        f.slots = usp_state_carve(layer, chunks->chunk_capacity, arena);
        f.totals = f.incoming = state_at(layer, f.slots, chunks->first[layer->mesh.r]);
    }
    f.final = usp_state_carve(layer, 1, arena);
    return f;
}

usp_scan usp_state_scan(const usp_layer *layer, const usp_flow *f) {
    return (usp_scan){.batch = layer->config.batch,
                      .heads = usp_layer_own_heads(layer),
                      .elements = usp_layer_state_elements(layer),
                      .log_decay = layer->decay,
                      .reverse = f->reverse};
}

/* From totals of `count` chunks, beginning with chunk `first`, to the states before them. */
static usp_status scan_chunks(usp_layer *layer, const usp_flow *f, int64_t first, int64_t count, float *data,
                              const float *initial, float *final, usp_stream stream) {
    usp_scan scan = usp_state_scan(layer, f);
    scan.step = layer->plan->device.chunks.chunk_step + first;
    scan.place = f->slots ? layer->plan->device.chunks.chunk_place : NULL;
    scan.states = (int)count;
    scan.groups = 1;
    scan.data = data;
    scan.initial = initial;
    scan.final = final;
    return layer->world->device->ops->linear_scan(layer->world->device, &scan, stream);
}

usp_status usp_state_copy(usp_layer *layer, float *to, const float *from, usp_stream stream) {
    usp_device *device = layer->world->device;
    size_t bytes = (size_t)usp_state_size(layer) * sizeof(float);
    if (from) return device->ops->copy(device, to, from, bytes, stream);
    return device->ops->zero(device, to, bytes, stream);
}

/* ---- gather ------------------------------------------------------------------------------------------------------ */

/* All own totals to every other rank; the others' into their slots. */
static void post_gather(const usp_layer *layer, const usp_flow *f, usp_messages *messages) {
    const usp_chunk_list *chunks = &layer->plan->chunks;
    for (int r = 0; r < layer->mesh.ring; r++) {
        int peer = usp_layer_ring_rank(layer, r);
        if (r == layer->mesh.r) continue;
        float *mine = state_at(layer, f->slots, chunks->first[layer->mesh.r]);
        float *theirs = state_at(layer, f->slots, chunks->first[r]);
        usp_messages_send(messages, peer, f->totals, chunks->own_chunks * state_bytes(layer), mine);
        usp_messages_recv(messages, peer, theirs, (chunks->first[r + 1] - chunks->first[r]) * state_bytes(layer),
                          theirs);
    }
}

/* ---- chain ------------------------------------------------------------------------------------------------------- */

/* Chunk i of the chain, in the direction of the flow. */
static int64_t chain_chunk(const usp_layer *layer, const usp_flow *f, int64_t i) {
    return f->reverse ? layer->plan->chunks.chunks - 1 - i : i;
}

/* The message by which the state crosses to another rank behind chunk i of the chain, if this rank has a part in it. */
static void post_hop(const usp_layer *layer, const usp_flow *f, int64_t i, int receiving, usp_messages *messages) {
    const usp_chunk_list *chunks = &layer->plan->chunks;
    if (i < 0 || i + 1 >= chunks->chunks) return;
    int from = chunks->chunk[chain_chunk(layer, f, i)].owner, to = chunks->chunk[chain_chunk(layer, f, i + 1)].owner;
    if (from == to) return;
    if (!receiving && from == layer->mesh.r)
        usp_messages_send(messages, usp_layer_ring_rank(layer, to), f->carry, state_bytes(layer), f->carry);
    if (receiving && to == layer->mesh.r)
        usp_messages_recv(messages, usp_layer_ring_rank(layer, from), f->carry, state_bytes(layer), f->carry);
}

/* The state after the last chunk is everybody's where it is an output, or where there is no mask. */
static int spreads_final(const usp_layer *layer, const usp_flow *f) {
    int wanted = f->reverse ? layer->config.initial_state : layer->config.final_state && !f->again;
    return layer->plan->chunks.chunks > 0 && (wanted || !usp_flow_causal(layer));
}

static void post_spread(const usp_layer *layer, const usp_flow *f, usp_messages *messages) {
    if (!spreads_final(layer, f)) return;
    int owner = layer->plan->chunks.chunk[chain_chunk(layer, f, layer->plan->chunks.chunks - 1)].owner;
    for (int r = 0; r < layer->mesh.ring; r++) {
        if (r == owner) continue;
        if (owner == layer->mesh.r)
            usp_messages_send(messages, usp_layer_ring_rank(layer, r), f->carry, state_bytes(layer), f->carry);
        if (r == layer->mesh.r)
            usp_messages_recv(messages, usp_layer_ring_rank(layer, owner), f->carry, state_bytes(layer), f->carry);
    }
}

/* One own link: keep the state before the chunk, fold the chunk in. A one-state scan does both. */
static usp_status fold_link(usp_layer *layer, const usp_flow *f, int64_t c, usp_stream stream) {
    const usp_chunk_list *chunks = &layer->plan->chunks;
    int64_t own = chunks->chunk[c].place - chunks->first[layer->mesh.r];
    float *incoming = state_at(layer, f->incoming, own), *total = state_at(layer, f->totals, own);
    USP_TRY(usp_state_copy(layer, incoming, f->carry, stream));
    return scan_chunks(layer, f, c, 1, total, incoming, f->carry, stream);
}

/* The whole chain on the transfer stream, so that the caller's stream goes on with intra-chunk work. */
static usp_status run_chain(usp_layer *layer, const usp_flow *f) {
    const usp_chunk_list *chunks = &layer->plan->chunks;
    usp_stream stream = usp_layer_transfer(layer, USP_AXIS_RING);
    USP_TRY(usp_state_copy(layer, f->carry, f->initial, stream));
    for (int64_t i = 0; i < chunks->chunks; i++) {
        int64_t c = chain_chunk(layer, f, i);
        if (chunks->chunk[c].owner != layer->mesh.r) continue;
        post_hop(layer, f, i - 1, 1, usp_messages_begin(layer, USP_AXIS_RING));
        USP_TRY(usp_messages_exchange(layer));
        USP_TRY(fold_link(layer, f, c, stream));
        post_hop(layer, f, i, 0, usp_messages_begin(layer, USP_AXIS_RING));
        USP_TRY(usp_messages_exchange(layer));
    }
    post_spread(layer, f, usp_messages_begin(layer, USP_AXIS_RING));
    USP_TRY(usp_messages_exchange(layer));
    return f->final ? usp_state_copy(layer, f->final, f->carry, stream) : USP_OK;
}

/* ---- both -------------------------------------------------------------------------------------------------------- */

/* Enqueued behind the intra-chunk work, but on the other stream and waiting only for begin_flow. */
usp_status usp_flow_travel(usp_layer *layer, const usp_flow *f) {
    if (uses_chain(layer)) return run_chain(layer, f);
    post_gather(layer, f, usp_messages_begin(layer, USP_AXIS_RING));
    return usp_messages_exchange(layer);
}

/* Without a mask the state of all tokens is every own chunk's. */
static usp_status give_all(usp_layer *layer, const usp_flow *f, const float *state, usp_stream stream) {
    for (int64_t i = 0; i < layer->plan->chunks.own_chunks; i++)
        USP_TRY(usp_state_copy(layer, state_at(layer, f->incoming, i), state, stream));
    return USP_OK;
}

/* With all totals here, every rank finds all states. */
usp_status usp_flow_end(usp_layer *layer, const usp_flow *f, usp_stream stream) {
    const usp_chunk_list *chunks = &layer->plan->chunks;
    usp_device *device = layer->world->device;
    int chain = uses_chain(layer);
    USP_TRY(usp_messages_join(layer, USP_AXIS_RING, stream));
    if (!chain) USP_TRY(scan_chunks(layer, f, 0, chunks->chunks, f->slots, f->initial, f->final, stream));
    if (!usp_flow_causal(layer)) return give_all(layer, f, chain ? f->carry : f->final, stream);
    if (chain || f->incoming == f->totals) return USP_OK;
    return device->ops->copy(device, f->incoming, f->totals, (size_t)(chunks->own_chunks * state_bytes(layer)), stream);
}

/* ---- cost -------------------------------------------------------------------------------------------------------- */

void usp_flow_count(const usp_layer *layer, const usp_flow *f, usp_messages *count) {
    if (!uses_chain(layer)) {
        post_gather(layer, f, count);
        return;
    }
    for (int64_t i = 0; i < layer->plan->chunks.chunks; i++) {
        post_hop(layer, f, i, 0, count);
        post_hop(layer, f, i, 1, count);
    }
    post_spread(layer, f, count);
}
