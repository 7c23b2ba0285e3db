/* head_sums.c - the heads of a group are added to its first, one after the other. The first group may be cut. */
#include "head_sums.h"
#include "error.h"

/* Heads first, first + step, ... as a tensor. */
static usp_tensor every_head(usp_tensor x, usp_dtype dtype, int first, int step) {
    x.data = (char *)x.data + first * x.stride_head * (int64_t)usp_dtype_size(dtype);
    x.stride_head *= step;
    return x;
}

/* Adds member m > 0 of every group to the group's first member; m = 0: writes that where it belongs. */
static usp_status add_member(usp_layer *layer, const usp_head_sum *s, int m, usp_stream stream) {
    int own = usp_layer_own_heads(layer), group = s->map.group, cut = group - s->map.offset;
    usp_copy copy = {.tokens = s->tokens,
                     .batch = layer->config.batch,
                     .dim = s->dim,
                     .from_dtype = USP_F32,
                     .to_dtype = m ? USP_F32 : s->to_dtype,
                     .accumulate = m > 0};
    if (m < cut && m < own) {
        copy.heads = 1;
        copy.from = every_head(s->sums, USP_F32, m, 1);
        copy.to = m ? s->sums : s->to;
        usp_copies_add(layer, copy);
    }
    if (cut + m < own) {
        copy.heads = (own - cut - m + group - 1) / group;
        copy.from = every_head(s->sums, USP_F32, cut + m, group);
        copy.to = m ? every_head(s->sums, USP_F32, cut, group) : every_head(s->to, s->to_dtype, 1, 1);
        usp_copies_add(layer, copy);
    }
    return usp_copies_run(layer, stream);
}

usp_status usp_heads_sum(usp_layer *layer, const usp_head_sum *sum, usp_stream stream) {
    for (int m = 1; m < sum->map.group && m < usp_layer_own_heads(layer); m++)
        USP_TRY(add_member(layer, sum, m, stream));
    return add_member(layer, sum, 0, stream);
}
