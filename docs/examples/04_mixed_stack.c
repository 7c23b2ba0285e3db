/* 04_mixed_stack.c - a model is an array of layers: each has its own kind and its own (ulysses, ring), the tokens stay.
 * The same stack on one rank gives the same numbers, which is checked. */
#include "example.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { LAYERS = 6, TOKENS = 149, HEADS = 4, DIM = 16, COUNT = TOKENS * HEADS * DIM, RANKS_MAX = 4 };

/* The stack for four ranks. Zigzag over all ranks is the same for every split of 4, so no token ever moves. */
static const struct {
    usp_attention attention;
    int ulysses, ring;
    usp_state_exchange exchange;
} stack[LAYERS] = {
    {USP_SOFTMAX, 4, 1, USP_STATE_AUTO},  {USP_LINEAR, 1, 4, USP_STATE_CHAIN}, {USP_SOFTMAX, 2, 2, USP_STATE_AUTO},
    {USP_LINEAR, 2, 2, USP_STATE_GATHER}, {USP_SOFTMAX, 1, 4, USP_STATE_AUTO}, {USP_LINEAR, 4, 1, USP_STATE_AUTO},
};

typedef struct rank_state {
    usp_rendezvous *rendezvous;
    int rank, ranks;
    const float *input; /* whole [TOKENS, HEADS, DIM] */
    float *output;      /* whole; rank 0 writes it */
    usp_world *world;
    usp_mesh *mesh[LAYERS];
    usp_sequence *sequence;
    usp_layer *layer[LAYERS];
    void *workspace; /* one serves all layers */
    size_t bytes;
} rank_state;

static void create_layer(rank_state *me, int i) {
    static const float decay[HEADS] = {-0.5f, -0.1f, -0.02f, 0};
    usp_layer_config config = {.struct_size = sizeof config,
                               .attention = stack[i].attention,
                               .mask = USP_MASK_CAUSAL,
                               .dtype = USP_F32,
                               .batch = 1,
                               .heads = HEADS,
                               .head_dim = DIM};
    if (stack[i].attention == USP_LINEAR) {
        config.decay = decay;
        config.scale = 0.1f;
        config.state_exchange = stack[i].exchange;
    }
    must(usp_layer_create(me->mesh[i], me->sequence, &config, &me->layer[i]));
    usp_sizes sizes = {.struct_size = sizeof sizes};
    must(usp_layer_get_sizes(me->layer[i], &sizes));
    if (sizes.forward_workspace > me->bytes) me->bytes = sizes.forward_workspace;
}

static void create(rank_state *me) {
    usp_world_config on_cpu = {.struct_size = sizeof on_cpu, .device = USP_DEVICE_CPU};
    usp_sequence_config tokens = {.struct_size = sizeof tokens, .tokens = TOKENS};
    must(usp_world_create_threads(&on_cpu, me->rendezvous, me->rank, &me->world));
    for (int i = 0; i < LAYERS; i++)
        must(usp_mesh_create(me->world, me->ranks == 1 ? 1 : stack[i].ulysses, me->ranks == 1 ? 1 : stack[i].ring,
                             &me->mesh[i]));
    must(usp_sequence_create(me->mesh[0], &tokens, &me->sequence)); /* good for all meshes of as many ranks */
    for (int i = 0; i < LAYERS; i++) create_layer(me, i);
    must(usp_world_alloc(me->world, me->bytes, &me->workspace));
}

static void destroy(rank_state *me) {
    usp_world_free(me->world, me->workspace);
    for (int i = LAYERS - 1; i >= 0; i--) usp_layer_destroy(me->layer[i]);
    usp_sequence_destroy(me->sequence);
    for (int i = LAYERS - 1; i >= 0; i--) usp_mesh_destroy(me->mesh[i]);
    usp_world_destroy(me->world);
}

/* x += layer(x), with x as query, key and value. */
static void run_layer(rank_state *me, int i, float *x, float *out, int64_t local) {
    usp_tensor tokens = dense(x, local, HEADS, DIM);
    usp_forward args = {
        .struct_size = sizeof args, .q = tokens, .k = tokens, .v = tokens, .out = dense(out, local, HEADS, DIM)};
    must(usp_layer_forward(me->layer[i], &args, me->workspace, me->bytes, NULL));
    for (int64_t j = 0; j < local * HEADS * DIM; j++) x[j] += out[j];
}

static void describe(const rank_state *me) {
    char text[512];
    for (int i = 0; me->rank == 0 && me->ranks > 1 && i < LAYERS; i++) {
        usp_layer_describe(me->layer[i], text, sizeof text);
        printf("layer %d: ulysses %d x ring %d, %.*s\n", i, stack[i].ulysses, stack[i].ring, (int)strcspn(text, "\n"),
               text);
    }
}

static void *run(void *argument) {
    rank_state *me = argument;
    create(me);
    describe(me);
    int64_t local = usp_sequence_own_tokens(me->sequence);
    size_t bytes = (size_t)local * HEADS * DIM * sizeof(float);
    float *x = must_allocate(bytes), *out = must_allocate(bytes), *whole = must_allocate(COUNT * sizeof(float));
    must(usp_sequence_scatter(me->sequence, 1, HEADS * DIM * sizeof(float), me->input, x));
    for (int i = 0; i < LAYERS; i++) run_layer(me, i, x, out, local);
    must(usp_sequence_gather(me->sequence, 1, HEADS * DIM * sizeof(float), x, whole));
    if (me->rank == 0) memcpy(me->output, whole, COUNT * sizeof(float));
    destroy(me);
    free(x), free(out), free(whole);
    return NULL;
}

static void run_ranks(int ranks, const float *input, float *output) {
    pthread_t thread[RANKS_MAX];
    rank_state state[RANKS_MAX];
    usp_rendezvous *rendezvous;
    must(usp_rendezvous_create(ranks, &rendezvous));
    for (int rank = 0; rank < ranks; rank++) {
        state[rank] =
            (rank_state){.rendezvous = rendezvous, .rank = rank, .ranks = ranks, .input = input, .output = output};
        if (pthread_create(&thread[rank], NULL, run, &state[rank]) != 0) must(USP_NO_MEMORY);
    }
    for (int rank = 0; rank < ranks; rank++) pthread_join(thread[rank], NULL);
    usp_rendezvous_destroy(rendezvous);
}

int main(void) {
    static float input[COUNT], one[COUNT], four[COUNT];
    fill(input, COUNT, 1);
    run_ranks(1, input, one);
    run_ranks(4, input, four);
    return report("six layers, four ranks against one", difference(four, one, COUNT), 1e-4);
}
