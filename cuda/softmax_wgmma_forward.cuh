/* softmax_wgmma_forward.cuh - forward softmax attention on Hopper: sizes of tiles, what lies in shared memory, what
 * computing lanes keep, and the order of steps. */
#ifndef USP_CUDA_SOFTMAX_WGMMA_FORWARD_CUH
#define USP_CUDA_SOFTMAX_WGMMA_FORWARD_CUH
#include "softmax_extras.cuh"
#include "softmax_wgmma_jobs.cuh"

/* ---- sizes ------------------------------------------------------------------------------------------------------- */

/* STEP columns at a time. Sums of a thread: STEP / 2 scores, as many weights in half the registers, VALUE_DIM / 2 of
 * out; with addresses and rows no more than 240 registers. Two stages of keys and values fill shared memory. */
template <int DIM, int VALUE_DIM, int STEP, int EXTRAS = 0> struct forward_shape {
    static constexpr int dim = DIM, value_dim = VALUE_DIM, step = STEP;
    static constexpr bool caps = EXTRAS & CAPS, slopes = EXTRAS & SLOPES, drops = EXTRAS & DROPS;
    static constexpr bool extras = EXTRAS != 0, more = slopes && drops;
    static constexpr bool notes_apart = slopes || drops;        /* what steps ask is noted by a warp of its own */
    static constexpr bool one_sided = slopes && !more && !caps; /* biases on one side are a product, and a row's */
    static constexpr int rows = USP_WORK_ROWS, groups = 2, stages = 2, threads = 128 * (1 + groups);
    /* Where exponentials take as long as products, a group's turn to multiply ends with its scores, not with its issue.
     * What dropout draws takes longer than products: there are no turns, and both groups may find weights at a time. */
    static constexpr bool turns = !drops, long_turns = DIM <= 64;
    /* Column blocks of weights that are found while values of the step before are multiplied; with the widest heads
     * those take so many registers that nothing is gained. */
    static constexpr int early = DIM <= 192 ? 3 : 0;
    /* The same where a soft cap's ways meet behind them, so that none of the others begins before: measured. */
    static constexpr int early_near = 9;
    /* Two jobs at a time, where their queries fit: the next one's first scores run under the last values of this one,
     * whose results leave from where its queries lay. */
    static constexpr int slots = DIM <= 128 ? 2 : 1;
    static constexpr bool overlaps = slots > 1, boxes_out = overlaps && VALUE_DIM <= DIM;
    /* Of 65536 / 384 = 168 a thread, what the copying warpgroup has to spare goes to the others. */
    static constexpr int copying_registers = 40, computing_registers = 232;
};

/* ---- shared memory ----------------------------------------------------------------------------------------------- */

struct forward_job {
    softmax_job job;
    int steps; /* 0: its rows meet no column */
};

/* What computing warps are told of a step of columns beside its tile. */
struct step_note {
    int masked, last;
    int bent; /* masked, or with slopes: without a bias_note */
};

/* With slopes, of a step whose keys are evenly spaced and on one side of the job's queries, and where neither are too
 * far from each other. Biases of keys are a product of 16 columns more: of the slope from one key to the next, over the
 * scale, in three parts, with the keys' numbers. What is left is a row's. */
struct bias_note {
    uint32_t part[4];   /* two columns for each of the four lanes that share a row */
    float slope, first; /* in base 2, below 0 where keys are behind queries; the place of the first key */
};

template <typename Shape, bool USED> struct bias_notes {
    alignas(16) bias_note bias[Shape::stages];
    uint4 number[Shape::step]; /* of keys of a step, each 8 times */
};
template <typename Shape> struct bias_notes<Shape, false> {};

template <typename Shape> struct forward_notes : bias_notes<Shape, Shape::one_sided> {
    static constexpr int stages = Shape::stages, slots = Shape::slots;
    arrivals job_full[slots], job_empty[slots];
    job_deals deals;
    arrivals k_full[stages], k_empty[stages], v_full[stages], v_empty[stages];
    arrivals v_clean[stages]; /* of masked steps: the values are finite, or were made so */
    forward_job job[slots];
    int spoilt[4]; /* by job % 4, of jobs with steps: the last one whose values were not all finite */
    step_note step[stages];
    alignas(8) int key[stages][Shape::step]; /* these four are read two at a time */
    alignas(8) int last[stages][Shape::step];
    /* Of keys, from the diagonal of the job's first row on; what dropout draws for them, also when the stage is left.
     */
    alignas(Shape::slopes ? 8 : 4) float place[Shape::slopes ? stages : 1][Shape::slopes ? Shape::step : 1];
    alignas(Shape::drops ? 8 : 4) uint32_t draw[Shape::drops ? 2 * stages : 1][Shape::drops ? Shape::step : 1];
    key_span keys[slots][Shape::rows]; /* of a job's rows */
    int query[slots][Shape::rows];
};

template <typename Shape> struct forward_memory {
    using q_tile = slabs<Shape::rows, Shape::dim>;
    using k_tile = slabs<Shape::step, Shape::dim>;
    using v_tile = slabs<Shape::step, Shape::value_dim>;
    static constexpr int q = 0, k = q + Shape::slots * q_tile::bytes, v = k + Shape::stages * k_tile::bytes;
    using out_tile = slabs<Shape::rows, Shape::value_dim>;
    static constexpr int notes = v + Shape::stages * v_tile::bytes;
    static constexpr int bytes = notes + (int)sizeof(forward_notes<Shape>);

    static __device__ __forceinline__ q_tile q_at(int slot) {
        return {shared_base() + q + slot * q_tile::bytes};
    }
    static __device__ __forceinline__ k_tile k_at(int stage) {
        return {shared_base() + k + stage * k_tile::bytes};
    }
    static __device__ __forceinline__ v_tile v_at(int stage) {
        return {shared_base() + v + stage * v_tile::bytes};
    }
    /* In the place of the queries: each group's results in that of its own. */
    static __device__ __forceinline__ out_tile out_at(int slot) {
        return {shared_base() + q + slot * q_tile::bytes};
    }
};

struct forward_maps {
    tile_map q, k, v, out;
    bool has_out; /* results may leave in boxes */
};

/* ---- what a computing lane keeps --------------------------------------------------------------------------------- */

/* Of its two rows of a job, beside out. */
template <typename Shape> struct forward_rows {
    online_softmax<1, 0> online;
    row_pairs pairs;
    scoring rule;
    lane_peaks<1> peaks; /* with extras, as what follows */
    float place[2];      /* with slopes: as those of keys are noted */
    uint64_t word[2];    /* of dropout, */
    uint32_t limits;     /* below which pairs are dropped, twice */

    /* `first`: the warp's first row of the job. */
    __device__ __forceinline__ void begin_extras(const usp_softmax &args, const softmax_job &job, int first) {
        peaks = {};
        limits = usp_dropout_limit(args.dropout.rate) * 0x10001;
#pragma unroll
        for (int r = 0; r < 2; r++) {
            int row = first + usp_lane_row(0, r), query = job.begin + row;
            place[r] = 0, word[r] = 0;
            if (row >= job.count) continue;
            if (Shape::slopes && args.slopes)
                place[r] = (float)(args.pairs.diagonal[query] - args.pairs.diagonal[job.begin]);
            if (Shape::drops && args.dropout.rate > 0) word[r] = dropout_row(args, job.batch, job.head, query);
        }
    }

    /* How much more the scores of a biased step are than they should be. */
    __device__ __forceinline__ void shift_by(const bias_note &bias, float (&shift)[2]) const {
        shift[0] = bias.slope * (place[0] - bias.first);
        shift[1] = bias.slope * (place[1] - bias.first);
    }
};

/* Calls visit(element, r, place of its key) for what a lane has of row r of a step's scores. */
template <int N, typename Visit>
static __device__ __forceinline__ void for_places(usp_sums<1, N> &c, const float *place, const Visit &visit) {
#pragma unroll
    for (int n = 0; n < N; n++) {
        float2 two = *reinterpret_cast<const float2 *>(place + usp_lane_column(n));
#pragma unroll
        for (int r = 0; r < 2; r++) {
            visit(c[0][n][r * 2], r, two.x);
            visit(c[0][n][r * 2 + 1], r, two.y);
        }
    }
}

/* 0 and up, for products with slopes. A barrier must follow. */
template <typename T, int STEP> static __device__ __forceinline__ void number_keys(uint4 (&number)[STEP]) {
    for (int i = threadIdx.x; i < STEP; i += blockDim.x) {
        uint32_t two = usp_pack<T>((float)i, (float)i);
        number[i] = {two, two, two, two};
    }
    publish_stores();
}

/* ---- steps of a job ---------------------------------------------------------------------------------------------- */

/* Goes through the columns of a work item from the last ones down, as tile_walk goes up, and as which it is used:
 * rounds and the step's columns are known here. */
template <int STEP> struct tile_descent {
    const usp_tile *list;
    int index, column; /* first column of the step */
    int begin, end, full_begin, full_end;

    __device__ __forceinline__ tile_descent(const usp_tiles &all, const usp_work &work, int)
        : list(all.tile + work.first_tile), index(work.tiles) {
        next_tile();
    }

    __device__ __forceinline__ bool running() const {
        return index >= 0;
    }
    __device__ __forceinline__ int columns() const {
        return end - column;
    }
    __device__ __forceinline__ bool full(int) const {
        return column >= full_begin && column + STEP <= full_end;
    }

    __device__ __forceinline__ void advance(int) {
        column -= STEP;
        if (column < begin) next_tile();
    }

    __device__ __forceinline__ void next_tile() {
        do {
            if (--index < 0) return;
            begin = list[index].begin;
            end = list[index].end;
        } while (begin >= end);
        column = begin + (end - begin - 1) / STEP * STEP;
        full_begin = list[index].full_begin;
        full_end = list[index].full_end;
    }
};

/* With slopes the nearest keys weigh most: those that come last are taken first, and rows are not raised in every step.
 * Without, nothing is gained, and the masked step of a causal job is better its last. */
template <typename Shape>
using forward_walk = std::conditional_t<Shape::one_sided, tile_descent<Shape::step>, tile_walk>;

#endif
