/* heap.c - malloc that counts and can refuse (see heap.h). Keeps no record of addresses. */
#include "heap.h"

#include <stdlib.h>

static void *heap_alloc(void *user, size_t bytes) {
    usp_heap *heap = user;
    int call = atomic_fetch_add(&heap->calls, 1) + 1;
    if (call == atomic_load(&heap->refuse)) return NULL;
    void *memory = malloc(bytes);
    if (memory) atomic_fetch_add(&heap->live, 1);
    return memory;
}

static void heap_free(void *user, void *memory) {
    usp_heap *heap = user;
    if (memory) atomic_fetch_sub(&heap->live, 1);
    free(memory);
}

void usp_heap_configure(usp_heap *heap, usp_world_config *config) {
    config->host_alloc = heap_alloc;
    config->host_free = heap_free;
    config->host_user = heap;
}

void usp_heap_arm(usp_heap *heap, int k) {
    atomic_store(&heap->calls, 0);
    atomic_store(&heap->refuse, k);
}

int usp_heap_disarm(usp_heap *heap) {
    int k = atomic_exchange(&heap->refuse, 0);
    return k > 0 && atomic_load(&heap->calls) >= k;
}
