/* guard.c - who may be in a world: one thread at a time, and only the process that made it. It never waits. */
#define _POSIX_C_SOURCE 200809L
#include "guard.h"
#include "error.h"
#include <unistd.h>

usp_status usp_guard_process(const usp_world *world) {
    USP_REQUIRE(world->process == getpid(), "the world is of process %d, and this is a child of its fork",
                (int)world->process);
    return USP_OK;
}

usp_status usp_guard_enter(usp_world *world) {
    USP_TRY(usp_guard_process(world));
    USP_REQUIRE(!atomic_exchange(&world->busy, 1), "another thread is in a call on this world");
    return USP_OK;
}

usp_status usp_guard_leave(usp_world *world, usp_status status) {
    atomic_store(&world->busy, 0);
    return status;
}
