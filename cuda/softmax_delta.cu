/* softmax_delta.cu - rowsum(dout * out), which backward takes off every gradient of a weight.
 * A warp sums a row; nothing is exchanged between warps. For sm_80 and up. */
#include "softmax.cuh"

constexpr int USP_DELTA_WARPS = 8;

/* A warp for one row of one head of one batch entry, heads running fastest as they usually do in memory. */
template <typename T>
static __global__ void __launch_bounds__(USP_DELTA_WARPS * 32)
    usp_softmax_delta_kernel(const __grid_constant__ usp_softmax args, float *delta) {
    int64_t rows = args.queries * args.batch * args.heads, stride = (int64_t)gridDim.x * USP_DELTA_WARPS;
    for (int64_t row = (int64_t)blockIdx.x * USP_DELTA_WARPS + threadIdx.x / 32; row < rows; row += stride) {
        int head = (int)(row % args.heads), batch = (int)(row / args.heads % args.batch);
        int64_t token = row / args.heads / args.batch;
        const T *dout = usp_row<T>(args.dout, token, batch, head), *out = usp_row<T>(args.out, token, batch, head);
        float sum = 0;
        for (int d = threadIdx.x % 32; d < args.value_dim; d += 32)
            sum = fmaf(usp_to_float(dout[d]), usp_to_float(out[d]), sum);
        sum = usp_warp_sum(sum);
        if (threadIdx.x % 32 == 0) delta[((int64_t)batch * args.heads + head) * args.queries + token] = sum;
    }
}

/* ---- launcher ---------------------------------------------------------------------------------------------------- */

usp_status usp_cuda_softmax_delta(const usp_softmax *args, float *delta, usp_stream stream) {
    int64_t rows = args->queries * args->batch * args->heads, blocks = (rows + USP_DELTA_WARPS - 1) / USP_DELTA_WARPS;
    if (rows == 0) return USP_OK;
    auto kernel = usp_of_dtype(args->dtype, usp_softmax_delta_kernel<float>, usp_softmax_delta_kernel<__half>,
                               usp_softmax_delta_kernel<__nv_bfloat16>);
    return usp_cuda_launch("softmax delta", kernel, dim3((unsigned)(blocks < INT32_MAX ? blocks : INT32_MAX)),
                           dim3(USP_DELTA_WARPS * 32), 0, stream, *args, delta);
}
