/* exchange.c - packs, posts and unpacks the head exchange (see exchange.h). The exchange itself is the transport's. */
#include "exchange.h"
#include "error.h"

/* ---- shapes ------------------------------------------------------------------------------------------------------ */

static const usp_sharding *sharding_of(const usp_layer *layer, const usp_bundle *bundle) {
    return bundle->keys ? &layer->sequence->key : &layer->sequence->query;
}

static const usp_ring_side *side_of(const usp_layer *layer, const usp_bundle *bundle) {
    return bundle->keys ? &layer->plan->key : &layer->plan->query;
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
    const usp_ring_side *side = side_of(layer, bundle);
    return u ? side->landing_end[u - 1] : 0;
}

/* The row of the block of each token of rank u; NULL: where the token is. */
static const int32_t *landing_of(const usp_layer *layer, const usp_bundle *bundle, int u) {
    const usp_plan_arrays *device = &layer->plan->device;
    const int32_t *landing = bundle->keys ? device->key_landing : device->query_landing;
    return landing ? landing + rows_before(layer, bundle, u) : NULL;
}

/* Elements of a row of rank u's heads before those of part `part`. */
static int64_t before(const usp_layer *layer, const usp_bundle *bundle, int part, int u) {
    int64_t elements = 0;
    for (int i = 0; i < part; i++)
        elements += (int64_t)usp_layer_heads(layer, bundle->part[i].like, u).count * bundle->part[i].dim;
    return elements;
}

int64_t usp_bundle_row(const usp_layer *layer, const usp_bundle *bundle, int u) {
    return before(layer, bundle, bundle->parts, u);
}

/* Bytes of one token (all batches) on its way to or from rank u, of one slice. */
static int64_t token_bytes(const usp_layer *layer, const usp_bundle *bundle, int u) {
    int64_t row = usp_bundle_row(layer, bundle, u) / bundle->slice.count;
    return layer->config.batch * row * (int64_t)usp_dtype_size(bundle->wire);
}

int64_t usp_bundle_block_bytes(const usp_layer *layer, const usp_bundle *bundle, usp_dtype dtype) {
    return row_limit(layer, bundle) * layer->config.batch * usp_bundle_row(layer, bundle, layer->mesh.u) *
           (int64_t)usp_dtype_size(dtype);
}

/* A pointer moved by elements of a dtype; NULL stays NULL, for measuring. */
static void *advance(void *base, int64_t elements, usp_dtype dtype) {
    return base ? (char *)base + elements * (int64_t)usp_dtype_size(dtype) : NULL;
}

usp_tensor usp_bundle_block(const usp_layer *layer, const usp_bundle *bundle, void *block, usp_dtype dtype, int part) {
    int64_t row = usp_bundle_row(layer, bundle, layer->mesh.u), skip = before(layer, bundle, part, layer->mesh.u);
    return (usp_tensor){advance(block, skip, dtype), row, row * layer->config.batch, bundle->part[part].dim};
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

/* Where rank `owner` has its tokens packed for the heads of rank `header`; in own memory, but alike on all ranks. */
static char *tokens_side_of(const usp_layer *layer, const usp_bundle *bundle, int owner, int header) {
    int64_t bytes = 0;
    for (int before = 0; before < header; before++)
        if (before != owner) bytes += tokens_of(layer, bundle, owner) * token_bytes(layer, bundle, before);
    return bundle->tokens_side ? bundle->tokens_side + bytes : NULL;
}

/* Where rank `header` has the tokens of rank `owner` packed, of its block. */
static char *block_side_of(const usp_layer *layer, const usp_bundle *bundle, int owner, int header) {
    int64_t rows = rows_before(layer, bundle, owner);
    if (owner > header) rows -= tokens_of(layer, bundle, header);
    return bundle->block_side ? bundle->block_side + rows * token_bytes(layer, bundle, header) : NULL;
}

/* ---- pieces ------------------------------------------------------------------------------------------------------ */

/* Tokens of one rank, one part, the heads of another rank: of a message for each batch entry if they go in runs, else
 * of one message. Packed it is [batch][tokens][heads * dim]. */
typedef struct bundle_piece {
    int u;                      /* the other rank: who owns the tokens, or whose the heads are */
    int part, head, heads, dim; /* head: the first one, of the header's */
    int in_runs;
    int64_t begin, tokens;
    int64_t packed; /* elements of the bundle before it, for or from rank u */
} bundle_piece;

static const usp_landing_runs *runs_of(const usp_layer *layer, const usp_bundle *bundle, int u) {
    return &side_of(layer, bundle)->landing_runs[u];
}

/* Whether the tokens of rank `owner` go in runs: both ranks of a message find the same. Single numbers are too short.
 * Where ownership follows documents sizes must not, or ranks that re-planned differently would not be told so. */
static int goes_in_runs(const usp_layer *layer, const usp_bundle *bundle, int owner) {
    int64_t messages = (int64_t)runs_of(layer, bundle, owner)->runs * bundle->parts * layer->config.batch;
    return messages <= USP_MOST_PIECES && bundle->part[0].dim > 1 && !usp_sequence_moves(layer->sequence);
}

static int pieces_of(const usp_layer *layer, const usp_bundle *bundle, int owner) {
    return bundle->parts * (goes_in_runs(layer, bundle, owner) ? runs_of(layer, bundle, owner)->runs : 1);
}

/* Piece i of the tokens of `owner` for the heads of `header`, one of which this rank is. Packed, one slice takes the
 * place of the one before. */
static bundle_piece piece_of(const usp_layer *layer, const usp_bundle *bundle, int owner, int header, int i) {
    const usp_landing_runs *runs = runs_of(layer, bundle, owner);
    int part = i % bundle->parts, run = i / bundle->parts, in_runs = goes_in_runs(layer, bundle, owner);
    const usp_bundle_part *p = &bundle->part[part];
    usp_slice slice = bundle->slice;
    int heads = usp_layer_heads(layer, p->like, header).count / slice.count;
    int64_t begin = in_runs ? runs->begin[run] : 0, row = usp_bundle_row(layer, bundle, header) / slice.count;
    int64_t end = in_runs ? runs->begin[run + 1] : tokens_of(layer, bundle, owner);
    int64_t packed = begin * row + (end - begin) * before(layer, bundle, part, header) / slice.count;
    return (bundle_piece){.u = owner == layer->mesh.u ? header : owner,
                          .part = part,
                          .head = slice.number * heads,
                          .heads = heads,
                          .dim = p->dim,
                          .in_runs = in_runs,
                          .begin = begin,
                          .tokens = end - begin,
                          .packed = packed * layer->config.batch};
}

/* What a piece is at one end: own tokens, or rows of the block. */
typedef struct bundle_end {
    bundle_piece piece;
    usp_tensor tensor, packed;
    usp_dtype dtype;
    const int32_t *rows; /* of the tensor, by token; NULL: one after the other */
    int lies;            /* travels as rows, not packed */
    int carved;          /* the tensor is */
} bundle_end;

/* The elements of a row are side by side, and the rows not nearer than they are long, nor further apart than messages
 * say. */
static int is_rows(const usp_tensor *tensor, const bundle_piece *piece, usp_dtype dtype) {
    int64_t row = (int64_t)piece->heads * piece->dim, distance = tensor->stride_token;
    int dense = piece->heads == 1 || tensor->stride_head == piece->dim;
    return dense && distance >= row && distance <= INT32_MAX / (int64_t)usp_dtype_size(dtype);
}

static bundle_end end_of(const usp_bundle *bundle, bundle_piece piece, usp_tensor tensor, usp_dtype dtype, char *side) {
    int64_t row = (int64_t)piece.heads * piece.dim;
    usp_tensor packed = {advance(side, piece.packed, bundle->wire), piece.tokens * row, row, piece.dim};
    int lies = piece.in_runs && dtype == bundle->wire && is_rows(&tensor, &piece, dtype);
    return (bundle_end){piece, tensor, packed, dtype, NULL, lies, 0};
}

/* Own tokens' heads for rank u, in a tensor of all heads. */
static usp_tensor heads_of(const usp_layer *layer, const usp_bundle_part *part, usp_tensor all, usp_dtype dtype,
                           int u) {
    all.data = advance(all.data, usp_layer_heads(layer, part->like, u).first * all.stride_head, dtype);
    return all;
}

/* Piece i of the tokens of `owner` for the heads of `header`, as the owner has it: packed, if that is another rank, or
 * if it arrives where ranks may write, which the caller's tensors are not. */
static bundle_end tokens_end(const usp_layer *layer, const usp_bundle *bundle, int owner, int header, int i,
                             int arrives) {
    bundle_piece piece = piece_of(layer, bundle, owner, header, i);
    const usp_bundle_part *p = &bundle->part[piece.part];
    usp_tensor tensor = heads_of(layer, p, p->tokens, p->tokens_dtype, header);
    int64_t skip = piece.begin * tensor.stride_token + piece.head * tensor.stride_head;
    tensor.data = advance(tensor.data, skip, p->tokens_dtype);
    bundle_end end = end_of(bundle, piece, tensor, p->tokens_dtype, tokens_side_of(layer, bundle, owner, header));
    end.lies = end.lies && !bundle->sums && !(arrives && usp_layer_reaches(layer, USP_AXIS_ULYSSES));
    return end;
}

/* The same as the one has it whose heads they are; in the own block, but alike on all ranks. */
static bundle_end block_end(const usp_layer *layer, const usp_bundle *bundle, int owner, int header, int i) {
    bundle_piece piece = piece_of(layer, bundle, owner, header, i);
    const usp_bundle_part *p = &bundle->part[piece.part];
    const usp_ring_side *side = side_of(layer, bundle);
    usp_tensor tensor = p->block;
    int64_t row = piece.in_runs ? side->landing[rows_before(layer, bundle, owner) + piece.begin] : 0;
    tensor.data = advance(tensor.data, row * tensor.stride_token + piece.head * tensor.stride_head, p->block_dtype);
    bundle_end end = end_of(bundle, piece, tensor, p->block_dtype, block_side_of(layer, bundle, owner, header));
    if (!piece.in_runs) end.rows = landing_of(layer, bundle, owner);
    end.carved = bundle->carved;
    return end;
}

/* ---- copies ------------------------------------------------------------------------------------------------------ */

usp_copy usp_bundle_copy(const usp_layer *layer, const usp_bundle *bundle, int part, int u, int64_t tokens) {
    return (usp_copy){.tokens = tokens,
                      .batch = layer->config.batch,
                      .heads = usp_layer_heads(layer, bundle->part[part].like, u).count,
                      .dim = bundle->part[part].dim};
}

/* Between an end and where it is packed. */
static usp_copy copy_end(const usp_layer *layer, const usp_bundle *bundle, const bundle_end *end, int packs) {
    usp_copy copy = {
        .tokens = end->piece.tokens, .batch = layer->config.batch, .heads = end->piece.heads, .dim = end->piece.dim};
    copy.from = packs ? end->tensor : end->packed;
    copy.to = packs ? end->packed : end->tensor;
    copy.from_dtype = packs ? end->dtype : bundle->wire;
    copy.to_dtype = packs ? bundle->wire : end->dtype;
    *(packs ? &copy.from_row : &copy.to_row) = end->rows;
    return copy;
}

/* Own tokens' own heads go straight to the block, and come from it. */
static usp_copy copy_own(const usp_layer *layer, const usp_bundle *bundle, int part, int to_block) {
    const usp_bundle_part *p = &bundle->part[part];
    int own = layer->mesh.u;
    usp_copy copy = usp_bundle_copy(layer, bundle, part, own, tokens_of(layer, bundle, own));
    usp_tensor tokens = heads_of(layer, p, p->tokens, p->tokens_dtype, own);
    copy.from = to_block ? tokens : p->block;
    copy.to = to_block ? p->block : tokens;
    copy.from_dtype = to_block ? p->tokens_dtype : p->block_dtype;
    copy.to_dtype = to_block ? p->block_dtype : p->tokens_dtype;
    *(to_block ? &copy.to_row : &copy.from_row) = landing_of(layer, bundle, own);
    return copy;
}

static void add_own_copies(usp_layer *layer, const usp_bundle *bundle, int to_block, int adds) {
    for (int part = 0; part < bundle->parts; part++) {
        usp_copy copy = copy_own(layer, bundle, part, to_block);
        copy.accumulate = adds;
        usp_copies_add(layer, copy);
    }
}

/* Copies of what does not travel as it lies, between own tokens' heads for rank u and where they are packed; between
 * rank u's rows of the block and where they are packed. Nothing for the own rank. */
static void add_token_copies(usp_layer *layer, const usp_bundle *bundle, int u, int packs, int adds) {
    for (int i = 0; u != layer->mesh.u && i < pieces_of(layer, bundle, layer->mesh.u); i++) {
        bundle_end end = tokens_end(layer, bundle, layer->mesh.u, u, i, !packs);
        usp_copy copy = copy_end(layer, bundle, &end, packs);
        copy.accumulate = adds;
        if (!end.lies) usp_copies_add(layer, copy);
    }
}

static void add_block_copies(usp_layer *layer, const usp_bundle *bundle, int u, int packs) {
    for (int i = 0; u != layer->mesh.u && i < pieces_of(layer, bundle, u); i++) {
        bundle_end end = block_end(layer, bundle, u, layer->mesh.u, i);
        if (!end.lies) usp_copies_add(layer, copy_end(layer, bundle, &end, packs));
    }
}

/* ---- messages ---------------------------------------------------------------------------------------------------- */

/* Where batch entry b of what the end gets may arrive: where it belongs, if that is carved, else packed. */
static usp_tensor arrival_of(const bundle_end *end) {
    return end->lies && end->carved ? end->tensor : end->packed;
}

/* The message of batch entry b of a piece, or of all entries if it does not go in runs, from or to `end`; `to`: the
 * receiver's end. */
static usp_message message_of(const usp_layer *layer, const usp_bundle *bundle, const bundle_end *end,
                              const bundle_end *to, int b) {
    const bundle_piece *piece = &end->piece;
    int64_t size = (int64_t)usp_dtype_size(bundle->wire), row = (int64_t)piece->heads * piece->dim;
    int64_t rows = piece->in_runs ? piece->tokens : 1, all = piece->tokens * row * layer->config.batch;
    usp_tensor from = end->lies ? end->tensor : end->packed, there = arrival_of(to);
    return (usp_message){.peer = usp_mesh_rank(&layer->mesh, piece->u, layer->mesh.r),
                         .base = advance(from.data, b * from.stride_batch, bundle->wire),
                         .rows = rows,
                         .bytes = (size_t)((piece->in_runs ? row : all) * size),
                         .stride = (size_t)((piece->in_runs ? from.stride_token : all) * size),
                         .packed = advance(end->packed.data, b * end->packed.stride_batch, bundle->wire),
                         .joined = piece->packed + b * end->packed.stride_batch > 0,
                         .there = advance(there.data, b * there.stride_batch, bundle->wire),
                         .there_stride = (size_t)((piece->in_runs ? there.stride_token : all) * size)};
}

static void post_pieces(const usp_layer *layer, const usp_bundle *bundle, int owner, int header, int to_heads,
                        usp_messages *messages) {
    int owns = owner == layer->mesh.u, sends = owns == to_heads;
    for (int i = 0; i < pieces_of(layer, bundle, owner); i++) {
        bundle_end tokens = tokens_end(layer, bundle, owner, header, i, !to_heads);
        bundle_end block = block_end(layer, bundle, owner, header, i);
        for (int b = 0; b < (tokens.piece.in_runs ? layer->config.batch : 1); b++) {
            usp_message message = message_of(layer, bundle, owns ? &tokens : &block, to_heads ? &block : &tokens, b);
            (sends ? usp_messages_send_rows : usp_messages_recv_rows)(messages, message);
        }
    }
}

void usp_bundle_post(const usp_layer *layer, const usp_bundle *bundle, usp_messages *messages, int to_heads) {
    int own = layer->mesh.u;
    for (int u = 0; u < layer->mesh.ulysses; u++) {
        if (u == own) continue;
        post_pieces(layer, bundle, own, u, to_heads, messages);
        post_pieces(layer, bundle, u, own, to_heads, messages);
    }
}

/* ---- toward heads ------------------------------------------------------------------------------------------------ */

void usp_bundle_keep(usp_layer *layer, const usp_bundle *bundle, int to_heads) {
    if (to_heads || !bundle->sums) add_own_copies(layer, bundle, to_heads, 0);
}

void usp_bundle_pack(usp_layer *layer, const usp_bundle *bundle) {
    for (int u = 0; u < layer->mesh.ulysses; u++) add_token_copies(layer, bundle, u, 1, 0);
}

void usp_bundle_land(usp_layer *layer, const usp_bundle *bundle) {
    for (int u = 0; u < layer->mesh.ulysses; u++) add_block_copies(layer, bundle, u, 0);
}

/* ---- toward tokens ----------------------------------------------------------------------------------------------- */

void usp_bundle_lift(usp_layer *layer, const usp_bundle *bundle) {
    for (int u = 0; u < layer->mesh.ulysses; u++) add_block_copies(layer, bundle, u, 1);
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
        if (u == layer->mesh.u) add_own_copies(layer, &sums, 0, 1);
        add_token_copies(layer, &sums, u, 0, 1);
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
    for (int u = 0; u < layer->mesh.ulysses; u++) add_token_copies(layer, bundle, u, 0, 0);
    return USP_OK;
}
