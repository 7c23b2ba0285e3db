/* softmax_wgmma_forward.cu - forward softmax attention on Hopper (sm_90a): calls of one stage. */
#include "softmax_wgmma_forward_kernel.cuh"

extern "C" usp_status usp_softmax_wgmma_forward(const usp_gpu *gpu, const usp_softmax *args, usp_stream stream) {
    return args->ring ? usp_softmax_wgmma_ring_forward(gpu, args, stream) : start_forward<false>(gpu, args, stream);
}
