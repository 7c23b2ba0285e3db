/* copy.c - copies, converts and accumulates rows of strided tensors on the CPU.
 * It never allocates; rows of any length go through a short line of floats. */
#include <string.h>

#include "kernels.h"

enum { USP_COPY_LINE = 256 };

static void convert_row(const usp_panel *panel, const usp_copy *a, const char *from, char *to, int n) {
    float line[USP_COPY_LINE], sum[USP_COPY_LINE];
    panel->load(a->from_dtype, from, line, n);
    if (a->accumulate) {
        panel->load(a->to_dtype, to, sum, n);
        for (int i = 0; i < n; i++) line[i] += sum[i];
    }
    panel->store(a->to_dtype, line, to, n);
}

static void copy_row(const usp_panel *panel, const usp_copy *a, const char *from, char *to, int n) {
    size_t from_size = usp_dtype_size(a->from_dtype), to_size = usp_dtype_size(a->to_dtype);
    if (a->from_dtype == a->to_dtype && !a->accumulate) {
        memcpy(to, from, from_size * (size_t)n);
        return;
    }
    for (int i = 0; i < n; i += USP_COPY_LINE) {
        int count = n - i < USP_COPY_LINE ? n - i : USP_COPY_LINE;
        convert_row(panel, a, from + from_size * (size_t)i, to + to_size * (size_t)i, count);
    }
}

static void copy_tensor(const usp_panel *panel, const usp_copy *a) {
    int dense = a->from.stride_head == a->dim && a->to.stride_head == a->dim && /* then all heads are one row */
                (int64_t)a->heads * a->dim <= INT32_MAX;
    int heads = dense ? 1 : a->heads, dim = dense ? a->heads * a->dim : a->dim;
    for (int64_t t = 0; t < a->tokens && dim; t++) { /* no heads: perhaps no memory */
        int64_t from = a->from_row ? a->from_row[t] : t, to = a->to_row ? a->to_row[t] : t;
        for (int b = 0; b < a->batch; b++)
            for (int h = 0; h < heads; h++)
                copy_row(panel, a, usp_cpu_row(&a->from, a->from_dtype, from, b, h),
                         usp_cpu_row(&a->to, a->to_dtype, to, b, h), dim);
    }
}

usp_status usp_cpu_copy_rows(usp_device *device, const usp_copy *copies, int count, usp_stream stream) {
    (void)stream;
    for (int i = 0; i < count; i++) copy_tensor(usp_cpu_panel(device), &copies[i]);
    return USP_OK;
}
