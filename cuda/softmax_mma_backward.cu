/* softmax_mma_backward.cu - backward softmax attention on tensor cores (mma.sync, sm_80 and up), 16-bit elements, dims
 * up to 128: dq by work items of queries, dk and dv by work items of keys. No atomics: each row is summed by one block,
 * in order. */
#include "softmax_mma.cuh"

/* P = 2^(score scale2 - base). A row that allows no key has lse -inf: an infinite base makes its weights 0. */
static __device__ __forceinline__ float usp_base_of(float lse) {
    return lse == -INFINITY ? INFINITY : lse * USP_LOG2E;
}

/* to = factor * c (+ sum), as dtype to `result` if last, else into the sum. */
template <typename T, int M, int N>
static __device__ __forceinline__ void usp_deliver(usp_sums<M, N> &c, const usp_softmax &args, const usp_tensor &sum,
                                                   const usp_tensor &result, float factor, int64_t first_row, int head,
                                                   int batch, int rows, int dim) {
    float *running = args.first && args.last ? nullptr : usp_row<float>(sum, first_row, batch, head);
    usp_scale_add(c, factor, args.first ? nullptr : running, sum.stride_token, rows, dim);
    if (args.last)
        usp_store(c, usp_row<T>(result, first_row, batch, head), result.stride_token, rows, dim);
    else
        usp_store(c, running, sum.stride_token, rows, dim);
}

/* ---- dq ---------------------------------------------------------------------------------------------------------- */

template <int DIM, typename Shape> struct usp_backward_query_memory {
    static constexpr int step = Shape::step * DIM * 2, rows = Shape::rows * DIM * 2;
    static constexpr int q = 0, dout = q + rows, k = dout + rows, v = k + 2 * step;
    static constexpr int spoilt = v + 2 * step, bytes = spoilt + Shape::threads * 4;
};

/* Rows are queries: S = q k^T, dP = dout v^T, dq += P (dP - delta) k. */
template <typename T, int DIM, typename Shape>
static __global__ void __launch_bounds__(Shape::threads, Shape::resident)
    usp_softmax_backward_query_kernel(const __grid_constant__ usp_softmax args) {
    using memory = usp_backward_query_memory<DIM, Shape>;
    constexpr int M = Shape::blocks, N = Shape::step / 8, threads = Shape::threads;
    uint32_t base = usp_shared_base();
    usp_shared_rows<DIM> q = {base + memory::q}, dout = {base + memory::dout}, k = {base + memory::k},
                         v = {base + memory::v};

    usp_job job = usp_take_job(args, args.heads, Shape::rows);
    if (job.count <= 0) return;
    usp_spare_word(memory::spoilt) = 0;
    int key_head = usp_mapped_head(args.kv, job.head);
    int warp_row = threadIdx.x / 32 * M * 16, first_row = job.begin + warp_row, rows = job.count - warp_row;
    const T *keys = usp_row<T>(args.k, 0, job.batch, key_head), *values = usp_row<T>(args.v, 0, job.batch, key_head);
    auto fetch = [&](const usp_walk &at, int buffer) {
        int64_t column = at.column;
        usp_fetch<Shape::step, threads>(k.rows_from(buffer * Shape::step), keys + column * args.k.stride_token,
                                        args.k.stride_token, at.columns(), args.dim);
        usp_fetch<Shape::step, threads>(v.rows_from(buffer * Shape::step), values + column * args.v.stride_token,
                                        args.v.stride_token, at.columns(), args.value_dim);
    };

    usp_fetch<Shape::rows, threads>(q, usp_row<T>(args.q, job.begin, job.batch, job.head), args.q.stride_token,
                                    job.count, args.dim);
    usp_fetch<Shape::rows, threads>(dout, usp_row<T>(args.dout, job.begin, job.batch, job.head), args.dout.stride_token,
                                    job.count, args.value_dim);
    usp_walk walk(args.tiles, *job.work, 1);
    if (walk.running()) fetch(walk, 0);

    float scale2 = args.scale * USP_LOG2E, row_base[M * 2], row_delta[M * 2];
    int64_t line = ((int64_t)job.batch * args.heads + job.head) * args.queries + first_row;
#pragma unroll
    for (int i = 0; i < M * 2; i++) {
        int row = usp_lane_row(i / 2, i % 2);
        row_base[i] = row < rows ? usp_base_of(args.lse[line + row]) : INFINITY;
        row_delta[i] = row < rows ? args.delta[line + row] : 0;
    }

    usp_sums<M, DIM / 8> dq = {};
    for (int buffer = 0; walk.running(); buffer ^= 1) {
        usp_fetched();
        __syncthreads();
        usp_walk at = walk;
        walk.advance(Shape::step);
        if (walk.running()) fetch(walk, buffer ^ 1);
        usp_sums<M, N> p = {}, ds;
        usp_multiply_rows<T>(p, q.rows_from(warp_row), k.rows_from(buffer * Shape::step));
#pragma unroll
        for (int i = 0; i < M * N * 4; i++) {
            float &x = p[i / (N * 4)][i / 4 % N][i % 4];
            x = usp_exp2(fmaf(x, scale2, -row_base[i / (N * 4) * 2 + i % 4 / 2]));
            ds[i / (N * 4)][i / 4 % N][i % 4] = -row_delta[i / (N * 4) * 2 + i % 4 / 2];
        }
        usp_multiply_rows<T>(ds, dout.rows_from(warp_row), v.rows_from(buffer * Shape::step));
#pragma unroll
        for (int i = 0; i < M * N * 4; i++) ds[i / (N * 4)][i / 4 % N][i % 4] *= p[i / (N * 4)][i / 4 % N][i % 4];
        if (!at.full(Shape::step)) {
            usp_mask_pairs<false>(ds, usp_band(*job.work, at.tile()), first_row, at.column, 0);
            usp_shield<T, Shape::step, threads>(k.rows_from(buffer * Shape::step), usp_spare_word(memory::spoilt));
        }
        usp_multiply_columns<T>(dq, ds, k.rows_from(buffer * Shape::step));
    }
    usp_fetched();
    usp_deliver<T>(dq, args, args.dq_sum, args.dq, args.scale, first_row, job.head, job.batch, rows, args.dim);
    if (usp_spare_word(memory::spoilt)) usp_mend<T, false, Shape>(args, args.dq_sum, args.dq, args.k, args.dim);
}

/* ---- dk, dv ------------------------------------------------------------------------------------------------------ */

template <int DIM, typename Shape> struct usp_backward_key_memory {
    static constexpr int step = Shape::step * DIM * 2, rows = Shape::rows * DIM * 2, line = Shape::step * 4;
    static constexpr int k = 0, v = k + rows, q = v + rows, dout = q + 2 * step;
    static constexpr int lines = dout + 2 * step; /* [base, delta][buffer][column] */
    static constexpr int spoilt = lines + 4 * line, bytes = spoilt + Shape::threads * 4;
};

/* Rows are keys: S^T = k q^T, dv += P^T dout, dP^T = v dout^T, dk += P^T (dP^T - delta) q, over all the query heads
 * that read the key head. */
template <typename T, int DIM, typename Shape>
static __global__ void __launch_bounds__(Shape::threads, Shape::resident)
    usp_softmax_backward_key_kernel(const __grid_constant__ usp_softmax args) {
    using memory = usp_backward_key_memory<DIM, Shape>;
    constexpr int M = Shape::blocks, N = Shape::step / 8, threads = Shape::threads, step = Shape::step;
    static_assert(2 * step <= threads, "one thread for every lse and delta of a step");
    extern __shared__ __align__(1024) unsigned char bytes[];
    uint32_t base = usp_shared_base();
    usp_shared_rows<DIM> k = {base + memory::k}, v = {base + memory::v}, q = {base + memory::q},
                         dout = {base + memory::dout};
    float *lines = reinterpret_cast<float *>(bytes + memory::lines);

    usp_job job = usp_take_job(args, args.key_heads, Shape::rows);
    if (job.count <= 0) return;
    usp_spare_word(memory::spoilt) = 0;
    int warp_row = threadIdx.x / 32 * M * 16, first_row = job.begin + warp_row, rows = job.count - warp_row;
    usp_readers heads = usp_readers_of(args, job.head);

    /* The first `step` threads bring the columns' lse, the next their delta: into a register here, to memory when the
     * buffer is free and the value has arrived. */
    int line_column = threadIdx.x % step;
    auto fetch = [&](const usp_walk &at, int buffer) -> float {
        int head = heads.first + at.round;
        int64_t line = ((int64_t)job.batch * args.heads + head) * args.queries + at.column + line_column;
        usp_fetch<step, threads>(q.rows_from(buffer * step), usp_row<T>(args.q, at.column, job.batch, head),
                                 args.q.stride_token, at.columns(), args.dim);
        usp_fetch<step, threads>(dout.rows_from(buffer * step), usp_row<T>(args.dout, at.column, job.batch, head),
                                 args.dout.stride_token, at.columns(), args.value_dim);
        if (line_column >= at.columns() || threadIdx.x >= 2 * step) return 0;
        return threadIdx.x < step ? usp_base_of(args.lse[line]) : args.delta[line];
    };
    auto keep = [&](float value, int buffer) {
        if (threadIdx.x < 2 * step) lines[(threadIdx.x / step * 2 + buffer) * step + line_column] = value;
    };

    usp_fetch<Shape::rows, threads>(k, usp_row<T>(args.k, job.begin, job.batch, job.head), args.k.stride_token,
                                    job.count, args.dim);
    usp_fetch<Shape::rows, threads>(v, usp_row<T>(args.v, job.begin, job.batch, job.head), args.v.stride_token,
                                    job.count, args.value_dim);
    usp_walk walk(args.tiles, *job.work, max(heads.end - heads.first, 0));
    float line_value = walk.running() ? fetch(walk, 0) : 0;

    float scale2 = args.scale * USP_LOG2E;
    usp_sums<M, DIM / 8> dk = {}, dv = {};
    for (int buffer = 0; walk.running(); buffer ^= 1) {
        keep(line_value, buffer);
        usp_fetched();
        __syncthreads();
        usp_walk at = walk;
        walk.advance(step);
        if (walk.running()) line_value = fetch(walk, buffer ^ 1);
        const float *bases = lines + buffer * step, *deltas = bases + 2 * step;
        usp_sums<M, N> p = {}, ds;
        usp_multiply_rows<T>(p, k.rows_from(warp_row), q.rows_from(buffer * step));
#pragma unroll
        for (int n = 0; n < N; n++) {
            float2 column_base = *reinterpret_cast<const float2 *>(bases + usp_lane_column(n));
#pragma unroll
            for (int i = 0; i < M * 4; i++) {
                float &x = p[i / 4][n][i % 4];
                x = usp_exp2(fmaf(x, scale2, i % 2 ? -column_base.y : -column_base.x));
            }
        }
        if (!at.full(step)) {
            usp_mask_pairs<true>(p, usp_band(*job.work, at.tile()), first_row, at.column, 0);
            usp_shield<T, step, threads>(dout.rows_from(buffer * step), usp_spare_word(memory::spoilt));
        }
        usp_multiply_columns<T>(dv, p, dout.rows_from(buffer * step));
#pragma unroll
        for (int n = 0; n < N; n++) {
            float2 delta = *reinterpret_cast<const float2 *>(deltas + usp_lane_column(n));
#pragma unroll
            for (int i = 0; i < M * 4; i++) ds[i / 4][n][i % 4] = i % 2 ? -delta.y : -delta.x;
        }
        usp_multiply_rows<T>(ds, v.rows_from(warp_row), dout.rows_from(buffer * step));
#pragma unroll
        for (int i = 0; i < M * N * 4; i++) ds[i / (N * 4)][i / 4 % N][i % 4] *= p[i / (N * 4)][i / 4 % N][i % 4];
        if (!at.full(step)) {
            usp_mask_pairs<true>(ds, usp_band(*job.work, at.tile()), first_row, at.column, 0);
            usp_shield<T, step, threads>(q.rows_from(buffer * step), usp_spare_word(memory::spoilt));
        }
        usp_multiply_columns<T>(dk, ds, q.rows_from(buffer * step));
    }
    usp_fetched();
    usp_deliver<T>(dk, args, args.dk_sum, args.dk, args.scale, first_row, job.head, job.batch, rows, args.dim);
    usp_deliver<T>(dv, args, args.dv_sum, args.dv, 1, first_row, job.head, job.batch, rows, args.value_dim);
    if (usp_spare_word(memory::spoilt)) {
        usp_mend<T, true, Shape>(args, args.dk_sum, args.dk, args.q, args.dim);
        usp_mend<T, true, Shape>(args, args.dv_sum, args.dv, args.dout, args.value_dim);
    }
}

/* ---- launchers --------------------------------------------------------------------------------------------------- */

struct usp_backward_query_launch {
    static constexpr const char *what = "softmax backward for queries";
    template <int DIM> using shape = usp_backward_query_shape<DIM>;
    template <int DIM, typename Shape> using memory = usp_backward_query_memory<DIM, Shape>;
    static int heads(const usp_softmax &args) {
        return args.heads;
    }
    template <typename T, int DIM, typename Shape> static auto kernel() {
        return usp_softmax_backward_query_kernel<T, DIM, Shape>;
    }
};

struct usp_backward_key_launch {
    static constexpr const char *what = "softmax backward for keys";
    template <int DIM> using shape = usp_backward_key_shape<DIM>;
    template <int DIM, typename Shape> using memory = usp_backward_key_memory<DIM, Shape>;
    static int heads(const usp_softmax &args) {
        return args.key_heads;
    }
    template <typename T, int DIM, typename Shape> static auto kernel() {
        return usp_softmax_backward_key_kernel<T, DIM, Shape>;
    }
};

usp_status usp_softmax_mma_backward_query(const usp_gpu *gpu, const usp_softmax *args, usp_stream stream) {
    return usp_start_any<usp_backward_query_launch>(*gpu, *args, stream);
}

usp_status usp_softmax_mma_backward_key(const usp_gpu *gpu, const usp_softmax *args, usp_stream stream) {
    return usp_start_any<usp_backward_key_launch>(*gpu, *args, stream);
}
