/* softmax_mma.cuh - what the tensor-core kernels of softmax attention share on the host side and at their start: shared
 * memory and the choice of a template instance. It computes nothing. */
#ifndef USP_CUDA_SOFTMAX_MMA_CUH
#define USP_CUDA_SOFTMAX_MMA_CUH
#include "softmax.cuh"

/* The block's dynamic shared memory, which tiles need on a 256-byte boundary. */
static __device__ __forceinline__ uint32_t usp_shared_base() {
    extern __shared__ __align__(1024) unsigned char memory[];
    return (uint32_t)__cvta_generic_to_shared(memory);
}

/* Would blocks of the shape leave multiprocessors idle? */
template <typename Shape> static bool usp_too_few(const usp_softmax &args, int heads) {
    int device = 0, processors = 0;
    if (cudaGetDevice(&device) != cudaSuccess) return false;
    if (cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) return false;
    return usp_jobs(args, heads, Shape::rows) < (int64_t)processors * Shape::resident;
}

template <typename Launch, typename T, int DIM, typename Shape>
static usp_status usp_start(const usp_softmax &args, usp_stream stream) {
    if constexpr (Shape::blocks > 1) {
        if (usp_too_few<Shape>(args, Launch::heads(args)))
            return usp_start<Launch, T, DIM, usp_half_shape<Shape>>(args, stream);
    }
    constexpr int bytes = Launch::template memory<DIM, Shape>::bytes;
    static_assert(bytes <= USP_LEAST_SHARED, "tiles must fit every GPU");
    static_assert(Shape::rows >= USP_SOFTMAX_LEAST_ROWS, "a grid must hold all jobs");
    return usp_launch_jobs(Launch::what, Launch::template kernel<T, DIM, Shape>(), args, Launch::heads(args),
                           Shape::rows, Shape::threads, bytes, stream);
}

/* DIM is 64 or 128, whichever is the first to hold both dims; what is beyond the dims is zeros. */
template <typename Launch, typename T> static usp_status usp_start_type(const usp_softmax &args, usp_stream stream) {
    if (args.dim <= 64 && args.value_dim <= 64)
        return usp_start<Launch, T, 64, typename Launch::template shape<64>>(args, stream);
    return usp_start<Launch, T, 128, typename Launch::template shape<128>>(args, stream);
}

/* Launch describes a kernel template: what (for errors), shape<DIM>, memory<DIM, Shape>, heads and
 * kernel<T, DIM, Shape>. */
template <typename Launch> static usp_status usp_start_any(const usp_softmax &args, usp_stream stream) {
    if (args.dtype == USP_F16) return usp_start_type<Launch, __half>(args, stream);
    return usp_start_type<Launch, __nv_bfloat16>(args, stream);
}

/* ---- the launchers of the family --------------------------------------------------------------------------------- */

extern "C" {
usp_status usp_softmax_mma_forward(const usp_softmax *args, usp_stream stream);
usp_status usp_softmax_mma_backward_query(const usp_softmax *args, usp_stream stream);
usp_status usp_softmax_mma_backward_key(const usp_softmax *args, usp_stream stream);
}

#endif
