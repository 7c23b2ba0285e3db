/* slices.h - work in slices of heads, so that one slice travels while another is worked on: the last stage of a ring's
 * backward pass, where the gradients of keys go home, and groups of heads in the head exchange. A head's results do not
 * depend on which others are worked on beside it. */
#ifndef USP_SLICES_H
#define USP_SLICES_H
#include "layer.h"

/* The same on all ranks of a ring. One: gradients are sent whole, as where the transport does not reach, of several
 * batch entries or parcels, and of too little work. */
int usp_slice_count(const usp_layer *layer);

/* Groups of heads of an exchanged call: the same on all ranks of the mesh. */
int usp_group_count(const usp_layer *layer);

/* The part of a kernel's arguments that a slice works on: all heads, or of one batch entry. */
usp_softmax usp_slice_of(const usp_softmax *whole, usp_slice slice);

/* The tensor from one of its heads on. */
usp_tensor usp_from_head(usp_tensor x, usp_dtype dtype, int head);

#endif
