/* guard.h - who may be inside the calls of a world: one thread at a time, and no child of fork. And how long objects
 * live: until the caller has destroyed them and nothing is built on them any more. */
#ifndef USP_GUARD_H
#define USP_GUARD_H
#include "usp.h"
#include <stdatomic.h>
#include <sys/types.h>

/* Begins every world, mesh, sequence and layer. But for `next` it is touched in the world's turn only. */
typedef struct usp_object {
    usp_world *world;
    struct usp_object *base; /* what it is built on and keeps alive; NULL: it is the world */
    void (*free)(struct usp_object *);
    int users;               /* the caller, until it destroys the object, and objects built on it */
    struct usp_object *next; /* destroyed in another thread's turn, which ends by releasing it */
} usp_object;

/* Of a world. state NULL: nobody's; else a thread's, and a list of what others have destroyed meanwhile. */
typedef struct usp_turn {
    _Atomic(usp_object *) state;
    atomic_int called; /* by a call, not by a destroy */
    pid_t process;     /* that made the world */
} usp_turn;

/* A new world's turn: nobody's, in this process. */
void usp_turn_begin(usp_turn *turn);

/* INVALID in a child of fork, whose copies of threads, locks and connections are dead or another's. Enough for calls
 * that only read, poll or abort: they may come from any thread at any time. */
usp_status usp_guard_process(const usp_world *world);

/* Every other public call begins with enter, which gives INVALID where process does or another thread is in, and ends
 * with leave, which returns `status`. Neither waits, but enter for a thread that just destroys something. */
usp_status usp_guard_enter(usp_world *world);
usp_status usp_guard_leave(usp_world *world, usp_status status);

/* Makes an object that the caller holds; in the world's turn, unless it is a new world. */
void usp_object_begin(usp_object *object, usp_world *world, usp_object *base, void (*free)(usp_object *));

/* The caller has destroyed the object. From any thread: one that is in a call releases it when it leaves. In a child of
 * fork nothing happens: what it copied goes with it, and the rest is its parent's. */
void usp_object_drop(usp_object *object);

#endif
