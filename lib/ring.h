/* ring.h - what a ring rank holds after the head exchange: the tokens of ranks r * U + u, u = 0 .. U-1, as one block of
 * rows in position order; where there is no exchange, in the rank's own order. Plain integers. */
#ifndef USP_RING_H
#define USP_RING_H
#include "layout.h"

enum { USP_MOST_RUNS = 8 };

/* Runs of a rank's tokens whose rows in the own block lie side by side: run i is tokens begin[i] .. begin[i + 1] - 1.
 * Where there are more than USP_MOST_RUNS, `runs` is larger too and says no more. */
typedef struct usp_landing_runs {
    int runs;
    int64_t begin[USP_MOST_RUNS + 1];
} usp_landing_runs;

/* One side (queries or keys) of all ring ranks. */
typedef struct usp_ring_side {
    int64_t *first;       /* [ring + 1] rows of all blocks before */
    int32_t *position;    /* [tokens] of every row, block after block */
    int64_t *run;         /* rows where positions ascend no more, or a block begins; and the end */
    int64_t *first_run;   /* [ring + 1] */
    int32_t *landing;     /* [own rows] by u, then in the local order of that rank: the row of the own block */
    int64_t *landing_end; /* [ulysses] */
    usp_landing_runs *landing_runs; /* [ulysses] */
    void *scratch;                  /* for planning without allocation; NULL where there is no exchange */
} usp_ring_side;

/* What tells blocks of one sharding apart. */
typedef struct usp_grid {
    int ulysses, ring, u, r;
} usp_grid;

/* Room for all that the sharding may become, of `tokens` tokens at most. */
usp_status usp_ring_side_alloc(const usp_host *host, usp_ring_side *side, const usp_grid *grid,
                               const usp_sharding *sharding, int64_t tokens);
void usp_ring_side_free(const usp_host *host, usp_ring_side *side);
void usp_ring_side_plan(usp_ring_side *side, const usp_sharding *sharding, const usp_grid *grid);

static inline int64_t usp_ring_rows(const usp_ring_side *side, int r) {
    return side->first[r + 1] - side->first[r];
}

#endif
