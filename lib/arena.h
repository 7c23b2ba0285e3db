/* arena.h - carves one buffer into aligned pieces. With a NULL base it only measures, so that one function both sizes
 * and carves a workspace and the two cannot disagree. What was carved has a shape, so that ranks can tell whether they
 * carve alike. */
#ifndef USP_ARENA_H
#define USP_ARENA_H
#include <stddef.h>
#include <stdint.h>

enum { USP_ALIGNMENT = 256 };

typedef struct usp_arena {
    char *base; /* NULL: measure */
    size_t used;
    uint64_t shape; /* a hash of all sizes, in order */
} usp_arena;

/* Carves from `base` on. */
static inline usp_arena usp_arena_at(void *base) {
    return (usp_arena){(char *)base, 0, 0};
}

static inline size_t usp_align(size_t bytes) {
    return (bytes + USP_ALIGNMENT - 1) / USP_ALIGNMENT * USP_ALIGNMENT;
}

/* Adds to the shape what follows from something else than a size. */
static inline void usp_arena_note(usp_arena *arena, uint64_t number) {
    uint64_t mixed = (arena->shape ^ number) * 0x9E3779B97F4A7C15u;
    arena->shape = mixed ^ (mixed >> 32);
}

/* The next `bytes` bytes; NULL when measuring. */
static inline void *usp_carve(usp_arena *arena, size_t bytes) {
    void *piece = arena->base ? arena->base + arena->used : NULL;
    arena->used += usp_align(bytes);
    usp_arena_note(arena, bytes);
    return piece;
}

#endif
