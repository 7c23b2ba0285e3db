/* softmax_query_sums.cuh - fp32 sums of dq, where kernels add to them in any order: they begin as 0 and become dq. */
#ifndef USP_CUDA_SOFTMAX_QUERY_SUMS_CUH
#define USP_CUDA_SOFTMAX_QUERY_SUMS_CUH
#include "launch.cuh"
#include "softmax.cuh"

constexpr int SUM_THREADS = 256;

/* Eight elements a thread, of every so many rows: to 0, or from the sums to dq. */
template <typename T, bool FINISH>
static __global__ void __launch_bounds__(SUM_THREADS)
    softmax_query_sums_kernel(const __grid_constant__ usp_softmax args) {
    begin_kernel();
    int chunks = args.dim / 8, rows = SUM_THREADS / chunks, row = threadIdx.x / chunks;
    int element = threadIdx.x % chunks * 8, lines = args.batch * args.heads;
    if (row >= rows) return;
    for (int line = blockIdx.y; line < lines; line += gridDim.y) {
        int batch = line / args.heads, head = line % args.heads;
        for (int64_t token = (int64_t)blockIdx.x * rows + row; token < args.queries;
             token += (int64_t)gridDim.x * rows) {
            float4 *sum = reinterpret_cast<float4 *>(usp_row<float>(args.dq_sum, token, batch, head) + element);
            if (FINISH) {
                float4 a = sum[0], b = sum[1];
                *reinterpret_cast<uint4 *>(usp_row<T>(args.dq, token, batch, head) + element) = make_uint4(
                    usp_pack<T>(a.x, a.y), usp_pack<T>(a.z, a.w), usp_pack<T>(b.x, b.y), usp_pack<T>(b.z, b.w));
            } else {
                sum[0] = sum[1] = make_float4(0, 0, 0, 0);
            }
        }
    }
}

template <typename T, bool FINISH>
static usp_status pass_sums(const usp_gpu *gpu, const usp_softmax *args, usp_stream stream) {
    int64_t rows = SUM_THREADS / (args->dim / 8), blocks = (args->queries + rows - 1) / rows;
    unsigned lines = lines_of(*args, false), most = (unsigned)gpu->processors * 8;
    if (blocks == 0 || lines == 0) return USP_OK;
    dim3 grid((unsigned)(blocks < most ? blocks : most), lines < 65535 ? lines : 65535);
    return usp_cuda_launch("softmax sums of dq", softmax_query_sums_kernel<T, FINISH>, grid, dim3(SUM_THREADS), 0,
                           stream, *args);
}

#endif
