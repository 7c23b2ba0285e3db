/* softmax_mma.cu - softmax attention on tensor cores as a family: which calls it serves, and its table. The kernels are
 * in softmax_mma_forward.cu and softmax_mma_backward.cu, two files so that they compile side by side. For sm_80 and
 * up. */
#include "softmax_mma.cuh"

static size_t most_shared(int, int) {
    return USP_LEAST_SHARED;
}

/* Pairs of fp32 are written at once. */
static bool pairs_aligned(const usp_tensor &x) {
    return ((x.stride_token | x.stride_batch | x.stride_head) % 2 == 0) && reinterpret_cast<uintptr_t>(x.data) % 8 == 0;
}

static bool result_fits(const usp_tensor &x, usp_dtype dtype) {
    return dtype == USP_F32 ? pairs_aligned(x) : usp_rows_aligned(x, 2);
}

/* Results of the last fold are of the call's dtype; sums are read or written by every other, and read by that one. */
static bool sums_fit(const usp_softmax &args, const usp_tensor &sum, const usp_tensor &result) {
    return (!args.last || result_fits(result, args.dtype)) && ((args.first && args.last) || pairs_aligned(sum));
}

static int fits(const usp_gpu *, const usp_softmax *args, usp_softmax_call call) {
    const usp_softmax &a = *args;
    if (a.dtype == USP_F32 || a.dim % 8 || a.value_dim % 8 || a.dim > 128 || a.value_dim > 128 || !(a.scale > 0))
        return 0;
    if (!usp_rows_aligned(a.q, 2) || !usp_rows_aligned(a.k, 2) || !usp_rows_aligned(a.v, 2)) return 0;
    if (call == USP_CALL_FORWARD) return sums_fit(a, usp_tensor{a.acc, 0, 0, 0}, a.out);
    return usp_rows_aligned(a.dout, 2) && sums_fit(a, a.dq_sum, a.dq) && result_fits(a.dk, a.key_dtype) &&
           result_fits(a.dv, a.key_dtype);
}

static usp_status backward(const usp_gpu *gpu, const usp_softmax *args, usp_stream stream) {
    USP_TRY(usp_softmax_mma_backward_query(gpu, args, stream));
    return usp_softmax_mma_backward_key(gpu, args, stream);
}

extern "C" const usp_softmax_family usp_softmax_mma = {
    USP_SM_80, most_shared, fits, {usp_softmax_mma_forward, backward}};
