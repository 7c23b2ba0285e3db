/* conformance_shared.c - what every transport must do with shared memory: messages that may arrive there, and the
 * places of other ranks' that it reaches. */
#include "conformance.h"
#include <string.h>

enum { BYTES = 256, ROWS = 4, APART = 80 };

/* The piece: what is sent; where it belongs; where it may arrive, side by side and in rows apart; what others reach. */
enum { SENT = 0, WANTED = BYTES, BESIDE = 2 * BYTES, ASTRIDE = 3 * BYTES, REACHED = 5 * BYTES };

/* How a step says that it may arrive in shared memory. */
typedef enum usp_manner { NOT_AT_ALL, WHERE_IT_BELONGS, ELSEWHERE, IN_ROWS_APART, MANNERS } usp_manner;

static usp_message usp_shift_message(int peer, char *shared, int incoming, usp_manner manner) {
    usp_message message = usp_message_whole(peer, shared + (incoming ? WANTED : SENT), BYTES);
    if (manner == WHERE_IT_BELONGS) message.there = shared + WANTED;
    if (manner == ELSEWHERE) message.there = shared + BESIDE;
    message.there_stride = message.stride;
    if (manner != IN_ROWS_APART) return message;
    message.rows = ROWS;
    message.bytes = message.stride = BYTES / ROWS;
    message.there = shared + ASTRIDE;
    message.there_stride = APART;
    return message;
}

/* A ring step from shared memory to shared memory. */
static usp_status usp_shift_shared(usp_transport *transport, char *shared, usp_manner manner, usp_stream stream,
                                   char *seen) {
    const usp_device_ops *ops = transport->device->ops;
    int rank = transport->rank, size = transport->size;
    usp_message send = usp_shift_message((rank + 1) % size, shared, 0, manner);
    usp_message recv = usp_shift_message((rank + size - 1) % size, shared, 1, manner);
    memset(seen, rank * 8 + (int)manner + 1, BYTES);
    usp_status status = ops->copy(transport->device, shared + SENT, seen, BYTES, stream);
    memset(seen, 0, BYTES);
    if (status == USP_OK && size > 1) status = transport->ops->exchange(transport, 0, &send, 1, &recv, 1, stream);
    if (status == USP_OK && size == 1)
        status = ops->copy(transport->device, shared + WANTED, shared + SENT, BYTES, stream);
    if (status == USP_OK) status = ops->copy(transport->device, seen, shared + WANTED, BYTES, stream);
    return status == USP_OK ? usp_drain(transport, stream) : status;
}

static int usp_check_shift(usp_transport *transport, char *shared, usp_manner manner, usp_stream stream) {
    char seen[BYTES], expected[BYTES];
    usp_status status = usp_shift_shared(transport, shared, manner, stream, seen);
    if (usp_check_ok(transport, status, "an exchange of shared memory")) return 1;
    memset(expected, (transport->rank + transport->size - 1) % transport->size * 8 + (int)manner + 1, BYTES);
    return usp_check(transport, memcmp(seen, expected, BYTES) == 0, "shared memory, manner %d: wrong bytes",
                     (int)manner);
}

/* Each rank writes into the next one's piece, if it reaches it. */
static int usp_check_reach(usp_transport *transport, char *shared, usp_stream stream) {
    const usp_device_ops *ops = transport->device->ops;
    int rank = transport->rank, size = transport->size;
    char byte = (char)(rank + 1), *there = transport->ops->reach(transport, (rank + 1) % size, shared + REACHED + rank);
    int reaches = there != NULL;
    usp_status status = reaches ? ops->copy(transport->device, there, &byte, 1, stream) : USP_OK;
    if (status == USP_OK) status = usp_drain(transport, stream);
    if (status == USP_OK) status = usp_transport_allgather(transport, &byte, &byte, 0);
    if (status == USP_OK)
        status = ops->copy(transport->device, &byte, shared + REACHED + (rank + size - 1) % size, 1, stream);
    if (status == USP_OK) status = usp_drain(transport, stream);
    if (usp_check_ok(transport, status, "reaching shared memory")) return 1;
    return usp_check(transport, !reaches || byte == (char)((rank + size - 1) % size + 1), "not reached by the others");
}

int usp_check_shared(usp_transport *transport, char *shared, usp_stream stream) {
    int wrong = usp_check(transport, (uintptr_t)shared % 256 == 0, "shared memory is not aligned");
    for (int manner = NOT_AT_ALL; manner < MANNERS && !wrong; manner++)
        wrong = usp_check_shift(transport, shared, (usp_manner)manner, stream);
    return wrong || usp_check_reach(transport, shared, stream);
}
