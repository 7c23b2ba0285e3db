/* nccl_state.h - what the files of the NCCL transport share. */
#ifndef USP_NCCL_STATE_H
#define USP_NCCL_STATE_H
#include <nccl.h>
#include <pthread.h>
#include <stdatomic.h>

#include "channel.h"
#include "probes.h"

/* A communicator on its way out. NCCL may never return from freeing it, so a thread of its own does; where that thread
 * is late it is left behind, with all memory that NCCL might still touch. */
typedef struct usp_release {
    ncclComm_t comm;
    pthread_t thread;
    atomic_int stage;  /* RELEASE_STUCK: NCCL keeps the communicator, and no thread waits for it */
    atomic_int forced; /* abort it: work in flight is lost, peers may be dead */
    atomic_int revoked;
} usp_release;

enum { RELEASE_NONE, RELEASE_RUNNING, RELEASE_DONE, RELEASE_STUCK };

/* NCCL registers what a captured exchange touches on its own, and forgets it some time after the graph is gone, on
 * every rank at another moment. Memory that came to the same addresses meanwhile would be registered on one side of a
 * message and not on the other, and both GPUs would wait for ever. So once an exchange has been captured, pieces that
 * are given back stay registered, and serve those who ask next. */
typedef struct usp_shared {
    struct usp_shared *next;
    void *memory;
    size_t bytes;
    ncclWindow_t window; /* NULL: plain memory */
    int spare;           /* given back */
    int fresh;           /* not every rank is known to have it yet */
} usp_shared;

typedef struct usp_nccl {
    usp_transport base;
    int gpu;
    int connected; /* to the other ranks: one that is behind can be named */

    /* one NCCL call at a time, and this paragraph; never held while waiting for another rank */
    pthread_mutex_t lock;
    ncclComm_t comm; /* NULL before it is there, and once `release` has it */
    usp_release *release;
    usp_probes probes;

    usp_shared *shared;
    int captured;     /* an exchange of this rank is in a graph */
    ncclComm_t child; /* where NCCL writes the communicator of a split */
    void *scratch;    /* device memory and stream of `gather` */
    usp_stream stream;
    int flags[]; /* [size], for a gather */
} usp_nccl;

static inline usp_nccl *usp_nccl_of(usp_transport *transport) {
    return (usp_nccl *)transport;
}

static inline int usp_nccl_went_wrong(ncclResult_t result) {
    return result != ncclSuccess && result != ncclInProgress;
}

/* ---- nccl.c: failures, calls in progress, exchanges -------------------------------------------------------------- */

extern const usp_transport_ops usp_nccl_ops;

/* Records in this thread that a call of NCCL has failed. */
usp_status usp_nccl_status(ncclResult_t result);
usp_status usp_nccl_fail(int rank, const char *what, ncclResult_t result);
/* The failure that has hit this rank or another, said in this thread. Once there is one, NCCL is to let go of the GPU,
 * where kernels may be waiting for ranks that are gone. Does not wait. */
usp_status usp_nccl_check(usp_nccl *self);
/* This rank has failed by `status`, whose sentence is recorded: all ranks hear of it. The first failure is returned. */
usp_status usp_nccl_give_up(usp_nccl *self, usp_status status);
/* Something has not ended in time. Before ranks are connected nobody can be named. */
usp_status usp_nccl_give_late(usp_nccl *self, const char *what);
int usp_nccl_is_late(const usp_nccl *self, int64_t since);
int usp_nccl_lock_within(usp_nccl *self, int milliseconds); /* 0: another thread has it */
/* One look at a call that is in progress. */
ncclResult_t usp_nccl_progress(usp_nccl *self);
/* Waits until the call that gave `result` has been carried out, at most the time limit, watching the other ranks. Some
 * calls answer ncclSuccess for work that only began, so the communicator is asked in any case. */
usp_status usp_nccl_settle(usp_nccl *self, ncclResult_t result, const char *what);
void usp_nccl_free_scratch(usp_nccl *self);

/* ---- nccl_release.c: letting a communicator go ------------------------------------------------------------------- */

/* Takes the communicator from all threads that use the transport and lets it go. Does not wait. */
void usp_nccl_start_release(usp_nccl *self, int forced);
void usp_nccl_run_release(usp_release *release, ncclComm_t comm, int forced);
/* Waits a bounded time; 0: NCCL still has the communicator. */
int usp_nccl_await_release(usp_release *release, int milliseconds);
/* In peace, then by force. 0: the thread, its communicator and `release` are left behind. */
int usp_nccl_finish_release(const usp_host *host, usp_release *release);

/* ---- nccl_shared.c: what the caller gets from NCCL -------------------------------------------------------------- */

usp_status usp_nccl_alloc_shared(usp_transport *transport, size_t bytes, void **memory);
usp_status usp_nccl_register_shared(usp_transport *transport, void *memory);
usp_status usp_nccl_free_shared(usp_transport *transport, void *memory);
void usp_nccl_deregister(usp_nccl *self, usp_shared *piece);
void usp_nccl_free_piece(usp_nccl *self, usp_shared *piece);

#endif
