/* 02_ring_of_threads.c - four ranks, each a thread of this program, on a mesh of ulysses 2 x ring 2.
 * Each rank computes on its own tokens; the whole tensors here are only for comparing with the definition. */
#include "example.h"

#include <pthread.h>
#include <stdlib.h>

enum { RANKS = 4, ULYSSES = 2, RING = 2, TOKENS = 203, HEADS = 4, DIM = 16, COUNT = TOKENS * HEADS * DIM };

/* What is the same for all ranks. */
typedef struct shared {
    usp_rendezvous *rendezvous;
    float q[COUNT], k[COUNT], v[COUNT], dout[COUNT];
    float out[COUNT], dq[COUNT], dk[COUNT], dv[COUNT]; /* from the definition */
} shared;

typedef struct rank_state {
    shared *all;
    int rank, failures;
    usp_world *world;
    usp_mesh *mesh;
    usp_sequence *sequence;
    usp_layer *layer;
    int64_t local; /* own tokens */
} rank_state;

static void create(rank_state *me) {
    usp_world_config on_cpu = {.struct_size = sizeof on_cpu, .device = USP_DEVICE_CPU};
    usp_sequence_config tokens = {.struct_size = sizeof tokens, .tokens = TOKENS};
    usp_layer_config causal = {.struct_size = sizeof causal,
                               .attention = USP_SOFTMAX,
                               .mask = USP_MASK_CAUSAL,
                               .dtype = USP_F32,
                               .batch = 1,
                               .heads = HEADS,
                               .head_dim = DIM};
    must(usp_world_create_threads(&on_cpu, me->all->rendezvous, me->rank, &me->world));
    must(usp_mesh_create(me->world, ULYSSES, RING, &me->mesh));
    must(usp_sequence_create(me->mesh, &tokens, &me->sequence));
    must(usp_layer_create(me->mesh, me->sequence, &causal, &me->layer));
    me->local = usp_sequence_own_tokens(me->sequence);
}

static void destroy(rank_state *me) {
    usp_layer_destroy(me->layer);
    usp_sequence_destroy(me->sequence);
    usp_mesh_destroy(me->mesh);
    usp_world_destroy(me->world);
}

static float *local_tensor(const rank_state *me) {
    return must_allocate((size_t)me->local * HEADS * DIM * sizeof(float));
}

/* This rank's tokens of a whole tensor. */
static float *own_part(const rank_state *me, const float *whole) {
    float *local = local_tensor(me);
    must(usp_sequence_scatter(me->sequence, 1, HEADS * DIM * sizeof(float), whole, local));
    return local;
}

/* All ranks' parts of a result against the definition; every rank sees all of it. */
static void compare(rank_state *me, const char *what, const float *local, const float *expected) {
    float *whole = must_allocate(COUNT * sizeof(float));
    must(usp_sequence_gather(me->sequence, 1, HEADS * DIM * sizeof(float), local, whole));
    double error = difference(whole, expected, COUNT);
    if (me->rank == 0) me->failures += report(what, error, 1e-5);
    free(whole);
}

static void compute(rank_state *me) {
    float *q = own_part(me, me->all->q), *k = own_part(me, me->all->k), *v = own_part(me, me->all->v);
    float *dout = own_part(me, me->all->dout), *out = local_tensor(me);
    float *dq = local_tensor(me), *dk = local_tensor(me), *dv = local_tensor(me);
    usp_sizes sizes = {.struct_size = sizeof sizes};
    void *workspace, *saved;
    must(usp_layer_get_sizes(me->layer, &sizes));
    must(usp_world_alloc(me->world, sizes.forward_workspace + sizes.backward_workspace, &workspace));
    must(usp_world_alloc(me->world, sizes.saved, &saved));

    usp_forward forward = {.struct_size = sizeof forward,
                           .q = dense(q, me->local, HEADS, DIM),
                           .k = dense(k, me->local, HEADS, DIM),
                           .v = dense(v, me->local, HEADS, DIM),
                           .out = dense(out, me->local, HEADS, DIM),
                           .saved = saved};
    must(usp_layer_forward(me->layer, &forward, workspace, sizes.forward_workspace, NULL));
    usp_backward backward = {.struct_size = sizeof backward,
                             .q = forward.q,
                             .k = forward.k,
                             .v = forward.v,
                             .out = forward.out,
                             .dout = dense(dout, me->local, HEADS, DIM),
                             .dq = dense(dq, me->local, HEADS, DIM),
                             .dk = dense(dk, me->local, HEADS, DIM),
                             .dv = dense(dv, me->local, HEADS, DIM),
                             .saved = saved};
    must(usp_layer_backward(me->layer, &backward, workspace, sizes.backward_workspace, NULL));

    compare(me, "out", out, me->all->out);
    compare(me, "dq", dq, me->all->dq);
    compare(me, "dk", dk, me->all->dk);
    compare(me, "dv", dv, me->all->dv);
    usp_world_free(me->world, saved);
    usp_world_free(me->world, workspace);
    free(q), free(k), free(v), free(out), free(dout), free(dq), free(dk), free(dv);
}

static void *run(void *argument) {
    rank_state *me = argument;
    create(me);
    compute(me);
    destroy(me);
    return NULL;
}

int main(void) {
    static shared all;
    pthread_t thread[RANKS];
    rank_state state[RANKS];
    example_shape shape = {.batch = 1, .tokens = TOKENS, .heads = HEADS, .dim = DIM};
    fill(all.q, COUNT, 1), fill(all.k, COUNT, 2), fill(all.v, COUNT, 3), fill(all.dout, COUNT, 4);
    plain_forward(&shape, all.q, all.k, all.v, all.out);
    plain_backward(&shape, all.q, all.k, all.v, all.dout, all.dq, all.dk, all.dv);

    must(usp_rendezvous_create(RANKS, &all.rendezvous));
    for (int rank = 0; rank < RANKS; rank++) {
        state[rank] = (rank_state){.all = &all, .rank = rank};
        if (pthread_create(&thread[rank], NULL, run, &state[rank]) != 0) return 1;
    }
    for (int rank = 0; rank < RANKS; rank++) pthread_join(thread[rank], NULL);
    usp_rendezvous_destroy(all.rendezvous);
    return state[0].failures != 0;
}
