/* softmax_mma.cuh - what the tensor-core kernels of softmax attention share: allowed pairs and the online softmax on
 * accumulators, numbers that are not finite, the choice of a template instance. */
#ifndef USP_CUDA_SOFTMAX_MMA_CUH
#define USP_CUDA_SOFTMAX_MMA_CUH
#include "softmax.cuh"

/* The block's dynamic shared memory, which tiles need on a 256-byte boundary. */
template <typename T> static __device__ __forceinline__ T *shared_at(int offset) {
    extern __shared__ __align__(1024) unsigned char memory[];
    return reinterpret_cast<T *>(memory + offset);
}

static __device__ __forceinline__ uint32_t shared_base() {
    return shared_address(shared_at<char>(0));
}

/* ---- the block's note -------------------------------------------------------------------------------------------- */

/* What a block keeps in shared memory over its loop, since registers are dear: its job, and whether results must be
 * mended. Every thread writes the same. */
struct block_note {
    softmax_job job;
    int spoilt;
};

constexpr int NOTE_BYTES = 32;
static_assert(sizeof(block_note) <= NOTE_BYTES, "a note has its place");

/* ---- pairs ------------------------------------------------------------------------------------------------------- */

/* Where an accumulator lies in the score matrix: its first row and column, and how many exist from there on. */
struct lane_place {
    int row, rows, column, columns;
};

/* from[first + i], or `otherwise` where row or column i does not exist. */
static __device__ __forceinline__ int load_or(const int32_t *from, int first, int i, int count, int otherwise) {
    return i < count ? from[first + i] : otherwise;
}

/* A position that no key has: that of columns that do not exist. */
constexpr int NOWHERE = INT32_MIN;

/* What usp_pairs says of the block's rows, and of the columns of one step that is not full, in shared memory at AT. */
template <bool KEY_ROWS, typename Shape, int AT> struct shared_pairs {
    static_assert(Shape::rows <= Shape::threads && Shape::step <= Shape::threads, "a thread for each");
    static constexpr int queries = KEY_ROWS ? Shape::step : Shape::rows, keys = KEY_ROWS ? Shape::rows : Shape::step;
    static constexpr int interval_at = AT, key_at = interval_at + queries * 8; /* an interval: low, high */
    static constexpr int query_at = key_at + keys * 4, last_at = query_at + queries * 4, end = last_at + keys * 4;

    static __device__ __forceinline__ void fetch_query(const usp_pairs &pairs, int to, int query, bool exists) {
        usp_fetch_word(&shared_at<int>(interval_at)[2 * to], pairs.low + query, exists, 1);
        usp_fetch_word(&shared_at<int>(interval_at)[2 * to + 1], pairs.high + query, exists, 0);
        if (pairs.last) usp_fetch_word(&shared_at<int>(query_at)[to], pairs.query + query, exists, 0);
    }

    static __device__ __forceinline__ void fetch_key(const usp_pairs &pairs, int to, int key, bool exists) {
        usp_fetch_word(&shared_at<int>(key_at)[to], pairs.key + key, exists, NOWHERE);
        if (pairs.last) usp_fetch_word(&shared_at<int>(last_at)[to], pairs.last + key, exists, 0);
    }

    static __device__ __forceinline__ void fetch_rows(const usp_pairs &pairs, const softmax_job &job) {
        int i = threadIdx.x;
        if (i >= Shape::rows) return;
        if constexpr (KEY_ROWS)
            fetch_key(pairs, i, job.begin + i, i < job.count);
        else
            fetch_query(pairs, i, job.begin + i, i < job.count);
    }

    /* For a step that is not full. A barrier must lie between the last such step's mask and this. */
    static __device__ __forceinline__ void fetch_columns(const usp_pairs &pairs, const tile_walk &at) {
        int i = threadIdx.x;
        if (i >= Shape::step) return;
        if constexpr (KEY_ROWS)
            fetch_query(pairs, i, at.column + i, i < at.columns());
        else
            fetch_key(pairs, i, at.column + i, i < at.columns());
    }

    /* Sets the elements of the step's pairs that are not allowed; `row` is the warp's first of the block. */
    template <int M, int N>
    static __device__ __forceinline__ void mask(usp_sums<M, N> &c, const usp_pairs &pairs, int row, float value) {
        if constexpr (KEY_ROWS)
            mask_queries(c, row, value);
        else
            mask_keys(c, row, value);
        if (pairs.last) mask_behind_last(c, row, value);
    }

    template <int M, int N> static __device__ __forceinline__ void mask_keys(usp_sums<M, N> &c, int row, float value) {
        int2 interval[M * 2];
#pragma unroll
        for (int r = 0; r < M * 2; r++) {
            interval[r] = shared_at<int2>(interval_at)[row + usp_lane_row(r / 2, r % 2)];
            interval[r].x = max(interval[r].x, NOWHERE + 1);
        }
#pragma unroll
        for (int n = 0; n < N; n++) {
            int2 key = *reinterpret_cast<int2 *>(shared_at<int>(key_at) + usp_lane_column(n));
#pragma unroll
            for (int r = 0; r < M * 2; r++) {
                float *pair = &c[r / 2][n][r % 2 * 2];
                if (key.x < interval[r].x || key.x > interval[r].y) pair[0] = value;
                if (key.y < interval[r].x || key.y > interval[r].y) pair[1] = value;
            }
        }
    }

    template <int M, int N>
    static __device__ __forceinline__ void mask_queries(usp_sums<M, N> &c, int row, float value) {
        int key[M * 2];
#pragma unroll
        for (int r = 0; r < M * 2; r++) key[r] = shared_at<int>(key_at)[row + usp_lane_row(r / 2, r % 2)];
#pragma unroll
        for (int n = 0; n < N; n++) {
            int4 two = *reinterpret_cast<int4 *>(shared_at<int2>(interval_at) + usp_lane_column(n));
#pragma unroll
            for (int r = 0; r < M * 2; r++) {
                float *pair = &c[r / 2][n][r % 2 * 2];
                if (key[r] < two.x || key[r] > two.y) pair[0] = value;
                if (key[r] < two.z || key[r] > two.w) pair[1] = value;
            }
        }
    }

    /* Pairs whose query is behind the key's last one. */
    template <int M, int N>
    static __device__ __forceinline__ void mask_behind_last(usp_sums<M, N> &c, int row, float value) {
        const int *rows = shared_at<int>(KEY_ROWS ? last_at : query_at);
        const int *columns = shared_at<int>(KEY_ROWS ? query_at : last_at);
#pragma unroll
        for (int n = 0; n < N; n++) {
            int2 column = *reinterpret_cast<const int2 *>(columns + usp_lane_column(n));
#pragma unroll
            for (int r = 0; r < M * 2; r++) {
                int of_row = rows[row + usp_lane_row(r / 2, r % 2)];
                float *pair = &c[r / 2][n][r % 2 * 2];
                if (KEY_ROWS ? column.x > of_row : of_row > column.x) pair[0] = value;
                if (KEY_ROWS ? column.y > of_row : of_row > column.y) pair[1] = value;
            }
        }
    }
};

/* ---- online softmax ---------------------------------------------------------------------------------------------- */

/* Over the four lanes that share a row of an accumulator. */
static __device__ __forceinline__ float row_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

static __device__ __forceinline__ float row_sum(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}

/* The largest score of this lane in row i; -inf if there is none. */
template <int M, int N> static __device__ __forceinline__ float lane_best(const usp_sums<M, N> &scores, int i) {
    float best = -INFINITY;
#pragma unroll
    for (int n = 0; n < N; n++) best = fmaxf(best, fmaxf(scores[i / 2][n][i % 2 * 2], scores[i / 2][n][i % 2 * 2 + 1]));
    return best;
}

template <int M, int W> static __device__ __forceinline__ void multiply_row(int i, usp_sums<M, W> &sums, float factor) {
#pragma unroll
    for (int n = 0; n < W; n++) {
        sums[i / 2][n][i % 2 * 2] *= factor;
        sums[i / 2][n][i % 2 * 2 + 1] *= factor;
    }
}

/* The softmax of M * 16 rows of a warp, fed step by step. Weights are 2^(unit score - top); `top` follows a row's
 * largest score only when that has grown by more than a factor 2^SLACK of weight, so that the sums are rarely rescaled;
 * weights and sums stay far inside fp32 (and weights inside fp16) either way. Without slack a row's largest weight is
 * 1, which no dtype rounds: rows of which one key has nearly all weight are as exact as they can be. Who knows that
 * scores are small may weigh rows without raising them. `unit` must be positive. */
template <int M, int SLACK = 8> struct online_softmax {
    float top[M * 2];
    float sum[M * 2]; /* this lane's share of the row's weights */

    /* Row i with what is kept of it. */
    __device__ __forceinline__ void begin(int i, row_state kept) {
        top[i] = kept.top;
        sum[i] = (threadIdx.x & 3) == 0 ? kept.sum : 0;
    }

    /* Turns scores into weights, and brings `sums`, what was weighed so far, to the same base. */
    template <int N, int W>
    __device__ __forceinline__ void weigh(usp_sums<M, N> &scores, usp_sums<M, W> &sums, float unit) {
        float best[M * 2], factor[M * 2];
        look(scores, unit, best);
        if (raise(best, factor)) {
#pragma unroll
            for (int i = 0; i < M * 2; i++) multiply_row(i, sums, factor[i]);
        }
        auto exponent = [=](float score, float base) { return fmaf(score, unit, -base); };
        find_exponents<0>(scores, top, exponent);
        find_weights<0>(scores, [](float *, int, int) {});
    }

    /* Turns scores into what is above the bases of `top`, of which `exponent` tells, and those of EARLY column blocks
     * into weights. */
    template <int EARLY, int N, typename Exponent>
    static __device__ __forceinline__ void find_exponents(usp_sums<M, N> &scores, const float (&top)[M * 2],
                                                          const Exponent &exponent) {
        float base[M * 2];
#pragma unroll
        for (int i = 0; i < M * 2; i++) base[i] = finite_base(top[i]);
#pragma unroll
        for (int n = 0; n < N; n++) {
#pragma unroll
            for (int i = 0; i < M * 4; i++) {
                float &x = scores[i / 4][n][i % 4];
                x = exponent(x, base[i / 2]);
                if (n < EARLY) x = fast_exp2(x);
            }
        }
    }

    /* The others, and sums of all. `use` is called when a pair of them, of row i in column block n, is in the sum. */
    template <int EARLY, int N, typename Use>
    __device__ __forceinline__ void find_weights(usp_sums<M, N> &exponents, const Use &use) {
#pragma unroll
        for (int n = 0; n < N; n++) {
#pragma unroll
            for (int i = 0; i < M * 2; i++) {
                float *pair = &exponents[i / 2][n][i % 2 * 2];
                if (n >= EARLY) pair[0] = fast_exp2(pair[0]), pair[1] = fast_exp2(pair[1]);
                sum[i] += pair[0] + pair[1];
                use(pair, i, n);
            }
        }
    }

    /* The largest score of each row. */
    template <int N>
    static __device__ __forceinline__ void look(const usp_sums<M, N> &scores, float unit, float (&best)[M * 2]) {
#pragma unroll
        for (int i = 0; i < M * 2; i++) best[i] = row_max(lane_best(scores, i)) * unit;
    }

    /* Raises `top` where `best` is far above it, or says that there is no such row. What was weighed so far is left to
     * be multiplied by factor[i]. Each row decides alone; the warp only agrees to look. */
    __device__ __forceinline__ bool raise(float (&best)[M * 2], float (&factor)[M * 2]) {
        bool grown = false;
#pragma unroll
        for (int i = 0; i < M * 2; i++) {
            factor[i] = 1;
            if (best[i] - top[i] > SLACK)
                grown = true;
            else
                best[i] = top[i];
        }
        if (!__any_sync(~0u, grown)) return false;
#pragma unroll
        for (int i = 0; i < M * 2; i++) {
            factor[i] = best[i] == top[i] ? 1 : fast_exp2(top[i] - best[i]);
            top[i] = best[i];
            sum[i] *= factor[i];
        }
        return true;
    }

    __device__ __forceinline__ row_state kept(int i) const {
        return {top[i], row_sum(sum[i])};
    }
};

/* ---- numbers that are not finite --------------------------------------------------------------------------------- */

/* Before a product with weights of 0: makes what is not finite 0 in a tile; `spoilt` then tells to mend the results. A
 * barrier: all threads of the block take part. */
template <typename T, int ROWS, int THREADS, int DIM>
static __device__ __forceinline__ void shield(usp_shared_rows<DIM> tile, int &spoilt) {
    if (!__syncthreads_or(usp_spoilt<T, ROWS, THREADS>(tile))) return;
#pragma unroll 1
    for (int at = threadIdx.x * 4; at < ROWS * tile.bytes; at += THREADS * 4) usp_clear_pair<T>(tile.base + at);
    spoilt = 1;
    __syncthreads();
}

/* Writes what is not finite in the columns of steps that need a mask, or of `every` step, to those rows of a job, in
 * `result` (fp32 if `wide`), that may pair with them. The rows have been written; a thread has one element of all. */
template <typename T, bool KEY_ROWS>
static __device__ __noinline__ void mend(const usp_softmax &args, softmax_job job, int step, bool every, int element,
                                         usp_tensor result, bool wide, usp_tensor columns, int dim) {
    int key_head = usp_mapped_head(args.kv, job.head);
    head_range heads = KEY_ROWS ? readers_of(args, job.head) : head_range{key_head, key_head + 1};
    tile_walk at(tiles_of(args, KEY_ROWS), *job.work, max(heads.end - heads.first, 0));
    for (; at.running() && element < dim; at.advance(step)) {
        for (int j = at.column; j < min(at.column + step, at.end) && (every || !at.full(step)); j++) {
            float x = usp_to_float(usp_row<T>(columns, j, job.batch, heads.first + at.round)[element]);
            for (int row = job.begin; row < job.begin + job.count && !isfinite(x); row++) {
                if (!pair_allowed(args.pairs, KEY_ROWS ? j : row, KEY_ROWS ? row : j)) continue;
                if (wide)
                    usp_row<float>(result, row, job.batch, job.head)[element] = x;
                else
                    usp_row<T>(result, row, job.batch, job.head)[element] = usp_from_float<T>(x);
            }
        }
    }
}

/* ---- launch ------------------------------------------------------------------------------------------------------ */

template <typename Launch, typename T, int DIM, typename Shape, bool EXTRAS>
static usp_status start_instance(const usp_softmax &args, usp_stream stream) {
    constexpr int bytes = Launch::template memory<DIM, Shape, EXTRAS>::bytes;
    static_assert(bytes <= USP_LEAST_SHARED, "tiles must fit every GPU");
    return launch_jobs(Launch::what, Launch::template kernel<T, DIM, Shape, EXTRAS>(), args, Launch::key_rows,
                       Shape::rows, Shape::threads, bytes, stream);
}

/* Half the rows a block where full ones would leave multiprocessors idle. */
template <typename Launch, typename T, int DIM>
static usp_status start_dim(const usp_gpu &gpu, const usp_softmax &args, usp_stream stream) {
    using shape = typename Launch::template shape<DIM>;
    using half = std::conditional_t<(shape::blocks > 1), usp_half_shape<shape>, shape>;
    if (Launch::extras(args)) return start_instance<Launch, T, DIM, usp_extras_shape<shape>, true>(args, stream);
    if (count_jobs(args, Launch::key_rows, shape::rows) < (int64_t)gpu.processors * shape::resident)
        return start_instance<Launch, T, DIM, half, false>(args, stream);
    return start_instance<Launch, T, DIM, shape, false>(args, stream);
}

/* DIM is 64 or 128, whichever is the first to hold both dims; what is beyond the dims is zeros. */
template <typename Launch, typename T>
static usp_status start_type(const usp_gpu &gpu, const usp_softmax &args, usp_stream stream) {
    if (args.dim <= 64 && args.value_dim <= 64) return start_dim<Launch, T, 64>(gpu, args, stream);
    return start_dim<Launch, T, 128>(gpu, args, stream);
}

/* Launch describes a kernel template: what (for errors), key_rows, shape<DIM>, memory<DIM, Shape, EXTRAS>, extras(args)
 * and kernel<T, DIM, Shape, EXTRAS>. */
template <typename Launch> static usp_status start_any(const usp_gpu &gpu, const usp_softmax &args, usp_stream stream) {
    if (args.dtype == USP_F16) return start_type<Launch, __half>(gpu, args, stream);
    return start_type<Launch, __nv_bfloat16>(gpu, args, stream);
}

/* ---- the launchers of the family --------------------------------------------------------------------------------- */

extern "C" {
usp_status usp_softmax_mma_forward(const usp_gpu *gpu, const usp_softmax *args, usp_stream stream);
}

#endif
