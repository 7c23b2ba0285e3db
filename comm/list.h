/* list.h - lists of sends and receives: checking them and walking them peer by peer. It moves no bytes. */
#ifndef USP_LIST_H
#define USP_LIST_H
#include "transport.h"

enum { USP_NO_MESSAGE = -1 };

/* INVALID unless every peer is another rank of the transport. */
usp_status usp_list_check(const usp_transport *transport, const usp_send *sends, int send_count, const usp_recv *recvs,
                          int recv_count);

/* The first message for `peer` at or after index `from` that has bytes, or USP_NO_MESSAGE. */
int usp_list_next_send(const usp_send *sends, int count, int from, int peer);
int usp_list_next_recv(const usp_recv *recvs, int count, int from, int peer);

#endif
