/* search.h - the lesser and the greater of two numbers, and searching in ascending ones. */
#ifndef USP_SEARCH_H
#define USP_SEARCH_H
#include <stdint.h>

static inline int64_t usp_least(int64_t a, int64_t b) {
    return a < b ? a : b;
}

static inline int64_t usp_most(int64_t a, int64_t b) {
    return a > b ? a : b;
}

/* Index of the first of x[begin .. end), which ascend, that is at least `bound`; `end` if none is. The nearer to begin,
 * the sooner. */
static inline int64_t usp_first_at_least(const int32_t *x, int64_t begin, int64_t end, int64_t bound) {
    int64_t step = 1;
    for (; step <= end - begin && x[begin + step - 1] < bound; step *= 2) begin += step;
    end = usp_least(end, begin + step - 1);
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
