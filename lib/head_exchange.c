/* head_exchange.c - slices and gathers what heads have. A head's elements are one row of a tensor with one token. */
#include "head_exchange.h"

static usp_tensor tensor_of(const usp_head_part *part, float *numbers, int heads, int first) {
    return (usp_tensor){numbers ? numbers + first * part->elements : NULL, heads * part->elements, 0, part->elements};
}

static usp_copy copy_of(const usp_head_part *part, int heads, usp_tensor from, usp_tensor to) {
    return (usp_copy){
        .tokens = 1, .batch = part->batch, .heads = heads, .dim = (int)part->elements, .from = from, .to = to};
}

void usp_heads_slice(usp_layer *layer, const usp_head_part *part) {
    usp_head_range own = usp_layer_heads(layer, USP_OUT, layer->mesh.u);
    usp_copies_add(layer, copy_of(part, own.count, tensor_of(part, part->all, layer->heads, own.first),
                                  tensor_of(part, part->own, own.count, 0)));
}

/* Where rank u's heads arrive. */
static float *staging_of(const usp_layer *layer, const usp_head_part *part, int u) {
    int64_t before = (int64_t)usp_layer_heads(layer, USP_OUT, u).first * part->batch * part->elements;
    return part->staging ? part->staging + before : NULL;
}

void usp_heads_post(const usp_layer *layer, const usp_head_part *part, usp_messages *messages) {
    int64_t head = part->batch * part->elements * (int64_t)sizeof(float);
    for (int u = 0; u < layer->mesh.ulysses; u++) {
        int peer = usp_mesh_rank(&layer->mesh, u, layer->mesh.r);
        if (u == layer->mesh.u) continue;
        float *mine = staging_of(layer, part, layer->mesh.u), *theirs = staging_of(layer, part, u);
        usp_messages_send(messages, peer, part->own, head * usp_layer_own_heads(layer), mine);
        usp_messages_recv(messages, peer, theirs, head * usp_layer_heads(layer, USP_OUT, u).count, theirs);
    }
}

void usp_heads_unpack(usp_layer *layer, const usp_head_part *part) {
    for (int u = 0; u < layer->mesh.ulysses; u++) {
        usp_head_range heads = usp_layer_heads(layer, USP_OUT, u);
        float *from = u == layer->mesh.u ? part->own : staging_of(layer, part, u);
        usp_copies_add(layer, copy_of(part, heads.count, tensor_of(part, from, heads.count, 0),
                                      tensor_of(part, part->all, layer->heads, heads.first)));
    }
}
