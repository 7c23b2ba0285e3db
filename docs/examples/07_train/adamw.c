/* adamw.c - Adam with decoupled weight decay, after Loshchilov and Hutter, arXiv 1711.05101.
 * It neither sums gradients over ranks nor computes their norm. */
#include "adamw.h"

#include <math.h>

float adamw_rate(const adamw *a, int step) {
    if (step <= a->warmup) return a->rate * (float)step / (float)a->warmup;
    double done = (double)(step - a->warmup) / (double)(a->steps > a->warmup ? a->steps - a->warmup : 1);
    return a->rate * (float)(0.1 + 0.45 * (1 + cos(3.14159265358979 * done)));
}

float adamw_clip(const adamw *a, double squared_norm) {
    double norm = sqrt(squared_norm);
    return norm > a->clip ? (float)(a->clip / norm) : 1;
}

void adamw_step(adamw *a, int step, float scale, size_t begin, size_t end, const float *gradients, float *parameters) {
    const float keep_first = 0.9f, keep_second = 0.98f, tiny = 1e-8f;
    float rate = adamw_rate(a, step);
    float unbias_first = 1 / (1 - powf(keep_first, (float)step));
    float unbias_second = 1 / (1 - powf(keep_second, (float)step));
    for (size_t i = begin; i < end; i++) {
        float g = gradients[i] * scale;
        a->first[i] = keep_first * a->first[i] + (1 - keep_first) * g;
        a->second[i] = keep_second * a->second[i] + (1 - keep_second) * g * g;
        float move = a->first[i] * unbias_first / (sqrtf(a->second[i] * unbias_second) + tiny);
        parameters[i] -= rate * (move + (a->decays[i] ? a->decay * parameters[i] : 0));
    }
}
