/* trace.h - transports around the world's that count the bytes of every exchange, by peer, and compare them with what
 * the transport was told to prepare for; and, on request, the order in which a rank's work is enqueued. Changes nothing
 * that is sent; the only helper of the tests that needs the library's internals. */
#ifndef USP_TESTS_TRACE_H
#define USP_TESTS_TRACE_H
#include "usp.h"

enum { USP_TRACE_RANKS = 64, USP_TRACE_STEPS = 256 };

typedef struct usp_trace usp_trace;

typedef struct usp_traffic {
    int64_t sent[USP_TRACE_RANKS], received[USP_TRACE_RANKS];
    int64_t near, far; /* bytes of the transport beside the world's; of the world's own: sent and received */
    int strays;        /* messages to or from another host that came to the one beside it */
    int unprepared;    /* exchanges of more messages or bytes than the layer made last had announced */
    /* A letter for each call, in order: X exchange; where the device is watched too, C a list of rows copied, + one of
     * rows added, I linear_output (inside a chunk), A linear_apply (of a state), F the transfer stream waits for the
     * caller's, W the caller's for the transfer stream. What has no room is left out. */
    char order[USP_TRACE_STEPS];
} usp_traffic;

/* Puts a trace between the world and its transports; the world destroys it. NULL: out of memory. */
usp_trace *usp_trace_insert(usp_world *world);
/* Whether meshes that are made from now on find a transport beside the world's. A world that has none gets one that
 * passes for it, by way of its own, and which alone reaches shared memory then. */
void usp_trace_near(usp_trace *trace, int on);
/* Writes down the device's calls too, until the world is destroyed. CPU only. */
void usp_trace_watch(usp_trace *trace, usp_world *world);
/* What was exchanged since the last call. */
usp_traffic usp_trace_take(usp_trace *trace);

#endif
