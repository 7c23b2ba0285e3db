/* softmax_any.cu - softmax attention for any element type, dim, stride, alignment and scale, in plain fp32.
 * It is simple rather than fast: a warp has ROWS rows, a lane one of 32 columns at a time. For sm_80 and up. */
#include "softmax.cuh"

constexpr int WARPS = 4, ROWS = 4, BLOCK = WARPS * ROWS;
constexpr int WIDTH = USP_SOFTMAX_MAX_DIM / 32; /* sums of one row that a lane keeps at most */

/* Elements of a row in shared memory; the rest up to here is zero. */
static __host__ __device__ __forceinline__ int padded(int dim) {
    return (dim + 31) / 32 * 32;
}

/* Columns lie one element further apart, so that 32 lanes reading 32 columns use 32 banks. */
static __host__ __device__ __forceinline__ int pitch(int dim) {
    return padded(dim) + 1;
}

/* Copies `count` rows as fp32; rows from `rows` on are zero. All warps take part. */
template <typename T>
static __device__ void stage_rows(float *to, int pitch, int count, const T *from, int64_t stride, int rows, int dim) {
    for (int row = threadIdx.x / 32; row < count; row += WARPS) {
        for (int d = threadIdx.x % 32; d < padded(dim); d += 32)
            to[row * pitch + d] = row < rows && d < dim ? usp_to_float(from[row * stride + d]) : 0;
    }
}

/* Products of this warp's rows with this lane's column. */
static __device__ void dots(float (&s)[ROWS], const float *rows, const float *columns, int dim) {
    const float *column = columns + threadIdx.x % 32 * pitch(dim);
    for (int r = 0; r < ROWS; r++) s[r] = 0;
#pragma unroll 4
    for (int d = 0; d < dim; d++) {
#pragma unroll
        for (int r = 0; r < ROWS; r++) s[r] = fmaf(rows[r * padded(dim) + d], column[d], s[r]);
    }
}

/* Elements lane, lane + 32, ... of this warp's rows. */
using row_sums = float[ROWS][WIDTH];

/* Which pairs of this warp's rows and the 32 columns are allowed: bit j for the column of lane j. */
struct warp_pairs {
    unsigned row[ROWS];

    __device__ __forceinline__ bool mine(int r) const {
        return row[r] >> threadIdx.x % 32 & 1;
    }
};

/* sums += p times columns, over allowed pairs alone: 0 times a NaN would be a NaN. p is held by lanes, one column
 * each. */
static __device__ void add_weighted(row_sums &sums, const float (&p)[ROWS], const warp_pairs &pairs,
                                    const float *columns, int dim) {
    for (int j = 0; j < 32; j++) {
        float weight[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; r++) weight[r] = __shfl_sync(~0u, p[r], j);
        const float *column = columns + j * pitch(dim) + threadIdx.x % 32;
#pragma unroll
        for (int i = 0; i < WIDTH; i++) {
            if (i * 32 >= dim) break;
            float x = column[i * 32];
#pragma unroll
            for (int r = 0; r < ROWS; r++)
                sums[r][i] = pairs.row[r] >> j & 1 ? fmaf(weight[r], x, sums[r][i]) : sums[r][i];
        }
    }
}

/* This warp's rows of a block: global index of the first, and how many there are (may be negative). */
struct warp_rows {
    int first, count;
};

static __device__ __forceinline__ warp_rows rows_of_warp(const softmax_job &job) {
    int skipped = threadIdx.x / 32 * ROWS;
    return {job.begin + skipped, min(job.count - skipped, ROWS)};
}

/* `column` is this lane's, of those before `end`. */
template <bool KEY_ROWS>
static __device__ __forceinline__ warp_pairs allowed_pairs(const usp_pairs &pairs, const warp_rows &rows, int column,
                                                           int end) {
    warp_pairs allowed;
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        int row = rows.first + r;
        bool mine =
            r < rows.count && column < end && pair_allowed(pairs, KEY_ROWS ? column : row, KEY_ROWS ? row : column);
        allowed.row[r] = __ballot_sync(~0u, mine);
    }
    return allowed;
}

/* What an allowed pair asks of its score and of dropout. */
struct pair_rule {
    float score, bend; /* in base 2, before the unit; its gradient by the product, over the scale */
    bool kept;
};

/* Must this pair of a query head be dropped? */
static __device__ __forceinline__ bool drops(const usp_softmax &args, int batch, int head, int query, int position) {
    if (!(args.dropout.rate > 0)) return false;
    uint32_t number = usp_dropout_number(dropout_row(args, batch, head, query), position);
    return number < usp_dropout_limit(args.dropout.rate);
}

static __device__ __forceinline__ pair_rule rule_of(const usp_softmax &args, const scoring &rule, float product,
                                                    int batch, int head, int query, int key) {
    pair_rule pair;
    int position = args.pairs.key[key];
    unsigned distance = args.slopes ? __sad(args.pairs.diagonal[query], position, 0u) : 0;
    pair.score = rule.score(product, distance, pair.bend);
    pair.kept = !drops(args, batch, head, query, position);
    return pair;
}

/* to = row * factor. */
template <typename T> static __device__ void put_row(const float (&row)[WIDTH], T *to, float factor, int dim) {
#pragma unroll
    for (int i = 0; i < WIDTH; i++) {
        int d = i * 32 + threadIdx.x % 32;
        if (d < dim) to[d] = usp_from_float<T>(row[i] * factor);
    }
}

/* row = row * factor + from. */
static __device__ void add_row(float (&row)[WIDTH], const float *from, float factor, int dim) {
#pragma unroll
    for (int i = 0; i < WIDTH; i++) {
        int d = i * 32 + threadIdx.x % 32;
        if (d < dim) row[i] = row[i] * factor + from[d];
    }
}

/* Row `row` of a job to a tensor, fp32 if `wide`, else T. */
template <typename T>
static __device__ void store_row(const float (&row)[WIDTH], const usp_tensor &to, bool wide, int at,
                                 const softmax_job &job, float factor, int dim) {
    if (wide)
        put_row(row, usp_row<float>(to, at, job.batch, job.head), factor, dim);
    else
        put_row(row, usp_row<T>(to, at, job.batch, job.head), factor, dim);
}

static __device__ __forceinline__ float warp_max(float x) {
    for (int offset = 16; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, offset));
    return x;
}

/* ---- forward ----------------------------------------------------------------------------------------------------- */

/* Turns this lane's score into its weight; -inf is no key, and a NaN, which no maximum sees, stays one. */
static __device__ float weigh_any(row_state &row, float (&sums)[WIDTH], float score, float unit) {
    float top = fmaxf(row.top, warp_max(score * unit)), base = finite_base(top);
    float factor = exp2f(row.top - base), weight = exp2f(fmaf(score, unit, -base));
    row = {top, row.sum * factor + usp_warp_sum(weight)};
    for (int i = 0; i < WIDTH; i++) sums[i] *= factor;
    return weight;
}

template <typename T>
static __global__ void __launch_bounds__(WARPS * 32)
    softmax_forward_any_kernel(const __grid_constant__ usp_softmax args) {
    begin_kernel();
    extern __shared__ float shared[];
    float *q = shared, *columns = q + BLOCK * padded(args.dim);
    softmax_job job = take_job<false>(args, BLOCK);
    if (job.count <= 0) return;
    warp_rows rows = rows_of_warp(job);
    int key_head = usp_mapped_head(args.kv, job.head);
    int64_t line = line_of(args, job.batch, job.head, rows.first);
    usp_tensor acc = acc_tensor(args);
    scoring rule(args, job.head);

    stage_rows(q, padded(args.dim), BLOCK, usp_row<T>(args.q, job.begin, job.batch, job.head), args.q.stride_token,
               job.count, args.dim);
    row_sums out = {};
    row_state state[ROWS];
    float peak[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        state[r] = {-INFINITY, 0};
        peak[r] = -INFINITY;
        if (args.first || r >= rows.count) continue;
        state[r] = {args.top[line + r], args.sum[line + r]};
        add_row(out[r], usp_row<float>(acc, rows.first + r, job.batch, job.head), 0, args.value_dim);
    }
    for (tile_walk at(args.by_query, *job.work, 1); at.running(); at.advance(32)) {
        int column = at.column + threadIdx.x % 32;
        warp_pairs pairs = allowed_pairs<false>(args.pairs, rows, column, at.end);
        float p[ROWS];
        __syncthreads();
        stage_rows(columns, pitch(args.dim), 32, usp_row<T>(args.k, at.column, job.batch, key_head),
                   args.k.stride_token, at.columns(), args.dim);
        __syncthreads();
        dots(p, q + threadIdx.x / 32 * ROWS * padded(args.dim), columns, args.dim);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            pair_rule pair = {-INFINITY, 1, true};
            if (pairs.mine(r)) pair = rule_of(args, rule, p[r], job.batch, job.head, rows.first + r, column);
            peak[r] = fmaxf(peak[r], pair.score);
            p[r] = weigh_any(state[r], out[r], pair.score, rule.unit);
            if (!pair.kept) p[r] = 0;
        }
        __syncthreads();
        stage_rows(columns, pitch(args.value_dim), 32, usp_row<T>(args.v, at.column, job.batch, key_head),
                   args.v.stride_token, at.columns(), args.value_dim);
        __syncthreads();
        add_weighted(out, p, pairs, columns, args.value_dim);
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        if (r >= rows.count) break;
        float factor = args.last ? finish_row(state[r], sink_of(args, job.head), 1 / (1 - args.dropout.rate)) : 1;
        float best = warp_max(peak[r]) * rule.unit * LN2;
        if (threadIdx.x % 32 == 0) {
            store_state(args, line + r, left_state(args, state[r]));
            if (args.peak) args.peak[line + r] = args.first ? best : fmaxf(args.peak[line + r], best);
        }
        store_row<T>(out[r], args.last ? args.out : acc, !args.last, rows.first + r, job, factor, args.value_dim);
    }
}

/* ---- backward ---------------------------------------------------------------------------------------------------- */

/* What backward makes of a pair: its kept weight and the gradient of its product, over the scale. */
struct pair_gradient {
    float weight, product;
};

/* `value` is dout.v. */
static __device__ __forceinline__ pair_gradient gradient_of(const usp_softmax &args, const pair_rule &pair, float unit,
                                                            row_state state, float value, float delta) {
    float weight = exp2f(fmaf(pair.score, unit, -base_of(state))) * factor_of(state);
    float kept = pair.kept ? value / (1 - args.dropout.rate) : 0;
    return {pair.kept ? weight : 0, weight * pair.bend * (kept - delta)};
}

template <typename T>
static __global__ void __launch_bounds__(WARPS * 32)
    softmax_backward_query_any_kernel(const __grid_constant__ usp_softmax args) {
    begin_kernel();
    extern __shared__ float shared[];
    float *q = shared, *dout = q + BLOCK * padded(args.dim);
    float *columns = dout + BLOCK * padded(args.value_dim);
    softmax_job job = take_job<false>(args, BLOCK);
    if (job.count <= 0) return;
    warp_rows rows = rows_of_warp(job);
    int key_head = usp_mapped_head(args.kv, job.head), warp_row = threadIdx.x / 32 * ROWS;
    int64_t line = line_of(args, job.batch, job.head, rows.first);
    scoring rule(args, job.head);

    stage_rows(q, padded(args.dim), BLOCK, usp_row<T>(args.q, job.begin, job.batch, job.head), args.q.stride_token,
               job.count, args.dim);
    stage_rows(dout, padded(args.value_dim), BLOCK, usp_row<T>(args.dout, job.begin, job.batch, job.head),
               args.dout.stride_token, job.count, args.value_dim);
    row_sums dq = {};
    for (tile_walk at(args.by_query, *job.work, 1); at.running(); at.advance(32)) {
        int column = at.column + threadIdx.x % 32;
        warp_pairs pairs = allowed_pairs<false>(args.pairs, rows, column, at.end);
        float s[ROWS], ds[ROWS];
        __syncthreads();
        stage_rows(columns, pitch(args.value_dim), 32, usp_row<T>(args.v, at.column, job.batch, key_head),
                   args.v.stride_token, at.columns(), args.value_dim);
        __syncthreads();
        dots(ds, dout + warp_row * padded(args.value_dim), columns, args.value_dim);
        __syncthreads();
        stage_rows(columns, pitch(args.dim), 32, usp_row<T>(args.k, at.column, job.batch, key_head),
                   args.k.stride_token, at.columns(), args.dim);
        __syncthreads();
        dots(s, q + warp_row * padded(args.dim), columns, args.dim);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            if (!pairs.mine(r)) continue;
            pair_rule pair = rule_of(args, rule, s[r], job.batch, job.head, rows.first + r, column);
            row_state state = {args.top[line + r], args.sum[line + r]};
            ds[r] = gradient_of(args, pair, rule.unit, state, ds[r], args.delta[line + r]).product;
        }
        add_weighted(dq, ds, pairs, columns, args.dim);
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        if (r >= rows.count) break;
        float factor = args.scale;
        if (!args.first) {
            add_row(dq[r], usp_row<float>(args.dq_sum, rows.first + r, job.batch, job.head), factor, args.dim);
            factor = 1;
        }
        store_row<T>(dq[r], args.last ? args.dq : args.dq_sum, !args.last, rows.first + r, job, factor, args.dim);
    }
}

template <typename T>
static __global__ void __launch_bounds__(WARPS * 32)
    softmax_backward_key_any_kernel(const __grid_constant__ usp_softmax args) {
    begin_kernel();
    extern __shared__ float shared[];
    float *k = shared, *v = k + BLOCK * padded(args.dim);
    float *columns = v + BLOCK * padded(args.value_dim);
    softmax_job job = take_job<true>(args, BLOCK);
    if (job.count <= 0) return;
    warp_rows rows = rows_of_warp(job);
    int warp_row = threadIdx.x / 32 * ROWS;
    head_range heads = readers_of(args, job.head);

    stage_rows(k, padded(args.dim), BLOCK, usp_row<T>(args.k, job.begin, job.batch, job.head), args.k.stride_token,
               job.count, args.dim);
    stage_rows(v, padded(args.value_dim), BLOCK, usp_row<T>(args.v, job.begin, job.batch, job.head),
               args.v.stride_token, job.count, args.value_dim);
    row_sums dk = {}, dv = {};
    for (tile_walk at(args.by_key, *job.work, max(heads.end - heads.first, 0)); at.running(); at.advance(32)) {
        int column = at.column + threadIdx.x % 32, head = heads.first + at.round;
        bool exists = column < at.end;
        warp_pairs pairs = allowed_pairs<true>(args.pairs, rows, column, at.end);
        int64_t line = line_of(args, job.batch, head, column);
        const T *queries = usp_row<T>(args.q, at.column, job.batch, head);
        float p[ROWS], ds[ROWS];
        row_state state = {-INFINITY, 0};
        if (exists) state = {args.top[line], args.sum[line]};
        float delta = exists ? args.delta[line] : 0;
        scoring rule(args, head);
        __syncthreads();
        stage_rows(columns, pitch(args.dim), 32, queries, args.q.stride_token, at.columns(), args.dim);
        __syncthreads();
        dots(p, k + warp_row * padded(args.dim), columns, args.dim);
        __syncthreads();
        stage_rows(columns, pitch(args.value_dim), 32, usp_row<T>(args.dout, at.column, job.batch, head),
                   args.dout.stride_token, at.columns(), args.value_dim);
        __syncthreads();
        dots(ds, v + warp_row * padded(args.value_dim), columns, args.value_dim);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            if (!pairs.mine(r)) continue;
            pair_rule pair = rule_of(args, rule, p[r], job.batch, head, column, rows.first + r);
            pair_gradient gradient = gradient_of(args, pair, rule.unit, state, ds[r], delta);
            p[r] = gradient.weight, ds[r] = gradient.product;
        }
        add_weighted(dv, p, pairs, columns, args.value_dim);
        __syncthreads();
        stage_rows(columns, pitch(args.dim), 32, queries, args.q.stride_token, at.columns(), args.dim);
        __syncthreads();
        add_weighted(dk, ds, pairs, columns, args.dim);
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        if (r >= rows.count) break;
        bool wide = args.key_dtype == USP_F32;
        store_row<T>(dk[r], args.dk, wide, rows.first + r, job, args.scale, args.dim);
        store_row<T>(dv[r], args.dv, wide, rows.first + r, job, 1 / (1 - args.dropout.rate), args.value_dim);
    }
}

/* ---- launchers --------------------------------------------------------------------------------------------------- */

/* Two sets of rows and one of columns: what backward takes, and more than forward does. */
static size_t most_shared(int dim, int value_dim) {
    int rows = BLOCK * (padded(dim) + padded(value_dim));
    return sizeof(float) * (rows + 32 * pitch(dim > value_dim ? dim : value_dim));
}

static usp_status launch(const char *what, void (*kernel)(usp_softmax), const usp_softmax &args, bool key_rows,
                         usp_stream stream) {
    return launch_jobs(what, kernel, args, key_rows, BLOCK, WARPS * 32, most_shared(args.dim, args.value_dim), stream);
}

static usp_status launch_forward(const usp_gpu *, const usp_softmax *args, usp_stream stream) {
    auto kernel = usp_of_dtype(args->dtype, softmax_forward_any_kernel<float>, softmax_forward_any_kernel<__half>,
                               softmax_forward_any_kernel<__nv_bfloat16>);
    return launch("softmax forward", kernel, *args, false, stream);
}

static usp_status launch_backward_query(const usp_gpu *, const usp_softmax *args, usp_stream stream) {
    auto kernel =
        usp_of_dtype(args->dtype, softmax_backward_query_any_kernel<float>, softmax_backward_query_any_kernel<__half>,
                     softmax_backward_query_any_kernel<__nv_bfloat16>);
    return launch("softmax backward for queries", kernel, *args, false, stream);
}

static usp_status launch_backward_key(const usp_gpu *, const usp_softmax *args, usp_stream stream) {
    auto kernel = usp_of_dtype(args->dtype, softmax_backward_key_any_kernel<float>,
                               softmax_backward_key_any_kernel<__half>, softmax_backward_key_any_kernel<__nv_bfloat16>);
    return launch("softmax backward for keys", kernel, *args, true, stream);
}

/* ---- the family -------------------------------------------------------------------------------------------------- */

static int fits(const usp_gpu *, const usp_softmax *, usp_softmax_call) {
    return 1;
}

static usp_status launch_backward(const usp_gpu *gpu, const usp_softmax *args, usp_stream stream) {
    USP_TRY(launch_backward_query(gpu, args, stream));
    return launch_backward_key(gpu, args, stream);
}

extern "C" const usp_softmax_family usp_softmax_any = {USP_SM_80, most_shared, fits, {launch_forward, launch_backward}};
