/* half.h - float16 and bfloat16 to and from float, one value or one row at a time, by integer arithmetic.
 * Rounds to nearest even and keeps NaN and infinity; knows nothing of tensors. */
#ifndef USP_CPU_HALF_H
#define USP_CPU_HALF_H
#include <stdint.h>
#include <string.h>

#include "usp.h"

enum { USP_HALF_LINE = 16 }; /* values converted together: a fixed count lets the compiler vectorise */

static inline float usp_float_of_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint32_t usp_bits_of_float(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

/* yes where mask is all ones, no where it is 0: no branch, which would keep the compiler from vectorising. */
static inline uint32_t usp_bits_choose(uint32_t mask, uint32_t yes, uint32_t no) {
    return (mask & yes) | (~mask & no);
}

static inline uint32_t usp_bits_mask(int condition) {
    return 0u - (uint32_t)condition;
}

static inline float usp_half_to_float(uint16_t half) {
    const uint32_t smallest = 113u << 23; /* 2^-14: the exponent below which a half is subnormal */
    uint32_t bits = (uint32_t)(half & 0x7fff) << 13, exponent = bits & (31u << 23);
    uint32_t normal = bits + (112u << 23) + (usp_bits_mask(exponent == 31u << 23) & (112u << 23));
    uint32_t subnormal = usp_bits_of_float(usp_float_of_bits(bits + smallest) - usp_float_of_bits(smallest));
    uint32_t size = usp_bits_choose(usp_bits_mask(exponent == 0), subnormal, normal);
    return usp_float_of_bits(size | (uint32_t)(half & 0x8000) << 16);
}

static inline uint16_t usp_float_to_half(float value) {
    uint32_t bits = usp_bits_of_float(value), size = bits & 0x7fffffff, small = usp_bits_mask(size < 113u << 23);
    uint32_t normal = (size + (size >> 13 & 1) + 0xfff - (112u << 23)) >> 13;
    uint32_t subnormal = usp_bits_of_float(usp_float_of_bits(size & small) + 0.5f) - usp_bits_of_float(0.5f);
    uint32_t half = usp_bits_choose(small, subnormal, normal);
    half = usp_bits_choose(usp_bits_mask(size >= 0x477ff000), 0x7c00, half); /* 65520 and more round to infinity */
    half = usp_bits_choose(usp_bits_mask(size > 0x7f800000), 0x7e00 | (size >> 13 & 0x3ff), half); /* NaN */
    return (uint16_t)(half | (bits >> 16 & 0x8000));
}

static inline float usp_bfloat_to_float(uint16_t bfloat) {
    return usp_float_of_bits((uint32_t)bfloat << 16);
}

static inline uint16_t usp_float_to_bfloat(float value) {
    uint32_t bits = usp_bits_of_float(value);
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    uint32_t quiet = bits >> 16 | 0x40;
    return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? quiet : rounded);
}

/* One line of at most USP_HALF_LINE values, by a copy: rows may begin at any address. */
static inline void usp_line_to_float(usp_dtype dtype, const void *from, float *to, int n) {
    uint16_t line[USP_HALF_LINE] = {0};
    float value[USP_HALF_LINE];
    memcpy(line, from, sizeof *line * (size_t)n);
    if (dtype == USP_F16)
        for (int i = 0; i < USP_HALF_LINE; i++) value[i] = usp_half_to_float(line[i]);
    else
        for (int i = 0; i < USP_HALF_LINE; i++) value[i] = usp_bfloat_to_float(line[i]);
    memcpy(to, value, sizeof *value * (size_t)n);
}

static inline void usp_line_from_float(usp_dtype dtype, const float *from, void *to, int n) {
    uint16_t line[USP_HALF_LINE];
    float value[USP_HALF_LINE] = {0};
    memcpy(value, from, sizeof *value * (size_t)n);
    if (dtype == USP_F16)
        for (int i = 0; i < USP_HALF_LINE; i++) line[i] = usp_float_to_half(value[i]);
    else
        for (int i = 0; i < USP_HALF_LINE; i++) line[i] = usp_float_to_bfloat(value[i]);
    memcpy(to, line, sizeof *line * (size_t)n);
}

static inline void usp_row_to_float(usp_dtype dtype, const void *from, float *to, int n) {
    const unsigned char *source = from;
    int i = 0;
    if (dtype == USP_F32) {
        memcpy(to, from, sizeof *to * (size_t)n);
        return;
    }
    for (; i + USP_HALF_LINE <= n; i += USP_HALF_LINE) usp_line_to_float(dtype, source + 2 * i, to + i, USP_HALF_LINE);
    if (i < n) usp_line_to_float(dtype, source + 2 * i, to + i, n - i);
}

static inline void usp_row_from_float(usp_dtype dtype, const float *from, void *to, int n) {
    unsigned char *target = to;
    int i = 0;
    if (dtype == USP_F32) {
        memcpy(to, from, sizeof *from * (size_t)n);
        return;
    }
    for (; i + USP_HALF_LINE <= n; i += USP_HALF_LINE)
        usp_line_from_float(dtype, from + i, target + 2 * i, USP_HALF_LINE);
    if (i < n) usp_line_from_float(dtype, from + i, target + 2 * i, n - i);
}

#endif
