/* spread.h - how far one NaN or infinity in an input may reach, as a body for usp_ranks_run. */
#ifndef USP_TESTS_SPREAD_H
#define USP_TESTS_SPREAD_H
#include "reference.h"

/* Both kinds, all masks, layouts and operands, on every mesh of the world's size: what depends on the element, by the
 * oracle's loops over allowed pairs, is not finite, and all else is bit for bit as it is without. argument: none. */
int usp_body_spread(usp_rank *rank, void *argument);

#endif
