/* softmax_mma.cuh - what the tensor-core kernels of softmax attention share on the host side and at their start and
 * end: shared memory, numbers that are not finite, the choice of a template instance. */
#ifndef USP_CUDA_SOFTMAX_MMA_CUH
#define USP_CUDA_SOFTMAX_MMA_CUH
#include "softmax.cuh"

/* The block's dynamic shared memory, which tiles need on a 256-byte boundary. */
static __device__ __forceinline__ uint32_t usp_shared_base() {
    extern __shared__ __align__(1024) unsigned char memory[];
    return (uint32_t)__cvta_generic_to_shared(memory);
}

/* ---- numbers that are not finite --------------------------------------------------------------------------------- */

/* A word of this thread in shared memory, for what is hardly ever touched: registers are dear. */
static __device__ __forceinline__ int &usp_spare_word(int offset) {
    extern __shared__ __align__(1024) unsigned char memory[];
    return reinterpret_cast<int *>(memory + offset)[threadIdx.x];
}

/* Before a product with weights of 0: makes what is not finite 0 in a tile; `spoilt` then tells to mend the results. A
 * barrier: all threads of the block take part. */
template <typename T, int ROWS, int THREADS, int DIM>
static __device__ __forceinline__ void usp_shield(usp_shared_rows<DIM> tile, int &spoilt) {
    if (!__syncthreads_or(usp_spoilt<T, ROWS, THREADS>(tile))) return;
#pragma unroll 1
    for (int at = threadIdx.x * 4; at < ROWS * tile.bytes; at += THREADS * 4) usp_clear_pair<T>(tile.base + at);
    spoilt = 1;
    __syncthreads();
}

/* Writes what is not finite in the columns of steps that need a mask to those rows of this block's job, in `result` or
 * the sums, that may pair with them. A thread has one element of all rows. */
template <typename T, bool KEY_ROWS, typename Shape>
static __device__ __noinline__ void usp_mend(const usp_softmax &args, usp_tensor sum, usp_tensor result,
                                             usp_tensor columns, int dim) {
    static_assert(Shape::threads >= 128, "a thread for every element");
    usp_job job = usp_take_job(args, KEY_ROWS ? args.key_heads : args.heads, Shape::rows);
    int key_head = usp_mapped_head(args.kv, job.head), element = threadIdx.x;
    usp_readers heads = KEY_ROWS ? usp_readers_of(args, job.head) : usp_readers{key_head, key_head + 1};
    usp_walk at(args.tiles, *job.work, max(heads.end - heads.first, 0));
    __syncthreads(); /* the rows are written */
    for (; at.running() && element < dim; at.advance(Shape::step)) {
        for (int j = at.column; j < min(at.column + Shape::step, at.end) && !at.full(Shape::step); j++) {
            float x = usp_to_float(usp_row<T>(columns, j, job.batch, heads.first + at.round)[element]);
            for (int row = job.begin; row < job.begin + job.count && !isfinite(x); row++) {
                if (!usp_band(*job.work, at.tile()).template allows<KEY_ROWS>(row, j)) continue;
                if (args.last)
                    usp_row<T>(result, row, job.batch, job.head)[element] = usp_from_float<T>(x);
                else
                    usp_row<float>(sum, row, job.batch, job.head)[element] = x;
            }
        }
    }
}

/* ---- launch ------------------------------------------------------------------------------------------------------ */

/* Would blocks of the shape leave multiprocessors idle? */
template <typename Shape> static bool usp_too_few(const usp_gpu &gpu, const usp_softmax &args, int heads) {
    return usp_jobs(args, heads, Shape::rows) < (int64_t)gpu.processors * Shape::resident;
}

template <typename Launch, typename T, int DIM, typename Shape>
static usp_status usp_start(const usp_gpu &gpu, const usp_softmax &args, usp_stream stream) {
    if constexpr (Shape::blocks > 1) {
        if (usp_too_few<Shape>(gpu, args, Launch::heads(args)))
            return usp_start<Launch, T, DIM, usp_half_shape<Shape>>(gpu, args, stream);
    }
    constexpr int bytes = Launch::template memory<DIM, Shape>::bytes;
    static_assert(bytes <= USP_LEAST_SHARED, "tiles must fit every GPU");
    static_assert(Shape::rows >= USP_SOFTMAX_LEAST_ROWS, "a grid must hold all jobs");
    return usp_launch_jobs(Launch::what, Launch::template kernel<T, DIM, Shape>(), args, Launch::heads(args),
                           Shape::rows, Shape::threads, bytes, stream);
}

/* DIM is 64 or 128, whichever is the first to hold both dims; what is beyond the dims is zeros. */
template <typename Launch, typename T>
static usp_status usp_start_type(const usp_gpu &gpu, const usp_softmax &args, usp_stream stream) {
    if (args.dim <= 64 && args.value_dim <= 64)
        return usp_start<Launch, T, 64, typename Launch::template shape<64>>(gpu, args, stream);
    return usp_start<Launch, T, 128, typename Launch::template shape<128>>(gpu, args, stream);
}

/* Launch describes a kernel template: what (for errors), shape<DIM>, memory<DIM, Shape>, heads and
 * kernel<T, DIM, Shape>. */
template <typename Launch>
static usp_status usp_start_any(const usp_gpu &gpu, const usp_softmax &args, usp_stream stream) {
    if (args.dtype == USP_F16) return usp_start_type<Launch, __half>(gpu, args, stream);
    return usp_start_type<Launch, __nv_bfloat16>(gpu, args, stream);
}

/* ---- the launchers of the family --------------------------------------------------------------------------------- */

extern "C" {
usp_status usp_softmax_mma_forward(const usp_gpu *gpu, const usp_softmax *args, usp_stream stream);
usp_status usp_softmax_mma_backward_query(const usp_gpu *gpu, const usp_softmax *args, usp_stream stream);
usp_status usp_softmax_mma_backward_key(const usp_gpu *gpu, const usp_softmax *args, usp_stream stream);
}

#endif
