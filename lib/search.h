/* search.h - searching in ascending numbers. */
#ifndef USP_SEARCH_H
#define USP_SEARCH_H
#include <stdint.h>

/* Index of the first of x[begin .. end), which ascend, that is at least `bound`; `end` if none is. */
static inline int64_t usp_first_at_least(const int32_t *x, int64_t begin, int64_t end, int64_t bound) {
    while (begin < end) {
        int64_t middle = (begin + end) / 2;
        if (x[middle] >= bound)
            end = middle;
        else
            begin = middle + 1;
    }
    return begin;
}

#endif
