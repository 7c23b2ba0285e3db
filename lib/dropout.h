/* dropout.h - the words by which attention dropout keeps pairs: a counter-based generator, so that a pair is kept or
 * not whoever computes it. Every device includes it. The mixers are SplitMix64's (Steele et al., OOPSLA 2014) and
 * MurmurHash3's (Appleby): one number of a query, one of a key. What a pair adds is a multiplication and an addition
 * modulo 2^32, since tensor cores leave room for no more. */
#ifndef USP_DROPOUT_H
#define USP_DROPOUT_H
#include <stdint.h>

#ifdef __CUDACC__
#define USP_ANYWHERE static __host__ __device__ __forceinline__
#else
#define USP_ANYWHERE static inline
#endif

USP_ANYWHERE uint64_t usp_dropout_mix(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

/* What the pairs of one query share, a factor below and an addend above; `line` is batch * heads of the whole layer +
 * head. The factor is odd: the pairs of a query with different keys have different words. */
USP_ANYWHERE uint64_t usp_dropout_row(uint64_t seed, uint64_t offset, uint32_t line, uint32_t query) {
    uint64_t x = usp_dropout_mix(seed + 0x9e3779b97f4a7c15u);
    x = usp_dropout_mix(x ^ offset);
    return usp_dropout_mix(x ^ ((uint64_t)line << 32 | query)) | 1;
}

/* What the pairs of one key share: a different number for each position. */
USP_ANYWHERE uint32_t usp_dropout_key(uint32_t key) {
    uint32_t x = (key + 0x9e3779b9u) * 0x85ebca6bu;
    x = (x ^ (x >> 13)) * 0xc2b2ae35u;
    return x ^ (x >> 16);
}

/* The word of a pair, uniform in 32 bits, of what its query and its key share. */
USP_ANYWHERE uint32_t usp_dropout_pair(uint64_t row, uint32_t key) {
    return (uint32_t)row * key + (uint32_t)(row >> 32);
}

/* The number of a pair, uniform in 15 bits: those of its word below the upper one, so that tensor-core kernels compare
 * the numbers of two pairs at once, as floats of 16 bits. */
USP_ANYWHERE uint32_t usp_dropout_number(uint64_t row, uint32_t key) {
    return usp_dropout_pair(row, usp_dropout_key(key)) >> 16 & 0x7fff;
}

/* The largest rate: numbers above 0x7c00 are no floats, which a limit must be. */
#define USP_DROPOUT_MOST 0.95f

/* Pairs whose numbers are below it are dropped. */
USP_ANYWHERE uint32_t usp_dropout_limit(float rate) {
    return (uint32_t)(rate * 32768 + 0.5f);
}

/* The part of all pairs that is dropped: the rate, rounded. */
USP_ANYWHERE float usp_dropout_rate(float rate) {
    return (float)usp_dropout_limit(rate) / 32768;
}

/* For whoever compares words, one at a time: theirs are twice as large, and dropped below a limit 2^17 times as large.
 */
USP_ANYWHERE uint64_t usp_dropout_twice(uint64_t row) {
    return row >> 32 << 33 | (uint32_t)(row << 1);
}

#endif
