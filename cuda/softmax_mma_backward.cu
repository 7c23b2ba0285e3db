/* softmax_mma_backward.cu - backward softmax attention on tensor cores (mma.sync, sm_80 and up), 16-bit elements, dims
 * up to 128: dq by work items of queries, dk and dv by work items of keys. No atomics: each row is summed by one block,
 * in order. */
#include "softmax_extras.cuh"

/* Writes rows of a job to a tensor, fp32 if `wide`, else T. */
template <typename T, int M, int N>
static __device__ __forceinline__ void store_rows(const usp_sums<M, N> &c, const usp_tensor &to, bool wide,
                                                  int64_t first_row, const softmax_job &job, int rows, int dim) {
    if (wide)
        usp_store(c, usp_row<float>(to, first_row, job.batch, job.head), to.stride_token, rows, dim);
    else
        usp_store(c, usp_row<T>(to, first_row, job.batch, job.head), to.stride_token, rows, dim);
}

/* Columns are queries: P = 2^(score scale2 - base) * factor. */
template <int M, int N>
static __device__ __forceinline__ void weigh_columns(usp_sums<M, N> &p, const float *bases, const float *factors,
                                                     float scale2) {
#pragma unroll
    for (int n = 0; n < N; n++) {
        float2 base = *reinterpret_cast<const float2 *>(bases + usp_lane_column(n));
        float2 factor = *reinterpret_cast<const float2 *>(factors + usp_lane_column(n));
#pragma unroll
        for (int i = 0; i < M * 4; i++) {
            float &x = p[i / 4][n][i % 4];
            x = fast_exp2(fmaf(x, scale2, i % 2 ? -base.y : -base.x)) * (i % 2 ? factor.y : factor.x);
        }
    }
}

/* The sums of dP - delta begin with -delta. */
template <int M, int N>
static __device__ __forceinline__ void begin_with_deltas(usp_sums<M, N> &ds, const float *deltas) {
#pragma unroll
    for (int n = 0; n < N; n++) {
        float2 delta = *reinterpret_cast<const float2 *>(deltas + usp_lane_column(n));
#pragma unroll
        for (int i = 0; i < M * 4; i++) ds[i / 4][n][i % 4] = i % 2 ? -delta.y : -delta.x;
    }
}

/* The words of a step's queries, where there is dropout. */
static __device__ __forceinline__ void keep_words(uint64_t *words, const usp_softmax &args, const softmax_job &job,
                                                  int first_head, const tile_walk &at, int step) {
    if (args.dropout.rate > 0 && threadIdx.x < step && threadIdx.x < at.columns())
        words[threadIdx.x] = dropout_row(args, job.batch, first_head + at.round, at.column + threadIdx.x);
}

/* ---- dq ---------------------------------------------------------------------------------------------------------- */

template <int DIM, typename Shape, bool EXTRAS> struct backward_query_memory {
    static constexpr int step = Shape::step * DIM * 2, rows = Shape::rows * DIM * 2;
    static constexpr int q = 0, dout = q + rows, k = dout + rows, v = k + 2 * step;
    static constexpr int note = v + 2 * step;
    using pairs = shared_pairs<false, Shape, note + NOTE_BYTES>;
    static constexpr int words = pairs::end;
    static constexpr int bytes = words + (EXTRAS ? Shape::rows * 8 : 0);
};

/* What is kept of a query; nothing if it does not exist. */
static __device__ __forceinline__ row_state load_state(const usp_softmax &args, int64_t line, bool exists) {
    return exists ? row_state{args.top[line], args.sum[line]} : row_state{-INFINITY, 0};
}

/* Rows are queries: S = q k^T, dP = dout v^T, dq += P (dP - delta) k. A row's factor waits for the end. */
template <typename T, int DIM, typename Shape, bool EXTRAS>
static __global__ void __launch_bounds__(Shape::threads, Shape::resident)
    softmax_backward_query_kernel(const __grid_constant__ usp_softmax args) {
    begin_kernel();
    using memory = backward_query_memory<DIM, Shape, EXTRAS>;
    using pairs = typename memory::pairs;
    constexpr int M = Shape::blocks, N = Shape::step / 8, threads = Shape::threads;
    uint32_t base = shared_base();
    usp_shared_rows<DIM> q = {base + memory::q}, dout = {base + memory::dout}, k = {base + memory::k},
                         v = {base + memory::v};

    softmax_job job = take_job<false>(args, Shape::rows);
    if (job.count <= 0) return;
    block_note &note = *shared_at<block_note>(memory::note);
    note = {job, 0};
    int key_head = usp_mapped_head(args.kv, job.head);
    int warp_row = threadIdx.x / 32 * M * 16, first_row = job.begin + warp_row, rows = job.count - warp_row;
    const T *keys = usp_row<T>(args.k, 0, job.batch, key_head), *values = usp_row<T>(args.v, 0, job.batch, key_head);
    auto fetch = [&](const tile_walk &at, int buffer) {
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
    tile_walk walk(args.by_query, *job.work, 1);
    if (walk.running()) fetch(walk, 0);
    if (walk.running() && !walk.full(Shape::step)) pairs::fetch_columns(args.pairs, walk);
    pairs::fetch_rows(args.pairs, job);

    scoring rule(args, job.head);
    float row_base[M * 2], row_delta[M * 2];
    int64_t line = line_of(args, job.batch, job.head, first_row);
#pragma unroll
    for (int i = 0; i < M * 2; i++) {
        int row = usp_lane_row(i / 2, i % 2);
        row_base[i] = base_of(load_state(args, line + row, row < rows));
        row_delta[i] = row < rows ? args.delta[line + row] : 0;
    }
    if (EXTRAS) load_words(shared_at<uint64_t>(memory::words), args, job);

    usp_sums<M, DIM / 8> dq = {};
    for (int buffer = 0; walk.running(); buffer ^= 1) {
        usp_fetched();
        __syncthreads();
        lane_place at = {first_row, rows, walk.column, walk.columns()};
        bool full = walk.full(Shape::step);
        walk.advance(Shape::step);
        if (walk.running()) fetch(walk, buffer ^ 1);
        usp_sums<M, N> p = {}, ds = {};
        usp_multiply_rows<T>(p, q.rows_from(warp_row), k.rows_from(buffer * Shape::step));
        if constexpr (!EXTRAS) {
#pragma unroll
            for (int i = 0; i < M * N * 4; i++) {
                float &x = p[i / (N * 4)][i / 4 % N][i % 4];
                x = fast_exp2(fmaf(x, rule.unit, -row_base[i / (N * 4) * 2 + i % 4 / 2]));
                ds[i / (N * 4)][i / 4 % N][i % 4] = -row_delta[i / (N * 4) * 2 + i % 4 / 2];
            }
        }
        usp_multiply_rows<T>(ds, dout.rows_from(warp_row), v.rows_from(buffer * Shape::step));
        if constexpr (EXTRAS) {
            const uint64_t *words = shared_at<uint64_t>(memory::words) + warp_row;
            bend_gradients<false>(
                p, ds, args, rule,
                [&](int r) {
                    int row = usp_lane_row(r / 2, r % 2);
                    int diagonal = bias_position(args, args.pairs.diagonal, first_row, row, rows);
                    return query_line{row_base[r], 1, row_delta[r], diagonal, words[row]};
                },
                [&](int i) { return load_or(args.pairs.key, at.column, i, at.columns, 0); });
        } else {
#pragma unroll
            for (int i = 0; i < M * N * 4; i++) ds[i / (N * 4)][i / 4 % N][i % 4] *= p[i / (N * 4)][i / 4 % N][i % 4];
        }
        if (!full) {
            pairs::mask(ds, args.pairs, warp_row, 0);
            shield<T, Shape::step, threads>(k.rows_from(buffer * Shape::step), note.spoilt);
        }
        if (walk.running() && !walk.full(Shape::step)) pairs::fetch_columns(args.pairs, walk);
        usp_multiply_columns<T>(dq, ds, k.rows_from(buffer * Shape::step));
    }
    usp_fetched();
    __syncthreads(); /* a job without columns has met none since its note */

    job = note.job;
    first_row = job.begin + warp_row, rows = job.count - warp_row;
    line = line_of(args, job.batch, job.head, first_row);
#pragma unroll
    for (int i = 0; i < M * 2; i++) {
        int row = usp_lane_row(i / 2, i % 2);
        multiply_row(i, dq, args.scale * factor_of(load_state(args, line + row, row < rows)));
    }
    if (!args.first)
        usp_scale_add(dq, 1, usp_row<float>(args.dq_sum, first_row, job.batch, job.head), args.dq_sum.stride_token,
                      rows, args.dim);
    store_rows<T>(dq, args.last ? args.dq : args.dq_sum, !args.last, first_row, job, rows, args.dim);
    if (!note.spoilt) return;
    __syncthreads();
    mend<T, false>(args, note.job, Shape::step, false, threadIdx.x, args.last ? args.dq : args.dq_sum, !args.last,
                   args.k, args.dim);
}

/* ---- dk, dv ------------------------------------------------------------------------------------------------------ */

template <int DIM, typename Shape, bool EXTRAS> struct backward_key_memory {
    static constexpr int step = Shape::step * DIM * 2, rows = Shape::rows * DIM * 2, line = Shape::step * 4;
    static constexpr int k = 0, v = k + rows, q = v + rows, dout = q + 2 * step;
    static constexpr int lines = dout + 2 * step; /* [base, delta, factor][buffer][column] */
    static constexpr int note = lines + 6 * line;
    using pairs = shared_pairs<true, Shape, note + NOTE_BYTES>;
    static constexpr int words = pairs::end;
    static constexpr int bytes = words + (EXTRAS ? 2 * Shape::step * 8 : 0);
};

/* Rows are keys: S^T = k q^T, dv += P^T dout, dP^T = v dout^T, dk += P^T (dP^T - delta) q, over all the query heads
 * that read the key head. With extras both products come first: what drops a pair is asked once. */
template <typename T, int DIM, typename Shape, bool EXTRAS>
static __global__ void __launch_bounds__(Shape::threads, Shape::resident)
    softmax_backward_key_kernel(const __grid_constant__ usp_softmax args) {
    begin_kernel();
    using memory = backward_key_memory<DIM, Shape, EXTRAS>;
    using pairs = typename memory::pairs;
    constexpr int M = Shape::blocks, N = Shape::step / 8, threads = Shape::threads, step = Shape::step;
    static_assert(2 * step <= threads, "one thread for every state and delta of a step");
    uint32_t base = shared_base();
    usp_shared_rows<DIM> k = {base + memory::k}, v = {base + memory::v}, q = {base + memory::q},
                         dout = {base + memory::dout};
    float *lines = shared_at<float>(memory::lines);

    softmax_job job = take_job<true>(args, Shape::rows);
    if (job.count <= 0) return;
    block_note &note = *shared_at<block_note>(memory::note);
    note = {job, 0};
    int warp_row = threadIdx.x / 32 * M * 16, first_row = job.begin + warp_row, rows = job.count - warp_row;
    head_range heads = readers_of(args, job.head);

    /* The first `step` threads bring what is kept of the columns, the next their delta: into registers here, to memory
     * when the buffer is free and the values have arrived. */
    int line_column = threadIdx.x % step;
    auto fetch = [&](const tile_walk &at, int buffer) -> row_state {
        int head = heads.first + at.round;
        int64_t line = line_of(args, job.batch, head, at.column + line_column);
        usp_fetch<step, threads>(q.rows_from(buffer * step), usp_row<T>(args.q, at.column, job.batch, head),
                                 args.q.stride_token, at.columns(), args.dim);
        usp_fetch<step, threads>(dout.rows_from(buffer * step), usp_row<T>(args.dout, at.column, job.batch, head),
                                 args.dout.stride_token, at.columns(), args.value_dim);
        if (line_column >= at.columns() || threadIdx.x >= 2 * step) return {-INFINITY, 0};
        if (threadIdx.x >= step) return {args.delta[line], 0};
        return {args.top[line], args.sum[line]};
    };
    auto keep = [&](row_state value, int buffer) {
        float *to = lines + buffer * step + line_column;
        if (threadIdx.x < step) to[0] = base_of(value), to[4 * step] = factor_of(value);
        if (threadIdx.x >= step && threadIdx.x < 2 * step) to[2 * step] = value.top;
    };

    usp_fetch<Shape::rows, threads>(k, usp_row<T>(args.k, job.begin, job.batch, job.head), args.k.stride_token,
                                    job.count, args.dim);
    usp_fetch<Shape::rows, threads>(v, usp_row<T>(args.v, job.begin, job.batch, job.head), args.v.stride_token,
                                    job.count, args.value_dim);
    tile_walk walk(args.by_key, *job.work, max(heads.end - heads.first, 0));
    row_state line_value = {};
    if (walk.running()) line_value = fetch(walk, 0);
    if (walk.running() && !walk.full(Shape::step)) pairs::fetch_columns(args.pairs, walk);
    pairs::fetch_rows(args.pairs, job);

    float scale2 = args.scale * LOG2E;
    usp_sums<M, DIM / 8> dk = {}, dv = {};
    for (int buffer = 0; walk.running(); buffer ^= 1) {
        keep(line_value, buffer);
        if (EXTRAS) keep_words(shared_at<uint64_t>(memory::words) + buffer * step, args, job, heads.first, walk, step);
        usp_fetched();
        __syncthreads();
        lane_place at = {first_row, rows, walk.column, walk.columns()};
        bool full = walk.full(step);
        int head = heads.first + walk.round;
        walk.advance(step);
        if (walk.running()) line_value = fetch(walk, buffer ^ 1);
        const float *bases = lines + buffer * step, *deltas = bases + 2 * step, *factors = bases + 4 * step;
        usp_sums<M, N> p = {}, ds = {};
        usp_multiply_rows<T>(p, k.rows_from(warp_row), q.rows_from(buffer * step));
        if constexpr (EXTRAS) {
            const uint64_t *words = shared_at<uint64_t>(memory::words) + buffer * step;
            usp_multiply_rows<T>(ds, v.rows_from(warp_row), dout.rows_from(buffer * step));
            bend_gradients<true>(
                p, ds, args, scoring(args, head),
                [&](int i) {
                    int diagonal = bias_position(args, args.pairs.diagonal, at.column, i, at.columns);
                    return query_line{bases[i], factors[i], deltas[i], diagonal, words[i]};
                },
                [&](int r) { return load_or(args.pairs.key, first_row, usp_lane_row(r / 2, r % 2), rows, 0); });
        } else {
            weigh_columns(p, bases, factors, scale2);
        }
        if (!full) {
            pairs::mask(p, args.pairs, warp_row, 0);
            shield<T, step, threads>(dout.rows_from(buffer * step), note.spoilt);
        }
        usp_multiply_columns<T>(dv, p, dout.rows_from(buffer * step));
        if constexpr (!EXTRAS) {
            begin_with_deltas(ds, deltas);
            usp_multiply_rows<T>(ds, v.rows_from(warp_row), dout.rows_from(buffer * step));
#pragma unroll
            for (int i = 0; i < M * N * 4; i++) ds[i / (N * 4)][i / 4 % N][i % 4] *= p[i / (N * 4)][i / 4 % N][i % 4];
        }
        if (!full) {
            pairs::mask(ds, args.pairs, warp_row, 0);
            shield<T, step, threads>(q.rows_from(buffer * step), note.spoilt);
        }
        if (walk.running() && !walk.full(Shape::step)) pairs::fetch_columns(args.pairs, walk);
        usp_multiply_columns<T>(dk, ds, q.rows_from(buffer * step));
    }
    usp_fetched();
    __syncthreads(); /* a job without columns has met none since its note */

    job = note.job;
    first_row = job.begin + warp_row, rows = job.count - warp_row;
    bool wide = args.key_dtype == USP_F32;
#pragma unroll
    for (int i = 0; i < M * 2; i++) {
        multiply_row(i, dk, args.scale);
        if (EXTRAS) multiply_row(i, dv, 1 / (1 - args.dropout.rate));
    }
    store_rows<T>(dk, args.dk, wide, first_row, job, rows, args.dim);
    store_rows<T>(dv, args.dv, wide, first_row, job, rows, args.value_dim);
    if (note.spoilt) {
        __syncthreads();
        mend<T, true>(args, note.job, Shape::step, false, threadIdx.x, args.dk, wide, args.q, args.dim);
        mend<T, true>(args, note.job, Shape::step, false, threadIdx.x, args.dv, wide, args.dout, args.value_dim);
    }
}

/* ---- launchers --------------------------------------------------------------------------------------------------- */

struct backward_query_launch {
    static constexpr const char *what = "softmax backward for queries";
    static constexpr bool key_rows = false;
    template <int DIM> using shape = usp_backward_query_shape<DIM>;
    template <int DIM, typename Shape, bool EXTRAS> using memory = backward_query_memory<DIM, Shape, EXTRAS>;
    static bool extras(const usp_softmax &args) {
        return has_extras(args);
    }
    template <typename T, int DIM, typename Shape, bool EXTRAS> static auto kernel() {
        return softmax_backward_query_kernel<T, DIM, Shape, EXTRAS>;
    }
};

struct backward_key_launch {
    static constexpr const char *what = "softmax backward for keys";
    static constexpr bool key_rows = true;
    template <int DIM> using shape = usp_backward_key_shape<DIM>;
    template <int DIM, typename Shape, bool EXTRAS> using memory = backward_key_memory<DIM, Shape, EXTRAS>;
    static bool extras(const usp_softmax &args) {
        return has_extras(args);
    }
    template <typename T, int DIM, typename Shape, bool EXTRAS> static auto kernel() {
        return softmax_backward_key_kernel<T, DIM, Shape, EXTRAS>;
    }
};

usp_status usp_softmax_mma_backward_query(const usp_gpu *gpu, const usp_softmax *args, usp_stream stream) {
    return start_any<backward_query_launch>(*gpu, *args, stream);
}

usp_status usp_softmax_mma_backward_key(const usp_gpu *gpu, const usp_softmax *args, usp_stream stream) {
    return start_any<backward_key_launch>(*gpu, *args, stream);
}
