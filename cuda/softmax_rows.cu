/* softmax_rows.cu - softmax attention's sums over rows, which meet no pair: delta = rowsum(dout * out), which backward
 * takes off every gradient of a weight, the gradient of sinks, and the largest scores. For sm_80 and up. */
#include "softmax.cuh"

/* ---- delta ------------------------------------------------------------------------------------------------------- */

constexpr int DELTA_THREADS = 256;

/* One of LANES lanes' part of a row: eight elements at a time, or one. An element of out that is 0 counts nothing, as
 * in rows that see no key: dout may be NaN. */
template <int LANES, typename T>
static __device__ __forceinline__ float part_by_eight(const T *dout, const T *out, int lane, int dim) {
    float sum = 0;
#pragma unroll 2
    for (int d = lane * 8; d < dim; d += LANES * 8) {
        uint4 x = *reinterpret_cast<const uint4 *>(out + d), y = *reinterpret_cast<const uint4 *>(dout + d);
        const uint32_t outs[4] = {x.x, x.y, x.z, x.w}, douts[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float2 a = usp_unpack<T>(outs[i]), b = usp_unpack<T>(douts[i]);
            if (a.x != 0) sum = fmaf(b.x, a.x, sum);
            if (a.y != 0) sum = fmaf(b.y, a.y, sum);
        }
    }
    return sum;
}

template <int LANES, typename T>
static __device__ __forceinline__ float part_by_one(const T *dout, const T *out, int lane, int dim) {
    float sum = 0;
    for (int d = lane; d < dim; d += LANES) {
        float x = usp_to_float(out[d]);
        if (x != 0) sum = fmaf(usp_to_float(dout[d]), x, sum);
    }
    return sum;
}

/* LANES lanes for a row of one head of one batch entry; a block has consecutive rows of a head. */
template <typename T, bool EIGHT, int LANES>
static __global__ void __launch_bounds__(DELTA_THREADS)
    softmax_delta_kernel(const __grid_constant__ usp_softmax args, float *delta) {
    begin_kernel();
    constexpr int rows = DELTA_THREADS / LANES;
    int row = threadIdx.x / LANES, lane = threadIdx.x % LANES, lines = args.batch * args.heads;
    for (int line = blockIdx.y; line < lines; line += gridDim.y) {
        int batch = line / args.heads, head = line % args.heads;
        for (int64_t first = (int64_t)blockIdx.x * rows; first < args.queries; first += (int64_t)gridDim.x * rows) {
            int64_t token = first + row, at = line * args.queries + token;
            const T *dout = usp_row<T>(args.dout, token, batch, head), *out = usp_row<T>(args.out, token, batch, head);
            int dim = token < args.queries ? args.value_dim : 0;
            float sum;
            if constexpr (EIGHT)
                sum = part_by_eight<LANES>(dout, out, lane, dim);
            else
                sum = part_by_one<LANES>(dout, out, lane, dim);
#pragma unroll
            for (int mask = LANES / 2; mask > 0; mask /= 2) sum += __shfl_xor_sync(~0u, sum, mask);
            if (lane == 0 && token < args.queries) delta[at] = args.dlse ? sum - args.dlse[at] : sum;
        }
    }
}

template <typename T, bool EIGHT, int LANES>
static usp_status start_delta(const usp_softmax *args, float *delta, usp_stream stream) {
    constexpr int rows = DELTA_THREADS / LANES, most = 1 << 20;
    int64_t blocks = (args->queries + rows - 1) / rows, lines = (int64_t)args->batch * args->heads;
    if (blocks == 0 || lines == 0) return USP_OK;
    dim3 grid((unsigned)(blocks < most ? blocks : most), (unsigned)(lines < 65535 ? lines : 65535));
    return usp_cuda_launch("softmax delta", softmax_delta_kernel<T, EIGHT, LANES>, grid, dim3(DELTA_THREADS), 0, stream,
                           *args, delta);
}

template <typename T> static usp_status start_delta_16(const usp_softmax *args, float *delta, usp_stream stream) {
    bool eight = args->value_dim % 8 == 0 && usp_rows_aligned(args->out, 2) && usp_rows_aligned(args->dout, 2);
    return eight ? start_delta<T, true, 8>(args, delta, stream) : start_delta<T, false, 32>(args, delta, stream);
}

usp_status usp_cuda_softmax_delta(const usp_softmax *args, float *delta, usp_stream stream) {
    switch (args->dtype) {
    case USP_F16:
        return start_delta_16<__half>(args, delta, stream);
    case USP_BF16:
        return start_delta_16<__nv_bfloat16>(args, delta, stream);
    default:
        return start_delta<float, false, 32>(args, delta, stream);
    }
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
    begin_kernel();
    float sink = args.sinks[blockIdx.x] * LOG2E;
    auto value = [&](int64_t line) {
        row_state row = {args.top[line], args.sum[line]};
        return row.sum == 0 ? 0 : -exp2f(sink - row.top) * factor_of(row) * args.delta[line];
    };
    fold_head(gradient, args, 0, value, [](float a, float b) { return a + b; });
}

static __global__ void __launch_bounds__(HEAD_THREADS)
    softmax_peaks_kernel(const __grid_constant__ usp_softmax args, float *most) {
    begin_kernel();
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
