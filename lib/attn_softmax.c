/* attn_softmax.c - softmax attention on the ring axis: stage after stage keys and values of other ring ranks arrive, by
 * whatever route is planned, while queries stay and fold in those that are here.
 *
 * Forward folds into (acc, top, sum), so that nothing is rounded between stages. Backward meets the same keys again;
 * the gradients of each stage's keys begin fresh, go straight to their owner and are added there, in the order of
 * stages. All sums are fp32. */
#include "attn.h"
#include "dropout.h"
#include "error.h"
#include "parcels.h"
#include "ring_heads.h"

/* ---- operands ---------------------------------------------------------------------------------------------------- */

static const usp_operand_row forward_rows[] = {
    USP_FORWARD_TENSORS,
    {USP_GIVEN(usp_forward, lse), USP_INNER(lse), USP_FORM_ROWS, USP_OUT, USP_USE_OUT, 0, USP_ASKED(return_lse)},
    {USP_GIVEN(usp_forward, sinks), USP_INNER(sinks), USP_FORM_HEADS, USP_OUT, USP_USE_IN, 0, USP_ASKED(sinks)},
    {USP_GIVEN(usp_forward, max_logit), USP_INNER(max_logit), USP_FORM_HEADS, USP_OUT, USP_USE_OUT, 0,
     USP_ASKED(max_logit)},
    {USP_GIVEN(usp_forward, dropout_state), USP_INNER(dropout_state), USP_FORM_SHARED, USP_OUT, USP_USE_IN, 0,
     USP_ASKED(dropout)}};

static const usp_operand_row backward_rows[] = {
    USP_BACKWARD_TENSORS,
    {USP_GIVEN(usp_backward, dlse), USP_INNER(dlse), USP_FORM_ROWS, USP_OUT, USP_USE_LOCAL, 0, USP_ASKED(dlse)},
    {"delta", 0, USP_INNER(delta), USP_FORM_ROWS, USP_OUT, USP_USE_DERIVED, 0, 0},
    {USP_GIVEN(usp_backward, sinks), USP_INNER(sinks), USP_FORM_HEADS, USP_OUT, USP_USE_IN, 0, USP_ASKED(sinks)},
    {USP_GIVEN(usp_backward, dsinks), USP_INNER(dsinks), USP_FORM_HEADS, USP_OUT, USP_USE_OUT, 0, USP_ASKED(sinks)},
    {USP_GIVEN(usp_backward, dropout_state), USP_INNER(dropout_state), USP_FORM_SHARED, USP_OUT, USP_USE_IN, 0,
     USP_ASKED(dropout)}};

/* ---- buffers ----------------------------------------------------------------------------------------------------- */

typedef struct buffers {
    char *own, *packed, *stage[2]; /* keys: own, if nobody has them side by side; for readers; of stages 1, 2, 1, ... */
    usp_tensor lying[2];           /* own k and v, as they are sent */
    float *acc;                    /* forward: running output; backward: running dq */
    float *peak;                   /* [batch, heads, rows] */
    float *home;                   /* backward: fp32 gradients of own keys */
    char *leaving[2], *arriving;   /* backward: fp32 gradients of stages' keys; of own keys, from readers */
    float *heads;                  /* [ring + 1][heads]: every ring rank's numbers of heads */
    int32_t *turns;                /* of the kernels, as what follows */
    void *scratch;
} buffers;

static float *carve_floats(int64_t count, usp_arena *arena) {
    return usp_carve(arena, (size_t)count * sizeof(float));
}

static char *carve_keys(const usp_layer *layer, int64_t rows, usp_dtype dtype, usp_arena *arena) {
    return usp_carve(arena, (size_t)usp_parcels_bytes(layer, rows, dtype));
}

/* Rows of queries times batch and own heads. */
static int64_t query_lines(const usp_layer *layer) {
    return layer->plan->query_limit * layer->config.batch * usp_layer_own_heads(layer);
}

static int32_t *carve_turns(const usp_layer *layer, usp_arena *arena) {
    int64_t turns = (layer->plan->query_limit + USP_TURN_ROWS - 1) / USP_TURN_ROWS;
    return usp_carve(arena, (size_t)(turns * layer->config.batch * usp_layer_own_heads(layer)) * sizeof(int32_t));
}

/* Exchanged gradients are fp32 blocks, which need no running sums beside them. */
static buffers carve(const usp_layer *layer, usp_pass pass, int exchanged, usp_arena *arena) {
    buffers b = {.scratch = usp_carve(arena, layer->needs.scratch)};
    const usp_route_plan *route = &layer->plan->route;
    usp_dtype dtype = layer->config.dtype;
    int backward = pass == USP_PASS_BACKWARD, numbers = layer->config.sinks || layer->config.max_logit;
    if (layer->config.max_logit && !backward) b.peak = carve_floats(query_lines(layer), arena);
    if (numbers) b.heads = carve_floats((int64_t)(layer->mesh.ring + 1) * usp_layer_own_heads(layer), arena);
    int several = route->stages > 1, sums = several ? !backward || !exchanged : backward && layer->needs.query_sums;
    if (backward && layer->needs.query_sums && layer->config.deterministic) b.turns = carve_turns(layer, arena);
    if (sums) b.acc = carve_floats(query_lines(layer) * layer->dim[backward ? USP_QUERY : USP_OUT], arena);
    if (!several) return b;
    if (layer->mesh.ulysses == 1) b.own = carve_keys(layer, layer->plan->key_limit, dtype, arena);
    b.packed = carve_keys(layer, route->pack_limit, dtype, arena);
    for (int i = 0; i < 2 && i < route->stages - 1; i++) b.stage[i] = carve_keys(layer, route->limit, dtype, arena);
    if (!backward) return b;
    if (!exchanged) b.home = (float *)(void *)carve_keys(layer, layer->plan->key_limit, USP_F32, arena);
    for (int i = 0; i < 2 && i < route->stages - 1; i++) b.leaving[i] = carve_keys(layer, route->limit, USP_F32, arena);
    b.arriving = carve_keys(layer, route->reader_limit, USP_F32, arena);
    return b;
}

static void measure(const usp_layer *layer, usp_pass pass, int exchanged, usp_arena *arena) {
    carve(layer, pass, exchanged, arena);
}

/* What is kept of every query row: top, then sum. */
static size_t stat_bytes(const usp_layer *layer) {
    return usp_align((size_t)query_lines(layer) * sizeof(float));
}

static float *kept_sum(const usp_layer *layer, const usp_inner *inner) {
    return (float *)(void *)((char *)inner->kept + stat_bytes(layer));
}

static size_t saved(const usp_layer *layer) {
    return 2 * stat_bytes(layer);
}

static int sums(const usp_layer *layer) {
    return layer->plan->route.stages > 1;
}

/* ---- stages ------------------------------------------------------------------------------------------------------ */

static usp_softmax arguments_of(const usp_layer *layer, const usp_inner *inner, const buffers *b) {
    const usp_layer_config *c = &layer->config;
    usp_head_range own = usp_layer_heads(layer, USP_OUT, layer->mesh.u);
    return (usp_softmax){.dtype = c->dtype,
                         .batch = c->batch,
                         .heads = own.count,
                         .key_heads = usp_layer_heads(layer, USP_KEY, layer->mesh.u).count,
                         .dim = layer->dim[USP_QUERY],
                         .value_dim = layer->dim[USP_OUT],
                         .kv = usp_layer_head_map(layer, USP_KEY),
                         .scale = c->scale,
                         .soft_cap = c->soft_cap,
                         .slopes = layer->slopes,
                         .sinks = inner->sinks,
                         .dropout = {usp_dropout_rate(c->dropout), own.first, layer->heads, inner->dropout_state},
                         .queries = usp_plan_queries(layer->plan),
                         .q = inner->q,
                         .deterministic = c->deterministic,
                         .top = inner->kept,
                         .sum = kept_sum(layer, inner),
                         .acc = b->acc,
                         .peak = b->peak,
                         .out = inner->out,
                         .lse = inner->lse,
                         .dout = inner->dout,
                         .delta = inner->delta,
                         .dq = inner->dq,
                         .turns = b->turns,
                         .scratch = b->scratch};
}

/* The keys, pairs and work of stage t; its keys lie in `block`, but the own ones. */
static void set_stage(const usp_layer *layer, const usp_inner *inner, usp_softmax *stage, int t, void *block) {
    const usp_plan *plan = layer->plan;
    stage->keys = plan->route.stage[t].rows;
    stage->k = t ? usp_parcels_block(layer, block, stage->keys, 0) : inner->k;
    stage->v = t ? usp_parcels_block(layer, block, stage->keys, 1) : inner->v;
    stage->pairs = usp_plan_pairs(plan, &plan->device, t);
    stage->by_query = usp_plan_tiles(plan, &plan->device, t, 0);
    stage->by_key = usp_plan_tiles(plan, &plan->device, t, 1);
    stage->first = t == 0;
    stage->last = t == plan->route.last;
}

/* Where they may be sent from as they are: heads side by side, tokens in order. */
static int are_rows(const usp_layer *layer, const usp_tensor *x, usp_operand like) {
    int64_t row = (int64_t)usp_layer_heads(layer, like, layer->mesh.u).count * layer->dim[like];
    int64_t most = INT32_MAX / (int64_t)usp_dtype_size(layer->config.dtype);
    return x->stride_head == layer->dim[like] && x->stride_token >= row && x->stride_token <= most;
}

/* The own keys side by side, as readers are sent them, unless they can be sent from where they are. */
static usp_status pack_own(usp_layer *layer, const usp_inner *inner, buffers *b) {
    usp_bundle bundle = usp_parcels_bundle(layer);
    int rows = are_rows(layer, &inner->k, USP_KEY) && are_rows(layer, &inner->v, USP_VALUE);
    b->lying[0] = inner->k;
    b->lying[1] = inner->v;
    if (inner->keys) b->own = inner->keys;
    if (inner->packed || layer->plan->route.stages == 1) return USP_OK;
    if (usp_parcels_go_in_parts(layer) && rows) return USP_OK;
    for (int part = 0; part < 2; part++) {
        usp_copy copy = usp_bundle_copy(layer, &bundle, part, layer->mesh.u, usp_plan_keys(layer->plan));
        copy.from_dtype = copy.to_dtype = layer->config.dtype;
        copy.from = b->lying[part];
        copy.to = b->lying[part] = usp_parcels_block(layer, b->own, usp_plan_keys(layer->plan), part);
        usp_copies_add(layer, copy);
    }
    return usp_copies_run(layer, inner->stream);
}

/* Posts the keys of stage t, which arrive during the one before. */
static usp_status send_keys(usp_layer *layer, const usp_inner *inner, const buffers *b, int t, usp_messages *messages) {
    if (t >= layer->plan->route.stages) return USP_OK;
    const usp_key_memory memory = {.own = b->own,
                                   .lying = {b->lying[0], b->lying[1]},
                                   .packed = b->packed,
                                   .before = b->stage[t % 2],
                                   .arriving = b->stage[(t - 1) % 2]};
    usp_parcels_pack(layer, t, &memory);
    USP_TRY(usp_copies_run(layer, inner->stream));
    usp_parcels_post_keys(layer, t, &memory, messages);
    return USP_OK;
}

/* ---- numbers of heads -------------------------------------------------------------------------------------------- */

/* The largest score of each own head over all rows of all ring ranks. */
static usp_status find_peaks(usp_layer *layer, const usp_inner *inner, const usp_softmax *stage, const buffers *b) {
    usp_device *device = layer->world->device;
    float *mine = b->heads + (int64_t)layer->mesh.ring * stage->heads;
    usp_softmax ranks = {.batch = layer->mesh.ring, .heads = stage->heads, .queries = 1, .peak = b->heads};
    USP_TRY(device->ops->softmax_peaks(device, stage, mine, inner->stream));
    USP_TRY(usp_ring_heads_gather(layer, mine, b->heads, inner->stream));
    return device->ops->softmax_peaks(device, &ranks, inner->max_logit, inner->stream);
}

/* The gradient of the own heads' sinks, of all ring ranks in order. */
static usp_status sum_sinks(usp_layer *layer, const usp_inner *inner, const usp_softmax *stage, const buffers *b) {
    usp_device *device = layer->world->device;
    int64_t heads = stage->heads;
    float *mine = b->heads + layer->mesh.ring * heads;
    USP_TRY(device->ops->softmax_sinks(device, stage, mine, inner->stream));
    USP_TRY(usp_ring_heads_gather(layer, mine, b->heads, inner->stream));
    for (int r = 0; r < layer->mesh.ring; r++) {
        usp_copies_add(layer, (usp_copy){.tokens = 1,
                                         .batch = 1,
                                         .heads = 1,
                                         .dim = (int)heads,
                                         .from = {b->heads + r * heads, 0, 0, 0},
                                         .to = {inner->dsinks, 0, 0, 0},
                                         .accumulate = r > 0});
        USP_TRY(usp_copies_run(layer, inner->stream));
    }
    return USP_OK;
}

/* Of the slices that a call works on. */
static int is_last(const usp_inner *inner) {
    return inner->slice.number == inner->slice.count - 1;
}

/* ---- forward ----------------------------------------------------------------------------------------------------- */

static usp_status forward(usp_layer *layer, usp_inner *inner) {
    usp_device *device = layer->world->device;
    buffers b = carve(layer, USP_PASS_FORWARD, inner->exchanged, &inner->arena);
    usp_softmax stage = arguments_of(layer, inner, &b);
    USP_TRY(pack_own(layer, inner, &b));
    for (int t = 0; t < layer->plan->route.stages; t++) {
        usp_messages *messages = usp_messages_begin(layer, USP_AXIS_RING);
        USP_TRY(send_keys(layer, inner, &b, t + 1, messages));
        int moving = !usp_messages_are_none(messages);
        if (moving) USP_TRY(usp_messages_run(layer, inner->stream));
        set_stage(layer, inner, &stage, t, b.stage[(t + 1) % 2]);
        usp_softmax part = usp_slice_of(&stage, inner->slice);
        if (t == 0 || stage.keys) USP_TRY(device->ops->softmax_forward(device, &part, inner->stream));
        if (moving) USP_TRY(usp_messages_join(layer, USP_AXIS_RING, inner->stream));
    }
    return layer->config.max_logit && is_last(inner) ? find_peaks(layer, inner, &stage, &b) : USP_OK;
}

/* ---- backward ---------------------------------------------------------------------------------------------------- */

/* delta needs out and dout of one token only: it is found before the exchange, so that out need not travel again. */
static usp_status derive(usp_layer *layer, const usp_inner *own, int64_t tokens, int heads) {
    usp_device *device = layer->world->device;
    usp_softmax rows = {.dtype = layer->config.dtype,
                        .batch = layer->config.batch,
                        .heads = heads,
                        .value_dim = layer->dim[USP_OUT],
                        .queries = tokens,
                        .out = own->out,
                        .dout = own->dout,
                        .dlse = own->dlse};
    return device->ops->softmax_delta(device, &rows, own->delta, own->stream);
}

/* dq is summed where it is wanted, if that is fp32, else in acc until the last stage, if there is acc. */
static void set_query_sums(const usp_layer *layer, const usp_inner *inner, usp_softmax *stage, const buffers *b) {
    int64_t dim = layer->dim[USP_QUERY], row = dim * stage->heads;
    stage->dq_sum = inner->sum_queries ? inner->dq : (usp_tensor){b->acc, row, row * layer->config.batch, dim};
    if (inner->sum_queries) stage->last = 0;
}

/* Where the gradients of stage t's keys are written. */
static void set_key_gradients(const usp_layer *layer, const usp_inner *inner, usp_softmax *stage, int t,
                              const buffers *b, const usp_tensor home[2]) {
    usp_bundle bundle = usp_parcels_bundle(layer);
    int direct = t == 0 && !inner->sum_keys && layer->plan->route.stages == 1;
    stage->key_dtype = direct ? layer->config.dtype : USP_F32;
    stage->dk = t ? usp_bundle_block(layer, &bundle, b->leaving[(t - 1) % 2], USP_F32, 0) : home[0];
    stage->dv = t ? usp_bundle_block(layer, &bundle, b->leaving[(t - 1) % 2], USP_F32, 1) : home[1];
}

/* Own keys' gradients are summed where they are wanted, if that is fp32 or there is one stage, else in `home`. */
static int sums_at_home(const usp_layer *layer, const usp_inner *inner) {
    return !inner->sum_keys && layer->plan->route.stages > 1;
}

static usp_status bring_home(usp_layer *layer, const usp_inner *inner, const usp_tensor home[2], usp_slice slice) {
    usp_bundle bundle = usp_parcels_bundle(layer);
    for (int part = 0; part < 2 && sums_at_home(layer, inner); part++) {
        usp_copy copy = usp_bundle_copy(layer, &bundle, part, layer->mesh.u, usp_plan_keys(layer->plan));
        copy.heads /= slice.count;
        copy.to_dtype = layer->config.dtype;
        copy.from = usp_from_head(home[part], USP_F32, slice.number * copy.heads);
        copy.to = usp_from_head(part ? inner->dv : inner->dk, layer->config.dtype, slice.number * copy.heads);
        usp_copies_add(layer, copy);
    }
    return usp_copies_run(layer, inner->stream);
}

static usp_status run_slice(usp_layer *layer, const usp_inner *inner, const usp_softmax *stage, char *leaving,
                            usp_slice slice) {
    usp_device *device = layer->world->device;
    usp_softmax part = usp_slice_of(stage, slice);
    part.dk = usp_parcels_slice_block(layer, leaving, stage->keys, slice, 0);
    part.dv = usp_parcels_slice_block(layer, leaving, stage->keys, slice, 1);
    return device->ops->softmax_backward(device, &part, inner->stream);
}

/* The last stage and what follows it: one slice's gradients go home during the next one's work. What is moving when it
 * begins are the gradients of the stage before, which arrive where the first slice's are to. */
static usp_status run_slices(usp_layer *layer, const usp_inner *inner, const usp_softmax *stage, int t,
                             const buffers *b, const usp_tensor home[2], int moving) {
    int count = usp_slice_count(layer);
    for (int i = 0; i <= count; i++) {
        usp_slice slice = {i, count}, before = {i - 1, count};
        if (i < count && stage->keys) USP_TRY(run_slice(layer, inner, stage, b->leaving[(t + 1) % 2], slice));
        if (i > 0 || moving) USP_TRY(usp_messages_join(layer, USP_AXIS_RING, inner->stream));
        if (i == 0 && t > 1) USP_TRY(usp_parcels_add(layer, t - 1, b->arriving, home, inner->stream));
        if (i < count) usp_parcels_post_slice(layer, t, b->leaving[(t + 1) % 2], b->arriving, slice);
        if (i < count) USP_TRY(usp_messages_run(layer, inner->stream));
        if (i == 0) continue;
        USP_TRY(usp_parcels_add_slice(layer, t, b->arriving, home, before, inner->stream));
        USP_TRY(bring_home(layer, inner, home, before));
    }
    return USP_OK;
}

/* During step t the keys of stage t + 1 arrive, and the gradients of stage t - 1 go home and are added. */
static usp_status backward_step(usp_layer *layer, const usp_inner *inner, usp_softmax *stage, int t, const buffers *b,
                                const usp_tensor home[2]) {
    usp_device *device = layer->world->device;
    usp_messages *messages = usp_messages_begin(layer, USP_AXIS_RING);
    int stages = layer->plan->route.stages;
    USP_TRY(send_keys(layer, inner, b, t + 1, messages));
    if (t > 1) usp_parcels_post_gradients(layer, t - 1, b->leaving[t % 2], b->arriving, messages);
    int moving = !usp_messages_are_none(messages);
    if (moving) USP_TRY(usp_messages_run(layer, inner->stream));
    if (t < stages) {
        set_stage(layer, inner, stage, t, b->stage[(t + 1) % 2]);
        set_query_sums(layer, inner, stage, b);
        set_key_gradients(layer, inner, stage, t, b, home);
        if (t == stages - 1 && usp_slice_count(layer) > 1) return run_slices(layer, inner, stage, t, b, home, moving);
        usp_softmax part = usp_slice_of(stage, inner->slice);
        if (t == 0 || stage->keys) USP_TRY(device->ops->softmax_backward(device, &part, inner->stream));
    }
    if (moving) USP_TRY(usp_messages_join(layer, USP_AXIS_RING, inner->stream));
    return t > 1 ? usp_parcels_add(layer, t - 1, b->arriving, home, inner->stream) : USP_OK;
}

static usp_status backward(usp_layer *layer, usp_inner *inner) {
    buffers b = carve(layer, USP_PASS_BACKWARD, inner->exchanged, &inner->arena);
    usp_softmax stage = arguments_of(layer, inner, &b);
    usp_bundle bundle = usp_parcels_bundle(layer);
    usp_tensor home[2] = {inner->dk, inner->dv};
    int sliced = usp_slice_count(layer) > 1, steps = layer->plan->route.stages + !sliced;
    for (int part = 0; part < 2 && sums_at_home(layer, inner); part++)
        home[part] = usp_bundle_block(layer, &bundle, b.home, USP_F32, part);
    USP_TRY(pack_own(layer, inner, &b));
    for (int t = 0; t < steps; t++) USP_TRY(backward_step(layer, inner, &stage, t, &b, home));
    if (!sliced) USP_TRY(bring_home(layer, inner, home, (usp_slice){0, 1}));
    return layer->config.sinks && is_last(inner) ? sum_sinks(layer, inner, &stage, &b) : USP_OK;
}

/* ---- cost -------------------------------------------------------------------------------------------------------- */

/* 2 operations a multiply-add; forward: q.k and p.v; backward: q.k, dout.v, dv, dq, dk. */
static double flops(const usp_layer *layer, usp_pass pass, int r) {
    double d = layer->dim[USP_QUERY], e = layer->dim[USP_OUT];
    double pairs = usp_plan_work(layer->sequence, layer->plan, r);
    return pairs * (pass == USP_PASS_FORWARD ? 2 * (d + e) : 2 * (3 * d + 2 * e));
}

static void count_messages(const usp_layer *layer, usp_pass pass, usp_messages *count) {
    const usp_key_memory nowhere = {0};
    int numbers = pass == USP_PASS_FORWARD ? layer->config.max_logit : layer->config.sinks;
    for (int t = 1; t < layer->plan->route.stages; t++) {
        usp_parcels_post_keys(layer, t, &nowhere, count);
        if (pass == USP_PASS_BACKWARD) usp_parcels_post_gradients(layer, t, NULL, NULL, count);
    }
    if (numbers) usp_ring_heads_post(layer, NULL, NULL, count);
}

/* ---- table ------------------------------------------------------------------------------------------------------- */

const usp_attn_ops usp_attn_softmax = {
    "softmax",
    {forward_rows, backward_rows},
    {sizeof forward_rows / sizeof *forward_rows, sizeof backward_rows / sizeof *backward_rows},
    measure,
    saved,
    sums,
    derive,
    forward,
    backward,
    count_messages,
    flops};
