/* formulas.h - layers on inputs that show what is inside: which pairs dropout keeps, and what is lost where scores are
 * large. Bodies for usp_ranks_run. */
#ifndef USP_TESTS_FORMULAS_H
#define USP_TESTS_FORMULAS_H
#include "ranks.h"

/* Which pairs are dropped: the words of lib/dropout.h say, and the results are the same bit for bit on every mesh and
 * layout. argument: none. */
int usp_body_dropped(usp_rank *rank, void *argument);

/* f32, keys with a common offset, so that lse is about -1, -100 and -1e4: the RMS error of dq by the oracle, for ring =
 * world size. argument: usp_offsets. */
enum { USP_OFFSETS = 3 };
typedef struct usp_offsets {
    double dq[USP_OFFSETS]; /* written by rank 0 */
} usp_offsets;
int usp_body_offsets(usp_rank *rank, void *argument);

#endif
