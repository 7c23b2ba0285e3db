/* channel_service.c - the thread of the control channel: it alone reads and writes, under the one mutex and without
 * waiting there, but to see whether a rank whose line has ended still listens. Frames to a peer follow each other on
 * its line. */
#define _GNU_SOURCE
#include "channel_state.h"
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
static int still_lives(const usp_channel *channel, int peer) {
    if (!usp_lines_listens(&channel->ways, peer)) return 0;
    poll(NULL, 0, USP_DYING_MS);
    return usp_lines_listens(&channel->ways, peer);
}

void usp_channel_close_line(usp_channel *channel, int peer) {
    usp_line *line = &channel->lines[peer];
    if (line->connection >= 0) close(line->connection);
    line->connection = -1;
}

static void end_line(usp_channel *channel, int peer) {
    const usp_line *line = &channel->lines[peer];
    usp_channel_close_line(channel, peer);
    if (atomic_load(&channel->failure) != USP_OK || (line->left && !line->wanted)) return;
    if (line->left || !still_lives(channel, peer))
        usp_channel_lose(channel, peer);
    else
        usp_channel_declare(channel, USP_COMM, "the control line between rank %d and rank %d was cut",
                            channel->base.rank, peer);
}

/* The line stays, for this rank to say why. */
static void hear_no_more(usp_channel *channel, int peer) {
    channel->lines[peer].deaf = 1;
    usp_channel_declare(channel, USP_COMM, "rank %d hears nonsense on its control line to rank %d", channel->base.rank,
                        peer);
}

/* ---- reading; the service thread --------------------------------------------------------------------------------- */

static void take_beat(usp_line *line) {
    line->waits_for = line->in.rank;
    line->exchanges = line->in.number;
}

static void compare_plans(usp_channel *channel, int peer) {
    const usp_frame *frame = &channel->lines[peer].in;
    if (usp_plans_differ(&channel->plans, channel->base.rank, peer, frame->rank, frame->bytes, frame->number))
        usp_channel_declare(channel, USP_MISMATCH,
                            "rank %d and rank %d re-planned to different documents or gave calls unlike memory", peer,
                            channel->base.rank);
}

static void take_frame(usp_channel *channel, int peer) {
    usp_line *line = &channel->lines[peer];
    const usp_frame *frame = &line->in;
    if (frame->kind == USP_FRAME_BEAT) take_beat(line);
    if (frame->kind == USP_FRAME_PLAN) compare_plans(channel, peer);
    if (frame->kind == USP_FRAME_FAIL) {
        usp_text_clean(line->in_text, sizeof line->in_text);
        usp_channel_record(channel, (usp_status)frame->rank, line->in_text);
    }
    if (frame->kind == USP_FRAME_ENTER) {
        line->entered = frame->number;
        line->entered_bytes = frame->bytes;
        usp_channel_gather_compare(channel, peer);
        usp_channel_gather_moved(channel);
    }
    if (frame->kind == USP_FRAME_DATA) {
        line->data_missing = 0;
        usp_channel_gather_moved(channel);
    }
    if (frame->kind == USP_FRAME_GOODBYE) {
        line->left = 1;
        line->exchanges = frame->number;
        line->waits_for = USP_NOBODY;
        if (line->wanted || line->data_missing || line->data_due) usp_channel_lose(channel, peer);
    }
    line->in_header = line->in_payload = 0;
}

/* 0 for a frame that no rank sends. */
static int frame_sane(const usp_channel *channel, const usp_frame *frame) {
    const usp_gather *gather = &channel->gather;
    if (frame->kind < USP_FRAME_BEAT || frame->kind > USP_FRAME_PLAN) return 0;
    if (frame->kind == USP_FRAME_BEAT) return frame->rank >= USP_NOBODY && frame->rank < channel->base.size;
    if (frame->kind == USP_FRAME_FAIL)
        return frame->bytes < USP_SENTENCE && frame->rank > USP_OK && frame->rank < USP_STATUS_COUNT;
    if (frame->kind != USP_FRAME_DATA) return 1;
    if (!gather->open) return atomic_load(&channel->failure) != USP_OK;
    return frame->number == gather->round && frame->bytes == gather->bytes;
}

/* Where the next bytes of a line go, and how many; 0 bytes: the frame is complete. A gather that has been given up has
 * no memory any more: its data go nowhere, through `drain`. */
static char *read_target(usp_channel *channel, int peer, char *drain, size_t drain_size, size_t *bytes) {
    usp_line *line = &channel->lines[peer];
    if (line->in_header < sizeof line->in) {
        *bytes = sizeof line->in - line->in_header;
        return (char *)&line->in + line->in_header;
    }
    int has_payload = line->in.kind == USP_FRAME_DATA || line->in.kind == USP_FRAME_FAIL;
    *bytes = has_payload ? line->in.bytes - line->in_payload : 0;
    if (line->in.kind == USP_FRAME_FAIL) return line->in_text + line->in_payload;
    if (channel->gather.open) return channel->gather.all + (size_t)peer * channel->gather.bytes + line->in_payload;
    if (*bytes > drain_size) *bytes = drain_size;
    return drain;
}

/* Takes what `got` bytes complete; 0 if the peer talks nonsense. */
static int advance(usp_channel *channel, int peer, size_t got) {
    usp_line *line = &channel->lines[peer];
    char drain[1];
    size_t left;
    if (line->in_header < sizeof line->in) {
        line->in_header += got;
        if (line->in_header < sizeof line->in) return 1;
        memset(line->in_text, 0, sizeof line->in_text);
        if (!frame_sane(channel, &line->in)) return 0;
    } else {
        line->in_payload += got;
        usp_channel_gather_moved(channel);
    }
    read_target(channel, peer, drain, sizeof drain, &left);
    if (left == 0) take_frame(channel, peer);
    return 1;
}

static void read_line(usp_channel *channel, int peer) {
    usp_line *line = &channel->lines[peer];
    char drain[4096];
    for (int reads = 0; reads < USP_READS && line->connection >= 0 && !line->deaf; reads++) {
        size_t bytes;
        char *target = read_target(channel, peer, drain, sizeof drain, &bytes);
        ssize_t got = recv(line->connection, target, bytes, 0);
        if (got < 0 && (errno == EAGAIN || errno == EINTR)) return;
        if (got <= 0)
            end_line(channel, peer);
        else if (!advance(channel, peer, (size_t)got))
            hear_no_more(channel, peer);
        line->heard = usp_now_ms();
    }
}

/* ---- writing; the service thread --------------------------------------------------------------------------------- */

static void begin_frame(usp_line *line, usp_frame_kind kind, int rank, uint64_t number, uint64_t bytes) {
    line->out.frame = (usp_frame){kind, rank, number, bytes};
    line->out_size = sizeof line->out.frame;
    line->out_done = 0;
}

static void begin_fail(usp_channel *channel, usp_line *line) {
    size_t length = strlen(channel->sentence);
    begin_frame(line, USP_FRAME_FAIL, atomic_load(&channel->failure), 0, length);
    memcpy(line->out.text, channel->sentence, length);
    line->out_size += length;
    line->fail_due = 0;
}

/* Chooses the next frame for a peer, the most urgent first; 0: none. */
static int begin_next(usp_channel *channel, int peer) {
    usp_line *line = &channel->lines[peer];
    const usp_gather *gather = &channel->gather;
    uint64_t exchanges = atomic_load(&channel->exchanges);
    if (line->fail_due) {
        begin_fail(channel, line);
    } else if (line->enter_due) {
        begin_frame(line, USP_FRAME_ENTER, 0, gather->round, gather->bytes);
        line->enter_due = 0;
    } else if (line->data_due && line->entered == gather->round) {
        begin_frame(line, USP_FRAME_DATA, 0, gather->round, gather->bytes);
        line->out_size += gather->bytes;
    } else if (line->beat_due) {
        begin_frame(line, USP_FRAME_BEAT, usp_channel_waits_for(channel, channel->base.rank), exchanges, 0);
        line->beat_due = 0;
    } else if (line->plan_due < USP_PLAN_SIZES && channel->plans.of[line->plan_due].ranks > 0) {
        const usp_replans *plan = &channel->plans.of[line->plan_due++];
        begin_frame(line, USP_FRAME_PLAN, plan->ranks, plan->hash[plan->count % USP_PLAN_HISTORY], plan->count);
    } else if (line->goodbye_due) {
        begin_frame(line, USP_FRAME_GOODBYE, 0, exchanges, 0);
        line->goodbye_due = 0;
    } else {
        return 0;
    }
    return 1;
}

static void end_frame(usp_channel *channel, usp_line *line) {
    line->out_size = line->out_done = 0;
    if (line->out.frame.kind != USP_FRAME_DATA) return;
    line->data_due = 0;
    usp_channel_gather_moved(channel);
}

/* The part of the frame that is next; NULL if it was to come from a gather that has been given up. */
static const char *write_source(const usp_channel *channel, const usp_line *line, size_t *bytes) {
    size_t head = sizeof line->out.frame;
    int data = line->out.frame.kind == USP_FRAME_DATA;
    if (!data || line->out_done < head) {
        *bytes = (data ? head : line->out_size) - line->out_done;
        return (const char *)&line->out + line->out_done;
    }
    *bytes = line->out_size - line->out_done;
    return channel->gather.open ? channel->gather.mine + (line->out_done - head) : NULL;
}

/* Writes what the connection takes. A frame that cannot be finished ends the line: nothing can follow it. */
static void write_line(usp_channel *channel, int peer) {
    usp_line *line = &channel->lines[peer];
    while (line->connection >= 0 && (line->out_size > 0 || begin_next(channel, peer))) {
        size_t bytes;
        const char *source = write_source(channel, line, &bytes);
        ssize_t sent = source ? send(line->connection, source, bytes, MSG_NOSIGNAL) : 0;
        if (sent < 0 && (errno == EAGAIN || errno == EINTR)) return;
        if (sent < 0 && (errno == EPIPE || errno == ECONNRESET)) return; /* the reader will find out why */
        if (sent <= 0) {
            end_line(channel, peer);
            return;
        }
        line->out_done += (size_t)sent;
        if (line->out.frame.kind == USP_FRAME_DATA) usp_channel_gather_moved(channel);
        if (line->out_done == line->out_size) end_frame(channel, line);
    }
}

/* ---- the service thread ------------------------------------------------------------------------------------------ */

/* Both ends live, and no data can pass between them. */
static void declare_apart(usp_channel *channel, int64_t now) {
    for (int i = 0; i < channel->base.size; i++) {
        const usp_line *line = &channel->lines[i];
        if (line->apart > 0 && line->connection >= 0 && !line->left && now - line->apart > USP_APART_MS)
            usp_channel_declare(channel, USP_COMM, "the data connection between rank %d and rank %d was cut",
                                channel->base.rank, i);
    }
}

/* A gap in this rank's own beats means that it was stopped itself: its view of the others is old. */
static void beat(usp_channel *channel) {
    int64_t now = usp_now_ms();
    int fresh = now - channel->last_beat > 4 * (int64_t)channel->period;
    channel->last_beat = now;
    for (int i = 0; i < channel->base.size; i++) {
        channel->lines[i].beat_due = 1;
        channel->lines[i].plan_due = 0;
        if (fresh) channel->lines[i].heard = now;
    }
    if (fresh) channel->gather.deadline = usp_tcp_deadline(channel->base.timeout_ms);
    usp_channel_declare_silent(channel);
    declare_apart(channel, now);
}

static void poll_lines(usp_channel *channel) {
    for (int i = 0; i < channel->base.size; i++) {
        const usp_line *line = &channel->lines[i];
        short events = line->deaf ? 0 : POLLIN;
        if (line->out_size > 0) events |= POLLOUT;
        channel->polls[i] = (struct pollfd){.fd = line->connection, .events = events};
    }
    channel->polls[channel->base.size] = (struct pollfd){.fd = channel->wake, .events = POLLIN};
    int left = usp_tcp_left(channel->last_beat + channel->period);
    pthread_mutex_unlock(&channel->mutex);
    int ready = poll(channel->polls, (nfds_t)channel->base.size + 1, left);
    pthread_mutex_lock(&channel->mutex);
    if (ready <= 0) return;
    uint64_t rung;
    if (channel->polls[channel->base.size].revents && read(channel->wake, &rung, sizeof rung) < 0) return;
    for (int i = 0; i < channel->base.size; i++) {
        short events = channel->polls[i].revents;
        if (channel->lines[i].deaf && (events & (POLLERR | POLLHUP)))
            usp_channel_close_line(channel, i); /* nobody reads it to its end, and poll() would not sleep */
        else if (events)
            read_line(channel, i);
    }
}

/* Says what is left to say where that can be said at once, then closes the lines. */
static void say_goodbye(usp_channel *channel) {
    for (int i = 0; i < channel->base.size; i++) {
        usp_line *line = &channel->lines[i];
        if (line->connection < 0) continue;
        line->goodbye_due = 1;
        line->beat_due = 0;
        line->left = 1; /* an end is no news any more */
        write_line(channel, i);
        if (line->connection < 0) continue;
        shutdown(line->connection, SHUT_WR);
        read_line(channel, i); /* unread bytes would make the close a reset */
    }
}

void *usp_channel_serve(void *argument) {
    usp_channel *channel = argument;
    pthread_mutex_lock(&channel->mutex);
    while (!channel->stop) {
        if (usp_tcp_left(channel->last_beat + channel->period) == 0) beat(channel);
        for (int i = 0; i < channel->base.size; i++) write_line(channel, i);
        poll_lines(channel);
    }
    say_goodbye(channel);
    pthread_mutex_unlock(&channel->mutex);
    return NULL;
}
