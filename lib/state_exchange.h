/* state_exchange.h - how states of linear attention travel between ring ranks, whose chunks follow one another: all
 * totals to every rank at once (LASP-2, arXiv 2502.07563), or one state from chunk to chunk (LASP, arXiv 2404.02882).
 */
#ifndef USP_STATE_EXCHANGE_H
#define USP_STATE_EXCHANGE_H
#include "layer.h"

/* One direction of the state. A state is fp32 [batch][heads][head_dim][value_dim], for own heads. */
typedef struct usp_flow {
    int reverse;
    int again;       /* forward states in backward: the final one is no output any more */
    usp_tensor k, v; /* what makes the totals: k and v, or q and dout */
    usp_head_map k_map, v_map;
    float *blocks;   /* [blocks]: the state before each block of the own chunks */
    float *totals;   /* [own chunks]; those of `slots`, if there are */
    float *slots;    /* [chunks] by place: all totals, then the states before each; in a chain NULL */
    float *incoming; /* [own chunks]: the state before each own chunk; in place of `totals`, if not kept */
    float *carry;    /* one state, on its way in a chain */
    const float *initial;
    float *final;  /* one state */
    void *scratch; /* of the kernels */
} usp_flow;

static inline int usp_flow_causal(const usp_layer *layer) {
    return layer->config.mask == USP_MASK_CAUSAL;
}

/* Floats of one state of all own heads. */
int64_t usp_state_size(const usp_layer *layer);
float *usp_state_carve(const usp_layer *layer, int64_t states, usp_arena *arena);
/* `from` NULL: zeros. */
usp_status usp_state_copy(usp_layer *layer, float *to, const float *from, usp_stream stream);
/* What all scans of a flow share. */
usp_scan usp_state_scan(const usp_layer *layer, const usp_flow *flow);

/* The memory of a flow; `kept`: but for `incoming`, which lies in saved. */
usp_flow usp_flow_carve(const usp_layer *layer, int kept, usp_arena *arena);
/* From `totals` to `incoming` and `final`: travel on the transfer stream, behind what has been forked to it, and end,
 * for which `stream` waits. */
usp_status usp_flow_travel(usp_layer *layer, const usp_flow *flow);
usp_status usp_flow_end(usp_layer *layer, const usp_flow *flow, usp_stream stream);
/* Posts all that the flow sends and receives. */
void usp_flow_count(const usp_layer *layer, const usp_flow *flow, usp_messages *count);

#endif
