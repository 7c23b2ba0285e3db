/* attn_softmax.c - ring softmax attention: keys and values travel round the ring, queries stay and fold them in.
 *
 * Forward (Liu et al., arXiv 2310.01889): step t attends to the keys of ring rank r - t while the next ones arrive.
 * Backward: the same trip; a key block's gradient begins at the rank after its owner, travels one step behind the keys
 * and comes home in the last hop, where the owner adds its own step: R - 1 hops. All sums are fp32, all in ring order.
 */
#include "attn.h"
#include "error.h"
#include "exchange.h"

/* ---- buffers ----------------------------------------------------------------------------------------------------- */

typedef struct buffers {
    void *own, *ring[2];     /* key blocks: own, if there is no room for it yet; arriving and arrived */
    float *acc;              /* forward: running output; backward: running dq */
    float *home, *travel[2]; /* backward: fp32 key gradients of the own step; of blocks passing through */
    void *scratch;           /* of the kernels */
} buffers;

static usp_bundle keys_bundle(const usp_layer *layer) {
    return usp_bundle_keys(layer, layer->config.dtype);
}

static usp_bundle sums_bundle(const usp_layer *layer) {
    return usp_bundle_keys(layer, USP_F32);
}

static int ring_source(const usp_layer *layer, int t) {
    return (layer->mesh.r - t + layer->mesh.ring) % layer->mesh.ring;
}

static int64_t query_rows(const usp_layer *layer) {
    return layer->schedule->query.block[layer->mesh.r].rows;
}

static int64_t key_rows(const usp_layer *layer, int r) {
    return layer->schedule->key.block[r].rows;
}

static int64_t block_bytes(const usp_layer *layer, const usp_bundle *bundle, int64_t rows) {
    return rows * layer->config.batch * usp_bundle_row(layer, bundle, layer->mesh.u) *
           (int64_t)usp_dtype_size(bundle->dtype);
}

/* Room for the key block of any ring rank. */
static void *carve_block(const usp_layer *layer, const usp_bundle *bundle, usp_arena *arena) {
    return usp_carve(arena, (size_t)usp_bundle_block_bytes(layer, bundle));
}

static buffers carve(const usp_layer *layer, usp_pass pass, usp_arena *arena) {
    buffers b = {0};
    usp_bundle keys = keys_bundle(layer), sums = sums_bundle(layer);
    int ring = layer->mesh.ring, backward = pass == USP_PASS_BACKWARD;
    int64_t dim = backward ? layer->dim[USP_QUERY] : layer->dim[USP_OUT];
    int64_t heads = usp_layer_own_heads(layer);
    b.scratch = usp_carve(arena, layer->scratch);
    if (ring == 1) return b;
    if (layer->mesh.ulysses == 1) b.own = carve_block(layer, &keys, arena);
    for (int i = 0; i < 2 && i < ring - 1; i++) b.ring[i] = carve_block(layer, &keys, arena);
    b.acc =
        usp_carve(arena, (size_t)(layer->schedule->query.limit * layer->config.batch * heads * dim) * sizeof(float));
    if (!backward) return b;
    b.home = carve_block(layer, &sums, arena);
    for (int i = 0; i < 2; i++) b.travel[i] = carve_block(layer, &sums, arena);
    return b;
}

static size_t workspace(const usp_layer *layer, usp_pass pass) {
    usp_arena arena = {0};
    carve(layer, pass, &arena);
    return arena.used;
}

static size_t saved(const usp_layer *layer) {
    (void)layer; /* the layer itself keeps the exchanged tensors and lse */
    return 0;
}

/* ---- steps ------------------------------------------------------------------------------------------------------- */

static usp_softmax step_arguments(const usp_layer *layer, const usp_inner *inner, const buffers *b) {
    return (usp_softmax){.dtype = layer->config.dtype,
                         .batch = layer->config.batch,
                         .heads = usp_layer_own_heads(layer),
                         .key_heads = usp_layer_heads(layer, USP_KEY, layer->mesh.u).count,
                         .dim = layer->dim[USP_QUERY],
                         .value_dim = layer->dim[USP_OUT],
                         .kv = usp_layer_head_map(layer, USP_KEY),
                         .scale = layer->config.scale,
                         .queries = query_rows(layer),
                         .q = inner->q,
                         .k = inner->k,
                         .v = inner->v,
                         .deterministic = layer->config.deterministic,
                         .lse = inner->lse,
                         .out = inner->out,
                         .dout = inner->dout,
                         .delta = inner->delta,
                         .dq = inner->dq,
                         .dk = inner->dk,
                         .dv = inner->dv,
                         .scratch = b->scratch};
}

static void set_keys(const usp_layer *layer, usp_softmax *step, int t, void *block) {
    usp_bundle keys = keys_bundle(layer);
    step->keys = key_rows(layer, ring_source(layer, t));
    if (!block) return; /* step 0: the tensors themselves */
    step->k = usp_bundle_view(layer, &keys, block, 0, layer->mesh.u);
    step->v = usp_bundle_view(layer, &keys, block, 1, layer->mesh.u);
}

/* The own keys as the ring sends them. */
static usp_status pack_keys(usp_layer *layer, const usp_inner *inner, const buffers *b, void **block) {
    usp_bundle keys = keys_bundle(layer);
    *block = inner->key_block ? inner->key_block : b->own;
    if (inner->packed || layer->mesh.ring == 1) return USP_OK;
    for (int part = 0; part < 2; part++) {
        usp_copy copy = {.tokens = key_rows(layer, layer->mesh.r),
                         .batch = layer->config.batch,
                         .heads = usp_layer_heads(layer, keys.operand[part], layer->mesh.u).count,
                         .dim = keys.dim[part],
                         .from_dtype = keys.dtype,
                         .to_dtype = keys.dtype,
                         .from = part ? inner->v : inner->k,
                         .to = usp_bundle_view(layer, &keys, *block, part, layer->mesh.u)};
        USP_TRY(layer->world->device->ops->copy_rows(layer->world->device, &copy, inner->stream));
    }
    return USP_OK;
}

static int next_rank(const usp_layer *layer) {
    return usp_mesh_rank(&layer->mesh, layer->mesh.u, (layer->mesh.r + 1) % layer->mesh.ring);
}

static int previous_rank(const usp_layer *layer) {
    return usp_mesh_rank(&layer->mesh, layer->mesh.u, (layer->mesh.r - 1 + layer->mesh.ring) % layer->mesh.ring);
}

/* During step t the keys of step t go on and those of step t + 1 arrive. */
static void post_keys(const usp_layer *layer, int t, const void *current, void *arriving, usp_messages *messages) {
    usp_bundle keys = keys_bundle(layer);
    if (t + 1 >= layer->mesh.ring) return;
    usp_messages_send(messages, next_rank(layer), current,
                      block_bytes(layer, &keys, key_rows(layer, ring_source(layer, t))));
    usp_messages_recv(messages, previous_rank(layer), arriving,
                      block_bytes(layer, &keys, key_rows(layer, ring_source(layer, t + 1))));
}

/* During step t the key gradients of step t - 1 go on and those of step t arrive; after the last step, the own ones. */
static void post_gradients(const usp_layer *layer, int t, const void *done, void *arriving, usp_messages *messages) {
    usp_bundle sums = sums_bundle(layer);
    if (t < 2) return;
    usp_messages_send(messages, next_rank(layer), done,
                      block_bytes(layer, &sums, key_rows(layer, ring_source(layer, t - 1))));
    usp_messages_recv(messages, previous_rank(layer), arriving,
                      block_bytes(layer, &sums, key_rows(layer, ring_source(layer, t))));
}

/* ---- forward ----------------------------------------------------------------------------------------------------- */

static usp_status forward(usp_layer *layer, usp_inner *inner) {
    usp_device *device = layer->world->device;
    buffers b = carve(layer, USP_PASS_FORWARD, &inner->arena);
    usp_softmax step = step_arguments(layer, inner, &b);
    int ring = layer->mesh.ring;
    void *current;
    USP_TRY(pack_keys(layer, inner, &b, &current));
    step.acc = b.acc;
    for (int t = 0; t < ring; t++) {
        void *arriving = b.ring[t % 2];
        set_keys(layer, &step, t, t ? current : NULL);
        step.tiles = usp_schedule_query_tiles(layer->schedule, t);
        step.first = t == 0;
        step.last = t == ring - 1;
        if (!step.last) {
            post_keys(layer, t, current, arriving, usp_messages_begin(layer));
            USP_TRY(usp_messages_run(layer, inner->stream));
        }
        if (step.first || step.last || layer->schedule->step[t].tiles)
            USP_TRY(device->ops->softmax_forward(device, &step, inner->stream));
        if (!step.last) USP_TRY(usp_messages_join(layer, inner->stream));
        current = arriving;
    }
    return USP_OK;
}

/* ---- backward ---------------------------------------------------------------------------------------------------- */

static usp_tensor sum_view(const usp_layer *layer, float *block, int part) {
    usp_bundle sums = sums_bundle(layer);
    return usp_bundle_view(layer, &sums, block, part, layer->mesh.u);
}

static usp_tensor query_sums(const usp_layer *layer, float *acc) {
    int64_t dim = layer->dim[USP_QUERY], row = dim * usp_layer_heads(layer, USP_QUERY, layer->mesh.u).count;
    return (usp_tensor){acc, row, row * layer->config.batch, dim};
}

/* Step 0 begins the own block's sums; with a ring of one it ends them too. Later steps begin or go on with a passing
 * one. */
static void set_key_sums(const usp_layer *layer, const usp_inner *inner, usp_softmax *step, int t, const buffers *b) {
    int alone = layer->mesh.ring == 1;
    float *block = t ? b->travel[t % 2] : b->home;
    step->tiles = usp_schedule_key_tiles(layer->schedule, t);
    step->first = t < 2;
    step->last = alone && !inner->sum_keys;
    step->dk_sum = alone ? inner->dk : sum_view(layer, block, 0);
    step->dv_sum = alone ? inner->dv : sum_view(layer, block, 1);
}

static usp_status backward_keys(usp_layer *layer, const usp_inner *inner, usp_softmax step, int t, const buffers *b) {
    usp_device *device = layer->world->device;
    set_key_sums(layer, inner, &step, t, b);
    if (!step.first && !layer->schedule->step[t].tiles) return USP_OK;
    return device->ops->softmax_backward_key(device, &step, inner->stream);
}

static usp_status backward_queries(usp_layer *layer, const usp_inner *inner, usp_softmax step, int t) {
    usp_device *device = layer->world->device;
    step.tiles = usp_schedule_query_tiles(layer->schedule, t);
    step.first = t == 0;
    step.last = t == layer->mesh.ring - 1;
    if (!step.first && !step.last && !layer->schedule->step[t].tiles) return USP_OK;
    return device->ops->softmax_backward_query(device, &step, inner->stream);
}

static usp_status add_or_convert(usp_layer *layer, const usp_inner *inner, usp_tensor from, usp_tensor to,
                                 usp_dtype dtype, int part, int accumulate) {
    usp_operand operand = part ? USP_VALUE : USP_KEY;
    usp_copy copy = {.tokens = key_rows(layer, layer->mesh.r),
                     .batch = layer->config.batch,
                     .heads = usp_layer_heads(layer, operand, layer->mesh.u).count,
                     .dim = layer->dim[operand],
                     .from_dtype = USP_F32,
                     .to_dtype = dtype,
                     .from = from,
                     .to = to,
                     .accumulate = accumulate};
    return layer->world->device->ops->copy_rows(layer->world->device, &copy, inner->stream);
}

/* The last hop brings the own block's gradient home: own step + what the others found. */
static usp_status bring_home(usp_layer *layer, const usp_inner *inner, const buffers *b) {
    int ring = layer->mesh.ring;
    float *arriving = b->travel[ring % 2];
    usp_dtype dtype = inner->sum_keys ? USP_F32 : layer->config.dtype;
    if (ring == 1) return USP_OK;
    post_gradients(layer, ring, b->travel[(ring - 1) % 2], arriving, usp_messages_begin(layer));
    USP_TRY(usp_messages_run(layer, inner->stream));
    USP_TRY(usp_messages_join(layer, inner->stream));
    for (int part = 0; part < 2; part++) {
        usp_tensor home = sum_view(layer, b->home, part);
        USP_TRY(add_or_convert(layer, inner, sum_view(layer, arriving, part), home, USP_F32, part, 1));
        USP_TRY(add_or_convert(layer, inner, home, part ? inner->dv : inner->dk, dtype, part, 0));
    }
    return USP_OK;
}

static usp_status backward(usp_layer *layer, usp_inner *inner) {
    buffers b = carve(layer, USP_PASS_BACKWARD, &inner->arena);
    usp_softmax step = step_arguments(layer, inner, &b);
    void *current;
    USP_TRY(pack_keys(layer, inner, &b, &current));
    step.dq_sum = query_sums(layer, b.acc);
    for (int t = 0; t < layer->mesh.ring; t++) {
        void *arriving = b.ring[t % 2];
        int moving = t + 1 < layer->mesh.ring || t >= 2;
        usp_messages *messages = usp_messages_begin(layer);
        set_keys(layer, &step, t, t ? current : NULL);
        post_keys(layer, t, current, arriving, messages);
        post_gradients(layer, t, b.travel[(t + 1) % 2], b.travel[t % 2], messages);
        if (moving) USP_TRY(usp_messages_run(layer, inner->stream));
        USP_TRY(backward_queries(layer, inner, step, t));
        if (moving) USP_TRY(usp_messages_join(layer, inner->stream));
        USP_TRY(backward_keys(layer, inner, step, t, &b));
        current = arriving;
    }
    return bring_home(layer, inner, &b);
}

/* ---- cost -------------------------------------------------------------------------------------------------------- */

/* 2 operations a multiply-add; forward: q.k and p.v; backward: q.k, dout.v, dv, dq, dk. */
static double flops(const usp_layer *layer, usp_pass pass, int r) {
    double d = layer->dim[USP_QUERY], e = layer->dim[USP_OUT];
    double pairs = usp_schedule_pairs(layer->sequence, layer->schedule, r);
    return pairs * (pass == USP_PASS_FORWARD ? 2 * (d + e) : 2 * (3 * d + 2 * e));
}

static void count_messages(const usp_layer *layer, usp_pass pass, usp_messages *count) {
    int ring = layer->mesh.ring;
    for (int t = 0; t < ring; t++) {
        post_keys(layer, t, NULL, NULL, count);
        if (pass == USP_PASS_BACKWARD) post_gradients(layer, t, NULL, NULL, count);
    }
    if (pass == USP_PASS_BACKWARD && ring > 1) post_gradients(layer, ring, NULL, NULL, count);
}

/* ---- table ------------------------------------------------------------------------------------------------------- */

const usp_attn_ops usp_attn_softmax = {"softmax", workspace, saved, forward, backward, count_messages, flops};
