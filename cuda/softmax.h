/* softmax.h - the softmax attention entries of the CUDA device, and the families of kernels behind them.
 * Entries behave as lib/device.h says; only cuda/softmax.c chooses between families. */
#ifndef USP_CUDA_SOFTMAX_H
#define USP_CUDA_SOFTMAX_H

#ifdef __cplusplus
extern "C" {
#endif
#include "launch.h"

/* ---- entries, as device.c calls them ----------------------------------------------------------------------------- */

/* UNSUPPORTED with the reason, or OK. */
usp_status usp_cuda_softmax_supports(const usp_gpu *gpu, const usp_kernel_shape *shape);
/* May backward be one kernel, which wants sums of dq? */
int usp_cuda_softmax_sums_queries(const usp_gpu *gpu, const usp_kernel_shape *shape);
usp_status usp_cuda_softmax_forward(const usp_gpu *gpu, const usp_softmax *args, usp_stream stream);
usp_status usp_cuda_softmax_backward(const usp_gpu *gpu, const usp_softmax *args, usp_stream stream);
/* One kernel each, no family. */
usp_status usp_cuda_softmax_delta(const usp_softmax *args, float *delta, usp_stream stream);
usp_status usp_cuda_softmax_sinks(const usp_softmax *args, float *gradient, usp_stream stream);
usp_status usp_cuda_softmax_peaks(const usp_softmax *args, float *most, usp_stream stream);

/* ---- families ---------------------------------------------------------------------------------------------------- */

typedef enum usp_softmax_call { USP_CALL_FORWARD, USP_CALL_BACKWARD } usp_softmax_call;

/* Kernels that serve some arguments, on GPUs that run their target. `shared`: bytes of shared memory that they need of
 * a thread block; `fits` is asked only where the GPU has these. One call's families may differ from the next one's:
 * softmax.cuh says what they keep of a row. */
typedef struct usp_softmax_family {
    usp_cuda_target target;
    size_t (*shared)(int dim, int value_dim);
    int (*fits)(const usp_gpu *gpu, const usp_softmax *args, usp_softmax_call call);
    usp_status (*call[2])(const usp_gpu *gpu, const usp_softmax *args, usp_stream stream); /* by usp_softmax_call */
} usp_softmax_family;

/* Hopper: tensor cores by wgmma, tiles by the copy engine. 16-bit elements, rows on 16-byte boundaries; dims up
 * to 256, 128 with extras. Backward is one kernel with sums of dq in memory. */
extern const usp_softmax_family usp_softmax_wgmma;
/* Tensor cores by mma.sync, sm_80 and up: 16-bit elements, dims up to 128, rows on 16-byte boundaries. Backward is two
 * kernels: dq by work items of queries, dk and dv by work items of keys. */
extern const usp_softmax_family usp_softmax_mma;
usp_status usp_softmax_mma_backward_query(const usp_gpu *gpu, const usp_softmax *args, usp_stream stream);
usp_status usp_softmax_mma_backward_key(const usp_gpu *gpu, const usp_softmax *args, usp_stream stream);
/* Everything else, in plain fp32: any element, stride and alignment, dims up to USP_SOFTMAX_MAX_DIM. */
extern const usp_softmax_family usp_softmax_any;
enum {
    USP_WGMMA_DIM = 256,
    USP_WGMMA_EXTRAS_DIM = 128,
    USP_WGMMA_SCRATCH = 16, /* bytes of usp_softmax.scratch: blocks ask there for jobs */
    USP_SOFTMAX_MAX_DIM = 512,
    USP_SOFTMAX_BUNDLE = 16 /* heads, of all batch entries, that are worked on side by side */
};

#ifdef __cplusplus
}
#endif
#endif
