/* ring_heads.c - numbers of heads between ring ranks. */
#include "ring_heads.h"
#include "error.h"

static float *numbers_of(const usp_layer *layer, float *all, int r) {
    return all ? all + (int64_t)r * usp_layer_own_heads(layer) : NULL;
}

void usp_ring_heads_post(const usp_layer *layer, const float *mine, float *all, usp_messages *messages) {
    int64_t bytes = usp_layer_own_heads(layer) * (int64_t)sizeof(float);
    for (int r = 0; r < layer->mesh.ring; r++) {
        if (r == layer->mesh.r) continue;
        float *theirs = numbers_of(layer, all, r);
        usp_messages_send(messages, usp_layer_ring_rank(layer, r), mine, bytes, numbers_of(layer, all, layer->mesh.r));
        usp_messages_recv(messages, usp_layer_ring_rank(layer, r), theirs, bytes, theirs);
    }
}

usp_status usp_ring_heads_gather(usp_layer *layer, const float *mine, float *all, usp_stream stream) {
    usp_device *device = layer->world->device;
    size_t bytes = (size_t)usp_layer_own_heads(layer) * sizeof(float);
    usp_messages *messages = usp_messages_begin(layer, USP_AXIS_RING);
    usp_ring_heads_post(layer, mine, all, messages);
    USP_TRY(device->ops->copy(device, numbers_of(layer, all, layer->mesh.r), mine, bytes, stream));
    if (!messages->sends && !messages->recvs) return USP_OK;
    USP_TRY(usp_messages_run(layer, stream));
    return usp_messages_join(layer, USP_AXIS_RING, stream);
}
