/* attn_linear.c - linear attention on the ring axis (LASP): ranks exchange states, whose size depends neither on length
 * nor on the number of documents.
 *
 * A flow is one direction of a state through the chunks of positions: forward S_t = lambda S_(t-1) + k_t v_t^T, and in
 * backward its adjoint D_t = lambda D_(t+1) + q_t dout_t^T, with time reversed. Each chunk's own total is found first;
 * then intra-chunk work runs while the totals travel (lib/state_exchange.h); last, the state that came in is applied.
 * out = scale q S, dq = scale S dout, dk = scale D v, dv = scale D^T k: one kernel with its operands in other places.
 *
 * Where a document begins S starts anew, where it ends D does. A state between two rows is that of the document before
 * it (of D: behind it), and kernels apply it to rows of that document alone. */
#include "attn.h"
#include "error.h"
#include "head_sums.h"
#include "state_exchange.h"

/* ---- operands ---------------------------------------------------------------------------------------------------- */

static const usp_operand_row forward_rows[] = {USP_FORWARD_TENSORS,
                                               {USP_GIVEN(usp_forward, initial_state), USP_INNER(initial),
                                                USP_FORM_STATES, USP_OUT, USP_USE_IN, 0, USP_ASKED(initial_state)},
                                               {USP_GIVEN(usp_forward, final_state), USP_INNER(final), USP_FORM_STATES,
                                                USP_OUT, USP_USE_OUT, 0, USP_ASKED(final_state)}};

static const usp_operand_row backward_rows[] = {USP_BACKWARD_TENSORS,
                                                {USP_GIVEN(usp_backward, initial_state), USP_INNER(initial),
                                                 USP_FORM_STATES, USP_OUT, USP_USE_IN, 0, USP_ASKED(initial_state)},
                                                {USP_GIVEN(usp_backward, dfinal_state), USP_INNER(dfinal),
                                                 USP_FORM_STATES, USP_OUT, USP_USE_IN, 0, USP_ASKED(final_state)},
                                                {USP_GIVEN(usp_backward, dinitial_state), USP_INNER(dinitial),
                                                 USP_FORM_STATES, USP_OUT, USP_USE_OUT, 0, USP_ASKED(initial_state)}};

/* ---- buffers ----------------------------------------------------------------------------------------------------- */

typedef struct buffers {
    usp_flow flow[2];          /* S and D: their memory */
    float *seed;               /* D's initial state */
    float *acc, *keys, *heads; /* fp32 rows of products: before a state is applied, or shared heads are summed */
    void *scratch;
} buffers;

static float *carve_rows(const usp_layer *layer, usp_arena *arena) {
    int64_t dim = layer->dim[USP_QUERY] > layer->dim[USP_VALUE] ? layer->dim[USP_QUERY] : layer->dim[USP_VALUE];
    int64_t elements = layer->plan->query_limit * layer->config.batch * usp_layer_own_heads(layer) * dim;
    return usp_carve(arena, (size_t)elements * sizeof(float));
}

static buffers carve(const usp_layer *layer, usp_pass pass, usp_arena *arena) {
    buffers b = {0};
    b.flow[0] = usp_flow_carve(layer, !layer->config.recompute_state, arena);
    if (pass == USP_PASS_BACKWARD) b.flow[1] = usp_flow_carve(layer, 0, arena);
    b.scratch = usp_carve(arena, layer->needs.scratch);
    b.acc = carve_rows(layer, arena);
    if (pass == USP_PASS_FORWARD) return b;
    b.keys = layer->config.recompute_state ? carve_rows(layer, arena) : b.acc; /* dq is done before dk begins */
    b.heads = carve_rows(layer, arena);
    b.seed = usp_state_carve(layer, 1, arena);
    return b;
}

static void measure(const usp_layer *layer, usp_pass pass, int exchanged, usp_arena *arena) {
    (void)exchanged;
    carve(layer, pass, arena);
}

/* The states before the own chunks (LASP's cache). */
static size_t saved(const usp_layer *layer) {
    usp_arena arena = {0};
    if (!layer->config.recompute_state) usp_state_carve(layer, layer->plan->chunks.own_chunk_limit, &arena);
    return arena.used;
}

/* ---- states ------------------------------------------------------------------------------------------------------ */

/* One chunk that is the whole sequence: no state comes from anywhere but the caller. */
static int is_alone(const usp_layer *layer) {
    return usp_flow_causal(layer) && layer->mesh.ring == 1 && layer->plan->chunks.own_chunks == 1;
}

static usp_linear block_arguments(const usp_layer *layer, const usp_flow *f) {
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
                        .causal = usp_flow_causal(layer),
                        .reverse = f->reverse,
                        .block = layer->plan->device.chunks.block,
                        .blocks = (int)layer->plan->chunks.blocks,
                        .begins = layer->plan->device.chunks.begins,
                        .ends = layer->plan->device.chunks.ends,
                        .tokens = usp_plan_queries(layer->plan),
                        .k = f->k,
                        .v = f->v,
                        .states = f->blocks,
                        .scratch = f->scratch};
}

/* The totals of all own blocks, of which a reversed one looks one token further, to the state before the block; from
 * them the states before the blocks, each chunk from `initial`, to `final`. */
static usp_status find_states(usp_layer *layer, const usp_inner *inner, const usp_flow *f, const float *initial,
                              float *final) {
    usp_device *device = layer->world->device;
    usp_linear arguments = block_arguments(layer, f);
    usp_scan scan = usp_state_scan(layer, f);
    arguments.shift = f->reverse;
    USP_TRY(device->ops->linear_totals(device, &arguments, inner->stream));
    scan.step = layer->plan->device.chunks.block_step;
    scan.states = (int)layer->plan->chunks.blocks;
    scan.groups = (int)layer->plan->chunks.own_chunks;
    scan.data = f->blocks;
    scan.initial = initial;
    scan.final = final;
    return device->ops->linear_scan(device, &scan, inner->stream);
}

/* Finds each own chunk's total; the travel of states may begin. */
static usp_status begin_flow(usp_layer *layer, const usp_inner *inner, const usp_flow *f) {
    USP_TRY(find_states(layer, inner, f, NULL, f->totals));
    return usp_world_fork(layer->world, inner->stream, usp_layer_transfer(layer, USP_AXIS_RING));
}

/* ---- outputs ----------------------------------------------------------------------------------------------------- */

/* A tensor of the layer, and how layer heads read its heads. */
typedef struct operand {
    usp_tensor tensor;
    usp_head_map map;
    int dim;
} operand;

static operand operand_of(const usp_layer *layer, usp_operand which, usp_tensor tensor) {
    return (operand){tensor, usp_layer_head_map(layer, which), layer->dim[which]};
}

/* One product with a flow's states: out, dq, dk or dv, whose map says how layer heads gather into its heads. */
typedef struct product {
    const usp_flow *states;
    operand q, k, v, out;
    int transposed;
    usp_dtype dtype; /* of out */
} product;

static usp_tensor dense_rows(const usp_layer *layer, float *rows, int dim) {
    int64_t row = (int64_t)usp_layer_own_heads(layer) * dim;
    return (usp_tensor){rows, row, row * layer->config.batch, dim};
}

static usp_linear product_arguments(const usp_layer *layer, const product *p) {
    usp_linear arguments = block_arguments(layer, p->states);
    arguments.dim = p->q.dim;
    arguments.value_dim = p->v.dim;
    arguments.q = p->q.tensor;
    arguments.k = p->k.tensor;
    arguments.v = p->v.tensor;
    arguments.q_map = p->q.map;
    arguments.k_map = p->k.map;
    arguments.v_map = p->v.map;
    arguments.out = p->out.tensor;
    arguments.transposed = p->transposed;
    arguments.shift = !p->states->reverse;
    return arguments;
}

/* May the kernel write the result where it belongs, or do heads have to be summed or widened first? */
static int is_direct(const usp_layer *layer, const product *p) {
    return p->out.map.group == 1 && p->out.map.offset == 0 && p->dtype == layer->config.dtype;
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
    arguments.first = !usp_flow_causal(layer);
    arguments.last = is_direct(layer, p);
    arguments.acc = rows;
    return layer->world->device->ops->linear_apply(layer->world->device, &arguments, inner->stream);
}

/* Heads that share one of the result are summed, and written where it belongs. */
static usp_status sum_heads(usp_layer *layer, const usp_inner *inner, const product *p, float *rows) {
    const usp_head_sum sum = {usp_plan_queries(layer->plan),
                              p->v.dim,
                              dense_rows(layer, rows, p->v.dim),
                              p->out.tensor,
                              p->out.map,
                              p->dtype};
    return is_direct(layer, p) ? USP_OK : usp_heads_sum(layer, &sum, inner->stream);
}

/* ---- forward ----------------------------------------------------------------------------------------------------- */

static usp_flow forward_flow(const usp_layer *layer, const usp_inner *inner, const buffers *b) {
    usp_flow f = b->flow[0];
    f.k = inner->k;
    f.v = inner->v;
    f.k_map = usp_layer_head_map(layer, USP_KEY);
    f.v_map = usp_layer_head_map(layer, USP_VALUE);
    f.initial = inner->initial;
    f.scratch = b->scratch;
    if (!layer->config.recompute_state) f.incoming = inner->kept;
    return f;
}

static product out_product(const usp_layer *layer, const usp_inner *inner, const usp_flow *s) {
    operand q = operand_of(layer, USP_QUERY, inner->q), k = operand_of(layer, USP_KEY, inner->k);
    operand v = operand_of(layer, USP_VALUE, inner->v), out = operand_of(layer, USP_OUT, inner->out);
    return (product){s, q, k, v, out, 0, layer->config.dtype};
}

/* Nothing comes from other ranks: one scan gives the true states at once. */
static usp_status forward_alone(usp_layer *layer, const usp_inner *inner, const usp_flow *f, const product *out) {
    USP_TRY(find_states(layer, inner, f, f->initial, f->final));
    USP_TRY(usp_state_copy(layer, f->incoming, f->initial, inner->stream));
    return run_intra(layer, inner, out, NULL, 1);
}

static usp_status forward(usp_layer *layer, usp_inner *inner) {
    buffers b = carve(layer, USP_PASS_FORWARD, &inner->arena);
    usp_flow f = forward_flow(layer, inner, &b);
    product out = out_product(layer, inner, &f);
    if (is_alone(layer)) {
        USP_TRY(forward_alone(layer, inner, &f, &out));
    } else {
        USP_TRY(begin_flow(layer, inner, &f));
        if (usp_flow_causal(layer)) USP_TRY(run_intra(layer, inner, &out, b.acc, 0));
        USP_TRY(usp_flow_travel(layer, &f));
        USP_TRY(usp_flow_end(layer, &f, inner->stream));
        USP_TRY(run_apply(layer, inner, &out, b.acc));
    }
    return inner->final ? usp_state_copy(layer, inner->final, f.final, inner->stream) : USP_OK;
}

/* ---- backward ---------------------------------------------------------------------------------------------------- */

static usp_flow backward_flow(const usp_layer *layer, const usp_inner *inner, const buffers *b) {
    usp_flow f = b->flow[1];
    f.reverse = 1;
    f.k = inner->q;
    f.v = inner->dout;
    f.k_map = usp_layer_head_map(layer, USP_QUERY);
    f.v_map = usp_layer_head_map(layer, USP_OUT);
    f.initial = inner->dfinal;
    f.scratch = b->scratch;
    return f;
}

/* dq = scale S dout, dk = scale D v, dv = scale D^T k. */
static void list_products(const usp_layer *layer, const usp_inner *inner, const usp_flow *s, const usp_flow *d,
                          product products[3]) {
    operand q = operand_of(layer, USP_QUERY, inner->q), dq = operand_of(layer, USP_QUERY, inner->dq);
    operand k = operand_of(layer, USP_KEY, inner->k), dk = operand_of(layer, USP_KEY, inner->dk);
    operand v = operand_of(layer, USP_VALUE, inner->v), dv = operand_of(layer, USP_VALUE, inner->dv);
    operand dout = operand_of(layer, USP_OUT, inner->dout);
    usp_dtype queries = inner->sum_queries ? USP_F32 : layer->config.dtype;
    usp_dtype keys = inner->sum_keys ? USP_F32 : layer->config.dtype;
    products[0] = (product){s, dout, v, k, dq, 1, queries};
    products[1] = (product){d, v, dout, q, dk, 1, keys};
    products[2] = (product){d, k, q, dout, dv, 0, keys};
}

/* D is kept without the scale, which every product applies; the caller's state gradients carry it. */
static usp_status scale_state(usp_layer *layer, const usp_inner *inner, float *state, float factor) {
    usp_device *device = layer->world->device;
    return device->ops->scale(device, state, usp_state_size(layer), factor, inner->stream);
}

/* Are the forward states exchanged again, instead of taken from saved? */
static int exchanges_again(const usp_layer *layer) {
    return layer->config.recompute_state && !is_alone(layer);
}

/* The forward states of the blocks: from what was kept, or as far as they go before the exchange. */
static usp_status begin_forward_states(usp_layer *layer, const usp_inner *inner, const usp_flow *s) {
    if (exchanges_again(layer)) return begin_flow(layer, inner, s);
    if (!usp_flow_causal(layer)) return USP_OK;
    return find_states(layer, inner, s, layer->config.recompute_state ? s->initial : s->incoming, NULL);
}

static usp_status finish_product(usp_layer *layer, const usp_inner *inner, const product *p, float *rows, int apply) {
    if (apply) USP_TRY(run_apply(layer, inner, p, rows));
    return sum_heads(layer, inner, p, rows);
}

/* dq, dk, dv: everything inside the chunks, then the travel of states, then what these add. dq is done at once where
 * the forward states were kept. */
static usp_status backward_products(usp_layer *layer, const usp_inner *inner, const usp_flow *s, const usp_flow *d,
                                    const buffers *b) {
    product products[3];
    float *rows[3] = {b->acc, b->keys, b->heads};
    int causal = usp_flow_causal(layer), again = exchanges_again(layer), shared = !is_alone(layer);
    const int waits[3] = {again, shared, shared};
    list_products(layer, inner, s, d, products);
    for (int i = 0; i < 3; i++) {
        if (causal) USP_TRY(run_intra(layer, inner, &products[i], rows[i], !waits[i]));
        if (!waits[i]) USP_TRY(finish_product(layer, inner, &products[i], rows[i], !causal));
    }
    if (again) USP_TRY(usp_flow_travel(layer, s));
    if (shared) USP_TRY(usp_flow_travel(layer, d));
    if (again) USP_TRY(usp_flow_end(layer, s, inner->stream));
    if (shared) USP_TRY(usp_flow_end(layer, d, inner->stream));
    for (int i = 0; i < 3; i++)
        if (waits[i]) USP_TRY(finish_product(layer, inner, &products[i], rows[i], 1));
    return USP_OK;
}

static usp_status backward(usp_layer *layer, usp_inner *inner) {
    buffers b = carve(layer, USP_PASS_BACKWARD, &inner->arena);
    usp_flow s = forward_flow(layer, inner, &b), d = backward_flow(layer, inner, &b);
    s.again = 1;
    if (inner->dfinal) {
        USP_TRY(usp_state_copy(layer, b.seed, inner->dfinal, inner->stream));
        USP_TRY(scale_state(layer, inner, b.seed, 1 / layer->config.scale));
        d.initial = b.seed;
    }
    USP_TRY(is_alone(layer) ? find_states(layer, inner, &d, d.initial, d.final) : begin_flow(layer, inner, &d));
    USP_TRY(begin_forward_states(layer, inner, &s));
    USP_TRY(backward_products(layer, inner, &s, &d, &b));
    if (!inner->dinitial) return USP_OK;
    USP_TRY(usp_state_copy(layer, inner->dinitial, d.final, inner->stream));
    return scale_state(layer, inner, inner->dinitial, layer->config.scale);
}

/* ---- cost -------------------------------------------------------------------------------------------------------- */

/* As the recurrence counts: 2 operations a multiply-add; k v^T, q S forward; q dout^T, k v^T, dq, dk, dv backward. */
static double flops(const usp_layer *layer, usp_pass pass, int r) {
    double tokens = (double)usp_ring_rows(&layer->plan->query, r);
    return tokens * (pass == USP_PASS_FORWARD ? 4.0 : 10.0) * (double)usp_layer_state_elements(layer);
}

static void count_messages(const usp_layer *layer, usp_pass pass, usp_messages *count) {
    usp_flow s = {.again = pass == USP_PASS_BACKWARD}, d = {.reverse = 1};
    if (pass == USP_PASS_BACKWARD) usp_flow_count(layer, &d, count);
    if (pass == USP_PASS_FORWARD || layer->config.recompute_state) usp_flow_count(layer, &s, count);
}

/* ---- table ------------------------------------------------------------------------------------------------------- */

const usp_attn_ops usp_attn_linear = {
    "linear",
    {forward_rows, backward_rows},
    {sizeof forward_rows / sizeof *forward_rows, sizeof backward_rows / sizeof *backward_rows},
    measure,
    saved,
    NULL, /* it sums over chunks, inside the kernels */
    NULL,
    forward,
    backward,
    count_messages,
    flops};
