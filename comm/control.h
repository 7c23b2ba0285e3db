/* control.h - the channel between the processes of a world that carries no tensors: all-gather, liveness and aborts.
 *
 * A TCP connection between every two ranks and one service thread a rank. The kernel closes a connection when a process
 * dies, so a death is seen at once, also where NCCL reports nothing; heart-beats tell who has stopped (SIGSTOP) and who
 * waits for whom, so that a time-out names the rank that is behind. */
#ifndef USP_CONTROL_H
#define USP_CONTROL_H
#include "comm.h"

typedef struct usp_control usp_control;

/* Local, before ranks meet: memory, descriptors and the thread. Fills where this rank listens. */
usp_status usp_control_create(const usp_comm_config *config, const usp_bootstrap *, usp_address *mine, usp_control **);
/* Collective, once all have met: a line to every other rank, and in `data` [size], unless NULL, one more connection to
 * each (-1: none), which is the caller's to close, after a failure too. A rank that fails or dies meanwhile is named on
 * all that have a line. */
usp_status usp_control_connect(usp_control *, const usp_meeting *, int *data);
usp_status usp_control_allgather(usp_control *, const void *mine, void *all, size_t bytes_per_rank);
/* What this rank does now: how many exchanges it has entered, and the rank it waits for (-1: none). Lock-free. */
void usp_control_progress(usp_control *, uint64_t exchanges, int waiting_for);
/* See usp_comm_ops.note_plan. */
void usp_control_note_plan(usp_control *, int ranks, uint64_t hash);
/* OK, or the sticky failure with its sentence: PEER_LOST (rank), or COMM for a rank that aborted. Never waits. */
usp_status usp_control_poll(usp_control *);
/* The rank to blame for a wait on `peer` (-1: unknown) that timed out: the end of the chain of who waits for whom, or
 * one in it that stopped beating; else any that stopped, else the one with the fewest exchanges. Records and spreads
 * the failure; returns its status. */
usp_status usp_control_overdue(usp_control *, int peer);
/* The wait on `peer` cannot end: the data connection to it has. PEER_LOST at once if the peer is known to have gone,
 * else as soon as it is, or COMM a second later; OK means: wait on. */
usp_status usp_control_gone(usp_control *, int peer);
/* Records a failure that this rank has found, spreads it to all ranks, and returns the one that came first. */
usp_status usp_control_fail(usp_control *, usp_status, const char *format, ...) __attribute__((format(printf, 3, 4)));
/* A descriptor that becomes readable, and stays so, once the control has failed: to be polled beside others. */
int usp_control_descriptor(const usp_control *);
void usp_control_abort(usp_control *);   /* tells all ranks; any thread; idempotent */
void usp_control_destroy(usp_control *); /* NULL is fine */

#endif
