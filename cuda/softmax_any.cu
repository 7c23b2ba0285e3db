/* softmax_any.cu - softmax attention for any element type, dim, stride, alignment and scale, in plain fp32.
 * It is simple rather than fast: a warp has ROWS rows, a lane one of 32 columns at a time. For sm_80 and up. */
#include "softmax.cuh"

constexpr int USP_ANY_WARPS = 4, USP_ANY_ROWS = 4, USP_ANY_BLOCK = USP_ANY_WARPS * USP_ANY_ROWS;
static_assert(USP_ANY_BLOCK >= USP_SOFTMAX_LEAST_ROWS, "a grid must hold all jobs");
constexpr int USP_ANY_WIDTH = USP_SOFTMAX_MAX_DIM / 32; /* sums of one row that a lane keeps at most */

/* Elements of a row in shared memory; the rest up to here is zero. */
static __host__ __device__ __forceinline__ int usp_padded(int dim) {
    return (dim + 31) / 32 * 32;
}

/* Columns lie one element further apart, so that 32 lanes reading 32 columns use 32 banks. */
static __host__ __device__ __forceinline__ int usp_pitch(int dim) {
    return usp_padded(dim) + 1;
}

/* Copies `count` rows as fp32; rows from `rows` on are zero. All warps take part. */
template <typename T>
static __device__ void usp_stage(float *to, int pitch, int count, const T *from, int64_t stride, int rows, int dim) {
    for (int row = threadIdx.x / 32; row < count; row += USP_ANY_WARPS) {
        for (int d = threadIdx.x % 32; d < usp_padded(dim); d += 32)
            to[row * pitch + d] = row < rows && d < dim ? usp_to_float(from[row * stride + d]) : 0;
    }
}

/* Products of this warp's rows with this lane's column. */
static __device__ void usp_dots(float (&s)[USP_ANY_ROWS], const float *rows, const float *columns, int dim) {
    const float *column = columns + threadIdx.x % 32 * usp_pitch(dim);
    for (int r = 0; r < USP_ANY_ROWS; r++) s[r] = 0;
#pragma unroll 4
    for (int d = 0; d < dim; d++) {
#pragma unroll
        for (int r = 0; r < USP_ANY_ROWS; r++) s[r] = fmaf(rows[r * usp_padded(dim) + d], column[d], s[r]);
    }
}

/* Elements lane, lane + 32, ... of this warp's rows. */
using usp_any_sums = float[USP_ANY_ROWS][USP_ANY_WIDTH];

/* Which pairs of this warp's rows and the 32 columns are allowed: bit j for the column of lane j. */
struct usp_any_pairs {
    unsigned row[USP_ANY_ROWS];

    __device__ __forceinline__ bool mine(int r) const {
        return row[r] >> threadIdx.x % 32 & 1;
    }
};

/* sums += p times columns, over allowed pairs alone: 0 times a NaN would be a NaN. p is held by lanes, one column
 * each. */
static __device__ void usp_add_weighted(usp_any_sums &sums, const float (&p)[USP_ANY_ROWS], const usp_any_pairs &pairs,
                                        const float *columns, int dim) {
    for (int j = 0; j < 32; j++) {
        float weight[USP_ANY_ROWS];
#pragma unroll
        for (int r = 0; r < USP_ANY_ROWS; r++) weight[r] = __shfl_sync(~0u, p[r], j);
        const float *column = columns + j * usp_pitch(dim) + threadIdx.x % 32;
#pragma unroll
        for (int i = 0; i < USP_ANY_WIDTH; i++) {
            if (i * 32 >= dim) break;
            float x = column[i * 32];
#pragma unroll
            for (int r = 0; r < USP_ANY_ROWS; r++)
                sums[r][i] = pairs.row[r] >> j & 1 ? fmaf(weight[r], x, sums[r][i]) : sums[r][i];
        }
    }
}

/* This warp's rows of a block: global index of the first, and how many there are (may be negative). */
struct usp_any_rows {
    int first, count;
};

static __device__ __forceinline__ usp_any_rows usp_rows_of_warp(const usp_job &job) {
    int skipped = threadIdx.x / 32 * USP_ANY_ROWS;
    return {job.begin + skipped, min(job.count - skipped, USP_ANY_ROWS)};
}

/* `column` is this lane's. */
template <bool KEY_ROWS>
static __device__ __forceinline__ usp_any_pairs usp_allowed_pairs(const usp_band &band, const usp_any_rows &rows,
                                                                  int column) {
    usp_any_pairs pairs;
#pragma unroll
    for (int r = 0; r < USP_ANY_ROWS; r++)
        pairs.row[r] = __ballot_sync(~0u, r < rows.count && band.allows<KEY_ROWS>(rows.first + r, column));
    return pairs;
}

/* row = row * factor (+ sum), to dtype if last, else into the sum. */
template <typename T>
static __device__ void usp_deliver_any(const float (&row)[USP_ANY_WIDTH], float *sum, T *result, float factor,
                                       int first, int last, int dim) {
#pragma unroll
    for (int i = 0; i < USP_ANY_WIDTH; i++) {
        int d = i * 32 + threadIdx.x % 32;
        if (d >= dim) break;
        float x = row[i] * factor + (first ? 0 : sum[d]);
        if (last)
            result[d] = usp_from_float<T>(x);
        else
            sum[d] = x;
    }
}

static __device__ __forceinline__ float usp_warp_max(float x) {
    for (int offset = 16; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, offset));
    return x;
}

/* ---- forward ----------------------------------------------------------------------------------------------------- */

/* The state of one row: weights are exp(scale score - top). */
struct usp_any_online {
    float top, sum;
};

/* Turns this lane's score into its weight; -inf is no key, and a NaN, which no maximum sees, stays one. */
static __device__ float usp_weigh_any(usp_any_online &row, float (&sums)[USP_ANY_WIDTH], float score) {
    float top = fmaxf(row.top, usp_warp_max(score)), base = top == -INFINITY ? 0 : top;
    float factor = expf(row.top - base), weight = expf(score - base);
    row.top = top;
    row.sum = row.sum * factor + usp_warp_sum(weight);
    for (int i = 0; i < USP_ANY_WIDTH; i++) sums[i] *= factor;
    return weight;
}

template <typename T>
static __global__ void __launch_bounds__(USP_ANY_WARPS * 32)
    usp_softmax_forward_any_kernel(const __grid_constant__ usp_softmax args) {
    extern __shared__ float shared[];
    float *q = shared, *columns = q + USP_ANY_BLOCK * usp_padded(args.dim);
    usp_job job = usp_take_job(args, args.heads, USP_ANY_BLOCK);
    if (job.count <= 0) return;
    usp_work work = *job.work;
    usp_any_rows rows = usp_rows_of_warp(job);
    int key_head = usp_mapped_head(args.kv, job.head);
    int64_t line = ((int64_t)job.batch * args.heads + job.head) * args.queries + rows.first;
    float *acc = args.acc + (((int64_t)rows.first * args.batch + job.batch) * args.heads + job.head) * args.value_dim;
    int64_t acc_stride = (int64_t)args.batch * args.heads * args.value_dim;

    usp_stage(q, usp_padded(args.dim), USP_ANY_BLOCK, usp_row<T>(args.q, job.begin, job.batch, job.head),
              args.q.stride_token, job.count, args.dim);
    usp_any_sums out = {};
    usp_any_online online[USP_ANY_ROWS];
#pragma unroll
    for (int r = 0; r < USP_ANY_ROWS; r++) {
        online[r] = {-INFINITY, 0};
        if (args.first || r >= rows.count) continue;
        online[r] = {args.lse[line + r], args.lse[line + r] == -INFINITY ? 0.0f : 1.0f};
        for (int i = 0; i < USP_ANY_WIDTH; i++) {
            int d = i * 32 + threadIdx.x % 32;
            if (d < args.value_dim) out[r][i] = acc[r * acc_stride + d];
        }
    }
    for (usp_walk at(args.tiles, work, 1); at.running(); at.advance(32)) {
        usp_any_pairs pairs = usp_allowed_pairs<false>(usp_band(work, at.tile()), rows, at.column + threadIdx.x % 32);
        float p[USP_ANY_ROWS];
        __syncthreads();
        usp_stage(columns, usp_pitch(args.dim), 32, usp_row<T>(args.k, at.column, job.batch, key_head),
                  args.k.stride_token, at.columns(), args.dim);
        __syncthreads();
        usp_dots(p, q + threadIdx.x / 32 * USP_ANY_ROWS * usp_padded(args.dim), columns, args.dim);
        for (int r = 0; r < USP_ANY_ROWS; r++) {
            float score = pairs.mine(r) ? p[r] * args.scale : -INFINITY;
            p[r] = usp_weigh_any(online[r], out[r], score);
        }
        __syncthreads();
        usp_stage(columns, usp_pitch(args.value_dim), 32, usp_row<T>(args.v, at.column, job.batch, key_head),
                  args.v.stride_token, at.columns(), args.value_dim);
        __syncthreads();
        usp_add_weighted(out, p, pairs, columns, args.value_dim);
    }
#pragma unroll
    for (int r = 0; r < USP_ANY_ROWS; r++) {
        if (r >= rows.count) break;
        float sum = online[r].sum;
        if (threadIdx.x % 32 == 0) args.lse[line + r] = sum == 0 ? -INFINITY : online[r].top + logf(sum);
        usp_deliver_any(out[r], acc + r * acc_stride,
                        args.last ? usp_row<T>(args.out, rows.first + r, job.batch, job.head) : nullptr,
                        sum == 0 ? 0 : 1 / sum, 1, args.last, args.value_dim);
    }
}

/* ---- backward ---------------------------------------------------------------------------------------------------- */

/* exp(scale score - lse), 0 for a query without keys. */
static __device__ __forceinline__ float usp_weight_any(float score, float lse) {
    return lse == -INFINITY ? 0 : expf(score - lse);
}

template <typename T>
static __global__ void __launch_bounds__(USP_ANY_WARPS * 32)
    usp_softmax_backward_query_any_kernel(const __grid_constant__ usp_softmax args) {
    extern __shared__ float shared[];
    float *q = shared, *dout = q + USP_ANY_BLOCK * usp_padded(args.dim);
    float *columns = dout + USP_ANY_BLOCK * usp_padded(args.value_dim);
    usp_job job = usp_take_job(args, args.heads, USP_ANY_BLOCK);
    if (job.count <= 0) return;
    usp_work work = *job.work;
    usp_any_rows rows = usp_rows_of_warp(job);
    int key_head = usp_mapped_head(args.kv, job.head), warp_row = threadIdx.x / 32 * USP_ANY_ROWS;
    int64_t line = ((int64_t)job.batch * args.heads + job.head) * args.queries + rows.first;

    usp_stage(q, usp_padded(args.dim), USP_ANY_BLOCK, usp_row<T>(args.q, job.begin, job.batch, job.head),
              args.q.stride_token, job.count, args.dim);
    usp_stage(dout, usp_padded(args.value_dim), USP_ANY_BLOCK, usp_row<T>(args.dout, job.begin, job.batch, job.head),
              args.dout.stride_token, job.count, args.value_dim);
    usp_any_sums dq = {};
    for (usp_walk at(args.tiles, work, 1); at.running(); at.advance(32)) {
        usp_any_pairs pairs = usp_allowed_pairs<false>(usp_band(work, at.tile()), rows, at.column + threadIdx.x % 32);
        float s[USP_ANY_ROWS], ds[USP_ANY_ROWS];
        __syncthreads();
        usp_stage(columns, usp_pitch(args.value_dim), 32, usp_row<T>(args.v, at.column, job.batch, key_head),
                  args.v.stride_token, at.columns(), args.value_dim);
        __syncthreads();
        usp_dots(ds, dout + warp_row * usp_padded(args.value_dim), columns, args.value_dim);
        __syncthreads();
        usp_stage(columns, usp_pitch(args.dim), 32, usp_row<T>(args.k, at.column, job.batch, key_head),
                  args.k.stride_token, at.columns(), args.dim);
        __syncthreads();
        usp_dots(s, q + warp_row * usp_padded(args.dim), columns, args.dim);
        for (int r = 0; r < USP_ANY_ROWS; r++) {
            if (!pairs.mine(r)) continue;
            ds[r] = usp_weight_any(s[r] * args.scale, args.lse[line + r]) * (ds[r] - args.delta[line + r]);
        }
        usp_add_weighted(dq, ds, pairs, columns, args.dim);
    }
#pragma unroll
    for (int r = 0; r < USP_ANY_ROWS; r++) {
        if (r >= rows.count) break;
        usp_deliver_any(dq[r], usp_row<float>(args.dq_sum, rows.first + r, job.batch, job.head),
                        usp_row<T>(args.dq, rows.first + r, job.batch, job.head), args.scale, args.first, args.last,
                        args.dim);
    }
}

template <typename T>
static __global__ void __launch_bounds__(USP_ANY_WARPS * 32)
    usp_softmax_backward_key_any_kernel(const __grid_constant__ usp_softmax args) {
    extern __shared__ float shared[];
    float *k = shared, *v = k + USP_ANY_BLOCK * usp_padded(args.dim);
    float *columns = v + USP_ANY_BLOCK * usp_padded(args.value_dim);
    usp_job job = usp_take_job(args, args.key_heads, USP_ANY_BLOCK);
    if (job.count <= 0) return;
    usp_work work = *job.work;
    usp_any_rows rows = usp_rows_of_warp(job);
    int warp_row = threadIdx.x / 32 * USP_ANY_ROWS;
    usp_readers heads = usp_readers_of(args, job.head);

    usp_stage(k, usp_padded(args.dim), USP_ANY_BLOCK, usp_row<T>(args.k, job.begin, job.batch, job.head),
              args.k.stride_token, job.count, args.dim);
    usp_stage(v, usp_padded(args.value_dim), USP_ANY_BLOCK, usp_row<T>(args.v, job.begin, job.batch, job.head),
              args.v.stride_token, job.count, args.value_dim);
    usp_any_sums dk = {}, dv = {};
    for (usp_walk at(args.tiles, work, max(heads.end - heads.first, 0)); at.running(); at.advance(32)) {
        int column = at.column + threadIdx.x % 32, head = heads.first + at.round;
        usp_any_pairs pairs = usp_allowed_pairs<true>(usp_band(work, at.tile()), rows, column);
        int64_t line = ((int64_t)job.batch * args.heads + head) * args.queries + column;
        const T *queries = usp_row<T>(args.q, at.column, job.batch, head);
        float p[USP_ANY_ROWS], ds[USP_ANY_ROWS];
        float lse = column < at.end ? args.lse[line] : -INFINITY, delta = column < at.end ? args.delta[line] : 0;
        __syncthreads();
        usp_stage(columns, usp_pitch(args.dim), 32, queries, args.q.stride_token, at.columns(), args.dim);
        __syncthreads();
        usp_dots(p, k + warp_row * usp_padded(args.dim), columns, args.dim);
        for (int r = 0; r < USP_ANY_ROWS; r++) p[r] = usp_weight_any(p[r] * args.scale, lse);
        __syncthreads();
        usp_stage(columns, usp_pitch(args.value_dim), 32, usp_row<T>(args.dout, at.column, job.batch, head),
                  args.dout.stride_token, at.columns(), args.value_dim);
        __syncthreads();
        usp_dots(ds, v + warp_row * usp_padded(args.value_dim), columns, args.value_dim);
        usp_add_weighted(dv, p, pairs, columns, args.value_dim);
        for (int r = 0; r < USP_ANY_ROWS; r++) ds[r] = p[r] * (ds[r] - delta);
        __syncthreads();
        usp_stage(columns, usp_pitch(args.dim), 32, queries, args.q.stride_token, at.columns(), args.dim);
        __syncthreads();
        usp_add_weighted(dk, ds, pairs, columns, args.dim);
    }
#pragma unroll
    for (int r = 0; r < USP_ANY_ROWS; r++) {
        if (r >= rows.count) break;
        usp_deliver_any(dk[r], usp_row<float>(args.dk_sum, rows.first + r, job.batch, job.head),
                        usp_row<T>(args.dk, rows.first + r, job.batch, job.head), args.scale, args.first, args.last,
                        args.dim);
        usp_deliver_any(dv[r], usp_row<float>(args.dv_sum, rows.first + r, job.batch, job.head),
                        usp_row<T>(args.dv, rows.first + r, job.batch, job.head), 1, args.first, args.last,
                        args.value_dim);
    }
}

/* ---- launchers --------------------------------------------------------------------------------------------------- */

/* Two sets of rows and one of columns: what backward takes, and more than forward does. */
static size_t most_shared(int dim, int value_dim) {
    int rows = USP_ANY_BLOCK * (usp_padded(dim) + usp_padded(value_dim));
    return sizeof(float) * (rows + 32 * usp_pitch(dim > value_dim ? dim : value_dim));
}

static usp_status launch_forward(const usp_gpu *, const usp_softmax *args, usp_stream stream) {
    auto kernel = usp_of_dtype(args->dtype, usp_softmax_forward_any_kernel<float>,
                               usp_softmax_forward_any_kernel<__half>, usp_softmax_forward_any_kernel<__nv_bfloat16>);
    return usp_launch_jobs("softmax forward", kernel, *args, args->heads, USP_ANY_BLOCK, USP_ANY_WARPS * 32,
                           most_shared(args->dim, args->value_dim), stream);
}

static usp_status launch_backward_query(const usp_gpu *, const usp_softmax *args, usp_stream stream) {
    auto kernel = usp_of_dtype(args->dtype, usp_softmax_backward_query_any_kernel<float>,
                               usp_softmax_backward_query_any_kernel<__half>,
                               usp_softmax_backward_query_any_kernel<__nv_bfloat16>);
    return usp_launch_jobs("softmax backward for queries", kernel, *args, args->heads, USP_ANY_BLOCK,
                           USP_ANY_WARPS * 32, most_shared(args->dim, args->value_dim), stream);
}

static usp_status launch_backward_key(const usp_gpu *, const usp_softmax *args, usp_stream stream) {
    auto kernel =
        usp_of_dtype(args->dtype, usp_softmax_backward_key_any_kernel<float>,
                     usp_softmax_backward_key_any_kernel<__half>, usp_softmax_backward_key_any_kernel<__nv_bfloat16>);
    return usp_launch_jobs("softmax backward for keys", kernel, *args, args->key_heads, USP_ANY_BLOCK,
                           USP_ANY_WARPS * 32, most_shared(args->dim, args->value_dim), stream);
}

/* ---- the family -------------------------------------------------------------------------------------------------- */

static int fits(const usp_gpu *, const usp_softmax *, usp_softmax_call) {
    return 1;
}

extern "C" const usp_softmax_family usp_softmax_any = {
    USP_SM_80, most_shared, fits, {launch_forward, launch_backward_query, launch_backward_key}};
