/* softmax_wgmma_backward.cuh - backward softmax attention on Hopper: sizes of tiles, what lies in shared memory, and
 * two warps that bring there what the computing ones want; dq where keys are not finite. */
#ifndef USP_CUDA_SOFTMAX_WGMMA_BACKWARD_CUH
#define USP_CUDA_SOFTMAX_WGMMA_BACKWARD_CUH
#include "softmax_extras.cuh"
#include "softmax_wgmma.cuh"

/* ---- sizes ------------------------------------------------------------------------------------------------------- */

/* STEP queries at a time. Sums of a thread: DIM / 2 of dk, VALUE_DIM / 2 of dv, STEP / 2 each of S and dP, of which
 * dq's DIM / 4 take the place. */
template <int DIM, int VALUE_DIM, int STEP, bool EXTRAS = false> struct backward_shape {
    static constexpr int dim = DIM, value_dim = VALUE_DIM, step = STEP;
    static constexpr bool extras = EXTRAS; /* soft cap, slopes, dropout: decided at run time */
    static constexpr int rows = USP_WORK_ROWS, groups = 2, stages = 2, threads = 128 * (1 + groups);
    static constexpr int copying_registers = 24, computing_registers = 240;
};

/* ---- shared memory ----------------------------------------------------------------------------------------------- */

/* What the computing warps need of each query of a step: P = 2^(x - base) * factor. */
template <typename Shape> struct query_notes {
    float base[Shape::step], factor[Shape::step], delta[Shape::step];
    alignas(16) int2 interval[Shape::step]; /* low, high: of a masked step; read two at a time */
    int position[Shape::step];
    int diagonal[Shape::step]; /* with extras */
    uint64_t word[Shape::step];
};

struct backward_job {
    softmax_job job;
    int steps;
};

struct backward_step {
    int masked, last, column, columns, head;
};

template <typename Shape> struct backward_notes {
    static constexpr int stages = Shape::stages;
    arrivals job_full, job_empty;
    arrivals q_full[stages], q_empty[stages], dout_full[stages], dout_empty[stages];
    backward_job job;
    int spoilt_keys[2],
        spoilt[2]; /* the last job of this parity whose keys, or queries and dout, were not all finite */
    backward_step step[stages];
    query_notes<Shape> query[stages];
};

template <typename Shape> struct backward_memory {
    using k_tile = slabs<Shape::rows, Shape::dim>;
    using v_tile = slabs<Shape::rows, Shape::value_dim>;
    using q_tile = slabs<Shape::step, Shape::dim>;
    using dout_tile = slabs<Shape::step, Shape::value_dim>;
    using ds_tile = slabs<Shape::rows, Shape::step>; /* rows are keys */
    static constexpr int k = 0, v = k + k_tile::bytes, q = v + v_tile::bytes;
    static constexpr int dout = q + Shape::stages * q_tile::bytes;
    static constexpr int ds = dout + Shape::stages * dout_tile::bytes;
    static constexpr int notes = ds + 2 * ds_tile::bytes;
    static constexpr int bytes = notes + (int)sizeof(backward_notes<Shape>);

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
    static __device__ __forceinline__ ds_tile ds_at(int turn) {
        return {shared_base() + ds + turn * ds_tile::bytes};
    }
};

struct backward_maps {
    tile_map q, k, v, dout;
};

/* ---- the copying warps ------------------------------------------------------------------------------------------- */

/* Two warps walk alike: the first one copies tiles, the second one notes what is kept of their queries. */
template <typename Shape> struct backward_copying {
    using memory = backward_memory<Shape>;
    using notes_type = backward_notes<Shape>;
    const usp_softmax &args;
    const backward_maps &maps;
    notes_type &notes;
    turn<Shape::stages> at;
    int job_parity;

    __device__ __forceinline__ backward_copying(const usp_softmax &args_, const backward_maps &maps_,
                                                notes_type &notes_)
        : args(args_), maps(maps_), notes(notes_), at{0, 0}, job_parity(0) {
    }

    __device__ __forceinline__ void start(const softmax_job &job, bool steps) {
        job_parity ^= 1;
        if (threadIdx.x != 0) return;
        await(&notes.job_empty, job_parity);
        notes.job = {job, steps};
        arrive_with(&notes.job_full, steps ? memory::k_tile::bytes + memory::v_tile::bytes : 0);
        if (!steps) return;
        memory::k_at().copy(&maps.k, job.begin, job.head, job.batch, &notes.job_full);
        memory::v_at().copy(&maps.v, job.begin, job.head, job.batch, &notes.job_full);
    }

    __device__ __forceinline__ void copy_step(const tile_walk &walk, int head, int batch) {
        arrivals *q_full = &notes.q_full[at.stage], *dout_full = &notes.dout_full[at.stage];
        if (threadIdx.x != 0) return;
        await(&notes.q_empty[at.stage], at.parity ^ 1);
        arrive_with(q_full, memory::q_tile::bytes);
        memory::q_at(at.stage).copy(&maps.q, walk.column, head, batch, q_full);
        await(&notes.dout_empty[at.stage], at.parity ^ 1);
        arrive_with(dout_full, memory::dout_tile::bytes);
        memory::dout_at(at.stage).copy(&maps.dout, walk.column, head, batch, dout_full);
    }

    __device__ __forceinline__ void note_queries(const tile_walk &walk, bool masked, int head, int batch) {
        query_notes<Shape> &to = notes.query[at.stage];
        int64_t line = line_of(args, batch, head, walk.column);
#pragma unroll
        for (int i = threadIdx.x % 32; i < Shape::step; i += 32) {
            bool exists = i < walk.columns();
            row_state row = exists ? row_state{args.top[line + i], args.sum[line + i]} : row_state{-INFINITY, 0};
            to.base[i] = base_of(row);
            to.factor[i] = factor_of(row);
            to.delta[i] = exists ? args.delta[line + i] : 0;
            if constexpr (Shape::extras) {
                to.diagonal[i] = bias_position(args, args.pairs.diagonal, walk.column, i, walk.columns());
                if (args.dropout.rate > 0 && exists) to.word[i] = dropout_row(args, batch, head, walk.column + i);
            }
            if (!masked) continue;
            int query = walk.column + i;
            to.interval[i] =
                exists ? make_int2(max(args.pairs.low[query], NOWHERE + 1), args.pairs.high[query]) : make_int2(1, 0);
            if (args.pairs.last) to.position[i] = exists ? args.pairs.query[query] : 0;
        }
    }

    /* A job of fewer keys than a tile has rows masks the others in every step: they must add nothing to dq. */
    __device__ __forceinline__ void note_step(const tile_walk &walk, const softmax_job &job, bool last, int head) {
        bool masked = !walk.full(Shape::step) || job.count < Shape::rows;
        await(&notes.q_empty[at.stage], at.parity ^ 1);
        note_queries(walk, masked, head, job.batch);
        __syncwarp();
        if (threadIdx.x % 32 != 0) return;
        notes.step[at.stage] = {masked, last, walk.column, min(walk.columns(), Shape::step), head};
        arrive(&notes.q_full[at.stage]);
    }

    __device__ __forceinline__ void run() {
        job_list jobs(args, true);
        bool copies = threadIdx.x < 32;
        for (;;) {
            softmax_job job = jobs.next(args, true);
            head_range heads = readers_of(args, job.head);
            bool steps = job.count > 0 && job.work->tiles > 0 && heads.end > heads.first;
            if (copies) start(job, steps);
            if (job.count == 0) return;
            if (!steps) continue;
            for (tile_walk walk(args.by_key, *job.work, heads.end - heads.first); walk.running(); at.advance()) {
                tile_walk now = walk;
                walk.advance(Shape::step);
                if (copies)
                    copy_step(now, heads.first + now.round, job.batch);
                else
                    note_step(now, job, !walk.running(), heads.first + now.round);
            }
        }
    }
};

/* ---- numbers that are not finite --------------------------------------------------------------------------------- */

constexpr int MEET_BOTH = 1, MEET_GROUP = 2; /* barriers: of both groups, of each alone */

/* dq of a step where keys are not finite, by both groups: only pairs that are allowed count. */
template <typename T, typename Shape>
static __device__ __noinline__ void add_one_by_one(const usp_softmax &args, const backward_notes<Shape> &notes,
                                                   const backward_step &step, int ds_turn) {
    const usp_pairs &pairs = args.pairs;
    const softmax_job &job = notes.job.job;
    auto ds = backward_memory<Shape>::ds_at(ds_turn);
    auto k = backward_memory<Shape>::k_at();
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

#endif
