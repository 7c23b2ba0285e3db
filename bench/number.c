/* number.c - half-precision conversions by their bits, and a counter-based generator.
 * Not fast: tools convert whole tensors once. */
#include "number.h"
#include <math.h>
#include <string.h>

static uint32_t float_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static float bits_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static double load_f16(uint16_t half) {
    int exponent = half >> 10 & 31, fraction = half & 1023;
    double sign = half >> 15 ? -1 : 1;
    if (exponent == 31) return fraction ? (double)NAN : sign * (double)INFINITY;
    if (exponent == 0) return sign * ldexp(fraction, -24);
    return sign * ldexp(fraction + 1024, exponent - 25);
}

/* Normal numbers: rounds away 13 bits of the fraction and moves the exponent's bias from 127 to 15. */
static uint16_t store_f16(double value) {
    float size = fabsf((float)value);
    uint32_t bits = float_bits(size);
    uint16_t sign = signbit(value) ? 0x8000 : 0;
    if (isnan(value)) return sign | 0x7e00;
    if (size >= 65520) return sign | 0x7c00;
    if (size < 0x1p-14f) return (uint16_t)(sign | (int)nearbyintf(size * 0x1p24f));
    return (uint16_t)(sign | (((bits + 0xfff + (bits >> 13 & 1)) >> 13) - (112 << 10)));
}

static uint16_t store_bf16(double value) {
    uint32_t bits = float_bits((float)value);
    if (isnan(value)) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

double usp_number_load(usp_dtype dtype, const void *data, size_t index) {
    float single;
    uint16_t half;
    if (dtype == USP_F32) return memcpy(&single, (const char *)data + index * 4, 4), (double)single;
    memcpy(&half, (const char *)data + index * 2, 2);
    return dtype == USP_F16 ? load_f16(half) : (double)bits_float((uint32_t)half << 16);
}

void usp_number_store(usp_dtype dtype, void *data, size_t index, double value) {
    float single = (float)value;
    uint16_t half = dtype == USP_F16 ? store_f16(value) : store_bf16(value);
    if (dtype == USP_F32)
        memcpy((char *)data + index * 4, &single, 4);
    else
        memcpy((char *)data + index * 2, &half, 2);
}

double usp_number_round(usp_dtype dtype, double value) {
    if (dtype == USP_F32) return (float)value;
    if (dtype == USP_F16) return load_f16(store_f16(value));
    return (double)bits_float((uint32_t)store_bf16(value) << 16);
}

double usp_number_epsilon(usp_dtype dtype) {
    return dtype == USP_F32 ? 0x1p-23 : dtype == USP_F16 ? 0x1p-10 : 0x1p-7;
}

uint64_t usp_number_hash(uint64_t stream, uint64_t index) {
    uint64_t x = (index + 1) * 0x9e3779b97f4a7c15u + stream * 0xd1342543de82ef95u;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

double usp_number_random(uint64_t stream, uint64_t index) {
    uint64_t x = usp_number_hash(stream, index);
    int64_t sum = (int64_t)((x & 0xffff) + (x >> 16 & 0xffff) + (x >> 32 & 0xffff) + (x >> 48));
    return (double)(sum - 2 * 0xffff) * (1.7320508075688772 / 65536); /* four uniforms: variance 4 / 12 */
}

void usp_number_random_row(usp_dtype dtype, uint64_t stream, uint64_t first, int count, double *row) {
    for (int i = 0; i < count; i++) row[i] = usp_number_round(dtype, usp_number_random(stream, first + (uint64_t)i));
}

void usp_number_random_fill(usp_dtype dtype, uint64_t stream, uint64_t first, size_t count, void *data) {
    for (size_t i = 0; i < count; i++) usp_number_store(dtype, data, i, usp_number_random(stream, first + i));
}
