/* softmax_wgmma_backward.cuh - backward softmax attention on Hopper: sizes of tiles, what lies in shared memory, and
 * the warps that bring there what the computing ones want and take away what they leave. Two kernels share it: that for
 * wide heads has its own sizes. */
#ifndef USP_CUDA_SOFTMAX_WGMMA_BACKWARD_CUH
#define USP_CUDA_SOFTMAX_WGMMA_BACKWARD_CUH
#include "softmax_extras.cuh"
#include "softmax_wgmma_turns.cuh"

/* ---- sizes ------------------------------------------------------------------------------------------------------- */

/* STEP queries at a time. Sums of a thread: DIM / 2 of dk, VALUE_DIM / 2 of dv, STEP / 2 each of S and dP, of which
 * dq's DIM / 4 take the place. */
template <int DIM, int VALUE_DIM, int STEP, int EXTRAS = 0> struct backward_shape {
    static constexpr int dim = DIM, value_dim = VALUE_DIM, step = STEP;
    static constexpr bool caps = EXTRAS & CAPS, slopes = EXTRAS & SLOPES, drops = EXTRAS & DROPS;
    static constexpr bool extras = EXTRAS != 0;
    static constexpr int rows = USP_WORK_ROWS, groups = 2, threads = 128 * (1 + groups);
    static constexpr int stages = 2, dout_stages = 2;   /* of queries, with what is noted of them, and of dout */
    static constexpr bool splits_queries = STEP == 128; /* of dq, among groups; else its columns are split */
    static constexpr int dq_boxes = DIM * STEP / 64 / groups / 32, dq_together = dq_boxes, dq_places = 1;
    static constexpr int copying_registers = 40, computing_registers = 232;

    /* A group leaves dq of 64 of the step's queries in boxes of 32 columns, some together in one place. */
    static __device__ __forceinline__ int dq_query(int group) {
        return splits_queries ? group * 64 : 0;
    }
    static __device__ __forceinline__ int dq_column(int group, int box) {
        return ((splits_queries ? 0 : group * dq_boxes) + box) * 32;
    }
};

/* ---- shared memory ----------------------------------------------------------------------------------------------- */

/* Factors that differ from 1 by less, which those of scores up to 2^8 do, change no weight by more than 2^-7 of what
 * its rounding to 16 bits does. */
constexpr float UNSEEN = 1.0f / 65536;

/* What the computing warps need of each query of a step: P = 2^(x - base) * factor, where the factor is what the
 * rounding of base left out. With dropout it is 1 / (1 - rate) times as large, and delta 1 - rate times. */
template <typename Shape> struct query_notes {
    int scaled[2]; /* whether a factor that a warp noted is seen */
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
    static constexpr int stages = Shape::stages, dout_stages = Shape::dout_stages;
    arrivals job_full, job_empty;
    job_deals deals;
    arrivals q_full[stages], q_empty[stages], dout_full[dout_stages], dout_empty[dout_stages];
    arrivals dq_full[Shape::groups][Shape::dq_places], dq_empty[Shape::groups][Shape::dq_places];
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
        begin_arrivals(&notes.q_empty[s], warps);
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
    using q_tile = slabs<Shape::step, Shape::dim>;
    using dout_tile = slabs<Shape::step, Shape::value_dim>;
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
    static_assert(dk_tile::bytes <= backward_tiles<Shape>::dq_place && dv_tile::bytes <= ds_tile::bytes, "they fit");

    static __device__ __forceinline__ dk_tile dk_at(int group) {
        return {backward_tiles<Shape>::dq_at(group, 0)};
    }
    static __device__ __forceinline__ dv_tile dv_at(int group) {
        return {ds_at(group).address};
    }
};

struct backward_maps {
    tile_map q, k, v, dout, dq_sum, dk, dv;
    bool has_keys; /* dk and dv may leave in boxes */
};

/* ---- the copying warps ------------------------------------------------------------------------------------------- */

/* Four warps walk alike: one copies tiles, two note what is kept of 32 queries each, one adds dq of each step to the
 * sums. */
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
    turn<Shape::dq_places> dq;
    int job_parity, lane;

    __device__ __forceinline__ backward_copying(const usp_softmax &args_, const backward_maps &maps_,
                                                const soft_cap &cap_, notes_type &notes_)
        : args(args_), maps(maps_), cap(cap_), notes(notes_), at{0, 0}, dq{0, 0}, job_parity(0),
          lane(threadIdx.x % 32) {
    }

    __device__ __forceinline__ void start(const softmax_job &job, bool steps) {
        job_parity ^= 1;
        if (lane != 0) return;
        await(&notes.job_empty, job_parity);
        notes.job = {job, steps};
        arrive_with(&notes.job_full, steps ? memory::k_tile::bytes + memory::v_tile::bytes : 0);
        if (!steps) return;
        memory::k_at().copy(&maps.k, job.begin, job.head, job.batch, &notes.job_full);
        memory::v_at().copy(&maps.v, job.begin, job.head, job.batch, &notes.job_full);
    }

    __device__ __forceinline__ void copy_step(const tile_walk &walk, int head, int batch) {
        turn<Shape::dout_stages> dout = dout_of<Shape>(at);
        arrivals *q_full = &notes.q_full[at.stage], *dout_full = &notes.dout_full[dout.stage];
        if (lane != 0) return;
        await(&notes.q_empty[at.stage], at.parity ^ 1);
        arrive_with(q_full, memory::q_tile::bytes);
        memory::q_at(at.stage).copy(&maps.q, walk.column, head, batch, q_full);
        await(&notes.dout_empty[dout.stage], dout.parity ^ 1);
        arrive_with(dout_full, memory::dout_tile::bytes);
        memory::dout_at(dout.stage).copy(&maps.dout, walk.column, head, batch, dout_full);
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

    /* Returns whether its factor is seen. */
    __device__ __forceinline__ bool note_query(query_notes<Shape> &to, int i, const query_line_notes &line,
                                               bool masked) const {
        float factor = factor_of(line.row) * (Shape::drops ? 1 / (1 - args.dropout.rate) : 1);
        bool seen = line.row.sum != 0 && !(fabsf(factor - 1) < UNSEEN);
        to.base[i] = base_of(line.row);
        to.factor[i] = seen ? factor : 1; /* the same weight, whatever the step's other queries need */
        to.delta[i] = line.delta * (Shape::drops ? 1 - args.dropout.rate : 1);
        if (masked) to.interval[i] = line.interval;
        if (masked) to.position[i] = line.position;
        if constexpr (Shape::slopes) to.place[i] = line.place;
        if constexpr (Shape::drops) to.word[i] = line.word;
        return seen;
    }

    /* A job of fewer keys than a tile has rows masks the others in every step: they must add nothing to dq. What is
     * noted is on its way while the place for it is awaited. */
    __device__ __forceinline__ void note_step(const tile_walk &walk, const softmax_job &job, bool last, int head) {
        constexpr int each = Shape::step / 64; /* queries a lane */
        bool masked = !walk.full(Shape::step) || job.count < Shape::rows;
        int first = (DUTY - NOTES_FIRST) * 32 + lane;
        query_line_notes line[each];
        bool scaled = false;
#pragma unroll
        for (int i = 0; i < each; i++) line[i] = load_query(walk, job, first + i * 64, masked, head);
        float slope = Shape::slopes && DUTY == NOTES_FIRST ? scoring::slope_of(args, head, cap) : 0;
        await(&notes.q_empty[at.stage], at.parity ^ 1);
#pragma unroll
        for (int i = 0; i < each; i++) scaled |= note_query(notes.query[at.stage], first + i * 64, line[i], masked);
        scaled = __any_sync(~0u, scaled);
        if (lane != 0) return;
        notes.query[at.stage].scaled[DUTY - NOTES_FIRST] = scaled;
        if (DUTY == NOTES_FIRST)
            notes.step[at.stage] = {masked, last, walk.column, min(walk.columns(), Shape::step), head, slope};
        arrive(&notes.q_full[at.stage]);
    }

    /* Adds what the groups leave of a step's dq, by one lane; a place is free again when it has been read. */
    __device__ __forceinline__ void add_step(const tile_walk &walk, int head, int batch) {
        arrivals *read = nullptr;
#pragma unroll
        for (int i = 0; i < Shape::groups * Shape::dq_boxes / Shape::dq_together; i++) {
            int group = i % Shape::groups, first = i / Shape::groups * Shape::dq_together;
            await(&notes.dq_full[group][dq.stage], dq.parity);
#pragma unroll
            for (int box = 0; box < Shape::dq_together; box++)
                add_box(&maps.dq_sum, Shape::dq_column(group, first + box), walk.column + Shape::dq_query(group), head,
                        batch, memory::dq_at(group, dq.stage) + box * memory::dq_box);
            end_boxes();
            if (read) {
                await_reads<1>();
                arrive(read);
            }
            read = &notes.dq_empty[group][dq.stage];
            if (group == Shape::groups - 1) dq.advance();
        }
        await_reads<0>();
        arrive(read);
    }

    /* If results must not depend on timing, when the job's turn has come. */
    __device__ __forceinline__ void add_in_turn(query_turns<Shape::rows> &turns, const tile_walk &now,
                                                const tile_walk &next, int head, int batch) {
        if (args.deterministic) {
            turns.enter(batch, head);
            turns.acquire(now.column, min(now.column + Shape::step, now.end));
        }
        if (lane == 0) {
            add_step(now, head, batch);
            bool goes_on = next.running() && next.round == now.round;
            if (args.deterministic) {
                await_boxes();
                turns.release(now.column, goes_on ? turns.cell_of(next.column) : INT_MAX);
            }
        }
        __syncwarp();
    }

    __device__ __forceinline__ void run_steps(const softmax_job &job, const head_range &heads) {
        query_turns<Shape::rows> turns(args, job);
        for (tile_walk walk(args.by_key, *job.work, heads.end - heads.first); walk.running(); at.advance()) {
            tile_walk now = walk;
            int head = heads.first + now.round;
            walk.advance(Shape::step);
            if constexpr (DUTY == COPIES)
                copy_step(now, head, job.batch);
            else if constexpr (DUTY == ADDS)
                add_in_turn(turns, now, walk, head, job.batch);
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
    else
        backward_copying<Shape, ADDS>(args, maps, cap, notes).run();
}

/* ---- launch ------------------------------------------------------------------------------------------------------ */

template <typename Shape>
static usp_status make_backward_maps(const usp_gpu *gpu, const usp_softmax &args, backward_maps *maps) {
    USP_TRY(make_map(gpu, args, args.dtype, false, args.q, args.dim, Shape::step, &maps->q));
    USP_TRY(make_map(gpu, args, args.dtype, false, args.dout, args.value_dim, Shape::step, &maps->dout));
    USP_TRY(make_map(gpu, args, args.dtype, true, args.k, args.dim, Shape::rows, &maps->k));
    USP_TRY(make_map(gpu, args, args.dtype, true, args.v, args.value_dim, Shape::rows, &maps->v));
    return make_map(gpu, args, USP_F32, false, args.dq_sum, args.dim, 64, &maps->dq_sum);
}

#endif
