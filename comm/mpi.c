/* mpi.c - ranks of an MPI program that exchange host memory over a duplicate of the caller's communicator.
 * MPI alone moves the tensors; liveness, time-outs and host gathers are the control channel's. */
#define _POSIX_C_SOURCE 200809L
#include <limits.h>
#include <mpi.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>

#include "channel.h"
#include "error.h"
#include "list.h"
#include "thread.h"

enum {
    CHUNK_BYTES = 1 << 30, /* MPI counts in int */
    TAGS = 32768,          /* what MPI promises at least */
    CANCEL_MS = 100        /* longest wait for cancelled receives */
};

/* What a request carries. Sends and receives of a pair count alike, and the tag is the count: a message that is left
 * over, because the other side had not planned it, is never taken for a later one. */
typedef struct usp_transfer {
    int peer, bytes, is_recv, done;
} usp_transfer;

typedef struct usp_mpi {
    usp_transport base;
    MPI_Comm comm;
    unsigned *sent, *received; /* [size]: messages so far, one array for both */

    /* of the exchange that runs; [capacity], which grows until the largest exchange has been seen */
    int capacity, count;
    void *lists;
    MPI_Request *requests;
    MPI_Status *statuses;
    usp_transfer *transfers;
    int *finished;

    int stuck;        /* a collective of the set-up is late: MPI may yet write `comm` and `cards` */
    usp_card cards[]; /* [1 + size]: what is sent, and what comes */
} usp_mpi;

static usp_mpi *mpi_of(usp_transport *transport) {
    return (usp_mpi *)transport;
}

/* ---- failures ---------------------------------------------------------------------------------------------------- */

static usp_status fail_mpi(int rank, const char *what, int code) {
    char text[MPI_MAX_ERROR_STRING] = "";
    int length = 0;
    MPI_Error_string(code, text, &length);
    return usp_fail(USP_COMM, "rank %d: %s failed: %.160s", rank, what, text);
}

/* This rank has failed by `status`, whose sentence is recorded: all ranks hear of it. Returns the first failure. */
static usp_status give_up(usp_mpi *self, usp_status status) {
    return usp_channel_fail(self->base.control, status, "%s", usp_last_error());
}

/* ---- exchange ---------------------------------------------------------------------------------------------------- */

static int chunks_of(size_t bytes) {
    return (int)((bytes + CHUNK_BYTES - 1) / CHUNK_BYTES);
}

/* Room for `count` requests. */
static usp_status reserve(usp_mpi *self, int64_t count) {
    const size_t each = sizeof(MPI_Request) + sizeof(MPI_Status) + sizeof(usp_transfer) + sizeof(int);
    void *lists = NULL;
    if (count <= self->capacity) return USP_OK;
    USP_TRY(usp_host_alloc(self->base.host, each * (size_t)count, "MPI requests", &lists));
    usp_host_free(self->base.host, self->lists);
    self->lists = lists;
    self->requests = lists;
    self->statuses = (MPI_Status *)(self->requests + count);
    self->transfers = (usp_transfer *)(self->statuses + count);
    self->finished = (int *)(self->transfers + count);
    self->capacity = (int)count;
    return USP_OK;
}

static int post_one(usp_mpi *self, const usp_transfer *transfer, void *data) {
    unsigned *messages = transfer->is_recv ? self->received : self->sent;
    int tag = (int)(messages[transfer->peer]++ % TAGS);
    MPI_Request *request = &self->requests[self->count];
    self->transfers[self->count] = *transfer;
    int code = transfer->is_recv ? MPI_Irecv(data, transfer->bytes, MPI_BYTE, transfer->peer, tag, self->comm, request)
                                 : MPI_Isend(data, transfer->bytes, MPI_BYTE, transfer->peer, tag, self->comm, request);
    if (code == MPI_SUCCESS) self->count++;
    return code;
}

static usp_status post(usp_mpi *self, const usp_message *message, int is_recv) {
    for (size_t at = 0; at < message->bytes; at += CHUNK_BYTES) {
        size_t left = message->bytes - at;
        usp_transfer transfer = {message->peer, left < CHUNK_BYTES ? (int)left : CHUNK_BYTES, is_recv, 0};
        int code = post_one(self, &transfer, (char *)message->base + at);
        if (code != MPI_SUCCESS) return fail_mpi(self->base.rank, is_recv ? "MPI_Irecv" : "MPI_Isend", code);
    }
    return USP_OK;
}

static usp_status post_way(usp_mpi *self, const usp_message *messages, int count, int is_recv) {
    for (int i = 0; i < count;) {
        usp_message message = usp_list_take_packed(messages, count, &i);
        USP_TRY(post(self, &message, is_recv));
    }
    return USP_OK;
}

/* Room for all, joined or not. */
static usp_status post_all(usp_mpi *self, const usp_message *sends, int send_count, const usp_message *recvs,
                           int recv_count) {
    int count = 0;
    for (int i = 0; i < send_count; i++) count += chunks_of(usp_message_bytes(&sends[i]));
    for (int i = 0; i < recv_count; i++) count += chunks_of(usp_message_bytes(&recvs[i]));
    USP_TRY(reserve(self, count));
    self->count = 0;
    USP_TRY(post_way(self, recvs, recv_count, 1));
    return post_way(self, sends, send_count, 0);
}

/* A message that ended must have carried what was planned. */
static usp_status check_one(usp_mpi *self, const usp_transfer *transfer, MPI_Status *status, int code) {
    char what[64];
    int class = MPI_SUCCESS, bytes = transfer->bytes, rank = self->base.rank, peer = transfer->peer;
    MPI_Error_class(code, &class);
    if (class == MPI_ERR_TRUNCATE)
        return usp_fail(USP_COMM, "rank %d sends more than the %d bytes that rank %d expects", peer, bytes, rank);
    snprintf(what, sizeof what, "a message %s rank %d", transfer->is_recv ? "from" : "to", peer);
    if (code != MPI_SUCCESS) return fail_mpi(rank, what, code);
    if (transfer->is_recv) MPI_Get_count(status, MPI_BYTE, &bytes);
    if (bytes == transfer->bytes) return USP_OK;
    return usp_fail(USP_COMM, "rank %d sends %d bytes to rank %d, which expects %d", peer, bytes, rank,
                    transfer->bytes);
}

/* Collects what has ended. *left: how many have not. */
static usp_status collect(usp_mpi *self, int *left) {
    int ended = 0;
    int code = MPI_Testsome(self->count, self->requests, &ended, self->finished, self->statuses);
    if (code != MPI_SUCCESS && code != MPI_ERR_IN_STATUS) return fail_mpi(self->base.rank, "MPI_Testsome", code);
    for (int i = 0; i < ended; i++) {
        usp_transfer *transfer = &self->transfers[self->finished[i]];
        transfer->done = 1;
        int own = code == MPI_ERR_IN_STATUS ? self->statuses[i].MPI_ERROR : MPI_SUCCESS;
        USP_TRY(check_one(self, transfer, &self->statuses[i], own));
    }
    if (ended > 0) *left -= ended;
    return USP_OK;
}

static int first_waited_for(const usp_mpi *self) {
    for (int i = 0; i < self->count; i++)
        if (!self->transfers[i].done) return self->transfers[i].peer;
    return -1;
}

static usp_status complete(usp_mpi *self) {
    int64_t begin = usp_now_ms();
    int left = self->count;
    for (int round = 0; left > 0; round++) {
        int before = left, peer = first_waited_for(self);
        usp_channel_await(self->base.control, peer);
        USP_TRY(collect(self, &left));
        USP_TRY(usp_channel_poll(self->base.control));
        if (left == 0) break;
        if (self->base.timeout_ms >= 0 && usp_now_ms() - begin > self->base.timeout_ms)
            return usp_channel_overdue(self->base.control, peer);
        if (left < before) round = 0;
        usp_pause(round);
    }
    usp_channel_await(self->base.control, -1);
    return USP_OK;
}

/* After a failure: MPI is asked to let go of receives. It may not do so in time, and sends cannot be taken back. */
static void cancel(usp_mpi *self) {
    int64_t begin = usp_now_ms();
    int ended = 0;
    for (int i = 0; i < self->count; i++)
        if (self->transfers[i].is_recv && self->requests[i] != MPI_REQUEST_NULL) MPI_Cancel(&self->requests[i]);
    for (; ended != MPI_UNDEFINED && usp_now_ms() - begin < CANCEL_MS; sched_yield())
        MPI_Testsome(self->count, self->requests, &ended, self->finished, self->statuses);
    if (ended != MPI_UNDEFINED)
        usp_host_log(self->base.host, 1, "rank %d: MPI still holds memory of the exchange that failed",
                     self->base.rank);
}

/* Every message is one request for each chunk of it, the last of which need not be full. */
static usp_status mpi_prepare(usp_transport *transport, int64_t messages, size_t bytes) {
    int64_t requests = messages + (int64_t)(bytes / CHUNK_BYTES);
    USP_REQUIRE(requests <= INT_MAX, "an exchange of %lld messages is more than MPI requests can be counted",
                (long long)requests);
    return reserve(mpi_of(transport), requests);
}

static usp_status mpi_exchange(usp_transport *transport, int lane, const usp_message *sends, int send_count,
                               const usp_message *recvs, int recv_count, usp_stream stream) {
    usp_mpi *self = mpi_of(transport);
    (void)lane;
    USP_TRY(usp_list_check(transport, sends, send_count, recvs, recv_count));
    USP_TRY(usp_channel_poll(transport->control));
    usp_channel_enter(self->base.control);
    usp_status status = usp_list_pack(transport->device, sends, send_count, stream);
    if (status == USP_OK) status = post_all(self, sends, send_count, recvs, recv_count);
    if (status == USP_OK) status = complete(self);
    if (status == USP_OK) status = usp_list_unpack(transport->device, recvs, recv_count, stream);
    if (status == USP_OK) return USP_OK;
    give_up(self, status);
    cancel(self);
    return usp_channel_poll(transport->control);
}

/* ---- the table --------------------------------------------------------------------------------------------------- */

/* A failed communicator is not freed: MPI may still hold messages of it. What it may yet write is left behind. */
static void mpi_destroy(usp_transport *transport) {
    usp_mpi *self = mpi_of(transport);
    usp_control *control = transport->control;
    int finalized = 0;
    MPI_Finalized(&finalized);
    int has_comm = self->stuck || self->comm != MPI_COMM_NULL;
    if (has_comm && !self->stuck && !finalized && control && usp_channel_poll(control) == USP_OK)
        MPI_Comm_free(&self->comm);
    else if (has_comm)
        usp_host_log(transport->host, self->stuck ? 1 : 2,
                     "rank %d: the MPI communicator of a failed world is left to MPI%s", transport->rank,
                     self->stuck ? ", with memory" : "");
    usp_host_free(transport->host, self->lists);
    usp_host_free(transport->host, self->sent);
    if (!self->stuck) usp_host_free(transport->host, self);
}

static const usp_transport_ops mpi_ops = {
    .name = "mpi",
    .prepare = mpi_prepare,
    .exchange = mpi_exchange,
    .alloc_shared = usp_plain_alloc_shared,
    .register_shared = usp_plain_register_shared,
    .free_shared = usp_plain_free_shared,
    .reach = usp_plain_reach,
    .watch = usp_plain_watch,
    .stop = usp_plain_stop,
    .destroy = mpi_destroy,
};

/* ---- creation ---------------------------------------------------------------------------------------------------- */

/* Waits for one collective of the set-up with the time limit; the channel that could name a rank is not there yet. MPI
 * knows no way to take a collective back: one that is late stays. */
static usp_status wait_for(const usp_transport *base, MPI_Request *request, const char *what, int *stuck) {
    int64_t begin = usp_now_ms();
    int done = 0;
    for (int round = 0; !done; round++) {
        int code = MPI_Test(request, &done, MPI_STATUS_IGNORE);
        if (code != MPI_SUCCESS) return fail_mpi(base->rank, what, code);
        *stuck = !done && base->timeout_ms >= 0 && usp_now_ms() - begin > base->timeout_ms;
        if (*stuck)
            return usp_fail(USP_TIMEOUT, "rank %d: %s did not end within %d ms", base->rank, what, base->timeout_ms);
        if (!done) usp_pause(round);
    }
    return USP_OK;
}

static usp_status duplicate(usp_mpi *self, MPI_Comm borrowed) {
    MPI_Request request;
    int code = MPI_Comm_idup(borrowed, &self->comm, &request);
    if (code != MPI_SUCCESS) return fail_mpi(self->base.rank, "MPI_Comm_idup", code);
    USP_TRY(wait_for(&self->base, &request, "MPI_Comm_idup", &self->stuck));
    MPI_Comm_set_errhandler(self->comm, MPI_ERRORS_RETURN);
    return USP_OK;
}

/* By way of own memory: after a time-out the caller's may be gone. */
static usp_status gather(void *user, const void *mine, void *all, size_t bytes_per_rank) {
    usp_mpi *self = user;
    MPI_Request request;
    int bytes = (int)bytes_per_rank;
    if (bytes_per_rank > sizeof *self->cards) return usp_fail(USP_INTERNAL, "a gather of %d bytes over MPI", bytes);
    memcpy(self->cards, mine, bytes_per_rank);
    int code = MPI_Iallgather(self->cards, bytes, MPI_BYTE, self->cards + 1, bytes, MPI_BYTE, self->comm, &request);
    if (code != MPI_SUCCESS) return fail_mpi(self->base.rank, "MPI_Iallgather", code);
    USP_TRY(wait_for(&self->base, &request, "MPI_Iallgather", &self->stuck));
    memcpy(all, self->cards + 1, bytes_per_rank * (size_t)self->base.size);
    return USP_OK;
}

/* Whether it is a communicator, and of one group. Where it is none MPI would end the program, unless told not to. */
static int is_communicator(MPI_Comm comm) {
    const MPI_Comm asked[] = {MPI_COMM_WORLD, MPI_COMM_SELF}; /* whose handlers speak for no communicator */
    MPI_Errhandler handler[2];
    int has_two_groups = 1;
    for (int i = 0; i < 2; i++) MPI_Comm_get_errhandler(asked[i], &handler[i]);
    for (int i = 0; i < 2; i++) MPI_Comm_set_errhandler(asked[i], MPI_ERRORS_RETURN);
    int code = comm != MPI_COMM_NULL ? MPI_Comm_test_inter(comm, &has_two_groups) : MPI_ERR_COMM;
    for (int i = 0; i < 2; i++) MPI_Comm_set_errhandler(asked[i], handler[i]);
    for (int i = 0; i < 2; i++) MPI_Errhandler_free(&handler[i]);
    return code == MPI_SUCCESS && !has_two_groups;
}

static usp_status find_communicator(int fortran_comm, MPI_Comm *borrowed) {
    int initialized = 0, finalized = 0;
    MPI_Initialized(&initialized);
    MPI_Finalized(&finalized);
    USP_REQUIRE(initialized && !finalized, "MPI is not initialised, or finalised already");
    *borrowed = MPI_Comm_f2c(fortran_comm);
    USP_REQUIRE(is_communicator(*borrowed), "fortran_comm %d is no communicator", fortran_comm);
    return USP_OK;
}

static usp_status check_device(const usp_transport_config *config) {
    if (config->device->ops->kind == USP_DEVICE_CPU) return USP_OK;
    return usp_fail(USP_UNSUPPORTED, "the MPI transport moves host memory; the device is %s",
                    config->device->ops->name);
}

static usp_status begin(const usp_transport_config *config, MPI_Comm borrowed, usp_mpi **out) {
    void *memory = NULL, *messages = NULL;
    int rank = 0, size = 1;
    MPI_Comm_rank(borrowed, &rank);
    MPI_Comm_size(borrowed, &size);
    size_t bytes = sizeof(usp_mpi) + sizeof(usp_card) * (1 + (size_t)size);
    USP_TRY(usp_host_alloc(config->host, bytes, "the MPI transport", &memory));
    usp_status status = usp_host_alloc(config->host, 2 * sizeof(unsigned) * (size_t)size, "message counts", &messages);
    if (status != USP_OK) {
        usp_host_free(config->host, memory);
        return status;
    }
    usp_mpi *self = memory;
    self->base = (usp_transport){&mpi_ops, rank, size, config->timeout_ms, config->device, config->host, NULL, NULL};
    self->comm = MPI_COMM_NULL;
    self->sent = messages;
    self->received = self->sent + size;
    *out = self;
    return USP_OK;
}

/* What else needs no other rank. */
static usp_status prepare_self(const usp_transport_config *config, usp_meeting *meeting, usp_mpi *self) {
    USP_TRY(check_device(config));
    return usp_channel_create(config, &meeting->bootstrap, &meeting->mine.address, &self->base.control);
}

/* Ranks that have failed come too: a communicator that all duplicated is fit for another try. */
static usp_status join(usp_mpi *self, usp_meeting *meeting, MPI_Comm borrowed) {
    USP_TRY(duplicate(self, borrowed));
    usp_status status = usp_meet(meeting);
    if (status == USP_OK) return usp_channel_connect(self->base.control, meeting, NULL);
    if (!self->stuck) MPI_Comm_free(&self->comm);
    return status;
}

usp_status usp_transport_create_mpi(const usp_transport_config *config, usp_meeting *meeting, int fortran_comm,
                                    usp_transport **transport) {
    usp_mpi *self = NULL;
    MPI_Comm borrowed = MPI_COMM_NULL;
    const usp_card *mine = &meeting->mine;
    usp_status status = find_communicator(fortran_comm, &borrowed);
    if (status == USP_OK) status = begin(config, borrowed, &self);
    if (self)
        meeting->bootstrap =
            (usp_bootstrap){.gather = gather, .user = self, .rank = self->base.rank, .size = self->base.size};
    if (self && mine->status == USP_OK) usp_meeting_note(meeting, prepare_self(config, meeting, self));
    if (status == USP_OK) status = join(self, meeting, borrowed);
    if (status == USP_OK) {
        *transport = &self->base;
        return USP_OK;
    }
    if (self && self->stuck) /* whatever else was made of it */
        status = usp_fail(USP_TIMEOUT, "rank %d: the other ranks did not make this world within %d ms", self->base.rank,
                          self->base.timeout_ms);
    status = usp_meeting_note(meeting, status); /* before anything else is said */
    if (self) usp_transport_end(&self->base);
    return usp_meeting_note(meeting, status);
}
