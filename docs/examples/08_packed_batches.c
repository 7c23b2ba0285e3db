/* 08_packed_batches.c - training on packed documents: every step has other documents, of other lengths, in the same
 * row. On the zigzag layout they change nobody's tokens, so nothing is made anew: usp_sequence_replan gives the
 * sequence the step's documents, and on a GPU one CUDA graph, captured at the second step, serves all the steps to
 * come. usage: usp_launch -n 4 08_packed_batches [ULYSSES]; the ring takes the remaining ranks. Alone it is a world of
 * one. Checked: every step against the definition. */
#include "masked.h"

#include <stdio.h>
#include <stdlib.h>
#ifdef EXAMPLE_CUDA
#include <cuda_runtime_api.h>
#endif

enum { STEPS = 5, MOST = 6, TOKENS = 300, HEADS = 4, DIM = 16, TOKEN_BYTES = HEADS * DIM * sizeof(float), TENSORS = 8 };

/* What a loader would pack. Documents may be empty, and tokens behind the last one belong to none: they are padding
 * that sees nothing. */
typedef struct batch {
    int64_t documents, ends[MOST];
} batch;

static const batch batches[STEPS] = {
    {1, {300}}, {4, {50, 51, 200, 300}}, {6, {10, 40, 40, 90, 170, 290}}, {2, {150, 300}}, {3, {5, 6, 7}}};

typedef struct program {
    usp_world *world;
    usp_world_info info;
    usp_mesh *mesh;
    usp_sequence *sequence;
    usp_layer *layer;
    int64_t local;              /* own tokens, at every step */
    usp_tensor tensor[TENSORS]; /* q, k, v, dout, out, dq, dk, dv */
    void *workspace, *saved;
    usp_sizes sizes;
    usp_stream stream;
    void *graph; /* of a GPU, once there is one */
} program;

/* ---- objects ----------------------------------------------------------------------------------------------------- */

static void create_objects(program *p, int ulysses) {
    usp_sequence_config row = {.struct_size = sizeof row, .tokens = TOKENS, .max_documents = MOST};
    usp_layer_config causal = {.struct_size = sizeof causal,
                               .attention = USP_SOFTMAX,
                               .mask = USP_MASK_CAUSAL,
                               .dtype = USP_F32,
                               .batch = 1,
                               .heads = HEADS,
                               .head_dim = DIM};
    must(usp_world_create_env(NULL, &p->world));
    p->info.struct_size = sizeof p->info;
    must(usp_world_get_info(p->world, &p->info));
    must(usp_mesh_create(p->world, ulysses, p->info.size / ulysses, &p->mesh));
    must(usp_sequence_create(p->mesh, &row, &p->sequence));
    must(usp_layer_create(p->mesh, p->sequence, &causal, &p->layer));
    p->local = usp_sequence_own_tokens(p->sequence);
}

static void create_memory(program *p) {
    void *memory;
    p->sizes.struct_size = sizeof p->sizes;
    must(usp_layer_get_sizes(p->layer, &p->sizes));
    must(usp_world_alloc(p->world, p->sizes.forward_workspace + p->sizes.backward_workspace, &p->workspace));
    must(usp_world_alloc(p->world, p->sizes.saved, &p->saved));
    for (int i = 0; i < TENSORS; i++) {
        must(usp_world_alloc(p->world, (size_t)p->local * TOKEN_BYTES, &memory));
        p->tensor[i] = dense(memory, p->local, HEADS, DIM);
    }
}

static void destroy(program *p) {
    for (int i = 0; i < TENSORS; i++) usp_world_free(p->world, p->tensor[i].data);
    usp_world_free(p->world, p->saved);
    usp_world_free(p->world, p->workspace);
    usp_layer_destroy(p->layer);
    usp_sequence_destroy(p->sequence);
    usp_mesh_destroy(p->mesh);
    usp_world_destroy(p->world);
}

/* ---- a step ------------------------------------------------------------------------------------------------------ */

/* Enqueues both passes. Nothing in here depends on the documents. */
static void enqueue(program *p) {
    const usp_tensor *t = p->tensor;
    usp_forward forward = {
        .struct_size = sizeof forward, .q = t[0], .k = t[1], .v = t[2], .out = t[4], .saved = p->saved};
    usp_backward backward = {.struct_size = sizeof backward,
                             .q = t[0],
                             .k = t[1],
                             .v = t[2],
                             .dout = t[3],
                             .out = t[4],
                             .dq = t[5],
                             .dk = t[6],
                             .dv = t[7],
                             .saved = p->saved};
    must(usp_layer_forward(p->layer, &forward, p->workspace, p->sizes.forward_workspace, p->stream));
    must(usp_layer_backward(p->layer, &backward, p->workspace, p->sizes.backward_workspace, p->stream));
}

#ifdef EXAMPLE_CUDA
static void must_cuda(cudaError_t error) {
    if (error == cudaSuccess) return;
    fprintf(stderr, "CUDA: %s\n", cudaGetErrorString(error));
    exit(1);
}

static void open_stream(program *p) {
    if (p->info.device == USP_DEVICE_CUDA) must_cuda(cudaStreamCreateWithFlags(&p->stream, cudaStreamNonBlocking));
}

/* What is captured reads plans, counts and documents from device memory when it runs: where a re-plan writes them. */
static void capture(program *p) {
    cudaGraph_t graph;
    cudaGraphExec_t runnable;
    must_cuda(cudaStreamBeginCapture(p->stream, cudaStreamCaptureModeThreadLocal));
    enqueue(p);
    must_cuda(cudaStreamEndCapture(p->stream, &graph));
    must_cuda(cudaGraphInstantiate(&runnable, graph, 0));
    must_cuda(cudaGraphDestroy(graph));
    p->graph = runnable;
}

static void compute(program *p, int step) {
    if (step == 1 && p->stream) capture(p);
    if (p->graph)
        must_cuda(cudaGraphLaunch(p->graph, p->stream));
    else
        enqueue(p);
}

static void close_stream(program *p) {
    if (p->graph) must_cuda(cudaGraphExecDestroy(p->graph));
    if (p->stream) must_cuda(cudaStreamDestroy(p->stream));
}
#else
static void open_stream(program *p) {
    (void)p;
}

static void compute(program *p, int step) {
    (void)step;
    enqueue(p);
}

static void close_stream(program *p) {
    (void)p;
}
#endif

static void upload(const program *p, const float *whole, void *device) {
    size_t bytes = (size_t)p->local * TOKEN_BYTES;
    void *local = must_allocate(bytes);
    must(usp_sequence_scatter(p->sequence, 1, TOKEN_BYTES, whole, local));
    must(usp_world_copy(p->world, device, local, bytes, p->stream));
    must(usp_world_synchronize(p->world, p->stream));
    free(local);
}

static void download(const program *p, const void *device, float *whole) {
    size_t bytes = (size_t)p->local * TOKEN_BYTES;
    void *local = must_allocate(bytes);
    must(usp_world_copy(p->world, local, device, bytes, p->stream));
    must(usp_world_synchronize(p->world, p->stream));
    must(usp_sequence_gather(p->sequence, 1, TOKEN_BYTES, local, whole));
    free(local);
}

static void run_step(program *p, int step, const masked_pass *pass) {
    const float *given[] = {pass->q, pass->k, pass->v, pass->dout};
    float *result[] = {pass->out, pass->dq, pass->dk, pass->dv};
    must(usp_sequence_replan(p->sequence, batches[step].documents, batches[step].ends, p->stream));
    for (int i = 0; i < 4; i++) upload(p, given[i], p->tensor[i].data);
    for (int i = 0; i < 4; i++) upload(p, result[i], p->tensor[4 + i].data); /* NaN: nothing of the step before */
    compute(p, step);
    for (int i = 0; i < 4; i++) download(p, p->tensor[4 + i].data, result[i]);
}

/* ---- the mask in words ------------------------------------------------------------------------------------------- */

static int sees(const void *mask, int query, int key) {
    const batch *b = mask;
    for (int64_t d = 0; d < b->documents; d++)
        if (query < b->ends[d]) return key <= query && key >= (d ? b->ends[d - 1] : 0);
    return 0;
}

static int check_step(program *p, int step) {
    example_shape shape = {.batch = 1, .tokens = TOKENS, .heads = HEADS, .dim = DIM};
    masked_pass mine = masked_pass_make(&shape), expected = masked_pass_again(&shape, &mine);
    char what[64];
    run_step(p, step, &mine);
    plain_masked(&shape, sees, &batches[step], &expected);
    snprintf(what, sizeof what, "step %d, %d documents%s", step, (int)batches[step].documents,
             p->graph ? ", graph" : "");
    int failures = p->info.rank == 0 ? report_pass(what, &mine, &expected, example_elements(&shape)) : 0;
    masked_results_free(&expected);
    masked_pass_free(&mine);
    return failures;
}

int main(int argc, char **argv) {
    program p = {0};
    int failures = 0;
    create_objects(&p, argc > 1 ? atoi(argv[1]) : 1);
    create_memory(&p);
    open_stream(&p);
    for (int step = 0; step < STEPS; step++) failures += check_step(&p, step);
    close_stream(&p);
    destroy(&p);
    return failures != 0;
}
