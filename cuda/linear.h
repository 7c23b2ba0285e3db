/* linear.h - the families of kernels behind the linear attention entries of the CUDA device.
 * Only cuda/linear.c chooses between them; the scan of states has one kernel and no family. */
#ifndef USP_CUDA_LINEAR_H
#define USP_CUDA_LINEAR_H

#ifdef __cplusplus
extern "C" {
#endif
#include "device.h"

typedef enum usp_linear_call { USP_CALL_TOTALS, USP_CALL_OUTPUT, USP_CALL_APPLY } usp_linear_call;

/* Kernels that serve some arguments. `shared`: bytes of shared memory that they need of a block of threads. */
typedef struct usp_linear_family {
    const char *name;
    size_t (*shared)(int dim, int value_dim);
    int (*fits)(const usp_linear *args, usp_linear_call call);
    usp_status (*call[3])(const usp_linear *args, usp_stream stream); /* by usp_linear_call */
} usp_linear_family;

/* Tensor cores by mma.sync, sm_80 and up: 16-bit elements, dims 64 and 128, rows on 16-byte boundaries. */
extern const usp_linear_family usp_linear_mma;
/* Everything else, in plain fp32: any element, stride and alignment, dims up to USP_LINEAR_MAX_DIM. */
extern const usp_linear_family usp_linear_any;
enum { USP_LINEAR_MAX_DIM = 1024 };

#ifdef __cplusplus
}
#endif
#endif
