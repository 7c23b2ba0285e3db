/* frame.c - carves calls. Blocks of the inner stage live through a call; what lies between them and own tokens lives
 * before it or behind it, in the memory that the stage itself has in between. */
#include "frame.h"
#include <string.h>

int usp_row_asked(const usp_layer *layer, const usp_operand_row *row) {
    int flag = 1;
    if (row->asked) memcpy(&flag, (const char *)&layer->config + row->asked, sizeof flag);
    return flag != 0;
}

static int is_head(const usp_operand_row *row) {
    return row->form == USP_FORM_STATES || row->form == USP_FORM_HEADS;
}

static int travels(const usp_operand_row *row) {
    return (row->form == USP_FORM_TENSOR || row->form == USP_FORM_ROWS) && row->use != USP_USE_LOCAL;
}

/* ---- operands as they are ---------------------------------------------------------------------------------------- */

static size_t field_size(const usp_operand_row *row) {
    return row->form == USP_FORM_TENSOR ? sizeof(usp_tensor) : sizeof(void *);
}

static void set_field(usp_inner *inner, const usp_operand_row *row, const void *value) {
    memcpy((char *)inner + row->inner, value, field_size(row));
}

static void *pointer_field(const usp_inner *inner, const usp_operand_row *row) {
    void *pointer;
    memcpy(&pointer, (const char *)inner + row->inner, sizeof pointer);
    return pointer;
}

static void take_arguments(const usp_layer *layer, const usp_frame *frame, const void *args, usp_inner *inner) {
    for (int i = 0; i < frame->count && args; i++) {
        const usp_operand_row *row = &frame->rows[i];
        if (usp_row_asked(layer, row) && row->use != USP_USE_DERIVED)
            set_field(inner, row, (const char *)args + row->given);
    }
}

/* ---- operands that travel ---------------------------------------------------------------------------------------- */

/* Gradients are summed over stages, or over ranks that share a head, in fp32. */
static int is_shared_sum(const usp_layer *layer, const usp_operand_row *row) {
    return row->use == USP_USE_OUT && layer->shared[row->like];
}

static usp_dtype block_dtype(const usp_layer *layer, usp_pass pass, const usp_operand_row *row, int shared) {
    int gradient = pass == USP_PASS_BACKWARD && row->use == USP_USE_OUT;
    int sums = gradient && layer->attn->sums && layer->attn->sums(layer);
    return row->form == USP_FORM_ROWS || sums || shared ? USP_F32 : layer->config.dtype;
}

/* [batch, heads, tokens] */
static usp_tensor head_major(float *numbers, int64_t heads, int64_t tokens) {
    return (usp_tensor){numbers, heads * tokens, 1, tokens};
}

static usp_bundle_part part_of(const usp_layer *layer, const usp_frame *frame, const usp_operand_row *row) {
    usp_bundle_part part = {.like = row->like, .dim = layer->dim[row->like]};
    const usp_sharding *sharding = usp_is_key(row->like) ? &layer->sequence->key : &layer->sequence->query;
    part.tokens_dtype = layer->config.dtype;
    if (row->form == USP_FORM_TENSOR) {
        memcpy(&part.tokens, (const char *)&frame->local + row->inner, sizeof part.tokens);
        return part;
    }
    part.dim = 1;
    part.tokens_dtype = USP_F32;
    part.tokens =
        head_major(pointer_field(&frame->local, row), layer->total[row->like], sharding->local[layer->mesh.p]);
    return part;
}

/* Rows i .. end - 1 travel together. */
static int end_of_bundle(const usp_layer *layer, const usp_frame *frame, int i) {
    int end = i + 1;
    while (end < frame->count && frame->rows[i].bundle && frame->rows[end].bundle == frame->rows[i].bundle &&
           usp_row_asked(layer, &frame->rows[end]))
        end++;
    return end;
}

static usp_bundle bundle_of(const usp_layer *layer, usp_pass pass, const usp_frame *frame, int begin, int end) {
    usp_bundle bundle = {.parts = end - begin, .keys = usp_is_key(frame->rows[begin].like)};
    bundle.slice.count = frame->rows[begin].form == USP_FORM_TENSOR ? layer->groups : 1;
    for (int i = begin; i < end; i++) bundle.sums |= is_shared_sum(layer, &frame->rows[i]);
    bundle.wire = bundle.sums || frame->rows[begin].form == USP_FORM_ROWS ? USP_F32 : layer->config.dtype;
    for (int i = begin; i < end; i++) {
        bundle.part[i - begin] = part_of(layer, frame, &frame->rows[i]);
        bundle.part[i - begin].block_dtype = block_dtype(layer, pass, &frame->rows[i], bundle.sums);
    }
    return bundle;
}

/* The bundle's block, and its parts as fields of the inner stage. */
static void carve_block(const usp_layer *layer, usp_frame *frame, int begin, usp_bundle *bundle, usp_arena *arena) {
    usp_dtype dtype = bundle->part[0].block_dtype;
    void *block = usp_carve(arena, (size_t)usp_bundle_block_bytes(layer, bundle, dtype));
    bundle->carved = 1;
    for (int i = 0; i < bundle->parts; i++) {
        const usp_operand_row *row = &frame->rows[begin + i];
        usp_bundle_part *part = &bundle->part[i];
        int64_t rows = bundle->keys ? usp_plan_keys(layer->plan) : usp_plan_queries(layer->plan);
        part->block = row->form == USP_FORM_ROWS ? head_major(block, usp_layer_own_heads(layer), rows)
                                                 : usp_bundle_block(layer, bundle, block, dtype, i);
        if (row->form == USP_FORM_ROWS)
            set_field(&frame->inner, row, &block);
        else
            set_field(&frame->inner, row, &part->block);
    }
    if (bundle->keys && bundle->parts == 2 && frame->rows[begin].use == USP_USE_KEPT) frame->inner.keys = block;
}

/* Blocks, and the lists of what fills or empties them. What is kept travels in forward alone. `workspace` NULL: only
 * what is kept. */
static void carve_blocks(const usp_layer *layer, usp_pass pass, usp_frame *frame, usp_arena *kept,
                         usp_arena *workspace) {
    for (int i = 0, end; i < frame->count; i = end) {
        const usp_operand_row *row = &frame->rows[i];
        end = i + 1;
        int keeps = row->use == USP_USE_KEPT;
        if (!travels(row) || !usp_row_asked(layer, row) || (!keeps && !workspace)) continue;
        end = end_of_bundle(layer, frame, i);
        usp_bundle bundle = bundle_of(layer, pass, frame, i, end);
        carve_block(layer, frame, i, &bundle, keeps ? kept : workspace);
        if (row->use == USP_USE_OUT)
            frame->out[frame->outs++] = bundle;
        else if (!keeps || pass == USP_PASS_FORWARD)
            frame->in[frame->ins++] = bundle;
    }
}

/* ---- states and numbers of heads --------------------------------------------------------------------------------- */

static usp_head_part head_part_of(const usp_layer *layer, const usp_frame *frame, const usp_operand_row *row) {
    int states = row->form == USP_FORM_STATES;
    return (usp_head_part){.row = row,
                           .elements = states ? usp_layer_state_elements(layer) : 1,
                           .batch = states ? layer->config.batch : 1,
                           .all = pointer_field(&frame->local, row)};
}

static float *carve_heads(const usp_head_part *part, int heads, usp_arena *arena) {
    return usp_carve(arena, (size_t)(part->elements * part->batch * heads) * sizeof(float));
}

static void carve_head_parts(const usp_layer *layer, usp_frame *frame, usp_arena *workspace) {
    for (int i = 0; i < frame->count; i++) {
        const usp_operand_row *row = &frame->rows[i];
        if (!is_head(row) || !usp_row_asked(layer, row)) continue;
        usp_head_part part = head_part_of(layer, frame, row);
        part.own = carve_heads(&part, usp_layer_own_heads(layer), workspace);
        set_field(&frame->inner, row, &part.own);
        if (row->use == USP_USE_OUT) {
            part.staging = carve_heads(&part, layer->heads, workspace);
            frame->head_out[frame->head_outs++] = part;
        } else {
            frame->head_in[frame->head_ins++] = part;
        }
    }
}

/* ---- the call ---------------------------------------------------------------------------------------------------- */

/* What is derived, of the tokens that the caller's tensors hold. */
static void carve_derived(const usp_layer *layer, usp_frame *frame, int64_t tokens, int heads, usp_arena *arena) {
    for (int i = 0; i < frame->count; i++) {
        if (frame->rows[i].use != USP_USE_DERIVED) continue;
        float *numbers = usp_carve(arena, (size_t)(tokens * layer->config.batch * heads) * sizeof(float));
        set_field(&frame->local, &frame->rows[i], &numbers);
    }
}

static void carve_sides(const usp_layer *layer, usp_bundle *bundles, int count, usp_arena *arena) {
    for (int i = 0; i < count; i++) usp_bundle_carve(layer, &bundles[i], arena);
}

static usp_arena rest_of(const usp_arena *workspace) {
    return usp_arena_at(workspace->base ? workspace->base + workspace->used : NULL);
}

/* Before, in and behind the inner stage the same memory serves what lives then, but where groups of heads are at each
 * of the three at once. */
static void carve_phases(const usp_layer *layer, usp_pass pass, usp_frame *frame, usp_arena *workspace) {
    usp_arena before = *workspace, behind = *workspace;
    int apart = layer->groups > 1;
    carve_sides(layer, frame->in, frame->ins, apart ? workspace : &before);
    carve_sides(layer, frame->out, frame->outs, apart ? workspace : &behind);
    usp_arena stage = *workspace;
    frame->inner.arena = rest_of(workspace);
    layer->attn->measure(layer, pass, 1, &stage);
    const usp_arena *const phases[] = {&before, &stage, &behind};
    for (int i = 0; i < 3; i++) {
        if (phases[i]->used > workspace->used) workspace->used = phases[i]->used;
        usp_arena_note(workspace, phases[i]->shape);
    }
}

/* The caller's tensors are the inner stage's. There is room for keys all the same, where forward leaves them packed. */
static void open_as_given(const usp_layer *layer, usp_pass pass, usp_frame *frame, usp_arena *kept,
                          usp_arena *workspace) {
    carve_derived(layer, frame, layer->plan->query_limit, usp_layer_own_heads(layer), workspace);
    if (layer->mesh.ulysses > 1) carve_blocks(layer, pass, frame, kept, NULL);
    void *mine = frame->inner.kept, *keys = frame->inner.keys;
    frame->inner = frame->local;
    frame->inner.kept = mine;
    frame->inner.keys = keys;
    frame->inner.packed = keys && pass == USP_PASS_BACKWARD;
    frame->inner.arena = rest_of(workspace);
    layer->attn->measure(layer, pass, 0, workspace);
}

static int sums_of(const usp_frame *frame, int keys) {
    for (int i = 0; i < frame->outs; i++)
        if (frame->out[i].keys == keys && frame->out[i].part[0].like != USP_OUT)
            return frame->out[i].part[0].block_dtype == USP_F32;
    return 0;
}

void usp_frame_open(const usp_layer *layer, usp_pass pass, const void *args, int moves, usp_arena *kept,
                    usp_arena *workspace, usp_frame *frame) {
    *frame = (usp_frame){.rows = layer->attn->rows[pass], .count = layer->attn->row_count[pass]};
    take_arguments(layer, frame, args, &frame->local);
    frame->inner.kept = usp_carve(kept, layer->attn->saved(layer));
    if (!moves) {
        open_as_given(layer, pass, frame, kept, workspace);
        return;
    }
    take_arguments(layer, frame, args, &frame->inner);
    carve_derived(layer, frame, layer->sequence->query.limit, layer->heads, workspace);
    carve_head_parts(layer, frame, workspace);
    carve_blocks(layer, pass, frame, kept, workspace);
    carve_phases(layer, pass, frame, workspace);
    frame->inner.packed = frame->inner.exchanged = 1;
    frame->inner.sum_queries = sums_of(frame, 0);
    frame->inner.sum_keys = sums_of(frame, 1);
}
