/* gpu_time.c - the speed of the CUDA device's kernels, on the lists of work that layers would give them for one whole
 * sequence. */
#include <stdio.h>
#include <stdlib.h>

#include "../cuda/launch.h"
#include "../cuda/softmax.h"
#include "gpu_linear.h"
#include "gpu_softmax.h"

/* ---- softmax ----------------------------------------------------------------------------------------------------- */

static usp_status time_forward(const usp_gpu_world *w, const void *args) {
    usp_softmax a = usp_gpu_softmax_args(w, args, 0);
    a.lse = NULL;
    return w->device->ops->softmax_forward(w->device, &a, w->stream);
}

static usp_status time_backward(const usp_gpu_world *w, const void *args) {
    usp_status status = usp_gpu_softmax_delta(w, args);
    return status == USP_OK ? usp_gpu_softmax_backward(w, args) : status;
}

static usp_status time_queries(const usp_gpu_world *w, const void *args) {
    usp_softmax a = usp_gpu_softmax_args(w, args, 0);
    return usp_softmax_mma_backward_query(usp_cuda_gpu(w->device), &a, w->stream);
}

static usp_status time_keys(const usp_gpu_world *w, const void *args) {
    usp_softmax a = usp_gpu_softmax_args(w, args, 0);
    return usp_softmax_mma_backward_key(usp_cuda_gpu(w->device), &a, w->stream);
}

/* The tile of an item of rows at `begin`: a query sees keys up to its own, a key is seen from its own query on. */
static usp_tile plain_tile(int begin, int count, int tokens, int causal, int keys_are_rows) {
    if (!causal) return (usp_tile){0, tokens, 0, tokens};
    if (keys_are_rows) return (usp_tile){begin, tokens, begin + count - 1, tokens};
    return (usp_tile){0, begin + count, 0, begin + 1};
}

/* Items of USP_WORK_ROWS rows, heaviest first. */
static usp_gpu_plan plain_plan(usp_gpu_test *t, int tokens, int causal, int keys_are_rows) {
    int32_t works = (tokens + USP_WORK_ROWS - 1) / USP_WORK_ROWS;
    usp_work *work = calloc((size_t)works, sizeof *work);
    usp_tile *tile = calloc((size_t)works, sizeof *tile);
    if (!work || !tile) exit(1);
    for (int i = 0; i < works; i++) {
        int begin = (keys_are_rows ? i : works - 1 - i) * USP_WORK_ROWS, left = tokens - begin;
        work[i] = (usp_work){begin, left < USP_WORK_ROWS ? left : USP_WORK_ROWS, i, 1};
        tile[i] = plain_tile(begin, work[i].count, tokens, causal, keys_are_rows);
    }
    usp_gpu_plan plan = {.capacity = works};
    plan.work = usp_gpu_upload(t, work, sizeof *work * (size_t)works);
    plan.tile = usp_gpu_upload(t, tile, sizeof *tile * (size_t)works);
    usp_tile_count count = {works, !causal || works == 1};
    plan.count = usp_gpu_upload(t, &count, sizeof count);
    free(work), free(tile);
    return plan;
}

static void plain_pairs(usp_gpu_test *t, usp_gpu_softmax *s, int tokens, int causal) {
    int32_t *low = calloc((size_t)tokens, sizeof *low), *position = calloc((size_t)tokens, sizeof *position);
    size_t bytes = sizeof *position * (size_t)tokens;
    if (!low || !position) exit(1);
    for (int i = 0; i < tokens; i++) position[i] = i;
    s->query_at = s->diagonal_at = s->key_at[0] = s->high_at = usp_gpu_upload(t, position, bytes);
    s->low_at = usp_gpu_upload(t, low, bytes);
    for (int i = 0; i < tokens; i++) position[i] = tokens - 1;
    if (!causal) s->high_at = usp_gpu_upload(t, position, bytes);
    free(low), free(position);
}

static void place_softmax(usp_gpu_test *t, usp_gpu_softmax *s, int tokens, int causal) {
    const usp_gpu_softmax_case *c = s->c;
    usp_gpu_begin_case(t, USP_BF16);
    s->q = usp_gpu_timed_view(t, tokens, c->heads, c->dim, 0);
    s->dout = usp_gpu_timed_view(t, tokens, c->heads, c->dim, 0);
    s->k[0] = usp_gpu_timed_view(t, tokens, c->key_heads, c->dim, 0);
    s->v[0] = usp_gpu_timed_view(t, tokens, c->key_heads, c->dim, 0);
    usp_gpu_fill_alone(t, t->used);
    s->out = usp_gpu_timed_view(t, tokens, c->heads, c->dim, 0);
    s->dq = usp_gpu_timed_view(t, tokens, c->heads, c->dim, 0);
    s->dk[0] = usp_gpu_timed_view(t, tokens, c->key_heads, c->dim, 0);
    s->dv[0] = usp_gpu_timed_view(t, tokens, c->key_heads, c->dim, 0);
    s->top = usp_gpu_timed_view(t, tokens, c->heads, 1, 1), s->sum = usp_gpu_timed_view(t, tokens, c->heads, 1, 1);
    s->delta = usp_gpu_timed_view(t, tokens, c->heads, 1, 1);
    s->dq_sum = usp_gpu_timed_view(t, tokens, c->heads, c->dim, 1);
    s->acc = s->lse = s->peak = usp_gpu_timed_view(t, 0, c->heads, c->dim, 1);
    plain_pairs(t, s, tokens, causal);
    s->query_plan[0] = plain_plan(t, tokens, causal, 0), s->key_plan[0] = plain_plan(t, tokens, causal, 1);
}

static void time_softmax(usp_gpu_test *t, int heads, int key_heads, int dim, int tokens, int causal) {
    usp_gpu_softmax_case c = {.dtype = USP_BF16,
                              .batch = 1,
                              .heads = heads,
                              .key_heads = key_heads,
                              .group = heads / key_heads,
                              .dim = dim,
                              .value_dim = dim};
    usp_gpu_softmax s = {.c = &c, .blocks = 1};
    place_softmax(t, &s, tokens, causal);
    double area = (double)tokens * tokens / (causal ? 2 : 1), flops = 4 * area * heads * dim;
    float forward = usp_gpu_time(t, time_forward, &s), backward = usp_gpu_time(t, time_backward, &s);
    float query = usp_gpu_time(t, time_queries, &s), key = usp_gpu_time(t, time_keys, &s);
    printf("%5d:%-3d %4d %7d %7s %10.3f %10.3f %8.0f %8.0f   dq %.3f, dk dv %.3f ms\n", heads, key_heads, dim, tokens,
           causal ? "causal" : "full", forward, backward, flops / forward / 1e9, 2.5 * flops / backward / 1e9, query,
           key);
}

/* ---- folds ------------------------------------------------------------------------------------------------------- */

/* A block of keys that is not the last one: it leaves acc, or sums of dq. */
static usp_status fold(const usp_gpu_world *w, const void *args, int backward, int first) {
    usp_softmax a = usp_gpu_softmax_args(w, args, 0);
    const usp_gpu_softmax *s = args;
    a.first = first, a.last = 0;
    a.acc = usp_gpu_at(w, s->acc.at);
    return (backward ? w->device->ops->softmax_backward : w->device->ops->softmax_forward)(w->device, &a, w->stream);
}

static usp_status first_forward(const usp_gpu_world *w, const void *args) {
    return fold(w, args, 0, 1);
}

static usp_status next_forward(const usp_gpu_world *w, const void *args) {
    return fold(w, args, 0, 0);
}

static usp_status first_backward(const usp_gpu_world *w, const void *args) {
    return fold(w, args, 1, 1);
}

static usp_status next_backward(const usp_gpu_world *w, const void *args) {
    return fold(w, args, 1, 0);
}

static void print_folds(const char *pass, double flops, const usp_gpu_turns *turns) {
    const usp_gpu_spread *first = &turns->ms[0], *next = &turns->ms[1], *ratio = &turns->ratio;
    printf("%8s %7.3f (%.3f to %.3f) %5.0f %7.3f (%.3f to %.3f) %5.0f   %.3f (%.3f to %.3f)\n", pass,
           (double)first->median, (double)first->low, (double)first->high, flops / first->median / 1e9,
           (double)next->median, (double)next->low, (double)next->high, flops / next->median / 1e9,
           (double)ratio->median, (double)ratio->low, (double)ratio->high);
}

/* One more block, which reads acc or adds to sums that are there, against a first one: the ratio of their speeds. */
static void time_folds(usp_gpu_test *t, int heads, int dim, int tokens) {
    const usp_gpu_call forward[2] = {first_forward, next_forward}, backward[2] = {first_backward, next_backward};
    usp_gpu_softmax_case c = {
        .dtype = USP_BF16, .batch = 1, .heads = heads, .key_heads = heads, .group = 1, .dim = dim, .value_dim = dim};
    usp_gpu_softmax s = {.c = &c, .blocks = 1};
    double flops = 4.0 * tokens * tokens * heads * dim;
    place_softmax(t, &s, tokens, 0);
    s.acc = usp_gpu_timed_view(t, tokens, heads, dim, 1);
    printf("softmax, %d heads, d %d, %d queries, one block of as many keys folded after another, bf16\n", heads, dim,
           tokens);
    printf("    pass first block, ms      TF/s one more, ms          TF/s   speed of one more over a first block's\n");
    usp_gpu_turns turns = usp_gpu_time_by_turns(t, forward, &s);
    print_folds("forward", flops, &turns);
    if (time_forward(&t->gpu, &s) != USP_OK || usp_gpu_softmax_delta(&t->gpu, &s) != USP_OK)
        usp_gpu_fail(t, "before backward", usp_last_error());
    turns = usp_gpu_time_by_turns(t, backward, &s);
    print_folds("backward", 2.5 * flops, &turns);
}

void usp_gpu_time_softmax(usp_gpu_test *t) {
    static const struct { int heads, key_heads, dim; } shapes[] = {{16, 16, 128}, {32, 32, 64}, {32, 8, 128}};
    printf("softmax, batch 1, bf16; TFLOP/s by 4 (forward) and 10 (backward) x pairs x d\n");
    printf("    heads    d  tokens    mask forward ms backward ms fwd TF/s bwd TF/s\n");
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
        for (int way = 0; way < 4; way++)
            time_softmax(t, shapes[i].heads, shapes[i].key_heads, shapes[i].dim, way / 2 ? 16384 : 4096, way % 2 == 0);
    time_folds(t, 16, 128, 8192);
}

/* ---- linear ------------------------------------------------------------------------------------------------------ */

static usp_status linear_forward(const usp_gpu_world *w, const void *args) {
    usp_gpu_linear l = *(const usp_gpu_linear *)args;
    usp_status status = usp_gpu_linear_totals(w, &l);
    if (status == USP_OK) status = usp_gpu_linear_scan(w, &l);
    return status == USP_OK ? usp_gpu_linear_output(w, &l) : status;
}

/* The forward states stand in for those of the backward pass: dq from them, dk and dv from the scan of q dout^T. All
 * heads have one size here, so k and v may stand in for dout. */
static usp_status linear_backward(const usp_gpu_world *w, const void *args) {
    const usp_gpu_linear *l = args;
    usp_gpu_linear_case reversed = *l->c, turned = *l->c, both = *l->c;
    usp_gpu_linear a = *l;
    usp_status status;
    reversed.reverse = both.reverse = 1, turned.transposed = both.transposed = 1;
    a.c = &turned, status = usp_gpu_linear_output(w, &a);
    a.c = &reversed;
    if (status == USP_OK) status = usp_gpu_linear_totals(w, &a);
    if (status == USP_OK) status = usp_gpu_linear_scan(w, &a);
    if (status == USP_OK) status = usp_gpu_linear_output(w, &a);
    a.c = &both;
    return status == USP_OK ? usp_gpu_linear_output(w, &a) : status;
}

enum { HEADS = 16, DIM = 128 };

/* One chunk in blocks of the length that suits it. */
static void place_blocks(usp_gpu_test *t, usp_gpu_linear *l, int tokens) {
    int length = (int)t->gpu.device->ops->linear_block(t->gpu.device, tokens), blocks = (tokens + length - 1) / length;
    usp_block *block = calloc((size_t)blocks, sizeof *block);
    usp_scan_step *step = calloc((size_t)blocks, sizeof *step);
    if (!block || !step) exit(1);
    for (int i = 0; i < blocks; i++) {
        int begin = i * length, count = tokens - begin < length ? tokens - begin : length;
        block[i] = (usp_block){.begin = begin, .count = count, .distance = begin, .chunk_rows = tokens};
        step[i] = (usp_scan_step){.length = count};
    }
    l->blocks = blocks, l->chunks = 1;
    l->block = usp_gpu_upload(t, block, sizeof *block * (size_t)blocks);
    l->step = usp_gpu_upload(t, step, sizeof *step * (size_t)blocks);
    free(block), free(step);
}

static void place_linear(usp_gpu_test *t, usp_gpu_linear *l, int tokens) {
    float decay[HEADS];
    for (int h = 0; h < HEADS; h++) decay[h] = -0.001f * (float)(1 + 3 * h);
    usp_gpu_begin_case(t, USP_BF16);
    l->tokens = tokens;
    l->q = usp_gpu_timed_view(t, tokens, HEADS, DIM, 0), l->k = usp_gpu_timed_view(t, tokens, HEADS, DIM, 0);
    l->v = usp_gpu_timed_view(t, tokens, HEADS, DIM, 0);
    usp_gpu_fill_alone(t, t->used);
    l->out = usp_gpu_timed_view(t, tokens, HEADS, DIM, 0), l->acc = usp_gpu_timed_view(t, 0, HEADS, DIM, 1);
    place_blocks(t, l, tokens);
    l->states = usp_gpu_timed_view(t, l->blocks, HEADS, DIM * DIM, 1);
    l->final = usp_gpu_timed_view(t, 1, HEADS, DIM * DIM, 1);
    l->chunk_states = usp_gpu_timed_view(t, 1, HEADS, DIM * DIM, 1);
    l->decay = usp_gpu_upload(t, decay, sizeof decay);
}

static void time_linear(usp_gpu_test *t, int tokens, double bytes_per_ms) {
    usp_gpu_linear_case c = {.dtype = USP_BF16,
                             .batch = 1,
                             .heads = HEADS,
                             .q_heads = HEADS,
                             .k_heads = HEADS,
                             .v_heads = HEADS,
                             .dim = DIM,
                             .value_dim = DIM,
                             .shift = 1,
                             .causal = 1,
                             .decay = USP_GPU_SLOW,
                             .scale = 1};
    usp_gpu_linear l = {.c = &c, .first = 1, .last = 1, .grid = USP_CUDA_GRID};
    place_linear(t, &l, tokens);
    double floor = 4.0 * (double)l.q.bytes / bytes_per_ms;
    float forward = usp_gpu_time(t, linear_forward, &l), backward = usp_gpu_time(t, linear_backward, &l);
    float totals = usp_gpu_time(t, usp_gpu_linear_totals, &l), scan = usp_gpu_time(t, usp_gpu_linear_scan, &l);
    float output = usp_gpu_time(t, usp_gpu_linear_output, &l), apply = usp_gpu_time(t, usp_gpu_linear_apply, &l);
    printf("%7d %6d %10.3f %6.1f %10.3f %6.1f   totals %.3f, scan %.3f, output %.3f, apply %.3f ms\n", tokens,
           (tokens + l.blocks - 1) / l.blocks, forward, forward / floor, backward, backward / (floor * 7 / 4), totals,
           scan, output, apply);
}

void usp_gpu_time_linear(usp_gpu_test *t, double bytes_per_ms) {
    printf("linear, batch 1, 16 heads, d 128, bf16; x: times the time of moving 4 (forward) or 7 (backward) tensors\n");
    printf(" tokens  block forward ms      x backward ms     x\n");
    for (int tokens = 2048; tokens <= 65536; tokens *= tokens == 16384 ? 4 : 8) time_linear(t, tokens, bytes_per_ms);
    printf("\n");
}
