/* softmax_rows.cu - softmax attention's sums over rows, which meet no pair: delta = rowsum(dout * out), which backward
 * takes off every gradient of a weight, the gradient of sinks, and the largest scores. For sm_80 and up. */
#include "softmax.cuh"

/* ---- delta ------------------------------------------------------------------------------------------------------- */

constexpr int DELTA_WARPS = 8;

/* A warp for one row of one head of one batch entry, heads running fastest as they usually do in memory. */
template <typename T>
static __global__ void __launch_bounds__(DELTA_WARPS * 32)
    softmax_delta_kernel(const __grid_constant__ usp_softmax args, float *delta) {
    int64_t rows = args.queries * args.batch * args.heads, stride = (int64_t)gridDim.x * DELTA_WARPS;
    for (int64_t row = (int64_t)blockIdx.x * DELTA_WARPS + threadIdx.x / 32; row < rows; row += stride) {
        int head = (int)(row % args.heads), batch = (int)(row / args.heads % args.batch);
        int64_t token = row / args.heads / args.batch, line = line_of(args, batch, head, token);
        const T *dout = usp_row<T>(args.dout, token, batch, head), *out = usp_row<T>(args.out, token, batch, head);
        float sum = 0;
        for (int d = threadIdx.x % 32; d < args.value_dim; d += 32) {
            float x = usp_to_float(out[d]); /* 0, as in rows that see no key: dout may be NaN */
            if (x != 0) sum = fmaf(usp_to_float(dout[d]), x, sum);
        }
        sum = usp_warp_sum(sum);
        if (threadIdx.x % 32 == 0) delta[line] = args.dlse ? sum - args.dlse[line] : sum;
    }
}

usp_status usp_cuda_softmax_delta(const usp_softmax *args, float *delta, usp_stream stream) {
    int64_t rows = args->queries * args->batch * args->heads, blocks = (rows + DELTA_WARPS - 1) / DELTA_WARPS;
    if (rows == 0) return USP_OK;
    auto kernel = usp_of_dtype(args->dtype, softmax_delta_kernel<float>, softmax_delta_kernel<__half>,
                               softmax_delta_kernel<__nv_bfloat16>);
    return usp_cuda_launch("softmax delta", kernel, dim3((unsigned)(blocks < INT32_MAX ? blocks : INT32_MAX)),
                           dim3(DELTA_WARPS * 32), 0, stream, *args, delta);
}

/* ---- heads ------------------------------------------------------------------------------------------------------- */

constexpr int HEAD_THREADS = 1024;

/* Folds the numbers of all threads of the block into that of thread 0, in a fixed order. */
template <typename Fold> static __device__ float fold_block(float x, const Fold &fold) {
    __shared__ float of[HEAD_THREADS];
    of[threadIdx.x] = x;
    for (int half = HEAD_THREADS / 2; half > 0; half /= 2) {
        __syncthreads();
        if ((int)threadIdx.x < half) of[threadIdx.x] = fold(of[threadIdx.x], of[threadIdx.x + half]);
    }
    return of[0];
}

/* Folds value(line) of all rows of a head in all batch entries; a block has a head. */
template <typename Value, typename Fold>
static __device__ void fold_head(float *result, const usp_softmax &args, float begin, const Value &value,
                                 const Fold &fold) {
    for (int64_t i = threadIdx.x; i < args.batch * args.queries; i += HEAD_THREADS)
        begin = fold(begin, value(line_of(args, (int)(i / args.queries), blockIdx.x, i % args.queries)));
    float all = fold_block(begin, fold);
    if (threadIdx.x == 0) result[blockIdx.x] = all;
}

/* A sink weighs as a key of its score would, and has no value: its dS is - P delta. */
static __global__ void __launch_bounds__(HEAD_THREADS)
    softmax_sinks_kernel(const __grid_constant__ usp_softmax args, float *gradient) {
    float sink = args.sinks[blockIdx.x] * LOG2E;
    auto value = [&](int64_t line) {
        row_state row = {args.top[line], args.sum[line]};
        return row.sum == 0 ? 0 : -exp2f(sink - row.top) * factor_of(row) * args.delta[line];
    };
    fold_head(gradient, args, 0, value, [](float a, float b) { return a + b; });
}

static __global__ void __launch_bounds__(HEAD_THREADS)
    softmax_peaks_kernel(const __grid_constant__ usp_softmax args, float *most) {
    auto value = [&](int64_t line) { return args.peak[line]; };
    fold_head(most, args, -INFINITY, value, [](float a, float b) { return fmaxf(a, b); });
}

static usp_status launch_heads(const char *what, void (*kernel)(usp_softmax, float *), const usp_softmax *args,
                               float *result, usp_stream stream) {
    if (args->heads == 0) return USP_OK;
    return usp_cuda_launch(what, kernel, dim3((unsigned)args->heads), dim3(HEAD_THREADS), 0, stream, *args, result);
}

usp_status usp_cuda_softmax_sinks(const usp_softmax *args, float *gradient, usp_stream stream) {
    return launch_heads("softmax sinks", softmax_sinks_kernel, args, gradient, stream);
}

usp_status usp_cuda_softmax_peaks(const usp_softmax *args, float *most, usp_stream stream) {
    return launch_heads("softmax peaks", softmax_peaks_kernel, args, most, stream);
}
