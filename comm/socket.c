/* socket.c - the transport of processes without a GPU: host memory, one TCP connection between every two ranks beside
 * the control channel. It starts no thread of its own, and leaves gathers, deaths, time-outs and blame to that channel.
 *
 * A message is its size, eight bytes, then its data; the receiver compares the size with its own before it reads on. An
 * exchange moves all its messages at once, in the calling thread, and ends when the last byte is out and in. */
#define _GNU_SOURCE
#include "channel.h"
#include "error.h"
#include "list.h"
#include <errno.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

enum { PARTS = 256 }; /* of a message that one call of the system moves */

/* One direction of a connection: the message that is moving. */
typedef struct usp_way {
    int message;   /* its index in the list, or USP_NO_MESSAGE */
    uint64_t size; /* what the wire says */
    size_t done;   /* of size and data */
} usp_way;

typedef struct usp_wire {
    int connection; /* -1: ended, or this rank itself */
    usp_way out, in;
} usp_wire;

typedef struct usp_socket {
    usp_transport base;
    usp_wire *wires;      /* [size] */
    struct pollfd *polls; /* [size + 1] */
    int *connections;     /* [size], for creation */
} usp_socket;

/* One call of exchange. */
typedef struct usp_errand {
    const usp_message *sends, *recvs;
    int send_count, recv_count;
} usp_errand;

/* ---- moving ------------------------------------------------------------------------------------------------------ */

static int busy(const usp_wire *wire) {
    return wire->out.message != USP_NO_MESSAGE || wire->in.message != USP_NO_MESSAGE;
}

/* The next parts of a message that have not moved yet: its size, then runs of its rows. */
static struct msghdr remaining(usp_way *way, const usp_message *message, struct iovec parts[PARTS]) {
    size_t head = sizeof way->size, done = way->done < head ? way->done : head, run, count = 1;
    parts[0] = (struct iovec){(char *)&way->size + done, head - done};
    for (size_t at = way->done - done; at < usp_message_bytes(message) && count < PARTS; at += run, count++) {
        void *data = usp_message_at(message, at, &run);
        parts[count] = (struct iovec){data, run};
    }
    return (struct msghdr){.msg_iov = parts, .msg_iovlen = count};
}

/* The connection has ended: the control channel will know, now or soon, who is to blame. */
static usp_status hang_up(usp_socket *self, int peer) {
    usp_wire *wire = &self->wires[peer];
    close(wire->connection);
    wire->connection = -1;
    return usp_channel_gone(self->base.control, peer);
}

/* Tells what a send or receive did: *moved bytes, 0 for "not now"; the peer's end is a failure or a wait for one. */
static usp_status check_moved(usp_socket *self, int peer, ssize_t result, size_t *moved) {
    *moved = result > 0 ? (size_t)result : 0;
    if (result > 0 || (result < 0 && (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR))) return USP_OK;
    return hang_up(self, peer);
}

static usp_status push(usp_socket *self, const usp_errand *errand, int peer, int *progress) {
    usp_wire *wire = &self->wires[peer];
    usp_way *way = &wire->out;
    while (way->message != USP_NO_MESSAGE && wire->connection >= 0) {
        const usp_message *send = &errand->sends[way->message];
        struct iovec parts[PARTS];
        size_t moved;
        way->size = usp_message_bytes(send);
        struct msghdr rest = remaining(way, send, parts);
        USP_TRY(check_moved(self, peer, sendmsg(wire->connection, &rest, MSG_NOSIGNAL), &moved));
        if (moved == 0) break;
        *progress = 1;
        way->done += moved;
        if (way->done < sizeof way->size + way->size) continue;
        way->message = usp_list_next(errand->sends, errand->send_count, way->message + 1, peer);
        way->done = 0;
    }
    return USP_OK;
}

static usp_status check_size(usp_socket *self, const usp_way *way, int peer, size_t expected) {
    if (way->done < sizeof way->size || way->size == expected) return USP_OK;
    return usp_channel_fail(self->base.control, USP_COMM, "rank %d sends %zu bytes to rank %d, which expects %zu", peer,
                            (size_t)way->size, self->base.rank, expected);
}

/* Reads the size alone first: data that do not fit must never touch the caller's memory. */
static usp_status pull(usp_socket *self, const usp_errand *errand, int peer, int *progress) {
    usp_wire *wire = &self->wires[peer];
    usp_way *way = &wire->in;
    while (way->message != USP_NO_MESSAGE && wire->connection >= 0) {
        const usp_message *recv = &errand->recvs[way->message];
        struct iovec parts[PARTS];
        size_t moved;
        struct msghdr rest = remaining(way, recv, parts);
        if (way->done < sizeof way->size) rest.msg_iovlen = 1;
        USP_TRY(check_moved(self, peer, recvmsg(wire->connection, &rest, 0), &moved));
        if (moved == 0) break;
        *progress = 1;
        way->done += moved;
        USP_TRY(check_size(self, way, peer, usp_message_bytes(recv)));
        if (way->done < sizeof way->size + usp_message_bytes(recv)) continue;
        way->message = usp_list_next(errand->recvs, errand->recv_count, way->message + 1, peer);
        way->done = 0;
    }
    return USP_OK;
}

/* ---- exchange ---------------------------------------------------------------------------------------------------- */

static void begin(usp_socket *self, const usp_errand *errand) {
    for (int peer = 0; peer < self->base.size; peer++) {
        usp_wire *wire = &self->wires[peer];
        wire->out = (usp_way){usp_list_next(errand->sends, errand->send_count, 0, peer), 0, 0};
        wire->in = (usp_way){usp_list_next(errand->recvs, errand->recv_count, 0, peer), 0, 0};
    }
}

static int first_busy(const usp_socket *self) {
    for (int peer = 0; peer < self->base.size; peer++)
        if (busy(&self->wires[peer])) return peer;
    return -1;
}

static usp_status move_all(usp_socket *self, const usp_errand *errand, int *progress) {
    for (int peer = 0; peer < self->base.size; peer++) {
        if (!busy(&self->wires[peer])) continue;
        USP_TRY(push(self, errand, peer, progress));
        USP_TRY(pull(self, errand, peer, progress));
        if (self->wires[peer].connection < 0) USP_TRY(usp_channel_gone(self->base.control, peer));
    }
    return USP_OK;
}

/* Sleeps until a connection can move, the control channel has failed, or the deadline. */
static usp_status sleep_until(usp_socket *self, int64_t deadline) {
    int size = self->base.size;
    for (int peer = 0; peer < size; peer++) {
        const usp_wire *wire = &self->wires[peer];
        short events = wire->in.message != USP_NO_MESSAGE ? POLLIN : 0;
        if (wire->out.message != USP_NO_MESSAGE) events |= POLLOUT;
        self->polls[peer] = (struct pollfd){.fd = events ? wire->connection : -1, .events = events};
    }
    self->polls[size] = (struct pollfd){.fd = usp_channel_descriptor(self->base.control), .events = POLLIN};
    if (poll(self->polls, (nfds_t)size + 1, usp_tcp_left(deadline)) != 0) return usp_channel_poll(self->base.control);
    return usp_channel_overdue(self->base.control, first_busy(self));
}

/* The time limit is for a wait, not for the whole exchange. */
static usp_status run_errand(usp_socket *self, const usp_errand *errand) {
    int64_t deadline = usp_tcp_deadline(self->base.timeout_ms);
    while (first_busy(self) >= 0) {
        int progress = 0;
        USP_TRY(move_all(self, errand, &progress));
        if (progress) {
            deadline = usp_tcp_deadline(self->base.timeout_ms);
            continue;
        }
        usp_channel_await(self->base.control, first_busy(self));
        USP_TRY(sleep_until(self, deadline));
    }
    return USP_OK;
}

static usp_status socket_exchange(usp_transport *transport, int lane, const usp_message *sends, int send_count,
                                  const usp_message *recvs, int recv_count, usp_stream stream) {
    usp_socket *self = (usp_socket *)transport;
    usp_errand errand = {sends, recvs, send_count, recv_count};
    (void)lane, (void)stream;
    USP_TRY(usp_list_check(transport, sends, send_count, recvs, recv_count));
    USP_TRY(usp_channel_poll(self->base.control));
    usp_channel_enter(self->base.control);
    begin(self, &errand);
    usp_status status = run_errand(self, &errand);
    usp_channel_await(self->base.control, -1);
    return status;
}

/* ---- the table --------------------------------------------------------------------------------------------------- */

/* What this rank has to say is said before its connections end. */
static void socket_destroy(usp_transport *transport) {
    usp_socket *self = (usp_socket *)transport;
    usp_channel_leave(transport->control);
    for (int peer = 0; peer < transport->size; peer++)
        if (self->wires[peer].connection >= 0) close(self->wires[peer].connection);
    usp_host_free(transport->host, self);
}

static const usp_transport_ops socket_ops = {
    .name = "socket",
    .prepare = usp_plain_prepare,
    .exchange = socket_exchange,
    .alloc_shared = usp_plain_alloc_shared,
    .register_shared = usp_plain_register_shared,
    .free_shared = usp_plain_free_shared,
    .reach = usp_plain_reach,
    .watch = usp_plain_watch,
    .stop = usp_plain_stop,
    .destroy = socket_destroy,
};

/* ---- create ------------------------------------------------------------------------------------------------------ */

static usp_status socket_alloc(const usp_transport_config *config, const usp_bootstrap *bootstrap,
                               usp_socket **result) {
    size_t size = (size_t)bootstrap->size;
    size_t bytes = sizeof(usp_socket) + size * (sizeof(usp_wire) + sizeof(int)) + (size + 1) * sizeof(struct pollfd);
    void *memory;
    USP_TRY(usp_host_alloc(config->host, bytes, "the socket transport", &memory));
    usp_socket *self = memory;
    self->base = (usp_transport){
        &socket_ops, bootstrap->rank, bootstrap->size, config->timeout_ms, config->device, config->host, NULL, NULL};
    self->wires = (usp_wire *)(self + 1);
    self->polls = (struct pollfd *)(self->wires + size);
    self->connections = (int *)(self->polls + size + 1);
    for (size_t peer = 0; peer < size; peer++) self->wires[peer].connection = -1;
    *result = self;
    return USP_OK;
}

/* What needs no other rank. */
static usp_status prepare_self(const usp_transport_config *config, usp_meeting *meeting, usp_transport **transport) {
    const usp_bootstrap *bootstrap = &meeting->bootstrap;
    usp_control *control = NULL;
    usp_socket *self = NULL;
    if (config->device->ops->kind != USP_DEVICE_CPU)
        return usp_fail(USP_UNSUPPORTED, "sockets carry host memory only, not that of %s", config->device->ops->name);
    USP_TRY(usp_channel_create(config, bootstrap, &meeting->mine.address, &control));
    usp_status status = socket_alloc(config, bootstrap, &self);
    if (status != USP_OK) {
        control->ops->destroy(control);
        return status;
    }
    self->base.control = control;
    *transport = &self->base;
    return USP_OK;
}

static usp_status connect_wires(usp_socket *self, const usp_meeting *meeting) {
    usp_status status = usp_channel_connect(self->base.control, meeting, self->connections);
    for (int peer = 0; peer < self->base.size; peer++) self->wires[peer].connection = self->connections[peer];
    return status;
}

usp_status usp_transport_create_socket(const usp_transport_config *config, usp_meeting *meeting,
                                       usp_transport **transport) {
    usp_transport *made = NULL;
    if (meeting->mine.status == USP_OK) usp_meeting_note(meeting, prepare_self(config, meeting, &made));
    usp_status status = usp_meet(meeting);
    if (status == USP_OK) status = connect_wires((usp_socket *)made, meeting);
    if (status == USP_OK)
        *transport = made;
    else
        usp_transport_end(made);
    return status;
}
