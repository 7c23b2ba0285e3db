/* check_cpu_speeds.c - how fast the CPU's kernels are, one head of 4,096 tokens under the lists of work that plans
 * make.
 */
#define _POSIX_C_SOURCE 200809L
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "cpu_kernels.h"
#include "planned.h"

enum { TOKENS = 4096, BLOCK = 64, RUNS = 7 };

/* Of this thread, in which kernels run, whatever else the machine does. */
static double seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* ---- softmax ----------------------------------------------------------------------------------------------------- */

enum { TENSORS = 8, NUMBERS = 4 };

/* Dense rows of one head, aligned. */
typedef struct head {
    usp_softmax args;
    usp_tensor tensor[TENSORS];
    float *number[NUMBERS];
    void *scratch;
} head;

static usp_tensor dense(check *c, usp_dtype dtype, int dim) {
    usp_tensor to = {.stride_token = dim};
    tensor from = usp_check_random(c, dtype, TOKENS, 1, 1, dim, 1);
    to.data = aligned_alloc(256, (size_t)TOKENS * (size_t)dim * usp_dtype_size(dtype));
    if (!to.data) exit(99);
    usp_copy copy = {TOKENS, 1, 1, dim, dtype, dtype, from.view, to, NULL, NULL, 0};
    c->device->ops->copy_rows(c->device, &copy, 1, NULL);
    usp_check_tensor_free(&from);
    return to;
}

/* The kept numbers are those of the forward that runs first. */
static head head_make(check *c, usp_dtype dtype, int dim, const usp_plan *plan) {
    head x = {.scratch = usp_check_scratch(c, USP_SOFTMAX, dtype, dim, dim)};
    usp_softmax *a = &x.args;
    for (int i = 0; i < TENSORS; i++) x.tensor[i] = dense(c, dtype, dim);
    for (int i = 0; i < NUMBERS; i++) x.number[i] = usp_check_poisoned(TOKENS);
    memset(x.number[3], 0, TOKENS * sizeof(float));
    *a = (usp_softmax){.dtype = dtype, .batch = 1, .heads = 1, .key_heads = 1, .dim = dim, .value_dim = dim};
    a->kv = (usp_head_map){1, 0}, a->scale = 0.125f, a->queries = a->keys = TOKENS, a->key_dtype = dtype;
    a->q = x.tensor[0], a->k = x.tensor[1], a->v = x.tensor[2], a->out = x.tensor[3], a->dout = x.tensor[4];
    a->dq = x.tensor[5], a->dk = x.tensor[6], a->dv = x.tensor[7], a->scratch = x.scratch;
    a->top = x.number[0], a->sum = x.number[1], a->lse = x.number[2], a->delta = x.number[3], a->first = a->last = 1;
    a->pairs = usp_plan_pairs(plan, &plan->device, 0);
    a->by_query = usp_plan_tiles(plan, &plan->device, 0, 0), a->by_key = usp_plan_tiles(plan, &plan->device, 0, 1);
    return x;
}

static void head_free(check *c, head *x) {
    for (int i = 0; i < TENSORS; i++) free(x->tensor[i].data);
    for (int i = 0; i < NUMBERS; i++) free(x->number[i]);
    usp_check_scratch_free(c, x->scratch, USP_SOFTMAX, x->args.dtype, x->args.dim, x->args.value_dim);
}

typedef usp_status (*softmax_fn)(usp_device *, const usp_softmax *, usp_stream);

/* Seconds of the fastest of a few runs. */
static double softmax_seconds(check *c, const usp_softmax *a, softmax_fn run) {
    double best = 1e9;
    for (int i = 0; i < RUNS; i++) {
        double begin = seconds();
        run(c->device, a, NULL);
        double took = seconds() - begin;
        best = took < best ? took : best;
    }
    return best;
}

static void print_softmax(check *c, usp_dtype dtype, int dim, int causal) {
    const usp_device_ops *ops = c->device->ops;
    usp_planned planned;
    usp_mask mask = causal ? USP_MASK_CAUSAL : USP_MASK_FULL;
    if (usp_planned_open(&planned, USP_DEVICE_CPU, USP_SOFTMAX, mask, TOKENS, TOKENS)) exit(99);
    head x = head_make(c, dtype, dim, planned.plan);
    double work = 2e-9 * dim * (causal ? TOKENS * (TOKENS + 1) / 2.0 : (double)TOKENS * TOKENS);
    double forward = softmax_seconds(c, &x.args, ops->softmax_forward);
    double backward = softmax_seconds(c, &x.args, ops->softmax_backward);
    printf("%-9s dtype %d d %3d %-6s forward %6.1f, backward %6.1f GFLOP/s\n", usp_cpu_panel(c->device)->name,
           (int)dtype, dim, causal ? "causal" : "full", 2 * work / forward, 7 * work / backward);
    usp_planned_close(&planned);
    head_free(c, &x);
}

/* ---- linear ------------------------------------------------------------------------------------------------------ */

/* Blocks as layers have them, one chunk. */
static void draw_blocks(usp_block *block) {
    for (int i = 0; i < TOKENS / BLOCK; i++) block[i] = (usp_block){BLOCK * i, BLOCK, 0, BLOCK * i, TOKENS, 0};
}

typedef usp_status (*linear_fn)(usp_device *, const usp_linear *, usp_stream);

static double linear_seconds(check *c, const usp_linear *a, linear_fn run) {
    double best = 1e9;
    for (int i = 0; i < RUNS; i++) {
        double begin = seconds();
        run(c->device, a, NULL);
        double took = seconds() - begin;
        best = took < best ? took : best;
    }
    return best;
}

static void print_linear(check *c, int dim) {
    const usp_device_ops *ops = c->device->ops;
    usp_block block[TOKENS / BLOCK];
    size_t states = (size_t)(TOKENS / BLOCK) * (size_t)(dim * dim);
    tensor q = usp_check_random(c, USP_F32, TOKENS, 1, 1, dim, 1),
           out = usp_check_output(c, USP_F32, TOKENS, 1, 1, dim);
    float *memory = memset(usp_check_memory(states * sizeof(float)), 0, states * sizeof(float));
    usp_linear a = {.dtype = USP_F32, .batch = 1, .heads = 1, .dim = dim, .value_dim = dim, .scale = 1, .causal = 1};
    a.q_map = a.k_map = a.v_map = (usp_head_map){1, 0}, a.block = block, a.blocks = TOKENS / BLOCK, a.tokens = TOKENS;
    a.q = a.k = a.v = q.view, a.out = out.view, a.states = memory, a.first = a.last = 1;
    a.scratch = usp_check_scratch(c, USP_LINEAR, USP_F32, dim, dim);
    draw_blocks(block);
    double totals = linear_seconds(c, &a, ops->linear_totals), output = linear_seconds(c, &a, ops->linear_output);
    printf("%-9s dtype 0 d %3d linear totals %6.1f, output %6.1f GFLOP/s\n", usp_cpu_panel(c->device)->name, dim,
           2e-9 * dim * dim * TOKENS / totals, 2e-9 * dim * (BLOCK + dim) * TOKENS / output);
    usp_check_scratch_free(c, a.scratch, USP_LINEAR, USP_F32, dim, dim);
    usp_check_tensor_free(&q), usp_check_tensor_free(&out), free(memory);
}

void usp_check_speeds(check *c) {
    for (int i = 0; i < 4; i++) print_softmax(c, USP_F32, 64 << (i & 1), i >> 1);
    print_softmax(c, USP_BF16, 64, 1);
    print_softmax(c, USP_F16, 64, 1);
    print_linear(c, 64);
    print_linear(c, 128);
}
