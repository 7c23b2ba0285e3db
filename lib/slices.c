/* slices.c - slices of heads. */
#include "slices.h"

enum { MOST_SLICES = 4 };

/* Heads that share a key are in one slice. */
int usp_slice_count(const usp_layer *layer) {
    usp_head_map map = usp_layer_head_map(layer, USP_KEY);
    int heads = usp_layer_own_heads(layer), keys = usp_layer_heads(layer, USP_KEY, layer->mesh.u).count;
    int64_t items = heads * ((layer->plan->key_limit + USP_WORK_ROWS - 1) / USP_WORK_ROWS);
    int count = MOST_SLICES;
    if (layer->plan->route.stages == 1 || !layer->alike || layer->config.batch > 1 ||
        !usp_route_is_single(&layer->plan->route))
        return 1;
    if (map.offset || keys * map.group != heads) return 1;
    while (count > 1 && (keys % count || items < count * layer->needs.items)) count /= 2;
    return count;
}

usp_tensor usp_from_head(usp_tensor x, usp_dtype dtype, int head) {
    x.data = x.data ? (char *)x.data + head * x.stride_head * (int64_t)usp_dtype_size(dtype) : NULL;
    return x;
}

/* Of one batch entry. */
usp_softmax usp_slice_of(const usp_softmax *whole, usp_slice slice) {
    usp_softmax part = *whole;
    int heads = whole->heads / slice.count, keys = whole->key_heads / slice.count;
    int head = slice.number * heads, key = slice.number * keys;
    part.heads = heads;
    part.key_heads = keys;
    part.q = usp_from_head(whole->q, whole->dtype, head);
    part.dout = usp_from_head(whole->dout, whole->dtype, head);
    part.dq = usp_from_head(whole->dq, whole->dtype, head);
    part.dq_sum = usp_from_head(whole->dq_sum, USP_F32, head);
    part.k = usp_from_head(whole->k, whole->dtype, key);
    part.v = usp_from_head(whole->v, whole->dtype, key);
    part.top += head * whole->queries;
    part.sum += head * whole->queries;
    part.delta += head * whole->queries;
    part.dropout.first_head += head;
    if (whole->slopes) part.slopes += head;
    if (whole->turns) part.turns += head * ((whole->queries + USP_TURN_ROWS - 1) / USP_TURN_ROWS);
    return part;
}
