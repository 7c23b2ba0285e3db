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

/* The same by the key's position. */
USP_ANYWHERE uint32_t usp_dropout_word(uint64_t row, uint32_t key) {
    return usp_dropout_pair(row, usp_dropout_key(key));
}

/* Words below it are dropped; rate in [0, 1). */
USP_ANYWHERE uint32_t usp_dropout_limit(float rate) {
    return (uint32_t)((double)rate * 4294967296.0);
}

#endif
