/* random.h - a small reproducible random generator, the same on every machine and every rank.
 * The state is one number that the caller owns and seeds. */
#ifndef TRAIN_RANDOM_H
#define TRAIN_RANDOM_H
#include <math.h>
#include <stdint.h>

/* Weyl steps through a mixing function. */
static inline uint64_t random_bits(uint64_t *state) {
    uint64_t z = *state += UINT64_C(0x9E3779B97F4A7C15);
    z = (z ^ (z >> 32)) * UINT64_C(0xD6E8FEB86659FD93);
    z = (z ^ (z >> 32)) * UINT64_C(0xD6E8FEB86659FD93);
    return z ^ (z >> 32);
}

/* In [0, 1). */
static inline double random_uniform(uint64_t *state) {
    return (double)(random_bits(state) >> 11) * 0x1p-53;
}

/* Mean 0, variance 1, close enough to a bell for weights: the sum of twelve uniform numbers. */
static inline double random_normal(uint64_t *state) {
    double sum = -6;
    for (int i = 0; i < 12; i++) sum += random_uniform(state);
    return sum;
}

#endif
