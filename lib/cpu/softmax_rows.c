/* softmax_rows.c - what softmax attention finds of rows and heads alone: delta, the sinks' gradient, the largest
 * scores.
 */
#include "kernels.h"
#include <math.h>

/* Where out is 0, as in rows that see no key, dout does not count: it may be NaN. */
static float dot(const float *dout, const float *out, int n) {
    float lane[USP_CPU_LANE] = {0}, sum = 0;
    int i = 0;
    for (; i + USP_CPU_LANE <= n; i += USP_CPU_LANE)
        for (int l = 0; l < USP_CPU_LANE; l++) lane[l] += out[i + l] == 0 ? 0 : dout[i + l] * out[i + l];
    for (; i < n; i++) sum += out[i] == 0 ? 0 : dout[i] * out[i];
    for (int l = 0; l < USP_CPU_LANE; l++) sum += lane[l];
    return sum;
}

usp_status usp_cpu_softmax_delta(usp_device *device, const usp_softmax *a, float *delta, usp_stream stream) {
    const usp_panel *panel = usp_cpu_panel(device);
    const float *dlse = a->dlse;
    float out[USP_CPU_DIM], dout[USP_CPU_DIM];
    (void)stream;
    for (int b = 0; b < a->batch; b++)
        for (int h = 0; h < a->heads; h++)
            for (int64_t t = 0; t < a->queries; t++) {
                panel->load(a->dtype, usp_cpu_row(&a->out, a->dtype, t, b, h), out, a->value_dim);
                panel->load(a->dtype, usp_cpu_row(&a->dout, a->dtype, t, b, h), dout, a->value_dim);
                *delta++ = dot(dout, out, a->value_dim) - (dlse ? *dlse++ : 0);
            }
    return USP_OK;
}

usp_status usp_cpu_softmax_sinks(usp_device *device, const usp_softmax *a, float *gradient, usp_stream stream) {
    (void)device, (void)stream;
    for (int h = 0; h < a->heads; h++) {
        double sum = 0;
        for (int b = 0; b < a->batch; b++)
            for (int64_t t = 0; t < a->queries; t++) {
                int64_t at = ((int64_t)b * a->heads + h) * a->queries + t;
                if (a->sum[at] == 0) continue; /* a sink of -inf, and no key */
                sum -= (double)(expf(a->sinks[h] - a->top[at]) / a->sum[at] * a->delta[at]);
            }
        gradient[h] = (float)sum;
    }
    return USP_OK;
}

usp_status usp_cpu_softmax_peaks(usp_device *device, const usp_softmax *a, float *most, usp_stream stream) {
    (void)device, (void)stream;
    for (int h = 0; h < a->heads; h++) {
        most[h] = -INFINITY;
        for (int b = 0; b < a->batch; b++)
            for (int64_t t = 0; t < a->queries; t++)
                most[h] = fmaxf(most[h], a->peak[((int64_t)b * a->heads + h) * a->queries + t]);
    }
    return USP_OK;
}
