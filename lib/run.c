/* run.c - one forward or backward call as a straight line: carve, exchange in, the kind's ring stage, exchange out; in
 * groups of heads one step ahead of the stage and one behind it. Both passes are one line that walks the kind's
 * operands; it names no kind. With one ulysses rank there is no exchange and the ring stage works on the caller's
 * tensors. */
#include "run.h"
#include "abi.h"
#include "arguments.h"
#include "error.h"
#include "head_exchange.h"

/* ---- one pass ---------------------------------------------------------------------------------------------------- */

/* What leaves and arrives during step g: of the group behind it and of the one before it. What is of all heads arrives
 * with the first and leaves with the last. */
typedef struct crossing {
    usp_bundle in[USP_MOST_BUNDLES], out[USP_MOST_BUNDLES];
    int ins, outs, begins, ends;
} crossing;

/* Of what goes in groups group g; the rest goes whole, with group `with`. Returns how many parts there are: none if
 * there is no such group. */
static int parts_of(const usp_layer *layer, const usp_bundle *bundles, int count, int g, int with, usp_bundle *parts) {
    int found = 0;
    for (int i = 0; i < count && g >= 0 && g < layer->groups; i++) {
        int whole = bundles[i].slice.count < layer->groups;
        if (whole && g != with) continue;
        parts[found] = bundles[i];
        parts[found++].slice.number = whole ? 0 : g;
    }
    return found;
}

static crossing crossing_of(const usp_layer *layer, const usp_frame *frame, int g) {
    crossing c = {.begins = g == -1, .ends = g == layer->groups};
    c.ins = parts_of(layer, frame->in, frame->ins, g + 1, 0, c.in);
    c.outs = parts_of(layer, frame->out, frame->outs, g - 1, layer->groups - 1, c.out);
    return c;
}

static void post(const usp_layer *layer, const usp_frame *frame, const crossing *c, usp_messages *messages) {
    for (int i = 0; i < c->ins; i++) usp_bundle_post(layer, &c->in[i], messages, 1);
    for (int i = 0; i < c->outs; i++) usp_bundle_post(layer, &c->out[i], messages, 0);
    for (int i = 0; i < frame->head_outs && c->ends; i++) usp_heads_post(layer, &frame->head_out[i], messages);
}

static usp_status pack(usp_layer *layer, const usp_frame *frame, const crossing *c, usp_stream stream) {
    for (int i = 0; i < c->ins; i++) usp_bundle_pack(layer, &c->in[i]);
    for (int i = 0; i < c->outs; i++) usp_bundle_lift(layer, &c->out[i]);
    for (int i = 0; i < frame->head_ins && c->begins; i++) usp_heads_slice(layer, &frame->head_in[i]);
    return usp_copies_run(layer, stream);
}

/* What stays on this rank is copied while the first or last of the rest travels. */
static usp_status keep(usp_layer *layer, const usp_frame *frame, const crossing *c, usp_stream stream) {
    for (int i = 0; i < frame->ins && c->begins; i++) usp_bundle_keep(layer, &frame->in[i], 1);
    for (int i = 0; i < frame->outs && c->ends; i++) usp_bundle_keep(layer, &frame->out[i], 0);
    return usp_copies_run(layer, stream);
}

static usp_status unpack(usp_layer *layer, const usp_frame *frame, const crossing *c, usp_stream stream) {
    for (int i = 0; i < c->ins; i++) usp_bundle_land(layer, &c->in[i]);
    for (int i = 0; i < c->outs; i++) USP_TRY(usp_bundle_unpack(layer, &c->out[i], stream));
    for (int i = 0; i < frame->head_outs && c->ends; i++) usp_heads_unpack(layer, &frame->head_out[i]);
    return usp_copies_run(layer, stream);
}

/* Each slice carves the same memory. */
static usp_status run_stage(usp_layer *layer, usp_pass pass, const usp_frame *frame, usp_slice slice,
                            usp_stream stream) {
    usp_inner inner = frame->inner;
    inner.stream = stream;
    inner.slice = slice;
    return pass == USP_PASS_FORWARD ? layer->attn->forward(layer, &inner) : layer->attn->backward(layer, &inner);
}

/* While group g is worked on, the next one arrives and the one before leaves. Before the first and behind the last
 * there is none to work on. */
static usp_status run_step(usp_layer *layer, usp_pass pass, const usp_frame *frame, int g, usp_stream stream) {
    crossing c = crossing_of(layer, frame, g);
    USP_TRY(pack(layer, frame, &c, stream));
    usp_messages *messages = usp_messages_begin(layer, USP_AXIS_ULYSSES);
    post(layer, frame, &c, messages);
    int moving = !usp_messages_are_none(messages);
    if (moving) USP_TRY(usp_messages_run(layer, stream));
    USP_TRY(keep(layer, frame, &c, stream));
    if (g >= 0 && g < layer->groups) USP_TRY(run_stage(layer, pass, frame, (usp_slice){g, layer->groups}, stream));
    if (moving) USP_TRY(usp_messages_join(layer, USP_AXIS_ULYSSES, stream));
    return unpack(layer, frame, &c, stream);
}

static usp_status run_exchanged(usp_layer *layer, usp_pass pass, usp_frame *frame, usp_stream stream) {
    frame->local.stream = stream;
    if (pass == USP_PASS_BACKWARD && layer->attn->derive)
        USP_TRY(layer->attn->derive(layer, &frame->local, layer->sequence->query.local[layer->mesh.p], layer->heads));
    for (int g = -1; g <= layer->groups; g++) USP_TRY(run_step(layer, pass, frame, g, stream));
    return USP_OK;
}

static usp_status run_as_given(usp_layer *layer, usp_pass pass, usp_frame *frame, usp_stream stream) {
    frame->inner.stream = stream;
    if (pass == USP_PASS_BACKWARD && layer->attn->derive)
        USP_TRY(layer->attn->derive(layer, &frame->inner, usp_plan_queries(layer->plan), usp_layer_own_heads(layer)));
    return run_stage(layer, pass, frame, (usp_slice){0, 1}, stream);
}

/* `inner`: the caller's tensors are the inner stage's. */
static usp_status run(usp_layer *layer, usp_pass pass, const void *args, void *saved, void *workspace,
                      usp_stream stream, int inner) {
    usp_arena work = usp_arena_at(workspace), kept = usp_arena_at(saved);
    usp_frame frame;
    int moves = layer->mesh.ulysses > 1 && !inner;
    usp_frame_open(layer, pass, args, moves, saved ? &kept : &work, &work, &frame);
    return usp_world_conclude(layer->world, moves ? run_exchanged(layer, pass, &frame, stream)
                                                  : run_as_given(layer, pass, &frame, stream));
}

/* ---- forward ----------------------------------------------------------------------------------------------------- */

static usp_status forward(usp_layer *layer, const usp_forward *given, void *workspace, size_t bytes, usp_stream stream,
                          int inner) {
    usp_forward args;
    USP_TRY(usp_world_poll(layer->world));
    USP_TRY(usp_abi_read(&args, sizeof args, given, "usp_forward"));
    USP_TRY(usp_check_operands(layer, USP_PASS_FORWARD, &args, inner));
    USP_TRY(usp_check_saved(layer, args.saved, "usp_forward.saved"));
    size_t needed = args.saved ? layer->sizes.forward_saving_workspace : layer->sizes.forward_workspace;
    USP_TRY(usp_check_workspace(layer, USP_FORWARD_WORKSPACE, workspace, bytes, needed));
    return run(layer, USP_PASS_FORWARD, &args, args.saved, workspace, stream, inner);
}

usp_status usp_layer_forward(usp_layer *layer, const usp_forward *args, void *workspace, size_t bytes,
                             usp_stream stream) {
    USP_REQUIRE(layer, "layer is NULL");
    USP_TRY(usp_guard_enter(layer->world));
    return usp_guard_leave(layer->world, forward(layer, args, workspace, bytes, stream, 0));
}

usp_status usp_layer_inner_forward(usp_layer *layer, const usp_forward *args, void *workspace, size_t bytes,
                                   usp_stream stream) {
    USP_REQUIRE(layer, "layer is NULL");
    USP_TRY(usp_guard_enter(layer->world));
    return usp_guard_leave(layer->world, forward(layer, args, workspace, bytes, stream, 1));
}

/* ---- backward ---------------------------------------------------------------------------------------------------- */

static usp_status backward(usp_layer *layer, const usp_backward *given, void *workspace, size_t bytes,
                           usp_stream stream, int inner) {
    usp_backward args;
    USP_TRY(usp_world_poll(layer->world));
    USP_TRY(usp_abi_read(&args, sizeof args, given, "usp_backward"));
    USP_TRY(usp_check_operands(layer, USP_PASS_BACKWARD, &args, inner));
    if (!args.saved && layer->sizes.saved)
        return usp_fail(USP_WORKSPACE, "usp_backward.saved is NULL: pass what forward wrote");
    USP_TRY(usp_check_saved(layer, args.saved, "usp_backward.saved"));
    USP_TRY(usp_check_workspace(layer, USP_BACKWARD_WORKSPACE, workspace, bytes, layer->sizes.backward_workspace));
    return run(layer, USP_PASS_BACKWARD, &args, (void *)(uintptr_t)args.saved, workspace, stream, inner);
}

usp_status usp_layer_backward(usp_layer *layer, const usp_backward *args, void *workspace, size_t bytes,
                              usp_stream stream) {
    USP_REQUIRE(layer, "layer is NULL");
    USP_TRY(usp_guard_enter(layer->world));
    return usp_guard_leave(layer->world, backward(layer, args, workspace, bytes, stream, 0));
}

usp_status usp_layer_inner_backward(usp_layer *layer, const usp_backward *args, void *workspace, size_t bytes,
                                    usp_stream stream) {
    USP_REQUIRE(layer, "layer is NULL");
    USP_TRY(usp_guard_enter(layer->world));
    return usp_guard_leave(layer->world, backward(layer, args, workspace, bytes, stream, 1));
}

/* ---- sizes and cost ---------------------------------------------------------------------------------------------- */

/* Workspace of a call, with an exchange and without, whichever is more; kept apart or not. */
static size_t measure(const usp_layer *layer, usp_pass pass, int apart, size_t *saved, usp_arena *shape) {
    size_t most = 0;
    for (int moves = 0; moves <= (layer->mesh.ulysses > 1); moves++) {
        usp_arena work = {0}, kept = {0};
        usp_frame frame;
        usp_frame_open(layer, pass, NULL, moves, apart ? &kept : &work, &work, &frame);
        if (work.used > most) most = work.used;
        if (saved && kept.used > *saved) *saved = kept.used;
        usp_arena_note(shape, work.shape);
        usp_arena_note(shape, kept.shape);
    }
    return most;
}

usp_sizes usp_run_sizes(const usp_layer *layer, uint64_t *shape) {
    usp_sizes sizes = {.alignment = USP_ALIGNMENT};
    usp_arena all = {0};
    sizes.forward_workspace = measure(layer, USP_PASS_FORWARD, 0, NULL, &all);
    sizes.forward_saving_workspace = measure(layer, USP_PASS_FORWARD, 1, &sizes.saved, &all);
    sizes.backward_workspace = measure(layer, USP_PASS_BACKWARD, 1, NULL, &all);
    sizes.exchange_workspace = usp_exchange_alone_bytes(layer, &all);
    for (int i = 0; i < USP_OPERANDS; i++)
        usp_arena_note(&all, (uint64_t)usp_layer_heads(layer, (usp_operand)i, layer->mesh.u).count);
    usp_arena_note(&all, (uint64_t)layer->needs.items);
    *shape = all.shape;
    return sizes;
}

void usp_run_count_messages(const usp_layer *layer, usp_pass pass, usp_messages *count) {
    usp_arena work = {0}, kept = {0};
    usp_frame frame;
    if (layer->mesh.ulysses == 1) return;
    usp_frame_open(layer, pass, NULL, 1, &kept, &work, &frame);
    for (int g = -1; g <= layer->groups; g++) {
        crossing c = crossing_of(layer, &frame, g);
        post(layer, &frame, &c, count);
    }
}
