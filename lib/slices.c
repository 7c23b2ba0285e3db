/* slices.c - slices of heads. */
#include "slices.h"

enum { MOST_SLICES = 4 };

/* Heads that share a key are in one slice. */
int usp_slice_count(const usp_layer *layer) {
    usp_head_map map = usp_layer_head_map(layer, USP_KEY);
    int heads = usp_layer_own_heads(layer), keys = usp_layer_heads(layer, USP_KEY, layer->mesh.u).count;
    int64_t items = heads * ((layer->plan->key_limit + USP_WORK_ROWS - 1) / USP_WORK_ROWS);
    int count = MOST_SLICES;
    if (layer->plan->route.stages == 1 || !usp_layer_reaches(layer, USP_AXIS_RING) || layer->config.batch > 1 ||
        !usp_route_is_single(&layer->plan->route))
        return 1;
    if (map.offset || keys * map.group != heads) return 1;
    while (count > 1 && (keys % count || items < count * layer->needs.items)) count /= 2;
    return count;
}

/* Every ulysses rank has as many heads, and so as many groups. */
int usp_group_count(const usp_layer *layer) {
    const usp_layer_config *c = &layer->config;
    int ulysses = layer->mesh.ulysses, keys = layer->total[USP_KEY] / ulysses;
    int count = c->head_groups < keys ? c->head_groups : keys;
    if (c->attention != USP_SOFTMAX || ulysses == 1 || c->batch > 1 || layer->mesh.ring > 1) return 1;
    if (layer->heads % ulysses || layer->total[USP_KEY] % ulysses) return 1;
    while (count > 1 && keys % count) count--;
    return count > 1 ? count : 1;
}

usp_tensor usp_from_head(usp_tensor x, usp_dtype dtype, int head) {
    x.data = x.data ? (char *)x.data + head * x.stride_head * (int64_t)usp_dtype_size(dtype) : NULL;
    return x;
}

static float *from_row(const float *rows, int64_t row) {
    return rows ? (float *)(uintptr_t)(rows + row) : NULL;
}

usp_softmax usp_slice_of(const usp_softmax *whole, usp_slice slice) {
    usp_softmax part = *whole;
    int heads = whole->heads / slice.count, keys = whole->key_heads / slice.count;
    int head = slice.number * heads, key = slice.number * keys;
    part.slices = slice.count;
    part.heads = heads;
    part.key_heads = keys;
    part.q = usp_from_head(whole->q, whole->dtype, head);
    part.k = usp_from_head(whole->k, whole->dtype, key);
    part.v = usp_from_head(whole->v, whole->dtype, key);
    part.out = usp_from_head(whole->out, whole->dtype, head);
    part.dout = usp_from_head(whole->dout, whole->dtype, head);
    part.dq = usp_from_head(whole->dq, whole->dtype, head);
    part.dq_sum = usp_from_head(whole->dq_sum, USP_F32, head);
    part.dk = usp_from_head(whole->dk, whole->key_dtype, key);
    part.dv = usp_from_head(whole->dv, whole->key_dtype, key);
    part.top = from_row(whole->top, head * whole->queries);
    part.sum = from_row(whole->sum, head * whole->queries);
    part.peak = from_row(whole->peak, head * whole->queries);
    part.lse = from_row(whole->lse, head * whole->queries);
    part.delta = from_row(whole->delta, head * whole->queries);
    part.slopes = from_row(whole->slopes, head);
    part.sinks = from_row(whole->sinks, head);
    part.dropout.first_head += head;
    if (whole->turns) part.turns += head * ((whole->queries + USP_TURN_ROWS - 1) / USP_TURN_ROWS);
    return part;
}
