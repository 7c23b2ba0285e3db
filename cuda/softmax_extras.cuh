/* softmax_extras.cuh - soft cap, slopes, dropout and peaks on accumulators: what the instances with EXTRAS of the
 * tensor-core kernels do beside the plain ones. Slower: all of it is decided at run time. */
#ifndef USP_CUDA_SOFTMAX_EXTRAS_CUH
#define USP_CUDA_SOFTMAX_EXTRAS_CUH
#include "softmax_mma.cuh"

static inline bool has_extras(const usp_softmax &args) {
    return args.soft_cap > 0 || args.slopes || args.dropout.rate > 0;
}

/* The positions between which biases count: the diagonal's of a query, its own of a key. 0 without slopes. */
static __device__ __forceinline__ int bias_position(const usp_softmax &args, const int32_t *from, int first, int i,
                                                    int count) {
    return args.slopes ? load_or(from, first, i, count, 0) : 0;
}

static __device__ __forceinline__ unsigned distance_of(int a, int b) {
    return __sad(a, b, 0u);
}

/* The first and the last of the places of a job's rows, found by a warp. */
struct place_range {
    int first, last;

    place_range() = default;
    __device__ __forceinline__ place_range(const int32_t *place, const softmax_job &job)
        : first(INT32_MAX), last(-INT32_MAX) {
        for (int i = threadIdx.x % 32; i < job.count; i += 32) {
            first = min(first, place[job.begin + i]);
            last = max(last, place[job.begin + i]);
        }
        first = __reduce_min_sync(~0u, first);
        last = __reduce_max_sync(~0u, last);
    }

    /* So near to each other that what a slope adds from the first to the last is as precise as a score. */
    __device__ __forceinline__ bool is_near(float slope) const {
        return fabsf(slope) * ((float)last - (float)first) <= 128;
    }
    /* As if they were everywhere: nothing is on a side of them. */
    __device__ __forceinline__ void spread() {
        first = INT32_MIN, last = INT32_MAX;
    }
};

/* 1 if the places of every lane of a warp are on the first side of all others, -1 if all are on the other side, else 0.
 * On one side a distance is a difference, and biases are added to rows and columns alone. */
static __device__ __forceinline__ int side_of(bool on_first, bool on_other) {
    return __all_sync(~0u, on_first) ? 1 : __all_sync(~0u, on_other) ? -1 : 0;
}

/* Calls visit(r, n, j, value of the column) for row r of a lane's 2M rows and column j of column block n; an element is
 * c[r / 2][n][r % 2 * 2 + j]. `load` gives a column's value. */
template <int M, int N, typename Load, typename Visit>
static __device__ __forceinline__ void for_elements(const Load &load, const Visit &visit) {
#pragma unroll
    for (int n = 0; n < N; n++) {
#pragma unroll
        for (int j = 0; j < 2; j++) {
            auto column = load(usp_lane_column(n) + j);
#pragma unroll
            for (int r = 0; r < M * 2; r++) visit(r, n, j, column);
        }
    }
}

/* ---- forward ----------------------------------------------------------------------------------------------------- */

/* Turns products into capped scores, STRIP column blocks at a time, whose products are kept in case one of the warp's
 * is far from 0. */
template <int STRIP, int M, int N>
static __device__ __forceinline__ void cap_scores(usp_sums<M, N> &c, const scoring &rule) {
    static_assert(N % STRIP == 0, "strips of column blocks");
#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll
        for (int first = 0; first < N; first += STRIP) {
            float capped[STRIP][4], way;
            uint32_t common = ~0u;
#pragma unroll
            for (int i = 0; i < STRIP * 4; i++) {
                capped[i / 4][i % 4] = rule.capped_near(c[m][first + i / 4][i % 4], way);
                common &= __float_as_uint(way);
            }
            if (__any_sync(~0u, !rule.is_near(common))) {
#pragma unroll
                for (int i = 0; i < STRIP * 4; i++) capped[i / 4][i % 4] = rule.capped(c[m][first + i / 4][i % 4]);
            }
#pragma unroll
            for (int i = 0; i < STRIP * 4; i++) c[m][first + i / 4][i % 4] = capped[i / 4][i % 4];
        }
    }
}

/* The largest of a lane's products without its sign, in four chains. A NaN counts nothing: what it makes is NaN either
 * way. */
template <int N> static __device__ __forceinline__ float size_of(const usp_sums<1, N> &c) {
    float most[4] = {};
#pragma unroll
    for (int n = 0; n < N; n++) {
#pragma unroll
        for (int i = 0; i < 4; i++) most[i] = fmaxf(most[i], fabsf(c[0][n][i]));
    }
    return fmaxf(fmaxf(most[0], most[1]), fmaxf(most[2], most[3]));
}

/* Turns products, rows of queries, into scores. `diagonal` gives a row's position (r < 2M), `key` a column's. */
template <int M, int N, typename Diagonal, typename Key>
static __device__ __forceinline__ void bend_scores(usp_sums<M, N> &c, const scoring &rule, const Diagonal &diagonal,
                                                   const Key &key) {
    if (rule.cap.used) cap_scores<4>(c, rule);
    if (rule.slope == 0) return;
    int from[M * 2];
#pragma unroll
    for (int r = 0; r < M * 2; r++) from[r] = diagonal(r);
    for_elements<M, N>(key, [&](int r, int n, int j, int position) {
        float &x = c[r / 2][n][r % 2 * 2 + j];
        x = rule.biased(x, (float)distance_of(from[r], position));
    });
}

/* Takes dropped weights out. `word` gives what the pairs of a row share, `key` a column's position. */
template <int M, int N, typename Word, typename Key>
static __device__ __forceinline__ void drop_weights(usp_sums<M, N> &c, float rate, const Word &word, const Key &key) {
    uint32_t limit = usp_dropout_limit(rate);
    if (limit == 0) return;
    for_elements<M, N>(key, [&](int r, int n, int j, int position) {
        if (usp_dropout_number(word(r), position) < limit) c[r / 2][n][r % 2 * 2 + j] = 0;
    });
}

/* Each lane's largest scores of its rows, before any scale. */
template <int M> struct lane_peaks {
    float best[M * 2];

    __device__ __forceinline__ lane_peaks() {
#pragma unroll
        for (float &x : best) x = -INFINITY;
    }
    template <int N> __device__ __forceinline__ void look(const usp_sums<M, N> &scores) {
#pragma unroll
        for (int i = 0; i < M * 2; i++) best[i] = fmaxf(best[i], lane_best(scores, i));
    }
    /* All lanes take part. */
    __device__ __forceinline__ void store(const usp_softmax &args, int64_t line, int rows, float unit) const {
#pragma unroll
        for (int i = 0; i < M * 2; i++) {
            int row = usp_lane_row(i / 2, i % 2);
            float peak = row_max(best[i]) * unit * LN2;
            if (row >= rows || (threadIdx.x & 3) != 0) continue;
            args.peak[line + row] = args.first ? peak : fmaxf(args.peak[line + row], peak);
        }
    }
};

/* The words of a block's queries, where there is dropout. A barrier must follow. */
static __device__ __forceinline__ void load_words(uint64_t *words, const usp_softmax &args, const softmax_job &job) {
    for (int i = threadIdx.x; i < job.count && args.dropout.rate > 0; i += blockDim.x)
        words[i] = dropout_row(args, job.batch, job.head, job.begin + i);
}

/* ---- backward ---------------------------------------------------------------------------------------------------- */

/* What backward needs of a query: P = 2^(x - base) * factor. */
struct query_line {
    float base, factor, delta;
    int diagonal;
    uint64_t word;
};

/* A product q.k becomes a kept weight, a product dout.v the gradient of the product q.k, over the scale. */
static __device__ __forceinline__ void bend_pair(float &x, float &d, const scoring &rule, const query_line &line,
                                                 int position, uint32_t limit, float keep) {
    float bend, score = rule.score(x, distance_of(line.diagonal, position), bend);
    bool kept = limit == 0 || usp_dropout_number(line.word, position) >= limit;
    float weight = fast_exp2(fmaf(score, rule.unit, -line.base)) * line.factor;
    d = weight * bend * ((kept ? d * keep : 0) - line.delta);
    x = kept ? weight : 0;
}

/* Turns products q.k into kept weights and products dout.v into the gradients of products q.k, over the scale. `query`
 * and `key` give a query's line and a key's position by row (r < 2M) and column (index). */
template <bool KEY_ROWS, int M, int N, typename Query, typename Key>
static __device__ __forceinline__ void bend_gradients(usp_sums<M, N> &p, usp_sums<M, N> &ds, const usp_softmax &args,
                                                      const scoring &rule, const Query &query, const Key &key) {
    uint32_t limit = usp_dropout_limit(args.dropout.rate);
    float keep = 1 / (1 - args.dropout.rate);
    auto pair = [&](float &x, float &d, const query_line &line, int position) {
        bend_pair(x, d, rule, line, position, limit, keep);
    };
    if constexpr (KEY_ROWS) {
        for_elements<M, N>(query, [&](int r, int n, int j, const query_line &line) {
            pair(p[r / 2][n][r % 2 * 2 + j], ds[r / 2][n][r % 2 * 2 + j], line, key(r));
        });
    } else {
        for_elements<M, N>(key, [&](int r, int n, int j, int position) {
            pair(p[r / 2][n][r % 2 * 2 + j], ds[r / 2][n][r % 2 * 2 + j], query(r), position);
        });
    }
}

#endif
