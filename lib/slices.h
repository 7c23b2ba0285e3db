/* slices.h - the last stage of a ring's backward pass in slices of heads, so that the gradients of one slice's keys go
 * home while the next slice is worked on. A head's results do not depend on which others are worked on beside it. */
#ifndef USP_SLICES_H
#define USP_SLICES_H
#include "layer.h"

typedef struct usp_slice {
    int number, count;
} usp_slice;

/* The same on all ranks of a ring. One: gradients are sent whole, as where the transport does not reach, of several
 * batch entries or parcels, and of too little work. */
int usp_slice_count(const usp_layer *layer);

/* The part of a kernel's arguments that a slice works on, but for dk and dv. */
usp_softmax usp_slice_of(const usp_softmax *whole, usp_slice slice);

/* The tensor from one of its heads on. */
usp_tensor usp_from_head(usp_tensor x, usp_dtype dtype, int head);

#endif
