/* size.h - sizes that are products of numbers callers give, and may be more than 64 bits count. */
#ifndef USP_SIZE_H
#define USP_SIZE_H
#include "usp.h"

typedef struct usp_factor {
    const char *name;
    uint64_t value;
} usp_factor;

/* Adds the product of the factors to *size. INVALID, with every factor by its name, where the sum is more than
 * INT64_MAX: it can be rounded up later, but never be had. */
usp_status usp_size_add(int64_t *size, const usp_factor *factors, int count);

#endif
