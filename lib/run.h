/* run.h - what running a layer needs and moves, for layer.c and cost.c to report. */
#ifndef USP_RUN_H
#define USP_RUN_H
#include "frame.h"

/* Found once, at create: nothing that is re-planned later changes them. */
usp_sizes usp_run_sizes(const usp_layer *layer, uint64_t *shape);
/* Posts what a pass sends and receives on the ulysses axis, to be counted. */
void usp_run_count_messages(const usp_layer *layer, usp_pass pass, usp_messages *count);

#endif
