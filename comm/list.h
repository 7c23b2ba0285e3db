/* list.h - messages and lists of them: checking them, walking them peer by peer, and rows that lie apart, for
 * transports that move them and for those that do not. */
#ifndef USP_LIST_H
#define USP_LIST_H
#include "transport.h"

enum { USP_NO_MESSAGE = -1 };

/* INVALID unless every peer is another rank of the transport. */
usp_status usp_list_check(const usp_transport *transport, const usp_message *sends, int send_count,
                          const usp_message *recvs, int recv_count);

int usp_list_is_empty(const usp_message *messages, int count); /* of bytes */

/* The first message for `peer` at or after index `from` that has bytes, or USP_NO_MESSAGE. */
int usp_list_next(const usp_message *messages, int count, int from, int peer);

/* ---- one message ------------------------------------------------------------------------------------------------- */

static inline int usp_message_lies_apart(const usp_message *message) {
    return message->rows > 1 && message->stride != message->bytes;
}
/* Where byte `at` of the message is, and how many lie side by side from there on, in *run. */
void *usp_message_at(const usp_message *message, size_t at, size_t *run);
/* Enqueues the copy of one message to where another one of as many bytes lies. */
usp_status usp_message_copy(usp_device *device, const usp_message *to, const usp_message *from, usp_stream stream);

/* ---- transports that move no rows that lie apart ----------------------------------------------------------------- */

/* Enqueue the copies of all rows to where they are packed, and back: a launch for many messages. Rows that lie side by
 * side are packed too, so that both sides of a message are of the same kind of memory: NCCL waits for ever where it has
 * registered one side only. */
usp_status usp_list_pack(usp_device *device, const usp_message *messages, int count, usp_stream stream);
usp_status usp_list_unpack(usp_device *device, const usp_message *messages, int count, usp_stream stream);
/* Message *i, and all that are joined to it, as bytes side by side, packed if they can be; *i is behind them then. */
usp_message usp_list_take_packed(const usp_message *messages, int count, int *i);

#endif
