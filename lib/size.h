/* size.h - products of sizes that a caller gives, which may be more than can be counted. */
#ifndef USP_SIZE_H
#define USP_SIZE_H
#include <stdint.h>

/* The product of `count` factors, none of them negative; -1 if it is more than INT64_MAX. */
static inline int64_t usp_size(int count, const int64_t *factors) {
    int64_t product = 1, over = 0;
    for (int i = 0; i < count; i++) {
        if (factors[i] == 0) return 0;
        over |= __builtin_mul_overflow(product, factors[i], &product);
    }
    return over ? -1 : product;
}

#endif
