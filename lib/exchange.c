/* exchange.c - packs, posts and unpacks the head exchange (see exchange.h). The exchange itself is the transport's. */
#include "exchange.h"
#include "error.h"

/* ---- shapes ------------------------------------------------------------------------------------------------------ */

static const usp_sharding *sharding_of(const usp_layer *layer, const usp_bundle *bundle) {
    return bundle->keys ? &layer->sequence->key : &layer->sequence->query;
}

/* Tokens of ulysses rank u. */
static int64_t tokens_of(const usp_layer *layer, const usp_bundle *bundle, int u) {
    return sharding_of(layer, bundle)->local[layer->mesh.r * layer->mesh.ulysses + u];
}

static int64_t rows_of(const usp_layer *layer, const usp_bundle *bundle) {
    return bundle->keys ? usp_plan_keys(layer->plan) : usp_plan_queries(layer->plan);
}

static int64_t row_limit(const usp_layer *layer, const usp_bundle *bundle) {
    return bundle->keys ? layer->plan->key_limit : layer->plan->query_limit;
}

/* Rows of the block before those of rank u, in the order in which they are exchanged. */
static int64_t rows_before(const usp_layer *layer, const usp_bundle *bundle, int u) {
    const usp_ring_side *side = bundle->keys ? &layer->plan->key : &layer->plan->query;
    return u ? side->landing_end[u - 1] : 0;
}

/* Where the rows of rank u's tokens are in the block; NULL: where the tokens are. */
static const int32_t *landing_of(const usp_layer *layer, const usp_bundle *bundle, int u) {
    const usp_plan_arrays *device = &layer->plan->device;
    const int32_t *landing = bundle->keys ? device->key_landing : device->query_landing;
    return landing ? landing + rows_before(layer, bundle, u) : NULL;
}

int64_t usp_bundle_row(const usp_layer *layer, const usp_bundle *bundle, int u) {
    int64_t elements = 0;
    for (int i = 0; i < bundle->parts; i++)
        elements += (int64_t)usp_layer_heads(layer, bundle->part[i].like, u).count * bundle->part[i].dim;
    return elements;
}

/* Bytes of one token (all batches) on its way to or from rank u. */
static int64_t token_bytes(const usp_layer *layer, const usp_bundle *bundle, int u) {
    return layer->config.batch * usp_bundle_row(layer, bundle, u) * (int64_t)usp_dtype_size(bundle->wire);
}

int64_t usp_bundle_block_bytes(const usp_layer *layer, const usp_bundle *bundle, usp_dtype dtype) {
    return row_limit(layer, bundle) * layer->config.batch * usp_bundle_row(layer, bundle, layer->mesh.u) *
           (int64_t)usp_dtype_size(dtype);
}

/* A pointer moved by elements of a dtype; NULL stays NULL, for measuring. */
static void *advance(void *base, int64_t elements, usp_dtype dtype) {
    return base ? (char *)base + elements * (int64_t)usp_dtype_size(dtype) : NULL;
}

/* Part `part` of rows that hold rank u's heads of all parts. */
static usp_tensor view(const usp_layer *layer, const usp_bundle *bundle, void *rows, usp_dtype dtype, int part, int u) {
    int64_t row = usp_bundle_row(layer, bundle, u), before = 0;
    for (int i = 0; i < part; i++)
        before += (int64_t)usp_layer_heads(layer, bundle->part[i].like, u).count * bundle->part[i].dim;
    return (usp_tensor){advance(rows, before, dtype), row, row * layer->config.batch, bundle->part[part].dim};
}

usp_tensor usp_bundle_block(const usp_layer *layer, const usp_bundle *bundle, void *block, usp_dtype dtype, int part) {
    return view(layer, bundle, block, dtype, part, layer->mesh.u);
}

/* ---- memory ------------------------------------------------------------------------------------------------------ */

/* Elements of one (token, batch) row of all heads. */
static int64_t whole_row(const usp_layer *layer, const usp_bundle *bundle) {
    int64_t elements = 0;
    for (int i = 0; i < bundle->parts; i++)
        elements += (int64_t)layer->total[bundle->part[i].like] * bundle->part[i].dim;
    return elements;
}

void usp_bundle_carve(const usp_layer *layer, usp_bundle *bundle, usp_arena *arena) {
    int64_t limit = sharding_of(layer, bundle)->limit, bytes = 0, others = row_limit(layer, bundle);
    for (int u = 0; u < layer->mesh.ulysses; u++)
        if (u != layer->mesh.u) bytes += limit * token_bytes(layer, bundle, u);
    if (!usp_sequence_moves(layer->sequence)) others = rows_of(layer, bundle) - tokens_of(layer, bundle, layer->mesh.u);
    bundle->tokens_side = usp_carve(arena, (size_t)bytes);
    bundle->block_side = usp_carve(arena, (size_t)(others * token_bytes(layer, bundle, layer->mesh.u)));
    if (bundle->sums)
        bundle->sum =
            usp_carve(arena, (size_t)(limit * layer->config.batch * whole_row(layer, bundle)) * sizeof(float));
}

/* Own tokens' rows for peer u. */
static char *tokens_side_of(const usp_layer *layer, const usp_bundle *bundle, int u) {
    int64_t bytes = 0;
    for (int before = 0; before < u; before++)
        if (before != layer->mesh.u)
            bytes += tokens_of(layer, bundle, layer->mesh.u) * token_bytes(layer, bundle, before);
    return bundle->tokens_side ? bundle->tokens_side + bytes : NULL;
}

/* Peer u's rows of the block. */
static char *block_side_of(const usp_layer *layer, const usp_bundle *bundle, int u) {
    int64_t rows = rows_before(layer, bundle, u);
    if (u > layer->mesh.u) rows -= tokens_of(layer, bundle, layer->mesh.u);
    return bundle->block_side ? bundle->block_side + rows * token_bytes(layer, bundle, layer->mesh.u) : NULL;
}

/* ---- copies ------------------------------------------------------------------------------------------------------ */

usp_copy usp_bundle_copy(const usp_layer *layer, const usp_bundle *bundle, int part, int u, int64_t tokens) {
    return (usp_copy){.tokens = tokens,
                      .batch = layer->config.batch,
                      .heads = usp_layer_heads(layer, bundle->part[part].like, u).count,
                      .dim = bundle->part[part].dim};
}

/* Own tokens' heads for rank u, in a tensor of all heads. */
static usp_tensor heads_of(const usp_layer *layer, const usp_bundle_part *part, usp_tensor all, usp_dtype dtype,
                           int u) {
    all.data = advance(all.data, usp_layer_heads(layer, part->like, u).first * all.stride_head, dtype);
    return all;
}

/* Between own tokens and what lies for peer u; those for the own heads go straight to the block, and come from it. */
static usp_copy copy_tokens(const usp_layer *layer, const usp_bundle *bundle, int part, int u, int away) {
    const usp_bundle_part *p = &bundle->part[part];
    usp_copy copy = usp_bundle_copy(layer, bundle, part, u, tokens_of(layer, bundle, layer->mesh.u));
    usp_tensor tokens = heads_of(layer, p, p->tokens, p->tokens_dtype, u), there = p->block;
    usp_dtype dtype = p->block_dtype;
    if (u == layer->mesh.u) {
        *(away ? &copy.to_row : &copy.from_row) = landing_of(layer, bundle, u);
    } else {
        there = view(layer, bundle, tokens_side_of(layer, bundle, u), bundle->wire, part, u);
        dtype = bundle->wire;
    }
    copy.from = away ? tokens : there;
    copy.to = away ? there : tokens;
    copy.from_dtype = away ? p->tokens_dtype : dtype;
    copy.to_dtype = away ? dtype : p->tokens_dtype;
    return copy;
}

/* Between what lies for the ranks begin .. end - 1, without the own one among them, and the block. */
static usp_copy copy_block(const usp_layer *layer, const usp_bundle *bundle, int part, int begin, int end,
                           int to_block) {
    const usp_bundle_part *p = &bundle->part[part];
    int64_t rows = rows_before(layer, bundle, end) - rows_before(layer, bundle, begin);
    usp_copy copy = usp_bundle_copy(layer, bundle, part, layer->mesh.u, rows);
    usp_tensor lying = view(layer, bundle, block_side_of(layer, bundle, begin), bundle->wire, part, layer->mesh.u);
    copy.from = to_block ? lying : p->block;
    copy.to = to_block ? p->block : lying;
    copy.from_dtype = to_block ? bundle->wire : p->block_dtype;
    copy.to_dtype = to_block ? p->block_dtype : bundle->wire;
    *(to_block ? &copy.to_row : &copy.from_row) = landing_of(layer, bundle, begin);
    return copy;
}

static void add_block_copies(usp_layer *layer, const usp_bundle *bundle, int to_block) {
    int own = layer->mesh.u, ulysses = layer->mesh.ulysses;
    for (int part = 0; part < bundle->parts; part++) {
        usp_copies_add(layer, copy_block(layer, bundle, part, 0, own, to_block));
        usp_copies_add(layer, copy_block(layer, bundle, part, own + 1, ulysses, to_block));
    }
}

/* ---- messages ---------------------------------------------------------------------------------------------------- */

void usp_bundle_post(const usp_layer *layer, const usp_bundle *bundle, usp_messages *messages, int to_heads) {
    int own = layer->mesh.u;
    for (int u = 0; u < layer->mesh.ulysses; u++) {
        int peer = usp_mesh_rank(&layer->mesh, u, layer->mesh.r);
        int64_t tokens = tokens_of(layer, bundle, own) * token_bytes(layer, bundle, u);
        int64_t block = tokens_of(layer, bundle, u) * token_bytes(layer, bundle, own);
        if (u == own) continue;
        usp_messages_send(messages, peer, to_heads ? tokens_side_of(layer, bundle, u) : block_side_of(layer, bundle, u),
                          to_heads ? tokens : block);
        usp_messages_recv(messages, peer, to_heads ? block_side_of(layer, bundle, u) : tokens_side_of(layer, bundle, u),
                          to_heads ? block : tokens);
    }
}

/* ---- toward heads ------------------------------------------------------------------------------------------------ */

void usp_bundle_pack(usp_layer *layer, const usp_bundle *bundle) {
    for (int part = 0; part < bundle->parts; part++)
        for (int u = 0; u < layer->mesh.ulysses; u++) usp_copies_add(layer, copy_tokens(layer, bundle, part, u, 1));
}

void usp_bundle_land(usp_layer *layer, const usp_bundle *bundle) {
    add_block_copies(layer, bundle, 1);
}

/* ---- toward tokens ----------------------------------------------------------------------------------------------- */

void usp_bundle_lift(usp_layer *layer, const usp_bundle *bundle) {
    add_block_copies(layer, bundle, 0);
    for (int part = 0; part < bundle->parts && !bundle->sums; part++)
        usp_copies_add(layer, copy_tokens(layer, bundle, part, layer->mesh.u, 0));
}

/* The bundle whose tokens are the fp32 sums. */
static usp_bundle summed(const usp_layer *layer, const usp_bundle *bundle) {
    usp_bundle sums = *bundle;
    int64_t row = whole_row(layer, bundle), before = 0;
    for (int part = 0; part < bundle->parts; part++) {
        usp_bundle_part *p = &sums.part[part];
        p->tokens = (usp_tensor){bundle->sum + before, row, row * layer->config.batch, p->dim};
        p->tokens_dtype = USP_F32;
        before += (int64_t)layer->total[p->like] * p->dim;
    }
    return sums;
}

/* All ranks' parts one after the other, then to where they belong. */
static usp_status unpack_sums(usp_layer *layer, const usp_bundle *bundle, usp_stream stream) {
    usp_device *device = layer->world->device;
    usp_bundle sums = summed(layer, bundle);
    int64_t tokens = tokens_of(layer, bundle, layer->mesh.u);
    size_t bytes = (size_t)(tokens * layer->config.batch * whole_row(layer, bundle)) * sizeof(float);
    USP_TRY(device->ops->zero(device, bundle->sum, bytes, stream));
    for (int u = 0; u < layer->mesh.ulysses; u++) {
        for (int part = 0; part < bundle->parts; part++) {
            usp_copy copy = copy_tokens(layer, &sums, part, u, 0);
            copy.accumulate = 1;
            usp_copies_add(layer, copy);
        }
        USP_TRY(usp_copies_run(layer, stream));
    }
    for (int part = 0; part < bundle->parts; part++) {
        const usp_bundle_part *p = &bundle->part[part];
        usp_copies_add(layer, (usp_copy){.tokens = tokens,
                                         .batch = layer->config.batch,
                                         .heads = layer->total[p->like],
                                         .dim = p->dim,
                                         .to_dtype = p->tokens_dtype,
                                         .from = sums.part[part].tokens,
                                         .to = p->tokens});
    }
    return usp_copies_run(layer, stream);
}

usp_status usp_bundle_unpack(usp_layer *layer, const usp_bundle *bundle, usp_stream stream) {
    if (bundle->sums) return unpack_sums(layer, bundle, stream);
    for (int part = 0; part < bundle->parts; part++)
        for (int u = 0; u < layer->mesh.ulysses; u++)
            if (u != layer->mesh.u) usp_copies_add(layer, copy_tokens(layer, bundle, part, u, 0));
    return USP_OK;
}
