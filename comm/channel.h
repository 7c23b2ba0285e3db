/* channel.h - the control of ranks that are processes: all-gather, liveness and aborts over connections of its own.
 *
 * A TCP connection between every two ranks and one service thread a rank. The kernel closes a connection when a process
 * dies, so a death is seen at once, also where NCCL reports nothing; heart-beats tell who has stopped (SIGSTOP) and who
 * waits for whom, so that a time-out names the rank that is behind. */
#ifndef USP_CHANNEL_H
#define USP_CHANNEL_H
#include "transport.h"

/* Local, before ranks meet: memory, descriptors and the thread. Fills where this rank listens. The control that it
 * makes is the one of the calls below. */
usp_status usp_channel_create(const usp_transport_config *config, const usp_bootstrap *, usp_address *mine,
                              usp_control **);
/* Collective, once all have met: a line to every other rank, and in `data` [size], unless NULL, one more connection to
 * each (-1: none), which is the caller's to close, after a failure too. A rank that fails or dies meanwhile is named on
 * all that have a line. */
usp_status usp_channel_connect(usp_control *, const usp_meeting *, int *data);
/* What this rank does now: it enters one more exchange, of whichever transport; in it, it waits for `peer` (-1: for
 * none that is known). Lock-free. */
void usp_channel_enter(usp_control *);
void usp_channel_await(usp_control *, int peer);
/* The wait on `peer` cannot end: the data connection to it has. PEER_LOST at once if the peer is known to have gone,
 * else as soon as it is, or COMM a second later; OK means: wait on. */
usp_status usp_channel_gone(usp_control *, int peer);
/* 1: the line to the peer has ended without a goodbye. */
int usp_channel_has_lost(usp_control *, int peer);
/* Records a failure that this rank has found, spreads it to all ranks, and returns the one that came first. */
usp_status usp_channel_fail(usp_control *, usp_status, const char *format, ...) __attribute__((format(printf, 3, 4)));
/* Says goodbye, or what has failed, and hears no more: before the data connections are closed. destroy does it too. */
void usp_channel_leave(usp_control *);
/* A descriptor that becomes readable, and stays so, once the ranks have failed: to be polled beside others. */
int usp_channel_descriptor(const usp_control *);

/* The table's entry. */
usp_status usp_channel_poll(usp_control *);
/* A wait on `peer` (-1: not known) has not ended in time. To blame is the end of the chain of who waits for whom, or
 * one in it that stopped beating; else any that stopped, else the one with the fewest exchanges. */
usp_status usp_channel_overdue(usp_control *, int peer);

#endif
