/* adamw.h - the optimiser over a slice of the flat parameter array, and its schedule.
 * Ranks own disjoint slices, so every parameter is stepped exactly once. */
#ifndef TRAIN_ADAMW_H
#define TRAIN_ADAMW_H
#include <stddef.h>

typedef struct adamw {
    float rate, decay, clip; /* peak learning rate, weight decay, largest gradient norm */
    int warmup, steps;
    float *first, *second;       /* running moments, [count], zero at the start */
    const unsigned char *decays; /* [count]: does weight decay apply? */
} adamw;

/* Learning rate of step 1, 2, ...: linear warm-up, then a cosine down to a tenth. */
float adamw_rate(const adamw *a, int step);
/* What gradients are multiplied with so that their norm is at most `clip`. */
float adamw_clip(const adamw *a, double squared_norm);
/* Steps parameters [begin, end) by gradients * scale. */
void adamw_step(adamw *a, int step, float scale, size_t begin, size_t end, const float *gradients, float *parameters);

#endif
