/* softmax_wgmma.cu - softmax attention on Hopper (sm_90a) as a family: which calls it serves, and its table. The
 * kernels are in softmax_wgmma_forward.cu and softmax_wgmma_backward.cu, for the widest heads softmax_wgmma_wide.cu. */
#include "softmax_extras.cuh"
#include "softmax_wgmma.cuh"

/* Each launcher knows what its shape takes, and asks no GPU but Hopper. */
static size_t least_shared(int, int) {
    return 227 * 1024;
}

/* Pairs of fp32 are written, or added to, at once. */
static bool pairs_aligned(const usp_tensor &x) {
    return x.data && (x.stride_token | x.stride_batch | x.stride_head) % 2 == 0 &&
           reinterpret_cast<uintptr_t>(x.data) % 8 == 0;
}

static bool result_fits(const usp_tensor &x, usp_dtype dtype) {
    return dtype == USP_F32 ? pairs_aligned(x) : usp_rows_aligned(x, 2);
}

static int fits(const usp_gpu *gpu, const usp_softmax *args, usp_softmax_call call) {
    const usp_softmax &a = *args;
    bool forward = call == USP_CALL_FORWARD;
    bool extras = has_extras(a) || (forward && a.peak);
    int widest = max(a.dim, a.value_dim), most = extras ? USP_WGMMA_EXTRAS_DIM : USP_WGMMA_DIM;
    if (!gpu->encode_map || a.dtype == USP_F32 || a.dim % 8 || a.value_dim % 8 || widest > most || !(a.scale > 0))
        return 0;
    if (!is_copied(a, false, a.q) || !is_copied(a, true, a.k) || !is_copied(a, true, a.v)) return 0;
    if (forward)
        return (!a.last || usp_rows_aligned(a.out, 2)) &&
               ((a.first && a.last) || pairs_aligned(usp_tensor{a.acc, 0, 0, 0}));
    return (!a.deterministic || a.turns) && is_copied(a, false, a.dout) && a.dq_sum.data &&
           is_copied(a, false, a.dq_sum, 4) && (!a.last || result_fits(a.dq, a.dtype)) &&
           result_fits(a.dk, a.key_dtype) && result_fits(a.dv, a.key_dtype);
}

extern "C" const usp_softmax_family usp_softmax_wgmma = {
    USP_SM_90A, least_shared, fits, {usp_softmax_wgmma_forward, usp_softmax_wgmma_backward}};
