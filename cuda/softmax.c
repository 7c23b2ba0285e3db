/* softmax.c - chooses the kernels of one softmax attention call: the one place where a new family is entered.
 * It launches nothing itself. */
#include "softmax.h"

#include "error.h"

/* The first family that fits is taken; the last one fits everything that `supports` lets through. */
static const usp_softmax_family *const families[] = {&usp_softmax_wgmma, &usp_softmax_mma, &usp_softmax_any};
enum { FAMILIES = sizeof families / sizeof *families };

/* Kernels count heads of all batch entries in an int. */
usp_status usp_cuda_softmax_supports(const usp_gpu *gpu, const usp_kernel_shape *shape) {
    int widest = shape->dim > shape->value_dim ? shape->dim : shape->value_dim;
    if (widest > USP_SOFTMAX_MAX_DIM) {
        return usp_fail(USP_UNSUPPORTED, "softmax attention on a GPU takes head_dim and value_dim up to %d, not %d",
                        USP_SOFTMAX_MAX_DIM, widest);
    }
    if ((int64_t)shape->batch * shape->heads > INT32_MAX) {
        return usp_fail(USP_UNSUPPORTED, "softmax attention on a GPU takes batch x heads up to %d, not %d x %d",
                        INT32_MAX, shape->batch, shape->heads);
    }
    size_t shared = usp_softmax_any.shared(shape->dim, shape->value_dim);
    if (shared > gpu->shared) {
        return usp_fail(USP_UNSUPPORTED,
                        "head_dim %d and value_dim %d need %zu bytes of shared memory, this GPU has %zu", shape->dim,
                        shape->value_dim, shared, gpu->shared);
    }
    return USP_OK;
}

int usp_cuda_softmax_sums_queries(const usp_gpu *gpu, const usp_kernel_shape *shape) {
    int widest = shape->dim > shape->value_dim ? shape->dim : shape->value_dim;
    return usp_gpu_runs(gpu, usp_softmax_wgmma.target) && shape->attention == USP_SOFTMAX && shape->dtype != USP_F32 &&
           widest <= USP_WGMMA_DIM;
}

static int serves(const usp_softmax_family *family, const usp_gpu *gpu, const usp_softmax *args,
                  usp_softmax_call call) {
    return usp_gpu_runs(gpu, family->target) && family->shared(args->dim, args->value_dim) <= gpu->shared &&
           family->fits(gpu, args, call);
}

static const usp_softmax_family *choose(const usp_gpu *gpu, const usp_softmax *args, usp_softmax_call call) {
    int i = 0;
    while (i < FAMILIES - 1 && !serves(families[i], gpu, args, call)) i++;
    return families[i];
}

usp_status usp_cuda_softmax_forward(const usp_gpu *gpu, const usp_softmax *args, usp_stream stream) {
    return choose(gpu, args, USP_CALL_FORWARD)->call[USP_CALL_FORWARD](gpu, args, stream);
}

usp_status usp_cuda_softmax_backward(const usp_gpu *gpu, const usp_softmax *args, usp_stream stream) {
    return choose(gpu, args, USP_CALL_BACKWARD)->call[USP_CALL_BACKWARD](gpu, args, stream);
}
