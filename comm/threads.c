/* threads.c - the comm whose ranks are threads of one process: each receiver copies straight from the sender's memory.
 * It opens no connection and starts no thread, and knows of devices only what their table offers.
 *
 * One mutex guards the rendezvous; copies are made without it. There is a seat for each rank and a box for each ordered
 * pair of ranks, so exchanges of different pairs never meet. A sender stays in its exchange until its last message has
 * been copied, and its stream waits for the receivers' streams; the host never waits for a stream. */
#define _POSIX_C_SOURCE 200809L
#include "error.h"
#include "list.h"
#include "plans.h"
#include <errno.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { USP_NO_RANK = -1, USP_LEAVE_MS = 5000 /* longest wait of a rank that leaves */ };

typedef enum usp_activity { USP_ABSENT, USP_COMPUTING, USP_EXCHANGING, USP_GATHERING, USP_LEFT } usp_activity;

/* One ordered pair of ranks. */
typedef struct usp_box {
    int next;            /* index of the sender's next message to this receiver */
    int want;            /* index of the receiver's next message from this sender */
    int copying;         /* the receiver reads the sender's memory just now */
    int unsettled;       /* the sender's stream does not yet wait for `consumed` */
    usp_event *consumed; /* the receiver's stream has read the message; the receiver's */
} usp_box;

/* One rank. What it waits for follows from its activity and its boxes. */
typedef struct usp_seat {
    pthread_cond_t wake;
    usp_activity activity;
    uint64_t exchanges; /* entered so far, gathers included */
    usp_event *posted;  /* what the rank sends is ready */
    const usp_send *sends;
    int send_count;
    const void *mine; /* gathering */
    void *all;
    size_t bytes;
    usp_replans_list plans;
} usp_seat;

struct usp_rendezvous {
    pthread_mutex_t mutex;
    usp_host host;
    pid_t process; /* that made it */
    int size;
    int uses;           /* by its maker, and by comms that are alive */
    usp_status failure; /* sticky, the same for all ranks */
    char sentence[256];
    usp_seat *seats; /* [size] */
    usp_box *boxes;  /* [sender][receiver] */
};

typedef struct usp_thread_comm {
    usp_comm base;
    usp_rendezvous *meeting;
} usp_thread_comm;

/* ---- the rendezvous ---------------------------------------------------------------------------------------------- */

static usp_box *box_of(usp_rendezvous *meeting, int sender, int receiver) {
    return &meeting->boxes[(size_t)sender * (size_t)meeting->size + (size_t)receiver];
}

static void seats_init(usp_rendezvous *meeting) {
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    for (int i = 0; i < meeting->size; i++) pthread_cond_init(&meeting->seats[i].wake, &attributes);
    pthread_condattr_destroy(&attributes);
    for (int i = 0; i < meeting->size * meeting->size; i++)
        meeting->boxes[i].next = meeting->boxes[i].want = USP_NO_MESSAGE;
}

usp_status usp_rendezvous_create(int size, usp_rendezvous **rendezvous) {
    USP_REQUIRE(rendezvous != NULL, "rendezvous is NULL");
    USP_REQUIRE(size >= 1 && size <= 4096, "size is %d, not 1 to 4096", size);
    usp_world_config defaults = {.struct_size = sizeof defaults};
    usp_host host = usp_host_from_config(&defaults);
    size_t ranks = (size_t)size, head = sizeof(usp_rendezvous) + ranks * sizeof(usp_seat);
    void *memory;
    USP_TRY(usp_host_alloc(&host, head + ranks * ranks * sizeof(usp_box), "rendezvous", &memory));
    usp_rendezvous *meeting = memory;
    meeting->host = host;
    meeting->process = getpid();
    meeting->uses = 1;
    meeting->size = size;
    meeting->seats = (usp_seat *)(meeting + 1);
    meeting->boxes = (usp_box *)(meeting->seats + ranks);
    pthread_mutex_init(&meeting->mutex, NULL);
    seats_init(meeting);
    *rendezvous = meeting;
    return USP_OK;
}

/* The last user ends it. */
static void release(usp_rendezvous *meeting) {
    pthread_mutex_lock(&meeting->mutex);
    int left = --meeting->uses;
    pthread_mutex_unlock(&meeting->mutex);
    if (left > 0) return;
    for (int i = 0; i < meeting->size; i++) pthread_cond_destroy(&meeting->seats[i].wake);
    pthread_mutex_destroy(&meeting->mutex);
    usp_host host = meeting->host;
    usp_host_free(&host, meeting);
}

void usp_rendezvous_destroy(usp_rendezvous *meeting) {
    if (meeting && meeting->process == getpid()) release(meeting);
}

/* ---- failure and blame; all under the mutex ---------------------------------------------------------------------- */

static void wake_all(usp_rendezvous *meeting) {
    for (int i = 0; i < meeting->size; i++) pthread_cond_signal(&meeting->seats[i].wake);
}

/* The failure of the world as this thread's error. */
static usp_status failure_of(const usp_rendezvous *meeting) {
    return meeting->failure == USP_OK ? USP_OK : usp_fail(meeting->failure, "%s", meeting->sentence);
}

/* Fails the world for all ranks, unless it has failed already; the first failure is the one that all report. */
__attribute__((format(printf, 3, 4))) static usp_status fail_all(usp_rendezvous *meeting, usp_status status,
                                                                 const char *format, ...) {
    if (meeting->failure == USP_OK) {
        va_list arguments;
        va_start(arguments, format);
        vsnprintf(meeting->sentence, sizeof meeting->sentence, format, arguments);
        va_end(arguments);
        meeting->failure = status;
        wake_all(meeting);
    }
    return failure_of(meeting);
}

/* A receiver whose message is there is not waiting: it is the one who has to act. */
static int waits_on(usp_rendezvous *meeting, int rank, int peer) {
    if (rank == peer) return 0;
    usp_activity activity = meeting->seats[rank].activity;
    if (activity == USP_GATHERING) return meeting->seats[peer].activity != USP_GATHERING;
    if (activity != USP_EXCHANGING) return 0;
    const usp_box *out = box_of(meeting, rank, peer), *in = box_of(meeting, peer, rank);
    return out->next != USP_NO_MESSAGE || (in->want != USP_NO_MESSAGE && in->next == USP_NO_MESSAGE);
}

static int waits_for(usp_rendezvous *meeting, int rank) {
    for (int peer = 0; peer < meeting->size; peer++)
        if (waits_on(meeting, rank, peer)) return peer;
    return USP_NO_RANK;
}

static int fewest_exchanges(const usp_rendezvous *meeting) {
    int fewest = 0;
    for (int i = 1; i < meeting->size; i++)
        if (meeting->seats[i].exchanges < meeting->seats[fewest].exchanges) fewest = i;
    return fewest;
}

/* The end of the chain of who waits for whom; where the chain is a circle, the rank that has done least. */
static int rank_behind(usp_rendezvous *meeting, int rank) {
    for (int hops = 0; hops <= meeting->size; hops++) {
        int next = waits_for(meeting, rank);
        if (next == USP_NO_RANK) return rank;
        rank = next;
    }
    return fewest_exchanges(meeting);
}

/* ---- waiting; all under the mutex -------------------------------------------------------------------------------- */

static struct timespec deadline_in(int milliseconds) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    time.tv_sec += milliseconds / 1000;
    time.tv_nsec += (long)(milliseconds % 1000) * 1000000L;
    if (time.tv_nsec >= 1000000000L) {
        time.tv_sec++;
        time.tv_nsec -= 1000000000L;
    }
    return time;
}

static usp_status check_left(usp_rendezvous *meeting, int rank) {
    for (int peer = 0; peer < meeting->size; peer++)
        if (meeting->seats[peer].activity == USP_LEFT && waits_on(meeting, rank, peer))
            return fail_all(meeting, USP_PEER_LOST, "rank %d left while rank %d waited for it", peer, rank);
    return USP_OK;
}

/* Sleeps until something may have changed. */
static usp_status wait_for_change(usp_thread_comm *self, const struct timespec *deadline) {
    usp_rendezvous *meeting = self->meeting;
    int rank = self->base.rank;
    USP_TRY(check_left(meeting, rank));
    pthread_cond_t *wake = &meeting->seats[rank].wake;
    if (self->base.timeout_ms < 0) {
        pthread_cond_wait(wake, &meeting->mutex);
        return USP_OK;
    }
    if (pthread_cond_timedwait(wake, &meeting->mutex, deadline) != ETIMEDOUT) return USP_OK;
    if (waits_for(meeting, rank) == USP_NO_RANK) return USP_OK;
    return fail_all(meeting, USP_TIMEOUT, "rank %d did not arrive within %d ms; rank %d waited",
                    rank_behind(meeting, rank), self->base.timeout_ms, rank);
}

/* ---- exchange ---------------------------------------------------------------------------------------------------- */

/* One call of exchange. */
typedef struct usp_errand {
    const usp_send *sends;
    const usp_recv *recvs;
    int send_count, recv_count;
    usp_stream stream;
} usp_errand;

static usp_status check_errand(const usp_comm *comm, const usp_errand *errand) {
    USP_TRY(usp_list_check(comm, errand->sends, errand->send_count, errand->recvs, errand->recv_count));
    int capturing = 0;
    USP_TRY(comm->device->ops->capturing(comm->device, errand->stream, &capturing));
    if (capturing) return usp_fail(USP_UNSUPPORTED, "an exchange between threads cannot be captured in a graph");
    return USP_OK;
}

static void post(usp_thread_comm *self, const usp_errand *errand) {
    usp_rendezvous *meeting = self->meeting;
    int rank = self->base.rank;
    usp_seat *seat = &meeting->seats[rank];
    seat->activity = USP_EXCHANGING;
    seat->exchanges++;
    seat->sends = errand->sends;
    seat->send_count = errand->send_count;
    for (int peer = 0; peer < meeting->size; peer++) {
        usp_box *out = box_of(meeting, rank, peer), *in = box_of(meeting, peer, rank);
        out->next = usp_list_next_send(errand->sends, errand->send_count, 0, peer);
        in->want = usp_list_next_recv(errand->recvs, errand->recv_count, 0, peer);
        if (out->next != USP_NO_MESSAGE) pthread_cond_signal(&meeting->seats[peer].wake);
    }
}

/* Nobody may read this rank's memory or look for its messages any more. */
static void withdraw(usp_thread_comm *self) {
    usp_rendezvous *meeting = self->meeting;
    int rank = self->base.rank;
    usp_seat *seat = &meeting->seats[rank];
    for (int peer = 0; peer < meeting->size; peer++) {
        usp_box *out = box_of(meeting, rank, peer);
        while (out->copying) pthread_cond_wait(&seat->wake, &meeting->mutex);
        out->next = box_of(meeting, peer, rank)->want = USP_NO_MESSAGE;
        out->unsettled = 0;
        if (meeting->seats[peer].activity == USP_LEFT) pthread_cond_signal(&meeting->seats[peer].wake);
    }
    seat->sends = NULL;
    seat->activity = USP_COMPUTING;
}

/* Lets this rank's stream wait for the receiver's, so that later work may overwrite the message. */
static usp_status settle(usp_thread_comm *self, int peer, usp_stream stream, int *moved) {
    usp_rendezvous *meeting = self->meeting;
    usp_device *device = self->base.device;
    usp_box *out = box_of(meeting, self->base.rank, peer);
    if (!out->unsettled) return USP_OK;
    out->unsettled = 0;
    *moved = 1;
    if (meeting->seats[peer].activity == USP_LEFT) pthread_cond_signal(&meeting->seats[peer].wake);
    if (device->ops->event_wait(device, out->consumed, stream) == USP_OK) return USP_OK;
    return fail_all(meeting, USP_DEVICE, "rank %d: %s", self->base.rank, usp_last_error());
}

/* Copies one message without the mutex; `copying` keeps the sender where it is. */
static usp_status copy_message(usp_thread_comm *self, usp_box *in, const usp_seat *sender, const usp_recv *recv,
                               usp_stream stream) {
    usp_device *device = self->base.device;
    const void *data = sender->sends[in->next].data;
    in->copying = 1;
    pthread_mutex_unlock(&self->meeting->mutex);
    usp_status status = device->ops->event_wait(device, sender->posted, stream);
    if (status == USP_OK) status = device->ops->copy(device, recv->data, data, recv->bytes, stream);
    pthread_mutex_lock(&self->meeting->mutex);
    in->copying = 0;
    if (status == USP_OK) status = device->ops->event_record(device, in->consumed, stream);
    if (status == USP_OK) return USP_OK;
    return fail_all(self->meeting, status, "rank %d: %s", self->base.rank, usp_last_error());
}

/* Both are in the exchange that carries the message: neither re-plans meanwhile. */
static usp_status compare_plans(usp_rendezvous *meeting, int rank, int peer) {
    const usp_replans_list *own = &meeting->seats[rank].plans, *theirs = &meeting->seats[peer].plans;
    for (int i = 0; i < USP_PLAN_SIZES && theirs->of[i].ranks > 0; i++) {
        const usp_replans *plan = &theirs->of[i];
        uint64_t hash = plan->hash[plan->count % USP_PLAN_HISTORY];
        if (usp_plans_differ(own, rank, peer, plan->ranks, plan->count, hash))
            return fail_all(meeting, USP_MISMATCH, "rank %d and rank %d re-planned to different documents", peer, rank);
    }
    return USP_OK;
}

/* Takes the next message of `peer` if it is there. */
static usp_status receive(usp_thread_comm *self, int peer, const usp_errand *errand, int *moved) {
    usp_rendezvous *meeting = self->meeting;
    int rank = self->base.rank;
    usp_box *in = box_of(meeting, peer, rank);
    usp_seat *sender = &meeting->seats[peer];
    if (in->want == USP_NO_MESSAGE || in->next == USP_NO_MESSAGE) return USP_OK;
    const usp_recv *recv = &errand->recvs[in->want];
    size_t sent = sender->sends[in->next].bytes;
    if (sent != recv->bytes)
        return fail_all(meeting, USP_COMM, "rank %d sends %zu bytes to rank %d, which expects %zu", peer, sent, rank,
                        recv->bytes);
    USP_TRY(compare_plans(meeting, rank, peer));
    usp_status status = copy_message(self, in, sender, recv, errand->stream);
    pthread_cond_signal(&sender->wake);
    if (status != USP_OK) return status;
    in->next = usp_list_next_send(sender->sends, sender->send_count, in->next + 1, rank);
    in->want = usp_list_next_recv(errand->recvs, errand->recv_count, in->want + 1, peer);
    in->unsettled = 1;
    *moved = 1;
    return USP_OK;
}

/* Moves whatever can move until nothing is left. The time limit is for a wait, not for the whole exchange. */
static usp_status run_errand(usp_thread_comm *self, const usp_errand *errand) {
    usp_rendezvous *meeting = self->meeting;
    struct timespec deadline = deadline_in(self->base.timeout_ms);
    for (;;) {
        int moved = 0;
        USP_TRY(failure_of(meeting));
        for (int peer = 0; peer < meeting->size; peer++) {
            USP_TRY(settle(self, peer, errand->stream, &moved));
            USP_TRY(receive(self, peer, errand, &moved));
        }
        if (moved) {
            deadline = deadline_in(self->base.timeout_ms);
            continue;
        }
        if (waits_for(meeting, self->base.rank) == USP_NO_RANK) return USP_OK;
        USP_TRY(wait_for_change(self, &deadline));
    }
}

static usp_status threads_exchange(usp_comm *comm, const usp_send *sends, int send_count, const usp_recv *recvs,
                                   int recv_count, usp_stream stream) {
    usp_thread_comm *self = (usp_thread_comm *)comm;
    usp_rendezvous *meeting = self->meeting;
    usp_errand errand = {sends, recvs, send_count, recv_count, stream};
    USP_TRY(check_errand(comm, &errand));
    USP_TRY(comm->device->ops->event_record(comm->device, meeting->seats[comm->rank].posted, stream));
    pthread_mutex_lock(&meeting->mutex);
    usp_status status = failure_of(meeting);
    if (status == USP_OK) {
        post(self, &errand);
        status = run_errand(self, &errand);
        withdraw(self);
    }
    pthread_mutex_unlock(&meeting->mutex);
    return status;
}

/* ---- gather ------------------------------------------------------------------------------------------------------ */

static int all_gathering(const usp_rendezvous *meeting) {
    for (int i = 0; i < meeting->size; i++)
        if (meeting->seats[i].activity != USP_GATHERING) return 0;
    return 1;
}

/* The last rank to come copies for all and sends them on. */
static usp_status finish_gather(usp_rendezvous *meeting) {
    size_t bytes = meeting->seats[0].bytes;
    for (int i = 1; i < meeting->size; i++)
        if (meeting->seats[i].bytes != bytes)
            return fail_all(meeting, USP_COMM, "rank 0 gathers %zu bytes and rank %d gathers %zu", bytes, i,
                            meeting->seats[i].bytes);
    for (int to = 0; to < meeting->size; to++) {
        for (int from = 0; bytes > 0 && from < meeting->size; from++)
            memcpy((char *)meeting->seats[to].all + (size_t)from * bytes, meeting->seats[from].mine, bytes);
        meeting->seats[to].activity = USP_COMPUTING;
    }
    wake_all(meeting);
    return USP_OK;
}

static usp_status wait_gathered(usp_thread_comm *self) {
    const usp_seat *seat = &self->meeting->seats[self->base.rank];
    struct timespec deadline = deadline_in(self->base.timeout_ms);
    while (seat->activity == USP_GATHERING) {
        USP_TRY(failure_of(self->meeting));
        USP_TRY(wait_for_change(self, &deadline));
    }
    return USP_OK;
}

static usp_status gather_locked(usp_thread_comm *self, const void *mine, void *all, size_t bytes) {
    usp_seat *seat = &self->meeting->seats[self->base.rank];
    USP_TRY(failure_of(self->meeting));
    seat->mine = mine;
    seat->all = all;
    seat->bytes = bytes;
    seat->exchanges++;
    seat->activity = USP_GATHERING;
    usp_status status = all_gathering(self->meeting) ? finish_gather(self->meeting) : wait_gathered(self);
    seat->activity = USP_COMPUTING;
    return status;
}

static usp_status threads_prepare(usp_comm *comm, int64_t messages, size_t bytes) {
    (void)comm, (void)messages, (void)bytes;
    return USP_OK;
}

static usp_status threads_allgather(usp_comm *comm, const void *mine, void *all, size_t bytes_per_rank) {
    usp_thread_comm *self = (usp_thread_comm *)comm;
    pthread_mutex_lock(&self->meeting->mutex);
    usp_status status = gather_locked(self, mine, all, bytes_per_rank);
    pthread_mutex_unlock(&self->meeting->mutex);
    return status;
}

/* ---- the rest of the table --------------------------------------------------------------------------------------- */

static usp_status threads_alloc_shared(usp_comm *comm, size_t bytes, void **memory) {
    return comm->device->ops->alloc(comm->device, bytes, memory);
}

static usp_status threads_register_shared(usp_comm *comm, void *memory) {
    (void)comm, (void)memory;
    return USP_OK;
}

static usp_status threads_free_shared(usp_comm *comm, void *memory) {
    comm->device->ops->free(comm->device, memory);
    return USP_OK;
}

static usp_status threads_split(usp_comm *comm, int colour, int key, struct ncclComm **axis) {
    (void)comm, (void)colour, (void)key, (void)axis;
    return usp_fail(USP_UNSUPPORTED, "ranks that are threads have no NCCL communicator");
}

static void threads_split_destroy(usp_comm *comm, struct ncclComm *axis) {
    (void)comm, (void)axis;
}

static void threads_note_plan(usp_comm *comm, int ranks, uint64_t hash) {
    usp_rendezvous *meeting = ((usp_thread_comm *)comm)->meeting;
    pthread_mutex_lock(&meeting->mutex);
    usp_plans_note(&meeting->seats[comm->rank].plans, ranks, hash);
    pthread_mutex_unlock(&meeting->mutex);
}

static usp_status threads_poll(usp_comm *comm) {
    usp_rendezvous *meeting = ((usp_thread_comm *)comm)->meeting;
    pthread_mutex_lock(&meeting->mutex);
    usp_status status = failure_of(meeting);
    pthread_mutex_unlock(&meeting->mutex);
    return status;
}

static usp_status threads_fail(usp_comm *comm, usp_status status) {
    usp_rendezvous *meeting = ((usp_thread_comm *)comm)->meeting;
    pthread_mutex_lock(&meeting->mutex);
    status = fail_all(meeting, status, "rank %d: %s", comm->rank, usp_last_error());
    pthread_mutex_unlock(&meeting->mutex);
    return status;
}

static usp_status threads_overdue(usp_comm *comm) {
    usp_rendezvous *meeting = ((usp_thread_comm *)comm)->meeting;
    pthread_mutex_lock(&meeting->mutex);
    usp_status status = fail_all(meeting, USP_TIMEOUT, "rank %d is behind: work of rank %d was not done in %d ms",
                                 fewest_exchanges(meeting), comm->rank, comm->timeout_ms);
    pthread_mutex_unlock(&meeting->mutex);
    return status;
}

static void threads_abort(usp_comm *comm) {
    usp_rendezvous *meeting = ((usp_thread_comm *)comm)->meeting;
    pthread_mutex_lock(&meeting->mutex);
    fail_all(meeting, USP_COMM, "rank %d aborted", comm->rank);
    pthread_mutex_unlock(&meeting->mutex);
}

/* Takes back the event that tells `peer` what has been read; 0 if the peer, in a copy of its own that does not end, has
 * not let go of it in time. */
static int take_back(usp_thread_comm *self, int peer, const struct timespec *deadline) {
    usp_rendezvous *meeting = self->meeting;
    usp_box *in = box_of(meeting, peer, self->base.rank);
    int late = 0;
    while (in->unsettled && !late)
        late = pthread_cond_timedwait(&meeting->seats[self->base.rank].wake, &meeting->mutex, deadline) == ETIMEDOUT;
    if (in->unsettled) return 0;
    self->base.device->ops->event_destroy(self->base.device, in->consumed);
    in->consumed = NULL;
    return 1;
}

static void leave(usp_thread_comm *self) {
    usp_rendezvous *meeting = self->meeting;
    usp_seat *seat = &meeting->seats[self->base.rank];
    int limit = self->base.timeout_ms, lost = 0;
    struct timespec deadline = deadline_in(limit < 0 || limit > USP_LEAVE_MS ? USP_LEAVE_MS : limit);
    pthread_mutex_lock(&meeting->mutex);
    seat->activity = USP_LEFT;
    wake_all(meeting);
    for (int peer = 0; peer < meeting->size; peer++) lost += !take_back(self, peer, &deadline);
    self->base.device->ops->event_destroy(self->base.device, seat->posted);
    seat->posted = NULL;
    pthread_mutex_unlock(&meeting->mutex);
    if (lost) usp_host_log(self->base.host, 1, "rank %d leaves %d events to late ranks", self->base.rank, lost);
}

static void threads_destroy(usp_comm *comm) {
    if (!comm) return;
    usp_rendezvous *meeting = ((usp_thread_comm *)comm)->meeting;
    leave((usp_thread_comm *)comm);
    usp_host_free(comm->host, comm);
    release(meeting);
}

static const usp_comm_ops threads_ops = {
    .name = "threads",
    .prepare = threads_prepare,
    .exchange = threads_exchange,
    .allgather = threads_allgather,
    .alloc_shared = threads_alloc_shared,
    .register_shared = threads_register_shared,
    .free_shared = threads_free_shared,
    .split = threads_split,
    .split_destroy = threads_split_destroy,
    .note_plan = threads_note_plan,
    .poll = threads_poll,
    .fail = threads_fail,
    .overdue = threads_overdue,
    .abort = threads_abort,
    .destroy = threads_destroy,
};

/* ---- create ------------------------------------------------------------------------------------------------------ */

/* Those who came for a world that was not made have yet to leave; afterwards the rendezvous is as new. */
static usp_status wait_until_fresh(usp_rendezvous *meeting, int rank, int timeout_ms) {
    struct timespec deadline = deadline_in(timeout_ms);
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

static usp_status make_events(usp_thread_comm *self) {
    usp_rendezvous *meeting = self->meeting;
    usp_device *device = self->base.device;
    USP_TRY(device->ops->event_create(device, &meeting->seats[self->base.rank].posted));
    for (int peer = 0; peer < meeting->size; peer++)
        if (peer != self->base.rank)
            USP_TRY(device->ops->event_create(device, &box_of(meeting, peer, self->base.rank)->consumed));
    return USP_OK;
}

static void free_events(usp_thread_comm *self) {
    usp_rendezvous *meeting = self->meeting;
    usp_device *device = self->base.device;
    usp_seat *seat = &meeting->seats[self->base.rank];
    if (!device) return;
    for (int peer = 0; peer < meeting->size; peer++) {
        usp_box *in = box_of(meeting, peer, self->base.rank);
        device->ops->event_destroy(device, in->consumed);
        in->consumed = NULL;
    }
    device->ops->event_destroy(device, seat->posted);
    seat->posted = NULL;
}

/* A world that was not made: the seat is free for another try, once all have left for one. */
static void give_seat_back(usp_thread_comm *self) {
    usp_rendezvous *meeting = self->meeting;
    int present = 0;
    pthread_mutex_lock(&meeting->mutex);
    free_events(self);
    meeting->seats[self->base.rank].activity = USP_ABSENT;
    for (int i = 0; i < meeting->size; i++) present += meeting->seats[i].activity != USP_ABSENT;
    if (present == 0) {
        meeting->failure = USP_OK;
        wake_all(meeting);
    }
    pthread_mutex_unlock(&meeting->mutex);
}

static usp_status gather_cards(void *user, const void *mine, void *all, size_t bytes_per_rank) {
    return threads_allgather(user, mine, all, bytes_per_rank);
}

/* The object is on the stack until all have met: a rank without memory tells the others so. */
usp_status usp_comm_create_threads(const usp_comm_config *config, usp_meeting *met, usp_rendezvous *meeting, int rank,
                                   usp_comm **comm) {
    USP_REQUIRE(rank >= 0 && rank < meeting->size, "rank is %d in a rendezvous of %d", rank, meeting->size);
    USP_REQUIRE(meeting->process == getpid(), "the rendezvous is of process %d, and this is a child of its fork",
                (int)meeting->process);
    USP_TRY(take_seat(meeting, rank, config->timeout_ms));
    usp_thread_comm self = {
        .base = {&threads_ops, rank, meeting->size, config->timeout_ms, config->device, config->host},
        .meeting = meeting};
    void *memory = NULL;
    met->bootstrap = (usp_bootstrap){.gather = gather_cards, .user = &self, .rank = rank, .size = meeting->size};
    if (met->mine.status == USP_OK) usp_meeting_note(met, make_events(&self));
    if (met->mine.status == USP_OK) usp_meeting_note(met, usp_host_alloc(config->host, sizeof self, "comm", &memory));
    usp_status status = usp_meet(met);
    if (status != USP_OK) {
        usp_host_free(config->host, memory);
        give_seat_back(&self);
        return status;
    }
    pthread_mutex_lock(&meeting->mutex);
    meeting->uses++;
    pthread_mutex_unlock(&meeting->mutex);
    *(usp_thread_comm *)memory = self;
    *comm = memory;
    return USP_OK;
}
