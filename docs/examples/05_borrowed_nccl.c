/* 05_borrowed_nccl.c - inside a program that has its own ncclComm_t and stream already: a world that borrows the
 * communicator, a layer on the program's stream, and the layer inside a CUDA graph. One thread drives each GPU. */
#include "example.h"

#include <cuda_runtime_api.h>
#include <nccl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

enum { TOKENS = 515, HEADS = 4, DIM = 64, COUNT = TOKENS * HEADS * DIM, TOKEN_BYTES = HEADS * DIM * sizeof(float) };
enum { RANKS_MAX = 16 };

typedef struct shared {
    int ranks;
    ncclUniqueId id;
    float q[2][COUNT], k[COUNT], v[COUNT]; /* two batches of queries */
    float out[2][COUNT];                   /* from the definition */
} shared;

typedef struct rank_state {
    shared *all;
    int rank, failures;
    ncclComm_t comm;     /* the program's own */
    cudaStream_t stream; /* the program's own */
    usp_world *world;
    usp_mesh *mesh;
    usp_sequence *sequence;
    usp_layer *layer;
    int64_t local;
    size_t bytes; /* of one local tensor */
    void *workspace;
    size_t workspace_bytes;
} rank_state;

static void must_cuda(cudaError_t error) {
    if (error == cudaSuccess) return;
    fprintf(stderr, "CUDA: %s\n", cudaGetErrorString(error));
    exit(1);
}

static void must_nccl(ncclResult_t result) {
    if (result == ncclSuccess) return;
    fprintf(stderr, "NCCL: %s\n", ncclGetErrorString(result));
    exit(1);
}

static void create(rank_state *me) {
    int ulysses = me->all->ranks % 2 == 0 ? 2 : 1;
    usp_sequence_config tokens = {.struct_size = sizeof tokens, .tokens = TOKENS};
    usp_layer_config causal = {.struct_size = sizeof causal,
                               .attention = USP_SOFTMAX,
                               .mask = USP_MASK_CAUSAL,
                               .dtype = USP_F32,
                               .batch = 1,
                               .heads = HEADS,
                               .head_dim = DIM};
    usp_sizes sizes = {.struct_size = sizeof sizes};
    must(usp_world_create_nccl(NULL, me->comm, &me->world));
    must(usp_mesh_create(me->world, ulysses, me->all->ranks / ulysses, &me->mesh));
    must(usp_sequence_create(me->mesh, &tokens, &me->sequence));
    must(usp_layer_create(me->mesh, me->sequence, &causal, &me->layer));
    must(usp_layer_get_sizes(me->layer, &sizes));
    me->workspace_bytes = sizes.forward_workspace;
    must_cuda(cudaMalloc(&me->workspace, me->workspace_bytes + 1));
    me->local = usp_sequence_own_tokens(me->sequence);
    me->bytes = (size_t)me->local * TOKEN_BYTES;
}

static void destroy(rank_state *me) {
    must_cuda(cudaFree(me->workspace));
    usp_layer_destroy(me->layer);
    usp_sequence_destroy(me->sequence);
    usp_mesh_destroy(me->mesh);
    usp_world_destroy(me->world);
}

static void upload(const rank_state *me, void *device, const float *whole) {
    float *local = must_allocate(me->bytes);
    must(usp_sequence_scatter(me->sequence, 1, TOKEN_BYTES, whole, local));
    must_cuda(cudaMemcpyAsync(device, local, me->bytes, cudaMemcpyHostToDevice, me->stream));
    must_cuda(cudaStreamSynchronize(me->stream));
    free(local);
}

static usp_tensor device_tensor(const rank_state *me) {
    void *device;
    must_cuda(cudaMalloc(&device, me->bytes + 1));
    return dense(device, me->local, HEADS, DIM);
}

static void compare(rank_state *me, const char *what, const void *device, const float *expected) {
    float *local = must_allocate(me->bytes), *whole = must_allocate(COUNT * sizeof(float));
    must_cuda(cudaMemcpyAsync(local, device, me->bytes, cudaMemcpyDeviceToHost, me->stream));
    must(usp_world_synchronize(me->world, me->stream)); /* bounded: a lost rank ends it with an error */
    must(usp_sequence_gather(me->sequence, 1, TOKEN_BYTES, local, whole));
    double error = difference(whole, expected, COUNT);
    if (me->rank == 0) me->failures += report(what, error, 1e-3);
    free(local), free(whole);
}

/* The layer once in a graph; addresses are baked in, values are not. */
static cudaGraphExec_t capture(rank_state *me, const usp_forward *args) {
    cudaGraph_t graph;
    cudaGraphExec_t runnable;
    must_cuda(cudaStreamBeginCapture(me->stream, cudaStreamCaptureModeThreadLocal));
    must(usp_layer_forward(me->layer, args, me->workspace, me->workspace_bytes, me->stream));
    must_cuda(cudaStreamEndCapture(me->stream, &graph));
    must_cuda(cudaGraphInstantiate(&runnable, graph, 0));
    must_cuda(cudaGraphDestroy(graph));
    return runnable;
}

static void compute(rank_state *me) {
    shared *all = me->all;
    usp_forward args = {.struct_size = sizeof args,
                        .q = device_tensor(me),
                        .k = device_tensor(me),
                        .v = device_tensor(me),
                        .out = device_tensor(me)};
    upload(me, args.q.data, all->q[0]);
    upload(me, args.k.data, all->k);
    upload(me, args.v.data, all->v);
    must(usp_layer_forward(me->layer, &args, me->workspace, me->workspace_bytes, me->stream));
    compare(me, "on the program's stream", args.out.data, all->out[0]);

    cudaGraphExec_t graph = capture(me, &args);
    for (int batch = 1; batch >= 0; batch--) {
        upload(me, args.q.data, all->q[batch]);
        must_cuda(cudaGraphLaunch(graph, me->stream));
        compare(me, batch ? "graph replay, other queries" : "graph replay, first queries", args.out.data,
                all->out[batch]);
    }
    must_cuda(cudaGraphExecDestroy(graph));
    must_cuda(cudaFree(args.q.data)), must_cuda(cudaFree(args.k.data));
    must_cuda(cudaFree(args.v.data)), must_cuda(cudaFree(args.out.data));
}

/* The communicator was only borrowed: it still works once the world is gone. */
static void use_own_comm(rank_state *me) {
    float one = 1, *device;
    must_cuda(cudaMalloc((void **)&device, sizeof one));
    must_cuda(cudaMemcpyAsync(device, &one, sizeof one, cudaMemcpyHostToDevice, me->stream));
    must_nccl(ncclAllReduce(device, device, 1, ncclFloat, ncclSum, me->comm, me->stream));
    must_cuda(cudaMemcpyAsync(&one, device, sizeof one, cudaMemcpyDeviceToHost, me->stream));
    must_cuda(cudaStreamSynchronize(me->stream));
    float ranks = (float)me->all->ranks;
    if (me->rank == 0) me->failures += report("the program's own all-reduce", difference(&one, &ranks, 1), 0);
    must_cuda(cudaFree(device));
}

static void *run(void *argument) {
    rank_state *me = argument;
    must_cuda(cudaSetDevice(me->rank));
    must_cuda(cudaStreamCreateWithFlags(&me->stream, cudaStreamNonBlocking));
    must_nccl(ncclCommInitRank(&me->comm, me->all->ranks, me->all->id, me->rank));
    create(me);
    compute(me);
    destroy(me);
    use_own_comm(me);
    must_nccl(ncclCommDestroy(me->comm));
    must_cuda(cudaStreamDestroy(me->stream));
    return NULL;
}

int main(void) {
    static shared all;
    pthread_t thread[RANKS_MAX];
    rank_state state[RANKS_MAX];
    example_shape shape = {.batch = 1, .tokens = TOKENS, .heads = HEADS, .dim = DIM};
    if (cudaGetDeviceCount(&all.ranks) != cudaSuccess || all.ranks == 0) {
        puts("skipped: no GPU");
        return EXAMPLE_SKIPPED;
    }
    if (all.ranks > RANKS_MAX) all.ranks = RANKS_MAX;
    must_nccl(ncclGetUniqueId(&all.id));
    fill(all.k, COUNT, 3), fill(all.v, COUNT, 4);
    for (unsigned batch = 0; batch < 2; batch++) {
        fill(all.q[batch], COUNT, batch + 1);
        plain_forward(&shape, all.q[batch], all.k, all.v, all.out[batch]);
    }
    for (int rank = 0; rank < all.ranks; rank++) {
        state[rank] = (rank_state){.all = &all, .rank = rank};
        if (pthread_create(&thread[rank], NULL, run, &state[rank]) != 0) return 1;
    }
    for (int rank = 0; rank < all.ranks; rank++) pthread_join(thread[rank], NULL);
    return state[0].failures != 0;
}
