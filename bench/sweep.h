/* sweep.h - the cases that the options of usp_bench ask for.
 * In the order of the rows. */
#ifndef USP_SWEEP_H
#define USP_SWEEP_H
#include "options.h"

/* All cases on `size` ranks; the meshes of one shape are neighbours. NULL with a sentence if there are none. */
usp_case *usp_sweep_cases(const usp_options *options, int size, usp_device_kind device, size_t *count,
                          usp_tool_error *error);

#endif
