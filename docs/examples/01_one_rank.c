/* 01_one_rank.c - the smallest program: one rank, one attention layer, forward and backward.
 * With one rank nothing is exchanged; the next programs change only the mesh. */
#include "example.h"

#include <stdlib.h>

int main(void) {
    /* A world of one thread-rank, a 1 x 1 mesh, a sequence of 100 tokens, a causal softmax layer. */
    usp_rendezvous *rendezvous;
    usp_world *world;
    usp_mesh *mesh;
    usp_sequence *sequence;
    usp_layer *layer;
    usp_world_config on_cpu = {.struct_size = sizeof on_cpu, .device = USP_DEVICE_CPU};
    usp_sequence_config tokens = {.struct_size = sizeof tokens, .tokens = 100};
    usp_layer_config causal = {.struct_size = sizeof causal,
                               .attention = USP_SOFTMAX,
                               .mask = USP_MASK_CAUSAL,
                               .dtype = USP_F32,
                               .batch = 1,
                               .heads = 2,
                               .head_dim = 16};
    must(usp_rendezvous_create(1, &rendezvous));
    must(usp_world_create_threads(&on_cpu, rendezvous, 0, &world));
    must(usp_mesh_create(world, 1, 1, &mesh));
    must(usp_sequence_create(mesh, &tokens, &sequence));
    must(usp_layer_create(mesh, sequence, &causal, &layer));

    /* The caller owns tensors, workspace and saved. */
    enum { COUNT = 100 * 2 * 16 };
    static float q[COUNT], k[COUNT], v[COUNT], out[COUNT], dout[COUNT], dq[COUNT], dk[COUNT], dv[COUNT];
    usp_sizes sizes = {.struct_size = sizeof sizes};
    void *workspace, *saved;
    must(usp_layer_get_sizes(layer, &sizes));
    size_t bytes =
        sizes.forward_workspace > sizes.backward_workspace ? sizes.forward_workspace : sizes.backward_workspace;
    must(usp_world_alloc(world, bytes, &workspace));
    must(usp_world_alloc(world, sizes.saved, &saved));
    fill(q, COUNT, 1), fill(k, COUNT, 2), fill(v, COUNT, 3), fill(dout, COUNT, 4);

    usp_forward forward = {.struct_size = sizeof forward,
                           .q = dense(q, 100, 2, 16),
                           .k = dense(k, 100, 2, 16),
                           .v = dense(v, 100, 2, 16),
                           .out = dense(out, 100, 2, 16),
                           .saved = saved};
    must(usp_layer_forward(layer, &forward, workspace, bytes, NULL));
    usp_backward backward = {.struct_size = sizeof backward,
                             .q = forward.q,
                             .k = forward.k,
                             .v = forward.v,
                             .out = forward.out,
                             .dout = dense(dout, 100, 2, 16),
                             .dq = dense(dq, 100, 2, 16),
                             .dk = dense(dk, 100, 2, 16),
                             .dv = dense(dv, 100, 2, 16),
                             .saved = saved};
    must(usp_layer_backward(layer, &backward, workspace, bytes, NULL));

    /* The same from the definition. */
    static float out_plain[COUNT], dq_plain[COUNT], dk_plain[COUNT], dv_plain[COUNT];
    example_shape shape = {.batch = 1, .tokens = 100, .heads = 2, .dim = 16};
    plain_forward(&shape, q, k, v, out_plain);
    plain_backward(&shape, q, k, v, dout, dq_plain, dk_plain, dv_plain);
    int failures = report("out", difference(out, out_plain, COUNT), 1e-5);
    failures += report("dq", difference(dq, dq_plain, COUNT), 1e-5);
    failures += report("dk", difference(dk, dk_plain, COUNT), 1e-5);
    failures += report("dv", difference(dv, dv_plain, COUNT), 1e-5);

    usp_world_free(world, saved);
    usp_world_free(world, workspace);
    usp_layer_destroy(layer);
    usp_sequence_destroy(sequence);
    usp_mesh_destroy(mesh);
    usp_world_destroy(world);
    usp_rendezvous_destroy(rendezvous);
    return failures != 0;
}
