/* softmax_mma.cuh - what the tensor-core kernels of softmax attention share on the host side and at their start: shared
 * memory and the choice of a template instance. It computes nothing. */
#ifndef USP_CUDA_SOFTMAX_MMA_CUH
#define USP_CUDA_SOFTMAX_MMA_CUH
#include "softmax.cuh"

/* The block's dynamic shared memory, which tiles need on a 1024-byte boundary. */
static __device__ __forceinline__ uint32_t usp_shared_base()
{
    extern __shared__ __align__(1024) unsigned char memory[];
    return (uint32_t)__cvta_generic_to_shared(memory);
}

/* Launch::with<T, DIM>: DIM 64 or 128, whichever is the first to hold both dims; what is beyond the dims is zeros. */
template <typename Launch> static usp_status usp_with_instance(const usp_softmax &args, usp_stream stream)
{
    bool narrow = args.dim <= 64 && args.value_dim <= 64;
    if (args.dtype == USP_F16)
        return narrow ? Launch::template with<__half, 64>(args, stream) : Launch::template with<__half, 128>(args, stream);
    return narrow ? Launch::template with<__nv_bfloat16, 64>(args, stream)
                  : Launch::template with<__nv_bfloat16, 128>(args, stream);
}

extern "C" {
usp_status usp_softmax_mma_forward(const usp_softmax *args, usp_stream stream);
}

#endif
