/* control.h - the control table: what the ranks of a world say to each other beside tensors. An all-gather, the first
 * failure, who is late, and what sequences have been re-planned to; for ranks that are threads (threads.c) and for
 * processes (channel.c). One thread uses a control at a time; poll, fail, overdue and abort any thread may call. */
#ifndef USP_CONTROL_H
#define USP_CONTROL_H
#include <stddef.h>
#include <stdint.h>

#include "usp.h"

typedef struct usp_control usp_control;

typedef struct usp_control_ops {
    /* Host memory, collective over all ranks, in rank order; at most timeout_ms. */
    usp_status (*allgather)(usp_control *, const void *mine, void *all, size_t bytes_per_rank);
    /* This rank has re-planned a sequence over `ranks` ranks, or gives calls over them memory, as `hash` says. Ranks of
     * one data copy that differ fail by MISMATCH: threads at their next exchange, others with the beats. */
    void (*note_plan)(usp_control *, int ranks, uint64_t hash);
    /* The failure that has hit the ranks, with its sentence, or OK. Sticky. Never waits. */
    usp_status (*poll)(usp_control *);
    /* This rank has failed by `status`, for the reason in usp_last_error(): all ranks hear of it, at once where they
     * wait. Returns the failure that came first. Does not wait. */
    usp_status (*fail)(usp_control *, usp_status status);
    /* Work of this rank has not ended in time: finds the rank to blame, which fails all: TIMEOUT or PEER_LOST. */
    usp_status (*overdue)(usp_control *);
    void (*abort)(usp_control *); /* fails all ranks by COMM; idempotent */
    void (*destroy)(usp_control *);
} usp_control_ops;

/* Ways to make one embed this first. */
struct usp_control {
    const usp_control_ops *ops;
    int rank, size;
    int timeout_ms; /* -1: no limit */
};

#endif
