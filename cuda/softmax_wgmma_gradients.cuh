/* softmax_wgmma_gradients.cuh - what the computing groups of the backward kernels for Hopper share: scores and their
 * gradients on accumulators, and numbers that are not finite. */
#ifndef USP_CUDA_SOFTMAX_WGMMA_GRADIENTS_CUH
#define USP_CUDA_SOFTMAX_WGMMA_GRADIENTS_CUH
#include "softmax_extras.cuh"
#include "softmax_wgmma_backward_warps.cuh"

/* ---- scores and their gradients ---------------------------------------------------------------------------------- */

/* Accumulators here have keys for rows; their columns are the queries of a part of a step from `first` on. */

/* The weight of a pair that is not allowed: no other weight has these bits, but of a dropped pair a weight of 0, whose
 * gradient is 0 too. */
constexpr float NO_WEIGHT = -0.0f;

static __device__ __forceinline__ bool is_weight(float weight) {
    return __float_as_uint(weight) != 0x80000000u;
}

/* What usp_pairs says of a lane's two keys, as noted; the warp's first one is `first`. `tree`: intervals are two-sided.
 */
struct key_pairs {
    int key[2], last[2];

    template <typename Shape>
    __device__ __forceinline__ key_pairs(const query_notes<Shape> &query, int first, bool tree) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            int i = first + usp_lane_row(0, r);
            key[r] = query.key[i];
            last[r] = tree ? query.last[i] : 0;
        }
    }

    /* Takes the weights of pairs that are not allowed, in the column block of a lane's columns `i` and i + 1. */
    template <typename Shape>
    __device__ __forceinline__ void mask_interval(float (&c)[4], const query_notes<Shape> &query, int i) const {
        int4 two = *reinterpret_cast<const int4 *>(query.interval + i);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float *pair = &c[r * 2];
            pair[0] = key[r] < two.x || key[r] > two.y ? NO_WEIGHT : pair[0];
            pair[1] = key[r] < two.z || key[r] > two.w ? NO_WEIGHT : pair[1];
        }
    }

    template <typename Shape>
    __device__ __forceinline__ void mask_behind(float (&c)[4], const query_notes<Shape> &query, int i) const {
        int2 two = *reinterpret_cast<const int2 *>(query.position + i);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float *pair = &c[r * 2];
            pair[0] = two.x > last[r] ? NO_WEIGHT : pair[0];
            pair[1] = two.y > last[r] ? NO_WEIGHT : pair[1];
        }
    }

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

template <typename Shape, int N>
static __device__ __forceinline__ void multiply_queries(usp_sums<1, N> &s, const query_notes<Shape> &query, int first) {
#pragma unroll
    for (int n = 0; n < N; n++) {
        float2 factor = *reinterpret_cast<const float2 *>(query.factor + first + usp_lane_column(n));
#pragma unroll
        for (int i = 0; i < 4; i++) s[0][n][i] *= i % 2 ? factor.y : factor.x;
    }
}

/* The bases of a lane's queries. */
template <int N> struct query_bases {
    float2 base[N];

    template <typename Shape> __device__ __forceinline__ void load(const query_notes<Shape> &query, int first = 0) {
#pragma unroll
        for (int n = 0; n < N; n++)
            base[n] = *reinterpret_cast<const float2 *>(query.base + first + usp_lane_column(n));
    }
};

/* S^T to P^T; `exponent` gives what is above the base, of a score, the base, a row of a lane's two, and a column. */
template <typename Shape, int N, typename Exponent>
static __device__ __forceinline__ void weigh(usp_sums<1, N> &s, const query_bases<N> &bases,
                                             const query_notes<Shape> &query, const Exponent &exponent, int first = 0) {
#pragma unroll
    for (int n = 0; n < N; n++) {
        float2 base = bases.base[n];
        int column = first + usp_lane_column(n);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float *pair = &s[0][n][r * 2];
            pair[0] = fast_exp2(exponent(pair[0], base.x, r, column));
            pair[1] = fast_exp2(exponent(pair[1], base.y, r, column + 1));
        }
    }
    if (N > 8 || (query.scaled[0] | query.scaled[1])) multiply_queries(s, query, first); /* N > 8: registers are dear */
}

/* `dp`, dP^T, to dS^T. Where keys or queries that do not meet are not finite, their dP is not. */
template <bool MASKED, typename Shape, int N>
static __device__ __forceinline__ void differ(usp_sums<1, N> &dp, const usp_sums<1, N> &p,
                                              const query_notes<Shape> &query, int first = 0) {
#pragma unroll
    for (int n = 0; n < N; n++) {
        float2 delta = *reinterpret_cast<const float2 *>(query.delta + first + usp_lane_column(n));
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const float *weight = &p[0][n][r * 2];
            float *x = &dp[0][n][r * 2];
            x[0] = !MASKED || is_weight(weight[0]) ? weight[0] * (x[0] - delta.x) : 0;
            x[1] = !MASKED || is_weight(weight[1]) ? weight[1] * (x[1] - delta.y) : 0;
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

/* ---- dq --------------------------------------------------------------------------------------------------------- */

/* Leaves boxes of a group's share of dq of a step to be added to the sums. Chunks of 16 bytes are swizzled by row & 7;
 * neighbouring rows would meet in the same banks, so odd ones write their column blocks in another order. */
template <typename Shape, int N>
static __device__ __forceinline__ void leave_queries(const usp_sums<1, N> &dq, float scale,
                                                     backward_notes<Shape> &notes, int group,
                                                     const turn<Shape::dq_places> &place) {
    int row = threadIdx.x / 32 % 4 * 16 + usp_lane_row(0, 0), half = (threadIdx.x & 3) / 2;
    bool odd = row & 1;
    uint32_t at = row * 128 + ((half ^ (row & 7) ^ odd << 2) << 4) + (threadIdx.x & 1) * 8;
    uint32_t to = backward_tiles<Shape>::dq_at(group, place.stage) + at;
    await(&notes.dq_empty[group][place.stage], place.parity ^ 1);
    pin(to);
#pragma unroll
    for (int n = 0; n < N; n++) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const float *even_pair = &dq[0][n][r * 2], *odd_pair = &dq[0][n ^ 2][r * 2];
            float x = odd ? odd_pair[0] : even_pair[0], y = odd ? odd_pair[1] : even_pair[1];
            store_shared_pair((to ^ n % 4 << 5) + n / 4 * backward_tiles<Shape>::dq_box + r * 1024, x * scale,
                              y * scale);
        }
    }
    publish_stores();
    arrive_warp(&notes.dq_full[group][place.stage]);
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
static __device__ __forceinline__ void clean_step(backward_notes<Shape> &notes, const turn<Shape::stages> &at,
                                                  int job) {
    await(&notes.looked[at.stage], notes.step[at.stage].looked);
    if (!(notes.unclean[at.stage][0] | notes.unclean[at.stage][1])) return;
    meet(MEET_BOTH, 256); /* the products that read them are done */
    clean<T>(backward_tiles<Shape>::q_at(at.stage), job, &notes.spoilt[job % 2]);
    clean<T>(backward_tiles<Shape>::dout_at(dout_of<Shape>(at).stage), job, &notes.spoilt[job % 2]);
    publish_stores();
    meet(MEET_BOTH, 256);
}

/* The keys of a job stay as they are: with such numbers among them dq is summed pair by pair. */
template <typename Shape>
static __device__ __forceinline__ bool are_keys_spoilt(backward_notes<Shape> &notes, int job) {
    await(&notes.keys_looked, notes.job.looked);
    return notes.spoilt_keys[job % 2] == job;
}

/* As leave_queries, boxes from `first` on, where keys are not finite: only pairs that are allowed count, one by one. */
template <typename T, typename Shape>
static __device__ __noinline__ void leave_one_by_one(const usp_softmax &args, backward_notes<Shape> &notes, int group,
                                                     turn<Shape::dq_places> place, int first, const backward_step &step,
                                                     pairs_tile<Shape> ds) {
    using tiles = backward_tiles<Shape>;
    const softmax_job &job = notes.job.job;
    await(&notes.dq_empty[group][place.stage], place.parity ^ 1);
    for (int i = threadIdx.x % 128; i < Shape::dq_together * 64 * 32; i += 128) {
        int box = i / 32 / 64, row = i / 32 % 64, q = Shape::dq_query(group) + row;
        int e = Shape::dq_column(group, first + box) + i % 32;
        float sum = 0;
        for (int j = 0; j < job.count && q < step.columns && e < args.dim; j++) {
            if (step.kind & MASKED_STEP && !pair_allowed(args.pairs, step.column + q, job.begin + j)) continue;
            sum = fmaf(element_of<T>(ds, j, q), element_of<T>(tiles::k_at(), j, e), sum);
        }
        uint32_t to = tiles::dq_at(group, place.stage) + box * tiles::dq_box + row * 128;
        store_shared(to + ((i % 32 / 4 ^ (row & 7)) << 4) + i % 4 * 4, __float_as_uint(sum * args.scale));
    }
    publish_stores();
    arrive_warp(&notes.dq_full[group][place.stage]);
}

/* Brings what was taken out of queries and dout to dk and dv of those of a job's rows that depend on it, by `threads`
 * threads. `every`: steps that are full may have been masked too. */
template <typename T, typename Shape>
static __device__ __forceinline__ void mend_keys(const usp_softmax &args, const softmax_job &job, bool every,
                                                 int thread, int threads) {
    bool fp32 = args.key_dtype == USP_F32;
    for (int element = thread; element < max(args.dim, args.value_dim); element += threads) {
        mend<T, true>(args, job, Shape::step, every, element, args.dk, fp32, args.q, args.dim);
        mend<T, true>(args, job, Shape::step, every, element, args.dv, fp32, args.dout, args.value_dim);
    }
}

/* ---- steps and jobs ---------------------------------------------------------------------------------------------- */

/* All steps of a job: what begin_steps, issue_scores, run_step and end_steps of a Group do. */
template <typename Group> static __device__ __forceinline__ void run_steps(Group &group) {
    auto &notes = group.notes;
    typename Group::scores s;
    group.begin_steps();
    await(&notes.q_full[group.at.stage], group.at.parity);
    group.issue_scores(s);
    await_products<0>();
    pin(list_of<Group::N>(s));
    int kind, next = notes.step[group.at.stage].kind;
    do {
        kind = next;
        next = kind & MASKED_STEP ? group.template run_step<true>(s, kind) : group.template run_step<false>(s, kind);
    } while (!(kind & LAST_STEP));
    group.end_steps();
}

/* Job after job: what begin_job, end_job and mend_rows of a Group do, and all steps between. */
template <typename Group> static __device__ __forceinline__ void run_jobs(Group &group) {
    auto &notes = group.notes;
    for (;;) {
        await(&notes.job_full, group.jobs++ & 1);
        if (notes.job.job.count == 0) break;
        await(&notes.left, group.jobs & 1);
        group.begin_job();
        if (notes.job.steps) run_steps(group);
        backward_job now = notes.job;
        arrive_warp(&notes.job_empty);
        bool spoilt = now.steps && notes.spoilt[group.jobs % 2] == group.jobs, boxes = group.end_job(now.job, spoilt);
        if (threadIdx.x % 128 == 0) notes.boxes[group.group] = boxes;
        arrive_warp(&notes.ended[group.group]);
        if (spoilt) group.mend_rows(now.job);
    }
}

#endif
