/* softmax.c - chooses the kernels of one softmax attention call: the one place where a new family is entered.
 * It launches nothing itself, but cuts a call that is too large for one launch. */
#include "softmax.h"

#include "error.h"

/* The first family that fits is taken; the last one fits everything that `supports` lets through. */
static const usp_softmax_family *const families[] = {&usp_softmax_mma, &usp_softmax_any};
enum { FAMILIES = sizeof families / sizeof *families };

enum { PARTS = USP_WORK_ROWS / USP_SOFTMAX_LEAST_ROWS }; /* thread blocks for a work item of one head at most */

/* A launch must hold one work item of all heads: the rest is cut. */
usp_status usp_cuda_softmax_supports(const usp_gpu *gpu, const usp_kernel_shape *shape) {
    int widest = shape->dim > shape->value_dim ? shape->dim : shape->value_dim;
    if (widest > USP_SOFTMAX_MAX_DIM) {
        return usp_fail(USP_UNSUPPORTED, "softmax attention on a GPU takes head_dim and value_dim up to %d, not %d",
                        USP_SOFTMAX_MAX_DIM, widest);
    }
    if ((int64_t)shape->batch * shape->heads > USP_CUDA_GRID / PARTS) {
        return usp_fail(USP_UNSUPPORTED, "softmax attention on a GPU takes batch x heads up to %d, not %d x %d",
                        USP_CUDA_GRID / PARTS, shape->batch, shape->heads);
    }
    size_t shared = usp_softmax_any.shared(shape->dim, shape->value_dim);
    if (shared > gpu->shared) {
        return usp_fail(USP_UNSUPPORTED,
                        "head_dim %d and value_dim %d need %zu bytes of shared memory, this GPU has %zu", shape->dim,
                        shape->value_dim, shared, gpu->shared);
    }
    return USP_OK;
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

/* Work items of one launch. Kernels count a whole bundle of heads in 32 bits, also where there are fewer. */
static int64_t most_works(const usp_softmax *args, usp_softmax_call call, int grid) {
    int64_t lines = (int64_t)args->batch * (call == USP_CALL_BACKWARD_KEY ? args->key_heads : args->heads);
    int64_t works = grid / (PARTS * (lines > USP_SOFTMAX_BUNDLE ? lines : USP_SOFTMAX_BUNDLE));
    return works > 0 ? works : 1;
}

/* Work items first .. first + count at most. */
static usp_softmax cut(const usp_softmax *args, int64_t first, int64_t count) {
    usp_softmax part = *args;
    part.tiles.work += first;
    part.tiles.works = (int)(args->tiles.works - first < count ? args->tiles.works - first : count);
    return part;
}

usp_status usp_cuda_softmax(const usp_gpu *gpu, const usp_softmax *args, usp_softmax_call call, int grid,
                            usp_stream stream) {
    const usp_softmax_family *family = choose(gpu, args, call);
    int64_t most = most_works(args, call, grid);
    for (int64_t first = 0; first < args->tiles.works; first += most) {
        usp_softmax part = cut(args, first, most);
        USP_TRY(family->call[call](gpu, &part, stream));
    }
    return USP_OK;
}
