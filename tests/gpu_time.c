/* gpu_time.c - the speed of the CUDA device's kernels, on the lists of work that layers run: lib/schedule.c plans them.
 */
#include <stdio.h>

#include "../cuda/launch.h"
#include "gpu_linear.h"
#include "gpu_softmax.h"
#include "planned.h"

/* Lists for the GPU's kernels; 0 after saying why there are none. */
static int open_plan(usp_gpu_test *t, usp_planned *p, usp_attention attention, usp_mask mask, int64_t tokens) {
    if (usp_planned_open(p, USP_DEVICE_CUDA, attention, mask, tokens, tokens) == USP_OK) return 1;
    usp_gpu_fail(t, "lists", usp_last_error());
    usp_planned_close(p);
    return 0;
}

/* ---- softmax ----------------------------------------------------------------------------------------------------- */

static usp_status softmax_backward(const usp_gpu_world *w, const void *args) {
    usp_status status = usp_gpu_softmax_delta(w, args);
    if (status == USP_OK) status = usp_gpu_softmax_backward_query(w, args);
    return status == USP_OK ? usp_gpu_softmax_backward_key(w, args) : status;
}

static usp_gpu_plan upload_plan(usp_gpu_test *t, const usp_schedule *s, int64_t work, int64_t works, int64_t tile) {
    size_t bytes = sizeof(usp_work) * (size_t)works, tiles = sizeof(usp_tile) * (size_t)(s->tiles - tile);
    size_t at = usp_gpu_upload(t, s->work + work, bytes);
    return (usp_gpu_plan){at, usp_gpu_upload(t, s->tile + tile, tiles), (int)works};
}

static void place_softmax(usp_gpu_test *t, usp_gpu_softmax *s, const usp_schedule *plan, int tokens) {
    const usp_gpu_softmax_case *c = s->c;
    const usp_step *step = &plan->step[0];
    usp_gpu_begin_case(t, USP_BF16);
    s->q = usp_gpu_timed_view(t, tokens, c->heads, c->dim, 0),
    s->dout = usp_gpu_timed_view(t, tokens, c->heads, c->dim, 0);
    s->k[0] = usp_gpu_timed_view(t, tokens, c->key_heads, c->dim, 0);
    s->v[0] = usp_gpu_timed_view(t, tokens, c->key_heads, c->dim, 0);
    usp_gpu_fill_alone(t, t->used);
    s->out = usp_gpu_timed_view(t, tokens, c->heads, c->dim, 0),
    s->dq = usp_gpu_timed_view(t, tokens, c->heads, c->dim, 0);
    s->dk = usp_gpu_timed_view(t, tokens, c->key_heads, c->dim, 0);
    s->dv = usp_gpu_timed_view(t, tokens, c->key_heads, c->dim, 0);
    s->lse = usp_gpu_timed_view(t, tokens, c->heads, 1, 1), s->delta = usp_gpu_timed_view(t, tokens, c->heads, 1, 1);
    s->acc = s->dq_sum = s->dk_sum = s->dv_sum = usp_gpu_timed_view(t, 0, c->heads, c->dim, 1);
    s->query_plan[0] = upload_plan(t, plan, step->query_work, step->query_works, step->query_tile);
    s->key_plan[0] = upload_plan(t, plan, step->key_work, step->key_works, step->key_tile);
}

static void time_softmax(usp_gpu_test *t, int heads, int key_heads, int dim, int tokens, int causal) {
    usp_gpu_softmax_case c = {.dtype = USP_BF16,
                              .batch = 1,
                              .heads = heads,
                              .key_heads = key_heads,
                              .group = heads / key_heads,
                              .dim = dim,
                              .value_dim = dim};
    usp_gpu_softmax s = {.c = &c, .blocks = 1, .folds = 1, .grid = USP_CUDA_GRID};
    usp_planned plan;
    if (!open_plan(t, &plan, USP_SOFTMAX, causal ? USP_MASK_CAUSAL : USP_MASK_FULL, tokens)) return;
    place_softmax(t, &s, plan.schedule, tokens);
    double area = (double)tokens * tokens / (causal ? 2 : 1), flops = 4 * area * heads * dim;
    float forward = usp_gpu_time(t, usp_gpu_softmax_forward, &s), backward = usp_gpu_time(t, softmax_backward, &s);
    float query = usp_gpu_time(t, usp_gpu_softmax_backward_query, &s);
    float key = usp_gpu_time(t, usp_gpu_softmax_backward_key, &s);
    printf("%5d:%-3d %4d %7d %7s %10.3f %10.3f %8.0f %8.0f   dq %.3f, dk dv %.3f ms\n", heads, key_heads, dim, tokens,
           causal ? "causal" : "full", forward, backward, flops / forward / 1e9, 2.5 * flops / backward / 1e9, query,
           key);
    usp_planned_close(&plan);
}

void usp_gpu_time_softmax(usp_gpu_test *t) {
    static const struct { int heads, key_heads, dim; } shapes[] = {{16, 16, 128}, {32, 32, 64}, {32, 8, 128}};
    printf("softmax, batch 1, bf16; TFLOP/s by 4 (forward) and 10 (backward) x pairs x d\n");
    printf("    heads    d  tokens    mask forward ms backward ms fwd TF/s bwd TF/s\n");
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
        for (int way = 0; way < 4; way++)
            time_softmax(t, shapes[i].heads, shapes[i].key_heads, shapes[i].dim, way / 2 ? 16384 : 4096, way % 2 == 0);
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

static void place_linear(usp_gpu_test *t, usp_gpu_linear *l, const usp_schedule *plan, int tokens) {
    float decay[HEADS];
    for (int h = 0; h < HEADS; h++) decay[h] = -0.001f * (float)(1 + 3 * h);
    usp_gpu_begin_case(t, USP_BF16);
    l->tokens = tokens, l->blocks = (int)plan->blocks, l->chunks = (int)plan->own_chunks;
    l->q = usp_gpu_timed_view(t, tokens, HEADS, DIM, 0), l->k = usp_gpu_timed_view(t, tokens, HEADS, DIM, 0);
    l->v = usp_gpu_timed_view(t, tokens, HEADS, DIM, 0);
    usp_gpu_fill_alone(t, t->used);
    l->out = usp_gpu_timed_view(t, tokens, HEADS, DIM, 0), l->acc = usp_gpu_timed_view(t, 0, HEADS, DIM, 1);
    l->states = usp_gpu_timed_view(t, l->blocks, HEADS, DIM * DIM, 1);
    l->final = usp_gpu_timed_view(t, 1, HEADS, DIM * DIM, 1);
    l->chunk_states = usp_gpu_timed_view(t, 1, HEADS, DIM * DIM, 1);
    l->decay = usp_gpu_upload(t, decay, sizeof decay);
    l->block = usp_gpu_upload(t, plan->block, sizeof *plan->block * (size_t)plan->blocks);
    l->step = usp_gpu_upload(t, plan->block_step, sizeof *plan->block_step * (size_t)plan->blocks);
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
    usp_planned plan;
    if (!open_plan(t, &plan, USP_LINEAR, USP_MASK_CAUSAL, tokens)) return;
    place_linear(t, &l, plan.schedule, tokens);
    double floor = 4.0 * (double)l.q.bytes / bytes_per_ms;
    float forward = usp_gpu_time(t, linear_forward, &l), backward = usp_gpu_time(t, linear_backward, &l);
    float totals = usp_gpu_time(t, usp_gpu_linear_totals, &l), scan = usp_gpu_time(t, usp_gpu_linear_scan, &l);
    float output = usp_gpu_time(t, usp_gpu_linear_output, &l), apply = usp_gpu_time(t, usp_gpu_linear_apply, &l);
    printf("%7d %6d %10.3f %6.1f %10.3f %6.1f   totals %.3f, scan %.3f, output %.3f, apply %.3f ms\n", tokens,
           plan.schedule->block[0].count, forward, forward / floor, backward, backward / (floor * 7 / 4), totals, scan,
           output, apply);
    usp_planned_close(&plan);
}

void usp_gpu_time_linear(usp_gpu_test *t, double bytes_per_ms) {
    printf("linear, batch 1, 16 heads, d 128, bf16; x: times the time of moving 4 (forward) or 7 (backward) tensors\n");
    printf(" tokens  block forward ms      x backward ms     x\n");
    for (int tokens = 2048; tokens <= 65536; tokens *= tokens == 16384 ? 4 : 8) time_linear(t, tokens, bytes_per_ms);
    printf("\n");
}
