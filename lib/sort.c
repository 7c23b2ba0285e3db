/* sort.c - heap sort. It keeps no order among items that compare equal. */
#include "sort.h"
#include <string.h>

typedef struct heap {
    char *items;
    size_t bytes;
    int (*compare)(const void *, const void *);
} heap;

static char *item(const heap *h, size_t i) {
    return h->items + i * h->bytes;
}

static void swap(const heap *h, size_t a, size_t b) {
    char kept[USP_SORT_BYTES];
    memcpy(kept, item(h, a), h->bytes);
    memmove(item(h, a), item(h, b), h->bytes);
    memcpy(item(h, b), kept, h->bytes);
}

/* Lets item i sink until it is no smaller than its children, 2i + 1 and 2i + 2, of the first `count` items. */
static void sink(const heap *h, size_t i, size_t count) {
    for (size_t child = 2 * i + 1; child < count; child = 2 * i + 1) {
        if (child + 1 < count && h->compare(item(h, child), item(h, child + 1)) < 0) child++;
        if (h->compare(item(h, i), item(h, child)) >= 0) return;
        swap(h, i, child);
        i = child;
    }
}

void usp_sort(void *items, size_t count, size_t bytes, int (*compare)(const void *, const void *)) {
    const heap h = {items, bytes, compare};
    for (size_t i = count / 2; i > 0; i--) sink(&h, i - 1, count);
    for (size_t last = count; last > 1; last--) {
        swap(&h, 0, last - 1);
        sink(&h, 0, last - 1);
    }
}
