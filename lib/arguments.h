/* arguments.h - checks of what the caller gives to a call: before anything moves. */
#ifndef USP_ARGUMENTS_H
#define USP_ARGUMENTS_H
#include "layer.h"

/* All operands of a pass, by the kind's table; `inner`: of the inner stage's shapes. INVALID names the field. */
usp_status usp_check_operands(const usp_layer *layer, usp_pass pass, const void *args, int inner);

/* Tensors of the head exchange alone: own tokens of all heads, own heads of the ring rank's rows. */
usp_status usp_check_ends(const usp_layer *layer, usp_operand operand, const usp_tensor *tokens,
                          const usp_tensor *heads, int to_heads);

/* INVALID too where the layer was promised shared memory and this is none. Ranks compare where it is, which must be
 * alike. */
usp_status usp_check_workspace(usp_layer *layer, usp_memory kind, const void *workspace, size_t bytes, size_t needed);
usp_status usp_check_saved(usp_layer *layer, const void *saved, const char *name);

#endif
