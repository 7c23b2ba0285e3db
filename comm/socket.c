/* socket.c - the comm of processes without a GPU: host memory, one TCP connection between every two ranks beside the
 * control channel. It starts no thread of its own, and leaves gathers, deaths, time-outs and blame to that channel.
 *
 * A message is its size, eight bytes, then its data; the receiver compares the size with its own before it reads on. An
 * exchange moves all its messages at once, in the calling thread, and ends when the last byte is out and in. */
#define _GNU_SOURCE
#include "control.h"
#include "error.h"
#include "list.h"
#include <errno.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

/* One direction of a connection: the message that is moving. */
typedef struct usp_way {
    int message;   /* its index in the list, or USP_NO_MESSAGE */
    uint64_t size; /* what the wire says */
    size_t done;   /* of size and data */
} usp_way;

typedef struct usp_channel {
    int connection; /* -1: ended, or this rank itself */
    usp_way out, in;
} usp_channel;

typedef struct usp_socket_comm {
    usp_comm base;
    usp_control *control;
    uint64_t exchanges;
    usp_channel *channels; /* [size] */
    struct pollfd *polls;  /* [size + 1] */
    int *connections;      /* [size], for creation */
} usp_socket_comm;

/* One call of exchange. */
typedef struct usp_errand {
    const usp_send *sends;
    const usp_recv *recvs;
    int send_count, recv_count;
} usp_errand;

/* ---- moving ------------------------------------------------------------------------------------------------------ */

static int busy(const usp_channel *channel) {
    return channel->out.message != USP_NO_MESSAGE || channel->in.message != USP_NO_MESSAGE;
}

/* The parts of a message that have not moved yet. */
static struct msghdr remaining(usp_way *way, void *data, size_t bytes, struct iovec parts[2]) {
    size_t head = sizeof way->size, done = way->done < head ? way->done : head;
    parts[0] = (struct iovec){(char *)&way->size + done, head - done};
    parts[1] = (struct iovec){(char *)data + (way->done - done), bytes - (way->done - done)};
    return (struct msghdr){.msg_iov = parts, .msg_iovlen = 2};
}

/* The connection has ended: the control channel will know, now or soon, who is to blame. */
static usp_status hang_up(usp_socket_comm *self, int peer) {
    usp_channel *channel = &self->channels[peer];
    close(channel->connection);
    channel->connection = -1;
    return usp_control_gone(self->control, peer);
}

/* Tells what a send or receive did: *moved bytes, 0 for "not now"; the peer's end is a failure or a wait for one. */
static usp_status check_moved(usp_socket_comm *self, int peer, ssize_t result, size_t *moved) {
    *moved = result > 0 ? (size_t)result : 0;
    if (result > 0 || (result < 0 && (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR))) return USP_OK;
    return hang_up(self, peer);
}

static usp_status push(usp_socket_comm *self, const usp_errand *errand, int peer, int *progress) {
    usp_channel *channel = &self->channels[peer];
    usp_way *way = &channel->out;
    while (way->message != USP_NO_MESSAGE && channel->connection >= 0) {
        const usp_send *send = &errand->sends[way->message];
        struct iovec parts[2];
        size_t moved;
        way->size = send->bytes;
        struct msghdr rest = remaining(way, (void *)(uintptr_t)send->data, send->bytes, parts);
        USP_TRY(check_moved(self, peer, sendmsg(channel->connection, &rest, MSG_NOSIGNAL), &moved));
        if (moved == 0) break;
        *progress = 1;
        way->done += moved;
        if (way->done < sizeof way->size + send->bytes) continue;
        way->message = usp_list_next_send(errand->sends, errand->send_count, way->message + 1, peer);
        way->done = 0;
    }
    return USP_OK;
}

static usp_status check_size(usp_socket_comm *self, const usp_way *way, int peer, size_t expected) {
    if (way->done < sizeof way->size || way->size == expected) return USP_OK;
    return usp_control_fail(self->control, USP_COMM, "rank %d sends %zu bytes to rank %d, which expects %zu", peer,
                            (size_t)way->size, self->base.rank, expected);
}

/* Reads the size alone first: data that do not fit must never touch the caller's memory. */
static usp_status pull(usp_socket_comm *self, const usp_errand *errand, int peer, int *progress) {
    usp_channel *channel = &self->channels[peer];
    usp_way *way = &channel->in;
    while (way->message != USP_NO_MESSAGE && channel->connection >= 0) {
        const usp_recv *recv = &errand->recvs[way->message];
        struct iovec parts[2];
        size_t moved;
        struct msghdr rest = remaining(way, recv->data, recv->bytes, parts);
        if (way->done < sizeof way->size) rest.msg_iovlen = 1;
        USP_TRY(check_moved(self, peer, recvmsg(channel->connection, &rest, 0), &moved));
        if (moved == 0) break;
        *progress = 1;
        way->done += moved;
        USP_TRY(check_size(self, way, peer, recv->bytes));
        if (way->done < sizeof way->size + recv->bytes) continue;
        way->message = usp_list_next_recv(errand->recvs, errand->recv_count, way->message + 1, peer);
        way->done = 0;
    }
    return USP_OK;
}

/* ---- exchange ---------------------------------------------------------------------------------------------------- */

static void begin(usp_socket_comm *self, const usp_errand *errand) {
    for (int peer = 0; peer < self->base.size; peer++) {
        usp_channel *channel = &self->channels[peer];
        channel->out = (usp_way){usp_list_next_send(errand->sends, errand->send_count, 0, peer), 0, 0};
        channel->in = (usp_way){usp_list_next_recv(errand->recvs, errand->recv_count, 0, peer), 0, 0};
    }
}

static int first_busy(const usp_socket_comm *self) {
    for (int peer = 0; peer < self->base.size; peer++)
        if (busy(&self->channels[peer])) return peer;
    return -1;
}

static usp_status move_all(usp_socket_comm *self, const usp_errand *errand, int *progress) {
    for (int peer = 0; peer < self->base.size; peer++) {
        if (!busy(&self->channels[peer])) continue;
        USP_TRY(push(self, errand, peer, progress));
        USP_TRY(pull(self, errand, peer, progress));
        if (self->channels[peer].connection < 0) USP_TRY(usp_control_gone(self->control, peer));
    }
    return USP_OK;
}

/* Sleeps until a connection can move, the control channel has failed, or the deadline. */
static usp_status sleep_until(usp_socket_comm *self, int64_t deadline) {
    int size = self->base.size;
    for (int peer = 0; peer < size; peer++) {
        const usp_channel *channel = &self->channels[peer];
        short events = channel->in.message != USP_NO_MESSAGE ? POLLIN : 0;
        if (channel->out.message != USP_NO_MESSAGE) events |= POLLOUT;
        self->polls[peer] = (struct pollfd){.fd = events ? channel->connection : -1, .events = events};
    }
    self->polls[size] = (struct pollfd){.fd = usp_control_descriptor(self->control), .events = POLLIN};
    if (poll(self->polls, (nfds_t)size + 1, usp_tcp_left(deadline)) != 0) return usp_control_poll(self->control);
    return usp_control_overdue(self->control, first_busy(self));
}

/* The time limit is for a wait, not for the whole exchange. */
static usp_status run_errand(usp_socket_comm *self, const usp_errand *errand) {
    int64_t deadline = usp_tcp_deadline(self->base.timeout_ms);
    while (first_busy(self) >= 0) {
        int progress = 0;
        USP_TRY(move_all(self, errand, &progress));
        if (progress) {
            deadline = usp_tcp_deadline(self->base.timeout_ms);
            continue;
        }
        usp_control_progress(self->control, self->exchanges, first_busy(self));
        USP_TRY(sleep_until(self, deadline));
    }
    return USP_OK;
}

static usp_status socket_exchange(usp_comm *comm, const usp_send *sends, int send_count, const usp_recv *recvs,
                                  int recv_count, usp_stream stream) {
    usp_socket_comm *self = (usp_socket_comm *)comm;
    usp_errand errand = {sends, recvs, send_count, recv_count};
    (void)stream;
    USP_TRY(usp_list_check(comm, sends, send_count, recvs, recv_count));
    USP_TRY(usp_control_poll(self->control));
    self->exchanges++;
    begin(self, &errand);
    usp_status status = run_errand(self, &errand);
    usp_control_progress(self->control, self->exchanges, -1);
    return status;
}

/* ---- the rest of the table --------------------------------------------------------------------------------------- */

static usp_status socket_prepare(usp_comm *comm, int64_t messages, size_t bytes) {
    (void)comm, (void)messages, (void)bytes;
    return USP_OK;
}

static usp_status socket_allgather(usp_comm *comm, const void *mine, void *all, size_t bytes_per_rank) {
    return usp_control_allgather(((usp_socket_comm *)comm)->control, mine, all, bytes_per_rank);
}

static usp_status socket_alloc_shared(usp_comm *comm, size_t bytes, void **memory) {
    return comm->device->ops->alloc(comm->device, bytes, memory);
}

static usp_status socket_register_shared(usp_comm *comm, void *memory) {
    (void)comm, (void)memory;
    return USP_OK;
}

static usp_status socket_free_shared(usp_comm *comm, void *memory) {
    comm->device->ops->free(comm->device, memory);
    return USP_OK;
}

static usp_status socket_split(usp_comm *comm, int colour, int key, struct ncclComm **axis) {
    (void)comm, (void)colour, (void)key, (void)axis;
    return usp_fail(USP_UNSUPPORTED, "ranks on sockets have no NCCL communicator");
}

static void socket_split_destroy(usp_comm *comm, struct ncclComm *axis) {
    (void)comm, (void)axis;
}

static void socket_note_plan(usp_comm *comm, int ranks, uint64_t hash) {
    usp_control_note_plan(((usp_socket_comm *)comm)->control, ranks, hash);
}

static usp_status socket_poll(usp_comm *comm) {
    return usp_control_poll(((usp_socket_comm *)comm)->control);
}

static usp_status socket_fail(usp_comm *comm, usp_status status) {
    return usp_control_fail(((usp_socket_comm *)comm)->control, status, "rank %d: %s", comm->rank, usp_last_error());
}

static usp_status socket_overdue(usp_comm *comm) {
    return usp_control_overdue(((usp_socket_comm *)comm)->control, -1);
}

static void socket_abort(usp_comm *comm) {
    usp_control_abort(((usp_socket_comm *)comm)->control);
}

/* Control goes first, so that its goodbye or failure reaches the others before these connections end. */
static void socket_destroy(usp_comm *comm) {
    if (!comm) return;
    usp_socket_comm *self = (usp_socket_comm *)comm;
    usp_control_destroy(self->control);
    for (int peer = 0; peer < comm->size; peer++)
        if (self->channels[peer].connection >= 0) close(self->channels[peer].connection);
    usp_host_free(comm->host, self);
}

static const usp_comm_ops socket_ops = {
    .name = "socket",
    .prepare = socket_prepare,
    .exchange = socket_exchange,
    .allgather = socket_allgather,
    .alloc_shared = socket_alloc_shared,
    .register_shared = socket_register_shared,
    .free_shared = socket_free_shared,
    .split = socket_split,
    .split_destroy = socket_split_destroy,
    .note_plan = socket_note_plan,
    .poll = socket_poll,
    .fail = socket_fail,
    .overdue = socket_overdue,
    .abort = socket_abort,
    .destroy = socket_destroy,
};

/* ---- create ------------------------------------------------------------------------------------------------------ */

static usp_status socket_alloc(const usp_comm_config *config, const usp_bootstrap *bootstrap,
                               usp_socket_comm **result) {
    size_t size = (size_t)bootstrap->size;
    size_t bytes =
        sizeof(usp_socket_comm) + size * (sizeof(usp_channel) + sizeof(int)) + (size + 1) * sizeof(struct pollfd);
    void *memory;
    if (config->device->ops->kind != USP_DEVICE_CPU)
        return usp_fail(USP_UNSUPPORTED, "sockets carry host memory only, not that of %s", config->device->ops->name);
    USP_TRY(usp_host_alloc(config->host, bytes, "comm", &memory));
    usp_socket_comm *self = memory;
    self->base =
        (usp_comm){&socket_ops, bootstrap->rank, bootstrap->size, config->timeout_ms, config->device, config->host};
    self->channels = (usp_channel *)(self + 1);
    self->polls = (struct pollfd *)(self->channels + size);
    self->connections = (int *)(self->polls + size + 1);
    for (size_t peer = 0; peer < size; peer++) self->channels[peer].connection = -1;
    *result = self;
    return USP_OK;
}

/* What needs no other rank. */
static usp_status prepare_self(const usp_comm_config *config, usp_meeting *meeting, usp_socket_comm **self) {
    const usp_bootstrap *bootstrap = &meeting->bootstrap;
    USP_TRY(socket_alloc(config, bootstrap, self));
    return usp_control_create(config, bootstrap, &meeting->mine.address, &(*self)->control);
}

static usp_status connect_channels(usp_socket_comm *self, const usp_meeting *meeting) {
    usp_status status = usp_control_connect(self->control, meeting, self->connections);
    for (int peer = 0; peer < self->base.size; peer++) self->channels[peer].connection = self->connections[peer];
    return status;
}

usp_status usp_comm_create_socket(const usp_comm_config *config, usp_meeting *meeting, usp_comm **comm) {
    usp_socket_comm *self = NULL;
    if (meeting->mine.status == USP_OK) usp_meeting_note(meeting, prepare_self(config, meeting, &self));
    usp_status status = usp_meet(meeting);
    if (status == USP_OK) status = connect_channels(self, meeting);
    if (status == USP_OK)
        *comm = &self->base;
    else
        socket_destroy((usp_comm *)self);
    return status;
}
