/* attn_linear.c - linear attention on the ring axis (LASP): ranks exchange states, whose size does not depend on
 * length.
 *
 * A flow is one direction of a state through the chunks of positions: forward S_t = lambda S_(t-1) + k_t v_t^T, and in
 * backward its adjoint D_t = lambda D_(t+1) + q_t dout_t^T, with time reversed. Each chunk's own total is found first;
 * then intra-chunk work runs while the totals travel, either chunk after chunk (LASP, arXiv 2404.02882) or to every
 * rank at once (LASP-2, arXiv 2502.07563); last, the state that came in is applied. out = scale q S, dq = scale S dout,
 * dk = scale D v, dv = scale D^T k: one kernel with its operands in other places. */
#include "attn.h"
#include "error.h"
#include "exchange.h"

/* ---- buffers ----------------------------------------------------------------------------------------------------- */

/* One direction of the state. A state is fp32 [batch][heads][head_dim][value_dim], for own heads. */
typedef struct flow {
    int reverse;
    int again;       /* forward states in backward: the final one is no output any more */
    usp_tensor k, v; /* what makes the totals: k and v, or q and dout */
    usp_head_map k_map, v_map;
    float *blocks;   /* [blocks]: the state before each block of the own chunks */
    float *totals;   /* [own chunks] */
    float *slots;    /* [chunks], in position order: all totals, then the states before each */
    float *incoming; /* [own chunks]: the state before each own chunk */
    float *carry;    /* one state, on its way */
    const float *initial;
    float *final;
    void *scratch; /* of the kernels */
} flow;

typedef struct buffers {
    float *blocks[2], *totals[2], *slots[2], *carry[2], *incoming[2], *edge[2]; /* of the flows S and D */
    float *seed;                                                                /* D's initial state */
    float *acc, *keys, *heads; /* fp32 rows of products: before a state is applied, or shared heads are summed */
    void *scratch;
} buffers;

/* Floats of one state of all own heads. */
static int64_t state_size(const usp_layer *layer) {
    return usp_layer_state_elements(layer) * layer->config.batch * usp_layer_own_heads(layer);
}

static float *carve_states(const usp_layer *layer, int64_t states, usp_arena *arena) {
    return usp_carve(arena, (size_t)(states * state_size(layer)) * sizeof(float));
}

static float *carve_rows(const usp_layer *layer, usp_arena *arena) {
    int64_t dim = layer->dim[USP_QUERY] > layer->dim[USP_VALUE] ? layer->dim[USP_QUERY] : layer->dim[USP_VALUE];
    int64_t elements = layer->schedule->query.limit * layer->config.batch * usp_layer_own_heads(layer) * dim;
    return usp_carve(arena, (size_t)elements * sizeof(float));
}

static int uses_chain(const usp_layer *layer) {
    return layer->config.state_exchange == USP_STATE_CHAIN ||
           (layer->config.state_exchange == USP_STATE_AUTO && layer->mesh.ring > 8);
}

static buffers carve(const usp_layer *layer, usp_pass pass, usp_arena *arena) {
    buffers b = {0};
    const usp_schedule *schedule = layer->schedule;
    for (int i = 0; i < (pass == USP_PASS_BACKWARD ? 2 : 1); i++) {
        b.blocks[i] = carve_states(layer, schedule->block_capacity, arena);
        b.totals[i] = carve_states(layer, schedule->own_chunk_limit, arena);
        if (uses_chain(layer))
            b.carry[i] = carve_states(layer, 1, arena);
        else
            b.slots[i] = carve_states(layer, schedule->chunk_capacity, arena);
        if (i == 1 || layer->config.recompute_state) /* else forward states are kept, in inner->states */
            b.incoming[i] = carve_states(layer, schedule->own_chunk_limit, arena);
        b.edge[i] = carve_states(layer, 1, arena);
    }
    b.scratch = usp_carve(arena, layer->scratch);
    b.acc = carve_rows(layer, arena);
    if (pass == USP_PASS_FORWARD) return b;
    b.keys = layer->config.recompute_state ? carve_rows(layer, arena) : b.acc; /* dq is done before dk begins */
    b.heads = carve_rows(layer, arena);
    b.seed = carve_states(layer, 1, arena);
    return b;
}

static size_t workspace(const usp_layer *layer, usp_pass pass) {
    usp_arena arena = {0};
    carve(layer, pass, &arena);
    return arena.used;
}

/* The states before the own chunks (LASP's cache). */
static size_t saved(const usp_layer *layer) {
    usp_arena arena = {0};
    if (!layer->config.recompute_state) carve_states(layer, layer->schedule->own_chunk_limit, &arena);
    return arena.used;
}

/* ---- states ------------------------------------------------------------------------------------------------------ */

static int is_causal(const usp_layer *layer) {
    return layer->config.mask == USP_MASK_CAUSAL;
}

/* One chunk that is the whole sequence: no state comes from anywhere but the caller. */
static int is_alone(const usp_layer *layer) {
    return is_causal(layer) && layer->mesh.ring == 1 && layer->schedule->own_chunks == 1;
}

static usp_linear block_arguments(const usp_layer *layer, const flow *f) {
    return (usp_linear){.dtype = layer->config.dtype,
                        .batch = layer->config.batch,
                        .heads = usp_layer_own_heads(layer),
                        .dim = layer->dim[USP_QUERY],
                        .value_dim = layer->dim[USP_VALUE],
                        .k_map = f->k_map,
                        .v_map = f->v_map,
                        .scale = layer->config.scale,
                        .log_decay = layer->decay,
                        .deterministic = layer->config.deterministic,
                        .causal = is_causal(layer),
                        .reverse = f->reverse,
                        .block = layer->schedule->device_block,
                        .blocks = (int)layer->schedule->blocks,
                        .tokens = layer->schedule->query.block[layer->mesh.r].rows,
                        .k = f->k,
                        .v = f->v,
                        .states = f->blocks,
                        .scratch = f->scratch};
}

static usp_scan scan_arguments(const usp_layer *layer, const flow *f) {
    return (usp_scan){.batch = layer->config.batch,
                      .heads = usp_layer_own_heads(layer),
                      .elements = usp_layer_state_elements(layer),
                      .log_decay = layer->decay,
                      .reverse = f->reverse};
}

/* The totals of all own blocks; a reversed total looks one token further, to the state before the block. */
static usp_status find_block_totals(usp_layer *layer, const usp_inner *inner, const flow *f) {
    usp_linear arguments = block_arguments(layer, f);
    arguments.shift = f->reverse;
    return layer->world->device->ops->linear_totals(layer->world->device, &arguments, inner->stream);
}

/* From block totals to the states before the blocks, each chunk from `initial`, to `final`. */
static usp_status scan_blocks(usp_layer *layer, const usp_inner *inner, const flow *f, const float *initial,
                              float *final) {
    usp_scan scan = scan_arguments(layer, f);
    scan.step = layer->schedule->device_block_step;
    scan.states = (int)layer->schedule->blocks;
    scan.groups = (int)layer->schedule->own_chunks;
    scan.data = f->blocks;
    scan.initial = initial;
    scan.final = final;
    return layer->world->device->ops->linear_scan(layer->world->device, &scan, inner->stream);
}

/* From totals of `count` chunks, beginning with chunk `first`, to the states before them. */
static usp_status scan_chunks(usp_layer *layer, const flow *f, int64_t first, int64_t count, float *data,
                              const float *initial, float *final, usp_stream stream) {
    usp_scan scan = scan_arguments(layer, f);
    scan.step = layer->schedule->device_chunk_step + first;
    scan.states = (int)count;
    scan.groups = 1;
    scan.data = data;
    scan.initial = initial;
    scan.final = final;
    return layer->world->device->ops->linear_scan(layer->world->device, &scan, stream);
}

static usp_status copy_state(usp_layer *layer, float *to, const float *from, usp_stream stream) {
    usp_device *device = layer->world->device;
    size_t bytes = (size_t)state_size(layer) * sizeof(float);
    if (from) return device->ops->copy(device, to, from, bytes, stream);
    return device->ops->zero(device, to, bytes, stream);
}

/* ---- exchange of states: gather ---------------------------------------------------------------------------------- */

static int ring_rank(const usp_layer *layer, int r) {
    return usp_mesh_rank(&layer->mesh, layer->mesh.u, r);
}

static int64_t state_bytes(const usp_layer *layer) {
    return state_size(layer) * (int64_t)sizeof(float);
}

static float *state_at(const usp_layer *layer, float *states, int64_t index) {
    return states ? states + index * state_size(layer) : NULL;
}

/* Every own total to every other rank; the others' into their slots. */
static void post_gather(const usp_layer *layer, const flow *f, usp_messages *messages) {
    const usp_schedule *schedule = layer->schedule;
    for (int64_t c = 0; c < schedule->chunks; c++) {
        const usp_chunk *chunk = &schedule->chunk[c];
        for (int r = 0; r < layer->mesh.ring; r++) {
            if (chunk->owner != layer->mesh.r && r == layer->mesh.r)
                usp_messages_recv(messages, ring_rank(layer, chunk->owner), state_at(layer, f->slots, c),
                                  state_bytes(layer));
            if (chunk->owner == layer->mesh.r && r != layer->mesh.r)
                usp_messages_send(messages, ring_rank(layer, r), state_at(layer, f->totals, chunk->own_index),
                                  state_bytes(layer));
        }
    }
}

/* With all totals here, every rank finds all states; own chunks take theirs (without a mask: the state of all tokens).
 */
static usp_status resolve_gather(usp_layer *layer, const usp_inner *inner, const flow *f) {
    const usp_schedule *schedule = layer->schedule;
    for (int64_t c = 0; c < schedule->chunks; c++)
        if (schedule->chunk[c].owner == layer->mesh.r)
            USP_TRY(copy_state(layer, state_at(layer, f->slots, c),
                               state_at(layer, f->totals, schedule->chunk[c].own_index), inner->stream));
    USP_TRY(scan_chunks(layer, f, 0, schedule->chunks, f->slots, f->initial, f->final, inner->stream));
    for (int64_t c = 0; c < schedule->chunks; c++)
        if (schedule->chunk[c].owner == layer->mesh.r)
            USP_TRY(copy_state(layer, state_at(layer, f->incoming, schedule->chunk[c].own_index),
                               is_causal(layer) ? state_at(layer, f->slots, c) : f->final, inner->stream));
    return USP_OK;
}

/* ---- exchange of states: chain ----------------------------------------------------------------------------------- */

/* Chunk i of the chain, in the direction of the flow. */
static int64_t chain_chunk(const usp_layer *layer, const flow *f, int64_t i) {
    return f->reverse ? layer->schedule->chunks - 1 - i : i;
}

/* The message by which the state crosses to another rank behind chunk i of the chain, if this rank has a part in it. */
static void post_hop(const usp_layer *layer, const flow *f, int64_t i, int receiving, usp_messages *messages) {
    const usp_schedule *schedule = layer->schedule;
    if (i < 0 || i + 1 >= schedule->chunks) return;
    int from = schedule->chunk[chain_chunk(layer, f, i)].owner,
        to = schedule->chunk[chain_chunk(layer, f, i + 1)].owner;
    if (from == to) return;
    if (!receiving && from == layer->mesh.r)
        usp_messages_send(messages, ring_rank(layer, to), f->carry, state_bytes(layer));
    if (receiving && to == layer->mesh.r)
        usp_messages_recv(messages, ring_rank(layer, from), f->carry, state_bytes(layer));
}

/* The state after the last chunk is everybody's where it is an output, or where there is no mask. */
static int spreads_final(const usp_layer *layer, const flow *f) {
    int wanted = f->reverse ? layer->config.initial_state : layer->config.final_state && !f->again;
    return layer->schedule->chunks > 0 && (wanted || !is_causal(layer));
}

static void post_spread(const usp_layer *layer, const flow *f, usp_messages *messages) {
    if (!spreads_final(layer, f)) return;
    int owner = layer->schedule->chunk[chain_chunk(layer, f, layer->schedule->chunks - 1)].owner;
    for (int r = 0; r < layer->mesh.ring; r++) {
        if (r == owner) continue;
        if (owner == layer->mesh.r) usp_messages_send(messages, ring_rank(layer, r), f->carry, state_bytes(layer));
        if (r == layer->mesh.r) usp_messages_recv(messages, ring_rank(layer, owner), f->carry, state_bytes(layer));
    }
}

/* One own link: keep the state before the chunk, fold the chunk in. A one-state scan does both. */
static usp_status fold_link(usp_layer *layer, const flow *f, int64_t c, usp_stream stream) {
    float *incoming = state_at(layer, f->incoming, layer->schedule->chunk[c].own_index);
    float *total = state_at(layer, f->totals, layer->schedule->chunk[c].own_index);
    USP_TRY(copy_state(layer, incoming, f->carry, stream));
    return scan_chunks(layer, f, c, 1, total, incoming, f->carry, stream);
}

/* The whole chain on the transfer stream, so that the caller's stream goes on with intra-chunk work. */
static usp_status run_chain(usp_layer *layer, const flow *f) {
    const usp_schedule *schedule = layer->schedule;
    usp_stream stream = layer->world->transfer;
    USP_TRY(copy_state(layer, f->carry, f->initial, stream));
    for (int64_t i = 0; i < schedule->chunks; i++) {
        int64_t c = chain_chunk(layer, f, i);
        if (schedule->chunk[c].owner != layer->mesh.r) continue;
        post_hop(layer, f, i - 1, 1, usp_messages_begin(layer));
        USP_TRY(usp_messages_exchange(layer));
        USP_TRY(fold_link(layer, f, c, stream));
        post_hop(layer, f, i, 0, usp_messages_begin(layer));
        USP_TRY(usp_messages_exchange(layer));
    }
    post_spread(layer, f, usp_messages_begin(layer));
    USP_TRY(usp_messages_exchange(layer));
    return f->final ? copy_state(layer, f->final, f->carry, stream) : USP_OK;
}

/* ---- exchange of states: both ------------------------------------------------------------------------------------ */

/* Finds each own chunk's total; the travel of states may begin. */
static usp_status begin_flow(usp_layer *layer, const usp_inner *inner, const flow *f) {
    USP_TRY(find_block_totals(layer, inner, f));
    USP_TRY(scan_blocks(layer, inner, f, NULL, f->totals));
    return usp_world_fork(layer->world, inner->stream, layer->world->transfer);
}

/* Enqueued behind the intra-chunk work, but on the other stream and waiting only for begin_flow. */
static usp_status travel_flow(usp_layer *layer, const flow *f) {
    if (uses_chain(layer)) return run_chain(layer, f);
    post_gather(layer, f, usp_messages_begin(layer));
    return usp_messages_exchange(layer);
}

static usp_status end_flow(usp_layer *layer, const usp_inner *inner, const flow *f) {
    USP_TRY(usp_messages_join(layer, inner->stream));
    if (!uses_chain(layer)) return resolve_gather(layer, inner, f);
    for (int64_t i = 0; i < layer->schedule->own_chunks && !is_causal(layer); i++)
        USP_TRY(copy_state(layer, state_at(layer, f->incoming, i), f->carry, inner->stream));
    return USP_OK;
}

/* ---- outputs ----------------------------------------------------------------------------------------------------- */

/* One product with a flow's states: out, dq, dk or dv. */
typedef struct product {
    const flow *states;
    usp_tensor q, k, v, out;
    usp_head_map q_map, k_map, v_map, out_map; /* out_map: how layer heads gather into heads of `out` */
    int transposed;
    int dim, value_dim; /* of q and k; of v and out */
    usp_dtype dtype;    /* of out */
} product;

static usp_tensor dense_rows(const usp_layer *layer, float *rows, int dim) {
    int64_t row = (int64_t)usp_layer_own_heads(layer) * dim;
    return (usp_tensor){rows, row, row * layer->config.batch, dim};
}

static usp_linear product_arguments(const usp_layer *layer, const product *p) {
    usp_linear arguments = block_arguments(layer, p->states);
    arguments.dim = p->dim;
    arguments.value_dim = p->value_dim;
    arguments.q = p->q;
    arguments.k = p->k;
    arguments.v = p->v;
    arguments.q_map = p->q_map;
    arguments.k_map = p->k_map;
    arguments.v_map = p->v_map;
    arguments.out = p->out;
    arguments.transposed = p->transposed;
    arguments.shift = !p->states->reverse;
    return arguments;
}

/* May the kernel write the result where it belongs, or do heads have to be summed or widened first? */
static int is_direct(const usp_layer *layer, const product *p) {
    return p->out_map.group == 1 && p->out_map.offset == 0 && p->dtype == layer->config.dtype;
}

/* The result inside one chunk, from the states before its blocks; `last`: these states are the true ones. */
static usp_status run_intra(usp_layer *layer, const usp_inner *inner, const product *p, float *rows, int last) {
    usp_linear arguments = product_arguments(layer, p);
    arguments.first = 1;
    arguments.last = last && is_direct(layer, p);
    arguments.acc = rows;
    return layer->world->device->ops->linear_output(layer->world->device, &arguments, inner->stream);
}

/* Adds what the state before the chunk gives (without a mask: the state of all tokens gives everything). */
static usp_status run_apply(usp_layer *layer, const usp_inner *inner, const product *p, float *rows) {
    usp_linear arguments = product_arguments(layer, p);
    arguments.states = p->states->incoming;
    arguments.first = !is_causal(layer);
    arguments.last = is_direct(layer, p);
    arguments.acc = rows;
    return layer->world->device->ops->linear_apply(layer->world->device, &arguments, inner->stream);
}

static usp_status copy_heads(usp_layer *layer, const usp_inner *inner, const product *p, usp_tensor from, int from_head,
                             usp_tensor to, int to_head, usp_dtype to_dtype, int accumulate) {
    usp_device *device = layer->world->device;
    usp_copy copy = {.tokens = layer->schedule->query.block[layer->mesh.r].rows,
                     .batch = layer->config.batch,
                     .heads = 1,
                     .dim = p->value_dim,
                     .from_dtype = USP_F32,
                     .to_dtype = to_dtype,
                     .from = from,
                     .to = to,
                     .accumulate = accumulate};
    if (copy.tokens == 0) return USP_OK;
    copy.from.data = (float *)from.data + from_head * from.stride_head;
    copy.to.data = (char *)to.data + to_head * to.stride_head * (int64_t)usp_dtype_size(to_dtype);
    return device->ops->copy_rows(device, &copy, inner->stream);
}

/* Sums the layer heads that read one head of the operand, in order, and writes the sum where it belongs. */
static usp_status gather_heads(usp_layer *layer, const usp_inner *inner, const product *p, float *rows) {
    usp_tensor sums = dense_rows(layer, rows, p->value_dim);
    if (is_direct(layer, p)) return USP_OK;
    for (int h = 0; h < usp_layer_own_heads(layer);) {
        int head = (h + p->out_map.offset) / p->out_map.group, first = h++;
        for (; h < usp_layer_own_heads(layer) && (h + p->out_map.offset) / p->out_map.group == head; h++)
            USP_TRY(copy_heads(layer, inner, p, sums, h, sums, first, USP_F32, 1));
        USP_TRY(copy_heads(layer, inner, p, sums, first, p->out, head, p->dtype, 0));
    }
    return USP_OK;
}

/* ---- forward ----------------------------------------------------------------------------------------------------- */

/* Of a tensor with a head for every layer head. */
static usp_head_map identity_map(void) {
    return (usp_head_map){1, 0};
}

static flow forward_flow(const usp_layer *layer, const usp_inner *inner, const buffers *b) {
    return (flow){.reverse = 0,
                  .k = inner->k,
                  .v = inner->v,
                  .k_map = usp_layer_head_map(layer, USP_KEY),
                  .v_map = usp_layer_head_map(layer, USP_VALUE),
                  .blocks = b->blocks[0],
                  .totals = b->totals[0],
                  .slots = b->slots[0],
                  .incoming = inner->states ? inner->states : b->incoming[0],
                  .carry = b->carry[0],
                  .initial = inner->initial,
                  .final = b->edge[0],
                  .scratch = b->scratch};
}

static product out_product(const usp_layer *layer, const usp_inner *inner, const flow *f) {
    return (product){.states = f,
                     .q = inner->q,
                     .k = inner->k,
                     .v = inner->v,
                     .out = inner->out,
                     .q_map = usp_layer_head_map(layer, USP_QUERY),
                     .k_map = f->k_map,
                     .v_map = f->v_map,
                     .out_map = identity_map(),
                     .dim = layer->dim[USP_QUERY],
                     .value_dim = layer->dim[USP_VALUE],
                     .dtype = layer->config.dtype};
}

/* Nothing comes from other ranks: one scan gives the true states at once. */
static usp_status forward_alone(usp_layer *layer, const usp_inner *inner, const flow *f, const product *out) {
    USP_TRY(find_block_totals(layer, inner, f));
    USP_TRY(scan_blocks(layer, inner, f, f->initial, f->final));
    USP_TRY(copy_state(layer, f->incoming, f->initial, inner->stream));
    return run_intra(layer, inner, out, NULL, 1);
}

static usp_status forward(usp_layer *layer, usp_inner *inner) {
    buffers b = carve(layer, USP_PASS_FORWARD, &inner->arena);
    flow f = forward_flow(layer, inner, &b);
    product out = out_product(layer, inner, &f);
    if (is_alone(layer)) {
        USP_TRY(forward_alone(layer, inner, &f, &out));
    } else {
        USP_TRY(begin_flow(layer, inner, &f));
        if (is_causal(layer)) USP_TRY(run_intra(layer, inner, &out, b.acc, 0));
        USP_TRY(travel_flow(layer, &f));
        USP_TRY(end_flow(layer, inner, &f));
        USP_TRY(run_apply(layer, inner, &out, b.acc));
    }
    return inner->final ? copy_state(layer, inner->final, f.final, inner->stream) : USP_OK;
}

/* ---- backward ---------------------------------------------------------------------------------------------------- */

static flow backward_flow(const usp_layer *layer, const usp_inner *inner, const buffers *b) {
    return (flow){.reverse = 1,
                  .k = inner->q,
                  .v = inner->dout,
                  .k_map = usp_layer_head_map(layer, USP_QUERY),
                  .v_map = identity_map(),
                  .blocks = b->blocks[1],
                  .totals = b->totals[1],
                  .slots = b->slots[1],
                  .incoming = b->incoming[1],
                  .carry = b->carry[1],
                  .initial = inner->dfinal,
                  .final = b->edge[1],
                  .scratch = b->scratch};
}

static product dq_product(const usp_layer *layer, const usp_inner *inner, const flow *s) {
    return (product){.states = s,
                     .q = inner->dout,
                     .k = inner->v,
                     .v = inner->k,
                     .out = inner->dq,
                     .q_map = identity_map(),
                     .k_map = s->v_map,
                     .v_map = s->k_map,
                     .out_map = usp_layer_head_map(layer, USP_QUERY),
                     .transposed = 1,
                     .dim = layer->dim[USP_VALUE],
                     .value_dim = layer->dim[USP_QUERY],
                     .dtype = inner->sum_queries ? USP_F32 : layer->config.dtype};
}

static product dk_product(const usp_layer *layer, const usp_inner *inner, const flow *d) {
    return (product){.states = d,
                     .q = inner->v,
                     .k = inner->dout,
                     .v = inner->q,
                     .out = inner->dk,
                     .q_map = usp_layer_head_map(layer, USP_VALUE),
                     .k_map = d->v_map,
                     .v_map = d->k_map,
                     .out_map = usp_layer_head_map(layer, USP_KEY),
                     .transposed = 1,
                     .dim = layer->dim[USP_VALUE],
                     .value_dim = layer->dim[USP_QUERY],
                     .dtype = inner->sum_keys ? USP_F32 : layer->config.dtype};
}

static product dv_product(const usp_layer *layer, const usp_inner *inner, const flow *d) {
    return (product){.states = d,
                     .q = inner->k,
                     .k = inner->q,
                     .v = inner->dout,
                     .out = inner->dv,
                     .q_map = usp_layer_head_map(layer, USP_KEY),
                     .k_map = d->k_map,
                     .v_map = d->v_map,
                     .out_map = usp_layer_head_map(layer, USP_VALUE),
                     .dim = layer->dim[USP_QUERY],
                     .value_dim = layer->dim[USP_VALUE],
                     .dtype = inner->sum_keys ? USP_F32 : layer->config.dtype};
}

/* D is kept without the scale, which every product applies; the caller's state gradients carry it. */
static usp_status scale_state(usp_layer *layer, const usp_inner *inner, float *state, float factor) {
    usp_device *device = layer->world->device;
    return device->ops->scale(device, state, state_size(layer), factor, inner->stream);
}

/* Are the forward states exchanged again, instead of taken from saved? */
static int exchanges_again(const usp_layer *layer) {
    return layer->config.recompute_state && !is_alone(layer);
}

/* The forward states of the blocks: from what was kept, or as far as they go before the exchange. */
static usp_status begin_forward_states(usp_layer *layer, const usp_inner *inner, const flow *s) {
    if (exchanges_again(layer)) return begin_flow(layer, inner, s);
    if (!is_causal(layer)) return USP_OK;
    USP_TRY(find_block_totals(layer, inner, s));
    return scan_blocks(layer, inner, s, layer->config.recompute_state ? s->initial : s->incoming, NULL);
}

static usp_status finish_product(usp_layer *layer, const usp_inner *inner, const product *p, float *rows, int apply) {
    if (apply) USP_TRY(run_apply(layer, inner, p, rows));
    return gather_heads(layer, inner, p, rows);
}

/* dq, dk, dv: everything inside the chunks, then the travel of states, then what these add. dq is done at once where
 * the forward states were kept. */
static usp_status backward_products(usp_layer *layer, const usp_inner *inner, const flow *s, const flow *d,
                                    const buffers *b) {
    product products[3] = {dq_product(layer, inner, s), dk_product(layer, inner, d), dv_product(layer, inner, d)};
    float *rows[3] = {b->acc, b->keys, b->heads};
    int causal = is_causal(layer), again = exchanges_again(layer), shared = !is_alone(layer);
    const int waits[3] = {again, shared, shared};
    for (int i = 0; i < 3; i++) {
        if (causal) USP_TRY(run_intra(layer, inner, &products[i], rows[i], !waits[i]));
        if (!waits[i]) USP_TRY(finish_product(layer, inner, &products[i], rows[i], !causal));
    }
    if (again) USP_TRY(travel_flow(layer, s));
    if (shared) USP_TRY(travel_flow(layer, d));
    if (again) USP_TRY(end_flow(layer, inner, s));
    if (shared) USP_TRY(end_flow(layer, inner, d));
    for (int i = 0; i < 3; i++)
        if (waits[i]) USP_TRY(finish_product(layer, inner, &products[i], rows[i], 1));
    return USP_OK;
}

static usp_status begin_adjoint(usp_layer *layer, const usp_inner *inner, const flow *d) {
    if (!is_alone(layer)) return begin_flow(layer, inner, d);
    USP_TRY(find_block_totals(layer, inner, d));
    return scan_blocks(layer, inner, d, d->initial, d->final);
}

static usp_status backward(usp_layer *layer, usp_inner *inner) {
    buffers b = carve(layer, USP_PASS_BACKWARD, &inner->arena);
    flow s = forward_flow(layer, inner, &b), d = backward_flow(layer, inner, &b);
    s.again = 1;
    if (inner->dfinal) {
        USP_TRY(copy_state(layer, b.seed, inner->dfinal, inner->stream));
        USP_TRY(scale_state(layer, inner, b.seed, 1 / layer->config.scale));
        d.initial = b.seed;
    }
    USP_TRY(begin_adjoint(layer, inner, &d));
    USP_TRY(begin_forward_states(layer, inner, &s));
    USP_TRY(backward_products(layer, inner, &s, &d, &b));
    if (!inner->dinitial) return USP_OK;
    USP_TRY(copy_state(layer, inner->dinitial, d.final, inner->stream));
    return scale_state(layer, inner, inner->dinitial, layer->config.scale);
}

/* ---- cost -------------------------------------------------------------------------------------------------------- */

static void count_flow(const usp_layer *layer, const flow *f, usp_messages *count) {
    if (!uses_chain(layer)) {
        post_gather(layer, f, count);
        return;
    }
    for (int64_t i = 0; i < layer->schedule->chunks; i++) {
        post_hop(layer, f, i, 0, count);
        post_hop(layer, f, i, 1, count);
    }
    post_spread(layer, f, count);
}

/* As the recurrence counts: 2 operations a multiply-add; k v^T and q S forward; q dout^T, k v^T, dq, dk, dv backward.
 */
static double flops(const usp_layer *layer, usp_pass pass, int r) {
    double tokens = (double)layer->schedule->query.block[r].rows;
    return tokens * (pass == USP_PASS_FORWARD ? 4.0 : 10.0) * (double)usp_layer_state_elements(layer);
}

static void count_messages(const usp_layer *layer, usp_pass pass, usp_messages *count) {
    flow s = {.again = pass == USP_PASS_BACKWARD}, d = {.reverse = 1};
    if (pass == USP_PASS_BACKWARD) count_flow(layer, &d, count);
    if (pass == USP_PASS_FORWARD || layer->config.recompute_state) count_flow(layer, &s, count);
}

/* ---- table ------------------------------------------------------------------------------------------------------- */

const usp_attn_ops usp_attn_linear = {"linear", workspace, saved, forward, backward, count_messages, flops};
