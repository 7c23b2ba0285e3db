/* head_sums.h - sums over layer heads that share one head of an operand. */
#ifndef USP_HEAD_SUMS_H
#define USP_HEAD_SUMS_H
#include "layer.h"

/* fp32 rows of the own layer heads, spoiled; the operand, whose heads the map groups them into. */
typedef struct usp_head_sum {
    int64_t tokens;
    int dim;
    usp_tensor sums, to;
    usp_head_map map;
    usp_dtype to_dtype;
} usp_head_sum;

/* Sums each group in the order of its heads. */
usp_status usp_heads_sum(usp_layer *layer, const usp_head_sum *sum, usp_stream stream);

#endif
