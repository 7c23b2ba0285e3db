/* gpu_linear.c - linear attention on the CUDA device against the CPU's: blocks, chunks, directions, heads, dims. One
 * kernel also goes through a captured graph. Blocks are of every length, which layers choose by the length of a run. */
#include <cuda_runtime_api.h>
#include <math.h>
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

/* The rows of documents, again and again, over all chunks. */
enum { LENGTHS = 4 };
typedef struct document_case {
    int document[LENGTHS];
    usp_gpu_linear_case c;
} document_case;

static const document_case document_cases[] = {
    {{90, 37}, {"documents", USP_BF16, BSHD, 2, 2, 2, 2, 2, 0, 128, 128, {700, 300}, 256, 0, 1, 0, 1, USP_GPU_SLOW, 1}},
    {{37, 1, 290},
     {"reverse", USP_BF16, BSHD, 1, 2, 2, 2, 2, 0, 128, 128, {333, 190, 64}, 128, 1, 0, 0, 1, USP_GPU_SLOW, 0.5f}},
    {{64, 128},
     {"transposed", USP_F16, PACKED, 1, 2, 2, 2, 2, 0, 64, 128, {257, 255}, 192, 1, 1, 1, 1, USP_GPU_FAST, 1}},
    {{128},
     {"whole blocks", USP_F16, BHSD, 1, 2, 2, 2, 2, 0, 128, 64, {512, 128}, 128, 0, 1, 0, 1, USP_GPU_NO_DECAY, 1}},
    {{1}, {"one row each", USP_BF16, BSHD, 1, 3, 6, 2, 3, 3, 64, 64, {200}, 128, 0, 1, 0, 1, USP_GPU_SLOW, 1}},
    {{450, 3}, {"long", USP_BF16, BSHD, 1, 1, 1, 1, 1, 0, 64, 64, {600, 500}, 64, 1, 1, 0, 1, USP_GPU_SLOW, 1}},
    {{21, 2}, {"d 5, e 17", USP_F32, ODD, 2, 2, 2, 2, 2, 0, 5, 17, {100, 31}, 64, 0, 1, 0, 1, USP_GPU_SLOW, 1}},
    {{40, 16, 8}, {"d 17, e 70", USP_BF16, BSHD, 1, 2, 2, 2, 2, 0, 17, 70, {131, 60}, 64, 1, 0, 1, 1, USP_GPU_FAST, 1}},
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
                        .begins = l->document ? usp_gpu_at(w, l->begins) : NULL,
                        .ends = l->document ? usp_gpu_at(w, l->ends) : NULL,
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

/* ---- linear: blocks and documents -------------------------------------------------------------------------------- */

/* The document of a row, counted from 0; its first row and the one behind it. */
static int document_of(const usp_gpu_linear *l, int row, int *begin, int *end) {
    int document = 0;
    *begin = 0, *end = l->document ? l->document[0] : (int)l->tokens;
    for (int i = 0; row >= *end; document++) {
        i = l->document[i + 1] > 0 ? i + 1 : 0;
        *begin = *end, *end += l->document[i];
    }
    if (*end > l->tokens) *end = (int)l->tokens;
    return document;
}

/* The chunks follow one another. The first document began before them all, and the last one goes on behind them. */
static void make_documents(usp_gpu_test *t, usp_gpu_linear *l) {
    static int32_t begins[8192], ends[8192];
    for (int chunk = 0, row = 0, first = 0; chunk < l->chunks; first = row, chunk++) {
        for (int behind = first + l->c->chunk[chunk], begin, end; row < behind; row++) {
            document_of(l, row, &begin, &end);
            begins[row] = begin < first || begin == 0 ? first - 1 : begin;
            ends[row] = end > behind || end == l->tokens ? behind : end - 1;
        }
    }
    l->begins = usp_gpu_put(t, begins, sizeof *begins * (size_t)l->tokens);
    l->ends = usp_gpu_put(t, ends, sizeof *ends * (size_t)l->tokens);
}

static usp_scan_step step_of(const usp_gpu_linear *l, const usp_block *block) {
    usp_scan_step step = {block->count, block->chunk, 0, 0};
    for (int row = block->begin, begin, end; row < block->begin + block->count; row++) {
        document_of(l, row, &begin, &end);
        if (row == begin && row > 0) step.begins = 1;
        if (row + 1 == end && end < l->tokens) step.ends = 1;
    }
    return step;
}

/* Blocks of c->block rows, a shorter one at the end of every chunk. */
static void make_blocks(usp_gpu_test *t, usp_gpu_linear *l) {
    static usp_block block[4096];
    static usp_scan_step step[4096];
    const usp_gpu_linear_case *c = l->c;
    for (; l->chunks < USP_GPU_CHUNKS && c->chunk[l->chunks] > 0; l->tokens += c->chunk[l->chunks++]) {
        for (int at = 0; at < c->chunk[l->chunks]; at += c->block) {
            int left = c->chunk[l->chunks] - at, count = left < c->block ? left : c->block;
            block[l->blocks++] = (usp_block){(int)l->tokens + at, count, l->chunks, at, c->chunk[l->chunks], 0};
        }
    }
    for (int i = 0; i < l->blocks; i++) step[i] = step_of(l, &block[i]);
    l->block = usp_gpu_put(t, block, sizeof *block * (size_t)l->blocks);
    l->step = usp_gpu_put(t, step, sizeof *step * (size_t)l->blocks);
    make_documents(t, l);
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

static usp_gpu_linear make_linear(usp_gpu_test *t, const usp_gpu_linear_case *c, const int *document, int grid) {
    usp_gpu_linear l = {.c = c, .document = document, .grid = grid};
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

usp_gpu_linear usp_gpu_make_linear(usp_gpu_test *t, const usp_gpu_linear_case *c, int grid) {
    return make_linear(t, c, NULL, grid);
}

/* The four ways to begin and end running sums, one of which is the output's and one the sums'. */
static void check_linear_rows(usp_gpu_test *t, usp_gpu_linear *l, const char *what, usp_gpu_call call, int strict) {
    for (int way = 0; way < 4; way++) {
        l->first = way / 2, l->last = way % 2;
        l->acc.strict = strict;
        usp_gpu_run(t, what, call, l, (const usp_gpu_view *[]){l->last ? &l->out : &l->acc, NULL});
    }
}

static void check_linear(usp_gpu_test *t, const usp_gpu_linear_case *c, const int *document, int grid) {
    snprintf(t->name, sizeof t->name, "linear, %s%s, %d thread blocks a launch", c->name,
             document ? ", many documents" : "", grid);
    usp_gpu_begin_case(t, c->dtype);
    usp_gpu_linear l = make_linear(t, c, document, grid);
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

/* ---- linear: poison ---------------------------------------------------------------------------------------------- */

/* Totals, states before blocks and the output as sums; then, on top of them, what the states before chunks give. */
static usp_status run_all(const usp_gpu_world *w, const void *args) {
    usp_gpu_linear l = *(const usp_gpu_linear *)args;
    l.first = 1, l.last = 0;
    usp_status status = usp_gpu_linear_totals(w, &l);
    if (status == USP_OK) status = usp_gpu_linear_scan(w, &l);
    if (status == USP_OK) status = usp_gpu_linear_output(w, &l);
    l.first = 0, l.last = 1;
    return status == USP_OK ? usp_gpu_linear_apply(w, &l) : status;
}

static int is_poisoned(const usp_gpu_linear *l, int row) {
    int begin, end;
    return document_of(l, row, &begin, &end) % 2;
}

/* All rows of every other document. */
static void poison_documents(usp_gpu_test *t, const usp_gpu_linear *l, const usp_gpu_view *v) {
    int64_t row = usp_gpu_count(v) / v->tokens;
    for (int64_t i = 0; i < usp_gpu_count(v); i++)
        if (is_poisoned(l, (int)(i / row))) usp_gpu_set(t, v, t->before, i, i % 3 ? NAN : INFINITY);
}

/* Counts elements of healthy rows that changed; `row`: the row of the tensors to which row i of the view belongs. */
static int count_changes(const usp_gpu_test *t, const usp_gpu_linear *l, const usp_gpu_view *v, const int *row) {
    int64_t size = usp_gpu_count(v) / v->tokens;
    int changes = 0;
    for (int64_t i = 0; i < usp_gpu_count(v); i++) {
        float clean = usp_gpu_get(t, v, t->after, i), now = usp_gpu_get(t, v, t->again, i);
        int at = row ? row[i / size] : (int)(i / size);
        changes += (at < 0 || !is_poisoned(l, at)) && (!isfinite(clean) || memcmp(&clean, &now, sizeof now) != 0);
    }
    return changes;
}

/* The row before each block in time, or -1 where no row of the chunk is. */
static void rows_before(const usp_gpu_linear *l, int *row) {
    const int *chunk = l->c->chunk, size = l->c->block;
    for (int c = 0, begin = 0; c < l->chunks; begin += chunk[c++]) {
        for (int at = 0; at < chunk[c]; at += size, row++)
            *row = l->c->reverse ? (at + size < chunk[c] ? begin + at + size : -1) : at > 0 ? begin + at - 1 : -1;
    }
}

/* Documents that hold nothing finite leave no trace in others. */
static void check_poisoned_documents(usp_gpu_test *t, const document_case *d) {
    int before[4096];
    snprintf(t->name, sizeof t->name, "linear, %s, every other document poisoned", d->c.name);
    usp_gpu_begin_case(t, d->c.dtype);
    usp_gpu_linear l = make_linear(t, &d->c, d->document, USP_CUDA_GRID);
    memcpy(t->before, t->plain.base, t->used);
    if (!usp_gpu_run_alone(t, "clean", run_all, &l, t->after)) return;
    poison_documents(t, &l, &l.q);
    poison_documents(t, &l, &l.k);
    poison_documents(t, &l, &l.v);
    if (!usp_gpu_run_alone(t, "poisoned", run_all, &l, t->again)) return;
    rows_before(&l, before);
    usp_gpu_expect(t, count_changes(t, &l, &l.acc, NULL) == 0, "sums of healthy documents");
    usp_gpu_expect(t, count_changes(t, &l, &l.out, NULL) == 0, "output of healthy documents");
    usp_gpu_expect(t, count_changes(t, &l, &l.states, before) == 0, "states of healthy documents");
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
static void check_grids(usp_gpu_test *t, const usp_gpu_linear_case *c, const int *document) {
    check_linear(t, c, document, USP_CUDA_GRID);
    if (c->chunk[1] > 0) check_linear(t, c, document, 5);
}

void usp_gpu_check_linear(usp_gpu_test *t) {
    check_capture(t);
    for (size_t i = 0; i < sizeof linear_cases / sizeof *linear_cases; i++) check_grids(t, &linear_cases[i], NULL);
    for (size_t i = 0; i < sizeof document_cases / sizeof *document_cases; i++) {
        check_grids(t, &document_cases[i].c, document_cases[i].document);
        check_poisoned_documents(t, &document_cases[i]);
    }
}
