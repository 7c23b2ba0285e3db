/* softmax_query_sums.cuh - fp32 sums of dq, where kernels add to them in any order: they begin as 0 and become dq. */
#ifndef USP_CUDA_SOFTMAX_QUERY_SUMS_CUH
#define USP_CUDA_SOFTMAX_QUERY_SUMS_CUH
#include "launch.cuh"
#include "softmax.cuh"

constexpr int SUM_THREADS = 256;

/* A thread's pairs of elements of all rows: to 0, or from the sums to dq. */
template <typename T, bool FINISH>
static __global__ void __launch_bounds__(SUM_THREADS)
    softmax_query_sums_kernel(const __grid_constant__ usp_softmax args) {
    int64_t pairs = (int64_t)args.queries * args.batch * args.heads * (args.dim / 2);
    for (int64_t i = (int64_t)blockIdx.x * SUM_THREADS + threadIdx.x; i < pairs;
         i += (int64_t)gridDim.x * SUM_THREADS) {
        int64_t row = i / (args.dim / 2), token = row / args.heads / args.batch;
        int element = (int)(i % (args.dim / 2)) * 2, head = (int)(row % args.heads);
        int batch = (int)(row / args.heads % args.batch);
        float2 *sum = reinterpret_cast<float2 *>(usp_row<float>(args.dq_sum, token, batch, head) + element);
        if (FINISH)
            *reinterpret_cast<uint32_t *>(usp_row<T>(args.dq, token, batch, head) + element) =
                usp_pack<T>(sum->x, sum->y);
        else
            *sum = make_float2(0, 0);
    }
}

template <typename T, bool FINISH>
static usp_status pass_sums(const usp_gpu *gpu, const usp_softmax *args, usp_stream stream) {
    int64_t pairs = args->queries * args->batch * args->heads * (args->dim / 2), most = gpu->processors * 8;
    int64_t blocks = (pairs + SUM_THREADS - 1) / SUM_THREADS;
    if (blocks == 0) return USP_OK;
    return usp_cuda_launch("softmax sums of dq", softmax_query_sums_kernel<T, FINISH>,
                           dim3((unsigned)(blocks < most ? blocks : most)), dim3(SUM_THREADS), 0, stream, *args);
}

#endif
