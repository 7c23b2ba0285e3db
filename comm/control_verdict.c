/* control_verdict.c - the failure of a world, its gather, and which rank is to blame for a wait. It moves nothing. */
#define _GNU_SOURCE
#include "control_state.h"
#include "error.h"
#include "thread.h"
#include <stdio.h>
#include <unistd.h>

/* ---- failure; all under the mutex -------------------------------------------------------------------------------- */

void usp_control_ring(int descriptor) {
    uint64_t one = 1;
    ssize_t written = write(descriptor, &one, sizeof one);
    (void)written; /* full means: rung already */
}

usp_status usp_control_failure(usp_control *control) {
    usp_status status = (usp_status)atomic_load(&control->failure);
    return status == USP_OK ? USP_OK : usp_fail(status, "%s", control->sentence);
}

void usp_control_record(usp_control *control, usp_status status, const char *sentence) {
    if (atomic_load(&control->failure) != USP_OK) return;
    snprintf(control->sentence, sizeof control->sentence, "%s", sentence);
    atomic_store(&control->failure, (int)status);
    for (int i = 0; i < control->size; i++) control->lines[i].fail_due = 1;
    pthread_cond_broadcast(&control->changed);
    usp_control_ring(control->failed_descriptor);
    usp_control_ring(control->wake);
}

usp_status usp_control_declare_list(usp_control *control, usp_status status, const char *format, va_list arguments) {
    char sentence[USP_SENTENCE];
    vsnprintf(sentence, sizeof sentence, format, arguments);
    usp_control_record(control, status, sentence);
    return usp_control_failure(control);
}

usp_status usp_control_declare(usp_control *control, usp_status status, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    status = usp_control_declare_list(control, status, format, arguments);
    va_end(arguments);
    return status;
}

void usp_control_lose(usp_control *control, int peer) {
    const char *how = control->lines[peer].left ? "left" : "died";
    usp_control_declare(control, USP_PEER_LOST, "rank %d %s, as rank %d noticed", peer, how, control->rank);
}

/* ---- gather; all under the mutex --------------------------------------------------------------------------------- */

int usp_control_gather_missing(const usp_control *control) {
    for (int i = 0; i < control->size; i++)
        if (control->lines[i].data_missing || control->lines[i].data_due) return i;
    return USP_NOBODY;
}

void usp_control_gather_moved(usp_control *control) {
    control->gather.deadline = usp_tcp_deadline(control->timeout_ms);
    if (usp_control_gather_missing(control) == USP_NOBODY) pthread_cond_broadcast(&control->changed);
}

void usp_control_gather_compare(usp_control *control, int peer) {
    const usp_line *line = &control->lines[peer];
    const usp_gather *gather = &control->gather;
    if (!gather->open || line->entered != gather->round || line->entered_bytes == gather->bytes) return;
    usp_control_declare(control, USP_COMM, "rank %d gathers %zu bytes and rank %d gathers %zu", control->rank,
                        gather->bytes, peer, line->entered_bytes);
}

/* ---- blame; all under the mutex ---------------------------------------------------------------------------------- */

int usp_control_waits_for(const usp_control *control, int rank) {
    if (rank != control->rank) return control->lines[rank].waits_for;
    int missing = control->gather.open ? usp_control_gather_missing(control) : USP_NOBODY;
    return missing != USP_NOBODY ? missing : atomic_load(&control->waits_for);
}

static uint64_t exchanges_of(const usp_control *control, int rank) {
    return rank == control->rank ? atomic_load(&control->exchanges) : control->lines[rank].exchanges;
}

/* A rank that has missed `limit` ms of beats, the one silent for longest; or nobody. As of this rank's own last beat: a
 * stall of this rank is no silence of the others. */
static int find_silent(const usp_control *control, int limit) {
    int64_t oldest = control->last_beat - limit;
    int silent = USP_NOBODY;
    for (int i = 0; i < control->size; i++) {
        const usp_line *line = &control->lines[i];
        if (line->connection < 0 || line->left || line->heard > oldest) continue;
        oldest = line->heard;
        silent = i;
    }
    return silent;
}

/* Nobody, where all have done the same. */
static int fewest_exchanges(const usp_control *control) {
    int fewest = 0, most = 0;
    for (int i = 1; i < control->size; i++) {
        if (exchanges_of(control, i) < exchanges_of(control, fewest)) fewest = i;
        if (exchanges_of(control, i) > exchanges_of(control, most)) most = i;
    }
    return exchanges_of(control, fewest) < exchanges_of(control, most) ? fewest : USP_NOBODY;
}

static int is_silent(const usp_control *control, int rank, int limit) {
    const usp_line *line = &control->lines[rank];
    return line->connection >= 0 && !line->left && control->last_beat - line->heard > limit;
}

/* The end of the chain of who waits for whom, or a rank in it that has stopped; where there is no chain or it is a
 * circle, any rank that has stopped, else the one that has done least. */
static int find_behind(const usp_control *control, int peer) {
    int limit = USP_SUSPECT_BEATS * control->period, rank = peer;
    for (int hops = 0; hops < control->size && rank >= 0; hops++) {
        int next = usp_control_waits_for(control, rank);
        if (next < 0 || is_silent(control, rank, limit)) return rank;
        rank = next;
    }
    int silent = find_silent(control, limit);
    return silent != USP_NOBODY ? silent : fewest_exchanges(control);
}

static usp_status declare_stopped(usp_control *control, int rank) {
    int silence = (int)(usp_now_ms() - control->lines[rank].heard);
    return usp_control_declare(control, USP_TIMEOUT, "rank %d has stopped: rank %d has heard nothing of it for %d ms",
                               rank, control->rank, silence);
}

usp_status usp_control_blame(usp_control *control, int peer) {
    USP_TRY(usp_control_failure(control));
    int behind = find_behind(control, peer);
    if (behind == USP_NOBODY)
        return usp_control_declare(control, USP_TIMEOUT, "rank %d waited for %d ms, and no rank is known to be behind",
                                   control->rank, control->timeout_ms);
    if (control->lines[behind].left)
        return usp_control_declare(control, USP_PEER_LOST, "rank %d left while rank %d waited for it", behind,
                                   control->rank);
    if (is_silent(control, behind, USP_SUSPECT_BEATS * control->period)) return declare_stopped(control, behind);
    return usp_control_declare(control, USP_TIMEOUT, "rank %d did not arrive within %d ms; rank %d waited", behind,
                               control->timeout_ms, control->rank);
}

void usp_control_declare_silent(usp_control *control) {
    int silent = control->silence < 0 ? USP_NOBODY : find_silent(control, control->silence);
    if (silent != USP_NOBODY) declare_stopped(control, silent);
}
