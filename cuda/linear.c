/* linear.c - chooses the kernels of one linear attention call: the one place where a new family is entered.
 * It launches nothing itself. */
#include "linear.h"

#include "error.h"
#include "launch.h"

/* The first family that fits is taken; the last one fits everything that `supports` lets through. */
static const usp_linear_family *const families[] = {&usp_linear_mma, &usp_linear_any};
enum { FAMILIES = sizeof families / sizeof *families };

usp_status usp_cuda_linear_supports(const usp_kernel_shape *shape) {
    int widest = shape->dim > shape->value_dim ? shape->dim : shape->value_dim;
    if (widest <= USP_LINEAR_MAX_DIM) return USP_OK;
    return usp_fail(USP_UNSUPPORTED, "linear attention on a GPU takes head_dim and value_dim up to %d, not %d",
                    USP_LINEAR_MAX_DIM, widest);
}

static int serves(const usp_linear_family *family, const usp_linear *args, usp_linear_call call, size_t limit) {
    return family->shared(args->dim, args->value_dim) <= limit && family->fits(args, call);
}

static usp_status dispatch(const usp_linear *args, usp_linear_call call, usp_stream stream) {
    size_t limit = usp_cuda_shared_limit();
    int64_t places = (int64_t)args->batch * args->heads;
    int i = 0;
    if (args->blocks == 0 || places == 0) return USP_OK;
    if (places > INT32_MAX / args->blocks)
        return usp_fail(USP_UNSUPPORTED, "linear attention: %d blocks of %lld heads are more than one launch takes",
                        args->blocks, (long long)places);
    while (i < FAMILIES - 1 && !serves(families[i], args, call, limit)) i++;
    return families[i]->call[call](args, stream);
}

usp_status usp_cuda_linear_totals(const usp_linear *args, usp_stream stream) {
    return dispatch(args, USP_CALL_TOTALS, stream);
}

usp_status usp_cuda_linear_output(const usp_linear *args, usp_stream stream) {
    return dispatch(args, USP_CALL_OUTPUT, stream);
}

usp_status usp_cuda_linear_apply(const usp_linear *args, usp_stream stream) {
    return dispatch(args, USP_CALL_APPLY, stream);
}
