/* messages.c - puts lists together: sends and receives, run as one exchange on the transfer stream of an axis, and
 * copies, run as one launch. */
#include "error.h"
#include "layer.h"

usp_messages *usp_messages_begin(usp_layer *layer, usp_axis axis) {
    layer->messages.sends = layer->messages.recvs = 0;
    layer->messages.axis = axis;
    layer->messages.reaches = usp_layer_reaches(layer, axis);
    return &layer->messages;
}

int usp_messages_are_none(const usp_messages *messages) {
    return !messages->sends && !messages->recvs;
}

void usp_messages_send_rows(usp_messages *messages, usp_message rows) {
    if (!usp_message_bytes(&rows)) return;
    if (!messages->reaches) rows.there = NULL;
    messages->bytes_sent += (int64_t)usp_message_bytes(&rows);
    if (messages->send) messages->send[messages->sends++] = rows;
}

void usp_messages_recv_rows(usp_messages *messages, usp_message rows) {
    if (!usp_message_bytes(&rows)) return;
    if (!messages->reaches) rows.there = NULL;
    messages->bytes_received += (int64_t)usp_message_bytes(&rows);
    if (messages->recv) messages->recv[messages->recvs++] = rows;
}

static usp_message whole(int peer, const void *data, int64_t bytes, void *there) {
    usp_message message = usp_message_whole(peer, data, (size_t)bytes);
    message.there = there;
    message.there_stride = message.stride;
    return message;
}

void usp_messages_send(usp_messages *messages, int peer, const void *data, int64_t bytes, void *there) {
    usp_messages_send_rows(messages, whole(peer, data, bytes, there));
}

void usp_messages_recv(usp_messages *messages, int peer, void *data, int64_t bytes, void *there) {
    usp_messages_recv_rows(messages, whole(peer, data, bytes, there));
}

usp_status usp_messages_exchange(usp_layer *layer) {
    const usp_messages *messages = &layer->messages;
    if (usp_messages_are_none(messages)) return USP_OK;
    return usp_world_exchange(layer->world, &layer->mesh.lane[messages->axis], messages->send, messages->sends,
                              messages->recv, messages->recvs);
}

usp_status usp_messages_run(usp_layer *layer, usp_stream stream) {
    USP_TRY(usp_world_fork(layer->world, stream, usp_layer_transfer(layer, layer->messages.axis)));
    return usp_messages_exchange(layer);
}

usp_status usp_messages_join(usp_layer *layer, usp_axis axis, usp_stream stream) {
    return usp_world_fork(layer->world, usp_layer_transfer(layer, axis), stream);
}

void usp_copies_add(usp_layer *layer, usp_copy copy) {
    if (copy.tokens && copy.batch && copy.heads && copy.dim) layer->copies.copy[layer->copies.count++] = copy;
}

usp_status usp_copies_run(usp_layer *layer, usp_stream stream) {
    usp_device *device = layer->world->device;
    int count = layer->copies.count;
    layer->copies.count = 0;
    return count ? device->ops->copy_rows(device, layer->copies.copy, count, stream) : USP_OK;
}
