/* 10_text_and_image.c - rows of an image and the text about it, packed: the tokens of an image see each other both
 * ways, those of the text see the image and what was said before. That is a prefix a document, under a causal mask. The
 * layout is a custom one: of each image every rank has an equal piece, since each of its tokens works alike, and of
 * each text two chunks, zigzag, since late tokens see more. Four thread-ranks, ulysses 2 x ring 2. */
#include "masked.h"

#include <stdio.h>
#include <stdlib.h>

enum { RANKS = 4, DOCUMENTS = 3, TOKENS = 251, HEADS = 4, DIM = 16, SEGMENTS = 3 * DOCUMENTS };

static const int64_t ends[DOCUMENTS] = {100, 140, 251};
static const int64_t images[DOCUMENTS] = {64, 33, 64}; /* tokens of each document's image, which come first */

typedef struct shared {
    example_shape shape;
    masked_pass pass, expected;
} shared;

/* ---- the layout -------------------------------------------------------------------------------------------------- */

/* Piece `index` of `pieces` of the tokens begin .. end; there may be none. */
static int add_piece(usp_segment *segment, int count, int64_t begin, int64_t end, int64_t index, int64_t pieces) {
    int64_t first = begin + (end - begin) * index / pieces, last = begin + (end - begin) * (index + 1) / pieces;
    if (first == last) return count;
    segment[count] = (usp_segment){first, last - first, 1};
    return count + 1;
}

static int own_segments(int rank, usp_segment *segment) {
    int count = 0;
    for (int d = 0; d < DOCUMENTS; d++) {
        int64_t begin = d ? ends[d - 1] : 0, text = begin + images[d];
        count = add_piece(segment, count, begin, text, rank, RANKS);
        count = add_piece(segment, count, text, ends[d], rank, 2 * RANKS);
        count = add_piece(segment, count, text, ends[d], 2 * RANKS - 1 - rank, 2 * RANKS);
    }
    return count;
}

/* ---- one rank ---------------------------------------------------------------------------------------------------- */

static void say_balance(const usp_layer *layer) {
    usp_cost cost = {.struct_size = sizeof cost};
    must(usp_layer_get_cost(layer, USP_PASS_FORWARD, &cost));
    printf("busiest rank: %.2f x the mean\n", cost.flops_max / cost.flops_mean);
}

static void run_rows(masked_rank *me) {
    shared *all = me->all;
    usp_mesh *mesh;
    usp_sequence *sequence;
    usp_layer *layer;
    usp_segment segment[SEGMENTS];
    usp_sequence_config rows = {.struct_size = sizeof rows,
                                .layout = USP_LAYOUT_CUSTOM,
                                .tokens = TOKENS,
                                .documents = DOCUMENTS,
                                .document_ends = ends,
                                .prefixes = images,
                                .segments = own_segments(me->rank, segment),
                                .segment = segment};
    usp_layer_config causal = {.struct_size = sizeof causal,
                               .attention = USP_SOFTMAX,
                               .mask = USP_MASK_CAUSAL,
                               .dtype = USP_F32,
                               .batch = 1,
                               .heads = HEADS,
                               .head_dim = DIM};
    must(usp_mesh_create(me->world, 2, 2, &mesh));
    must(usp_sequence_create(mesh, &rows, &sequence));
    must(usp_layer_create(mesh, sequence, &causal, &layer));
    masked_pass mine = masked_pass_again(&all->shape, &all->pass);
    run_layer(me->world, sequence, layer, &all->shape, &mine);
    if (me->rank == 0) {
        me->failures += report_pass("text and image", &mine, &all->expected, example_elements(&all->shape));
        say_balance(layer);
    }
    masked_results_free(&mine);
    usp_layer_destroy(layer);
    usp_sequence_destroy(sequence);
    usp_mesh_destroy(mesh);
}

/* ---- the mask in words ------------------------------------------------------------------------------------------- */

static int document_of(int token) {
    int d = 0;
    while (token >= ends[d]) d++;
    return d;
}

static int sees(const void *mask, int query, int key) {
    int d = document_of(query);
    int64_t begin = d ? ends[d - 1] : 0;
    (void)mask;
    return document_of(key) == d && (key <= query || key < begin + images[d]);
}

int main(void) {
    shared all = {.shape = {.batch = 1, .tokens = TOKENS, .heads = HEADS, .dim = DIM}};
    all.pass = masked_pass_make(&all.shape);
    all.expected = masked_pass_again(&all.shape, &all.pass);
    plain_masked(&all.shape, sees, NULL, &all.expected);
    int failures = run_ranks(RANKS, run_rows, &all);
    masked_results_free(&all.expected);
    masked_pass_free(&all.pass);
    return failures != 0;
}
