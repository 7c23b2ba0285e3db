/* planned.h - lists of work as layers have them, from lib/plan.h, for tests of single kernels: one rank with the whole
 * of one sequence. */
#ifndef USP_TESTS_PLANNED_H
#define USP_TESTS_PLANNED_H
#include "plan.h"

typedef struct usp_planned {
    usp_rendezvous *rendezvous;
    usp_world *world;
    usp_mesh *mesh;
    usp_sequence *sequence;
    usp_plan *plan; /* its arrays: in host memory, and for the device */
} usp_planned;

/* `keys` as many as queries under a causal mask. Close also what could not be opened. */
usp_status usp_planned_open(usp_planned *planned, usp_device_kind device, usp_attention attention, usp_mask mask,
                            int64_t queries, int64_t keys);
void usp_planned_close(usp_planned *planned);

#endif
