/* softmax_wgmma_backward.cuh - backward softmax attention on Hopper: sizes of tiles, what lies in shared memory, and
 * the warps that bring there what the computing ones want and take away what they leave. Two kernels share it: that for
 * wide heads has its own sizes. */
#ifndef USP_CUDA_SOFTMAX_WGMMA_BACKWARD_CUH
#define USP_CUDA_SOFTMAX_WGMMA_BACKWARD_CUH
#include "softmax_extras.cuh"
#include "softmax_wgmma.cuh"

/* ---- sizes ------------------------------------------------------------------------------------------------------- */

/* STEP queries at a time. Sums of a thread: DIM / 2 of dk, VALUE_DIM / 2 of dv, STEP / 2 each of S and dP, of which
 * dq's DIM / 4 take the place. */
template <int DIM, int VALUE_DIM, int STEP, int EXTRAS = 0> struct backward_shape {
    static constexpr int dim = DIM, value_dim = VALUE_DIM, step = STEP;
    static constexpr bool caps = EXTRAS & CAPS, slopes = EXTRAS & SLOPES, drops = EXTRAS & DROPS;
    static constexpr bool extras = EXTRAS != 0;
    static constexpr bool adds = true; /* dq reaches its sums by way of shared memory */
    static constexpr int rows = USP_WORK_ROWS, groups = 2, stages = 2, threads = 128 * (1 + groups);
    static constexpr int share = DIM / groups; /* columns of dq that one group has */
    static constexpr int copying_registers = 40, computing_registers = 232;
};

/* ---- shared memory ----------------------------------------------------------------------------------------------- */

/* What the computing warps need of each query of a step: P = 2^(x - base) * factor. With dropout the factor is
 * 1 / (1 - rate) times as large, and delta 1 - rate times. */
template <typename Shape> struct query_notes {
    float base[Shape::step], factor[Shape::step], delta[Shape::step];
    alignas(16) int2 interval[Shape::step]; /* low, high: of a masked step; read two at a time */
    int position[Shape::step];
    float place[Shape::step]; /* with slopes: of the diagonal, from the job's first key on */
    alignas(16) uint64_t word[Shape::step];
};

struct backward_job {
    softmax_job job;
    int steps;
};

struct backward_step {
    int masked, last, column, columns, head;
    float slope;
};

template <typename Shape> struct backward_notes {
    static constexpr int stages = Shape::stages;
    arrivals job_full, job_empty;
    job_deals deals;
    arrivals q_full[stages], q_empty[stages], dout_full[stages], dout_empty[stages];
    arrivals dq_full[Shape::groups], dq_empty[Shape::groups]; /* where a warp adds dq */
    backward_job job;
    int spoilt_keys[2],
        spoilt[2]; /* the last job of this parity whose keys, or queries and dout, were not all finite */
    backward_step step[stages];
    uint32_t limit; /* dropout's */
    query_notes<Shape> query[stages];
    float place[Shape::rows];   /* with slopes: of the job's keys, from the first one on */
    uint32_t draw[Shape::rows]; /* what dropout draws for them */
};

/* Before anything is awaited; __syncthreads must follow. */
template <typename Shape> static __device__ __forceinline__ void begin_notes(backward_notes<Shape> &notes) {
    constexpr int warps = 4 * Shape::groups;
    begin_arrivals(&notes.job_full, 1);
    begin_arrivals(&notes.job_empty, warps);
    for (int s = 0; s < Shape::stages; s++) {
        begin_arrivals(&notes.q_full[s], 3); /* the copy, two of notes */
        begin_arrivals(&notes.dout_full[s], 1);
        begin_arrivals(&notes.q_empty[s], warps);
        begin_arrivals(&notes.dout_empty[s], warps);
    }
    for (int g = 0; g < Shape::groups && Shape::adds; g++) {
        begin_arrivals(&notes.dq_full[g], 4);
        begin_arrivals(&notes.dq_empty[g], 1);
    }
    begin_deals(notes.deals, Shape::adds ? 3 : 2); /* the warps beside the copying one */
    publish_arrivals();
    for (int i = 0; i < 2; i++) notes.spoilt[i] = notes.spoilt_keys[i] = 0;
}

/* What is copied. */
template <typename Shape> struct backward_tiles {
    using k_tile = slabs<Shape::rows, Shape::dim>;
    using v_tile = slabs<Shape::rows, Shape::value_dim>;
    using q_tile = slabs<Shape::step, Shape::dim>;
    using dout_tile = slabs<Shape::step, Shape::value_dim>;
    static constexpr int k = 0, v = k + k_tile::bytes, q = v + v_tile::bytes;
    static constexpr int dout = q + Shape::stages * q_tile::bytes;
    static constexpr int end = dout + Shape::stages * dout_tile::bytes;

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
};

/* P^T or dS^T of a step: rows are keys. */
template <typename Shape> using pairs_tile = slabs<Shape::rows, Shape::step>;

template <typename Shape> struct backward_memory : backward_tiles<Shape> {
    using ds_tile = pairs_tile<Shape>;
    static constexpr int dq_box = Shape::step * 128, dq_bytes = Shape::share / 32 * dq_box; /* of one group, fp32 */
    static constexpr int ds = backward_tiles<Shape>::end, dq = ds + 2 * ds_tile::bytes;
    static constexpr int notes = dq + Shape::groups * dq_bytes;
    static constexpr int bytes = notes + (int)sizeof(backward_notes<Shape>);

    static __device__ __forceinline__ ds_tile ds_at(int turn) {
        return {shared_base() + ds + turn * ds_tile::bytes};
    }
    static __device__ __forceinline__ uint32_t dq_at(int group) {
        return shared_base() + dq + group * dq_bytes;
    }
};

struct backward_maps {
    tile_map q, k, v, dout, dq_sum;
};

/* ---- the copying warps ------------------------------------------------------------------------------------------- */

/* Four warps walk alike: one copies tiles, two note what is kept of 32 queries each, one adds dq of each step to the
 * sums, where that lies in shared memory. */
enum backward_duty { COPIES, NOTES_FIRST, NOTES_SECOND, ADDS };

/* What is kept of a lane's query, on its way to shared memory. */
struct query_line_notes {
    row_state row;
    float delta;
    int2 interval;
    int position;
    float place;
    uint64_t word;
};

template <typename Shape, backward_duty DUTY> struct backward_copying {
    using memory = backward_tiles<Shape>;
    using notes_type = backward_notes<Shape>;
    const usp_softmax &args;
    const backward_maps &maps;
    const soft_cap &cap;
    notes_type &notes;
    turn<Shape::stages> at;
    int parity; /* of jobs, or of dq */
    int lane;

    __device__ __forceinline__ backward_copying(const usp_softmax &args_, const backward_maps &maps_,
                                                const soft_cap &cap_, notes_type &notes_)
        : args(args_), maps(maps_), cap(cap_), notes(notes_), at{0, 0}, parity(0), lane(threadIdx.x % 32) {
        static_assert(Shape::step == 64, "two warps note 32 queries each");
    }

    __device__ __forceinline__ void start(const softmax_job &job, bool steps) {
        parity ^= 1;
        if (lane != 0) return;
        await(&notes.job_empty, parity);
        notes.job = {job, steps};
        arrive_with(&notes.job_full, steps ? memory::k_tile::bytes + memory::v_tile::bytes : 0);
        if (!steps) return;
        memory::k_at().copy(&maps.k, job.begin, job.head, job.batch, &notes.job_full);
        memory::v_at().copy(&maps.v, job.begin, job.head, job.batch, &notes.job_full);
    }

    __device__ __forceinline__ void copy_step(const tile_walk &walk, int head, int batch) {
        arrivals *q_full = &notes.q_full[at.stage], *dout_full = &notes.dout_full[at.stage];
        if (lane != 0) return;
        await(&notes.q_empty[at.stage], at.parity ^ 1);
        arrive_with(q_full, memory::q_tile::bytes);
        memory::q_at(at.stage).copy(&maps.q, walk.column, head, batch, q_full);
        await(&notes.dout_empty[at.stage], at.parity ^ 1);
        arrive_with(dout_full, memory::dout_tile::bytes);
        memory::dout_at(at.stage).copy(&maps.dout, walk.column, head, batch, dout_full);
    }

    __device__ __forceinline__ query_line_notes load_query(const tile_walk &walk, const softmax_job &job, int i,
                                                           bool masked, int head) {
        query_line_notes to = {{-INFINITY, 0}, 0, {1, 0}, 0, 0, 0};
        int query = walk.column + i;
        if (i >= walk.columns()) return to;
        int64_t line = line_of(args, job.batch, head, query);
        to.row = {args.top[line], args.sum[line]};
        to.delta = args.delta[line];
        if (masked) to.interval = {max(args.pairs.low[query], NOWHERE + 1), args.pairs.high[query]};
        if (masked && args.pairs.last) to.position = args.pairs.query[query];
        if (Shape::slopes && args.slopes) to.place = (float)(args.pairs.diagonal[query] - args.pairs.key[job.begin]);
        if (Shape::drops && args.dropout.rate > 0) to.word = dropout_row(args, job.batch, head, query);
        return to;
    }

    /* A job of fewer keys than a tile has rows masks the others in every step: they must add nothing to dq. What is
     * noted is on its way while the place for it is awaited. */
    __device__ __forceinline__ void note_step(const tile_walk &walk, const softmax_job &job, bool last, int head) {
        bool masked = !walk.full(Shape::step) || job.count < Shape::rows;
        int i = (DUTY - NOTES_FIRST) * 32 + lane;
        query_line_notes line = load_query(walk, job, i, masked, head);
        query_notes<Shape> &to = notes.query[at.stage];
        float slope = Shape::slopes && DUTY == NOTES_FIRST ? scoring::slope_of(args, head, cap) : 0;
        await(&notes.q_empty[at.stage], at.parity ^ 1);
        to.base[i] = base_of(line.row);
        to.factor[i] = factor_of(line.row) * (Shape::drops ? 1 / (1 - args.dropout.rate) : 1);
        to.delta[i] = line.delta * (Shape::drops ? 1 - args.dropout.rate : 1);
        if (masked) to.interval[i] = line.interval;
        if (masked) to.position[i] = line.position;
        if constexpr (Shape::slopes) to.place[i] = line.place;
        if constexpr (Shape::drops) to.word[i] = line.word;
        __syncwarp();
        if (lane != 0) return;
        if (DUTY == NOTES_FIRST)
            notes.step[at.stage] = {masked, last, walk.column, min(walk.columns(), Shape::step), head, slope};
        arrive(&notes.q_full[at.stage]);
    }

    /* A group's sums are free again when they have been read. */
    __device__ __forceinline__ void add_step(const tile_walk &walk, int head, int batch) {
        using sums = backward_memory<Shape>;
        if (lane != 0) return;
#pragma unroll
        for (int group = 0; group < Shape::groups; group++) {
            await(&notes.dq_full[group], parity);
#pragma unroll
            for (int box = 0; box < Shape::share / 32; box++)
                add_box(&maps.dq_sum, group * Shape::share + box * 32, walk.column, head, batch,
                        sums::dq_at(group) + box * sums::dq_box);
            end_boxes();
        }
        await_reads<1>();
        arrive(&notes.dq_empty[0]);
        await_reads<0>();
        arrive(&notes.dq_empty[1]);
        parity ^= 1;
    }

    __device__ __forceinline__ void run_steps(const softmax_job &job, const head_range &heads) {
        for (tile_walk walk(args.by_key, *job.work, heads.end - heads.first); walk.running(); at.advance()) {
            tile_walk now = walk;
            int head = heads.first + now.round;
            walk.advance(Shape::step);
            if constexpr (DUTY == COPIES)
                copy_step(now, head, job.batch);
            else if constexpr (DUTY == ADDS)
                add_step(now, head, job.batch);
            else
                note_step(now, job, !walk.running(), head);
        }
    }

    __device__ __forceinline__ void run() {
        job_list<Shape::rows, true> list(args, notes.deals);
        for (;;) {
            softmax_job job = DUTY == COPIES ? list.deal() : list.take();
            head_range heads = readers_of(args, job.head);
            bool steps = job.count > 0 && job.work->tiles > 0 && heads.end > heads.first;
            if (DUTY == COPIES) start(job, steps);
            if (job.count == 0) break;
            if (steps) run_steps(job, heads);
        }
        if (DUTY == ADDS) await_boxes();
    }
};

template <typename Shape>
static __device__ __forceinline__ void run_copying(const usp_softmax &args, const backward_maps &maps,
                                                   const soft_cap &cap, backward_notes<Shape> &notes) {
    int duty = uniform(threadIdx.x / 32);
    if (duty == COPIES)
        backward_copying<Shape, COPIES>(args, maps, cap, notes).run();
    else if (duty == NOTES_FIRST)
        backward_copying<Shape, NOTES_FIRST>(args, maps, cap, notes).run();
    else if (duty == NOTES_SECOND)
        backward_copying<Shape, NOTES_SECOND>(args, maps, cap, notes).run();
    else if constexpr (Shape::adds)
        backward_copying<Shape, ADDS>(args, maps, cap, notes).run();
}

/* ---- launch ------------------------------------------------------------------------------------------------------ */

template <typename Shape>
static usp_status make_backward_maps(const usp_gpu *gpu, const usp_softmax &args, backward_maps *maps) {
    USP_TRY(make_map(gpu, args, args.dtype, false, args.q, args.dim, Shape::step, &maps->q));
    USP_TRY(make_map(gpu, args, args.dtype, false, args.dout, args.value_dim, Shape::step, &maps->dout));
    USP_TRY(make_map(gpu, args, args.dtype, true, args.k, args.dim, Shape::rows, &maps->k));
    USP_TRY(make_map(gpu, args, args.dtype, true, args.v, args.value_dim, Shape::rows, &maps->v));
    if (!Shape::adds) return USP_OK;
    return make_map(gpu, args, USP_F32, false, args.dq_sum, args.dim, Shape::step, &maps->dq_sum);
}

#endif
