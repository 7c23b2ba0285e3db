/* sort.h - sorting in place: qsort may allocate, and a re-plan must not. */
#ifndef USP_SORT_H
#define USP_SORT_H
#include <stddef.h>

/* As qsort, for items of at most USP_SORT_BYTES. Takes count * log(count) steps whatever the order was. */
enum { USP_SORT_BYTES = 64 };
void usp_sort(void *items, size_t count, size_t bytes, int (*compare)(const void *, const void *));

#endif
