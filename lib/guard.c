/* guard.c - a world's turn, and the release of objects at its end. It knows no particular object.
 *
 * The turn is one atomic pointer: NULL, or the newest of what was destroyed while a thread is in, or `taken` where that
 * is nothing. So the thread that lets go of it sees all that was destroyed before, and touches the world no more. */
#define _POSIX_C_SOURCE 200809L
#include "guard.h"
#include "error.h"
#include "thread.h"
#include "world.h"
#include <unistd.h>

enum { PATIENCE = 100000 /* pauses, some ten seconds */ };

/* An address that no object has. */
static usp_object *taken(usp_world *world) {
    return (usp_object *)(void *)&world->turn;
}

void usp_turn_begin(usp_turn *turn) {
    atomic_init(&turn->state, NULL);
    atomic_init(&turn->called, 0);
    turn->process = getpid();
}

usp_status usp_guard_process(const usp_world *world) {
    USP_REQUIRE(world->turn.process == getpid(), "the world is of process %d, and this is a child of its fork",
                (int)world->turn.process);
    return USP_OK;
}

usp_status usp_guard_enter(usp_world *world) {
    usp_object *nobody = NULL;
    USP_TRY(usp_guard_process(world));
    for (int round = 0; !atomic_compare_exchange_strong(&world->turn.state, &nobody, taken(world)); round++) {
        USP_REQUIRE(!atomic_load(&world->turn.called) && round < PATIENCE, "another thread is in a call on this world");
        usp_pause(round);
        nobody = NULL;
    }
    atomic_store(&world->turn.called, 1);
    return USP_OK;
}

void usp_object_begin(usp_object *object, usp_world *world, usp_object *base, void (*free)(usp_object *)) {
    *object = (usp_object){.world = world, .base = base, .free = free, .users = 1};
    if (base) base->users++;
}

/* One user less: the last one's object is freed, and what it was built on has one user less. 0: the world is gone. */
static int release(usp_object *object) {
    while (--object->users == 0) {
        usp_object *base = object->base;
        object->free(object);
        if (!base) return 0;
        object = base;
    }
    return 1;
}

usp_status usp_guard_leave(usp_world *world, usp_status status) {
    usp_object *list = taken(world);
    atomic_store(&world->turn.called, 0);
    while (!atomic_compare_exchange_strong(&world->turn.state, &list, NULL)) {
        list = atomic_exchange(&world->turn.state, taken(world));
        while (list != taken(world)) {
            usp_object *next = list->next;
            if (!release(list)) return status;
            list = next;
        }
    }
    return status;
}

void usp_object_drop(usp_object *object) {
    usp_world *world = object->world;
    usp_object *state = NULL;
    if (world->turn.process != getpid()) return;
    while (!atomic_compare_exchange_weak(&world->turn.state, &state, state ? object : taken(world)))
        object->next = state;
    if (!state && release(object)) usp_guard_leave(world, USP_OK);
}
