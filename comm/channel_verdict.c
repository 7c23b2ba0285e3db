/* channel_verdict.c - the failure of a world, its gather, and which rank is to blame for a wait. It moves nothing. */
#define _GNU_SOURCE
#include "channel_state.h"
#include "error.h"
#include "thread.h"
#include <stdio.h>
#include <unistd.h>

/* ---- failure; all under the mutex -------------------------------------------------------------------------------- */

void usp_channel_ring(int descriptor) {
    uint64_t one = 1;
    ssize_t written = write(descriptor, &one, sizeof one);
    (void)written; /* full means: rung already */
}

usp_status usp_channel_failure(usp_channel *channel) {
    usp_status status = (usp_status)atomic_load(&channel->failure);
    return status == USP_OK ? USP_OK : usp_fail(status, "%s", channel->sentence);
}

void usp_channel_record(usp_channel *channel, usp_status status, const char *sentence) {
    if (atomic_load(&channel->failure) != USP_OK) return;
    snprintf(channel->sentence, sizeof channel->sentence, "%s", sentence);
    atomic_store(&channel->failure, (int)status);
    for (int i = 0; i < channel->base.size; i++) channel->lines[i].fail_due = 1;
    pthread_cond_broadcast(&channel->changed);
    usp_channel_ring(channel->failed_descriptor);
    usp_channel_ring(channel->wake);
}

usp_status usp_channel_declare_list(usp_channel *channel, usp_status status, const char *format, va_list arguments) {
    char sentence[USP_SENTENCE];
    vsnprintf(sentence, sizeof sentence, format, arguments);
    usp_channel_record(channel, status, sentence);
    return usp_channel_failure(channel);
}

usp_status usp_channel_declare(usp_channel *channel, usp_status status, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    status = usp_channel_declare_list(channel, status, format, arguments);
    va_end(arguments);
    return status;
}

void usp_channel_lose(usp_channel *channel, int peer) {
    const char *how = channel->lines[peer].left ? "left" : "died";
    usp_channel_declare(channel, USP_PEER_LOST, "rank %d %s, as rank %d noticed", peer, how, channel->base.rank);
}

/* ---- gather; all under the mutex --------------------------------------------------------------------------------- */

int usp_channel_gather_missing(const usp_channel *channel) {
    for (int i = 0; i < channel->base.size; i++)
        if (channel->lines[i].data_missing || channel->lines[i].data_due) return i;
    return USP_NOBODY;
}

void usp_channel_gather_moved(usp_channel *channel) {
    channel->gather.deadline = usp_tcp_deadline(channel->base.timeout_ms);
    if (usp_channel_gather_missing(channel) == USP_NOBODY) pthread_cond_broadcast(&channel->changed);
}

void usp_channel_gather_compare(usp_channel *channel, int peer) {
    const usp_line *line = &channel->lines[peer];
    const usp_gather *gather = &channel->gather;
    if (!gather->open || line->entered != gather->round || line->entered_bytes == gather->bytes) return;
    usp_channel_declare(channel, USP_COMM, "rank %d gathers %zu bytes and rank %d gathers %zu", channel->base.rank,
                        gather->bytes, peer, line->entered_bytes);
}

/* ---- blame; all under the mutex ---------------------------------------------------------------------------------- */

int usp_channel_waits_for(const usp_channel *channel, int rank) {
    if (rank != channel->base.rank) return channel->lines[rank].waits_for;
    int missing = channel->gather.open ? usp_channel_gather_missing(channel) : USP_NOBODY;
    return missing != USP_NOBODY ? missing : atomic_load(&channel->waits_for);
}

static uint64_t exchanges_of(const usp_channel *channel, int rank) {
    return rank == channel->base.rank ? atomic_load(&channel->exchanges) : channel->lines[rank].exchanges;
}

/* A rank that has missed `limit` ms of beats, the one silent for longest; or nobody. As of this rank's own last beat: a
 * stall of this rank is no silence of the others. */
static int find_silent(const usp_channel *channel, int limit) {
    int64_t oldest = channel->last_beat - limit;
    int silent = USP_NOBODY;
    for (int i = 0; i < channel->base.size; i++) {
        const usp_line *line = &channel->lines[i];
        if (line->connection < 0 || line->left || line->heard > oldest) continue;
        oldest = line->heard;
        silent = i;
    }
    return silent;
}

/* Nobody, where all have done the same. */
static int fewest_exchanges(const usp_channel *channel) {
    int fewest = 0, most = 0;
    for (int i = 1; i < channel->base.size; i++) {
        if (exchanges_of(channel, i) < exchanges_of(channel, fewest)) fewest = i;
        if (exchanges_of(channel, i) > exchanges_of(channel, most)) most = i;
    }
    return exchanges_of(channel, fewest) < exchanges_of(channel, most) ? fewest : USP_NOBODY;
}

static int is_silent(const usp_channel *channel, int rank, int limit) {
    const usp_line *line = &channel->lines[rank];
    return line->connection >= 0 && !line->left && channel->last_beat - line->heard > limit;
}

/* The end of the chain of who waits for whom, or a rank in it that has stopped; where there is no chain or it is a
 * circle, any rank that has stopped, else the one that has done least. */
static int find_behind(const usp_channel *channel, int peer) {
    int limit = USP_SUSPECT_BEATS * channel->period, rank = peer;
    for (int hops = 0; hops < channel->base.size && rank >= 0; hops++) {
        int next = usp_channel_waits_for(channel, rank);
        if (next < 0 || is_silent(channel, rank, limit)) return rank;
        rank = next;
    }
    int silent = find_silent(channel, limit);
    return silent != USP_NOBODY ? silent : fewest_exchanges(channel);
}

static usp_status declare_stopped(usp_channel *channel, int rank) {
    int silence = (int)(usp_now_ms() - channel->lines[rank].heard);
    return usp_channel_declare(channel, USP_TIMEOUT, "rank %d has stopped: rank %d has heard nothing of it for %d ms",
                               rank, channel->base.rank, silence);
}

usp_status usp_channel_blame(usp_channel *channel, int peer) {
    USP_TRY(usp_channel_failure(channel));
    int behind = find_behind(channel, peer);
    if (behind == USP_NOBODY)
        return usp_channel_declare(channel, USP_TIMEOUT, "rank %d waited for %d ms, and no rank is known to be behind",
                                   channel->base.rank, channel->base.timeout_ms);
    if (channel->lines[behind].left)
        return usp_channel_declare(channel, USP_PEER_LOST, "rank %d left while rank %d waited for it", behind,
                                   channel->base.rank);
    if (is_silent(channel, behind, USP_SUSPECT_BEATS * channel->period)) return declare_stopped(channel, behind);
    return usp_channel_declare(channel, USP_TIMEOUT, "rank %d did not arrive within %d ms; rank %d waited", behind,
                               channel->base.timeout_ms, channel->base.rank);
}

void usp_channel_declare_silent(usp_channel *channel) {
    int silent = channel->silence < 0 ? USP_NOBODY : find_silent(channel, channel->silence);
    if (silent != USP_NOBODY) declare_stopped(channel, silent);
}
