/* softmax_wgmma_backward.cuh - backward softmax attention on Hopper: sizes of tiles, and what lies in shared memory.
 * Two kernels share it: that for the widest heads has its own sizes. */
#ifndef USP_CUDA_SOFTMAX_WGMMA_BACKWARD_CUH
#define USP_CUDA_SOFTMAX_WGMMA_BACKWARD_CUH
#include "softmax_wgmma_jobs.cuh"

/* ---- sizes ------------------------------------------------------------------------------------------------------- */

/* STEP queries at a time, with wide heads in two parts. Sums of a thread: DIM / 2 of dk, VALUE_DIM / 2 of dv, half as
 * many each of S and dP as a part has queries, of which those of dq take the place. */
template <int DIM, int VALUE_DIM, int STEP, int EXTRAS = 0> struct backward_shape {
    static constexpr int dim = DIM, value_dim = VALUE_DIM, step = STEP, parts = DIM > 128 ? 2 : 1, part = STEP / parts;
    static constexpr bool caps = EXTRAS & CAPS, slopes = EXTRAS & SLOPES, drops = EXTRAS & DROPS;
    static constexpr bool more = slopes && drops;
    static constexpr int rows = USP_WORK_ROWS, groups = 2, threads = 128 * (1 + groups);
    static constexpr int stages = 2, dout_stages = 2;   /* of queries, with what is noted of them, and of dout */
    static constexpr bool splits_queries = STEP == 128; /* of dq, among groups; else its columns are split */
    static constexpr int dq_boxes = DIM * STEP / 64 / groups / 32, dq_together = parts == 1 ? dq_boxes : 1;
    static constexpr int dq_places = dq_boxes / dq_together;
    static constexpr bool rests_late = false;                       /* the last box of dq is left a step late */
    static constexpr bool boxes_keys = true;                        /* dk and dv may leave in boxes */
    static constexpr bool early_bases = STEP == 128 && EXTRAS == 0; /* loaded while scores are awaited */
    static constexpr int copying_registers = 40, computing_registers = 232;

    /* A group leaves dq of 64 of the step's queries in boxes of 32 columns, some together in one place: of all columns,
     * or of whole slabs of 64, from the first or up to the last one, and of half a slab between if their number is odd.
     */
    static __device__ __forceinline__ int dq_query(int group) {
        return splits_queries ? group * 64 : 0;
    }
    static __device__ __forceinline__ int dq_column(int group, int box) {
        constexpr int whole = DIM / 128 * 64, half = DIM / 2 - whole;
        if (splits_queries) return box * 32;
        return box * 32 + group * (box * 32 < whole ? DIM - whole : half);
    }
};

/* ---- shared memory ----------------------------------------------------------------------------------------------- */

/* Factors that differ from 1 by less, which those of scores up to 2^8 do, change no weight by more than 2^-7 of what
 * its rounding to 16 bits does. */
constexpr float UNSEEN = 1.0f / 65536;

/* What the computing warps need of each query of a part of a step: P = 2^(x - base) * factor, where the factor is what
 * the rounding of base left out. With slopes, in steps that are not masked, base includes the slope times the query's
 * place. With dropout it is 1 / (1 - rate) times as large, and delta 1 - rate times. */
template <typename Shape> struct query_notes {
    int scaled[2]; /* whether a factor that a warp noted is seen */
    float base[Shape::part], factor[Shape::part], delta[Shape::part];
    /* Of a masked step, as position, key, last: low, high, read two at a time. */
    alignas(16) int2 interval[Shape::part];
    int position[Shape::part];
    int key[Shape::rows], last[Shape::rows]; /* of the job's keys; no interval has those that do not exist */
    float place[Shape::part];                /* with slopes: of the diagonal, from the job's first key on */
    alignas(16) uint64_t word[Shape::part];  /* with dropout: usp_dropout_twice */
};

struct backward_job {
    softmax_job job;
    int steps, looked; /* looked: the parity of the phase in which its keys are looked over, as in steps */
};

/* The first and the last step of a job, and a step that has pairs that are not allowed; of all its parts. */
enum step_kind { FIRST_STEP = 1, LAST_STEP = 2, MASKED_STEP = 4 };

struct backward_step {
    int kind, looked, column, columns; /* columns: how many, of all its parts */
    float slope; /* of the head; its opposite in a step that is not masked, whose keys are behind its queries */
};

/* Steps whose turns have come, if in turns: one waits to be added, dq of the next one is found, two are copied. */
constexpr int ADMITTED = 4;

template <typename Shape> struct backward_notes {
    static constexpr int stages = Shape::stages, dout_stages = Shape::dout_stages;
    arrivals job_full, job_empty, keys_looked; /* the last: its keys were looked over */
    arrivals admitted[ADMITTED];               /* the turn of a step to be added has come */
    arrivals paired;                           /* dS of a step is written, and dq of the one before was found */
    arrivals ended[Shape::groups], left;       /* dk and dv are stored, or in shared memory; they were read there */
    job_deals deals;
    arrivals q_full[stages], q_empty[stages], dout_full[dout_stages], dout_empty[dout_stages];
    arrivals looked[stages]; /* of masked steps: what they have for queries and dout was looked over */
    arrivals dq_full[Shape::groups][Shape::dq_places], dq_empty[Shape::groups][Shape::dq_places];
    backward_job job;
    bool boxes[Shape::groups]; /* dk and dv of an ended job are in shared memory */
    int spoilt_keys[2],
        spoilt[2]; /* the last job of this parity whose keys, or queries and dout, were not all finite */
    backward_step step[stages];
    backward_step before[Shape::groups]; /* where keys are not finite: the step whose dq is to be left */
    int unclean[stages][2];              /* of a masked step, whether a warp that notes found what is not finite */
    uint32_t limit;                      /* dropout's, of words that are twice as large */
    query_notes<Shape> query[stages];
    float place[Shape::rows];   /* with slopes: of the job's keys, from the first one on */
    uint32_t draw[Shape::rows]; /* what dropout draws for them */
};

/* Before anything is awaited; __syncthreads must follow. */
template <typename Shape> static __device__ __forceinline__ void begin_notes(backward_notes<Shape> &notes) {
    constexpr int warps = 4 * Shape::groups;
    begin_arrivals(&notes.job_full, 1);
    begin_arrivals(&notes.job_empty, warps);
    begin_arrivals(&notes.keys_looked, 1);
    for (arrivals &ended : notes.ended) begin_arrivals(&ended, 4);
    begin_arrivals(&notes.left, 1);
    begin_arrivals(&notes.paired, warps);
    for (arrivals &admitted : notes.admitted) begin_arrivals(&admitted, 1);
    for (int s = 0; s < Shape::stages; s++) {
        begin_arrivals(&notes.q_full[s], 3); /* the copy, two of notes */
        begin_arrivals(&notes.q_empty[s], warps);
        begin_arrivals(&notes.looked[s], 2); /* warps that note */
    }
    for (int s = 0; s < Shape::dout_stages; s++) {
        begin_arrivals(&notes.dout_full[s], 1);
        begin_arrivals(&notes.dout_empty[s], warps);
    }
    for (int i = 0; i < Shape::groups * Shape::dq_places; i++) {
        begin_arrivals(&notes.dq_full[i / Shape::dq_places][i % Shape::dq_places], 4);
        begin_arrivals(&notes.dq_empty[i / Shape::dq_places][i % Shape::dq_places], 1);
    }
    begin_deals(notes.deals, 3); /* the warps beside the copying one */
    publish_arrivals();
    for (int i = 0; i < 2; i++) notes.spoilt[i] = notes.spoilt_keys[i] = 0;
}

/* What is copied; where each group leaves dq, fp32, in boxes of 32 columns. */
template <typename Shape> struct backward_tiles {
    using k_tile = slabs<Shape::rows, Shape::dim>;
    using v_tile = slabs<Shape::rows, Shape::value_dim>;
    using q_tile = slabs<Shape::part, Shape::dim>;
    using dout_tile = slabs<Shape::part, Shape::value_dim>;
    static constexpr int k = 0, v = k + k_tile::bytes, q = v + v_tile::bytes;
    static constexpr int dout = q + Shape::stages * q_tile::bytes;
    static constexpr int dq = dout + Shape::dout_stages * dout_tile::bytes, dq_box = 64 * 128;
    static constexpr int dq_place = Shape::dq_together * dq_box;
    static constexpr int end = dq + Shape::groups * Shape::dq_places * dq_place;

    static __device__ __forceinline__ k_tile k_at() {
        return {shared_base() + k};
    }
    static __device__ __forceinline__ v_tile v_at() {
        return {shared_base() + v};
    }
    static __device__ __forceinline__ q_tile q_at(int stage) {
        return {shared_base() + q + stage * q_tile::bytes};
    }
    static __device__ __forceinline__ dout_tile dout_at(int stage) {
        return {shared_base() + dout + stage * dout_tile::bytes};
    }
    static __device__ __forceinline__ uint32_t dq_at(int group, int place) {
        return shared_base() + dq + (group * Shape::dq_places + place) * dq_place;
    }
};

/* Where dout of a step lies, given where its queries do: there may be one place of it for two of them. */
template <typename Shape>
static __device__ __forceinline__ turn<Shape::dout_stages> dout_of(const turn<Shape::stages> &at) {
    static_assert(Shape::stages == 2, "one place is filled anew in every step");
    if constexpr (Shape::dout_stages == 2)
        return at;
    else
        return {0, at.stage};
}

/* P^T or dS^T of a step: rows are keys. */
template <typename Shape> using pairs_tile = slabs<Shape::rows, Shape::step>;

template <typename Shape> struct backward_memory : backward_tiles<Shape> {
    using ds_tile = pairs_tile<Shape>;
    static constexpr int ds = backward_tiles<Shape>::end, notes = ds + 2 * ds_tile::bytes;
    static constexpr int bytes = notes + (int)sizeof(backward_notes<Shape>);

    static __device__ __forceinline__ ds_tile ds_at(int turn) {
        return {shared_base() + ds + turn * ds_tile::bytes};
    }
    /* Between jobs: where a group's rows of dk lie, in the place of its dq, and of dv. */
    using dk_tile = slabs<64, Shape::dim>;
    using dv_tile = slabs<64, Shape::value_dim>;
    static_assert(dk_tile::bytes <= Shape::dq_places * backward_tiles<Shape>::dq_place &&
                      dv_tile::bytes <= ds_tile::bytes,
                  "they fit");

    static __device__ __forceinline__ dk_tile dk_at(int group) {
        return {backward_tiles<Shape>::dq_at(group, 0)};
    }
    static __device__ __forceinline__ dv_tile dv_at(int group) {
        return {ds_at(group).address};
    }
};

struct backward_maps {
    tile_map q, k, v, dout, dq_sum, dk, dv;
    bool has_keys; /* there are dk and dv */
};

/* ---- launch ------------------------------------------------------------------------------------------------------ */

template <typename Shape>
static usp_status make_backward_maps(const usp_gpu *gpu, const usp_softmax &args, backward_maps *maps) {
    USP_TRY(make_map(gpu, args, args.dtype, false, args.q, args.dim, Shape::part, &maps->q));
    USP_TRY(make_map(gpu, args, args.dtype, false, args.dout, args.value_dim, Shape::part, &maps->dout));
    USP_TRY(make_map(gpu, args, args.dtype, true, args.k, args.dim, Shape::rows, &maps->k));
    USP_TRY(make_map(gpu, args, args.dtype, true, args.v, args.value_dim, Shape::rows, &maps->v));
    USP_TRY(make_map(gpu, args, USP_F32, false, args.dq_sum, args.dim, 64, &maps->dq_sum));
    maps->has_keys = Shape::boxes_keys && args.key_dtype == args.dtype && is_copied(args, true, args.dk) &&
                     is_copied(args, true, args.dv);
    if (!maps->has_keys) return USP_OK;
    USP_TRY(make_map(gpu, args, args.dtype, true, args.dk, args.dim, 64, &maps->dk));
    return make_map(gpu, args, args.dtype, true, args.dv, args.value_dim, 64, &maps->dv);
}

#endif
