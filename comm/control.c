/* control.c - the channel between the processes of a world: host all-gather, heart-beats, deaths and aborts. It carries
 * no tensors and knows no transport; who exchanges what is told to it.
 *
 * One service thread does all reading and writing, under the one mutex and never blocking there. Frames to a peer
 * follow each other on its line. In a gather each rank says that it has entered; data flows to a rank only after it
 * has, so its memory is known and the sizes are compared first. The first failure is kept, and sent to all. */
#define _GNU_SOURCE
#include "control.h"
#include "error.h"
#include "plans.h"
#include "thread.h"
#include <errno.h>
#include <limits.h>
#include <poll.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

enum { USP_SENTENCE = 256, USP_NOBODY = -1, USP_READS = 64 };
enum { USP_BEAT_MIN = 20, USP_BEAT_MAX = 1000, USP_SILENT_BEATS = 8, USP_SUSPECT_BEATS = 3 };
enum {
    USP_ECHO_MS = 500,  /* for the reason of a failure to arrive by way of another rank */
    USP_APART_MS = 500, /* a data connection has ended and the control line has not */
    USP_DYING_MS = 10   /* a process that ends closes one descriptor after the other */
};

typedef enum usp_frame_kind {
    USP_FRAME_BEAT = 1,   /* rank: whom the sender waits for; number: exchanges entered */
    USP_FRAME_ENTER = 2,  /* number: round of the gather; bytes: per rank */
    USP_FRAME_DATA = 3,   /* number, bytes as above; then the data */
    USP_FRAME_FAIL = 4,   /* rank: the status; bytes of sentence follow */
    USP_FRAME_GOODBYE = 5, /* number: exchanges entered */
    USP_FRAME_PLAN = 6     /* rank: ranks of a copy; number: hash, bytes: count of re-plans */
} usp_frame_kind;

typedef struct usp_frame {
    uint32_t kind;
    int32_t rank;
    uint64_t number, bytes;
} usp_frame;

/* The connection to one peer and what is known of it. */
typedef struct usp_line {
    int connection; /* -1: ended, or this rank itself */
    int left;       /* the peer said goodbye */
    int wanted;     /* this rank cannot go on without the peer */
    int deaf;       /* what the peer says cannot be understood any more */
    int64_t apart;  /* since when the data connection to it is known to have ended; 0: it has not */
    int64_t heard;  /* when */
    uint64_t exchanges;
    int waits_for;

    usp_frame in; /* being read: header, then payload */
    size_t in_header, in_payload;
    char in_text[USP_SENTENCE];

    struct {
        usp_frame frame;
        char text[USP_SENTENCE];
    } out; /* being written, out_size = 0: none; the data of a gather follow from the caller's memory */
    size_t out_size, out_done;

    int beat_due, fail_due, goodbye_due;
    int plan_due; /* the first of the plans still to be told; USP_PLAN_SIZES: none */
    uint64_t entered; /* the peer's last round */
    size_t entered_bytes;
    int enter_due, data_due; /* towards the peer */
    int data_missing;        /* from the peer */
} usp_line;

/* The gather that the caller is in. */
typedef struct usp_gather {
    int open;
    uint64_t round;
    const char *mine;
    char *all;
    size_t bytes;
    int64_t deadline;
} usp_gather;

struct usp_control {
    const usp_host *host;
    int rank, size, timeout_ms;
    int period, silence;         /* ms; silence: a rank that says nothing for so long has stopped, -1: never */
    int wake, failed_descriptor; /* eventfds: something to do for the thread; the control has failed */
    int stop, running;
    pthread_t thread;
    pthread_mutex_t mutex;
    pthread_cond_t changed; /* the gather is done, or failure */
    atomic_int failure;     /* usp_status; written under the mutex */
    char sentence[USP_SENTENCE];
    atomic_uint_fast64_t exchanges;
    atomic_int waits_for;
    int64_t last_beat;
    usp_plans plans;
    usp_gather gather;
    usp_line *lines;      /* [size] */
    struct pollfd *polls; /* [size + 1] */
    usp_ears ears;
    usp_lines ways;         /* how to call the others */
    usp_address *addresses; /* [size] */
    int *connections;       /* [size][USP_MOST_LINES], for creation */
};

/* ---- failure; all under the mutex -------------------------------------------------------------------------------- */

static void ring(int descriptor) {
    uint64_t one = 1;
    ssize_t written = write(descriptor, &one, sizeof one);
    (void)written; /* full means: rung already */
}

static usp_status failure_of(usp_control *control) {
    usp_status status = (usp_status)atomic_load(&control->failure);
    return status == USP_OK ? USP_OK : usp_fail(status, "%s", control->sentence);
}

static void record(usp_control *control, usp_status status, const char *sentence) {
    if (atomic_load(&control->failure) != USP_OK) return;
    snprintf(control->sentence, sizeof control->sentence, "%s", sentence);
    atomic_store(&control->failure, (int)status);
    for (int i = 0; i < control->size; i++) control->lines[i].fail_due = 1;
    pthread_cond_broadcast(&control->changed);
    ring(control->failed_descriptor);
    ring(control->wake);
}

__attribute__((format(printf, 3, 4))) static usp_status declare(usp_control *control, usp_status status,
                                                                const char *format, ...) {
    char sentence[USP_SENTENCE];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(sentence, sizeof sentence, format, arguments);
    va_end(arguments);
    record(control, status, sentence);
    return failure_of(control);
}

static void lose(usp_control *control, int peer) {
    const char *how = control->lines[peer].left ? "left" : "died";
    declare(control, USP_PEER_LOST, "rank %d %s, as rank %d noticed", peer, how, control->rank);
}

/* A process that has died listens no more. */
static int still_lives(const usp_control *control, int peer) {
    if (!usp_lines_listens(&control->ways, peer)) return 0;
    poll(NULL, 0, USP_DYING_MS);
    return usp_lines_listens(&control->ways, peer);
}

static void close_line(usp_control *control, int peer) {
    usp_line *line = &control->lines[peer];
    if (line->connection >= 0) close(line->connection);
    line->connection = -1;
}

static void end_line(usp_control *control, int peer) {
    const usp_line *line = &control->lines[peer];
    close_line(control, peer);
    if (atomic_load(&control->failure) != USP_OK || (line->left && !line->wanted)) return;
    if (line->left || !still_lives(control, peer))
        lose(control, peer);
    else
        declare(control, USP_COMM, "the control line between rank %d and rank %d was cut", control->rank, peer);
}

/* The line stays, for this rank to say why. */
static void hear_no_more(usp_control *control, int peer) {
    control->lines[peer].deaf = 1;
    declare(control, USP_COMM, "rank %d hears nonsense on its control line to rank %d", control->rank, peer);
}

/* ---- gather; all under the mutex --------------------------------------------------------------------------------- */

static int gather_missing(const usp_control *control) {
    for (int i = 0; i < control->size; i++)
        if (control->lines[i].data_missing || control->lines[i].data_due) return i;
    return USP_NOBODY;
}

static void gather_moved(usp_control *control) {
    control->gather.deadline = usp_tcp_deadline(control->timeout_ms);
    if (gather_missing(control) == USP_NOBODY) pthread_cond_broadcast(&control->changed);
}

/* Once both are in the same round their sizes must agree. */
static void compare_entered(usp_control *control, int peer) {
    const usp_line *line = &control->lines[peer];
    const usp_gather *gather = &control->gather;
    if (!gather->open || line->entered != gather->round || line->entered_bytes == gather->bytes) return;
    declare(control, USP_COMM, "rank %d gathers %zu bytes and rank %d gathers %zu", control->rank, gather->bytes, peer,
            line->entered_bytes);
}

static void gather_open(usp_control *control, const void *mine, void *all, size_t bytes) {
    usp_gather *gather = &control->gather;
    uint64_t round = gather->round + 1;
    *gather = (usp_gather){1, round, mine, all, bytes, usp_tcp_deadline(control->timeout_ms)};
    for (int i = 0; i < control->size; i++) {
        usp_line *line = &control->lines[i];
        if (i != control->rank) line->enter_due = line->data_due = line->data_missing = 1;
        if (i == control->rank && bytes > 0) memcpy(gather->all + (size_t)i * bytes, mine, bytes);
        compare_entered(control, i);
        if (line->left) lose(control, i);
    }
    ring(control->wake);
}

static void gather_close(usp_control *control) {
    control->gather.open = 0;
    for (int i = 0; i < control->size; i++)
        control->lines[i].enter_due = control->lines[i].data_due = control->lines[i].data_missing = 0;
}

/* ---- blame; all under the mutex ---------------------------------------------------------------------------------- */

static int waited_for_by(const usp_control *control, int rank) {
    if (rank != control->rank) return control->lines[rank].waits_for;
    int missing = control->gather.open ? gather_missing(control) : USP_NOBODY;
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
        int next = waited_for_by(control, rank);
        if (next < 0 || is_silent(control, rank, limit)) return rank;
        rank = next;
    }
    int silent = find_silent(control, limit);
    return silent != USP_NOBODY ? silent : fewest_exchanges(control);
}

static usp_status declare_stopped(usp_control *control, int rank) {
    int silence = (int)(usp_now_ms() - control->lines[rank].heard);
    return declare(control, USP_TIMEOUT, "rank %d has stopped: rank %d has heard nothing of it for %d ms", rank,
                   control->rank, silence);
}

static usp_status blame(usp_control *control, int peer) {
    USP_TRY(failure_of(control));
    int behind = find_behind(control, peer);
    if (behind == USP_NOBODY)
        return declare(control, USP_TIMEOUT, "rank %d waited for %d ms, and no rank is known to be behind",
                       control->rank, control->timeout_ms);
    if (control->lines[behind].left)
        return declare(control, USP_PEER_LOST, "rank %d left while rank %d waited for it", behind, control->rank);
    if (is_silent(control, behind, USP_SUSPECT_BEATS * control->period)) return declare_stopped(control, behind);
    return declare(control, USP_TIMEOUT, "rank %d did not arrive within %d ms; rank %d waited", behind,
                   control->timeout_ms, control->rank);
}

/* ---- reading; the service thread --------------------------------------------------------------------------------- */

static void take_beat(usp_line *line) {
    line->waits_for = line->in.rank;
    line->exchanges = line->in.number;
}

static void compare_plans(usp_control *control, int peer) {
    const usp_frame *frame = &control->lines[peer].in;
    if (usp_plans_differ(&control->plans, control->rank, peer, frame->rank, frame->bytes, frame->number))
        declare(control, USP_MISMATCH, "rank %d and rank %d re-planned to different documents", peer, control->rank);
}

static void take_frame(usp_control *control, int peer) {
    usp_line *line = &control->lines[peer];
    const usp_frame *frame = &line->in;
    if (frame->kind == USP_FRAME_BEAT) take_beat(line);
    if (frame->kind == USP_FRAME_PLAN) compare_plans(control, peer);
    if (frame->kind == USP_FRAME_FAIL) record(control, (usp_status)frame->rank, line->in_text);
    if (frame->kind == USP_FRAME_ENTER) {
        line->entered = frame->number;
        line->entered_bytes = frame->bytes;
        compare_entered(control, peer);
        gather_moved(control);
    }
    if (frame->kind == USP_FRAME_DATA) {
        line->data_missing = 0;
        gather_moved(control);
    }
    if (frame->kind == USP_FRAME_GOODBYE) {
        line->left = 1;
        line->exchanges = frame->number;
        line->waits_for = USP_NOBODY;
        if (line->wanted || line->data_missing || line->data_due) lose(control, peer);
    }
    line->in_header = line->in_payload = 0;
}

/* 0 for a frame that no rank sends. */
static int frame_sane(const usp_control *control, const usp_frame *frame) {
    const usp_gather *gather = &control->gather;
    if (frame->kind < USP_FRAME_BEAT || frame->kind > USP_FRAME_PLAN) return 0;
    if (frame->kind == USP_FRAME_BEAT) return frame->rank >= USP_NOBODY && frame->rank < control->size;
    if (frame->kind == USP_FRAME_FAIL)
        return frame->bytes < USP_SENTENCE && frame->rank > USP_OK && frame->rank < USP_STATUS_COUNT;
    if (frame->kind != USP_FRAME_DATA) return 1;
    if (!gather->open) return atomic_load(&control->failure) != USP_OK;
    return frame->number == gather->round && frame->bytes == gather->bytes;
}

/* Where the next bytes of a line go, and how many; 0 bytes: the frame is complete. A gather that has been given up has
 * no memory any more: its data go nowhere, through `drain`. */
static char *read_target(usp_control *control, int peer, char *drain, size_t drain_size, size_t *bytes) {
    usp_line *line = &control->lines[peer];
    if (line->in_header < sizeof line->in) {
        *bytes = sizeof line->in - line->in_header;
        return (char *)&line->in + line->in_header;
    }
    int has_payload = line->in.kind == USP_FRAME_DATA || line->in.kind == USP_FRAME_FAIL;
    *bytes = has_payload ? line->in.bytes - line->in_payload : 0;
    if (line->in.kind == USP_FRAME_FAIL) return line->in_text + line->in_payload;
    if (control->gather.open) return control->gather.all + (size_t)peer * control->gather.bytes + line->in_payload;
    if (*bytes > drain_size) *bytes = drain_size;
    return drain;
}

/* Takes what `got` bytes complete; 0 if the peer talks nonsense. */
static int advance(usp_control *control, int peer, size_t got) {
    usp_line *line = &control->lines[peer];
    char drain[1];
    size_t left;
    if (line->in_header < sizeof line->in) {
        line->in_header += got;
        if (line->in_header < sizeof line->in) return 1;
        memset(line->in_text, 0, sizeof line->in_text);
        if (!frame_sane(control, &line->in)) return 0;
    } else {
        line->in_payload += got;
        gather_moved(control);
    }
    read_target(control, peer, drain, sizeof drain, &left);
    if (left == 0) take_frame(control, peer);
    return 1;
}

static void read_line(usp_control *control, int peer) {
    usp_line *line = &control->lines[peer];
    char drain[4096];
    for (int reads = 0; reads < USP_READS && line->connection >= 0 && !line->deaf; reads++) {
        size_t bytes;
        char *target = read_target(control, peer, drain, sizeof drain, &bytes);
        ssize_t got = recv(line->connection, target, bytes, 0);
        if (got < 0 && (errno == EAGAIN || errno == EINTR)) return;
        if (got <= 0)
            end_line(control, peer);
        else if (!advance(control, peer, (size_t)got))
            hear_no_more(control, peer);
        line->heard = usp_now_ms();
    }
}

/* ---- writing; the service thread --------------------------------------------------------------------------------- */

static void begin_frame(usp_line *line, usp_frame_kind kind, int rank, uint64_t number, uint64_t bytes) {
    line->out.frame = (usp_frame){kind, rank, number, bytes};
    line->out_size = sizeof line->out.frame;
    line->out_done = 0;
}

static void begin_fail(usp_control *control, usp_line *line) {
    size_t length = strlen(control->sentence);
    begin_frame(line, USP_FRAME_FAIL, atomic_load(&control->failure), 0, length);
    memcpy(line->out.text, control->sentence, length);
    line->out_size += length;
    line->fail_due = 0;
}

/* Chooses the next frame for a peer, the most urgent first; 0: none. */
static int begin_next(usp_control *control, int peer) {
    usp_line *line = &control->lines[peer];
    const usp_gather *gather = &control->gather;
    uint64_t exchanges = atomic_load(&control->exchanges);
    if (line->fail_due) {
        begin_fail(control, line);
    } else if (line->enter_due) {
        begin_frame(line, USP_FRAME_ENTER, 0, gather->round, gather->bytes);
        line->enter_due = 0;
    } else if (line->data_due && line->entered == gather->round) {
        begin_frame(line, USP_FRAME_DATA, 0, gather->round, gather->bytes);
        line->out_size += gather->bytes;
    } else if (line->beat_due) {
        begin_frame(line, USP_FRAME_BEAT, waited_for_by(control, control->rank), exchanges, 0);
        line->beat_due = 0;
    } else if (line->plan_due < USP_PLAN_SIZES && control->plans.of[line->plan_due].ranks > 0) {
        const usp_plan *plan = &control->plans.of[line->plan_due++];
        begin_frame(line, USP_FRAME_PLAN, plan->ranks, plan->hash[plan->count % USP_PLAN_HISTORY], plan->count);
    } else if (line->goodbye_due) {
        begin_frame(line, USP_FRAME_GOODBYE, 0, exchanges, 0);
        line->goodbye_due = 0;
    } else {
        return 0;
    }
    return 1;
}

static void end_frame(usp_control *control, usp_line *line) {
    line->out_size = line->out_done = 0;
    if (line->out.frame.kind != USP_FRAME_DATA) return;
    line->data_due = 0;
    gather_moved(control);
}

/* The part of the frame that is next; NULL if it was to come from a gather that has been given up. */
static const char *write_source(const usp_control *control, const usp_line *line, size_t *bytes) {
    size_t head = sizeof line->out.frame;
    int data = line->out.frame.kind == USP_FRAME_DATA;
    if (!data || line->out_done < head) {
        *bytes = (data ? head : line->out_size) - line->out_done;
        return (const char *)&line->out + line->out_done;
    }
    *bytes = line->out_size - line->out_done;
    return control->gather.open ? control->gather.mine + (line->out_done - head) : NULL;
}

/* Writes what the connection takes. A frame that cannot be finished ends the line: nothing can follow it. */
static void write_line(usp_control *control, int peer) {
    usp_line *line = &control->lines[peer];
    while (line->connection >= 0 && (line->out_size > 0 || begin_next(control, peer))) {
        size_t bytes;
        const char *source = write_source(control, line, &bytes);
        ssize_t sent = source ? send(line->connection, source, bytes, MSG_NOSIGNAL) : 0;
        if (sent < 0 && (errno == EAGAIN || errno == EINTR)) return;
        if (sent < 0 && (errno == EPIPE || errno == ECONNRESET)) return; /* the reader will find out why */
        if (sent <= 0) {
            end_line(control, peer);
            return;
        }
        line->out_done += (size_t)sent;
        if (line->out.frame.kind == USP_FRAME_DATA) gather_moved(control);
        if (line->out_done == line->out_size) end_frame(control, line);
    }
}

/* ---- the service thread ------------------------------------------------------------------------------------------ */

/* Both ends live, and no data can pass between them. */
static void declare_apart(usp_control *control, int64_t now) {
    for (int i = 0; i < control->size; i++) {
        const usp_line *line = &control->lines[i];
        if (line->apart > 0 && line->connection >= 0 && !line->left && now - line->apart > USP_APART_MS)
            declare(control, USP_COMM, "the data connection between rank %d and rank %d was cut", control->rank, i);
    }
}

/* A gap in this rank's own beats means that it was stopped itself: its view of the others is old. */
static void beat(usp_control *control) {
    int64_t now = usp_now_ms();
    int fresh = now - control->last_beat > 4 * (int64_t)control->period;
    control->last_beat = now;
    for (int i = 0; i < control->size; i++) {
        control->lines[i].beat_due = 1;
        control->lines[i].plan_due = 0;
        if (fresh) control->lines[i].heard = now;
    }
    if (fresh) control->gather.deadline = usp_tcp_deadline(control->timeout_ms);
    int silent = control->silence < 0 ? USP_NOBODY : find_silent(control, control->silence);
    if (silent != USP_NOBODY) declare_stopped(control, silent);
    declare_apart(control, now);
}

static void poll_lines(usp_control *control) {
    for (int i = 0; i < control->size; i++) {
        const usp_line *line = &control->lines[i];
        short events = line->deaf ? 0 : POLLIN;
        if (line->out_size > 0) events |= POLLOUT;
        control->polls[i] = (struct pollfd){.fd = line->connection, .events = events};
    }
    control->polls[control->size] = (struct pollfd){.fd = control->wake, .events = POLLIN};
    int left = usp_tcp_left(control->last_beat + control->period);
    pthread_mutex_unlock(&control->mutex);
    int ready = poll(control->polls, (nfds_t)control->size + 1, left);
    pthread_mutex_lock(&control->mutex);
    if (ready <= 0) return;
    uint64_t rung;
    if (control->polls[control->size].revents && read(control->wake, &rung, sizeof rung) < 0) return;
    for (int i = 0; i < control->size; i++)
        if (control->polls[i].revents) read_line(control, i);
}

/* Says what is left to say where that can be said at once, then closes the lines. */
static void say_goodbye(usp_control *control) {
    for (int i = 0; i < control->size; i++) {
        usp_line *line = &control->lines[i];
        if (line->connection < 0) continue;
        line->goodbye_due = 1;
        line->beat_due = 0;
        line->left = 1; /* an end is no news any more */
        write_line(control, i);
        if (line->connection < 0) continue;
        shutdown(line->connection, SHUT_WR);
        read_line(control, i); /* unread bytes would make the close a reset */
    }
}

static void *serve(void *argument) {
    usp_control *control = argument;
    pthread_mutex_lock(&control->mutex);
    while (!control->stop) {
        if (usp_tcp_left(control->last_beat + control->period) == 0) beat(control);
        for (int i = 0; i < control->size; i++) write_line(control, i);
        poll_lines(control);
    }
    say_goodbye(control);
    pthread_mutex_unlock(&control->mutex);
    return NULL;
}

/* ---- what callers do --------------------------------------------------------------------------------------------- */

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
    while ((missing = gather_missing(control)) != USP_NOBODY) {
        USP_TRY(failure_of(control));
        int over = usp_tcp_left(control->gather.deadline) == 0;
        int stalled = usp_now_ms() - control->last_beat > 2 * (int64_t)control->period;
        if (over && !stalled) return blame(control, missing);
        wait_until(control, over ? usp_tcp_deadline(control->period) : control->gather.deadline);
    }
    return USP_OK;
}

usp_status usp_control_allgather(usp_control *control, const void *mine, void *all, size_t bytes_per_rank) {
    pthread_mutex_lock(&control->mutex);
    usp_status status = failure_of(control);
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
    ring(control->wake);
    pthread_mutex_unlock(&control->mutex);
}

usp_status usp_control_poll(usp_control *control) {
    if (atomic_load(&control->failure) == USP_OK) return USP_OK;
    pthread_mutex_lock(&control->mutex);
    usp_status status = failure_of(control);
    pthread_mutex_unlock(&control->mutex);
    return status;
}

usp_status usp_control_overdue(usp_control *control, int peer) {
    pthread_mutex_lock(&control->mutex);
    usp_status status = blame(control, peer);
    pthread_mutex_unlock(&control->mutex);
    return status;
}

usp_status usp_control_gone(usp_control *control, int peer) {
    pthread_mutex_lock(&control->mutex);
    control->lines[peer].wanted = 1;
    if (control->lines[peer].apart == 0) control->lines[peer].apart = usp_now_ms();
    if (control->lines[peer].left || control->lines[peer].connection < 0) lose(control, peer);
    usp_status status = failure_of(control);
    pthread_mutex_unlock(&control->mutex);
    return status;
}

usp_status usp_control_fail(usp_control *control, usp_status status, const char *format, ...) {
    char sentence[USP_SENTENCE];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(sentence, sizeof sentence, format, arguments);
    va_end(arguments);
    pthread_mutex_lock(&control->mutex);
    record(control, status, sentence);
    status = failure_of(control);
    pthread_mutex_unlock(&control->mutex);
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
    int reason = usp_thread_start(&control->thread, serve, control);
    control->running = reason == 0;
    return reason == 0 ? USP_OK : usp_fail(USP_COMM, "no thread for the control channel: %s", strerror(reason));
}

usp_status usp_control_create(const usp_comm_config *config, int rank, int size, usp_address *mine,
                              usp_control **result) {
    usp_control *control = NULL;
    USP_TRY(control_alloc(config, rank, size, &control));
    usp_status status = usp_lines_listen(&control->ears, mine);
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
        line->heard = usp_now_ms();
        line->fail_due = atomic_load(&control->failure) != USP_OK;
    }
    ring(control->wake);
    pthread_mutex_unlock(&control->mutex);
}

/* What failed here may be the echo of a failure elsewhere, whose reason is on its way. */
static usp_status fail_connecting(usp_control *control, usp_status status) {
    char sentence[USP_SENTENCE];
    snprintf(sentence, sizeof sentence, "%s", usp_last_error());
    int64_t end = usp_tcp_deadline(USP_ECHO_MS);
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

usp_status usp_control_connect(usp_control *control, const usp_meeting *meeting, int *data) {
    int lines = data ? 2 : 1;
    for (int i = 0; i < control->size; i++) control->addresses[i] = meeting->all[i].address;
    control->ways = (usp_lines){control->rank, control->size, lines, control->addresses, -1, control->connections};
    usp_lines_begin(&control->ways, &control->ears);
    usp_status status = connect_all(control);
    for (int i = 0; data && i < control->size; i++) data[i] = control->connections[2 * i + 1];
    return status;
}

static void stop_thread(usp_control *control) {
    pthread_mutex_lock(&control->mutex);
    control->stop = 1;
    ring(control->wake);
    pthread_mutex_unlock(&control->mutex);
    pthread_join(control->thread, NULL);
}

void usp_control_destroy(usp_control *control) {
    if (!control) return;
    if (control->running) stop_thread(control);
    for (int i = 0; i < control->size; i++) close_line(control, i);
    usp_lines_deafen(&control->ears);
    if (control->wake >= 0) close(control->wake);
    if (control->failed_descriptor >= 0) close(control->failed_descriptor);
    pthread_cond_destroy(&control->changed);
    pthread_mutex_destroy(&control->mutex);
    usp_host_free(control->host, control);
}
