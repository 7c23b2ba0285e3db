/* control.c - the channel between the processes of a world: host all-gather, heart-beats, deaths and aborts. It carries
 * no tensors and knows no transport; who exchanges what is told to it.
 *
 * Callers wait here; one service thread does all reading and writing. In a gather each rank says that it has entered;
 * data flows to a rank only after it has, so its memory is known and the sizes are compared first. The first failure is
 * kept, and sent to all. */
#define _GNU_SOURCE
#include "control.h"
#include "control_state.h"
#include "error.h"
#include "thread.h"
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

enum {
    USP_ECHO_MS = 300,      /* for the reason of a failure to arrive by way of another rank */
    USP_FAREWELL_MS = 1000, /* for ranks that are still to connect to hear of it */
    USP_NAP_MS = 10
};

/* ---- what callers do --------------------------------------------------------------------------------------------- */

static void gather_open(usp_control *control, const void *mine, void *all, size_t bytes) {
    usp_gather *gather = &control->gather;
    uint64_t round = gather->round + 1;
    *gather = (usp_gather){1, round, mine, all, bytes, usp_tcp_deadline(control->timeout_ms)};
    for (int i = 0; i < control->size; i++) {
        usp_line *line = &control->lines[i];
        if (i != control->rank) line->enter_due = line->data_due = line->data_missing = 1;
        if (i == control->rank && bytes > 0) memcpy(gather->all + (size_t)i * bytes, mine, bytes);
        usp_control_gather_compare(control, i);
        if (line->left) usp_control_lose(control, i);
    }
    usp_control_ring(control->wake);
}

static void gather_close(usp_control *control) {
    control->gather.open = 0;
    for (int i = 0; i < control->size; i++)
        control->lines[i].enter_due = control->lines[i].data_due = control->lines[i].data_missing = 0;
}

static void wait_until(usp_control *control, int64_t deadline) {
    if (deadline < 0) {
        pthread_cond_wait(&control->changed, &control->mutex);
        return;
    }
    struct timespec time = {.tv_sec = (time_t)(deadline / 1000), .tv_nsec = (long)(deadline % 1000) * 1000000L};
    pthread_cond_timedwait(&control->changed, &control->mutex, &time);
}

static usp_status gather_wait(usp_control *control) {
    int missing;
    while ((missing = usp_control_gather_missing(control)) != USP_NOBODY) {
        USP_TRY(usp_control_failure(control));
        int over = usp_tcp_left(control->gather.deadline) == 0;
        int stalled = usp_now_ms() - control->last_beat > 2 * (int64_t)control->period;
        if (over && !stalled) return usp_control_blame(control, missing);
        wait_until(control, over ? usp_tcp_deadline(control->period) : control->gather.deadline);
    }
    return USP_OK;
}

usp_status usp_control_allgather(usp_control *control, const void *mine, void *all, size_t bytes_per_rank) {
    pthread_mutex_lock(&control->mutex);
    usp_status status = usp_control_failure(control);
    if (status == USP_OK) {
        gather_open(control, mine, all, bytes_per_rank);
        status = gather_wait(control);
        gather_close(control);
    }
    pthread_mutex_unlock(&control->mutex);
    return status;
}

void usp_control_progress(usp_control *control, uint64_t exchanges, int waiting_for) {
    atomic_store(&control->exchanges, exchanges);
    atomic_store(&control->waits_for, waiting_for);
}

void usp_control_note_plan(usp_control *control, int ranks, uint64_t hash) {
    pthread_mutex_lock(&control->mutex);
    usp_plans_note(&control->plans, ranks, hash);
    for (int i = 0; i < control->size; i++) control->lines[i].plan_due = 0;
    usp_control_ring(control->wake);
    pthread_mutex_unlock(&control->mutex);
}

usp_status usp_control_poll(usp_control *control) {
    if (atomic_load(&control->failure) == USP_OK) return USP_OK;
    pthread_mutex_lock(&control->mutex);
    usp_status status = usp_control_failure(control);
    pthread_mutex_unlock(&control->mutex);
    return status;
}

usp_status usp_control_overdue(usp_control *control, int peer) {
    pthread_mutex_lock(&control->mutex);
    usp_status status = usp_control_blame(control, peer);
    pthread_mutex_unlock(&control->mutex);
    return status;
}

usp_status usp_control_gone(usp_control *control, int peer) {
    pthread_mutex_lock(&control->mutex);
    control->lines[peer].wanted = 1;
    if (control->lines[peer].apart == 0) control->lines[peer].apart = usp_now_ms();
    if (control->lines[peer].left || control->lines[peer].connection < 0) usp_control_lose(control, peer);
    usp_status status = usp_control_failure(control);
    pthread_mutex_unlock(&control->mutex);
    return status;
}

usp_status usp_control_fail(usp_control *control, usp_status status, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    pthread_mutex_lock(&control->mutex);
    status = usp_control_declare_list(control, status, format, arguments);
    pthread_mutex_unlock(&control->mutex);
    va_end(arguments);
    return status;
}

int usp_control_descriptor(const usp_control *control) {
    return control->failed_descriptor;
}

void usp_control_abort(usp_control *control) {
    usp_control_fail(control, USP_COMM, "rank %d aborted", control->rank);
}

/* ---- create and destroy ------------------------------------------------------------------------------------------ */

static void set_times(usp_control *control) {
    int period = control->silence < 0 ? USP_BEAT_MAX : control->silence / USP_SILENT_BEATS;
    control->period = period < USP_BEAT_MIN ? USP_BEAT_MIN : period > USP_BEAT_MAX ? USP_BEAT_MAX : period;
    int least = USP_SILENT_BEATS * USP_BEAT_MIN;
    if (control->silence >= 0 && control->silence < least) control->silence = least;
    control->last_beat = usp_now_ms();
}

static void make_locks(usp_control *control) {
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&control->changed, &attributes);
    pthread_condattr_destroy(&attributes);
    pthread_mutex_init(&control->mutex, NULL);
}

static usp_status control_alloc(const usp_comm_config *config, int rank, int size, usp_control **result) {
    const size_t each = sizeof(usp_line) + sizeof(usp_address) + USP_MOST_LINES * sizeof(int) + sizeof(struct pollfd);
    size_t count = (size_t)size;
    void *memory;
    USP_TRY(usp_host_alloc(config->host, sizeof(usp_control) + count * each + sizeof(struct pollfd), "control channel",
                           &memory));
    usp_control *control = memory;
    control->host = config->host;
    control->rank = rank;
    control->size = size;
    control->timeout_ms = config->timeout_ms;
    control->silence = config->silence_ms;
    control->lines = (usp_line *)(control + 1);
    control->addresses = (usp_address *)(control->lines + count);
    control->polls = (struct pollfd *)(control->addresses + count);
    control->connections = (int *)(control->polls + count + 1);
    control->wake = control->failed_descriptor = -1;
    control->ears = (usp_ears){-1, -1};
    atomic_store(&control->waits_for, USP_NOBODY);
    for (size_t i = 0; i < count; i++) control->lines[i].connection = control->lines[i].waits_for = USP_NOBODY;
    set_times(control);
    make_locks(control);
    *result = control;
    return USP_OK;
}

static usp_status start_thread(usp_control *control) {
    control->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    control->failed_descriptor = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (control->wake < 0 || control->failed_descriptor < 0)
        return usp_fail(USP_COMM, "no descriptor for the control channel: %s", strerror(errno));
    int reason = usp_thread_start(&control->thread, usp_control_serve, control);
    control->running = reason == 0;
    return reason == 0 ? USP_OK : usp_fail(USP_COMM, "no thread for the control channel: %s", strerror(reason));
}

usp_status usp_control_create(const usp_comm_config *config, const usp_bootstrap *bootstrap, usp_address *mine,
                              usp_control **result) {
    usp_control *control = NULL;
    USP_TRY(control_alloc(config, bootstrap->rank, bootstrap->size, &control));
    usp_status status = usp_reception_create(config->host, &control->reception);
    if (status == USP_OK) status = usp_lines_listen(&control->ears, bootstrap->near, mine);
    if (status == USP_OK) status = start_thread(control);
    if (status == USP_OK)
        *result = control;
    else
        usp_control_destroy(control);
    return status;
}

/* Gives the service thread what has been connected since the last time. */
static void take_lines(usp_control *control) {
    pthread_mutex_lock(&control->mutex);
    for (int i = 0; i < control->size; i++) {
        usp_line *line = &control->lines[i];
        int *connection = &control->connections[i * control->ways.lines];
        if (line->heard != 0 || *connection < 0) continue;
        line->connection = *connection;
        *connection = INT_MAX; /* not missing, and no number that may come to belong to somebody else */
        line->heard = usp_now_ms();
        line->fail_due = atomic_load(&control->failure) != USP_OK;
    }
    usp_control_ring(control->wake);
    pthread_mutex_unlock(&control->mutex);
}

/* A rank that is missed here may have given up for a reason that is on its way; what else has failed is this rank's own
 * affair, which the others hear of. */
static usp_status fail_connecting(usp_control *control, usp_status status) {
    char sentence[USP_SENTENCE];
    snprintf(sentence, sizeof sentence, "%s", usp_last_error());
    int64_t end = usp_tcp_deadline(status == USP_PEER_LOST ? USP_ECHO_MS : 0);
    for (; usp_tcp_left(end) > 0; usp_pause(INT_MAX)) USP_TRY(usp_control_poll(control));
    if (status == USP_PEER_LOST) return usp_control_fail(control, status, "%s", sentence);
    usp_control_fail(control, USP_PEER_FAILED, "rank %d could not join: %.200s", control->rank, sentence);
    return usp_fail(status, "%s", sentence);
}

static usp_status connect_all(usp_control *control) {
    int64_t deadline = usp_tcp_deadline(control->timeout_ms);
    for (int round = 0, missing = 0;; round++) {
        usp_status status = usp_lines_round(&control->ways, round, deadline, &missing);
        take_lines(control);
        if (status != USP_OK) return fail_connecting(control, status);
        if (missing < 0) return USP_OK;
        USP_TRY(usp_control_poll(control));
        if (usp_tcp_left(deadline) == 0)
            return usp_control_fail(control, USP_TIMEOUT, "rank %d and rank %d did not connect within %d ms", missing,
                                    control->rank, control->timeout_ms);
    }
}

/* Goes on connecting, so that those who come later are told why there will be no world. */
static usp_status linger(usp_control *control, usp_status status) {
    char sentence[USP_SENTENCE];
    snprintf(sentence, sizeof sentence, "%s", usp_last_error());
    int64_t end = usp_tcp_deadline(USP_FAREWELL_MS);
    for (int round = 0, missing = 0; missing >= 0 && usp_tcp_left(end) > 0; round++) {
        usp_lines_round(&control->ways, round, end, &missing);
        take_lines(control);
        poll(NULL, 0, USP_NAP_MS);
    }
    return usp_fail(status, "%s", sentence);
}

usp_status usp_control_connect(usp_control *control, const usp_meeting *meeting, int *data) {
    int lines = data ? 2 : 1;
    for (int i = 0; i < control->size; i++) control->addresses[i] = meeting->all[i].address;
    control->ways = (usp_lines){.rank = control->rank,
                                .size = control->size,
                                .lines = lines,
                                .addresses = control->addresses,
                                .reception = control->reception,
                                .connections = control->connections};
    usp_lines_begin(&control->ways, meeting->bootstrap.secret, &control->ears);
    usp_status status = connect_all(control);
    if (status != USP_OK) status = linger(control, status);
    for (int i = 0; data && i < control->size; i++) data[i] = control->connections[2 * i + 1];
    return status;
}

static void stop_thread(usp_control *control) {
    pthread_mutex_lock(&control->mutex);
    control->stop = 1;
    usp_control_ring(control->wake);
    pthread_mutex_unlock(&control->mutex);
    pthread_join(control->thread, NULL);
}

void usp_control_destroy(usp_control *control) {
    if (!control) return;
    if (control->running) stop_thread(control);
    for (int i = 0; i < control->size; i++) usp_control_close_line(control, i);
    usp_lines_deafen(&control->ears);
    usp_reception_destroy(control->reception);
    if (control->wake >= 0) close(control->wake);
    if (control->failed_descriptor >= 0) close(control->failed_descriptor);
    pthread_cond_destroy(&control->changed);
    pthread_mutex_destroy(&control->mutex);
    usp_host_free(control->host, control);
}
