/* 11_windows_between_full.c - layers with a sliding window between layers that see all, on one sequence: mask, mesh and
 * route are a layer's own, tokens never move. Four thread-ranks. Checked: every layer against the definition; that on a
 * ring the route that auto chooses for a window sends less than the relay ring. */
#include "masked.h"

#include <stdio.h>
#include <stdlib.h>

enum { RANKS = 4, LAYERS = 4, TOKENS = 400, HEADS = 4, DIM = 16 };

/* window_left: keys before the query that it sees, 0 all. */
static const struct {
    int64_t window_left;
    int ulysses, ring;
    usp_route route;
} stack[LAYERS] = {
    {19, 1, 4, USP_ROUTE_AUTO}, {0, 4, 1, USP_ROUTE_AUTO}, {19, 1, 4, USP_ROUTE_RELAY}, {0, 2, 2, USP_ROUTE_DIRECT}};

typedef struct shared {
    example_shape shape;
    masked_pass pass, expected[2]; /* of the window, of all */
} shared;

static usp_layer *create_layer(const usp_mesh *mesh, usp_sequence *sequence, int i) {
    usp_layer *layer;
    usp_layer_config config = {.struct_size = sizeof config,
                               .attention = USP_SOFTMAX,
                               .mask = USP_MASK_CAUSAL,
                               .dtype = USP_F32,
                               .batch = 1,
                               .heads = HEADS,
                               .head_dim = DIM,
                               .window_left = stack[i].window_left,
                               .route = stack[i].route};
    must(usp_layer_create(mesh, sequence, &config, &layer));
    return layer;
}

static int64_t ring_bytes(const usp_layer *layer) {
    usp_cost cost = {.struct_size = sizeof cost};
    must(usp_layer_get_cost(layer, USP_PASS_FORWARD, &cost));
    return cost.ring_send;
}

static void check_layer(masked_rank *me, usp_sequence *sequence, usp_layer *layer, int i) {
    shared *all = me->all;
    char what[64];
    masked_pass mine = masked_pass_again(&all->shape, &all->pass);
    run_layer(me->world, sequence, layer, &all->shape, &mine);
    snprintf(what, sizeof what, "layer %d, %d x %d, %s", i, stack[i].ulysses, stack[i].ring,
             stack[i].window_left ? "window" : "all");
    if (me->rank == 0)
        me->failures += report_pass(what, &mine, &all->expected[!stack[i].window_left], example_elements(&all->shape));
    masked_results_free(&mine);
}

static void run_stack(masked_rank *me) {
    usp_mesh *mesh[LAYERS];
    usp_sequence *sequence;
    usp_layer *layer[LAYERS];
    usp_sequence_config tokens = {.struct_size = sizeof tokens, .layout = USP_LAYOUT_CONTIGUOUS, .tokens = TOKENS};
    for (int i = 0; i < LAYERS; i++) must(usp_mesh_create(me->world, stack[i].ulysses, stack[i].ring, &mesh[i]));
    must(usp_sequence_create(mesh[0], &tokens, &sequence)); /* good for all meshes of as many ranks */
    for (int i = 0; i < LAYERS; i++) {
        layer[i] = create_layer(mesh[i], sequence, i);
        check_layer(me, sequence, layer[i], i);
    }
    int64_t seen = ring_bytes(layer[0]), relayed = ring_bytes(layer[2]);
    if (me->rank == 0) printf("a window on the ring: %lld bytes of %lld\n", (long long)seen, (long long)relayed);
    me->failures += seen >= relayed;
    for (int i = 0; i < LAYERS; i++) usp_layer_destroy(layer[i]);
    usp_sequence_destroy(sequence);
    for (int i = 0; i < LAYERS; i++) usp_mesh_destroy(mesh[i]);
}

static int sees(const void *window_left, int query, int key) {
    int64_t left = *(const int64_t *)window_left;
    return key <= query && (!left || query - key <= left);
}

int main(void) {
    shared all = {.shape = {.batch = 1, .tokens = TOKENS, .heads = HEADS, .dim = DIM}};
    all.pass = masked_pass_make(&all.shape);
    for (int i = 0; i < 2; i++) {
        all.expected[i] = masked_pass_again(&all.shape, &all.pass);
        plain_masked(&all.shape, sees, &stack[i].window_left, &all.expected[i]);
    }
    int failures = run_ranks(RANKS, run_stack, &all);
    for (int i = 0; i < 2; i++) masked_results_free(&all.expected[i]);
    masked_pass_free(&all.pass);
    return failures != 0;
}
