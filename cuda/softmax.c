/* softmax.c - chooses the kernels of one softmax attention call: the one place where a new family is entered.
 * It launches nothing itself. */
#include "softmax.h"

#include "error.h"
#include "launch.h"

/* The first family that fits is taken; the last one fits everything that `supports` lets through. */
static const usp_softmax_family *const families[] = {&usp_softmax_mma, &usp_softmax_any};
enum { FAMILIES = sizeof families / sizeof *families };

usp_status usp_cuda_softmax_supports(const usp_kernel_shape *shape) {
    int widest = shape->dim > shape->value_dim ? shape->dim : shape->value_dim;
    if (widest > USP_SOFTMAX_MAX_DIM) {
        return usp_fail(USP_UNSUPPORTED, "softmax attention on a GPU takes head_dim and value_dim up to %d, not %d",
                        USP_SOFTMAX_MAX_DIM, widest);
    }
    size_t shared = usp_softmax_any.shared(shape->dim, shape->value_dim), limit = usp_cuda_shared_limit();
    if (shared > limit) {
        return usp_fail(USP_UNSUPPORTED,
                        "head_dim %d and value_dim %d need %zu bytes of shared memory, this GPU has %zu", shape->dim,
                        shape->value_dim, shared, limit);
    }
    return USP_OK;
}

static usp_status dispatch(const usp_softmax *args, usp_softmax_call call, usp_stream stream) {
    size_t limit = usp_cuda_shared_limit();
    int i = 0;
    while (i < FAMILIES - 1 &&
           (families[i]->shared(args->dim, args->value_dim) > limit || !families[i]->fits(args, call)))
        i++;
    return families[i]->call[call](args, stream);
}

usp_status usp_cuda_softmax_forward(const usp_softmax *args, usp_stream stream) {
    return dispatch(args, USP_CALL_FORWARD, stream);
}

usp_status usp_cuda_softmax_backward_query(const usp_softmax *args, usp_stream stream) {
    return dispatch(args, USP_CALL_BACKWARD_QUERY, stream);
}

usp_status usp_cuda_softmax_backward_key(const usp_softmax *args, usp_stream stream) {
    return dispatch(args, USP_CALL_BACKWARD_KEY, stream);
}
