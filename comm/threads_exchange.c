/* threads_exchange.c - the transport of ranks that are threads of one process: each receiver copies straight from the
 * sender's memory. It knows of devices only what their table offers.
 *
 * Copies are made without the rendezvous' mutex. There is a box for each ordered pair of ranks, so exchanges of
 * different pairs never meet. A sender stays in its exchange until its last message has been copied, and its stream
 * waits for the receivers' streams; the host never waits for a stream. */
#define _POSIX_C_SOURCE 200809L
#include "error.h"
#include "list.h"
#include "rendezvous.h"
#include <errno.h>
#include <unistd.h>

enum { USP_LEAVE_MS = 5000 /* longest wait of a rank that leaves */ };

static usp_threads *usp_threads_of(usp_transport *transport) {
    return (usp_threads *)((char *)transport - offsetof(usp_threads, transport));
}

/* ---- exchange ---------------------------------------------------------------------------------------------------- */

/* One call of exchange. */
typedef struct usp_errand {
    const usp_message *sends, *recvs;
    int send_count, recv_count;
    usp_stream stream;
} usp_errand;

static usp_status check_errand(const usp_transport *transport, const usp_errand *errand) {
    USP_TRY(usp_list_check(transport, errand->sends, errand->send_count, errand->recvs, errand->recv_count));
    int capturing = 0;
    USP_TRY(transport->device->ops->capturing(transport->device, errand->stream, &capturing));
    if (capturing) return usp_fail(USP_UNSUPPORTED, "an exchange between threads cannot be captured in a graph");
    return USP_OK;
}

static void post(usp_threads *self, const usp_errand *errand) {
    usp_rendezvous *meeting = self->meeting;
    int rank = self->control.rank;
    usp_seat *seat = &meeting->seats[rank];
    seat->activity = USP_EXCHANGING;
    seat->exchanges++;
    seat->sends = errand->sends;
    seat->send_count = errand->send_count;
    for (int peer = 0; peer < meeting->size; peer++) {
        usp_box *out = usp_threads_box(meeting, rank, peer), *in = usp_threads_box(meeting, peer, rank);
        out->next = usp_list_next(errand->sends, errand->send_count, 0, peer);
        in->want = usp_list_next(errand->recvs, errand->recv_count, 0, peer);
        if (out->next != USP_NO_MESSAGE) pthread_cond_signal(&meeting->seats[peer].wake);
    }
}

/* Nobody may read this rank's memory or look for its messages any more. */
static void withdraw(usp_threads *self) {
    usp_rendezvous *meeting = self->meeting;
    int rank = self->control.rank;
    usp_seat *seat = &meeting->seats[rank];
    for (int peer = 0; peer < meeting->size; peer++) {
        usp_box *out = usp_threads_box(meeting, rank, peer);
        while (out->copying) pthread_cond_wait(&seat->wake, &meeting->mutex);
        out->next = usp_threads_box(meeting, peer, rank)->want = USP_NO_MESSAGE;
        out->unsettled = 0;
        if (meeting->seats[peer].activity == USP_LEFT) pthread_cond_signal(&meeting->seats[peer].wake);
    }
    seat->sends = NULL;
    seat->activity = USP_COMPUTING;
}

/* Lets this rank's stream wait for the receiver's, so that later work may overwrite the message. */
static usp_status settle(usp_threads *self, int peer, usp_stream stream, int *moved) {
    usp_rendezvous *meeting = self->meeting;
    usp_device *device = self->transport.device;
    usp_box *out = usp_threads_box(meeting, self->control.rank, peer);
    if (!out->unsettled) return USP_OK;
    out->unsettled = 0;
    *moved = 1;
    if (meeting->seats[peer].activity == USP_LEFT) pthread_cond_signal(&meeting->seats[peer].wake);
    if (device->ops->event_wait(device, out->consumed, stream) == USP_OK) return USP_OK;
    return usp_threads_fail(meeting, USP_DEVICE, "rank %d: %s", self->control.rank, usp_last_error());
}

/* Copies one message without the mutex; `copying` keeps the sender where it is. */
static usp_status copy_message(usp_threads *self, usp_box *in, const usp_seat *sender, const usp_message *recv,
                               usp_stream stream) {
    usp_device *device = self->transport.device;
    const usp_message *send = &sender->sends[in->next];
    in->copying = 1;
    pthread_mutex_unlock(&self->meeting->mutex);
    usp_status status = device->ops->event_wait(device, sender->posted, stream);
    if (status == USP_OK) status = usp_message_copy(device, recv, send, stream);
    pthread_mutex_lock(&self->meeting->mutex);
    in->copying = 0;
    if (status == USP_OK) status = device->ops->event_record(device, in->consumed, stream);
    if (status == USP_OK) return USP_OK;
    return usp_threads_fail(self->meeting, status, "rank %d: %s", self->control.rank, usp_last_error());
}

/* Both are in the exchange that carries the message: neither re-plans meanwhile. */
static usp_status compare_plans(usp_rendezvous *meeting, int rank, int peer) {
    const usp_replans_list *own = &meeting->seats[rank].plans, *theirs = &meeting->seats[peer].plans;
    for (int i = 0; i < USP_PLAN_SIZES && theirs->of[i].ranks > 0; i++) {
        const usp_replans *plan = &theirs->of[i];
        uint64_t hash = plan->hash[plan->count % USP_PLAN_HISTORY];
        if (usp_plans_differ(own, rank, peer, plan->ranks, plan->count, hash))
            return usp_threads_fail(meeting, USP_MISMATCH,
                                    "rank %d and rank %d re-planned to different documents or gave calls unlike memory",
                                    peer, rank);
    }
    return USP_OK;
}

static usp_status compare_messages(const usp_threads *self, int peer, const usp_message *send,
                                   const usp_message *recv) {
    usp_rendezvous *meeting = self->meeting;
    int rank = self->control.rank;
    size_t sent = usp_message_bytes(send), expected = usp_message_bytes(recv);
    if (sent != expected)
        return usp_threads_fail(meeting, USP_COMM, "rank %d sends %zu bytes to rank %d, which expects %zu", peer, sent,
                                rank, expected);
    if (send->there == usp_pieces_reach(&self->pieces, peer, recv->there, usp_message_extent(recv))) return USP_OK;
    return usp_threads_fail(meeting, USP_COMM, "rank %d and rank %d name two places for one message", peer, rank);
}

/* Takes the next message of `peer` if it is there. */
static usp_status receive(usp_threads *self, int peer, const usp_errand *errand, int *moved) {
    usp_rendezvous *meeting = self->meeting;
    int rank = self->control.rank;
    usp_box *in = usp_threads_box(meeting, peer, rank);
    usp_seat *sender = &meeting->seats[peer];
    if (in->want == USP_NO_MESSAGE || in->next == USP_NO_MESSAGE) return USP_OK;
    const usp_message *recv = &errand->recvs[in->want];
    USP_TRY(compare_plans(meeting, rank, peer));
    USP_TRY(compare_messages(self, peer, &sender->sends[in->next], recv));
    usp_status status = copy_message(self, in, sender, recv, errand->stream);
    pthread_cond_signal(&sender->wake);
    if (status != USP_OK) return status;
    in->next = usp_list_next(sender->sends, sender->send_count, in->next + 1, rank);
    in->want = usp_list_next(errand->recvs, errand->recv_count, in->want + 1, peer);
    in->unsettled = 1;
    *moved = 1;
    return USP_OK;
}

/* Moves whatever can move until nothing is left. The time limit is for a wait, not for the whole exchange. */
static usp_status run_errand(usp_threads *self, const usp_errand *errand) {
    usp_rendezvous *meeting = self->meeting;
    struct timespec deadline = usp_threads_deadline(self->control.timeout_ms);
    for (;;) {
        int moved = 0;
        USP_TRY(usp_threads_failure(meeting));
        for (int peer = 0; peer < meeting->size; peer++) {
            USP_TRY(settle(self, peer, errand->stream, &moved));
            USP_TRY(receive(self, peer, errand, &moved));
        }
        if (moved) {
            deadline = usp_threads_deadline(self->control.timeout_ms);
            continue;
        }
        if (usp_threads_waits_for(meeting, self->control.rank) == USP_NO_RANK) return USP_OK;
        USP_TRY(usp_threads_wait(self, &deadline));
    }
}

static usp_status threads_exchange(usp_transport *transport, int lane, const usp_message *sends, int send_count,
                                   const usp_message *recvs, int recv_count, usp_stream stream) {
    usp_threads *self = usp_threads_of(transport);
    usp_rendezvous *meeting = self->meeting;
    usp_errand errand = {sends, recvs, send_count, recv_count, stream};
    (void)lane;
    USP_TRY(check_errand(transport, &errand));
    USP_TRY(transport->device->ops->event_record(transport->device, meeting->seats[transport->rank].posted, stream));
    pthread_mutex_lock(&meeting->mutex);
    usp_status status = usp_threads_failure(meeting);
    if (status == USP_OK) {
        post(self, &errand);
        status = run_errand(self, &errand);
        withdraw(self);
    }
    pthread_mutex_unlock(&meeting->mutex);
    return status;
}

/* ---- shared memory ----------------------------------------------------------------------------------------------- */

static usp_status threads_alloc_shared(usp_transport *transport, size_t bytes, void **memory) {
    usp_threads *self = usp_threads_of(transport);
    USP_TRY(usp_plain_alloc_shared(transport, bytes, memory));
    return usp_pieces_add(&self->pieces, transport->host, *memory, bytes, transport->rank, transport->size);
}

static usp_status threads_register_shared(usp_transport *transport, void *memory) {
    char **at = usp_pieces_find(&usp_threads_of(transport)->pieces, memory)->at;
    return usp_transport_allgather(transport, &memory, at, sizeof memory);
}

static usp_status threads_free_shared(usp_transport *transport, void *memory) {
    usp_pieces *pieces = &usp_threads_of(transport)->pieces;
    usp_pieces_remove(pieces, transport->host, usp_pieces_find(pieces, memory));
    return usp_plain_free_shared(transport, memory);
}

/* Kernels of a GPU do not reach another one's memory. */
static void *threads_reach(usp_transport *transport, int peer, const void *memory) {
    int gpu = transport->device->ops->kind == USP_DEVICE_CUDA;
    return gpu ? NULL : usp_pieces_reach(&usp_threads_of(transport)->pieces, peer, memory, 1);
}

/* ---- the table --------------------------------------------------------------------------------------------------- */

/* Takes back the event that tells `peer` what has been read; 0 if the peer, in a copy of its own that does not end, has
 * not let go of it in time. */
static int take_back(usp_threads *self, int peer, const struct timespec *deadline) {
    usp_rendezvous *meeting = self->meeting;
    usp_box *in = usp_threads_box(meeting, peer, self->control.rank);
    int late = 0;
    while (in->unsettled && !late)
        late = pthread_cond_timedwait(&meeting->seats[self->control.rank].wake, &meeting->mutex, deadline) == ETIMEDOUT;
    if (in->unsettled) return 0;
    self->transport.device->ops->event_destroy(self->transport.device, in->consumed);
    in->consumed = NULL;
    return 1;
}

static void leave(usp_threads *self) {
    usp_rendezvous *meeting = self->meeting;
    usp_seat *seat = &meeting->seats[self->control.rank];
    int limit = self->control.timeout_ms, lost = 0;
    struct timespec deadline = usp_threads_deadline(limit < 0 || limit > USP_LEAVE_MS ? USP_LEAVE_MS : limit);
    pthread_mutex_lock(&meeting->mutex);
    seat->activity = USP_LEFT;
    usp_threads_wake(meeting);
    for (int peer = 0; peer < meeting->size; peer++) lost += !take_back(self, peer, &deadline);
    self->transport.device->ops->event_destroy(self->transport.device, seat->posted);
    seat->posted = NULL;
    pthread_mutex_unlock(&meeting->mutex);
    if (lost) usp_host_log(self->transport.host, 1, "rank %d leaves %d events to late ranks", self->control.rank, lost);
}

static void threads_destroy(usp_transport *transport) {
    leave(usp_threads_of(transport));
}

static const usp_transport_ops threads_ops = {
    .name = "threads",
    .reaches = 1,
    .prepare = usp_plain_prepare,
    .exchange = threads_exchange,
    .alloc_shared = threads_alloc_shared,
    .register_shared = threads_register_shared,
    .free_shared = threads_free_shared,
    .reach = threads_reach,
    .watch = usp_plain_watch,
    .stop = usp_plain_stop,
    .destroy = threads_destroy,
};

/* ---- create ------------------------------------------------------------------------------------------------------ */

/* Those who came for a world that was not made have yet to leave; afterwards the rendezvous is as new. */
static usp_status wait_until_fresh(usp_rendezvous *meeting, int rank, int timeout_ms) {
    struct timespec deadline = usp_threads_deadline(timeout_ms);
    while (meeting->failure != USP_OK)
        if (timeout_ms < 0)
            pthread_cond_wait(&meeting->seats[rank].wake, &meeting->mutex);
        else if (pthread_cond_timedwait(&meeting->seats[rank].wake, &meeting->mutex, &deadline) == ETIMEDOUT)
            return usp_fail(USP_TIMEOUT, "the ranks of a rendezvous did not leave it within %d ms", timeout_ms);
    return USP_OK;
}

static usp_status take_seat(usp_rendezvous *meeting, int rank, int timeout_ms) {
    usp_status status = USP_OK;
    pthread_mutex_lock(&meeting->mutex);
    usp_seat *seat = &meeting->seats[rank];
    if (seat->activity == USP_ABSENT) status = wait_until_fresh(meeting, rank, timeout_ms);
    if (status == USP_OK && seat->activity != USP_ABSENT)
        status = usp_fail(USP_INVALID, "rank %d of the rendezvous is taken", rank);
    if (status == USP_OK) seat->activity = USP_COMPUTING;
    pthread_mutex_unlock(&meeting->mutex);
    return status;
}

static usp_status make_events(usp_threads *self) {
    usp_rendezvous *meeting = self->meeting;
    usp_device *device = self->transport.device;
    USP_TRY(device->ops->event_create(device, &meeting->seats[self->control.rank].posted));
    for (int peer = 0; peer < meeting->size; peer++)
        if (peer != self->control.rank)
            USP_TRY(device->ops->event_create(device, &usp_threads_box(meeting, peer, self->control.rank)->consumed));
    return USP_OK;
}

static void free_events(usp_threads *self) {
    usp_rendezvous *meeting = self->meeting;
    usp_device *device = self->transport.device;
    usp_seat *seat = &meeting->seats[self->control.rank];
    if (!device) return;
    for (int peer = 0; peer < meeting->size; peer++) {
        usp_box *in = usp_threads_box(meeting, peer, self->control.rank);
        device->ops->event_destroy(device, in->consumed);
        in->consumed = NULL;
    }
    device->ops->event_destroy(device, seat->posted);
    seat->posted = NULL;
}

/* A world that was not made: the seat is free for another try, once all have left for one. */
static void give_seat_back(usp_threads *self) {
    usp_rendezvous *meeting = self->meeting;
    int present = 0;
    pthread_mutex_lock(&meeting->mutex);
    free_events(self);
    meeting->seats[self->control.rank].activity = USP_ABSENT;
    for (int i = 0; i < meeting->size; i++) present += meeting->seats[i].activity != USP_ABSENT;
    if (present == 0) {
        meeting->failure = USP_OK;
        usp_threads_wake(meeting);
    }
    pthread_mutex_unlock(&meeting->mutex);
}

static usp_status gather_cards(void *user, const void *mine, void *all, size_t bytes_per_rank) {
    return usp_threads_control.allgather(user, mine, all, bytes_per_rank);
}

/* The object is on the stack until all have met: a rank without memory tells the others so. */
usp_status usp_transport_create_threads(const usp_transport_config *config, usp_meeting *met, usp_rendezvous *meeting,
                                        int rank, usp_transport **transport) {
    USP_REQUIRE(rank >= 0 && rank < meeting->size, "rank is %d in a rendezvous of %d", rank, meeting->size);
    USP_REQUIRE(meeting->process == getpid(), "the rendezvous is of process %d, and this is a child of its fork",
                (int)meeting->process);
    USP_TRY(take_seat(meeting, rank, config->timeout_ms));
    usp_threads self = {
        .control = {&usp_threads_control, rank, meeting->size, config->timeout_ms},
        .transport = {&threads_ops, rank, meeting->size, config->timeout_ms, config->device, config->host, NULL, NULL},
        .meeting = meeting};
    void *memory = NULL;
    met->bootstrap = (usp_bootstrap){.gather = gather_cards, .user = &self, .rank = rank, .size = meeting->size};
    if (met->mine.status == USP_OK) usp_meeting_note(met, make_events(&self));
    if (met->mine.status == USP_OK) usp_meeting_note(met, usp_host_alloc(config->host, sizeof self, "ranks", &memory));
    usp_status status = usp_meet(met);
    if (status != USP_OK) {
        usp_host_free(config->host, memory);
        give_seat_back(&self);
        return status;
    }
    pthread_mutex_lock(&meeting->mutex);
    meeting->uses++;
    pthread_mutex_unlock(&meeting->mutex);
    usp_threads *kept = memory;
    *kept = self;
    kept->transport.control = &kept->control;
    *transport = &kept->transport;
    return USP_OK;
}
