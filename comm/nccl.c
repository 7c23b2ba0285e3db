/* nccl.c - ranks that own one GPU each, joined by nonblocking NCCL communicators and watched over the control channel.
 * It moves bytes by grouped sends and receives alone; NCCL's collectives, multicast and environment stay untouched. */
#define _GNU_SOURCE
#include <cuda_runtime_api.h>
#include <nccl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>

#include "control.h"
#include "error.h"
#include "list.h"
#include "thread.h"

enum {
    OLDEST_NCCL = 22803, /* 2.28.3 */
    LOCK_MS = 1000,      /* longest wait for a call of another thread that should return at once */
    REVOKE_MS = 2000,    /* longest wait for work in flight to stop */
    RELEASE_MS = 5000,   /* longest wait for NCCL to give a communicator back, twice: in peace, then by abort */
    PROBES = 64
};

/* A communicator on its way out. NCCL may never return from freeing it, so a thread of its own does; where that thread
 * is late it is left behind, with all memory that NCCL might still touch. */
typedef struct usp_release {
    ncclComm_t comm;
    pthread_t thread;
    atomic_int stage;  /* RELEASE_STUCK: NCCL keeps the communicator, and no thread waits for it */
    atomic_int forced; /* abort it: work in flight is lost, peers may be dead */
    atomic_int revoked;
} usp_release;

enum { RELEASE_NONE, RELEASE_RUNNING, RELEASE_DONE, RELEASE_STUCK };

/* A split of a communicator whose own mode (blocking or not) is the caller's choice: in a thread, as above. */
typedef struct usp_split {
    ncclComm_t parent, child;
    ncclConfig_t config;
    ncclResult_t result;
    int rank;
    pthread_t thread;
    atomic_int done;
} usp_split;

/* NCCL registers what a captured exchange touches on its own, and forgets it some time after the graph is gone, on
 * every rank at another moment. Memory that came to the same addresses meanwhile would be registered on one side of a
 * message and not on the other, and both GPUs would wait for ever. So once an exchange has been captured, pieces that
 * are given back stay registered, and serve those who ask next. */
typedef struct usp_shared {
    struct usp_shared *next;
    void *memory;
    size_t bytes;
    ncclWindow_t window; /* NULL: plain memory */
    int spare;           /* given back */
    int fresh;           /* not every rank is known to have it yet */
} usp_shared;

typedef struct usp_nccl {
    usp_comm base;
    int gpu;
    usp_control *control; /* keeps and spreads the first failure; NULL on a half-built comm */
    int connected;        /* to the other ranks: one that is behind can be named */
    uint64_t exchanges;

    /* one NCCL call at a time, and this paragraph; never held while waiting for another rank */
    pthread_mutex_t lock;
    ncclComm_t comm; /* NULL before it is there, and once `release` has it */
    usp_release *release;
    usp_event *probe[PROBES];           /* behind exchanges, number n in probe[n % PROBES] */
    uint64_t probes_set, probes_passed; /* those between the two are not known to be done */
    int64_t waiting_since;              /* when the oldest of them became the oldest */

    usp_shared *shared;
    int captured;     /* an exchange of this rank is in a graph */
    ncclComm_t child; /* where NCCL writes the communicator of a split */
    void *scratch;    /* device memory and stream of `gather` */
    usp_stream stream;
    int flags[]; /* [size], for a gather */
} usp_nccl;

static usp_nccl *nccl_of(usp_comm *comm) {
    return (usp_nccl *)comm;
}

/* ---- waiting ----------------------------------------------------------------------------------------------------- */

static int lock_within(usp_nccl *self, int milliseconds) {
    int64_t begin = usp_now_ms();
    for (int round = 0; pthread_mutex_trylock(&self->lock) != 0; round++) {
        if (usp_now_ms() - begin >= milliseconds) return 0;
        usp_pause(round);
    }
    return 1;
}

/* ---- failures ---------------------------------------------------------------------------------------------------- */

static usp_status status_of(ncclResult_t result) {
    switch (result) {
    case ncclUnhandledCudaError:
        return USP_DEVICE;
    case ncclInvalidArgument:
    case ncclInvalidUsage:
        return USP_INVALID;
    default:
        return USP_COMM;
    }
}

static usp_status fail_nccl(int rank, const char *what, ncclResult_t result) {
    const char *detail = ncclGetLastError(NULL);
    return usp_fail(status_of(result), "rank %d: %s failed: %s; %.100s", rank, what, ncclGetErrorString(result),
                    detail != NULL ? detail : "");
}

static void start_release(usp_nccl *self, int forced);

/* The failure that has hit this rank or another, said in this thread. Once there is one, NCCL is to let go of the GPU,
 * where kernels may be waiting for ranks that are gone. Does not wait. */
static usp_status check_ranks(usp_nccl *self) {
    usp_status status = usp_control_poll(self->control);
    if (status != USP_OK) start_release(self, 1);
    return status;
}

/* This rank has failed by `status`, whose sentence is recorded: all ranks hear of it. The first failure is returned. */
static usp_status give_up(usp_nccl *self, usp_status status) {
    usp_control_fail(self->control, status, "%s", usp_last_error());
    return check_ranks(self);
}

/* Something has not ended in time. Before ranks are connected nobody can be named. */
static usp_status give_up_late(usp_nccl *self, const char *what) {
    usp_status status = self->connected ? usp_control_overdue(self->control, -1) : USP_OK;
    if (status == USP_OK)
        status =
            usp_fail(USP_TIMEOUT, "rank %d: %s did not end within %d ms", self->base.rank, what, self->base.timeout_ms);
    return give_up(self, status);
}

static int is_late(const usp_nccl *self, int64_t since) {
    return self->base.timeout_ms >= 0 && usp_now_ms() - since > self->base.timeout_ms;
}

/* ---- nonblocking calls ------------------------------------------------------------------------------------------- */

/* One look at a call that is in progress. */
static ncclResult_t progress(usp_nccl *self) {
    ncclResult_t result = ncclInProgress;
    pthread_mutex_lock(&self->lock);
    if (self->comm != NULL) {
        ncclResult_t query = ncclCommGetAsyncError(self->comm, &result);
        if (query != ncclSuccess) result = query;
    }
    pthread_mutex_unlock(&self->lock);
    return result;
}

static int went_wrong(ncclResult_t result) {
    return result != ncclSuccess && result != ncclInProgress;
}

/* Waits until the call that gave `result` has been carried out, at most the time limit, watching the other ranks. Some
 * calls answer ncclSuccess for work that only began, so the communicator is asked in any case. */
static usp_status settle(usp_nccl *self, ncclResult_t result, const char *what) {
    int64_t begin = usp_now_ms();
    if (!went_wrong(result)) result = progress(self);
    for (int round = 0; result == ncclInProgress; round++) {
        USP_TRY(check_ranks(self));
        if (is_late(self, begin)) return give_up_late(self, what);
        usp_pause(round);
        result = progress(self);
    }
    return result == ncclSuccess ? USP_OK : give_up(self, fail_nccl(self->base.rank, what, result));
}

/* ---- letting a communicator go ----------------------------------------------------------------------------------- */

/* A negative limit means: until the release is forced. */
static ncclResult_t await_release(usp_release *release, ncclResult_t result, int milliseconds) {
    int64_t begin = usp_now_ms();
    for (int round = 0; result == ncclInProgress; round++) {
        if (milliseconds >= 0 ? usp_now_ms() - begin > milliseconds : atomic_load(&release->forced)) break;
        usp_pause(round);
        ncclResult_t query = ncclCommGetAsyncError(release->comm, &result);
        if (query != ncclSuccess) return query;
    }
    return result;
}

/* Not in every NCCL that serves, nor in its header. */
extern ncclResult_t ncclCommRevoke(ncclComm_t comm, int flags) __attribute__((weak));

/* Stops what is in flight where this NCCL can (2.28.7 on). Not while a call is in progress: abort alone is for that. */
static void revoke(usp_release *release) {
    ncclResult_t state = ncclInProgress;
    if (ncclCommRevoke == NULL || ncclCommGetAsyncError(release->comm, &state) != ncclSuccess) return;
    if (state == ncclInProgress) return;
    ncclResult_t result = await_release(release, ncclCommRevoke(release->comm, 0), REVOKE_MS);
    atomic_store(&release->revoked, result == ncclSuccess);
}

static void *release_main(void *argument) {
    usp_release *release = argument;
    int flushed = 0;
    if (atomic_load(&release->forced))
        revoke(release);
    else
        flushed = await_release(release, ncclCommFinalize(release->comm), -1) == ncclSuccess;
    if (flushed)
        ncclCommDestroy(release->comm);
    else
        ncclCommAbort(release->comm);
    atomic_store(&release->stage, RELEASE_DONE);
    return NULL;
}

static void run_release(usp_release *release, ncclComm_t comm, int forced) {
    release->comm = comm;
    atomic_store(&release->forced, forced);
    atomic_store(&release->stage, RELEASE_RUNNING);
    if (usp_thread_start(&release->thread, release_main, release) != 0) atomic_store(&release->stage, RELEASE_STUCK);
}

/* Waits a bounded time; 0: NCCL still has the communicator. */
static int wait_release(usp_release *release, int milliseconds) {
    int64_t begin = usp_now_ms();
    for (int round = 0; atomic_load(&release->stage) == RELEASE_RUNNING; round++) {
        if (usp_now_ms() - begin > milliseconds) return 0;
        usp_pause(round);
    }
    return atomic_load(&release->stage) == RELEASE_DONE;
}

/* In peace, then by force. 0: the thread, its communicator and `release` are left behind. */
static int finish_release(const usp_host *host, usp_release *release) {
    int done = wait_release(release, RELEASE_MS);
    if (!done && !atomic_exchange(&release->forced, 1)) done = wait_release(release, RELEASE_MS);
    if (!done) {
        if (atomic_load(&release->stage) != RELEASE_STUCK) pthread_detach(release->thread);
        usp_host_log(host, 1, "NCCL did not free a communicator in %d ms: it is left behind", RELEASE_MS);
        return 0;
    }
    if (release->comm != NULL) pthread_join(release->thread, NULL);
    usp_host_free(host, release);
    return 1;
}

/* Takes the communicator from all threads that use the comm and lets it go. Does not wait. */
static void start_release(usp_nccl *self, int forced) {
    int none = RELEASE_NONE;
    if (atomic_load(&self->release->stage) != RELEASE_NONE) return;
    if (!lock_within(self, LOCK_MS)) {
        atomic_compare_exchange_strong(&self->release->stage, &none, RELEASE_STUCK);
        return;
    }
    if (self->comm != NULL) {
        run_release(self->release, self->comm, forced);
        self->comm = NULL;
    }
    atomic_compare_exchange_strong(&self->release->stage, &none, RELEASE_DONE); /* there was no communicator */
    pthread_mutex_unlock(&self->lock);
}

static void nccl_abort(usp_comm *comm) {
    usp_nccl *self = nccl_of(comm);
    give_up(self, usp_fail(USP_COMM, "rank %d gave the world up", comm->rank));
    if (!wait_release(self->release, RELEASE_MS))
        usp_host_log(comm->host, 1, "rank %d: NCCL is still aborting after %d ms", comm->rank, RELEASE_MS);
    if (atomic_load(&self->release->revoked)) usp_host_log(comm->host, 3, "rank %d: NCCL revoked its work", comm->rank);
}

/* ---- exchange ---------------------------------------------------------------------------------------------------- */

typedef struct usp_lists {
    const usp_send *sends;
    const usp_recv *recvs;
    int send_count, recv_count;
} usp_lists;

static int is_empty(const usp_lists *lists) {
    size_t bytes = 0;
    for (int i = 0; i < lists->send_count; i++) bytes |= lists->sends[i].bytes;
    for (int i = 0; i < lists->recv_count; i++) bytes |= lists->recvs[i].bytes;
    return bytes == 0;
}

/* Every message of the lists, inside a group. The peer of the one that was refused goes to *peer. */
static ncclResult_t issue(usp_nccl *self, const usp_lists *lists, usp_stream stream, int *peer) {
    for (int i = 0; i < lists->send_count; i++) {
        const usp_send *send = &lists->sends[i];
        if (send->bytes == 0) continue;
        *peer = send->peer;
        ncclResult_t result = ncclSend(send->data, send->bytes, ncclUint8, send->peer, self->comm, stream);
        if (went_wrong(result)) return result;
    }
    for (int i = 0; i < lists->recv_count; i++) {
        const usp_recv *recv = &lists->recvs[i];
        if (recv->bytes == 0) continue;
        *peer = recv->peer;
        ncclResult_t result = ncclRecv(recv->data, recv->bytes, ncclUint8, recv->peer, self->comm, stream);
        if (went_wrong(result)) return result;
    }
    return ncclSuccess;
}

/* One group, with the lock held. */
static ncclResult_t launch(usp_nccl *self, const usp_lists *lists, usp_stream stream, int *peer) {
    ncclResult_t result = ncclGroupStart();
    if (result != ncclSuccess) return result;
    ncclResult_t issued = issue(self, lists, stream, peer);
    result = ncclGroupEnd();
    if (!went_wrong(issued)) *peer = -1;
    return went_wrong(issued) ? issued : result;
}

/* With the lock held. *late: no exchange has ended for the time limit, though some are in flight. */
static usp_status query_probes(usp_nccl *self, int *late) {
    usp_device *device = self->base.device;
    int busy = 0;
    *late = 0;
    while (self->probes_passed < self->probes_set) {
        USP_TRY(device->ops->event_query(device, self->probe[self->probes_passed % PROBES], &busy));
        if (busy) break;
        self->probes_passed++;
        self->waiting_since = usp_now_ms();
    }
    *late = busy && is_late(self, self->waiting_since);
    return USP_OK;
}

/* With the lock held. Where all probes are in use the last one moves on: it always is behind all exchanges. */
static usp_status record_probe(usp_nccl *self, usp_stream stream) {
    usp_device *device = self->base.device;
    if (self->probes_set == self->probes_passed) self->waiting_since = usp_now_ms();
    if (self->probes_set - self->probes_passed < PROBES) self->probes_set++;
    return device->ops->event_record(device, self->probe[(self->probes_set - 1) % PROBES], stream);
}

/* Notes where the exchange ends in the stream, so that poll can tell when work is overdue. A graph in capture is
 * skipped: what it holds runs when it is launched, and then nobody passes here. */
static usp_status set_probe(usp_nccl *self, usp_stream stream) {
    const usp_device_ops *ops = self->base.device->ops;
    int capturing = 0, late = 0;
    USP_TRY(ops->capturing(self->base.device, stream, &capturing));
    if (capturing) self->captured = 1;
    if (capturing) return USP_OK;
    pthread_mutex_lock(&self->lock);
    usp_status status = query_probes(self, &late);
    if (status == USP_OK) status = record_probe(self, stream);
    pthread_mutex_unlock(&self->lock);
    return status;
}

static usp_status fail_launch(usp_nccl *self, ncclResult_t result, int peer) {
    char what[64];
    snprintf(what, sizeof what, "exchange %llu, rank %d", (unsigned long long)self->exchanges, peer);
    return give_up(self, fail_nccl(self->base.rank, peer < 0 ? "the exchange" : what, result));
}

static usp_status nccl_exchange(usp_comm *comm, const usp_send *sends, int send_count, const usp_recv *recvs,
                                int recv_count, usp_stream stream) {
    usp_nccl *self = nccl_of(comm);
    const usp_lists lists = {sends, recvs, send_count, recv_count};
    int peer = -1;
    USP_TRY(usp_list_check(comm, sends, send_count, recvs, recv_count));
    USP_TRY(check_ranks(self));
    self->exchanges++;
    if (self->control != NULL) usp_control_progress(self->control, self->exchanges, -1);
    if (is_empty(&lists)) return USP_OK;
    pthread_mutex_lock(&self->lock);
    ncclResult_t result = self->comm != NULL ? launch(self, &lists, stream, &peer) : ncclInProgress;
    pthread_mutex_unlock(&self->lock);
    if (went_wrong(result)) return fail_launch(self, result, peer);
    USP_TRY(settle(self, result, "the exchange"));
    usp_status status = set_probe(self, stream);
    return status == USP_OK ? USP_OK : give_up(self, status);
}

static usp_status nccl_prepare(usp_comm *comm, int64_t messages, size_t bytes) {
    (void)comm, (void)messages, (void)bytes;
    return USP_OK;
}

static usp_status nccl_allgather(usp_comm *comm, const void *mine, void *all, size_t bytes_per_rank) {
    usp_nccl *self = nccl_of(comm);
    USP_TRY(check_ranks(self));
    usp_status status = usp_control_allgather(self->control, mine, all, bytes_per_rank);
    return status == USP_OK ? USP_OK : give_up(self, status);
}

/* ---- watching ---------------------------------------------------------------------------------------------------- */

static void nccl_note_plan(usp_comm *comm, int ranks, uint64_t hash) {
    usp_control_note_plan(nccl_of(comm)->control, ranks, hash);
}

static usp_status nccl_poll(usp_comm *comm) {
    usp_nccl *self = nccl_of(comm);
    ncclResult_t result = ncclSuccess;
    int late = 0;
    USP_TRY(check_ranks(self));
    if (!lock_within(self, 0)) return USP_OK; /* another thread is in a call, and will see its result */
    if (self->comm != NULL) {
        ncclResult_t query = ncclCommGetAsyncError(self->comm, &result);
        if (query != ncclSuccess) result = query;
    }
    usp_status status = query_probes(self, &late);
    pthread_mutex_unlock(&self->lock);
    if (went_wrong(result)) return give_up(self, fail_nccl(comm->rank, "the communicator", result));
    if (status != USP_OK) return give_up(self, status);
    return late ? give_up_late(self, "an exchange on the GPU") : USP_OK;
}

static usp_status nccl_fail(usp_comm *comm, usp_status status) {
    usp_nccl *self = nccl_of(comm);
    char sentence[256];
    snprintf(sentence, sizeof sentence, "%s", usp_last_error());
    return give_up(self, usp_fail(status, "rank %d: %s", comm->rank, sentence));
}

static usp_status nccl_overdue(usp_comm *comm) {
    usp_nccl *self = nccl_of(comm);
    if (check_ranks(self) == USP_OK) give_up_late(self, "work on the stream");
    nccl_abort(comm);
    return check_ranks(self);
}

/* ---- shared memory ----------------------------------------------------------------------------------------------- */

static usp_status use_gpu(const usp_nccl *self) {
    cudaError_t error = cudaSetDevice(self->gpu);
    return error == cudaSuccess ? USP_OK : usp_fail(USP_DEVICE, "cudaSetDevice failed: %s", cudaGetErrorString(error));
}

static usp_status alloc_piece(usp_nccl *self, size_t bytes, usp_shared **piece) {
    const usp_host *host = self->base.host;
    void *memory = NULL;
    USP_TRY(use_gpu(self));
    USP_TRY(usp_host_alloc(host, sizeof(usp_shared), "shared memory", &memory));
    *piece = memory;
    (*piece)->bytes = bytes;
    ncclResult_t result = ncclMemAlloc(&(*piece)->memory, bytes);
    if (result == ncclSuccess) return USP_OK;
    usp_host_free(host, *piece);
    *piece = NULL;
    cudaGetLastError();
    return usp_fail(USP_NO_MEMORY, "rank %d cannot allocate %zu bytes of shared memory: %s", self->base.rank, bytes,
                    ncclGetErrorString(result));
}

static void free_piece(usp_nccl *self, usp_shared *piece) {
    if (piece == NULL) return;
    if (use_gpu(self) == USP_OK) ncclMemFree(piece->memory);
    usp_host_free(self->base.host, piece);
}

/* Rounded up to what NCCL registers; what is more than there can be stays so. */
static size_t whole_bytes(size_t bytes) {
    const size_t unit = NCCL_WIN_REQUIRED_ALIGNMENT, most = SIZE_MAX / unit;
    size_t units = bytes / unit + (bytes % unit != 0);
    return unit * (units < 1 ? 1 : units < most ? units : most);
}

/* The smallest spare piece that is large enough: all ranks have the same ones. */
static usp_shared *take_spare(usp_nccl *self, size_t bytes) {
    usp_shared *best = NULL;
    for (usp_shared *piece = self->shared; piece != NULL; piece = piece->next)
        if (piece->spare && piece->bytes >= bytes && (best == NULL || piece->bytes < best->bytes)) best = piece;
    if (best != NULL) best->spare = 0;
    return best;
}

static usp_status nccl_alloc_shared(usp_comm *comm, size_t bytes, void **memory) {
    usp_nccl *self = nccl_of(comm);
    size_t whole = whole_bytes(bytes);
    USP_TRY(check_ranks(self));
    usp_shared *piece = take_spare(self, whole);
    if (piece == NULL) {
        USP_TRY(alloc_piece(self, whole, &piece));
        piece->next = self->shared;
        self->shared = piece;
    }
    piece->fresh = 1;
    *memory = piece->memory;
    return USP_OK;
}

static usp_shared **link_of(usp_nccl *self, void *memory) {
    usp_shared **link = &self->shared;
    while ((*link)->memory != memory) link = &(*link)->next;
    return link;
}

/* Where NCCL refuses to register memory, it refuses on all ranks, and plain memory does. A piece whose registration
 * failed stays in the list: NCCL may still hold it, and destroy knows when it does not. */
static usp_status nccl_register_shared(usp_comm *comm, void *memory) {
    usp_nccl *self = nccl_of(comm);
    usp_shared *piece = *link_of(self, memory);
    ncclResult_t result = ncclInProgress;
    piece->fresh = 0;
    if (piece->window != NULL) return USP_OK;
    pthread_mutex_lock(&self->lock);
    if (self->comm != NULL)
        result = ncclCommWindowRegister(self->comm, memory, piece->bytes, &piece->window, NCCL_WIN_COLL_SYMMETRIC);
    pthread_mutex_unlock(&self->lock);
    if (!went_wrong(result)) USP_TRY(settle(self, result, "ncclCommWindowRegister"));
    if (piece->window == NULL)
        usp_host_log(comm->host, 1, "rank %d: NCCL did not register %zu bytes: exchanges with them are slower",
                     comm->rank, piece->bytes);
    return USP_OK;
}

static void deregister(usp_nccl *self, usp_shared *piece) {
    ncclResult_t result = ncclSuccess;
    pthread_mutex_lock(&self->lock);
    if (self->comm != NULL && piece->window != NULL) result = ncclCommWindowDeregister(self->comm, piece->window);
    pthread_mutex_unlock(&self->lock);
    if (went_wrong(result))
        usp_host_log(self->base.host, 1, "rank %d: NCCL did not let go of %zu registered bytes: %s", self->base.rank,
                     piece->bytes, ncclGetErrorString(result));
    piece->window = NULL;
}

static usp_status has_any_captured(usp_nccl *self, int *any) {
    USP_TRY(nccl_allgather(&self->base, &self->captured, self->flags, sizeof self->captured));
    for (int rank = 0; rank < self->base.size; rank++) *any |= self->flags[rank];
    return USP_OK;
}

/* All ranks have come before this one takes its memory away; one that is fresh goes back as it came.
 * On a comm that has failed, destroy frees it. */
static usp_status nccl_free_shared(usp_comm *comm, void *memory) {
    usp_nccl *self = nccl_of(comm);
    usp_shared **link = link_of(self, memory), *piece = *link;
    piece->spare = piece->fresh && piece->window != NULL;
    if (!piece->fresh) USP_TRY(has_any_captured(self, &piece->spare));
    if (piece->spare) return USP_OK;
    *link = piece->next;
    deregister(self, piece);
    free_piece(self, piece);
    return USP_OK;
}

/* ---- communicators for the caller -------------------------------------------------------------------------------- */

static usp_status nccl_split(usp_comm *comm, int colour, int key, struct ncclComm **child) {
    usp_nccl *self = nccl_of(comm);
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.blocking = 1;
    config.splitShare = 0;
    USP_TRY(check_ranks(self));
    self->child = NULL;
    pthread_mutex_lock(&self->lock);
    ncclResult_t result = ncclInProgress;
    if (self->comm != NULL) result = ncclCommSplit(self->comm, colour, key, &self->child, &config);
    pthread_mutex_unlock(&self->lock);
    USP_TRY(settle(self, result, "ncclCommSplit"));
    *child = self->child;
    return USP_OK;
}

static void nccl_split_destroy(usp_comm *comm, struct ncclComm *child) {
    void *memory = NULL;
    if (child == NULL) return;
    if (usp_host_alloc(comm->host, sizeof(usp_release), "a communicator's end", &memory) != USP_OK) {
        usp_host_log(comm->host, 1, "no memory to free a communicator: it is left behind");
        return;
    }
    run_release(memory, child, check_ranks(nccl_of(comm)) != USP_OK);
    finish_release(comm->host, memory);
}

/* ---- the table --------------------------------------------------------------------------------------------------- */

static void free_scratch(usp_nccl *self) {
    const usp_device_ops *ops = self->base.device->ops;
    if (self->scratch != NULL) ops->free(self->base.device, self->scratch);
    if (self->stream != NULL) ops->stream_destroy(self->base.device, self->stream);
    self->scratch = NULL;
    self->stream = NULL;
}

/* What NCCL no longer has any hand in. */
static void free_rest(usp_nccl *self) {
    usp_device *device = self->base.device;
    const usp_host *host = self->base.host;
    while (self->shared != NULL) {
        usp_shared *next = self->shared->next;
        free_piece(self, self->shared);
        self->shared = next;
    }
    free_scratch(self);
    for (int i = 0; i < PROBES; i++)
        if (self->probe[i] != NULL) device->ops->event_destroy(device, self->probe[i]);
    pthread_mutex_destroy(&self->lock);
    usp_host_free(host, self);
}

static void nccl_destroy(usp_comm *comm) {
    if (comm == NULL) return;
    usp_nccl *self = nccl_of(comm);
    int healthy = self->control != NULL && check_ranks(self) == USP_OK;
    for (usp_shared *piece = self->shared; healthy && piece != NULL; piece = piece->next) deregister(self, piece);
    int stuck = RELEASE_STUCK; /* where another thread was late to let go of the communicator, it has by now */
    if (self->release->comm == NULL) atomic_compare_exchange_strong(&self->release->stage, &stuck, RELEASE_NONE);
    start_release(self, !healthy);
    int released = finish_release(comm->host, self->release);
    usp_control_destroy(self->control);
    if (released) free_rest(self);
}

static const usp_comm_ops nccl_ops = {
    .name = "nccl",
    .prepare = nccl_prepare,
    .exchange = nccl_exchange,
    .allgather = nccl_allgather,
    .alloc_shared = nccl_alloc_shared,
    .register_shared = nccl_register_shared,
    .free_shared = nccl_free_shared,
    .split = nccl_split,
    .split_destroy = nccl_split_destroy,
    .note_plan = nccl_note_plan,
    .poll = nccl_poll,
    .fail = nccl_fail,
    .overdue = nccl_overdue,
    .abort = nccl_abort,
    .destroy = nccl_destroy,
};

/* ---- creation ---------------------------------------------------------------------------------------------------- */

/* Nonblocking, since only such a communicator can be waited for with a limit and aborted. */
static ncclConfig_t own_config(void) {
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.blocking = 0;
    config.splitShare = 0;
    config.collnetEnable = 0;
    return config;
}

static usp_status check_backend(const usp_comm_config *config, int *gpu) {
    int version = 0;
    if (config->device->ops->kind != USP_DEVICE_CUDA)
        return usp_fail(USP_UNSUPPORTED, "NCCL joins GPUs; the device is %s", config->device->ops->name);
    if (ncclGetVersion(&version) != ncclSuccess || version < OLDEST_NCCL)
        return usp_fail(USP_UNSUPPORTED, "NCCL %d is too old: %d or newer is needed", version, (int)OLDEST_NCCL);
    cudaError_t error = cudaGetDevice(gpu);
    return error == cudaSuccess ? USP_OK : usp_fail(USP_DEVICE, "no usable GPU: %s", cudaGetErrorString(error));
}

/* The part that needs no other rank. */
static usp_status begin(const usp_comm_config *config, int size, int rank, usp_nccl **out) {
    void *memory = NULL, *release = NULL;
    int gpu = 0;
    USP_TRY(check_backend(config, &gpu));
    size_t bytes = sizeof(usp_nccl) + (size_t)size * sizeof(int);
    USP_TRY(usp_host_alloc(config->host, bytes, "the NCCL transport", &memory));
    usp_status status = usp_host_alloc(config->host, sizeof(usp_release), "the NCCL transport", &release);
    if (status != USP_OK) {
        usp_host_free(config->host, memory);
        return status;
    }
    usp_nccl *self = memory;
    self->base = (usp_comm){&nccl_ops, rank, size, config->timeout_ms, config->device, config->host};
    self->gpu = gpu;
    self->release = release;
    pthread_mutex_init(&self->lock, NULL);
    *out = self;
    for (int i = 0; i < PROBES && status == USP_OK; i++)
        status = config->device->ops->event_create(config->device, &self->probe[i]);
    return status;
}

/* Waits for the work on `stream` with the time limit. */
static usp_status drain(usp_nccl *self, usp_stream stream) {
    int64_t start = usp_now_ms();
    int busy = 1;
    for (int round = 0; busy; round++) {
        USP_TRY(check_ranks(self));
        USP_TRY(self->base.device->ops->query(self->base.device, stream, &busy));
        if (busy && is_late(self, start)) return give_up_late(self, "an exchange while the transport was set up");
        if (busy) usp_pause(round);
    }
    return USP_OK;
}

/* Every rank sends its block of `all`, in device memory, to every other. */
static usp_status exchange_blocks(usp_nccl *self, char *all, size_t bytes, usp_stream stream) {
    int size = self->base.size, rank = self->base.rank, count = 0;
    void *memory = NULL;
    USP_TRY(usp_host_alloc(self->base.host, (sizeof(usp_send) + sizeof(usp_recv)) * (size_t)size, "lists", &memory));
    usp_recv *recvs = memory;
    usp_send *sends = (usp_send *)(recvs + size);
    for (int peer = 0; peer < size; peer++) {
        if (peer == rank) continue;
        sends[count] = (usp_send){peer, all + (size_t)rank * bytes, bytes};
        recvs[count++] = (usp_recv){peer, all + (size_t)peer * bytes, bytes};
    }
    usp_status status = nccl_exchange(&self->base, sends, count, recvs, count, stream);
    usp_host_free(self->base.host, memory);
    return status;
}

/* An all-gather of host memory by way of the GPUs. It connects every two ranks, which makes the first real exchange as
 * fast as the next. On failure the scratch stays until destroy: a stuck kernel may still use it. */
static usp_status gather(usp_nccl *self, const void *mine, void *all, size_t bytes) {
    usp_device *device = self->base.device;
    size_t whole = bytes * (size_t)self->base.size;
    USP_TRY(device->ops->alloc(device, whole, &self->scratch));
    USP_TRY(device->ops->stream_create(device, &self->stream));
    char *own = (char *)self->scratch + (size_t)self->base.rank * bytes;
    USP_TRY(device->ops->copy(device, own, mine, bytes, self->stream));
    USP_TRY(exchange_blocks(self, self->scratch, bytes, self->stream));
    USP_TRY(drain(self, self->stream));
    USP_TRY(device->ops->copy(device, all, self->scratch, whole, self->stream));
    USP_TRY(drain(self, self->stream));
    free_scratch(self);
    return USP_OK;
}

static usp_status gather_cards(void *user, const void *mine, void *all, size_t bytes_per_rank) {
    return gather(user, mine, all, bytes_per_rank);
}

/* Two ranks on one GPU are NCCL's to refuse; the bytes that arrive are checked here. */
static usp_status connect_all(usp_nccl *self) {
    int32_t mine = self->base.rank;
    void *memory = NULL;
    USP_TRY(usp_host_alloc(self->base.host, sizeof mine * (size_t)self->base.size, "first words", &memory));
    const int32_t *all = memory;
    usp_status status = gather(self, &mine, memory, sizeof mine);
    for (int rank = 0; status == USP_OK && rank < self->base.size; rank++)
        if (all[rank] != rank)
            status = usp_fail(USP_COMM, "rank %d heard %d from rank %d", self->base.rank, (int)all[rank], rank);
    usp_host_free(self->base.host, memory);
    return status;
}

static usp_status join(usp_nccl *self, const ncclUniqueId *id) {
    ncclConfig_t config = own_config();
    pthread_mutex_lock(&self->lock);
    ncclResult_t result = ncclCommInitRankConfig(&self->comm, self->base.size, *id, self->base.rank, &config);
    if (went_wrong(result)) self->comm = NULL;
    pthread_mutex_unlock(&self->lock);
    return settle(self, result, "ncclCommInitRankConfig");
}

static usp_status connect_ranks(usp_nccl *self, const usp_meeting *meeting) {
    USP_TRY(usp_control_connect(self->control, meeting, NULL));
    self->connected = 1;
    return USP_OK;
}

/* Ranks without a bootstrap meet over the communicator that stands. */
static usp_status meet_over_gpus(usp_nccl *self, usp_meeting *meeting) {
    meeting->bootstrap.user = self;
    USP_TRY(usp_meet(meeting));
    return connect_ranks(self, meeting);
}

static usp_status finish(usp_nccl *self, usp_status status, usp_comm **out) {
    char sentence[256];
    if (status == USP_OK) status = connect_all(self);
    if (status == USP_OK) {
        *out = &self->base;
        return USP_OK;
    }
    if (self->control != NULL) status = give_up(self, status);
    snprintf(sentence, sizeof sentence, "%s", usp_last_error());
    nccl_destroy(&self->base);
    return usp_fail(status, "%s", sentence);
}

/* What needs no other rank. */
static usp_status prepare_self(const usp_comm_config *config, usp_meeting *meeting, usp_nccl **self) {
    const usp_bootstrap *bootstrap = &meeting->bootstrap;
    usp_card *mine = &meeting->mine;
    ncclGetVersion(&mine->terms.transport_version);
    USP_TRY(begin(config, bootstrap->size, bootstrap->rank, self));
    return usp_control_create(config, bootstrap, &mine->address, &(*self)->control);
}

/* Rank 0's id counts. */
static usp_status make_id(usp_card *mine) {
    ncclUniqueId id;
    _Static_assert(sizeof mine->id == sizeof id, "a card holds an ncclUniqueId");
    ncclResult_t result = ncclGetUniqueId(&id);
    if (result != ncclSuccess) return usp_fail(USP_COMM, "ncclGetUniqueId failed: %s", ncclGetErrorString(result));
    memcpy(mine->id, &id, sizeof id);
    return USP_OK;
}

usp_status usp_comm_create_nccl(const usp_comm_config *config, usp_meeting *meeting, usp_comm **comm) {
    usp_nccl *self = NULL;
    ncclUniqueId id;
    usp_card *mine = &meeting->mine;
    if (mine->status == USP_OK) usp_meeting_note(meeting, prepare_self(config, meeting, &self));
    if (mine->status == USP_OK && meeting->bootstrap.rank == 0) usp_meeting_note(meeting, make_id(mine));
    usp_status status = usp_meet(meeting);
    if (self == NULL) return status;
    if (status == USP_OK) status = connect_ranks(self, meeting);
    if (status == USP_OK) memcpy(&id, meeting->all[0].id, sizeof id);
    if (status == USP_OK) status = join(self, &id);
    return finish(self, status, comm);
}

usp_status usp_comm_create_nccl_id(const usp_comm_config *config, usp_meeting *meeting, const usp_unique_id *id,
                                   int size, int rank, usp_comm **comm) {
    usp_nccl *self = NULL;
    ncclUniqueId copy;
    memcpy(&copy, id->bytes, sizeof copy);
    USP_TRY(usp_meeting_note(meeting, USP_OK));
    meeting->bootstrap = (usp_bootstrap){.gather = gather_cards, .rank = rank, .size = size};
    usp_status status = prepare_self(config, meeting, &self);
    if (self == NULL) return status;
    if (status == USP_OK) status = join(self, &copy);
    if (status == USP_OK) status = meet_over_gpus(self, meeting);
    return finish(self, status, comm);
}

/* ---- a borrowed communicator ------------------------------------------------------------------------------------- */

static void *split_main(void *argument) {
    usp_split *split = argument;
    ncclResult_t result = ncclCommSplit(split->parent, 0, split->rank, &split->child, &split->config);
    for (int round = 0; !went_wrong(result); round++) {
        ncclResult_t query = ncclCommGetAsyncError(split->parent, &result);
        if (query != ncclSuccess) result = query;
        if (result == ncclSuccess) break;
        usp_pause(round);
    }
    split->result = result;
    atomic_store(&split->done, 1);
    return NULL;
}

/* Waits for the thread with the time limit; a thread that is late keeps `split`. */
static usp_status finish_split(usp_nccl *self, usp_split *split) {
    int64_t start = usp_now_ms();
    for (int round = 0; !atomic_load(&split->done); round++) {
        if (is_late(self, start)) {
            pthread_detach(split->thread);
            return give_up_late(self, "ncclCommSplit of the borrowed communicator");
        }
        usp_pause(round);
    }
    pthread_join(split->thread, NULL);
    usp_status status = USP_OK;
    if (split->result == ncclSuccess)
        self->comm = split->child;
    else
        status = fail_nccl(self->base.rank, "ncclCommSplit", split->result);
    usp_host_free(self->base.host, split);
    return status;
}

static usp_status split_borrowed(usp_nccl *self, ncclComm_t borrowed) {
    void *memory = NULL;
    USP_TRY(usp_host_alloc(self->base.host, sizeof(usp_split), "a split communicator", &memory));
    usp_split *split = memory;
    split->parent = borrowed;
    split->config = own_config();
    split->rank = self->base.rank;
    if (usp_thread_start(&split->thread, split_main, split) != 0) {
        usp_host_free(self->base.host, split);
        return usp_fail(USP_NO_MEMORY, "a thread could not be started");
    }
    USP_TRY(finish_split(self, split));
    return settle(self, progress(self), "ncclCommSplit");
}

static usp_status look_at_borrowed(ncclComm_t borrowed, int *size, int *rank) {
    int gpu = 0, current = 0;
    ncclResult_t result = ncclCommCount(borrowed, size);
    if (result == ncclSuccess) result = ncclCommUserRank(borrowed, rank);
    if (result == ncclSuccess) result = ncclCommCuDevice(borrowed, &gpu);
    if (result != ncclSuccess)
        return usp_fail(status_of(result), "the communicator cannot be used: %s", ncclGetErrorString(result));
    USP_REQUIRE(cudaGetDevice(&current) == cudaSuccess && gpu == current,
                "the communicator is on GPU %d, but GPU %d is current", gpu, current);
    return USP_OK;
}

usp_status usp_comm_create_nccl_borrowed(const usp_comm_config *config, usp_meeting *meeting, struct ncclComm *borrowed,
                                         usp_comm **comm) {
    usp_nccl *self = NULL;
    int size = 0, rank = 0, gpu = 0;
    USP_TRY(usp_meeting_note(meeting, USP_OK));
    USP_TRY(check_backend(config, &gpu));
    USP_TRY(look_at_borrowed(borrowed, &size, &rank));
    meeting->bootstrap = (usp_bootstrap){.gather = gather_cards, .rank = rank, .size = size};
    usp_status status = prepare_self(config, meeting, &self);
    if (self == NULL) return status;
    if (status == USP_OK) status = split_borrowed(self, borrowed);
    if (status == USP_OK) status = meet_over_gpus(self, meeting);
    return finish(self, status, comm);
}

usp_status usp_nccl_unique_id(usp_unique_id *id) {
    _Static_assert(sizeof id->bytes == sizeof(ncclUniqueId), "usp_unique_id holds an ncclUniqueId");
    ncclUniqueId made;
    ncclResult_t result = ncclGetUniqueId(&made);
    if (result != ncclSuccess) return usp_fail(USP_COMM, "ncclGetUniqueId failed: %s", ncclGetErrorString(result));
    memcpy(id->bytes, &made, sizeof made);
    return USP_OK;
}
