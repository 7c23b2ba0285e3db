/* check_cpu_linear.c - linear attention of the CPU against plain loops: totals, outputs and applied states, in both
 * directions, of one document or of many, and what a NaN reaches. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cpu_kernels.h"

/* ---- problems ---------------------------------------------------------------------------------------------------- */

enum { BLOCKS = 12 };

typedef struct linear {
    usp_linear args;
    tensor q, k, v, out;
    usp_block block[BLOCKS];
    int chunks;
    int32_t *begins, *ends;
    float *states, *acc, *log_decay;
    double *truth; /* of states */
} linear;

/* Chunks one after the other, each cut into blocks of any lengths, a few of them empty. */
static void draw_blocks(check *c, linear *l, int tokens) {
    int begin = 0, first = 0, distance = 0;
    for (int i = 0; i < BLOCKS; i++) {
        int part = usp_check_pick(c, 4) * usp_check_pick(c, (tokens - begin) / 3 + 1);
        int count = i + 1 == BLOCKS || part > tokens - begin ? tokens - begin : part;
        l->block[i] = (usp_block){begin, count, l->chunks, distance, 0, 0};
        begin += count, distance += count;
        if (i + 1 < BLOCKS && usp_check_pick(c, 3)) continue;
        for (; first <= i; first++) l->block[first].chunk_rows = distance;
        l->chunks++, distance = 0;
    }
}

/* Documents of the rows [begin, end) of a chunk; the first may have begun before it, the last may go on. */
static void draw_documents(check *c, linear *l, int begin, int end) {
    int longest = 1 + usp_check_pick(c, 60);
    for (int first = begin, next; first < end; first = next) {
        next = first + 1 + usp_check_pick(c, longest);
        next = next < end ? next : end;
        int32_t begins = first == begin && usp_check_pick(c, 2) ? begin - 1 : first;
        int32_t ends = next == end && usp_check_pick(c, 2) ? end : next - 1;
        for (int i = first; i < next; i++) l->begins[i] = begins, l->ends[i] = ends;
    }
}

static void draw_tables(check *c, linear *l) {
    size_t tokens = (size_t)l->args.tokens;
    l->begins = usp_check_memory(tokens * sizeof(int32_t)), l->ends = usp_check_memory(tokens * sizeof(int32_t));
    for (const usp_block *b = l->block; b < l->block + BLOCKS; b++)
        if (!b->distance) draw_documents(c, l, b->begin, b->begin + b->chunk_rows);
    l->log_decay = usp_check_memory((size_t)l->args.heads * sizeof(float));
    for (int h = 0; h < l->args.heads; h++)
        l->log_decay[h] = usp_check_pick(c, 4) ? -(float)pow(10, -3 * fabs(usp_check_uniform(c))) : 0;
    l->args.log_decay = usp_check_pick(c, 4) ? l->log_decay : NULL;
}

static size_t state_size(const linear *l) {
    return (size_t)l->args.dim * (size_t)l->args.value_dim;
}

static size_t states_size(const linear *l) {
    return (size_t)(BLOCKS * l->args.batch * l->args.heads) * state_size(l);
}

static void make_tensors(check *c, linear *l) {
    const usp_linear *a = &l->args;
    int tokens = (int)a->tokens, last = a->heads - 1;
    l->q = usp_check_random(c, a->dtype, tokens, a->batch, usp_cpu_head(a->q_map, last) + 1, a->dim, 1);
    l->k = usp_check_random(c, a->dtype, tokens, a->batch, usp_cpu_head(a->k_map, last) + 1, a->dim, 1);
    l->v = usp_check_random(c, a->dtype, tokens, a->batch, usp_cpu_head(a->v_map, last) + 1, a->value_dim, 1);
    l->out = usp_check_output(c, a->dtype, tokens, a->batch, a->heads, a->value_dim);
    l->acc = usp_check_poisoned(usp_check_count(&l->out)), l->states = usp_check_poisoned(states_size(l));
    l->truth = usp_check_memory(states_size(l) * sizeof(double));
}

static usp_head_map map_draw(check *c) {
    int group = 1 + usp_check_pick(c, 3);
    return (usp_head_map){group, usp_check_pick(c, group)};
}

static linear linear_make(check *c, usp_dtype dtype, int dim, int value_dim, int tokens) {
    linear l = {.args = {.dtype = dtype, .dim = dim, .value_dim = value_dim, .tokens = tokens, .causal = 1}};
    usp_linear *a = &l.args;
    a->batch = 1 + usp_check_pick(c, 2), a->heads = 1 + usp_check_pick(c, 4);
    a->scale = 0.5f + (float)usp_check_pick(c, 2);
    a->q_map = map_draw(c), a->k_map = map_draw(c), a->v_map = map_draw(c);
    a->reverse = usp_check_pick(c, 2), a->shift = usp_check_pick(c, 2), a->transposed = usp_check_pick(c, 2);
    a->blocks = BLOCKS;
    draw_blocks(c, &l, tokens);
    draw_tables(c, &l);
    make_tensors(c, &l);
    a->scratch = usp_check_scratch(c, USP_LINEAR, dtype, dim, value_dim);
    a->q = l.q.view, a->k = l.k.view, a->v = l.v.view, a->out = l.out.view, a->states = l.states, a->acc = l.acc;
    if (usp_check_pick(c, 3)) a->begins = l.begins, a->ends = l.ends;
    return l;
}

static void linear_free(check *c, linear *l) {
    tensor *tensors[] = {&l->q, &l->k, &l->v, &l->out};
    void *plain[] = {l->states, l->acc, l->log_decay, l->truth, l->begins, l->ends};
    for (size_t i = 0; i < sizeof tensors / sizeof *tensors; i++) usp_check_tensor_free(tensors[i]);
    for (size_t i = 0; i < sizeof plain / sizeof *plain; i++) free(plain[i]);
    usp_check_scratch_free(c, l->args.scratch, USP_LINEAR, l->args.dtype, l->args.dim, l->args.value_dim);
}

/* ---- reference --------------------------------------------------------------------------------------------------- */

static double decay(const linear *l, int h, int64_t n) {
    return l->args.log_decay ? exp((double)l->log_decay[h] * (double)n) : 1;
}

static const double *mapped(const tensor *t, usp_head_map map, int token, int b, int h) {
    return usp_check_truth(t, token, b, usp_cpu_head(map, h));
}

static double *state_truth(const linear *l, int index, int b, int h) {
    return l->truth + (size_t)((index * l->args.batch + b) * l->args.heads + h) * state_size(l);
}

static size_t state_element(const linear *l, int i, int e) {
    return (size_t)(l->args.transposed ? e * l->args.dim + i : i * l->args.value_dim + e);
}

/* Does the row's document go on behind the rows up to `end` - 1 (reverse: begin before `begin`)? */
static int goes_on(const linear *l, int row, int begin, int end) {
    if (!l->args.begins) return 1;
    return l->args.reverse ? l->begins[row] <= begin : l->ends[row] >= end - 1;
}

/* Is a state from before the rows from `begin` on (reverse: from behind those up to `end` - 1) one of the row's? */
static int comes_from(const linear *l, int row, int begin, int end) {
    if (!l->args.begins) return 1;
    return l->args.reverse ? l->ends[row] >= end : l->begins[row] < begin;
}

static void reference_totals(linear *l, int index, int b, int h) {
    const usp_linear *a = &l->args;
    int begin = l->block[index].begin, end = begin + l->block[index].count;
    double *state = state_truth(l, index, b, h);
    memset(state, 0, state_size(l) * sizeof *state);
    for (int j = begin; j < end; j++) {
        if (!goes_on(l, j, begin, end)) continue;
        double weight = decay(l, h, (a->reverse ? j - begin : end - 1 - j) + a->shift);
        const double *k = mapped(&l->k, a->k_map, j, b, h), *v = mapped(&l->v, a->v_map, j, b, h);
        for (int i = 0; i < a->dim; i++)
            for (int e = 0; e < a->value_dim; e++) state[state_element(l, i, e)] += weight * k[i] * v[e];
    }
}

/* A row of the result, and the block that it is in. */
typedef struct row {
    const linear *l;
    const usp_block *block;
    int token, b, h;
    double *sum;
} row;

/* += scale * weight * q_i^T state. */
static void add_state(const row *r, int index, double weight) {
    const linear *l = r->l;
    const double *q = mapped(&l->q, l->args.q_map, r->token, r->b, r->h), *state = state_truth(l, index, r->b, r->h);
    for (int i = 0; i < l->args.dim; i++)
        for (int e = 0; e < l->args.value_dim; e++)
            r->sum[e] += (double)l->args.scale * weight * q[i] * state[state_element(l, i, e)];
}

static void reference_output(const row *r) {
    const linear *l = r->l;
    const usp_linear *a = &l->args;
    int begin = r->block->begin, end = begin + r->block->count,
        before = a->reverse ? end - 1 - r->token : r->token - begin;
    for (int j = a->reverse ? r->token : begin; j < (a->reverse ? end : r->token + 1); j++) {
        if (a->begins && (j < l->begins[r->token] || j > l->ends[r->token])) continue;
        double qk = usp_check_dot(mapped(&l->q, a->q_map, r->token, r->b, r->h), mapped(&l->k, a->k_map, j, r->b, r->h),
                                  a->dim);
        double weight = (double)a->scale * decay(l, r->h, abs(r->token - j)) * qk;
        for (int e = 0; e < a->value_dim; e++) r->sum[e] += weight * mapped(&l->v, a->v_map, j, r->b, r->h)[e];
    }
    if (comes_from(l, r->token, begin, end))
        add_state(r, (int)(r->block - l->block), decay(l, r->h, before + a->shift));
}

static void reference_apply(const row *r) {
    const linear *l = r->l;
    int first = r->block->begin - r->block->distance, end = first + r->block->chunk_rows;
    int before = l->args.reverse ? end - 1 - r->token : r->token - first;
    double weight = l->args.causal ? decay(l, r->h, before + l->args.shift) : 1;
    if (comes_from(l, r->token, first, end)) add_state(r, r->block->chunk, weight);
}

/* ---- checks ------------------------------------------------------------------------------------------------------ */

static void check_totals(check *c, linear *l) {
    const usp_linear *a = &l->args;
    for (int n = 0; n < BLOCKS * a->batch * a->heads; n++)
        reference_totals(l, n / (a->batch * a->heads), n / a->heads % a->batch, n % a->heads);
    memset(l->states, 255, states_size(l) * sizeof(float));
    c->device->ops->linear_totals(c->device, a, NULL);
    usp_check_floats(c, l->states, l->truth, states_size(l), "totals");
}

typedef void (*output_fn)(const row *);

static void run_reference(linear *l, output_fn reference) {
    for (const usp_block *block = l->block; block < l->block + BLOCKS; block++)
        for (int n = 0; n < block->count * l->args.batch * l->args.heads; n++) {
            row r = {.l = l, .block = block, .h = n % l->args.heads, .b = n / l->args.heads % l->args.batch};
            r.token = block->begin + n / l->args.heads / l->args.batch;
            r.sum = usp_check_truth(&l->out, r.token, r.b, r.h);
            reference(&r);
        }
}

/* Runs an entry on random states, and on a random running sum unless `first`, into the result or the running sum. */
static void check_output(check *c, linear *l, int apply, int first, int last) {
    const usp_device_ops *ops = c->device->ops;
    for (size_t i = 0; i < states_size(l); i++)
        l->states[i] = (float)usp_check_uniform(c), l->truth[i] = (double)l->states[i];
    for (size_t i = 0; i < usp_check_count(&l->out); i++) {
        l->acc[i] = first ? NAN : (float)usp_check_uniform(c);
        l->out.truth[i] = first ? 0 : (double)l->acc[i];
    }
    run_reference(l, apply ? reference_apply : reference_output);
    l->args.first = first, l->args.last = last;
    (apply ? ops->linear_apply : ops->linear_output)(c->device, &l->args, NULL);
    if (last)
        usp_check_compare(c, &l->out, apply ? "apply" : "output");
    else
        usp_check_floats(c, l->acc, l->out.truth, usp_check_count(&l->out), apply ? "apply to acc" : "output to acc");
}

/* One NaN in one input: the references' loops carry it to what depends on it. */
static void poison_input(check *c, const linear *l) {
    const tensor *inputs[] = {&l->q, &l->k, &l->v}, *t = inputs[usp_check_pick(c, 3)];
    if (t->tokens)
        usp_check_write(t, usp_check_pick(c, t->tokens), usp_check_pick(c, t->batch), usp_check_pick(c, t->heads),
                        usp_check_pick(c, t->dim), (double)NAN);
}

void usp_check_linear(check *c, usp_dtype dtype, int dim, int value_dim, int tokens, int poison) {
    linear l = linear_make(c, dtype, dim, value_dim, tokens);
    int wrong = c->failures;
    l.args.block = l.block;
    if (poison) poison_input(c, &l);
    check_totals(c, &l);
    for (int i = 0; i < 4; i++) check_output(c, &l, 0, i & 1, i >> 1);
    for (int i = 0; i < 4; i++) check_output(c, &l, 1, i & 1, i >> 1);
    if (c->failures > wrong)
        fprintf(stderr, "    linear, dims %d, %d, %d tokens, reverse %d, documents %d, NaN %d\n", dim, value_dim,
                tokens, l.args.reverse, l.args.begins != NULL, poison);
    l.args.causal = 0, l.args.begins = l.args.ends = NULL;
    check_output(c, &l, 1, 1, 1);
    linear_free(c, &l);
}
