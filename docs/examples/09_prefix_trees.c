/* 09_prefix_trees.c - a prompt and its rollouts in one row, as reinforcement learning makes them: the prompt is
 * computed once, and every rollout sees it and itself, but no other rollout. Two prompts; one rollout branches again.
 * Four thread-ranks, ulysses 2 x ring 2. Checked: each branch, from its root to its leaf, gives what it gives alone. */
#include "masked.h"

#include <stdlib.h>
#include <string.h>

enum { DOCUMENTS = 7, TOKENS = 190, HEADS = 4, DIM = 16, ROW = HEADS * DIM };

static const int64_t ends[DOCUMENTS] = {60, 75, 95, 101, 130, 170, 190};
/* 0 is a prompt, 1 its first rollout; 2 is another, which 3 and 4 continue; 5 is a prompt with one rollout. */
static const int64_t parents[DOCUMENTS] = {-1, 0, 0, 2, 2, -1, 5};

static int64_t begin_of(int64_t document) {
    return document ? ends[document - 1] : 0;
}

typedef struct shared {
    example_shape shape;
    masked_pass pass, alone;
} shared;

/* ---- the tree in one call ---------------------------------------------------------------------------------------- */

static void run_tree(masked_rank *me) {
    shared *all = me->all;
    usp_mesh *mesh;
    usp_sequence *sequence;
    usp_layer *layer;
    usp_sequence_config trees = {.struct_size = sizeof trees,
                                 .tokens = TOKENS,
                                 .documents = DOCUMENTS,
                                 .document_ends = ends,
                                 .parents = parents};
    usp_layer_config causal = {.struct_size = sizeof causal,
                               .attention = USP_SOFTMAX,
                               .mask = USP_MASK_CAUSAL,
                               .dtype = USP_F32,
                               .batch = 1,
                               .heads = HEADS,
                               .head_dim = DIM};
    must(usp_mesh_create(me->world, 2, 2, &mesh));
    must(usp_sequence_create(mesh, &trees, &sequence));
    must(usp_layer_create(mesh, sequence, &causal, &layer));
    masked_pass mine = masked_pass_again(&all->shape, &all->pass);
    run_layer(me->world, sequence, layer, &all->shape, &mine);
    if (me->rank == 0) me->failures += report_pass("tree", &mine, &all->alone, TOKENS * ROW);
    masked_results_free(&mine);
    usp_layer_destroy(layer);
    usp_sequence_destroy(sequence);
    usp_mesh_destroy(mesh);
}

/* ---- every branch alone ------------------------------------------------------------------------------------------ */

/* The tokens from the root to the end of a document, as indices of the row. */
static int path_of(int64_t document, int *token) {
    int count = parents[document] < 0 ? 0 : path_of(parents[document], token);
    for (int64_t t = begin_of(document); t < ends[document]; t++) token[count++] = (int)t;
    return count;
}

static int sees_before(const void *mask, int query, int key) {
    (void)mask;
    return key <= query;
}

static void take(float *to, const float *from, const int *token, int count) {
    for (int i = 0; i < count; i++) memcpy(to + i * ROW, from + token[i] * ROW, ROW * sizeof *to);
}

static void add(float *to, const float *from, const int *token, int count) {
    for (int i = 0; i < count; i++)
        for (int j = 0; j < ROW; j++) to[token[i] * ROW + j] += from[i * ROW + j];
}

/* Adds what a document gives along its path. Only its own queries have a gradient there: its ancestors' are counted
 * where they are the last of a path. */
static void add_path(const shared *all, int64_t document) {
    int token[TOKENS], count = path_of(document, token), own = (int)(ends[document] - begin_of(document));
    example_shape shape = {.batch = 1, .tokens = count, .heads = HEADS, .dim = DIM};
    masked_pass path = masked_pass_make(&shape);
    take((float *)path.q, all->pass.q, token, count);
    take((float *)path.k, all->pass.k, token, count);
    take((float *)path.v, all->pass.v, token, count);
    take((float *)path.dout, all->pass.dout, token, count);
    memset((float *)path.dout, 0, (size_t)(count - own) * ROW * sizeof(float));
    plain_masked(&shape, sees_before, NULL, &path);
    add(all->alone.out, path.out + (count - own) * ROW, token + count - own, own);
    add(all->alone.dq, path.dq, token, count);
    add(all->alone.dk, path.dk, token, count);
    add(all->alone.dv, path.dv, token, count);
    masked_pass_free(&path);
}

int main(void) {
    shared all = {.shape = {.batch = 1, .tokens = TOKENS, .heads = HEADS, .dim = DIM}};
    all.pass = masked_pass_make(&all.shape);
    all.alone = masked_pass_again(&all.shape, &all.pass);
    float *const sums[] = {all.alone.out, all.alone.dq, all.alone.dk, all.alone.dv};
    for (int i = 0; i < 4; i++) memset(sums[i], 0, TOKENS * ROW * sizeof(float));
    for (int64_t document = 0; document < DOCUMENTS; document++) add_path(&all, document);
    int failures = run_ranks(4, run_tree, &all);
    masked_results_free(&all.alone);
    masked_pass_free(&all.pass);
    return failures != 0;
}
