/* size.c - products that are refused rather than wrapped (see size.h). It allocates nothing. */
#include "size.h"
#include "error.h"
#include <inttypes.h>
#include <stdio.h>

static usp_status refuse(const usp_factor *factors, int count) {
    char text[384] = "";
    size_t length = 0;
    for (int i = 0; i < count && length < sizeof text; i++)
        length += (size_t)snprintf(text + length, sizeof text - length, "%s%s %" PRIu64, i ? " x " : "",
                                   factors[i].name, factors[i].value);
    return usp_fail(USP_INVALID, "%s: more than 64 bits count", text);
}

usp_status usp_size_add(int64_t *size, const usp_factor *factors, int count) {
    int64_t product = 1;
    int beyond = 0, none = 0;
    for (int i = 0; i < count; i++) {
        none |= factors[i].value == 0;
        beyond |= __builtin_mul_overflow(product, factors[i].value, &product);
    }
    if (none) return USP_OK;
    beyond |= __builtin_add_overflow(*size, product, size);
    return beyond ? refuse(factors, count) : USP_OK;
}
