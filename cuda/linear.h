/* linear.h - the linear attention entries of the CUDA device, and the families of kernels behind them.
 * Entries behave as lib/device.h says; only cuda/linear.c chooses between families. */
#ifndef USP_CUDA_LINEAR_H
#define USP_CUDA_LINEAR_H

#ifdef __cplusplus
extern "C" {
#endif
#include "launch.h"

/* ---- entries, as device.c calls them ----------------------------------------------------------------------------- */

typedef enum usp_linear_call { USP_CALL_TOTALS, USP_CALL_OUTPUT, USP_CALL_APPLY } usp_linear_call;

/* UNSUPPORTED with the reason, or OK. */
usp_status usp_cuda_linear_supports(const usp_kernel_shape *shape);
/* `grid`: USP_CUDA_GRID. */
usp_status usp_cuda_linear(const usp_gpu *gpu, const usp_linear *args, usp_linear_call call, int grid,
                           usp_stream stream);
usp_status usp_cuda_linear_scan(const usp_scan *args, usp_stream stream); /* one kernel, no family */

/* ---- families ---------------------------------------------------------------------------------------------------- */

/* Kernels that serve some arguments, on GPUs that run their target. `shared`: bytes of shared memory that they need of
 * a thread block; `fits` is asked only where the GPU has these. */
typedef struct usp_linear_family {
    usp_cuda_target target;
    size_t (*shared)(int dim, int value_dim);
    int (*fits)(const usp_gpu *gpu, const usp_linear *args, usp_linear_call call);
    usp_status (*call[3])(const usp_gpu *gpu, const usp_linear *args, usp_stream stream); /* by usp_linear_call */
} usp_linear_family;

/* Tensor cores by mma.sync, sm_80 and up: 16-bit elements, dims 64 and 128, rows on 16-byte boundaries. */
extern const usp_linear_family usp_linear_mma;
/* Everything else, in plain fp32: any element, stride and alignment, dims up to USP_LINEAR_MAX_DIM. */
extern const usp_linear_family usp_linear_any;
enum {
    USP_LINEAR_MAX_DIM = 1024,
    USP_SCAN_THREADS = 128 /* of one thread block of the scan: numbers of a state at least */
};

#ifdef __cplusplus
}
#endif
#endif
