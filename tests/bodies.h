/* bodies.h - what is tested of running layers, as bodies for usp_ranks_run: the same on thread-ranks and on GPUs.
 * Judges by the oracle and by properties; needs the public API only. */
#ifndef USP_TESTS_BODIES_H
#define USP_TESTS_BODIES_H
#include "reference.h"

/* Runs a case and compares it with the oracle. 0, or 1 if the rank cannot go on. */
int usp_check_case(usp_rank *rank, const usp_case *c, usp_references *references);

/* Runs a case that must work. 0, or 1 if the rank cannot go on. */
int usp_run_case(usp_rank *rank, const usp_case *c, usp_whole *whole);
/* Runs the case on every mesh of the world's size and compares with `first`, which the very first run becomes. */
int usp_compare_meshes(usp_rank *rank, usp_case c, usp_whole *first);
/* The mesh that a property test runs on: both axes where the size allows. */
void usp_choose_mesh(const usp_rank *rank, usp_case *c);

/* Each case of a table on every mesh of the world's size (over `copies` data copies). argument: usp_table_run. */
typedef struct usp_table_run {
    const usp_table *table;
    int copies; /* 0: 1 */
    usp_references *references;
} usp_table_run;
int usp_body_table(usp_rank *rank, void *argument);
/* The features' table on every layout, in every dtype, on every mesh of the world's size. argument: usp_references. */
int usp_body_features(usp_rank *rank, void *argument);

/* One case on every mesh and layout: the results agree. argument: none. */
int usp_body_independent(usp_rank *rank, void *argument);

/* The same ring with more and more ulysses ranks: bit for bit as in the first world. argument: usp_across. */
enum { USP_ACROSS_CASES = 6 };
typedef struct usp_across {
    int ring;
    usp_whole first[USP_ACROSS_CASES];
} usp_across;
int usp_body_across_ulysses(usp_rank *rank, void *argument);
void usp_across_free(usp_across *across);

/* Keys of one rank that are NaN, in whichever step of the ring they are met: every result of softmax is NaN. */
int usp_body_not_a_number(usp_rank *rank, void *argument);
/* Packed and other arrangements: bit for bit as [B,S,H,D]. */
int usp_body_arrangements(usp_rank *rank, void *argument);
/* Twice, with layers between and without saved: bit for bit the same. */
int usp_body_repeats(usp_rank *rank, void *argument);
/* tokens -> heads -> tokens is the identity, or its multiple for heads that several ranks hold. */
int usp_body_round_trip(usp_rank *rank, void *argument);
/* exchange, inner stage, exchange: bit for bit the layer. */
int usp_body_parts(usp_rank *rank, void *argument);
/* attention(q, k, 2 v1 - 3 v2) = 2 attention(q, k, v1) - 3 attention(q, k, v2). */
int usp_body_linearity(usp_rank *rank, void *argument);
/* Three layers of both kinds in a row on tokens that never move, forward and back: any mesh for each, one result. */
int usp_body_switch(usp_rank *rank, void *argument);
/* Chain and gather agree; states computed again give what states kept give. */
int usp_body_states(usp_rank *rank, void *argument);
/* A sequence in two halves, the final state of the first being the initial one of the second, is the whole sequence. */
int usp_body_continue(usp_rank *rank, void *argument);

/* Workspace and saved in memory that is registered with every rank: bit for bit the same. */
int usp_body_shared_memory(usp_rank *rank, void *argument);
/* Heads in groups give the bits that they give at once (groups.c). argument: none */
int usp_body_groups(usp_rank *rank, void *argument);
/* Axes over two transports give the bits that they give over one, and each takes the right one (lanes.c). Puts a trace
 * into the world: comes last. argument: none */
int usp_body_lanes(usp_rank *rank, void *argument);
/* Two data copies with sequences and layers of their own. argument: usp_references */
int usp_body_unlike_copies(usp_rank *rank, void *argument);

/* The f32 error against the oracle for ring = world size. argument: usp_growth. */
typedef struct usp_growth {
    usp_references *references;
    double softmax[USP_ITEMS], linear[USP_ITEMS]; /* RMS error of each tensor, written by rank 0 */
} usp_growth;
int usp_body_growth(usp_rank *rank, void *argument);

#endif
