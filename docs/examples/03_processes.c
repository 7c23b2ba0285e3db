/* 03_processes.c - one process a rank, started by usp_launch, torchrun, srun or mpirun; on GPUs where there are any.
 * usage: usp_launch -n 4 03_processes [ULYSSES]; the ring takes the remaining ranks. Alone it is a world of one. */
#include "example.h"

#include <stdio.h>
#include <stdlib.h>

enum { TOKENS = 205, HEADS = 4, DIM = 32, COUNT = TOKENS * HEADS * DIM, TOKEN_BYTES = HEADS * DIM * sizeof(float) };

typedef struct program {
    usp_world *world;
    usp_world_info info;
    usp_mesh *mesh;
    usp_sequence *sequence;
    usp_layer *layer;
    int64_t local; /* own tokens */
    size_t bytes;  /* of one local tensor */
} program;

static void create(program *p, int ulysses) {
    usp_sequence_config tokens = {.struct_size = sizeof tokens, .tokens = TOKENS};
    usp_layer_config causal = {.struct_size = sizeof causal,
                               .attention = USP_SOFTMAX,
                               .mask = USP_MASK_CAUSAL,
                               .dtype = USP_F32,
                               .batch = 1,
                               .heads = HEADS,
                               .head_dim = DIM};
    int rank, size;
    must(usp_world_create_env(NULL, &p->world));
    p->info.struct_size = sizeof p->info;
    must(usp_world_get_info(p->world, &p->info));
    must(usp_mesh_create(p->world, ulysses, p->info.size / ulysses, &p->mesh));
    must(usp_mesh_axis(p->mesh, USP_AXIS_SEQUENCE, &rank, &size));
    must(usp_sequence_create(p->mesh, &tokens, &p->sequence));
    must(usp_layer_create(p->mesh, p->sequence, &causal, &p->layer));
    p->local = usp_sequence_own_tokens(p->sequence);
    p->bytes = (size_t)p->local * TOKEN_BYTES;
}

static void destroy(program *p) {
    usp_layer_destroy(p->layer);
    usp_sequence_destroy(p->sequence);
    usp_mesh_destroy(p->mesh);
    usp_world_destroy(p->world);
}

/* Memory of the world's device, whichever that is. */
static void *device_memory(const program *p, size_t bytes) {
    void *memory;
    must(usp_world_alloc(p->world, bytes, &memory));
    return memory;
}

static usp_tensor upload(const program *p, const float *whole) {
    float *local = must_allocate(p->bytes), *device = device_memory(p, p->bytes);
    must(usp_sequence_scatter(p->sequence, 1, TOKEN_BYTES, whole, local));
    must(usp_world_copy(p->world, device, local, p->bytes, NULL));
    must(usp_world_synchronize(p->world, NULL));
    free(local);
    return dense(device, p->local, HEADS, DIM);
}

static int compare(const program *p, const char *what, const float *device, const float *expected) {
    float *local = must_allocate(p->bytes), *whole = must_allocate(COUNT * sizeof(float));
    must(usp_world_copy(p->world, local, device, p->bytes, NULL));
    must(usp_world_synchronize(p->world, NULL));
    must(usp_sequence_gather(p->sequence, 1, TOKEN_BYTES, local, whole));
    double error = difference(whole, expected, COUNT);
    free(local);
    free(whole);
    return p->info.rank == 0 ? report(what, error, 1e-4) : error > 1e-4;
}

static int compute(const program *p, float *const given[4], float *const expected[4]) {
    usp_sizes sizes = {.struct_size = sizeof sizes};
    must(usp_layer_get_sizes(p->layer, &sizes));
    void *workspace = device_memory(p, sizes.forward_workspace + sizes.backward_workspace);
    void *saved = device_memory(p, sizes.saved);
    usp_tensor q = upload(p, given[0]), k = upload(p, given[1]), v = upload(p, given[2]), dout = upload(p, given[3]);
    usp_tensor out = dense(device_memory(p, p->bytes), p->local, HEADS, DIM), dq = out, dk = out, dv = out;
    dq.data = device_memory(p, p->bytes), dk.data = device_memory(p, p->bytes), dv.data = device_memory(p, p->bytes);

    usp_forward forward = {.struct_size = sizeof forward, .q = q, .k = k, .v = v, .out = out, .saved = saved};
    must(usp_layer_forward(p->layer, &forward, workspace, sizes.forward_workspace, NULL));
    usp_backward backward = {.struct_size = sizeof backward,
                             .q = q,
                             .k = k,
                             .v = v,
                             .out = out,
                             .dout = dout,
                             .dq = dq,
                             .dk = dk,
                             .dv = dv,
                             .saved = saved};
    must(usp_layer_backward(p->layer, &backward, workspace, sizes.backward_workspace, NULL));

    int failures = compare(p, "out", out.data, expected[0]) + compare(p, "dq", dq.data, expected[1]) +
                   compare(p, "dk", dk.data, expected[2]) + compare(p, "dv", dv.data, expected[3]);
    void *all[] = {q.data, k.data, v.data, dout.data, out.data, dq.data, dk.data, dv.data, saved, workspace};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) usp_world_free(p->world, all[i]);
    return failures;
}

int main(int count, char **argument) {
    static float memory[8][COUNT];
    float *given[4] = {memory[0], memory[1], memory[2], memory[3]};
    float *expected[4] = {memory[4], memory[5], memory[6], memory[7]};
    example_shape shape = {.batch = 1, .tokens = TOKENS, .heads = HEADS, .dim = DIM};
    for (unsigned i = 0; i < 4; i++) fill(given[i], COUNT, i + 1);
    plain_forward(&shape, given[0], given[1], given[2], expected[0]);
    plain_backward(&shape, given[0], given[1], given[2], given[3], expected[1], expected[2], expected[3]);

    program p = {0};
    int ulysses = count > 1 ? atoi(argument[1]) : 1;
    if (ulysses < 1) return fputs("usage: 03_processes [ULYSSES]\n", stderr), 2;
    create(&p, ulysses);
    if (p.info.rank == 0)
        printf("%d rank%s, transport %s, ulysses %d x ring %d\n", p.info.size, p.info.size == 1 ? "" : "s",
               p.info.transport, ulysses, p.info.size / ulysses);
    int failures = compute(&p, given, expected);
    destroy(&p);
    return failures != 0;
}
