/* channel.c - the control channel between the processes of a world: host all-gather, heart-beats, deaths and aborts. It
 * carries no tensors and knows no transport; who exchanges what is told to it.
 *
 * Callers wait here; one service thread does all reading and writing. In a gather each rank says that it has entered;
 * data flows to a rank only after it has, so its memory is known and the sizes are compared first. The first failure is
 * kept, and sent to all. */
#define _GNU_SOURCE
#include "channel.h"
#include "channel_state.h"
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

static void gather_open(usp_channel *channel, const void *mine, void *all, size_t bytes) {
    usp_gather *gather = &channel->gather;
    uint64_t round = gather->round + 1;
    *gather = (usp_gather){1, round, mine, all, bytes, usp_tcp_deadline(channel->base.timeout_ms)};
    for (int i = 0; i < channel->base.size; i++) {
        usp_line *line = &channel->lines[i];
        if (i != channel->base.rank) line->enter_due = line->data_due = line->data_missing = 1;
        if (i == channel->base.rank && bytes > 0) memcpy(gather->all + (size_t)i * bytes, mine, bytes);
        usp_channel_gather_compare(channel, i);
        if (line->left) usp_channel_lose(channel, i);
    }
    usp_channel_ring(channel->wake);
}

static void gather_close(usp_channel *channel) {
    channel->gather.open = 0;
    for (int i = 0; i < channel->base.size; i++)
        channel->lines[i].enter_due = channel->lines[i].data_due = channel->lines[i].data_missing = 0;
}

static void wait_until(usp_channel *channel, int64_t deadline) {
    if (deadline < 0) {
        pthread_cond_wait(&channel->changed, &channel->mutex);
        return;
    }
    struct timespec time = {.tv_sec = (time_t)(deadline / 1000), .tv_nsec = (long)(deadline % 1000) * 1000000L};
    pthread_cond_timedwait(&channel->changed, &channel->mutex, &time);
}

static usp_status gather_wait(usp_channel *channel) {
    int missing;
    while ((missing = usp_channel_gather_missing(channel)) != USP_NOBODY) {
        USP_TRY(usp_channel_failure(channel));
        int over = usp_tcp_left(channel->gather.deadline) == 0;
        int stalled = usp_now_ms() - channel->last_beat > 2 * (int64_t)channel->period;
        if (over && !stalled) return usp_channel_blame(channel, missing);
        wait_until(channel, over ? usp_tcp_deadline(channel->period) : channel->gather.deadline);
    }
    return USP_OK;
}

static usp_status channel_allgather(usp_control *control, const void *mine, void *all, size_t bytes_per_rank) {
    usp_channel *channel = usp_channel_of(control);
    pthread_mutex_lock(&channel->mutex);
    usp_status status = usp_channel_failure(channel);
    if (status == USP_OK) {
        gather_open(channel, mine, all, bytes_per_rank);
        status = gather_wait(channel);
        gather_close(channel);
    }
    pthread_mutex_unlock(&channel->mutex);
    return status;
}

void usp_channel_enter(usp_control *control) {
    usp_channel_await(control, USP_NOBODY);
    atomic_fetch_add(&usp_channel_of(control)->exchanges, 1);
}

void usp_channel_await(usp_control *control, int peer) {
    atomic_store(&usp_channel_of(control)->waits_for, peer);
}

static void channel_note_plan(usp_control *control, int ranks, uint64_t hash) {
    usp_channel *channel = usp_channel_of(control);
    pthread_mutex_lock(&channel->mutex);
    usp_plans_note(&channel->plans, ranks, hash);
    for (int i = 0; i < channel->base.size; i++) channel->lines[i].plan_due = 0;
    pthread_mutex_unlock(&channel->mutex);
}

usp_status usp_channel_poll(usp_control *control) {
    usp_channel *channel = usp_channel_of(control);
    if (atomic_load(&channel->failure) == USP_OK) return USP_OK;
    pthread_mutex_lock(&channel->mutex);
    usp_status status = usp_channel_failure(channel);
    pthread_mutex_unlock(&channel->mutex);
    return status;
}

usp_status usp_channel_overdue(usp_control *control, int peer) {
    usp_channel *channel = usp_channel_of(control);
    pthread_mutex_lock(&channel->mutex);
    usp_status status = usp_channel_blame(channel, peer);
    pthread_mutex_unlock(&channel->mutex);
    return status;
}

usp_status usp_channel_gone(usp_control *control, int peer) {
    usp_channel *channel = usp_channel_of(control);
    pthread_mutex_lock(&channel->mutex);
    channel->lines[peer].wanted = 1;
    if (channel->lines[peer].apart == 0) channel->lines[peer].apart = usp_now_ms();
    if (channel->lines[peer].left || channel->lines[peer].connection < 0) usp_channel_lose(channel, peer);
    usp_status status = usp_channel_failure(channel);
    pthread_mutex_unlock(&channel->mutex);
    return status;
}

int usp_channel_has_lost(usp_control *control, int peer) {
    usp_channel *channel = usp_channel_of(control);
    pthread_mutex_lock(&channel->mutex);
    int lost = peer != channel->base.rank && channel->lines[peer].connection < 0 && !channel->lines[peer].left;
    pthread_mutex_unlock(&channel->mutex);
    return lost;
}

usp_status usp_channel_fail(usp_control *control, usp_status status, const char *format, ...) {
    usp_channel *channel = usp_channel_of(control);
    va_list arguments;
    va_start(arguments, format);
    pthread_mutex_lock(&channel->mutex);
    status = usp_channel_declare_list(channel, status, format, arguments);
    pthread_mutex_unlock(&channel->mutex);
    va_end(arguments);
    return status;
}

int usp_channel_descriptor(const usp_control *control) {
    return ((const usp_channel *)control)->failed_descriptor;
}

static usp_status channel_fail(usp_control *control, usp_status status) {
    return usp_channel_fail(control, status, "rank %d: %s", control->rank, usp_last_error());
}

static usp_status channel_overdue(usp_control *control) {
    return usp_channel_overdue(control, -1);
}

static void channel_abort(usp_control *control) {
    usp_channel_fail(control, USP_COMM, "rank %d aborted", control->rank);
}

/* ---- connecting -------------------------------------------------------------------------------------------------- */

/* Gives the service thread what has been connected since the last time. */
static void take_lines(usp_channel *channel) {
    pthread_mutex_lock(&channel->mutex);
    for (int i = 0; i < channel->base.size; i++) {
        usp_line *line = &channel->lines[i];
        int *connection = &channel->connections[i * channel->ways.lines];
        if (line->heard != 0 || *connection < 0) continue;
        line->connection = *connection;
        *connection = INT_MAX; /* not missing, and no number that may come to belong to somebody else */
        line->heard = usp_now_ms();
        line->fail_due = atomic_load(&channel->failure) != USP_OK;
    }
    usp_channel_ring(channel->wake);
    pthread_mutex_unlock(&channel->mutex);
}

/* A rank that is missed here may have given up for a reason that is on its way; what else has failed is this rank's own
 * affair, which the others hear of. */
static usp_status fail_connecting(usp_channel *channel, usp_status status) {
    char sentence[USP_SENTENCE];
    snprintf(sentence, sizeof sentence, "%s", usp_last_error());
    int64_t end = usp_tcp_deadline(status == USP_PEER_LOST ? USP_ECHO_MS : 0);
    for (; usp_tcp_left(end) > 0; usp_pause(INT_MAX)) USP_TRY(usp_channel_poll(&channel->base));
    if (status == USP_PEER_LOST) return usp_channel_fail(&channel->base, status, "%s", sentence);
    usp_channel_fail(&channel->base, USP_PEER_FAILED, "rank %d could not join: %.200s", channel->base.rank, sentence);
    return usp_fail(status, "%s", sentence);
}

static usp_status connect_all(usp_channel *channel) {
    int64_t deadline = usp_tcp_deadline(channel->base.timeout_ms);
    for (int round = 0, missing = 0;; round++) {
        usp_status status = usp_lines_round(&channel->ways, round, deadline, &missing);
        take_lines(channel);
        if (status != USP_OK) return fail_connecting(channel, status);
        if (missing < 0) return USP_OK;
        USP_TRY(usp_channel_poll(&channel->base));
        if (usp_tcp_left(deadline) == 0)
            return usp_channel_fail(&channel->base, USP_TIMEOUT, "rank %d and rank %d did not connect within %d ms",
                                    missing, channel->base.rank, channel->base.timeout_ms);
    }
}

/* Goes on connecting, so that those who come later are told why there will be no world. */
static usp_status linger(usp_channel *channel, usp_status status) {
    char sentence[USP_SENTENCE];
    snprintf(sentence, sizeof sentence, "%s", usp_last_error());
    int64_t end = usp_tcp_deadline(USP_FAREWELL_MS);
    for (int round = 0, missing = 0; missing >= 0 && usp_tcp_left(end) > 0; round++) {
        usp_lines_round(&channel->ways, round, end, &missing);
        take_lines(channel);
        poll(NULL, 0, USP_NAP_MS);
    }
    return usp_fail(status, "%s", sentence);
}

usp_status usp_channel_connect(usp_control *control, const usp_meeting *meeting, int *data) {
    usp_channel *channel = usp_channel_of(control);
    int lines = data ? 2 : 1;
    for (int i = 0; i < channel->base.size; i++) channel->addresses[i] = meeting->all[i].address;
    channel->ways = (usp_lines){.rank = channel->base.rank,
                                .size = channel->base.size,
                                .lines = lines,
                                .addresses = channel->addresses,
                                .reception = channel->reception,
                                .connections = channel->connections};
    usp_lines_begin(&channel->ways, meeting->bootstrap.secret, &channel->ears);
    usp_status status = connect_all(channel);
    if (status != USP_OK) status = linger(channel, status);
    for (int i = 0; data && i < channel->base.size; i++) data[i] = channel->connections[2 * i + 1];
    return status;
}

/* ---- the table --------------------------------------------------------------------------------------------------- */

void usp_channel_leave(usp_control *control) {
    usp_channel *channel = usp_channel_of(control);
    if (!channel->running) return;
    pthread_mutex_lock(&channel->mutex);
    channel->stop = 1;
    usp_channel_ring(channel->wake);
    pthread_mutex_unlock(&channel->mutex);
    pthread_join(channel->thread, NULL);
    channel->running = 0;
}

static void channel_destroy(usp_control *control) {
    usp_channel *channel = usp_channel_of(control);
    usp_channel_leave(control);
    for (int i = 0; i < channel->base.size; i++) usp_channel_close_line(channel, i);
    usp_lines_deafen(&channel->ears);
    usp_reception_destroy(channel->reception);
    if (channel->wake >= 0) close(channel->wake);
    if (channel->failed_descriptor >= 0) close(channel->failed_descriptor);
    pthread_cond_destroy(&channel->changed);
    pthread_mutex_destroy(&channel->mutex);
    usp_host_free(channel->host, channel);
}

static const usp_control_ops channel_ops = {
    .allgather = channel_allgather,
    .note_plan = channel_note_plan,
    .poll = usp_channel_poll,
    .fail = channel_fail,
    .overdue = channel_overdue,
    .abort = channel_abort,
    .destroy = channel_destroy,
};

/* ---- create ------------------------------------------------------------------------------------------------------ */

static void set_times(usp_channel *channel) {
    int period = channel->silence < 0 ? USP_BEAT_MAX : channel->silence / USP_SILENT_BEATS;
    channel->period = period < USP_BEAT_MIN ? USP_BEAT_MIN : period > USP_BEAT_MAX ? USP_BEAT_MAX : period;
    int least = USP_SILENT_BEATS * USP_BEAT_MIN;
    if (channel->silence >= 0 && channel->silence < least) channel->silence = least;
    channel->last_beat = usp_now_ms();
}

static void make_locks(usp_channel *channel) {
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&channel->changed, &attributes);
    pthread_condattr_destroy(&attributes);
    pthread_mutex_init(&channel->mutex, NULL);
}

static usp_status channel_alloc(const usp_transport_config *config, int rank, int size, usp_channel **result) {
    const size_t each = sizeof(usp_line) + sizeof(usp_address) + USP_MOST_LINES * sizeof(int) + sizeof(struct pollfd);
    size_t count = (size_t)size;
    void *memory;
    USP_TRY(usp_host_alloc(config->host, sizeof(usp_channel) + count * each + sizeof(struct pollfd), "control channel",
                           &memory));
    usp_channel *channel = memory;
    channel->host = config->host;
    channel->base = (usp_control){&channel_ops, rank, size, config->timeout_ms};
    channel->silence = config->silence_ms;
    channel->lines = (usp_line *)(channel + 1);
    channel->addresses = (usp_address *)(channel->lines + count);
    channel->polls = (struct pollfd *)(channel->addresses + count);
    channel->connections = (int *)(channel->polls + count + 1);
    channel->wake = channel->failed_descriptor = -1;
    channel->ears = (usp_ears){-1, -1};
    atomic_store(&channel->waits_for, USP_NOBODY);
    for (size_t i = 0; i < count; i++) channel->lines[i].connection = channel->lines[i].waits_for = USP_NOBODY;
    set_times(channel);
    make_locks(channel);
    *result = channel;
    return USP_OK;
}

static usp_status start_thread(usp_channel *channel) {
    channel->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    channel->failed_descriptor = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (channel->wake < 0 || channel->failed_descriptor < 0)
        return usp_fail(USP_COMM, "no descriptor for the control channel: %s", strerror(errno));
    int reason = usp_thread_start(&channel->thread, usp_channel_serve, channel);
    channel->running = reason == 0;
    return reason == 0 ? USP_OK : usp_fail(USP_COMM, "no thread for the control channel: %s", strerror(reason));
}

usp_status usp_channel_create(const usp_transport_config *config, const usp_bootstrap *bootstrap, usp_address *mine,
                              usp_control **control) {
    usp_channel *channel = NULL;
    USP_TRY(channel_alloc(config, bootstrap->rank, bootstrap->size, &channel));
    usp_status status = usp_reception_create(config->host, &channel->reception);
    if (status == USP_OK) status = usp_lines_listen(&channel->ears, bootstrap->near, mine);
    if (status == USP_OK) status = start_thread(channel);
    if (status == USP_OK)
        *control = &channel->base;
    else
        channel_destroy(&channel->base);
    return status;
}
