/* softmax_wgmma_gradients.cuh - what the computing groups of the backward kernels for Hopper share: scores and their
 * gradients on accumulators, and numbers that are not finite. */
#ifndef USP_CUDA_SOFTMAX_WGMMA_GRADIENTS_CUH
#define USP_CUDA_SOFTMAX_WGMMA_GRADIENTS_CUH
#include "softmax_wgmma_backward.cuh"

/* ---- scores and their gradients ---------------------------------------------------------------------------------- */

/* Accumulators here have keys for rows; their columns are the queries of a step from `first` on. */

/* What usp_pairs says of a lane's two keys. */
struct key_pairs {
    int key[2], last[2];

    __device__ __forceinline__ key_pairs(const usp_pairs &pairs, int first, int rows) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            int i = usp_lane_row(0, r);
            key[r] = load_or(pairs.key, first, i, rows, NOWHERE);
            last[r] = pairs.last ? load_or(pairs.last, first, i, rows, 0) : 0;
        }
    }

    /* Sets the elements of pairs that are not allowed to 0, in the column block of a lane's columns `i` and i + 1. */
    template <typename Shape>
    __device__ __forceinline__ void mask_interval(float (&c)[4], const query_notes<Shape> &query, int i) const {
        int4 two = *reinterpret_cast<const int4 *>(query.interval + i);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float *pair = &c[r * 2];
            pair[0] = key[r] < two.x || key[r] > two.y ? 0 : pair[0];
            pair[1] = key[r] < two.z || key[r] > two.w ? 0 : pair[1];
        }
    }

    template <typename Shape>
    __device__ __forceinline__ void mask_behind(float (&c)[4], const query_notes<Shape> &query, int i) const {
        int2 two = *reinterpret_cast<const int2 *>(query.position + i);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float *pair = &c[r * 2];
            pair[0] = two.x > last[r] ? 0 : pair[0];
            pair[1] = two.y > last[r] ? 0 : pair[1];
        }
    }

    /* `tree`: intervals are two-sided. */
    template <typename Shape, int N>
    __device__ __forceinline__ void mask(usp_sums<1, N> &c, const query_notes<Shape> &query, bool tree,
                                         int first = 0) const {
#pragma unroll
        for (int n = 0; n < N; n++) mask_interval(c[0][n], query, first + usp_lane_column(n));
        if (!tree) return;
#pragma unroll
        for (int n = 0; n < N; n++) mask_behind(c[0][n], query, first + usp_lane_column(n));
    }
};

/* S^T to P^T. */
template <typename Shape, int N>
static __device__ __forceinline__ void weigh(usp_sums<1, N> &s, const query_notes<Shape> &query, float unit,
                                             int first = 0) {
#pragma unroll
    for (int n = 0; n < N; n++) {
        float2 base = *reinterpret_cast<const float2 *>(query.base + first + usp_lane_column(n));
        float2 factor = *reinterpret_cast<const float2 *>(query.factor + first + usp_lane_column(n));
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float *pair = &s[0][n][r * 2];
            pair[0] = fast_exp2(fmaf(pair[0], unit, -base.x)) * factor.x;
            pair[1] = fast_exp2(fmaf(pair[1], unit, -base.y)) * factor.y;
        }
    }
}

/* `dp`, dP^T, to dS^T. */
template <typename Shape, int N>
static __device__ __forceinline__ void differ(usp_sums<1, N> &dp, const usp_sums<1, N> &p,
                                              const query_notes<Shape> &query, int first = 0) {
#pragma unroll
    for (int n = 0; n < N; n++) {
        float2 delta = *reinterpret_cast<const float2 *>(query.delta + first + usp_lane_column(n));
#pragma unroll
        for (int r = 0; r < 2; r++) {
            dp[0][n][r * 2] = p[0][n][r * 2] * (dp[0][n][r * 2] - delta.x);
            dp[0][n][r * 2 + 1] = p[0][n][r * 2 + 1] * (dp[0][n][r * 2 + 1] - delta.y);
        }
    }
}

template <int N> static __device__ __forceinline__ void copy_sums(usp_sums<1, N> &to, const usp_sums<1, N> &from) {
#pragma unroll
    for (int n = 0; n < N; n++) {
#pragma unroll
        for (int i = 0; i < 4; i++) to[0][n][i] = from[0][n][i];
    }
}

/* ---- numbers that are not finite --------------------------------------------------------------------------------- */

constexpr int MEET_BOTH = 1, MEET_GROUP = 2; /* barriers: of both groups, of each alone */

/* Both groups: takes them out of a tile, and leaves `job`, its number, in `spoilt`. */
template <typename T, typename Tile> static __device__ __forceinline__ void clean(Tile tile, int job, int *spoilt) {
    for (int i = (threadIdx.x - 128) * 16; i < Tile::bytes; i += 256 * 16) {
        if (!is_spoilt<T>(tile.address + i)) continue;
        *spoilt = job;
        for (int j = 0; j < 16; j += 4) usp_clear_pair<T>(tile.address + i + j);
    }
}

template <typename T, typename Shape>
static __device__ __forceinline__ void clean_step(backward_notes<Shape> &notes, int stage, int job) {
    meet(MEET_BOTH, 256); /* the products that read them are done */
    clean<T>(backward_tiles<Shape>::q_at(stage), job, &notes.spoilt[job % 2]);
    clean<T>(backward_tiles<Shape>::dout_at(stage), job, &notes.spoilt[job % 2]);
    publish_stores();
    meet(MEET_BOTH, 256);
}

/* The keys of a job stay as they are: with such numbers among them dq is summed pair by pair. */
template <typename T, typename Shape>
static __device__ __forceinline__ void look_at_keys(backward_notes<Shape> &notes, int job) {
    auto tile = backward_tiles<Shape>::k_at();
    for (int i = (threadIdx.x - 128) * 16; i < tile.bytes; i += 256 * 16)
        if (is_spoilt<T>(tile.address + i)) notes.spoilt_keys[job % 2] = job;
    meet(MEET_BOTH, 256);
}

/* dq of a step where keys are not finite, by both groups: only pairs that are allowed count. */
template <typename T, typename Shape>
static __device__ __noinline__ void add_one_by_one(const usp_softmax &args, const backward_notes<Shape> &notes,
                                                   const backward_step &step, pairs_tile<Shape> ds) {
    const usp_pairs &pairs = args.pairs;
    const softmax_job &job = notes.job.job;
    auto k = backward_tiles<Shape>::k_at();
    for (int i = threadIdx.x - 128; i < step.columns * args.dim; i += 256) {
        int q = i / args.dim, e = i % args.dim;
        float sum = 0;
        for (int j = 0; j < job.count; j++) {
            if (step.masked && !pair_allowed(pairs, step.column + q, job.begin + j)) continue;
            sum = fmaf(element_of<T>(ds, j, q), element_of<T>(k, j, e), sum);
        }
        atomicAdd(usp_row<float>(args.dq_sum, step.column + q, job.batch, step.head) + e, sum * args.scale);
    }
    meet(MEET_BOTH, 256);
}

/* Brings what was taken out of queries and dout to dk and dv of those of a job's rows that depend on it, by `threads`
 * threads. */
template <typename T, typename Shape>
static __device__ __forceinline__ void mend_keys(const usp_softmax &args, const softmax_job &job, bool partial,
                                                 int thread, int threads) {
    bool fp32 = args.key_dtype == USP_F32;
    for (int element = thread; element < max(args.dim, args.value_dim); element += threads) {
        mend<T, true>(args, job, Shape::step, partial, element, args.dk, fp32, args.q, args.dim);
        mend<T, true>(args, job, Shape::step, partial, element, args.dv, fp32, args.dout, args.value_dim);
    }
}

/* ---- steps and jobs ---------------------------------------------------------------------------------------------- */

/* All steps of a job: what begin_steps, issue_scores and run_step of a Group do. */
template <typename Group> static __device__ __forceinline__ void run_steps(Group &group) {
    auto &notes = group.notes;
    typename Group::scores s;
    group.begin_steps();
    look_at_keys<typename Group::element>(notes, group.jobs);
    bool odd = notes.spoilt_keys[group.jobs % 2] == group.jobs, last;
    await(&notes.q_full[group.at.stage], group.at.parity);
    group.issue_scores(s);
    await_products<0>();
    pin(list_of<Group::N>(s));
    do {
        last = notes.step[group.at.stage].last;
        if (notes.step[group.at.stage].masked)
            group.template run_step<true>(s, last, odd);
        else
            group.template run_step<false>(s, last, odd);
    } while (!last);
}

/* Job after job: what begin_job, end_job and mend_rows of a Group do, and all steps between. */
template <typename Group> static __device__ __forceinline__ void run_jobs(Group &group) {
    auto &notes = group.notes;
    for (;;) {
        await(&notes.job_full, group.job_parity);
        group.job_parity ^= 1;
        group.jobs++;
        if (notes.job.job.count == 0) return;
        group.begin_job();
        if (notes.job.steps) run_steps(group);
        backward_job now = notes.job;
        arrive_warp(&notes.job_empty);
        group.end_job(now.job);
        if (now.steps && notes.spoilt[group.jobs % 2] == group.jobs) group.mend_rows(now.job);
    }
}

#endif
