/* guard.h - who may be in a world: one thread at a time, and only the process that made it. */
#ifndef USP_GUARD_H
#define USP_GUARD_H
#include "world.h"

/* INVALID in a child of fork, whose copies of threads, locks and connections are dead or another's. */
usp_status usp_guard_process(const usp_world *world);
/* The same, and INVALID while another thread is in a call. After OK the call must end by usp_guard_leave. */
usp_status usp_guard_enter(usp_world *world);
usp_status usp_guard_leave(usp_world *world, usp_status status); /* returns `status` */

#endif
