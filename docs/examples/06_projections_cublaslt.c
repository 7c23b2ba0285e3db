/* 06_projections_cublaslt.c - the projections around a layer on GPUs, forward and backward, in bf16:
 * x -> packed QKV -> layer -> output projection, by cuBLASLt, which only this program links, and compared with a plain
 * computation on the host. One thread drives each GPU; usage: 06_projections_cublaslt [GPUS] (default: all). */
#include "example.h"

#include <cublasLt.h>
#include <cuda_runtime_api.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { TOKENS = 300, HEADS = 4, DIM = 64, WIDTH = HEADS * DIM, WIDE = 3 * WIDTH, RANKS_MAX = 16 };

/* Whole tensors on the host, as floats that bf16 holds exactly, and what the plain computation makes of them. */
typedef struct problem {
    float x[TOKENS * WIDTH], dy[TOKENS * WIDTH];
    float qkv_weight[WIDTH * WIDE], out_weight[WIDTH * WIDTH]; /* [in, out] */
    float y[TOKENS * WIDTH], dx[TOKENS * WIDTH];
    float dqkv_weight[WIDTH * WIDE], dout_weight[WIDTH * WIDTH];
} problem;

typedef struct rank_state {
    problem *plain;
    int rank, ranks;
    usp_unique_id *id;
    usp_rendezvous *rendezvous;
    usp_world *world;
    usp_mesh *mesh;
    usp_sequence *sequence;
    usp_layer *layer;
    cudaStream_t stream;
    cublasLtHandle_t blas;
    void *blas_workspace;
    size_t local;                     /* own tokens */
    float *y, *dx;                    /* whole results, [TOKENS, WIDTH] */
    float *dqkv_weight, *dout_weight; /* this rank's part of the sums over tokens */
} rank_state;

/* One rank's device memory. rows: own tokens. */
typedef struct buffers {
    void *x, *dy, *y, *dx;                                     /* [rows, WIDTH] */
    void *qkv, *dqkv;                                          /* [rows, WIDE] */
    void *attended, *dattended;                                /* [rows, WIDTH] */
    void *qkv_weight, *out_weight, *dqkv_weight, *dout_weight; /* [in, out]; gradients in fp32 */
    void *workspace, *saved;
    size_t bytes; /* of workspace */
} buffers;

static const size_t blas_bytes = (size_t)32 << 20;

/* ---- the plain computation --------------------------------------------------------------------------------------- */

/* c[m, n] = a b with a(i, p) = a[i * a_row + p * a_column], and b alike. */
static void plain_product(float *c, const float *a, size_t a_row, size_t a_column, const float *b, size_t b_row,
                          size_t b_column, size_t m, size_t n, size_t k) {
    for (size_t i = 0; i < m; i++) {
        for (size_t j = 0; j < n; j++) {
            float sum = 0;
            for (size_t p = 0; p < k; p++) sum += a[i * a_row + p * a_column] * b[p * b_row + j * b_column];
            c[i * n + j] = sum;
        }
    }
}

/* Copies part 0, 1, 2 (q, k, v) out of the packed tensor, or back into it. */
static void unpack(const float *packed, int part, float *to) {
    for (size_t t = 0; t < TOKENS; t++)
        memcpy(to + t * WIDTH, packed + (3 * t + (size_t)part) * WIDTH, WIDTH * sizeof *to);
}

static void pack(float *packed, int part, const float *from) {
    for (size_t t = 0; t < TOKENS; t++)
        memcpy(packed + (3 * t + (size_t)part) * WIDTH, from + t * WIDTH, WIDTH * sizeof *from);
}

static void solve_plainly(problem *p) {
    const example_shape shape = {.batch = 1, .tokens = TOKENS, .heads = HEADS, .dim = DIM};
    const size_t bytes = TOKENS * WIDTH * sizeof(float);
    float *qkv = must_allocate(3 * bytes), *dqkv = must_allocate(3 * bytes), *part[6];
    float *attended = must_allocate(bytes), *dattended = must_allocate(bytes);
    for (int i = 0; i < 6; i++) part[i] = must_allocate(bytes);
    plain_product(qkv, p->x, WIDTH, 1, p->qkv_weight, WIDE, 1, TOKENS, WIDE, WIDTH);
    for (int i = 0; i < 3; i++) unpack(qkv, i, part[i]);
    plain_forward(&shape, part[0], part[1], part[2], attended);
    plain_product(p->y, attended, WIDTH, 1, p->out_weight, WIDTH, 1, TOKENS, WIDTH, WIDTH);
    plain_product(dattended, p->dy, WIDTH, 1, p->out_weight, 1, WIDTH, TOKENS, WIDTH, WIDTH);
    plain_product(p->dout_weight, attended, 1, WIDTH, p->dy, WIDTH, 1, WIDTH, WIDTH, TOKENS);
    plain_backward(&shape, part[0], part[1], part[2], dattended, part[3], part[4], part[5]);
    for (int i = 0; i < 3; i++) pack(dqkv, i, part[3 + i]);
    plain_product(p->dx, dqkv, WIDE, 1, p->qkv_weight, 1, WIDE, TOKENS, WIDTH, WIDE);
    plain_product(p->dqkv_weight, p->x, 1, WIDTH, dqkv, WIDE, 1, WIDTH, WIDE, TOKENS);
    for (int i = 0; i < 6; i++) free(part[i]);
    free(qkv), free(dqkv), free(attended), free(dattended);
}

/* ---- GPU memory -------------------------------------------------------------------------------------------------- */

static void must_cuda(cudaError_t error) {
    if (error == cudaSuccess) return;
    fprintf(stderr, "CUDA: %s\n", cudaGetErrorString(error));
    exit(1);
}

static void must_blas(cublasStatus_t status) {
    if (status == CUBLAS_STATUS_SUCCESS) return;
    fprintf(stderr, "cuBLASLt: status %d\n", (int)status);
    exit(1);
}

static uint16_t to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static float from_bf16(uint16_t value) {
    uint32_t bits = (uint32_t)value << 16;
    float wide;
    memcpy(&wide, &bits, sizeof wide);
    return wide;
}

static void *device_memory(size_t bytes) {
    void *device;
    must_cuda(cudaMalloc(&device, bytes + 1));
    return device;
}

static void *upload(const rank_state *me, const float *data, size_t count) {
    uint16_t *narrow = must_allocate(count * sizeof *narrow);
    void *device = device_memory(count * sizeof *narrow);
    for (size_t i = 0; i < count; i++) narrow[i] = to_bf16(data[i]);
    must_cuda(cudaMemcpyAsync(device, narrow, count * sizeof *narrow, cudaMemcpyHostToDevice, me->stream));
    must_cuda(cudaStreamSynchronize(me->stream));
    free(narrow);
    return device;
}

/* Own tokens of a whole [TOKENS, WIDTH] tensor. */
static void *upload_own(const rank_state *me, const float *whole) {
    float *local = must_allocate(me->local * WIDTH * sizeof *local);
    must(usp_sequence_scatter(me->sequence, 1, WIDTH * sizeof *local, whole, local));
    void *device = upload(me, local, me->local * WIDTH);
    free(local);
    return device;
}

/* All ranks' tokens of a bf16 device tensor, as floats. */
static float *download_whole(const rank_state *me, const void *device) {
    size_t bytes = me->local * WIDTH * sizeof(uint16_t);
    uint16_t *local = must_allocate(bytes), *narrow = must_allocate(TOKENS * WIDTH * sizeof *narrow);
    float *whole = must_allocate(TOKENS * WIDTH * sizeof *whole);
    must_cuda(cudaMemcpyAsync(local, device, bytes, cudaMemcpyDeviceToHost, me->stream));
    must(usp_world_synchronize(me->world, me->stream));
    must(usp_sequence_gather(me->sequence, 1, WIDTH * sizeof *narrow, local, narrow));
    for (size_t i = 0; i < TOKENS * WIDTH; i++) whole[i] = from_bf16(narrow[i]);
    free(local), free(narrow);
    return whole;
}

static float *download_floats(const rank_state *me, const void *device, size_t count) {
    float *host = must_allocate(count * sizeof *host);
    must_cuda(cudaMemcpyAsync(host, device, count * sizeof *host, cudaMemcpyDeviceToHost, me->stream));
    must(usp_world_synchronize(me->world, me->stream));
    return host;
}

/* ---- projections ------------------------------------------------------------------------------------------------- */

/* A row-major matrix [rows, columns] in memory, used as it is or transposed. */
typedef struct matrix {
    const void *data;
    size_t rows, columns;
    int transposed;
} matrix;

/* cuBLAS is column-major: it sees a row-major matrix as its transpose. */
static cublasLtMatrixLayout_t layout_of(size_t rows, size_t columns, cudaDataType_t type) {
    cublasLtMatrixLayout_t layout;
    must_blas(cublasLtMatrixLayoutCreate(&layout, type, columns, rows, (int64_t)columns));
    return layout;
}

static void set_transpose(cublasLtMatmulDesc_t product, cublasLtMatmulDescAttributes_t which, int transposed) {
    cublasOperation_t operation = transposed ? CUBLAS_OP_T : CUBLAS_OP_N;
    must_blas(cublasLtMatmulDescSetAttribute(product, which, &operation, sizeof operation));
}

static cublasLtMatmulAlgo_t choose(const rank_state *me, cublasLtMatmulDesc_t product, cublasLtMatrixLayout_t a,
                                   cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t c) {
    cublasLtMatmulPreference_t preference;
    cublasLtMatmulHeuristicResult_t best;
    int found = 0;
    must_blas(cublasLtMatmulPreferenceCreate(&preference));
    must_blas(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &blas_bytes,
                                                   sizeof blas_bytes));
    must_blas(cublasLtMatmulAlgoGetHeuristic(me->blas, product, a, b, c, c, preference, 1, &best, &found));
    must_blas(found ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_NOT_SUPPORTED);
    must_blas(cublasLtMatmulPreferenceDestroy(preference));
    return best.algo;
}

/* c[m, n] = a b, row-major, bf16 in, `type` out; as c^T = b^T a^T for cuBLAS. A real program keeps the descriptions. */
static void multiply(const rank_state *me, void *c, cudaDataType_t type, matrix a, matrix b) {
    const float one = 1, zero = 0;
    size_t m = a.transposed ? a.columns : a.rows, n = b.transposed ? b.rows : b.columns;
    if (me->local == 0) return;
    cublasLtMatmulDesc_t product;
    must_blas(cublasLtMatmulDescCreate(&product, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    set_transpose(product, CUBLASLT_MATMUL_DESC_TRANSA, b.transposed);
    set_transpose(product, CUBLASLT_MATMUL_DESC_TRANSB, a.transposed);
    cublasLtMatrixLayout_t first = layout_of(b.rows, b.columns, CUDA_R_16BF);
    cublasLtMatrixLayout_t second = layout_of(a.rows, a.columns, CUDA_R_16BF);
    cublasLtMatrixLayout_t result = layout_of(m, n, type);
    cublasLtMatmulAlgo_t algorithm = choose(me, product, first, second, result);
    must_blas(cublasLtMatmul(me->blas, product, &one, b.data, first, a.data, second, &zero, c, result, c, result,
                             &algorithm, me->blas_workspace, blas_bytes, me->stream));
    must_blas(cublasLtMatrixLayoutDestroy(result));
    must_blas(cublasLtMatrixLayoutDestroy(second));
    must_blas(cublasLtMatrixLayoutDestroy(first));
    must_blas(cublasLtMatmulDescDestroy(product));
}

static matrix as_is(const void *data, size_t rows, size_t columns) {
    return (matrix){data, rows, columns, 0};
}

static matrix transposed(const void *data, size_t rows, size_t columns) {
    return (matrix){data, rows, columns, 1};
}

/* Part 0, 1, 2 of a packed [tokens, 3, heads, dim]: the layer takes it where it lies. */
static usp_tensor packed_part(const rank_state *me, void *packed, size_t part) {
    return (usp_tensor){(uint16_t *)packed + part * WIDTH, (int64_t)me->local * WIDE, WIDE, DIM};
}

/* ---- one rank ---------------------------------------------------------------------------------------------------- */

static void create(rank_state *me) {
    int ulysses = me->ranks % 2 == 0 ? 2 : 1;
    usp_world_config on_gpu = {.struct_size = sizeof on_gpu, .device = USP_DEVICE_CUDA};
    usp_sequence_config tokens = {.struct_size = sizeof tokens, .tokens = TOKENS};
    usp_layer_config causal = {.struct_size = sizeof causal,
                               .attention = USP_SOFTMAX,
                               .mask = USP_MASK_CAUSAL,
                               .dtype = USP_BF16,
                               .batch = 1,
                               .heads = HEADS,
                               .head_dim = DIM};
    must(usp_device_select(USP_DEVICE_CUDA, me->rank));
    must_cuda(cudaStreamCreateWithFlags(&me->stream, cudaStreamNonBlocking));
    must_blas(cublasLtCreate(&me->blas));
    me->blas_workspace = device_memory(blas_bytes);
    must(me->rendezvous ? usp_world_create_threads(&on_gpu, me->rendezvous, me->rank, &me->world)
                        : usp_world_create_nccl_id(&on_gpu, me->id, me->ranks, me->rank, &me->world));
    must(usp_mesh_create(me->world, ulysses, me->ranks / ulysses, &me->mesh));
    must(usp_sequence_create(me->mesh, &tokens, &me->sequence));
    must(usp_layer_create(me->mesh, me->sequence, &causal, &me->layer));
    me->local = (size_t)usp_sequence_own_tokens(me->sequence);
}

static void destroy(rank_state *me) {
    usp_layer_destroy(me->layer);
    usp_sequence_destroy(me->sequence);
    usp_mesh_destroy(me->mesh);
    usp_world_destroy(me->world);
    must_cuda(cudaFree(me->blas_workspace));
    must_blas(cublasLtDestroy(me->blas));
    must_cuda(cudaStreamDestroy(me->stream));
}

static buffers allocate(const rank_state *me) {
    const size_t half = sizeof(uint16_t), rows = me->local * WIDTH;
    usp_sizes sizes = {.struct_size = sizeof sizes};
    must(usp_layer_get_sizes(me->layer, &sizes));
    buffers b = {.bytes = sizes.forward_workspace > sizes.backward_workspace ? sizes.forward_workspace
                                                                             : sizes.backward_workspace};
    b.workspace = device_memory(b.bytes), b.saved = device_memory(sizes.saved);
    b.x = upload_own(me, me->plain->x), b.dy = upload_own(me, me->plain->dy);
    b.qkv_weight = upload(me, me->plain->qkv_weight, WIDTH * WIDE);
    b.out_weight = upload(me, me->plain->out_weight, WIDTH * WIDTH);
    b.qkv = device_memory(3 * rows * half), b.dqkv = device_memory(3 * rows * half);
    b.attended = device_memory(rows * half), b.dattended = device_memory(rows * half);
    b.y = device_memory(rows * half), b.dx = device_memory(rows * half);
    b.dqkv_weight = device_memory(WIDTH * WIDE * sizeof(float));
    b.dout_weight = device_memory(WIDTH * WIDTH * sizeof(float));
    must_cuda(cudaMemsetAsync(b.dqkv_weight, 0, WIDTH * WIDE * sizeof(float), me->stream));
    must_cuda(cudaMemsetAsync(b.dout_weight, 0, WIDTH * WIDTH * sizeof(float), me->stream));
    return b;
}

static void release(const buffers *b) {
    void *const all[] = {b->workspace, b->saved,    b->x,         b->dy, b->qkv_weight, b->out_weight,  b->qkv,
                         b->dqkv,      b->attended, b->dattended, b->y,  b->dx,         b->dqkv_weight, b->dout_weight};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) must_cuda(cudaFree(all[i]));
}

/* qkv = x Wqkv, attended = layer(qkv), y = attended Wout */
static void forward(const rank_state *me, const buffers *b) {
    const size_t rows = me->local;
    multiply(me, b->qkv, CUDA_R_16BF, as_is(b->x, rows, WIDTH), as_is(b->qkv_weight, WIDTH, WIDE));
    usp_forward args = {.struct_size = sizeof args,
                        .q = packed_part(me, b->qkv, 0),
                        .k = packed_part(me, b->qkv, 1),
                        .v = packed_part(me, b->qkv, 2),
                        .out = dense(b->attended, (int64_t)rows, HEADS, DIM),
                        .saved = b->saved};
    must(usp_layer_forward(me->layer, &args, b->workspace, b->bytes, me->stream));
    multiply(me, b->y, CUDA_R_16BF, as_is(b->attended, rows, WIDTH), as_is(b->out_weight, WIDTH, WIDTH));
}

/* The same in reverse; weight gradients are sums over tokens and stay in fp32. */
static void backward(const rank_state *me, const buffers *b) {
    const size_t rows = me->local;
    multiply(me, b->dattended, CUDA_R_16BF, as_is(b->dy, rows, WIDTH), transposed(b->out_weight, WIDTH, WIDTH));
    multiply(me, b->dout_weight, CUDA_R_32F, transposed(b->attended, rows, WIDTH), as_is(b->dy, rows, WIDTH));
    usp_backward args = {.struct_size = sizeof args,
                         .q = packed_part(me, b->qkv, 0),
                         .k = packed_part(me, b->qkv, 1),
                         .v = packed_part(me, b->qkv, 2),
                         .out = dense(b->attended, (int64_t)rows, HEADS, DIM),
                         .dout = dense(b->dattended, (int64_t)rows, HEADS, DIM),
                         .dq = packed_part(me, b->dqkv, 0),
                         .dk = packed_part(me, b->dqkv, 1),
                         .dv = packed_part(me, b->dqkv, 2),
                         .saved = b->saved};
    must(usp_layer_backward(me->layer, &args, b->workspace, b->bytes, me->stream));
    multiply(me, b->dx, CUDA_R_16BF, as_is(b->dqkv, rows, WIDE), transposed(b->qkv_weight, WIDTH, WIDE));
    multiply(me, b->dqkv_weight, CUDA_R_32F, transposed(b->x, rows, WIDTH), as_is(b->dqkv, rows, WIDE));
}

static void compute(rank_state *me) {
    buffers b = allocate(me);
    forward(me, &b);
    backward(me, &b);
    me->y = download_whole(me, b.y);
    me->dx = download_whole(me, b.dx);
    me->dqkv_weight = download_floats(me, b.dqkv_weight, WIDTH * WIDE);
    me->dout_weight = download_floats(me, b.dout_weight, WIDTH * WIDTH);
    release(&b);
}

static void *run(void *argument) {
    rank_state *me = argument;
    create(me);
    compute(me);
    destroy(me);
    return NULL;
}

/* ---- all ranks --------------------------------------------------------------------------------------------------- */

static void prepare(problem *p) {
    fill(p->x, TOKENS * WIDTH, 1), fill(p->dy, TOKENS * WIDTH, 2);
    fill(p->qkv_weight, WIDTH * WIDE, 3), fill(p->out_weight, WIDTH * WIDTH, 4);
    for (size_t i = 0; i < WIDTH * WIDE; i++) p->qkv_weight[i] = from_bf16(to_bf16(p->qkv_weight[i] / 8));
    for (size_t i = 0; i < WIDTH * WIDTH; i++) p->out_weight[i] = from_bf16(to_bf16(p->out_weight[i] / 8));
    for (size_t i = 0; i < TOKENS * WIDTH; i++) p->x[i] = from_bf16(to_bf16(p->x[i]));
    for (size_t i = 0; i < TOKENS * WIDTH; i++) p->dy[i] = from_bf16(to_bf16(p->dy[i]));
    solve_plainly(p);
}

/* Adds rank by rank, so that the sum is the same in every run. */
static void add(float *to, const float *from, size_t count) {
    for (size_t i = 0; i < count; i++) to[i] += from[i];
}

static int judge(const problem *p, rank_state *state, int ranks) {
    const double allowed = 2e-2; /* bf16 rounds to 1 part in 256, at four places one after the other */
    for (int rank = 1; rank < ranks; rank++) {
        add(state[0].dqkv_weight, state[rank].dqkv_weight, WIDTH * WIDE);
        add(state[0].dout_weight, state[rank].dout_weight, WIDTH * WIDTH);
    }
    int failures = report("y", difference(state[0].y, p->y, TOKENS * WIDTH), allowed);
    failures += report("dx", difference(state[0].dx, p->dx, TOKENS * WIDTH), allowed);
    failures += report("dWqkv", difference(state[0].dqkv_weight, p->dqkv_weight, WIDTH * WIDE), allowed);
    failures += report("dWout", difference(state[0].dout_weight, p->dout_weight, WIDTH * WIDTH), allowed);
    return failures;
}

static void free_results(rank_state *state, int ranks) {
    for (int rank = 0; rank < ranks; rank++) {
        free(state[rank].y), free(state[rank].dx);
        free(state[rank].dqkv_weight), free(state[rank].dout_weight);
    }
}

/* GPUs to use: what the argument says, at most what is there. */
static int choose_ranks(int count, char **argument) {
    int gpus = usp_device_count(USP_DEVICE_CUDA), wanted = count > 1 ? atoi(argument[1]) : gpus;
    if (wanted < 1 || wanted > gpus) wanted = gpus;
    return wanted > RANKS_MAX ? RANKS_MAX : wanted;
}

int main(int count, char **argument) {
    static problem plain;
    pthread_t thread[RANKS_MAX];
    rank_state state[RANKS_MAX];
    usp_unique_id id;
    usp_rendezvous *rendezvous = NULL;
    int ranks = choose_ranks(count, argument);
    if (ranks == 0) {
        puts("skipped: no GPU");
        return EXAMPLE_SKIPPED;
    }
    if (usp_unique_id_create(&id) != USP_OK) ranks = 1; /* a build without NCCL: one GPU, threads as transport */
    if (ranks == 1) must(usp_rendezvous_create(1, &rendezvous));
    prepare(&plain);
    printf("projections and a layer on %d GPU%s, %d tokens, width %d\n", ranks, ranks == 1 ? "" : "s", TOKENS, WIDTH);
    for (int rank = 0; rank < ranks; rank++) {
        state[rank] = (rank_state){.plain = &plain, .rank = rank, .ranks = ranks, .id = &id, .rendezvous = rendezvous};
        if (pthread_create(&thread[rank], NULL, run, &state[rank]) != 0) return 1;
    }
    for (int rank = 0; rank < ranks; rank++) pthread_join(thread[rank], NULL);
    int failures = judge(&plain, state, ranks);
    free_results(state, ranks);
    usp_rendezvous_destroy(rendezvous);
    return failures != 0;
}
