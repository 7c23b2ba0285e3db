/* softmax.h - the softmax attention entries of the CUDA device, and the families of kernels behind them.
 * Entries behave as lib/device.h says; only cuda/softmax.c chooses between families. */
#ifndef USP_CUDA_SOFTMAX_H
#define USP_CUDA_SOFTMAX_H

#ifdef __cplusplus
extern "C" {
#endif
#include "launch.h"

/* ---- entries, as device.c calls them ----------------------------------------------------------------------------- */

typedef enum usp_softmax_call { USP_CALL_FORWARD, USP_CALL_BACKWARD_QUERY, USP_CALL_BACKWARD_KEY } usp_softmax_call;

/* UNSUPPORTED with the reason, or OK. */
usp_status usp_cuda_softmax_supports(const usp_gpu *gpu, const usp_kernel_shape *shape);
/* `grid`: USP_CUDA_GRID. */
usp_status usp_cuda_softmax(const usp_gpu *gpu, const usp_softmax *args, usp_softmax_call call, int grid,
                            usp_stream stream);
usp_status usp_cuda_softmax_delta(const usp_softmax *args, float *delta, usp_stream stream); /* one kernel, no family */

/* ---- families ---------------------------------------------------------------------------------------------------- */

/* Kernels that serve some arguments, on GPUs that run their target. `shared`: bytes of shared memory that they need of
 * a thread block; `fits` is asked only where the GPU has these. */
typedef struct usp_softmax_family {
    usp_cuda_target target;
    size_t (*shared)(int dim, int value_dim);
    int (*fits)(const usp_gpu *gpu, const usp_softmax *args, usp_softmax_call call);
    usp_status (*call[3])(const usp_gpu *gpu, const usp_softmax *args, usp_stream stream); /* by usp_softmax_call */
} usp_softmax_family;

/* Tensor cores by mma.sync, sm_80 and up: 16-bit elements, dims up to 128, rows on 16-byte boundaries. */
extern const usp_softmax_family usp_softmax_mma;
/* Everything else, in plain fp32: any element, stride and alignment, dims up to USP_SOFTMAX_MAX_DIM. */
extern const usp_softmax_family usp_softmax_any;
enum {
    USP_SOFTMAX_MAX_DIM = 512,
    USP_SOFTMAX_LEAST_ROWS = 16, /* of a work item that one thread block takes at least */
    USP_SOFTMAX_BUNDLE = 16      /* heads, of all batch entries, that are worked on side by side */
};

#ifdef __cplusplus
}
#endif
#endif
