/* control_service.c - the thread of the control channel: it alone reads and writes, under the one mutex and without
 * waiting there, but to see whether a rank whose line has ended still listens. Frames to a peer follow each other on
 * its line. */
#define _GNU_SOURCE
#include "control_state.h"
#include "error.h"
#include "text.h"
#include "thread.h"
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

enum { USP_READS = 64 };
enum {
    USP_APART_MS = 500, /* a data connection has ended and the control line has not */
    USP_DYING_MS = 10   /* a process that ends closes one descriptor after the other */
};

/* ---- the end of a line ------------------------------------------------------------------------------------------- */

/* A process that has died listens no more. */
static int still_lives(const usp_control *control, int peer) {
    if (!usp_lines_listens(&control->ways, peer)) return 0;
    poll(NULL, 0, USP_DYING_MS);
    return usp_lines_listens(&control->ways, peer);
}

void usp_control_close_line(usp_control *control, int peer) {
    usp_line *line = &control->lines[peer];
    if (line->connection >= 0) close(line->connection);
    line->connection = -1;
}

static void end_line(usp_control *control, int peer) {
    const usp_line *line = &control->lines[peer];
    usp_control_close_line(control, peer);
    if (atomic_load(&control->failure) != USP_OK || (line->left && !line->wanted)) return;
    if (line->left || !still_lives(control, peer))
        usp_control_lose(control, peer);
    else
        usp_control_declare(control, USP_COMM, "the control line between rank %d and rank %d was cut", control->rank,
                            peer);
}

/* The line stays, for this rank to say why. */
static void hear_no_more(usp_control *control, int peer) {
    control->lines[peer].deaf = 1;
    usp_control_declare(control, USP_COMM, "rank %d hears nonsense on its control line to rank %d", control->rank,
                        peer);
}

/* ---- reading; the service thread --------------------------------------------------------------------------------- */

static void take_beat(usp_line *line) {
    line->waits_for = line->in.rank;
    line->exchanges = line->in.number;
}

static void compare_plans(usp_control *control, int peer) {
    const usp_frame *frame = &control->lines[peer].in;
    if (usp_plans_differ(&control->plans, control->rank, peer, frame->rank, frame->bytes, frame->number))
        usp_control_declare(control, USP_MISMATCH, "rank %d and rank %d re-planned to different documents", peer,
                            control->rank);
}

static void take_frame(usp_control *control, int peer) {
    usp_line *line = &control->lines[peer];
    const usp_frame *frame = &line->in;
    if (frame->kind == USP_FRAME_BEAT) take_beat(line);
    if (frame->kind == USP_FRAME_PLAN) compare_plans(control, peer);
    if (frame->kind == USP_FRAME_FAIL) {
        usp_text_clean(line->in_text, sizeof line->in_text);
        usp_control_record(control, (usp_status)frame->rank, line->in_text);
    }
    if (frame->kind == USP_FRAME_ENTER) {
        line->entered = frame->number;
        line->entered_bytes = frame->bytes;
        usp_control_gather_compare(control, peer);
        usp_control_gather_moved(control);
    }
    if (frame->kind == USP_FRAME_DATA) {
        line->data_missing = 0;
        usp_control_gather_moved(control);
    }
    if (frame->kind == USP_FRAME_GOODBYE) {
        line->left = 1;
        line->exchanges = frame->number;
        line->waits_for = USP_NOBODY;
        if (line->wanted || line->data_missing || line->data_due) usp_control_lose(control, peer);
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
        usp_control_gather_moved(control);
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
        begin_frame(line, USP_FRAME_BEAT, usp_control_waits_for(control, control->rank), exchanges, 0);
        line->beat_due = 0;
    } else if (line->plan_due < USP_PLAN_SIZES && control->plans.of[line->plan_due].ranks > 0) {
        const usp_replans *plan = &control->plans.of[line->plan_due++];
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
    usp_control_gather_moved(control);
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
        if (line->out.frame.kind == USP_FRAME_DATA) usp_control_gather_moved(control);
        if (line->out_done == line->out_size) end_frame(control, line);
    }
}

/* ---- the service thread ------------------------------------------------------------------------------------------ */

/* Both ends live, and no data can pass between them. */
static void declare_apart(usp_control *control, int64_t now) {
    for (int i = 0; i < control->size; i++) {
        const usp_line *line = &control->lines[i];
        if (line->apart > 0 && line->connection >= 0 && !line->left && now - line->apart > USP_APART_MS)
            usp_control_declare(control, USP_COMM, "the data connection between rank %d and rank %d was cut",
                                control->rank, i);
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
    usp_control_declare_silent(control);
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
    for (int i = 0; i < control->size; i++) {
        short events = control->polls[i].revents;
        if (control->lines[i].deaf && (events & (POLLERR | POLLHUP)))
            usp_control_close_line(control, i); /* nobody reads it to its end, and poll() would not sleep */
        else if (events)
            read_line(control, i);
    }
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

void *usp_control_serve(void *argument) {
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
