/* dropout.h - the words by which attention dropout keeps pairs: a counter-based generator, so that a pair is kept or
 * not whoever computes it. Every device includes it. The mixers are SplitMix64's (Steele et al., OOPSLA 2014) and
 * MurmurHash3's (Appleby). */
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

/* What the pairs of one query share; `line` is batch * heads of the whole layer + head. */
USP_ANYWHERE uint64_t usp_dropout_row(uint64_t seed, uint64_t offset, uint32_t line, uint32_t query) {
    uint64_t x = usp_dropout_mix(seed + 0x9e3779b97f4a7c15u);
    x = usp_dropout_mix(x ^ offset);
    return usp_dropout_mix(x ^ ((uint64_t)line << 32 | query));
}

/* The pair's word, uniform in 32 bits. */
USP_ANYWHERE uint32_t usp_dropout_word(uint64_t row, uint32_t key) {
    uint32_t x = (key ^ (uint32_t)row) * 0xcc9e2d51u;
    x = (x ^ (x >> 15)) + (uint32_t)(row >> 32);
    x *= 0x85ebca6bu;
    x = (x ^ (x >> 13)) * 0xc2b2ae35u;
    return x ^ (x >> 16);
}

/* Words below it are dropped; rate in [0, 1). */
USP_ANYWHERE uint32_t usp_dropout_limit(float rate) {
    return (uint32_t)((double)rate * 4294967296.0);
}

#endif
