/* rendezvous.h - where ranks that are threads of one process meet: what their control and their transport share. All of
 * it is under the one mutex, and the functions here are called with it held, but for release. */
#ifndef USP_RENDEZVOUS_H
#define USP_RENDEZVOUS_H
#include <pthread.h>
#include <sys/types.h>
#include <time.h>

#include "pieces.h"
#include "plans.h"
#include "transport.h"

enum { USP_NO_RANK = -1 };

typedef enum usp_activity { USP_ABSENT, USP_COMPUTING, USP_EXCHANGING, USP_GATHERING, USP_LEFT } usp_activity;

/* One ordered pair of ranks. */
typedef struct usp_box {
    int next;            /* index of the sender's next message to this receiver */
    int want;            /* index of the receiver's next message from this sender */
    int copying;         /* the receiver reads the sender's memory just now */
    int unsettled;       /* the sender's stream does not yet wait for `consumed` */
    usp_event *consumed; /* the receiver's stream has read the message; the receiver's */
} usp_box;

/* One rank. What it waits for follows from its activity and its boxes. */
typedef struct usp_seat {
    pthread_cond_t wake;
    usp_activity activity;
    uint64_t exchanges; /* entered so far, gathers included */
    usp_event *posted;  /* what the rank sends is ready */
    const usp_message *sends;
    int send_count;
    const void *mine; /* gathering */
    void *all;
    size_t bytes;
    usp_replans_list plans;
} usp_seat;

struct usp_rendezvous {
    pthread_mutex_t mutex;
    usp_host host;
    pid_t process; /* that made it */
    int size;
    int uses;           /* by its maker, and by ranks that are alive */
    usp_status failure; /* sticky, the same for all ranks */
    char sentence[256];
    usp_seat *seats; /* [size] */
    usp_box *boxes;  /* [sender][receiver] */
};

/* One rank's control and transport, made and freed together. */
typedef struct usp_threads {
    usp_control control; /* first */
    usp_transport transport;
    usp_rendezvous *meeting;
    usp_pieces pieces;
} usp_threads;

static inline usp_box *usp_threads_box(usp_rendezvous *meeting, int sender, int receiver) {
    return &meeting->boxes[(size_t)sender * (size_t)meeting->size + (size_t)receiver];
}

extern const usp_control_ops usp_threads_control;

void usp_threads_wake(usp_rendezvous *meeting); /* all */
/* The failure of the world as this thread's error. */
usp_status usp_threads_failure(const usp_rendezvous *meeting);
/* Fails the world for all ranks, unless it has failed already; the first failure is the one that all report. */
usp_status usp_threads_fail(usp_rendezvous *meeting, usp_status status, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
/* A rank that `rank` waits for, or USP_NO_RANK. */
int usp_threads_waits_for(usp_rendezvous *meeting, int rank);
struct timespec usp_threads_deadline(int milliseconds);
/* Sleeps until something may have changed. */
usp_status usp_threads_wait(usp_threads *self, const struct timespec *deadline);
/* One user less; the last one ends it. Without the mutex. */
void usp_threads_release(usp_rendezvous *meeting);

#endif
