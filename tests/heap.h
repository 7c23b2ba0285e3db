/* heap.h - host memory that is counted, and that can refuse one allocation; for usp_world_config. Finds leaks of the
 * library alone, on any platform. */
#ifndef USP_TESTS_HEAP_H
#define USP_TESTS_HEAP_H
#include "usp.h"

#include <stdatomic.h>

/* All zero to begin with. */
typedef struct usp_heap {
    atomic_int live;   /* allocations not yet freed */
    atomic_int calls;  /* since usp_heap_arm */
    atomic_int refuse; /* the call that fails; 0: none */
} usp_heap;

void usp_heap_configure(usp_heap *heap, usp_world_config *config);
/* The k-th call from now on fails. */
void usp_heap_arm(usp_heap *heap, int k);
/* 1 if an armed failure has happened; disarms. */
int usp_heap_disarm(usp_heap *heap);

#endif
