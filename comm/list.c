/* list.c - lists of sends and receives: checking them and walking them peer by peer. It moves no bytes. */
#include "list.h"
#include "error.h"

static usp_status check_peer(const usp_transport *transport, int peer) {
    USP_REQUIRE(peer >= 0 && peer < transport->size, "peer is %d in a world of %d", peer, transport->size);
    USP_REQUIRE(peer != transport->rank, "rank %d exchanges with itself", peer);
    return USP_OK;
}

usp_status usp_list_check(const usp_transport *transport, const usp_send *sends, int send_count, const usp_recv *recvs,
                          int recv_count) {
    for (int i = 0; i < send_count; i++) USP_TRY(check_peer(transport, sends[i].peer));
    for (int i = 0; i < recv_count; i++) USP_TRY(check_peer(transport, recvs[i].peer));
    return USP_OK;
}

int usp_list_next_send(const usp_send *sends, int count, int from, int peer) {
    for (int i = from; i < count; i++)
        if (sends[i].peer == peer && sends[i].bytes > 0) return i;
    return USP_NO_MESSAGE;
}

int usp_list_next_recv(const usp_recv *recvs, int count, int from, int peer) {
    for (int i = from; i < count; i++)
        if (recvs[i].peer == peer && recvs[i].bytes > 0) return i;
    return USP_NO_MESSAGE;
}
