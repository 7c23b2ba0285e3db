/* launch.h - the launchers of the copy and linear attention kernels, as device.c calls them.
 * They run on the thread's current GPU and check nothing about their arguments. */
#ifndef USP_CUDA_LAUNCH_H
#define USP_CUDA_LAUNCH_H

#ifdef __cplusplus
extern "C" {
#endif
#include "device.h"

/* Shared memory that one block may have on the current GPU; 0 if the GPU does not answer. */
size_t usp_cuda_shared_limit(void);

usp_status usp_cuda_copy_rows(const usp_copy *copy, usp_stream stream);

/* UNSUPPORTED with the reason, or OK. */
usp_status usp_cuda_linear_supports(const usp_kernel_shape *shape);
usp_status usp_cuda_linear_totals(const usp_linear *linear, usp_stream stream);
usp_status usp_cuda_linear_scan(const usp_scan *scan, usp_stream stream);
usp_status usp_cuda_linear_output(const usp_linear *linear, usp_stream stream);
usp_status usp_cuda_linear_apply(const usp_linear *linear, usp_stream stream);
usp_status usp_cuda_scale(float *data, int64_t count, float factor, usp_stream stream);

#ifdef __cplusplus
}
#endif
#endif
