/* arena.h - carves one buffer into aligned pieces. With a NULL base it only measures, so that one function both sizes
 * and carves a workspace and the two cannot disagree. */
#ifndef USP_ARENA_H
#define USP_ARENA_H
#include <stddef.h>

enum { USP_ALIGNMENT = 256 };

typedef struct usp_arena {
    char *base; /* NULL: measure */
    size_t used;
} usp_arena;

static inline size_t usp_align(size_t bytes) {
    return (bytes + USP_ALIGNMENT - 1) / USP_ALIGNMENT * USP_ALIGNMENT;
}

/* The next `bytes` bytes; NULL when measuring. */
static inline void *usp_carve(usp_arena *arena, size_t bytes) {
    void *piece = arena->base ? arena->base + arena->used : NULL;
    arena->used += usp_align(bytes);
    return piece;
}

#endif
