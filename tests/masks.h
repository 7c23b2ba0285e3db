/* masks.h - what must hold of any mask: one result for every mesh, layout and route; documents as if alone; and masks
 * that say the same in other words. Bodies for usp_ranks_run. */
#ifndef USP_TESTS_MASKS_H
#define USP_TESTS_MASKS_H
#include "ranks.h"

/* Masks and features on every mesh, layout and route: the results agree. argument: none, as of all that follow. */
int usp_body_masks(usp_rank *rank, void *argument);
/* A packed batch, softmax and linear, is its documents run alone. */
int usp_body_packed(usp_rank *rank, void *argument);
/* Masks, documents and keys that say the same in other words. */
int usp_body_twins(usp_rank *rank, void *argument);
/* A window of all tokens is none, bit for bit. */
int usp_body_whole_window(usp_rank *rank, void *argument);
/* A tree that is one chain of parents is causal, whatever is changed of the scores. */
int usp_body_chain(usp_rank *rank, void *argument);
/* Sinks of -inf are none, bit for bit, and get no gradient. */
int usp_body_no_sinks(usp_rank *rank, void *argument);
/* Dropout that drops next to nothing is none. */
int usp_body_little_dropout(usp_rank *rank, void *argument);

#endif
