/* costs.h - what a trace saw of a layer, against its stated cost and against what may be copied, exchanged and waited
 * for; as bodies for usp_ranks_run. Looks at no result. */
#ifndef USP_TESTS_COSTS_H
#define USP_TESTS_COSTS_H
#include "stage.h"

/* Every case of a table on every mesh, with as many data copies as the world has room for: bytes by axis, sent and
 * received, are the cost's, forward and backward, none go to another copy, and no exchange is larger than what the
 * transport was told at create.
 * argument: const usp_table. */
int usp_body_costs(usp_rank *rank, void *argument);
/* The same of a layer that has no token and moves nothing but states. argument: none. */
int usp_body_states_alone(usp_rank *rank, void *argument);
/* Linear attention: the ring moves as many bytes for twice the tokens. argument: none. */
int usp_body_constant_traffic(usp_rank *rank, void *argument);
/* Costs of even shapes against the formulas of the literature. argument: none. */
int usp_body_formulas(usp_rank *rank, void *argument);
/* Linear attention: the states that each rank sends and receives, by chain and by gather, and what is kept for
 * backward. argument: none. */
int usp_body_travel(usp_rank *rank, void *argument);
/* Floating-point operations of every rank, forward and backward, both kinds. argument: none. */
int usp_body_flops(usp_rank *rank, void *argument);

/* Ulysses alone: two exchanges a pass, whatever travels. argument: none. */
int usp_body_exchanges(usp_rank *rank, void *argument);
/* No ulysses: no rows are copied but the keys and values that the ring sends. argument: none. CPU only. */
int usp_body_copies(usp_rank *rank, void *argument);
/* Linear attention: work inside the chunks is enqueued while states travel, and before anything waits for them.
 * argument: none. CPU only. */
int usp_body_overlap(usp_rank *rank, void *argument);

#endif
