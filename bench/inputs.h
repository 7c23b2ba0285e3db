/* inputs.h - the test tensors of usp_bench: every element is a function of its global place.
 * So no rank ever holds a whole tensor, and the checker can make any row again. */
#ifndef USP_INPUTS_H
#define USP_INPUTS_H
#include "options.h"

typedef enum usp_input { USP_INPUT_Q = 0, USP_INPUT_K = 1, USP_INPUT_V = 2, USP_INPUT_DOUT = 3 } usp_input;

/* The layer's H: heads of its output. */
int usp_inputs_out_heads(const usp_case *c);
int usp_inputs_heads(const usp_case *c, usp_input input);
int usp_inputs_dim(const usp_case *c, usp_input input);
/* The row of one token and head, as it is after rounding to the case's dtype. [dim] */
void usp_inputs_row(const usp_case *c, usp_input input, int batch, int64_t token, int head, double *row);
/* A rank's own part, [batch, local_tokens, heads, dim] of the case's dtype; host memory. */
void usp_inputs_fill(const usp_case *c, usp_input input, const usp_sequence *sequence, int rank, void *local);
/* A sink for each head, [heads]. */
void usp_inputs_sinks(const usp_case *c, float *sinks);

#endif
