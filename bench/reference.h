/* reference.h - the checker of usp_bench: attention in double at sampled rows, from the whole tensors.
 * It shares no code with the library but the words of dropout, which say what is right; what a row costs grows linearly
 * with the sequence. */
#ifndef USP_REFERENCE_H
#define USP_REFERENCE_H
#include "inputs.h"

typedef enum usp_result_tensor {
    USP_CHECK_OUT = 0,
    USP_CHECK_DQ = 1,
    USP_CHECK_DK = 2,
    USP_CHECK_DV = 3
} usp_result_tensor;

/* What one rank gives to the check: host copies of its own tensors, dense [batch, local_tokens, heads, dim]. */
typedef struct usp_reference {
    const usp_case *config;
    const usp_layer_config *layer; /* with its arrays */
    const usp_sequence *sequence;
    int rank;                      /* on the sequence */
    int32_t *document;             /* [seq] of each token; NULL: all of one */
    const float *sinks;            /* [heads] or NULL */
    const uint64_t *dropout_state; /* seed, offset */
    void *out, *lse;               /* the layer's results; gradients only where checked */
    void *dq, *dk, *dv, *dsinks;
} usp_reference;

typedef struct usp_verdict {
    double max_error;       /* largest |x - reference| / (|reference| + size of the row) */
    int64_t checked, wrong; /* sampled elements */
} usp_verdict;

double usp_reference_tolerance(usp_dtype dtype);
/* Collective. Adds one tensor's samples to this rank's verdict. Row statistics that dk and dv need for all queries are
 * computed in double up to 2048 tokens, and above come from the layer's own out and lse, which have been checked. */
usp_status usp_reference_check(const usp_reference *reference, usp_result_tensor tensor, usp_tool_error *error,
                               usp_verdict *verdict);
/* Collective. The same of dsinks. */
usp_status usp_reference_check_sinks(const usp_reference *reference, usp_tool_error *error, usp_verdict *verdict);

#endif
