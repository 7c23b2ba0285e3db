/* masked.c - see masked.h. How a layer is called on own tokens is shown by 02_ring_of_threads.c and 03_processes.c. */
#include "masked.h"

#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

enum { RANKS_MAX = 16, TENSORS = 8 };

/* ---- ranks ------------------------------------------------------------------------------------------------------- */

typedef struct thread_of_rank {
    masked_rank me;
    usp_rendezvous *rendezvous;
    void (*body)(masked_rank *me);
} thread_of_rank;

static void *run_rank(void *argument) {
    thread_of_rank *thread = argument;
    usp_world_config on_cpu = {.struct_size = sizeof on_cpu, .device = USP_DEVICE_CPU};
    must(usp_world_create_threads(&on_cpu, thread->rendezvous, thread->me.rank, &thread->me.world));
    thread->body(&thread->me);
    usp_world_destroy(thread->me.world);
    return NULL;
}

int run_ranks(int ranks, void (*body)(masked_rank *me), void *all) {
    pthread_t id[RANKS_MAX];
    thread_of_rank thread[RANKS_MAX];
    usp_rendezvous *rendezvous;
    int failures = 0;
    must(usp_rendezvous_create(ranks, &rendezvous));
    for (int rank = 0; rank < ranks; rank++) {
        thread[rank] = (thread_of_rank){{.rank = rank, .ranks = ranks, .all = all}, rendezvous, body};
        if (pthread_create(&id[rank], NULL, run_rank, &thread[rank]) != 0) must(USP_NO_MEMORY);
    }
    for (int rank = 0; rank < ranks; rank++) {
        pthread_join(id[rank], NULL);
        failures += thread[rank].me.failures;
    }
    usp_rendezvous_destroy(rendezvous);
    return failures;
}

/* ---- a layer on whole tensors ------------------------------------------------------------------------------------ */

/* Own tokens in memory of the device. */
typedef struct placed {
    usp_world *world;
    const usp_sequence *sequence;
    size_t token_bytes, bytes;
} placed;

static void *device_memory(const placed *p, size_t bytes) {
    void *memory;
    must(usp_world_alloc(p->world, bytes, &memory));
    return memory;
}

static void scatter(const placed *p, const float *whole, void *device) {
    void *local = must_allocate(p->bytes);
    must(usp_sequence_scatter(p->sequence, 1, p->token_bytes, whole, local));
    must(usp_world_copy(p->world, device, local, p->bytes, NULL));
    must(usp_world_synchronize(p->world, NULL));
    free(local);
}

static void gather(const placed *p, const void *device, float *whole) {
    void *local = must_allocate(p->bytes);
    must(usp_world_copy(p->world, local, device, p->bytes, NULL));
    must(usp_world_synchronize(p->world, NULL));
    must(usp_sequence_gather(p->sequence, 1, p->token_bytes, local, whole));
    free(local);
}

/* t: q, k, v, dout, out, dq, dk, dv. */
static void run_passes(const placed *p, usp_layer *layer, const usp_tensor t[TENSORS]) {
    usp_sizes sizes = {.struct_size = sizeof sizes};
    must(usp_layer_get_sizes(layer, &sizes));
    void *workspace = device_memory(p, sizes.forward_workspace + sizes.backward_workspace);
    void *saved = device_memory(p, sizes.saved);
    usp_forward forward = {.struct_size = sizeof forward, .q = t[0], .k = t[1], .v = t[2], .out = t[4], .saved = saved};
    usp_backward backward = {.struct_size = sizeof backward,
                             .q = t[0],
                             .k = t[1],
                             .v = t[2],
                             .dout = t[3],
                             .out = t[4],
                             .dq = t[5],
                             .dk = t[6],
                             .dv = t[7],
                             .saved = saved};
    must(usp_layer_forward(layer, &forward, workspace, sizes.forward_workspace, NULL));
    must(usp_layer_backward(layer, &backward, workspace, sizes.backward_workspace, NULL));
    must(usp_world_synchronize(p->world, NULL));
    usp_world_free(p->world, saved);
    usp_world_free(p->world, workspace);
}

void run_layer(usp_world *world, const usp_sequence *sequence, usp_layer *layer, const example_shape *shape,
               const masked_pass *pass) {
    const float *given[] = {pass->q, pass->k, pass->v, pass->dout};
    float *result[] = {pass->out, pass->dq, pass->dk, pass->dv};
    int64_t local = usp_sequence_own_tokens(sequence);
    size_t token_bytes = (size_t)shape->heads * (size_t)shape->dim * sizeof(float);
    placed p = {world, sequence, token_bytes, (size_t)local * token_bytes};
    usp_tensor tensor[TENSORS];
    for (int i = 0; i < TENSORS; i++) tensor[i] = dense(device_memory(&p, p.bytes), local, shape->heads, shape->dim);
    for (int i = 0; i < 4; i++) scatter(&p, given[i], tensor[i].data);
    run_passes(&p, layer, tensor);
    for (int i = 0; i < 4; i++) gather(&p, tensor[4 + i].data, result[i]);
    for (int i = 0; i < TENSORS; i++) usp_world_free(world, tensor[i].data);
}

/* ---- the definition ---------------------------------------------------------------------------------------------- */

static double dot(const float *a, const float *b, int dim) {
    double sum = 0;
    for (int i = 0; i < dim; i++) sum += (double)a[i] * b[i];
    return sum;
}

static void add_scaled(float *to, double scale, const float *from, int dim) {
    for (int i = 0; i < dim; i++) to[i] += (float)(scale * from[i]);
}

static size_t at(const example_shape *s, int t, int h) {
    return ((size_t)t * (size_t)s->heads + (size_t)h) * (size_t)s->dim;
}

/* weight[j] of every key, 0 of those that query t does not see. */
static void weigh(const example_shape *s, masked_sees sees, const void *mask, const masked_pass *p, int t, int h,
                  double *weight) {
    double sum = 0;
    for (int j = 0; j < s->tokens; j++) {
        weight[j] = sees(mask, t, j) ? exp(dot(p->q + at(s, t, h), p->k + at(s, j, h), s->dim) / sqrt(s->dim)) : 0;
        sum += weight[j];
    }
    for (int j = 0; j < s->tokens; j++) weight[j] = sum > 0 ? weight[j] / sum : 0;
}

/* One query's part of all results: dS = P (dP - sum P dP). */
static void add_query(const example_shape *s, const masked_pass *p, int t, int h, const double *weight) {
    size_t query = at(s, t, h);
    double mean = 0;
    for (int j = 0; j < s->tokens; j++) {
        add_scaled(p->out + query, weight[j], p->v + at(s, j, h), s->dim);
        mean += weight[j] * dot(p->dout + query, p->v + at(s, j, h), s->dim);
    }
    for (int j = 0; j < s->tokens; j++) {
        size_t key = at(s, j, h);
        double dscore = weight[j] * (dot(p->dout + query, p->v + key, s->dim) - mean) / sqrt(s->dim);
        add_scaled(p->dq + query, dscore, p->k + key, s->dim);
        add_scaled(p->dk + key, dscore, p->q + query, s->dim);
        add_scaled(p->dv + key, weight[j], p->dout + query, s->dim);
    }
}

void plain_masked(const example_shape *shape, masked_sees sees, const void *mask, const masked_pass *pass) {
    double *weight = must_allocate((size_t)shape->tokens * sizeof *weight);
    for (size_t i = 0; i < example_elements(shape); i++) pass->out[i] = pass->dq[i] = pass->dk[i] = pass->dv[i] = 0;
    for (int t = 0; t < shape->tokens; t++)
        for (int h = 0; h < shape->heads; h++) {
            weigh(shape, sees, mask, pass, t, h, weight);
            add_query(shape, pass, t, h, weight);
        }
    free(weight);
}

/* ---- passes ------------------------------------------------------------------------------------------------------ */

static float *tensor_of(size_t count, unsigned seed) {
    float *data = must_allocate(count * sizeof *data);
    if (seed) fill(data, count, seed);
    for (size_t i = 0; !seed && i < count; i++) data[i] = NAN;
    return data;
}

masked_pass masked_pass_make(const example_shape *shape) {
    size_t count = example_elements(shape);
    masked_pass inputs = {
        .q = tensor_of(count, 1), .k = tensor_of(count, 2), .v = tensor_of(count, 3), .dout = tensor_of(count, 4)};
    return masked_pass_again(shape, &inputs);
}

masked_pass masked_pass_again(const example_shape *shape, const masked_pass *pass) {
    size_t count = example_elements(shape);
    return (masked_pass){pass->q,
                         pass->k,
                         pass->v,
                         pass->dout,
                         tensor_of(count, 0),
                         tensor_of(count, 0),
                         tensor_of(count, 0),
                         tensor_of(count, 0)};
}

void masked_results_free(const masked_pass *pass) {
    free(pass->out), free(pass->dq), free(pass->dk), free(pass->dv);
}

void masked_pass_free(const masked_pass *pass) {
    masked_results_free(pass);
    free((void *)pass->q), free((void *)pass->k), free((void *)pass->v), free((void *)pass->dout);
}

int report_pass(const char *what, const masked_pass *pass, const masked_pass *expected, size_t count) {
    static const char *names[] = {"out", "dq", "dk", "dv"};
    const float *mine[] = {pass->out, pass->dq, pass->dk, pass->dv};
    const float *theirs[] = {expected->out, expected->dq, expected->dk, expected->dv};
    int failures = 0;
    for (int i = 0; i < 4; i++) {
        char text[64];
        snprintf(text, sizeof text, "%s, %s", what, names[i]);
        failures += report(text, difference(mine[i], theirs[i], count), 1e-4);
    }
    return failures;
}
