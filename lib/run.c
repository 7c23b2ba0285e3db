/* run.c - one forward or backward call as a straight line: carve, exchange in, the kind's ring stage, exchange out.
 * With one ulysses rank there is no exchange and the ring stage works on the caller's tensors. */
#include "run.h"
#include "abi.h"
#include "error.h"
#include "exchange.h"
#include "size.h"

/* ---- buffers ----------------------------------------------------------------------------------------------------- */

/* What forward keeps for backward: exchanged tensors (with one ulysses rank the caller's own serve), lse, states. */
typedef struct saved_buffers {
    void *q, *keys;
    float *lse, *states;
} saved_buffers;

typedef struct forward_buffers {
    usp_transit q, keys, out, lse;
    float *initial, *final, *all_finals;
} forward_buffers;

typedef struct backward_buffers {
    usp_transit dout, delta, dq, dkeys;
    float *token_delta, *delta_rows, *dfinal, *dinitial, *all_initials;
} backward_buffers;

static int is_softmax(const usp_layer *layer) {
    return layer->config.attention == USP_SOFTMAX;
}

static int exchanges(const usp_layer *layer) {
    return layer->mesh.ulysses > 1;
}

/* fp32 numbers, one for each query row and own head. */
static float *carve_rows(const usp_layer *layer, usp_arena *arena) {
    int64_t rows = layer->schedule->query.limit;
    return usp_carve(arena, (size_t)(rows * layer->config.batch * usp_layer_own_heads(layer)) * sizeof(float));
}

static float *carve_state(const usp_layer *layer, int heads, usp_arena *arena) {
    return usp_carve(arena, (size_t)(usp_layer_state_elements(layer) * layer->config.batch * heads) * sizeof(float));
}

static usp_transit carve_in(const usp_layer *layer, usp_bundle bundle, void *block, usp_arena *arena) {
    return usp_transit_carve(layer, &bundle, block, 0, arena);
}

static usp_transit carve_out(const usp_layer *layer, usp_bundle bundle, usp_arena *arena) {
    void *block = usp_carve(arena, (size_t)usp_bundle_block_bytes(layer, &bundle));
    return usp_transit_carve(layer, &bundle, block, 1, arena);
}

static saved_buffers carve_saved(const usp_layer *layer, usp_arena *arena) {
    saved_buffers b = {0};
    usp_bundle q = usp_bundle_of(layer, USP_QUERY, layer->config.dtype),
               keys = usp_bundle_keys(layer, layer->config.dtype);
    size_t states = layer->attn->saved(layer);
    if (exchanges(layer)) {
        b.q = usp_carve(arena, (size_t)usp_bundle_block_bytes(layer, &q));
        b.keys = usp_carve(arena, (size_t)usp_bundle_block_bytes(layer, &keys));
    }
    if (is_softmax(layer)) b.lse = carve_rows(layer, arena);
    if (states) b.states = usp_carve(arena, states);
    return b;
}

static forward_buffers carve_forward(const usp_layer *layer, const saved_buffers *kept, usp_arena *arena) {
    forward_buffers b = {0};
    usp_dtype dtype = layer->config.dtype;
    if (!exchanges(layer)) return b;
    b.q = carve_in(layer, usp_bundle_of(layer, USP_QUERY, dtype), kept->q, arena);
    b.keys = carve_in(layer, usp_bundle_keys(layer, dtype), kept->keys, arena);
    b.out = carve_out(layer, usp_bundle_of(layer, USP_OUT, dtype), arena);
    if (layer->config.return_lse) b.lse = carve_out(layer, usp_bundle_rows(USP_OUT), arena);
    if (layer->config.initial_state) b.initial = carve_state(layer, usp_layer_own_heads(layer), arena);
    if (layer->config.final_state) {
        b.final = carve_state(layer, usp_layer_own_heads(layer), arena);
        b.all_finals = carve_state(layer, layer->heads, arena);
    }
    return b;
}

/* Gradients travel in the layer's dtype, or in fp32 where replicas will be summed. */
static usp_dtype key_gradient_dtype(const usp_layer *layer) {
    return layer->shared[USP_KEY] || layer->shared[USP_VALUE] ? USP_F32 : layer->config.dtype;
}

static usp_dtype query_gradient_dtype(const usp_layer *layer) {
    return layer->shared[USP_QUERY] ? USP_F32 : layer->config.dtype;
}

static backward_buffers carve_backward(const usp_layer *layer, usp_arena *arena) {
    backward_buffers b = {0};
    const usp_layer_config *c = &layer->config;
    if (is_softmax(layer)) b.delta_rows = carve_rows(layer, arena);
    if (!exchanges(layer)) return b;
    usp_bundle dout = usp_bundle_of(layer, USP_OUT, c->dtype), delta = usp_bundle_rows(USP_OUT);
    b.dout = carve_in(layer, dout, usp_carve(arena, (size_t)usp_bundle_block_bytes(layer, &dout)), arena);
    if (is_softmax(layer)) {
        b.delta = carve_in(layer, delta, usp_carve(arena, (size_t)usp_bundle_block_bytes(layer, &delta)), arena);
        int64_t numbers = layer->sequence->query.limit * c->batch * layer->heads;
        b.token_delta = usp_carve(arena, (size_t)numbers * sizeof(float));
    }
    b.dq = carve_out(layer, usp_bundle_of(layer, USP_QUERY, query_gradient_dtype(layer)), arena);
    b.dkeys = carve_out(layer, usp_bundle_keys(layer, key_gradient_dtype(layer)), arena);
    if (c->final_state) b.dfinal = carve_state(layer, usp_layer_own_heads(layer), arena);
    if (c->initial_state) {
        b.dinitial = carve_state(layer, usp_layer_own_heads(layer), arena);
        b.all_initials = carve_state(layer, layer->heads, arena);
    }
    return b;
}

/* Backward reads the initial state too, where it computes states again. */
static float *carve_initial(const usp_layer *layer, usp_arena *arena) {
    return exchanges(layer) && layer->config.initial_state ? carve_state(layer, usp_layer_own_heads(layer), arena)
                                                           : NULL;
}

static size_t saved_bytes(const usp_layer *layer) {
    usp_arena arena = {0};
    carve_saved(layer, &arena);
    return arena.used;
}

/* A forward that saves has memory of the caller's for what it keeps. */
static size_t forward_bytes(const usp_layer *layer, int saves) {
    usp_arena arena = {0}, saved = {0};
    saved_buffers kept = carve_saved(layer, saves ? &saved : &arena);
    carve_forward(layer, &kept, &arena);
    return arena.used + layer->attn->workspace(layer, USP_PASS_FORWARD);
}

static size_t backward_bytes(const usp_layer *layer) {
    usp_arena arena = {0};
    carve_backward(layer, &arena);
    carve_initial(layer, &arena);
    return arena.used + layer->attn->workspace(layer, USP_PASS_BACKWARD);
}

/* ---- arguments --------------------------------------------------------------------------------------------------- */

static usp_status check_workspace(const void *workspace, size_t bytes, size_t needed) {
    if (bytes < needed) return usp_fail(USP_WORKSPACE, "workspace has %zu bytes, this call needs %zu", bytes, needed);
    if (needed && !workspace) return usp_fail(USP_WORKSPACE, "workspace is NULL, this call needs %zu bytes", needed);
    if ((uintptr_t)workspace % USP_ALIGNMENT)
        return usp_fail(USP_WORKSPACE, "workspace is not aligned to %d bytes", USP_ALIGNMENT);
    return USP_OK;
}

static usp_status check_saved(const void *saved, const char *name) {
    if ((uintptr_t)saved % USP_ALIGNMENT)
        return usp_fail(USP_WORKSPACE, "%s.saved is not aligned to %d bytes", name, USP_ALIGNMENT);
    return USP_OK;
}

static uint64_t size_of(int64_t stride) {
    return stride < 0 ? 0 - (uint64_t)stride : (uint64_t)stride;
}

/* From any element of a tensor to any other there is a number of bytes. */
static usp_status check_span(const usp_tensor *tensor, const int64_t *extent, int dim, size_t element,
                             const char *name) {
    const usp_factor row[] = {{"dim", (uint64_t)dim}, {"bytes", element}};
    const uint64_t stride[] = {size_of(tensor->stride_batch), size_of(tensor->stride_token),
                               size_of(tensor->stride_head)};
    int64_t span = 0;
    usp_status status = usp_size_add(&span, row, 2);
    for (int i = 0; i < 3 && status == USP_OK; i++)
        status = usp_size_add(
            &span, (const usp_factor[]){{"steps", (uint64_t)extent[i] - 1}, {"stride", stride[i]}, row[1]}, 3);
    if (status == USP_OK) return USP_OK;
    return usp_fail(status, "%s has strides %lld, %lld, %lld of batch, token and head: more bytes than 64 bits count",
                    name, (long long)tensor->stride_batch, (long long)tensor->stride_token,
                    (long long)tensor->stride_head);
}

/* A tensor that holds elements must have an address that fits its dtype. */
static usp_status check_tensor(const usp_layer *layer, const usp_tensor *tensor, int64_t tokens, int heads, int dim,
                               const char *name) {
    size_t element = usp_dtype_size(layer->config.dtype);
    if (tokens == 0 || heads == 0) return USP_OK;
    USP_REQUIRE(tensor->data, "%s.data is NULL", name);
    USP_REQUIRE((uintptr_t)tensor->data % element == 0, "%s.data is not aligned to its elements", name);
    return check_span(tensor, (const int64_t[]){layer->config.batch, tokens, heads}, dim, element, name);
}

/* fp32 numbers, given where the configuration asks for them and nowhere else; `empty`: there are none. */
static usp_status check_pointer(const float *pointer, int asked, int empty, const char *name) {
    USP_REQUIRE(!asked || empty || pointer, "%s is NULL while the layer's configuration asks for it", name);
    USP_REQUIRE(asked || !pointer, "%s is given while the layer's configuration does not ask for it", name);
    USP_REQUIRE(!asked || empty || (uintptr_t)pointer % sizeof *pointer == 0, "%s is not aligned to its elements",
                name);
    return USP_OK;
}

/* How many tokens and heads the caller's tensors have: own tokens of all heads, or the inner stage's. */
typedef struct extents {
    int64_t queries, keys;
    int heads[USP_OPERANDS];
} extents;

static extents extents_of(const usp_layer *layer, int inner) {
    extents e = {layer->sequence->query.local[layer->mesh.p], layer->sequence->key.local[layer->mesh.p], {0}};
    if (inner) {
        e.queries = layer->schedule->query.block[layer->mesh.r].rows;
        e.keys = layer->schedule->key.block[layer->mesh.r].rows;
    }
    for (int i = 0; i < USP_OPERANDS; i++)
        e.heads[i] = inner ? usp_layer_heads(layer, (usp_operand)i, layer->mesh.u).count : layer->total[i];
    return e;
}

/* A tensor of a call. */
typedef struct argument {
    const char *name;
    const usp_tensor *tensor;
    usp_operand operand; /* whose shape it has */
    int written;
} argument;

static int64_t tokens_of(const extents *e, usp_operand operand) {
    return operand == USP_KEY || operand == USP_VALUE ? e->keys : e->queries;
}

/* Whether no two elements share a place: strides by size, each at least as long as all that lies within it. Their span
 * has been checked. */
static int strides_nest(const usp_tensor *tensor, int64_t batch, int64_t tokens, int64_t heads, int dim) {
    int64_t extent[] = {batch, tokens, heads};
    uint64_t stride[] = {size_of(tensor->stride_batch), size_of(tensor->stride_token), size_of(tensor->stride_head)};
    uint64_t span = (uint64_t)dim;
    for (int left = 3; left > 0; left--) {
        int next = 0;
        for (int i = 1; i < left; i++)
            if (extent[next] == 1 || (extent[i] > 1 && stride[i] < stride[next])) next = i;
        uint64_t steps = (uint64_t)extent[next] - 1;
        if (steps && stride[next] < span) return 0;
        span += steps * stride[next];
        extent[next] = extent[left - 1];
        stride[next] = stride[left - 1];
    }
    return 1;
}

/* Elements of what is written have places of their own, and it is none of the tensors `before` it. */
static usp_status check_written(const usp_layer *layer, const extents *e, const argument *list, int before) {
    const argument *a = &list[before];
    const usp_tensor *t = a->tensor;
    USP_REQUIRE(
        strides_nest(t, layer->config.batch, tokens_of(e, a->operand), e->heads[a->operand], layer->dim[a->operand]),
        "%s has strides %lld, %lld, %lld of batch, token and head: elements share a place", a->name,
        (long long)t->stride_batch, (long long)t->stride_token, (long long)t->stride_head);
    for (int i = 0; i < before; i++) {
        int empty = tokens_of(e, list[i].operand) == 0 || e->heads[list[i].operand] == 0;
        USP_REQUIRE(empty || list[i].tensor->data != t->data, "%s.data is that of %s", a->name, list[i].name);
    }
    return USP_OK;
}

static usp_status check_arguments(const usp_layer *layer, const extents *e, const argument *list, int count) {
    for (int i = 0; i < count; i++) {
        int64_t tokens = tokens_of(e, list[i].operand);
        int heads = e->heads[list[i].operand];
        USP_TRY(check_tensor(layer, list[i].tensor, tokens, heads, layer->dim[list[i].operand], list[i].name));
        if (list[i].written && tokens > 0 && heads > 0) USP_TRY(check_written(layer, e, list, i));
    }
    return USP_OK;
}

static usp_status check_forward(const usp_layer *layer, const usp_forward *args, int inner) {
    const argument list[] = {{"usp_forward.q", &args->q, USP_QUERY, 0},
                             {"usp_forward.k", &args->k, USP_KEY, 0},
                             {"usp_forward.v", &args->v, USP_VALUE, 0},
                             {"usp_forward.out", &args->out, USP_OUT, 1}};
    extents e = extents_of(layer, inner);
    USP_TRY(check_arguments(layer, &e, list, sizeof list / sizeof *list));
    USP_TRY(check_pointer(args->lse, layer->config.return_lse, !e.queries || !e.heads[USP_OUT], "usp_forward.lse"));
    USP_TRY(check_pointer(args->initial_state, layer->config.initial_state, 0, "usp_forward.initial_state"));
    USP_TRY(check_pointer(args->final_state, layer->config.final_state, 0, "usp_forward.final_state"));
    return check_saved(args->saved, "usp_forward");
}

static usp_status check_backward(const usp_layer *layer, const usp_backward *args, int inner) {
    const argument list[] = {
        {"usp_backward.q", &args->q, USP_QUERY, 0},     {"usp_backward.k", &args->k, USP_KEY, 0},
        {"usp_backward.v", &args->v, USP_VALUE, 0},     {"usp_backward.out", &args->out, USP_OUT, 0},
        {"usp_backward.dout", &args->dout, USP_OUT, 0}, {"usp_backward.dq", &args->dq, USP_QUERY, 1},
        {"usp_backward.dk", &args->dk, USP_KEY, 1},     {"usp_backward.dv", &args->dv, USP_VALUE, 1}};
    extents e = extents_of(layer, inner);
    USP_TRY(check_arguments(layer, &e, list, sizeof list / sizeof *list));
    USP_TRY(check_pointer(args->dfinal_state, layer->config.final_state, 0, "usp_backward.dfinal_state"));
    USP_TRY(check_pointer(args->dinitial_state, layer->config.initial_state, 0, "usp_backward.dinitial_state"));
    USP_TRY(check_pointer(args->initial_state, layer->config.initial_state, 0, "usp_backward.initial_state"));
    if (!args->saved && layer->sizes.saved)
        return usp_fail(USP_WORKSPACE, "usp_backward.saved is NULL: pass what forward wrote");
    return check_saved(args->saved, "usp_backward");
}

/* ---- states between all heads and own heads ---------------------------------------------------------------------- */

/* Heads first .. first + heads of a state with all heads, as one row of a tensor. */
static usp_status copy_states(usp_layer *layer, const float *from, int from_heads, int from_first, float *to,
                              int to_heads, int to_first, int heads, usp_stream stream) {
    int64_t elements = usp_layer_state_elements(layer);
    usp_device *device = layer->world->device;
    usp_copy copy = {.tokens = 1, .batch = layer->config.batch, .heads = heads, .dim = (int)elements};
    copy.from = (usp_tensor){(float *)(uintptr_t)from + from_first * elements, from_heads * elements, 0, elements};
    copy.to = (usp_tensor){to + to_first * elements, to_heads * elements, 0, elements};
    return heads ? device->ops->copy_rows(device, &copy, stream) : USP_OK;
}

static usp_status slice_state(usp_layer *layer, const float *all, float *own, usp_stream stream) {
    usp_head_range heads = usp_layer_heads(layer, USP_OUT, layer->mesh.u);
    return copy_states(layer, all, layer->heads, heads.first, own, heads.count, 0, heads.count, stream);
}

/* Every ulysses rank's heads to every other: `staging` has room for all heads, rank after rank. */
static void post_states(const usp_layer *layer, const float *own, float *staging, usp_messages *messages) {
    int64_t one = usp_layer_state_elements(layer) * layer->config.batch;
    for (int u = 0; u < layer->mesh.ulysses; u++) {
        usp_head_range theirs = usp_layer_heads(layer, USP_OUT, u);
        if (u == layer->mesh.u) continue;
        int peer = usp_mesh_rank(&layer->mesh, u, layer->mesh.r);
        usp_messages_send(messages, peer, own, one * usp_layer_own_heads(layer) * (int64_t)sizeof(float));
        usp_messages_recv(messages, peer, staging ? staging + one * theirs.first : NULL,
                          one * theirs.count * (int64_t)sizeof(float));
    }
}

static usp_status unpack_states(usp_layer *layer, const float *own, const float *staging, float *all,
                                usp_stream stream) {
    int64_t one = usp_layer_state_elements(layer) * layer->config.batch;
    for (int u = 0; u < layer->mesh.ulysses; u++) {
        usp_head_range heads = usp_layer_heads(layer, USP_OUT, u);
        const float *from = u == layer->mesh.u ? own : staging + one * heads.first;
        USP_TRY(copy_states(layer, from, heads.count, 0, all, layer->heads, heads.first, heads.count, stream));
    }
    return USP_OK;
}

/* ---- rows: lse and delta between [batch, head, token] and the bundle's [token, batch, head] ---------------------- */

static usp_tensor head_major(float *numbers, int heads, int64_t tokens) {
    return (usp_tensor){numbers, heads * tokens, 1, tokens};
}

static usp_status transpose_rows(usp_layer *layer, usp_tensor from, usp_tensor to, usp_stream stream) {
    usp_device *device = layer->world->device;
    usp_copy copy = {.tokens = layer->schedule->query.block[layer->mesh.r].rows,
                     .batch = layer->config.batch,
                     .heads = usp_layer_own_heads(layer),
                     .dim = 1,
                     .from = from,
                     .to = to};
    return device->ops->copy_rows(device, &copy, stream);
}

/* ---- forward ----------------------------------------------------------------------------------------------------- */

/* The ring stage's view of tensors that need no exchange. */
static usp_inner inner_of_forward(const usp_forward *args, const saved_buffers *kept, usp_arena arena,
                                  usp_stream stream) {
    return (usp_inner){.q = args->q,
                       .k = args->k,
                       .v = args->v,
                       .out = args->out,
                       .key_block = kept->keys,
                       .lse = kept->lse,
                       .states = kept->states,
                       .initial = args->initial_state,
                       .final = args->final_state,
                       .arena = arena,
                       .stream = stream};
}

static usp_status forward_inner(usp_layer *layer, const usp_forward *args, const saved_buffers *kept, usp_arena arena,
                                usp_stream stream) {
    usp_device *device = layer->world->device;
    int64_t rows = layer->schedule->query.block[layer->mesh.r].rows;
    size_t bytes = (size_t)(rows * layer->config.batch * usp_layer_own_heads(layer)) * sizeof(float);
    usp_inner inner = inner_of_forward(args, kept, arena, stream);
    USP_TRY(layer->attn->forward(layer, &inner));
    if (!layer->config.return_lse || !bytes) return USP_OK;
    return device->ops->copy(device, args->lse, kept->lse, bytes, stream);
}

static usp_status exchange_in(usp_layer *layer, const usp_forward *args, const forward_buffers *b, usp_stream stream) {
    usp_dtype dtype = layer->config.dtype;
    const usp_tensor keys[] = {args->k, args->v};
    usp_messages *messages = usp_messages_begin(layer);
    USP_TRY(usp_transit_pack(layer, &b->q, &args->q, dtype, stream));
    USP_TRY(usp_transit_pack(layer, &b->keys, keys, dtype, stream));
    usp_transit_post_to_heads(layer, &b->q, messages);
    usp_transit_post_to_heads(layer, &b->keys, messages);
    USP_TRY(usp_messages_run(layer, stream));
    if (b->initial) USP_TRY(slice_state(layer, args->initial_state, b->initial, stream));
    USP_TRY(usp_messages_join(layer, stream));
    USP_TRY(usp_transit_land(layer, &b->q, stream));
    return usp_transit_land(layer, &b->keys, stream);
}

static usp_status lift_lse(usp_layer *layer, const forward_buffers *b, float *lse, usp_stream stream) {
    int64_t rows = layer->schedule->query.block[layer->mesh.r].rows;
    usp_tensor block = usp_bundle_view(layer, &b->lse.bundle, b->lse.block, 0, layer->mesh.u);
    USP_TRY(transpose_rows(layer, head_major(lse, usp_layer_own_heads(layer), rows), block, stream));
    return usp_transit_lift(layer, &b->lse, stream);
}

static void post_forward_out(const usp_layer *layer, const forward_buffers *b, usp_messages *messages) {
    usp_transit_post_to_tokens(layer, &b->out, messages);
    if (layer->config.return_lse) usp_transit_post_to_tokens(layer, &b->lse, messages);
    if (layer->config.final_state) post_states(layer, b->final, b->all_finals, messages);
}

static usp_status exchange_out(usp_layer *layer, const usp_forward *args, const forward_buffers *b, float *lse,
                               usp_stream stream) {
    int64_t tokens = layer->sequence->query.local[layer->mesh.p];
    USP_TRY(usp_transit_lift(layer, &b->out, stream));
    if (layer->config.return_lse) USP_TRY(lift_lse(layer, b, lse, stream));
    post_forward_out(layer, b, usp_messages_begin(layer));
    USP_TRY(usp_messages_run(layer, stream));
    USP_TRY(usp_messages_join(layer, stream));
    USP_TRY(usp_transit_unpack(layer, &b->out, &args->out, layer->config.dtype, stream));
    if (layer->config.return_lse) {
        usp_tensor all = head_major(args->lse, layer->heads, tokens);
        USP_TRY(usp_transit_unpack(layer, &b->lse, &all, USP_F32, stream));
    }
    if (!layer->config.final_state) return USP_OK;
    return unpack_states(layer, b->final, b->all_finals, args->final_state, stream);
}

/* The ring stage's view of exchanged tensors. */
static usp_inner inner_of_blocks(const usp_layer *layer, const saved_buffers *kept, usp_arena arena,
                                 usp_stream stream) {
    usp_bundle q = usp_bundle_of(layer, USP_QUERY, layer->config.dtype),
               keys = usp_bundle_keys(layer, layer->config.dtype);
    return (usp_inner){.q = usp_bundle_view(layer, &q, kept->q, 0, layer->mesh.u),
                       .k = usp_bundle_view(layer, &keys, kept->keys, 0, layer->mesh.u),
                       .v = usp_bundle_view(layer, &keys, kept->keys, 1, layer->mesh.u),
                       .key_block = kept->keys,
                       .packed = 1,
                       .lse = kept->lse,
                       .states = kept->states,
                       .arena = arena,
                       .stream = stream};
}

static usp_status forward_exchanged(usp_layer *layer, const usp_forward *args, const saved_buffers *kept,
                                    usp_arena arena, usp_stream stream) {
    forward_buffers b = carve_forward(layer, kept, &arena);
    usp_inner inner = inner_of_blocks(layer, kept, (usp_arena){arena.base + arena.used, 0}, stream);
    inner.out = usp_bundle_view(layer, &b.out.bundle, b.out.block, 0, layer->mesh.u);
    inner.initial = b.initial;
    inner.final = b.final;
    USP_TRY(exchange_in(layer, args, &b, stream));
    USP_TRY(layer->attn->forward(layer, &inner));
    return exchange_out(layer, args, &b, kept->lse, stream);
}

static usp_status run_forward(usp_layer *layer, const usp_forward *given, void *workspace, size_t bytes,
                              usp_stream stream, int inner) {
    usp_forward args;
    USP_TRY(usp_world_poll(layer->world));
    USP_TRY(usp_abi_read(&args, sizeof args, given, "usp_forward"));
    USP_TRY(check_forward(layer, &args, inner));
    USP_TRY(check_workspace(workspace, bytes,
                            args.saved ? layer->sizes.forward_saving_workspace : layer->sizes.forward_workspace));
    usp_arena arena = {workspace, 0}, saved = {args.saved, 0};
    saved_buffers kept = carve_saved(layer, args.saved ? &saved : &arena);
    usp_arena rest = {arena.base + arena.used, 0};
    int moves = exchanges(layer) && !inner;
    return usp_world_conclude(layer->world, moves ? forward_exchanged(layer, &args, &kept, arena, stream)
                                                  : forward_inner(layer, &args, &kept, rest, stream));
}

usp_status usp_layer_forward(usp_layer *layer, const usp_forward *args, void *workspace, size_t bytes,
                             usp_stream stream) {
    USP_REQUIRE(layer, "layer is NULL");
    USP_TRY(usp_guard_enter(layer->world));
    return usp_guard_leave(layer->world, run_forward(layer, args, workspace, bytes, stream, 0));
}

usp_status usp_layer_inner_forward(usp_layer *layer, const usp_forward *args, void *workspace, size_t bytes,
                                   usp_stream stream) {
    USP_REQUIRE(layer, "layer is NULL");
    USP_TRY(usp_guard_enter(layer->world));
    return usp_guard_leave(layer->world, run_forward(layer, args, workspace, bytes, stream, 1));
}

/* ---- backward ---------------------------------------------------------------------------------------------------- */

static usp_status find_delta(usp_layer *layer, const usp_backward *args, int64_t tokens, int heads, float *delta,
                             usp_stream stream) {
    usp_device *device = layer->world->device;
    usp_softmax rows = {.dtype = layer->config.dtype,
                        .batch = layer->config.batch,
                        .heads = heads,
                        .value_dim = layer->dim[USP_OUT],
                        .queries = tokens,
                        .out = args->out,
                        .dout = args->dout};
    return device->ops->softmax_delta(device, &rows, delta, stream);
}

static usp_status backward_inner(usp_layer *layer, const usp_backward *args, const saved_buffers *kept, usp_arena arena,
                                 usp_stream stream) {
    backward_buffers b = carve_backward(layer, &arena);
    int64_t rows = layer->schedule->query.block[layer->mesh.r].rows;
    usp_inner inner = {.q = args->q,
                       .k = args->k,
                       .v = args->v,
                       .dout = args->dout,
                       .dq = args->dq,
                       .dk = args->dk,
                       .dv = args->dv,
                       .key_block = kept->keys,
                       .packed = kept->keys != NULL,
                       .delta = b.delta_rows,
                       .lse = kept->lse,
                       .states = kept->states,
                       .initial = args->initial_state,
                       .dfinal = args->dfinal_state,
                       .dinitial = args->dinitial_state,
                       .arena = {arena.base + arena.used, 0},
                       .stream = stream};
    if (is_softmax(layer)) USP_TRY(find_delta(layer, args, rows, usp_layer_own_heads(layer), b.delta_rows, stream));
    return layer->attn->backward(layer, &inner);
}

static void post_backward_in(const usp_layer *layer, const backward_buffers *b, usp_messages *messages) {
    usp_transit_post_to_heads(layer, &b->dout, messages);
    if (is_softmax(layer)) usp_transit_post_to_heads(layer, &b->delta, messages);
}

static void post_backward_out(const usp_layer *layer, const backward_buffers *b, usp_messages *messages) {
    usp_transit_post_to_tokens(layer, &b->dq, messages);
    usp_transit_post_to_tokens(layer, &b->dkeys, messages);
    if (layer->config.initial_state) post_states(layer, b->dinitial, b->all_initials, messages);
}

/* delta needs out and dout of one token only: it is found before the exchange, so that out need not travel again. */
static usp_status pack_delta(usp_layer *layer, const usp_backward *args, const backward_buffers *b, usp_stream stream) {
    int64_t tokens = layer->sequence->query.local[layer->mesh.p];
    usp_tensor all = head_major(b->token_delta, layer->heads, tokens);
    USP_TRY(find_delta(layer, args, tokens, layer->heads, b->token_delta, stream));
    return usp_transit_pack(layer, &b->delta, &all, USP_F32, stream);
}

static usp_status land_delta(usp_layer *layer, const backward_buffers *b, usp_stream stream) {
    int64_t rows = layer->schedule->query.block[layer->mesh.r].rows;
    usp_tensor block = usp_bundle_view(layer, &b->delta.bundle, b->delta.block, 0, layer->mesh.u);
    USP_TRY(usp_transit_land(layer, &b->delta, stream));
    return transpose_rows(layer, block, head_major(b->delta_rows, usp_layer_own_heads(layer), rows), stream);
}

static usp_status exchange_gradients_in(usp_layer *layer, const usp_backward *args, const backward_buffers *b,
                                        usp_stream stream) {
    USP_TRY(usp_transit_pack(layer, &b->dout, &args->dout, layer->config.dtype, stream));
    if (is_softmax(layer)) USP_TRY(pack_delta(layer, args, b, stream));
    post_backward_in(layer, b, usp_messages_begin(layer));
    USP_TRY(usp_messages_run(layer, stream));
    if (b->dfinal) USP_TRY(slice_state(layer, args->dfinal_state, b->dfinal, stream));
    USP_TRY(usp_messages_join(layer, stream));
    USP_TRY(usp_transit_land(layer, &b->dout, stream));
    return is_softmax(layer) ? land_delta(layer, b, stream) : USP_OK;
}

static usp_status exchange_gradients_out(usp_layer *layer, const usp_backward *args, const backward_buffers *b,
                                         usp_stream stream) {
    usp_dtype dtype = layer->config.dtype;
    const usp_tensor dkeys[] = {args->dk, args->dv};
    USP_TRY(usp_transit_lift(layer, &b->dq, stream));
    USP_TRY(usp_transit_lift(layer, &b->dkeys, stream));
    post_backward_out(layer, b, usp_messages_begin(layer));
    USP_TRY(usp_messages_run(layer, stream));
    USP_TRY(usp_messages_join(layer, stream));
    USP_TRY(usp_transit_unpack(layer, &b->dq, &args->dq, dtype, stream));
    USP_TRY(usp_transit_unpack(layer, &b->dkeys, dkeys, dtype, stream));
    if (!b->dinitial) return USP_OK;
    return unpack_states(layer, b->dinitial, b->all_initials, args->dinitial_state, stream);
}

static usp_status backward_exchanged(usp_layer *layer, const usp_backward *args, const saved_buffers *kept,
                                     usp_arena arena, usp_stream stream) {
    backward_buffers b = carve_backward(layer, &arena);
    float *initial = carve_initial(layer, &arena);
    usp_inner inner = inner_of_blocks(layer, kept, (usp_arena){arena.base + arena.used, 0}, stream);
    inner.dout = usp_bundle_view(layer, &b.dout.bundle, b.dout.block, 0, layer->mesh.u);
    inner.dq = usp_bundle_view(layer, &b.dq.bundle, b.dq.block, 0, layer->mesh.u);
    inner.dk = usp_bundle_view(layer, &b.dkeys.bundle, b.dkeys.block, 0, layer->mesh.u);
    inner.dv = usp_bundle_view(layer, &b.dkeys.bundle, b.dkeys.block, 1, layer->mesh.u);
    inner.delta = b.delta_rows;
    inner.initial = initial;
    inner.dfinal = b.dfinal;
    inner.dinitial = b.dinitial;
    inner.sum_queries = query_gradient_dtype(layer) != layer->config.dtype;
    inner.sum_keys = key_gradient_dtype(layer) != layer->config.dtype;
    if (initial) USP_TRY(slice_state(layer, args->initial_state, initial, stream));
    USP_TRY(exchange_gradients_in(layer, args, &b, stream));
    USP_TRY(layer->attn->backward(layer, &inner));
    return exchange_gradients_out(layer, args, &b, stream);
}

static usp_status run_backward(usp_layer *layer, const usp_backward *given, void *workspace, size_t bytes,
                               usp_stream stream, int inner) {
    usp_backward args;
    USP_TRY(usp_world_poll(layer->world));
    USP_TRY(usp_abi_read(&args, sizeof args, given, "usp_backward"));
    USP_TRY(check_backward(layer, &args, inner));
    USP_TRY(check_workspace(workspace, bytes, layer->sizes.backward_workspace));
    usp_arena arena = {workspace, 0}, saved = {(void *)(uintptr_t)args.saved, 0};
    saved_buffers kept = carve_saved(layer, &saved);
    int moves = exchanges(layer) && !inner;
    return usp_world_conclude(layer->world, moves ? backward_exchanged(layer, &args, &kept, arena, stream)
                                                  : backward_inner(layer, &args, &kept, arena, stream));
}

usp_status usp_layer_backward(usp_layer *layer, const usp_backward *args, void *workspace, size_t bytes,
                              usp_stream stream) {
    USP_REQUIRE(layer, "layer is NULL");
    USP_TRY(usp_guard_enter(layer->world));
    return usp_guard_leave(layer->world, run_backward(layer, args, workspace, bytes, stream, 0));
}

usp_status usp_layer_inner_backward(usp_layer *layer, const usp_backward *args, void *workspace, size_t bytes,
                                    usp_stream stream) {
    USP_REQUIRE(layer, "layer is NULL");
    USP_TRY(usp_guard_enter(layer->world));
    return usp_guard_leave(layer->world, run_backward(layer, args, workspace, bytes, stream, 1));
}

/* ---- the head exchange alone ------------------------------------------------------------------------------------- */

static usp_bundle operand_bundle(const usp_layer *layer, usp_operand operand, int toward_tokens) {
    int sum = toward_tokens && layer->shared[operand];
    return usp_bundle_of(layer, operand, sum ? USP_F32 : layer->config.dtype);
}

static size_t exchange_bytes(const usp_layer *layer) {
    size_t most = 0;
    for (int operand = 0; operand < USP_OPERANDS; operand++)
        for (int toward_tokens = 0; toward_tokens < 2; toward_tokens++) {
            usp_arena arena = {0};
            carve_out(layer, operand_bundle(layer, (usp_operand)operand, toward_tokens), &arena);
            if (arena.used > most) most = arena.used;
        }
    return most;
}

static usp_status check_exchange(const usp_layer *layer, usp_operand operand, const usp_tensor *tokens,
                                 const usp_tensor *heads, int to_heads, const void *workspace, size_t bytes) {
    USP_TRY(usp_world_poll(layer->world));
    USP_REQUIRE(operand >= USP_QUERY && operand <= USP_OUT, "operand is %d: no such operand", (int)operand);
    USP_REQUIRE(tokens && heads, "tokens or heads is NULL");
    extents here = extents_of(layer, 0), there = extents_of(layer, 1);
    USP_TRY(check_arguments(layer, &here, &(argument){"tokens", tokens, operand, !to_heads}, 1));
    USP_TRY(check_arguments(layer, &there, &(argument){"heads", heads, operand, to_heads}, 1));
    return check_workspace(workspace, bytes, layer->sizes.exchange_workspace);
}

/* Between the packed block and the caller's tensor of own heads. */
static usp_status copy_block(usp_layer *layer, const usp_transit *transit, const usp_tensor *heads, int to_block,
                             usp_stream stream) {
    usp_operand operand = transit->bundle.operand[0];
    usp_device *device = layer->world->device;
    usp_tensor block = usp_bundle_view(layer, &transit->bundle, transit->block, 0, layer->mesh.u);
    const usp_ring_side *side = transit->bundle.keys ? &layer->schedule->key : &layer->schedule->query;
    usp_copy copy = {.tokens = side->block[layer->mesh.r].rows,
                     .batch = layer->config.batch,
                     .heads = usp_layer_heads(layer, operand, layer->mesh.u).count,
                     .dim = layer->dim[operand],
                     .from_dtype = to_block ? layer->config.dtype : transit->bundle.dtype,
                     .to_dtype = to_block ? transit->bundle.dtype : layer->config.dtype,
                     .from = to_block ? *heads : block,
                     .to = to_block ? block : *heads};
    return device->ops->copy_rows(device, &copy, stream);
}

static usp_status move_to_heads(usp_layer *layer, const usp_transit *transit, const usp_tensor *tokens,
                                const usp_tensor *heads, usp_stream stream) {
    USP_TRY(usp_transit_pack(layer, transit, tokens, layer->config.dtype, stream));
    usp_transit_post_to_heads(layer, transit, usp_messages_begin(layer));
    USP_TRY(usp_messages_run(layer, stream));
    USP_TRY(usp_messages_join(layer, stream));
    USP_TRY(usp_transit_land(layer, transit, stream));
    return copy_block(layer, transit, heads, 0, stream);
}

static usp_status tokens_to_heads(usp_layer *layer, usp_operand operand, const usp_tensor *tokens,
                                  const usp_tensor *heads, void *workspace, size_t bytes, usp_stream stream) {
    USP_TRY(check_exchange(layer, operand, tokens, heads, 1, workspace, bytes));
    usp_arena arena = {workspace, 0};
    usp_transit transit = carve_out(layer, operand_bundle(layer, operand, 0), &arena);
    return usp_world_conclude(layer->world, move_to_heads(layer, &transit, tokens, heads, stream));
}

usp_status usp_layer_tokens_to_heads(usp_layer *layer, usp_operand operand, const usp_tensor *tokens,
                                     const usp_tensor *heads, void *workspace, size_t bytes, usp_stream stream) {
    USP_REQUIRE(layer, "layer is NULL");
    USP_TRY(usp_guard_enter(layer->world));
    return usp_guard_leave(layer->world, tokens_to_heads(layer, operand, tokens, heads, workspace, bytes, stream));
}

static usp_status move_to_tokens(usp_layer *layer, const usp_transit *transit, const usp_tensor *heads,
                                 const usp_tensor *tokens, usp_stream stream) {
    USP_TRY(copy_block(layer, transit, heads, 1, stream));
    USP_TRY(usp_transit_lift(layer, transit, stream));
    usp_transit_post_to_tokens(layer, transit, usp_messages_begin(layer));
    USP_TRY(usp_messages_run(layer, stream));
    USP_TRY(usp_messages_join(layer, stream));
    return usp_transit_unpack(layer, transit, tokens, layer->config.dtype, stream);
}

static usp_status heads_to_tokens(usp_layer *layer, usp_operand operand, const usp_tensor *heads,
                                  const usp_tensor *tokens, void *workspace, size_t bytes, usp_stream stream) {
    USP_TRY(check_exchange(layer, operand, tokens, heads, 0, workspace, bytes));
    usp_arena arena = {workspace, 0};
    usp_transit transit = carve_out(layer, operand_bundle(layer, operand, 1), &arena);
    return usp_world_conclude(layer->world, move_to_tokens(layer, &transit, heads, tokens, stream));
}

usp_status usp_layer_heads_to_tokens(usp_layer *layer, usp_operand operand, const usp_tensor *heads,
                                     const usp_tensor *tokens, void *workspace, size_t bytes, usp_stream stream) {
    USP_REQUIRE(layer, "layer is NULL");
    USP_TRY(usp_guard_enter(layer->world));
    return usp_guard_leave(layer->world, heads_to_tokens(layer, operand, heads, tokens, workspace, bytes, stream));
}

/* ---- sizes and cost ---------------------------------------------------------------------------------------------- */

usp_sizes usp_run_sizes(const usp_layer *layer) {
    return (usp_sizes){.forward_workspace = forward_bytes(layer, 0),
                       .forward_saving_workspace = forward_bytes(layer, 1),
                       .backward_workspace = backward_bytes(layer),
                       .exchange_workspace = exchange_bytes(layer),
                       .saved = saved_bytes(layer),
                       .alignment = USP_ALIGNMENT};
}

void usp_run_count_messages(const usp_layer *layer, usp_pass pass, usp_messages *count) {
    usp_arena arena = {0};
    saved_buffers kept = {0};
    if (!exchanges(layer)) return;
    if (pass == USP_PASS_FORWARD) {
        forward_buffers b = carve_forward(layer, &kept, &arena);
        usp_transit_post_to_heads(layer, &b.q, count);
        usp_transit_post_to_heads(layer, &b.keys, count);
        post_forward_out(layer, &b, count);
    } else {
        backward_buffers b = carve_backward(layer, &arena);
        post_backward_in(layer, &b, count);
        post_backward_out(layer, &b, count);
    }
}
