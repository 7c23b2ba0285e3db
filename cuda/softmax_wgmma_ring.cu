/* softmax_wgmma_ring.cu - forward softmax attention on Hopper (sm_90a): calls that are given all stages of a ring. */
#include "softmax_wgmma_forward_kernel.cuh"

extern "C" usp_status usp_softmax_wgmma_ring_forward(const usp_gpu *gpu, const usp_softmax *args, usp_stream stream) {
    return start_forward<true>(gpu, args, stream);
}
