/* masked.h - what the examples about masks share: ranks that are threads, a layer run on whole tensors of the host, and
 * the definition of attention under any mask. */
#ifndef MASKED_H
#define MASKED_H
#include "example.h"

/* One rank. `all` is the same for all of them. */
typedef struct masked_rank {
    usp_world *world;
    int rank, ranks, failures;
    void *all;
} masked_rank;

/* Runs `body` on so many thread-ranks of the CPU, each with its own world; returns all failures. */
int run_ranks(int ranks, void (*body)(masked_rank *me), void *all);

/* Whole tensors [tokens, heads, dim] of one forward and backward pass. */
typedef struct masked_pass {
    const float *q, *k, *v, *dout;
    float *out, *dq, *dk, *dv;
} masked_pass;

/* Collective: own tokens of what is given through the layer, and whole results on every rank. Batch 1, f32. */
void run_layer(usp_world *world, const usp_sequence *sequence, usp_layer *layer, const example_shape *shape,
               const masked_pass *pass);

/* May a query see a key? */
typedef int (*masked_sees)(const void *mask, int query, int key);

/* The same from the definition. A query that sees nothing gets 0. */
void plain_masked(const example_shape *shape, masked_sees sees, const void *mask, const masked_pass *pass);

/* Memory for a pass of random inputs; its results are NaN. */
masked_pass masked_pass_make(const example_shape *shape);
/* The same inputs, and results of its own. */
masked_pass masked_pass_again(const example_shape *shape, const masked_pass *pass);
void masked_pass_free(const masked_pass *pass);
void masked_results_free(const masked_pass *pass);

/* Reports all four results; returns how many are wrong. */
int report_pass(const char *what, const masked_pass *pass, const masked_pass *expected, size_t count);

#endif
