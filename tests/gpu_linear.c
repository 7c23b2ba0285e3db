/* gpu_linear.c - linear attention on the CUDA device against the CPU's: blocks, chunks, directions, heads, dims. One
 * kernel also goes through a captured graph. Blocks are of every length, which layers choose by the length of a run. */
#include <cuda_runtime_api.h>
#include <stdio.h>
#include <string.h>

#include "../cuda/launch.h"
#include "../cuda/linear.h"
#include "gpu_linear.h"

/* ---- linear: cases ----------------------------------------------------------------------------------------------- */

static const usp_gpu_linear_case linear_cases[] = {
    {"plain", USP_BF16, BSHD, 2, 2, 2, 2, 2, 0, 128, 128, {256}, 128, 0, 1, 0, 1, USP_GPU_NO_DECAY, 1},
    {"slow", USP_BF16, BSHD, 1, 4, 4, 4, 4, 0, 128, 128, {640, 300}, 256, 0, 1, 0, 1, USP_GPU_SLOW, 0.088f},
    {"fast", USP_BF16, BSHD, 1, 4, 4, 4, 4, 0, 128, 128, {500}, 128, 0, 1, 0, 1, USP_GPU_FAST, 1},
    {"reverse", USP_BF16, BSHD, 2, 2, 2, 2, 2, 0, 128, 128, {300, 190, 1}, 128, 1, 0, 0, 1, USP_GPU_SLOW, 1},
    {"reverse, transposed", USP_BF16, BHSD, 1, 2, 2, 2, 2, 0, 128, 128, {333}, 128, 1, 1, 1, 1, USP_GPU_SLOW, 0.5f},
    {"transposed", USP_BF16, PACKED, 2, 2, 2, 2, 2, 0, 128, 64, {257, 255}, 192, 0, 1, 1, 1, USP_GPU_FAST, 1},
    {"d 64", USP_BF16, SBHD, 2, 2, 2, 2, 2, 0, 64, 64, {130, 64}, 64, 0, 0, 0, 1, USP_GPU_SLOW, 1},
    {"d 64, e 128", USP_BF16, BSHD, 1, 2, 2, 2, 2, 0, 64, 128, {400}, 512, 1, 1, 1, 1, USP_GPU_SLOW, 1},
    {"f16", USP_F16, BSHD, 1, 2, 2, 2, 2, 0, 128, 128, {512}, 256, 0, 1, 0, 1, USP_GPU_SLOW, 1},
    {"f16, transposed", USP_F16, PACKED, 1, 2, 2, 2, 2, 0, 64, 128, {100, 90, 70}, 64, 1, 1, 1, 1, USP_GPU_FAST, 1},
    {"f16, d 128, e 64", USP_F16, BHSD, 1, 2, 2, 2, 2, 0, 128, 64, {200}, 128, 0, 1, 0, 1, USP_GPU_NO_DECAY, 1},
    {"f16, d 64", USP_F16, BSHD, 1, 2, 2, 2, 2, 0, 64, 64, {200}, 128, 0, 0, 0, 1, USP_GPU_SLOW, 1},
    {"shared keys", USP_BF16, BSHD, 1, 3, 6, 2, 3, 3, 64, 64, {200}, 128, 0, 1, 0, 1, USP_GPU_SLOW, 1},
    {"shared queries", USP_BF16, BSHD, 2, 4, 2, 2, 4, 0, 128, 128, {150}, 64, 1, 1, 0, 1, USP_GPU_SLOW, 1},
    {"both directions", USP_BF16, BSHD, 1, 2, 2, 2, 2, 0, 128, 128, {300, 20}, 128, 0, 0, 0, 0, USP_GPU_NO_DECAY, 1},
    {"odd rows", USP_BF16, ODD, 2, 2, 2, 2, 2, 0, 128, 128, {200, 77}, 128, 0, 1, 0, 1, USP_GPU_SLOW, 1},
    {"d 5, e 17", USP_F32, ODD, 2, 2, 2, 2, 2, 0, 5, 17, {100, 31}, 64, 0, 1, 0, 1, USP_GPU_SLOW, 1},
    {"d 17, e 5", USP_BF16, BSHD, 1, 2, 2, 2, 2, 0, 17, 5, {100, 31}, 64, 1, 0, 1, 1, USP_GPU_FAST, 1},
    {"d 96", USP_F16, PACKED, 1, 2, 2, 1, 2, 0, 96, 96, {130}, 64, 0, 1, 0, 1, USP_GPU_SLOW, 1},
    {"d 256", USP_BF16, BSHD, 1, 1, 1, 1, 1, 0, 256, 256, {140}, 64, 1, 1, 0, 1, USP_GPU_SLOW, 1},
    {"f32", USP_F32, BSHD, 1, 2, 2, 2, 2, 0, 64, 64, {200, 100}, 128, 0, 1, 1, 1, USP_GPU_SLOW, 1},
    {"f32, both directions", USP_F32, BHSD, 1, 2, 1, 2, 2, 0, 20, 36, {70, 20}, 64, 1, 0, 0, 0, USP_GPU_NO_DECAY, 0.3f},
    {"one row", USP_BF16, BSHD, 1, 2, 2, 2, 2, 0, 128, 128, {1, 65}, 64, 0, 1, 0, 1, USP_GPU_FAST, 1},
    {"long", USP_BF16, BSHD, 1, 1, 1, 1, 1, 0, 128, 128, {4096}, 512, 0, 1, 0, 1, USP_GPU_SLOW, 1},
};

/* ---- linear: calls ----------------------------------------------------------------------------------------------- */

static usp_head_map map_of(const usp_gpu_linear_case *c, int heads) {
    int layer_heads = c->q_heads > c->k_heads ? c->q_heads : c->k_heads;
    layer_heads = layer_heads > c->v_heads ? layer_heads : c->v_heads;
    return (usp_head_map){layer_heads / heads, c->offset};
}

static usp_linear linear_args(const usp_gpu_world *w, const usp_gpu_linear *l, const usp_gpu_view *states) {
    const usp_gpu_linear_case *c = l->c;
    return (usp_linear){.dtype = w->dtype,
                        .batch = c->batch,
                        .heads = c->heads,
                        .dim = c->dim,
                        .value_dim = c->value_dim,
                        .q_map = map_of(c, c->q_heads),
                        .k_map = map_of(c, c->k_heads),
                        .v_map = map_of(c, c->v_heads),
                        .scale = c->scale,
                        .log_decay = c->decay == USP_GPU_NO_DECAY ? NULL : usp_gpu_at(w, l->decay),
                        .causal = c->causal,
                        .reverse = c->reverse,
                        .shift = c->shift,
                        .transposed = c->transposed,
                        .block = usp_gpu_at(w, l->block),
                        .blocks = l->blocks,
                        .tokens = l->tokens,
                        .q = usp_gpu_tensor(w, &l->q),
                        .k = usp_gpu_tensor(w, &l->k),
                        .v = usp_gpu_tensor(w, &l->v),
                        .scratch = w->scratch,
                        .states = usp_gpu_at(w, states->at),
                        .first = l->first,
                        .last = l->last,
                        .acc = usp_gpu_at(w, l->acc.at),
                        .out = usp_gpu_tensor(w, &l->out)};
}

static int is_cut(const usp_gpu_world *w, const usp_gpu_linear *l) {
    return l->grid < USP_CUDA_GRID && w->device->ops->kind == USP_DEVICE_CUDA;
}

usp_status usp_gpu_linear_totals(const usp_gpu_world *w, const void *args) {
    const usp_gpu_linear *l = args;
    usp_linear a = linear_args(w, l, &l->states);
    if (is_cut(w, l)) return usp_cuda_linear(usp_cuda_gpu(w->device), &a, USP_CALL_TOTALS, l->grid, w->stream);
    return w->device->ops->linear_totals(w->device, &a, w->stream);
}

usp_status usp_gpu_linear_scan(const usp_gpu_world *w, const void *args) {
    const usp_gpu_linear *l = args;
    const usp_gpu_linear_case *c = l->c;
    usp_scan a = {.batch = c->batch,
                  .heads = c->heads,
                  .elements = (int64_t)c->dim * c->value_dim,
                  .log_decay = c->decay == USP_GPU_NO_DECAY ? NULL : usp_gpu_at(w, l->decay),
                  .reverse = c->reverse,
                  .step = usp_gpu_at(w, l->step),
                  .states = l->blocks,
                  .groups = l->chunks,
                  .data = usp_gpu_at(w, l->states.at),
                  .initial = l->first ? NULL : usp_gpu_at(w, l->chunk_states.at),
                  .final = l->last ? usp_gpu_at(w, l->final.at) : NULL};
    return w->device->ops->linear_scan(w->device, &a, w->stream);
}

usp_status usp_gpu_linear_output(const usp_gpu_world *w, const void *args) {
    const usp_gpu_linear *l = args;
    usp_linear a = linear_args(w, l, &l->states);
    if (is_cut(w, l)) return usp_cuda_linear(usp_cuda_gpu(w->device), &a, USP_CALL_OUTPUT, l->grid, w->stream);
    return w->device->ops->linear_output(w->device, &a, w->stream);
}

usp_status usp_gpu_linear_apply(const usp_gpu_world *w, const void *args) {
    const usp_gpu_linear *l = args;
    usp_linear a = linear_args(w, l, &l->chunk_states);
    if (is_cut(w, l)) return usp_cuda_linear(usp_cuda_gpu(w->device), &a, USP_CALL_APPLY, l->grid, w->stream);
    return w->device->ops->linear_apply(w->device, &a, w->stream);
}

/* Blocks of c->block rows, a shorter one at the end of every chunk. */
static void make_blocks(usp_gpu_test *t, usp_gpu_linear *l) {
    static usp_block block[4096];
    static usp_scan_step step[4096];
    const usp_gpu_linear_case *c = l->c;
    int begin = 0;
    for (; l->chunks < USP_GPU_CHUNKS && c->chunk[l->chunks] > 0; begin += c->chunk[l->chunks++]) {
        for (int at = 0; at < c->chunk[l->chunks]; at += c->block) {
            int left = c->chunk[l->chunks] - at, count = left < c->block ? left : c->block;
            block[l->blocks] = (usp_block){begin + at, count, l->chunks, at, c->chunk[l->chunks], 0};
            step[l->blocks++] = (usp_scan_step){count, l->chunks};
        }
    }
    l->tokens = begin;
    l->block = usp_gpu_put(t, block, sizeof *block * (size_t)l->blocks);
    l->step = usp_gpu_put(t, step, sizeof *step * (size_t)l->blocks);
}

static void make_decay(usp_gpu_test *t, usp_gpu_linear *l) {
    float decay[64];
    for (int h = 0; h < l->c->heads; h++)
        decay[h] = l->c->decay == USP_GPU_SLOW ? -0.001f * (float)(1 + 3 * h) : -0.3f * (float)(1 + h);
    l->decay = usp_gpu_put(t, decay, sizeof *decay * (size_t)l->c->heads);
}

static usp_gpu_view make_states(usp_gpu_test *t, const char *name, const usp_gpu_linear_case *c, int count) {
    usp_gpu_view v = usp_gpu_make_wide(t, name, count, c->batch, c->heads, c->dim * c->value_dim);
    v.strict = 1;
    return v;
}

usp_gpu_linear usp_gpu_make_linear(usp_gpu_test *t, const usp_gpu_linear_case *c, int grid) {
    usp_gpu_linear l = {.c = c, .grid = grid};
    make_blocks(t, &l);
    make_decay(t, &l);
    l.q = usp_gpu_make_view(t, "q", c->how, l.tokens, c->batch, c->q_heads, c->dim);
    l.k = usp_gpu_make_view(t, "k", c->how, l.tokens, c->batch, c->k_heads, c->dim);
    l.v = usp_gpu_make_view(t, "v", c->how, l.tokens, c->batch, c->v_heads, c->value_dim);
    l.out = usp_gpu_make_view(t, "out", c->how, l.tokens, c->batch, c->heads, c->value_dim);
    l.acc = usp_gpu_make_wide(t, "acc", l.tokens, c->batch, c->heads, c->value_dim);
    l.states = make_states(t, "states", c, l.blocks);
    l.chunk_states = make_states(t, "states of chunks", c, l.chunks);
    l.final = make_states(t, "final states", c, l.chunks);
    usp_gpu_fill(t, &l.q, 1);
    usp_gpu_fill(t, &l.k, 1);
    usp_gpu_fill(t, &l.v, 1);
    usp_gpu_fill(t, &l.chunk_states, 10);
    return l;
}

/* The four ways to begin and end running sums, one of which is the output's and one the sums'. */
static void check_linear_rows(usp_gpu_test *t, usp_gpu_linear *l, const char *what, usp_gpu_call call, int strict) {
    for (int way = 0; way < 4; way++) {
        l->first = way / 2, l->last = way % 2;
        l->acc.strict = strict;
        usp_gpu_run(t, what, call, l, (const usp_gpu_view *[]){l->last ? &l->out : &l->acc, NULL});
    }
}

static void check_linear(usp_gpu_test *t, const usp_gpu_linear_case *c, int grid) {
    snprintf(t->name, sizeof t->name, "linear, %s, %d thread blocks a launch", c->name, grid);
    usp_gpu_begin_case(t, c->dtype);
    usp_gpu_linear l = usp_gpu_make_linear(t, c, grid);
    usp_gpu_run(t, "linear_totals", usp_gpu_linear_totals, &l, (const usp_gpu_view *[]){&l.states, NULL});
    for (int way = 0; way < 4; way++) {
        l.first = way / 2, l.last = way % 2;
        usp_gpu_run(t, "linear_scan", usp_gpu_linear_scan, &l,
                    (const usp_gpu_view *[]){&l.states, l.last ? &l.final : NULL, NULL});
    }
    usp_gpu_fill(t, &l.states, 10);
    usp_gpu_fill(t, &l.acc, 30);
    if (c->causal) check_linear_rows(t, &l, "linear_output", usp_gpu_linear_output, 0);
    check_linear_rows(t, &l, "linear_apply", usp_gpu_linear_apply, 1);
}

/* A graph of a kernel, replayed, gives what the kernel gave. */
static void check_capture(usp_gpu_test *t) {
    usp_device *gpu = t->gpu.device;
    cudaStream_t stream = t->gpu.stream;
    cudaGraph_t graph = NULL;
    cudaGraphExec_t replay = NULL;
    int before = 1, during = 0;
    snprintf(t->name, sizeof t->name, "linear, captured");
    usp_gpu_begin_case(t, USP_BF16);
    usp_gpu_linear l = usp_gpu_make_linear(t, &linear_cases[0], USP_CUDA_GRID);
    memcpy(t->before, t->plain.base, t->used);
    usp_gpu_expect(t, usp_gpu_run_alone(t, "eager", usp_gpu_linear_totals, &l, t->after), "eager run");
    usp_gpu_expect(t, gpu->ops->copy(gpu, t->gpu.base, t->before, t->used, stream) == USP_OK, "copy");
    usp_gpu_expect(t, gpu->ops->capturing(gpu, stream, &before) == USP_OK && !before, "capturing before a capture");
    usp_gpu_expect(t, cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal) == cudaSuccess, "begin of a capture");
    usp_gpu_expect(t, usp_gpu_linear_totals(&t->gpu, &l) == USP_OK, "captured kernel");
    usp_gpu_expect(t, gpu->ops->capturing(gpu, stream, &during) == USP_OK && during, "capturing during a capture");
    usp_gpu_expect(t, cudaStreamEndCapture(stream, &graph) == cudaSuccess, "end of a capture");
    usp_gpu_expect(t, cudaGraphInstantiate(&replay, graph, 0) == cudaSuccess, "graph");
    usp_gpu_expect(t, cudaGraphLaunch(replay, stream) == cudaSuccess, "replay");
    usp_gpu_expect(t, gpu->ops->copy(gpu, t->again, t->gpu.base, t->used, stream) == USP_OK, "copy of the replay");
    usp_gpu_expect(t, usp_gpu_finish(t, "replay", USP_OK), "end of the replay");
    usp_gpu_expect(t, memcmp(t->after, t->again, t->used) == 0, "replay equals eager");
    cudaGraphExecDestroy(replay);
    cudaGraphDestroy(graph);
}

/* ---- the kind ------------------------------------------------------------------------------------------------------
 */

/* Cases of several chunks also in launches of so few thread blocks that each has a block or two. */
void usp_gpu_check_linear(usp_gpu_test *t) {
    check_capture(t);
    for (size_t i = 0; i < sizeof linear_cases / sizeof *linear_cases; i++) {
        check_linear(t, &linear_cases[i], USP_CUDA_GRID);
        if (linear_cases[i].chunk[1] > 0) check_linear(t, &linear_cases[i], 5);
    }
}
