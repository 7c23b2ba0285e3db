/* linear.c - chooses the kernels of one linear attention call: the one place where a new family is entered.
 * It launches nothing itself, but cuts a call that is too large for one launch. */
#include "linear.h"

#include "error.h"

/* The first family that fits is taken; the last one fits everything that `supports` lets through. */
static const usp_linear_family *const families[] = {&usp_linear_mma, &usp_linear_any};
enum { FAMILIES = sizeof families / sizeof *families };

/* A launch must hold one block of all heads, and the scan one state: the rest is cut. */
usp_status usp_cuda_linear_supports(const usp_kernel_shape *shape) {
    int widest = shape->dim > shape->value_dim ? shape->dim : shape->value_dim;
    int64_t places = (int64_t)shape->batch * shape->heads;
    if (widest > USP_LINEAR_MAX_DIM) {
        return usp_fail(USP_UNSUPPORTED, "linear attention on a GPU takes head_dim and value_dim up to %d, not %d",
                        USP_LINEAR_MAX_DIM, widest);
    }
    if (places > USP_CUDA_GRID) {
        return usp_fail(USP_UNSUPPORTED, "linear attention on a GPU takes batch x heads up to %d, not %d x %d",
                        USP_CUDA_GRID, shape->batch, shape->heads);
    }
    if (places * shape->dim * shape->value_dim > (int64_t)USP_CUDA_GRID * USP_SCAN_THREADS) {
        return usp_fail(USP_UNSUPPORTED,
                        "linear attention on a GPU takes a state of up to %lld numbers, not batch %d x heads %d x "
                        "head_dim %d x value_dim %d",
                        (long long)USP_CUDA_GRID * USP_SCAN_THREADS, shape->batch, shape->heads, shape->dim,
                        shape->value_dim);
    }
    return USP_OK;
}

static int serves(const usp_linear_family *family, const usp_gpu *gpu, const usp_linear *args, usp_linear_call call) {
    return usp_gpu_runs(gpu, family->target) && family->shared(args->dim, args->value_dim) <= gpu->shared &&
           family->fits(gpu, args, call);
}

static const usp_linear_family *choose(const usp_gpu *gpu, const usp_linear *args, usp_linear_call call) {
    int i = 0;
    while (i < FAMILIES - 1 && !serves(families[i], gpu, args, call)) i++;
    return families[i];
}

/* Blocks first .. first + count at most. Apply has a state a chunk, the others one a block. */
static usp_linear cut(const usp_linear *args, usp_linear_call call, int64_t first, int64_t count) {
    usp_linear part = *args;
    part.block += first;
    part.blocks = (int)(args->blocks - first < count ? args->blocks - first : count);
    if (call != USP_CALL_APPLY) part.states += first * args->batch * args->heads * args->dim * args->value_dim;
    return part;
}

usp_status usp_cuda_linear(const usp_gpu *gpu, const usp_linear *args, usp_linear_call call, int grid,
                           usp_stream stream) {
    int64_t places = (int64_t)args->batch * args->heads;
    if (places == 0) return USP_OK;
    const usp_linear_family *family = choose(gpu, args, call);
    int64_t most = grid > places ? grid / places : 1; /* blocks of one launch */
    for (int64_t first = 0; first < args->blocks; first += most) {
        usp_linear part = cut(args, call, first, most);
        USP_TRY(family->call[call](gpu, &part, stream));
    }
    return USP_OK;
}
