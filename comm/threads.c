/* threads.c - the control of ranks that are threads of one process, and the rendezvous where they meet. It opens no
 * connection and starts no thread. One mutex guards the rendezvous; each rank has a seat. */
#define _POSIX_C_SOURCE 200809L
#include "rendezvous.h"
#include "error.h"
#include "list.h"
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

/* ---- the rendezvous ---------------------------------------------------------------------------------------------- */

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

void usp_threads_release(usp_rendezvous *meeting) {
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
    if (meeting && meeting->process == getpid()) usp_threads_release(meeting);
}

/* ---- failure and blame; all under the mutex ---------------------------------------------------------------------- */

void usp_threads_wake(usp_rendezvous *meeting) {
    for (int i = 0; i < meeting->size; i++) pthread_cond_signal(&meeting->seats[i].wake);
}

usp_status usp_threads_failure(const usp_rendezvous *meeting) {
    return meeting->failure == USP_OK ? USP_OK : usp_fail(meeting->failure, "%s", meeting->sentence);
}

usp_status usp_threads_fail(usp_rendezvous *meeting, usp_status status, const char *format, ...) {
    if (meeting->failure == USP_OK) {
        va_list arguments;
        va_start(arguments, format);
        vsnprintf(meeting->sentence, sizeof meeting->sentence, format, arguments);
        va_end(arguments);
        meeting->failure = status;
        usp_threads_wake(meeting);
    }
    return usp_threads_failure(meeting);
}

/* A receiver whose message is there is not waiting: it is the one who has to act. */
static int waits_on(usp_rendezvous *meeting, int rank, int peer) {
    if (rank == peer) return 0;
    usp_activity activity = meeting->seats[rank].activity;
    if (activity == USP_GATHERING) return meeting->seats[peer].activity != USP_GATHERING;
    if (activity != USP_EXCHANGING) return 0;
    const usp_box *out = usp_threads_box(meeting, rank, peer), *in = usp_threads_box(meeting, peer, rank);
    return out->next != USP_NO_MESSAGE || (in->want != USP_NO_MESSAGE && in->next == USP_NO_MESSAGE);
}

int usp_threads_waits_for(usp_rendezvous *meeting, int rank) {
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
        int next = usp_threads_waits_for(meeting, rank);
        if (next == USP_NO_RANK) return rank;
        rank = next;
    }
    return fewest_exchanges(meeting);
}

/* ---- waiting; all under the mutex -------------------------------------------------------------------------------- */

struct timespec usp_threads_deadline(int milliseconds) {
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
            return usp_threads_fail(meeting, USP_PEER_LOST, "rank %d left while rank %d waited for it", peer, rank);
    return USP_OK;
}

usp_status usp_threads_wait(usp_threads *self, const struct timespec *deadline) {
    usp_rendezvous *meeting = self->meeting;
    int rank = self->control.rank;
    USP_TRY(check_left(meeting, rank));
    pthread_cond_t *wake = &meeting->seats[rank].wake;
    if (self->control.timeout_ms < 0) {
        pthread_cond_wait(wake, &meeting->mutex);
        return USP_OK;
    }
    if (pthread_cond_timedwait(wake, &meeting->mutex, deadline) != ETIMEDOUT) return USP_OK;
    if (usp_threads_waits_for(meeting, rank) == USP_NO_RANK) return USP_OK;
    return usp_threads_fail(meeting, USP_TIMEOUT, "rank %d did not arrive within %d ms; rank %d waited",
                            rank_behind(meeting, rank), self->control.timeout_ms, rank);
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
            return usp_threads_fail(meeting, USP_COMM, "rank 0 gathers %zu bytes and rank %d gathers %zu", bytes, i,
                                    meeting->seats[i].bytes);
    for (int to = 0; to < meeting->size; to++) {
        for (int from = 0; bytes > 0 && from < meeting->size; from++)
            memcpy((char *)meeting->seats[to].all + (size_t)from * bytes, meeting->seats[from].mine, bytes);
        meeting->seats[to].activity = USP_COMPUTING;
    }
    usp_threads_wake(meeting);
    return USP_OK;
}

static usp_status wait_gathered(usp_threads *self) {
    const usp_seat *seat = &self->meeting->seats[self->control.rank];
    struct timespec deadline = usp_threads_deadline(self->control.timeout_ms);
    while (seat->activity == USP_GATHERING) {
        USP_TRY(usp_threads_failure(self->meeting));
        USP_TRY(usp_threads_wait(self, &deadline));
    }
    return USP_OK;
}

static usp_status gather_locked(usp_threads *self, const void *mine, void *all, size_t bytes) {
    usp_seat *seat = &self->meeting->seats[self->control.rank];
    USP_TRY(usp_threads_failure(self->meeting));
    seat->mine = mine;
    seat->all = all;
    seat->bytes = bytes;
    seat->exchanges++;
    seat->activity = USP_GATHERING;
    usp_status status = all_gathering(self->meeting) ? finish_gather(self->meeting) : wait_gathered(self);
    seat->activity = USP_COMPUTING;
    return status;
}

/* ---- the table --------------------------------------------------------------------------------------------------- */

static usp_status threads_allgather(usp_control *control, const void *mine, void *all, size_t bytes_per_rank) {
    usp_threads *self = (usp_threads *)control;
    pthread_mutex_lock(&self->meeting->mutex);
    usp_status status = gather_locked(self, mine, all, bytes_per_rank);
    pthread_mutex_unlock(&self->meeting->mutex);
    return status;
}

static void threads_note_plan(usp_control *control, int ranks, uint64_t hash) {
    usp_rendezvous *meeting = ((usp_threads *)control)->meeting;
    pthread_mutex_lock(&meeting->mutex);
    usp_plans_note(&meeting->seats[control->rank].plans, ranks, hash);
    pthread_mutex_unlock(&meeting->mutex);
}

static usp_status threads_poll(usp_control *control) {
    usp_rendezvous *meeting = ((usp_threads *)control)->meeting;
    pthread_mutex_lock(&meeting->mutex);
    usp_status status = usp_threads_failure(meeting);
    pthread_mutex_unlock(&meeting->mutex);
    return status;
}

static usp_status threads_fail(usp_control *control, usp_status status) {
    usp_rendezvous *meeting = ((usp_threads *)control)->meeting;
    pthread_mutex_lock(&meeting->mutex);
    status = usp_threads_fail(meeting, status, "rank %d: %s", control->rank, usp_last_error());
    pthread_mutex_unlock(&meeting->mutex);
    return status;
}

static usp_status threads_overdue(usp_control *control) {
    usp_rendezvous *meeting = ((usp_threads *)control)->meeting;
    pthread_mutex_lock(&meeting->mutex);
    usp_status status =
        usp_threads_fail(meeting, USP_TIMEOUT, "rank %d is behind: work of rank %d was not done in %d ms",
                         fewest_exchanges(meeting), control->rank, control->timeout_ms);
    pthread_mutex_unlock(&meeting->mutex);
    return status;
}

static void threads_abort(usp_control *control) {
    usp_rendezvous *meeting = ((usp_threads *)control)->meeting;
    pthread_mutex_lock(&meeting->mutex);
    usp_threads_fail(meeting, USP_COMM, "rank %d aborted", control->rank);
    pthread_mutex_unlock(&meeting->mutex);
}

static void threads_destroy(usp_control *control) {
    usp_threads *self = (usp_threads *)control;
    usp_rendezvous *meeting = self->meeting;
    usp_host_free(self->transport.host, self);
    usp_threads_release(meeting);
}

const usp_control_ops usp_threads_control = {
    .allgather = threads_allgather,
    .note_plan = threads_note_plan,
    .poll = threads_poll,
    .fail = threads_fail,
    .overdue = threads_overdue,
    .abort = threads_abort,
    .destroy = threads_destroy,
};
