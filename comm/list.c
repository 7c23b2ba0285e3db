/* list.c - messages and lists of them: checks, walks, and copies of rows. */
#include "list.h"
#include "error.h"

static usp_status check_peer(const usp_transport *transport, int peer) {
    USP_REQUIRE(peer >= 0 && peer < transport->size, "peer is %d in a world of %d", peer, transport->size);
    USP_REQUIRE(peer != transport->rank, "rank %d exchanges with itself", peer);
    return USP_OK;
}

usp_status usp_list_check(const usp_transport *transport, const usp_message *sends, int send_count,
                          const usp_message *recvs, int recv_count) {
    for (int i = 0; i < send_count; i++) USP_TRY(check_peer(transport, sends[i].peer));
    for (int i = 0; i < recv_count; i++) USP_TRY(check_peer(transport, recvs[i].peer));
    return USP_OK;
}

int usp_list_is_empty(const usp_message *messages, int count) {
    for (int i = 0; i < count; i++)
        if (usp_message_bytes(&messages[i]) > 0) return 0;
    return 1;
}

int usp_list_next(const usp_message *messages, int count, int from, int peer) {
    for (int i = from; i < count; i++)
        if (messages[i].peer == peer && usp_message_bytes(&messages[i]) > 0) return i;
    return USP_NO_MESSAGE;
}

/* ---- one message ------------------------------------------------------------------------------------------------- */

void *usp_message_at(const usp_message *message, size_t at, size_t *run) {
    size_t whole = usp_message_bytes(message);
    if (!usp_message_lies_apart(message)) {
        *run = whole - at;
        return (char *)message->base + at;
    }
    size_t row = at / message->bytes, column = at - row * message->bytes;
    *run = at < whole ? message->bytes - column : 0;
    return (char *)message->base + row * message->stride + column;
}

/* Rows of unlike lengths, or the bytes of one row: what lies side by side on both sides. */
static usp_status copy_runs(usp_device *device, const usp_message *to, const usp_message *from, usp_stream stream) {
    size_t there, here;
    for (size_t at = 0, run; at < usp_message_bytes(to); at += run) {
        void *target = usp_message_at(to, at, &there), *source = usp_message_at(from, at, &here);
        run = there < here ? there : here;
        USP_TRY(device->ops->copy(device, target, source, run, stream));
    }
    return USP_OK;
}

usp_status usp_message_copy(usp_device *device, const usp_message *to, const usp_message *from, usp_stream stream) {
    int apart = usp_message_lies_apart(to), other_apart = usp_message_lies_apart(from);
    const usp_message *rows = apart ? to : from;
    if ((!apart && !other_apart) || (apart && other_apart && to->bytes != from->bytes))
        return copy_runs(device, to, from, stream);
    return device->ops->copy_2d(device, to->base, apart ? to->stride : rows->bytes, from->base,
                                other_apart ? from->stride : rows->bytes, rows->bytes, rows->rows, stream);
}

/* ---- packing ----------------------------------------------------------------------------------------------------- */

enum { COPIES = 16 }; /* of one launch */

/* Rows as copies of numbers: as wide ones as fit. */
static usp_copy copy_of(const usp_message *message, int unpacks) {
    uintptr_t addresses = (uintptr_t)message->base | (uintptr_t)message->packed;
    int wide = (message->bytes | message->stride | addresses) % 4 == 0;
    usp_dtype dtype = wide ? USP_F32 : USP_BF16;
    int64_t size = wide ? 4 : 2, dim = (int64_t)message->bytes / size;
    usp_tensor lying = {message->base, 0, (int64_t)message->stride / size, dim},
               packed = {message->packed, 0, dim, dim};
    return (usp_copy){.tokens = message->rows,
                      .batch = 1,
                      .heads = 1,
                      .dim = (int)dim,
                      .from_dtype = dtype,
                      .to_dtype = dtype,
                      .from = unpacks ? packed : lying,
                      .to = unpacks ? lying : packed};
}

static usp_status copy_all(usp_device *device, const usp_message *messages, int count, int unpacks, usp_stream stream) {
    usp_copy copies[COPIES];
    int filled = 0;
    for (int i = 0; i < count; i++) {
        const usp_message *message = &messages[i];
        if (!message->packed || message->packed == message->base || !usp_message_bytes(message)) continue;
        if (filled == COPIES) {
            USP_TRY(device->ops->copy_rows(device, copies, filled, stream));
            filled = 0;
        }
        copies[filled++] = copy_of(message, unpacks);
    }
    return filled ? device->ops->copy_rows(device, copies, filled, stream) : USP_OK;
}

usp_status usp_list_pack(usp_device *device, const usp_message *messages, int count, usp_stream stream) {
    return copy_all(device, messages, count, 0, stream);
}

usp_status usp_list_unpack(usp_device *device, const usp_message *messages, int count, usp_stream stream) {
    return copy_all(device, messages, count, 1, stream);
}

usp_message usp_list_take_packed(const usp_message *messages, int count, int *i) {
    const usp_message *first = &messages[*i];
    void *data = first->packed ? first->packed : first->base;
    size_t bytes = 0;
    do bytes += usp_message_bytes(&messages[*i]);
    while (++*i < count && messages[*i].joined);
    return usp_message_whole(first->peer, data, bytes);
}
