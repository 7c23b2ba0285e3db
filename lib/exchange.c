/* exchange.c - packs, posts and unpacks the head exchange (see exchange.h). The exchange itself is the comm's. */
#include "exchange.h"
#include "error.h"

/* ---- shapes ------------------------------------------------------------------------------------------------------ */

usp_bundle usp_bundle_of(const usp_layer *layer, usp_operand operand, usp_dtype dtype) {
    return (usp_bundle){1, {operand}, {layer->dim[operand]}, dtype, operand == USP_KEY || operand == USP_VALUE};
}

usp_bundle usp_bundle_keys(const usp_layer *layer, usp_dtype dtype) {
    return (usp_bundle){2, {USP_KEY, USP_VALUE}, {layer->dim[USP_KEY], layer->dim[USP_VALUE]}, dtype, 1};
}

usp_bundle usp_bundle_rows(usp_operand operand) {
    return (usp_bundle){1, {operand}, {1}, USP_F32, 0};
}

static const usp_ring_side *side_of(const usp_layer *layer, const usp_bundle *bundle) {
    return bundle->keys ? &layer->schedule->key : &layer->schedule->query;
}

static const usp_sharding *sharding_of(const usp_layer *layer, const usp_bundle *bundle) {
    return bundle->keys ? &layer->sequence->key : &layer->sequence->query;
}

static int64_t own_tokens(const usp_layer *layer, const usp_bundle *bundle) {
    return sharding_of(layer, bundle)->local[layer->mesh.p];
}

int64_t usp_bundle_row(const usp_layer *layer, const usp_bundle *bundle, int u) {
    int64_t elements = 0;
    for (int i = 0; i < bundle->parts; i++)
        elements += (int64_t)usp_layer_heads(layer, bundle->operand[i], u).count * bundle->dim[i];
    return elements;
}

/* Bytes of one token (all batches) for ulysses rank u's heads. */
static int64_t token_bytes(const usp_layer *layer, const usp_bundle *bundle, int u) {
    return layer->config.batch * usp_bundle_row(layer, bundle, u) * (int64_t)usp_dtype_size(bundle->dtype);
}

int64_t usp_bundle_block_bytes(const usp_layer *layer, const usp_bundle *bundle) {
    return side_of(layer, bundle)->limit * token_bytes(layer, bundle, layer->mesh.u);
}

static int64_t staging_bytes(const usp_layer *layer, const usp_bundle *bundle) {
    int64_t bytes = 0;
    for (int u = 0; u < layer->mesh.ulysses; u++)
        if (u != layer->mesh.u) bytes += sharding_of(layer, bundle)->limit * token_bytes(layer, bundle, u);
    return bytes;
}

static int is_scattered(const usp_layer *layer, const usp_bundle *bundle) {
    const usp_ring_side *side = side_of(layer, bundle);
    for (int64_t i = 0; i < side->landings; i++)
        if (side->landing[i].step != 1) return 1;
    return 0;
}

static int holds_shared(const usp_layer *layer, const usp_bundle *bundle) {
    int shared = 0;
    for (int i = 0; i < bundle->parts; i++) shared |= layer->shared[bundle->operand[i]];
    return shared;
}

/* Elements of one (token, batch) row of all heads. */
static int64_t whole_row(const usp_layer *layer, const usp_bundle *bundle) {
    int64_t elements = 0;
    for (int i = 0; i < bundle->parts; i++) elements += (int64_t)layer->total[bundle->operand[i]] * bundle->dim[i];
    return elements;
}

/* Bytes of the fp32 sum that replicated heads need; 0 if no head is replicated. */
static int64_t sum_bytes(const usp_layer *layer, const usp_bundle *bundle) {
    if (!holds_shared(layer, bundle)) return 0;
    return sharding_of(layer, bundle)->limit * layer->config.batch * whole_row(layer, bundle) * (int64_t)sizeof(float);
}

/* A pointer moved by elements of a dtype; NULL stays NULL, for measuring. */
static void *advance(void *base, int64_t elements, usp_dtype dtype) {
    return base ? (char *)base + elements * (int64_t)usp_dtype_size(dtype) : NULL;
}

usp_tensor usp_bundle_view(const usp_layer *layer, const usp_bundle *bundle, void *block, int part, int u) {
    int64_t row = usp_bundle_row(layer, bundle, u);
    int64_t before = part ? (int64_t)usp_layer_heads(layer, bundle->operand[0], u).count * bundle->dim[0] : 0;
    return (usp_tensor){advance(block, before, bundle->dtype), row, row * layer->config.batch, bundle->dim[part]};
}

/* Where the tokens for peer u begin in staging; peers by ascending u, without this rank. */
static char *staging_of(const usp_layer *layer, const usp_transit *transit, int u) {
    int64_t bytes = 0;
    for (int before = 0; before < u; before++)
        if (before != layer->mesh.u)
            bytes += own_tokens(layer, &transit->bundle) * token_bytes(layer, &transit->bundle, before);
    return transit->staging ? (char *)transit->staging + bytes : NULL;
}

usp_transit usp_transit_carve(const usp_layer *layer, const usp_bundle *bundle, void *block, int toward_tokens,
                              usp_arena *arena) {
    usp_transit transit = {.bundle = *bundle, .block = block};
    transit.staging = usp_carve(arena, (size_t)staging_bytes(layer, bundle));
    if (is_scattered(layer, bundle)) transit.landing = usp_carve(arena, (size_t)usp_bundle_block_bytes(layer, bundle));
    if (toward_tokens) transit.sum = usp_carve(arena, (size_t)sum_bytes(layer, bundle));
    return transit;
}

/* ---- copies ------------------------------------------------------------------------------------------------------ */

static usp_tensor from_token(usp_tensor tensor, int64_t token, usp_dtype dtype) {
    tensor.data = advance(tensor.data, token * tensor.stride_token, dtype);
    return tensor;
}

static usp_tensor from_head(usp_tensor tensor, int head, usp_dtype dtype) {
    tensor.data = advance(tensor.data, head * tensor.stride_head, dtype);
    return tensor;
}

static usp_status copy_part(usp_layer *layer, const usp_transit *transit, int part, int u, int64_t tokens,
                            usp_tensor from, usp_dtype from_dtype, usp_tensor to, usp_dtype to_dtype, int accumulate,
                            usp_stream stream) {
    usp_operand operand = transit->bundle.operand[part];
    usp_copy copy = {.tokens = tokens,
                     .batch = layer->config.batch,
                     .heads = usp_layer_heads(layer, operand, u).count,
                     .dim = transit->bundle.dim[part],
                     .from_dtype = from_dtype,
                     .to_dtype = to_dtype,
                     .from = from,
                     .to = to,
                     .accumulate = accumulate};
    if (tokens == 0 || copy.heads == 0) return USP_OK;
    return layer->world->device->ops->copy_rows(layer->world->device, &copy, stream);
}

/* The rows of one landing in the block, as a tensor over its tokens. */
static usp_tensor landing_rows(const usp_layer *layer, const usp_transit *transit, int part,
                               const usp_landing *landing) {
    usp_tensor rows = usp_bundle_view(layer, &transit->bundle, transit->block, part, layer->mesh.u);
    rows = from_token(rows, landing->row, transit->bundle.dtype);
    rows.stride_token *= landing->step;
    return rows;
}

/* Own tokens stay on this rank: straight from the tensor into the block, or back. */
static usp_status copy_own(usp_layer *layer, const usp_transit *transit, int part, usp_tensor tokens, usp_dtype dtype,
                           int to_block, int accumulate, usp_stream stream) {
    const usp_ring_side *side = side_of(layer, &transit->bundle);
    usp_dtype wire = transit->bundle.dtype;
    for (int64_t i = 0; i < side->landings; i++) {
        const usp_landing *landing = &side->landing[i];
        if (landing->u != layer->mesh.u) continue;
        usp_tensor there = landing_rows(layer, transit, part, landing);
        usp_tensor here = from_token(tokens, landing->source, dtype);
        USP_TRY(to_block
                    ? copy_part(layer, transit, part, landing->u, landing->count, here, dtype, there, wire, 0, stream)
                    : copy_part(layer, transit, part, landing->u, landing->count, there, wire, here, dtype, accumulate,
                                stream));
    }
    return USP_OK;
}

/* Moves the rows of other ranks' tokens between the landing buffer, where messages lie one after the other, and the
 * block, where they are scattered. */
static usp_status move_scattered(usp_layer *layer, const usp_transit *transit, int to_block, usp_stream stream) {
    const usp_ring_side *side = side_of(layer, &transit->bundle);
    usp_dtype dtype = transit->bundle.dtype;
    int64_t before = 0;
    for (int64_t i = 0; i < side->landings; before += side->landing[i++].count)
        for (int part = 0; part < transit->bundle.parts && side->landing[i].u != layer->mesh.u; part++) {
            usp_tensor lying = usp_bundle_view(layer, &transit->bundle, transit->landing, part, layer->mesh.u);
            usp_tensor rows = landing_rows(layer, transit, part, &side->landing[i]);
            lying = from_token(lying, before, dtype);
            USP_TRY(copy_part(layer, transit, part, layer->mesh.u, side->landing[i].count, to_block ? lying : rows,
                              dtype, to_block ? rows : lying, dtype, 0, stream));
        }
    return USP_OK;
}

/* ---- messages ---------------------------------------------------------------------------------------------------- */

static int world_rank(const usp_layer *layer, int u) {
    return usp_mesh_rank(&layer->mesh, u, layer->mesh.r);
}

/* Messages between own tokens (staging) and each peer: one for each own segment and peer. */
static void post_tokens(const usp_layer *layer, const usp_transit *transit, usp_messages *messages, int sending) {
    const usp_ring_side *side = side_of(layer, &transit->bundle);
    for (int u = 0; u < layer->mesh.ulysses; u++) {
        if (u == layer->mesh.u) continue;
        char *staging = staging_of(layer, transit, u);
        int64_t bytes = token_bytes(layer, &transit->bundle, u);
        for (int64_t i = 0; i < side->landings; i++) {
            const usp_landing *landing = &side->landing[i];
            if (landing->u != layer->mesh.u) continue;
            char *piece = staging ? staging + landing->source * bytes : NULL;
            if (sending)
                usp_messages_send(messages, world_rank(layer, u), piece, landing->count * bytes);
            else
                usp_messages_recv(messages, world_rank(layer, u), piece, landing->count * bytes);
        }
    }
}

/* Messages between the block (or, scattered, the landing buffer) and each peer: one for each of the peers' segments. */
static void post_block(const usp_layer *layer, const usp_transit *transit, usp_messages *messages, int sending) {
    const usp_ring_side *side = side_of(layer, &transit->bundle);
    int64_t bytes = token_bytes(layer, &transit->bundle, layer->mesh.u), before = 0;
    char *base = transit->landing ? transit->landing : transit->block;
    for (int64_t i = 0; i < side->landings; before += side->landing[i++].count) {
        const usp_landing *landing = &side->landing[i];
        if (landing->u == layer->mesh.u) continue;
        char *piece = base ? base + (transit->landing ? before : landing->row) * bytes : NULL;
        if (sending)
            usp_messages_send(messages, world_rank(layer, landing->u), piece, landing->count * bytes);
        else
            usp_messages_recv(messages, world_rank(layer, landing->u), piece, landing->count * bytes);
    }
}

/* ---- toward heads ------------------------------------------------------------------------------------------------ */

usp_status usp_transit_pack(usp_layer *layer, const usp_transit *transit, const usp_tensor *tokens, usp_dtype from,
                            usp_stream stream) {
    const usp_bundle *bundle = &transit->bundle;
    for (int part = 0; part < bundle->parts; part++)
        for (int u = 0; u < layer->mesh.ulysses; u++) {
            usp_tensor source = from_head(tokens[part], usp_layer_heads(layer, bundle->operand[part], u).first, from);
            if (u == layer->mesh.u) {
                USP_TRY(copy_own(layer, transit, part, source, from, 1, 0, stream));
                continue;
            }
            usp_tensor packed = usp_bundle_view(layer, bundle, staging_of(layer, transit, u), part, u);
            USP_TRY(copy_part(layer, transit, part, u, own_tokens(layer, bundle), source, from, packed, bundle->dtype,
                              0, stream));
        }
    return USP_OK;
}

void usp_transit_post_to_heads(const usp_layer *layer, const usp_transit *transit, usp_messages *messages) {
    post_tokens(layer, transit, messages, 1);
    post_block(layer, transit, messages, 0);
}

usp_status usp_transit_land(usp_layer *layer, const usp_transit *transit, usp_stream stream) {
    return is_scattered(layer, &transit->bundle) ? move_scattered(layer, transit, 1, stream) : USP_OK;
}

/* ---- toward tokens ----------------------------------------------------------------------------------------------- */

usp_status usp_transit_lift(usp_layer *layer, const usp_transit *transit, usp_stream stream) {
    return is_scattered(layer, &transit->bundle) ? move_scattered(layer, transit, 0, stream) : USP_OK;
}

void usp_transit_post_to_tokens(const usp_layer *layer, const usp_transit *transit, usp_messages *messages) {
    post_block(layer, transit, messages, 1);
    post_tokens(layer, transit, messages, 0);
}

/* Own tokens of one part from every peer's heads into `to`, in rank order. */
static usp_status unpack_part(usp_layer *layer, const usp_transit *transit, int part, usp_tensor to, usp_dtype dtype,
                              int accumulate, usp_stream stream) {
    const usp_bundle *bundle = &transit->bundle;
    for (int u = 0; u < layer->mesh.ulysses; u++) {
        usp_tensor target = from_head(to, usp_layer_heads(layer, bundle->operand[part], u).first, dtype);
        if (u == layer->mesh.u) {
            USP_TRY(copy_own(layer, transit, part, target, dtype, 0, accumulate, stream));
            continue;
        }
        usp_tensor packed = usp_bundle_view(layer, bundle, staging_of(layer, transit, u), part, u);
        USP_TRY(copy_part(layer, transit, part, u, own_tokens(layer, bundle), packed, bundle->dtype, target, dtype,
                          accumulate, stream));
    }
    return USP_OK;
}

/* Replicated heads: sum the replicas in fp32, then convert. */
static usp_status sum_part(usp_layer *layer, const usp_transit *transit, int part, usp_tensor to, usp_dtype dtype,
                           usp_stream stream) {
    const usp_bundle *bundle = &transit->bundle;
    usp_operand operand = bundle->operand[part];
    int64_t row = whole_row(layer, bundle),
            before = part ? (int64_t)layer->total[bundle->operand[0]] * bundle->dim[0] : 0;
    usp_tensor sum = {(float *)transit->sum + before, row, row * layer->config.batch, bundle->dim[part]};
    USP_TRY(unpack_part(layer, transit, part, sum, USP_F32, 1, stream));
    usp_copy copy = {.tokens = own_tokens(layer, bundle),
                     .batch = layer->config.batch,
                     .heads = layer->total[operand],
                     .dim = bundle->dim[part],
                     .from_dtype = USP_F32,
                     .to_dtype = dtype,
                     .from = sum,
                     .to = to};
    return layer->world->device->ops->copy_rows(layer->world->device, &copy, stream);
}

usp_status usp_transit_unpack(usp_layer *layer, const usp_transit *transit, const usp_tensor *tokens, usp_dtype to,
                              usp_stream stream) {
    int64_t sum = sum_bytes(layer, &transit->bundle);
    usp_device *device = layer->world->device;
    if (sum) USP_TRY(device->ops->zero(device, transit->sum, (size_t)sum, stream));
    for (int part = 0; part < transit->bundle.parts; part++)
        USP_TRY(sum ? sum_part(layer, transit, part, tokens[part], to, stream)
                    : unpack_part(layer, transit, part, tokens[part], to, 0, stream));
    return USP_OK;
}
