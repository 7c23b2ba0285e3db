/* channel_state.h - what the files of the control channel share. Everything but the atomics is under the one mutex, and
 * the functions here are called with it held. */
#ifndef USP_CHANNEL_STATE_H
#define USP_CHANNEL_STATE_H
#include "channel.h"
#include "plans.h"
#include <poll.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>

enum { USP_SENTENCE = 256, USP_NOBODY = -1 };
enum { USP_BEAT_MIN = 20, USP_BEAT_MAX = 1000, USP_SILENT_BEATS = 8, USP_SUSPECT_BEATS = 3 };
typedef enum usp_frame_kind {
    USP_FRAME_BEAT = 1,    /* rank: whom the sender waits for; number: exchanges entered */
    USP_FRAME_ENTER = 2,   /* number: round of the gather; bytes: per rank */
    USP_FRAME_DATA = 3,    /* number, bytes as above; then the data */
    USP_FRAME_FAIL = 4,    /* rank: the status; bytes of sentence follow */
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
    int plan_due;     /* the first of the plans still to be told; USP_PLAN_SIZES: none */
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

typedef struct usp_channel {
    usp_control base;
    const usp_host *host;
    int period, silence;         /* ms; silence: a rank that says nothing for so long has stopped, -1: never */
    int wake, failed_descriptor; /* eventfds: something to do for the thread; the ranks have failed */
    int stop, running;
    pthread_t thread;
    pthread_mutex_t mutex;
    pthread_cond_t changed; /* the gather is done, or failure */
    atomic_int failure;     /* usp_status; written under the mutex */
    char sentence[USP_SENTENCE];
    atomic_uint_fast64_t exchanges;
    atomic_int waits_for;
    int64_t last_beat;
    usp_replans_list plans;
    usp_gather gather;
    usp_line *lines;      /* [size] */
    struct pollfd *polls; /* [size + 1] */
    usp_ears ears;
    usp_reception *reception;
    usp_lines ways;         /* how to call the others */
    usp_address *addresses; /* [size] */
    int *connections;       /* [size][USP_MOST_LINES], for creation */
} usp_channel;

static inline usp_channel *usp_channel_of(usp_control *control) {
    return (usp_channel *)control;
}

/* ---- channel_verdict.c: failure, the gather, and who is to blame ------------------------------------------------- */

void usp_channel_ring(int descriptor);
/* The failure that has been recorded, said in this thread. */
usp_status usp_channel_failure(usp_channel *channel);
/* Keeps the failure if it is the first, and has it sent to all. */
void usp_channel_record(usp_channel *channel, usp_status status, const char *sentence);
usp_status usp_channel_declare(usp_channel *channel, usp_status status, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
usp_status usp_channel_declare_list(usp_channel *channel, usp_status status, const char *format, va_list arguments)
    __attribute__((format(printf, 3, 0)));
void usp_channel_lose(usp_channel *channel, int peer);        /* it died, or left */
void usp_channel_declare_silent(usp_channel *channel);        /* a rank that has stopped, if there is one */
usp_status usp_channel_blame(usp_channel *channel, int peer); /* a wait on `peer` (-1: unknown) is over time */
int usp_channel_waits_for(const usp_channel *channel, int rank);

/* A rank that the gather waits for, or USP_NOBODY. */
int usp_channel_gather_missing(const usp_channel *channel);
/* Something has moved: the time limit begins anew. */
void usp_channel_gather_moved(usp_channel *channel);
/* Once both are in the same round their sizes must agree. */
void usp_channel_gather_compare(usp_channel *channel, int peer);

/* ---- channel_service.c: the thread that reads and writes --------------------------------------------------------- */

void *usp_channel_serve(void *channel);
void usp_channel_close_line(usp_channel *channel, int peer);

#endif
