/* softmax_wgmma_backward_warps.cuh - backward softmax attention on Hopper: the warps that bring what the computing ones
 * want to shared memory, and take away what they leave there. */
#ifndef USP_CUDA_SOFTMAX_WGMMA_BACKWARD_WARPS_CUH
#define USP_CUDA_SOFTMAX_WGMMA_BACKWARD_WARPS_CUH
#include "softmax_extras.cuh"
#include "softmax_wgmma_backward.cuh"
#include "softmax_wgmma_turns.cuh"

/* ---- the copying warps ------------------------------------------------------------------------------------------- */

/* Four warps walk alike: one copies tiles, two note what is kept of queries, 32 each, and look over half of each tile
 * of a masked step, one looks over the keys of a job, adds dq of each step to the sums, and stores dk and dv. */
enum backward_duty { COPIES, NOTES, ADDS };

/* With slopes: that of a head, and whether a job's keys are near enough to each other for it. */
struct head_slope {
    int head;
    float slope;
    bool near;
};

/* What is kept of a lane's query, on its way to shared memory. */
struct query_line_notes {
    row_state row;
    float delta;
    int2 interval;
    int position;
    float place;
    uint64_t word;
};

/* What usp_pairs says of every lane's keys of a job. */
template <int ROWS> struct key_line_notes {
    static constexpr int each = ROWS / 64;
    int key[each], last[each];

    __device__ __forceinline__ key_line_notes(const usp_pairs &pairs, const softmax_job &job, int first, bool masked) {
#pragma unroll
        for (int i = 0; i < each; i++) {
            int rows = masked ? job.count : 0;
            key[i] = load_or(pairs.key, job.begin, first + i * 64, rows, NOWHERE);
            last[i] = load_or(pairs.last, job.begin, first + i * 64, pairs.last ? rows : 0, 0);
        }
    }

    __device__ __forceinline__ void note(int *to_key, int *to_last, int first) const {
#pragma unroll
        for (int i = 0; i < each; i++) {
            to_key[first + i * 64] = key[i];
            to_last[first + i * 64] = last[i];
        }
    }
};

template <typename T, typename Shape, backward_duty DUTY, bool IN_ORDER> struct backward_copying {
    using memory = backward_tiles<Shape>;
    using notes_type = backward_notes<Shape>;
    using job_list_type = job_list<Shape::rows, true, IN_ORDER>;
    const usp_softmax &args;
    const backward_maps &maps;
    const soft_cap &cap;
    notes_type &notes;
    turn<Shape::stages> at;
    turn<Shape::dq_places> dq;
    turn<ADMITTED> admitted;
    int job_parity, jobs, looked, lane; /* looked: parities, of masked steps a bit a stage */
    int half;                           /* of two warps that note, which share code: it is less to fetch */

    __device__ __forceinline__ backward_copying(const usp_softmax &args_, const backward_maps &maps_,
                                                const soft_cap &cap_, notes_type &notes_)
        : args(args_), maps(maps_), cap(cap_), notes(notes_), at{0, 0}, dq{0, 0}, admitted{0, 0}, job_parity(0),
          jobs(0), looked(0), lane(threadIdx.x % 32), half(DUTY == NOTES ? uniform(threadIdx.x / 32) - 1 : 0) {
    }

    __device__ __forceinline__ void start(const softmax_job &job, bool steps) {
        job_parity ^= 1;
        if (!is_leader()) return;
        await(&notes.job_empty, job_parity);
        notes.job = {job, steps, looked};
        looked ^= steps;
        arrive_with(&notes.job_full, steps ? memory::k_tile::bytes + memory::v_tile::bytes : 0);
        if (!steps) return;
        memory::k_at().copy(&maps.k, job.begin, job.head, job.batch, &notes.job_full);
        memory::v_at().copy(&maps.v, job.begin, job.head, job.batch, &notes.job_full);
    }

    __device__ __forceinline__ void copy_part(int column, int head, int batch) {
        turn<Shape::dout_stages> dout = dout_of<Shape>(at);
        arrivals *q_full = &notes.q_full[at.stage], *dout_full = &notes.dout_full[dout.stage];
        if (!is_leader()) return;
        await(&notes.q_empty[at.stage], at.parity ^ 1);
        if (Shape::dout_stages == 1) await(dout_full, dout.parity ^ 1); /* or who has queries might await this phase */
        arrive_with(q_full, memory::q_tile::bytes);
        memory::q_at(at.stage).copy(&maps.q, column, head, batch, q_full);
        await(&notes.dout_empty[dout.stage], dout.parity ^ 1);
        arrive_with(dout_full, memory::dout_tile::bytes);
        memory::dout_at(dout.stage).copy(&maps.dout, column, head, batch, dout_full);
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
        if (Shape::drops && args.dropout.rate > 0)
            to.word = usp_dropout_twice(dropout_row(args, job.batch, head, query));
        return to;
    }

    /* With slopes: 1 if no key of the job is behind any query of the step, -1 if none is before one, else 0. */
    __device__ __forceinline__ int side_of_keys(const tile_walk &walk, const place_range &keys) const {
        bool before = true, behind = true;
#pragma unroll
        for (int i = lane; i < Shape::step; i += 32) {
            int place = load_or(args.pairs.diagonal, walk.column, i, walk.columns(), keys.last);
            before = before && place >= keys.last;
            behind = behind && place <= keys.first;
        }
        return side_of(before, behind);
    }

    /* Returns whether its factor is seen. `slope`: what one place adds to the base. */
    __device__ __forceinline__ bool note_query(query_notes<Shape> &to, int i, const query_line_notes &line, bool masked,
                                               float slope) const {
        float factor = factor_of(line.row) * (Shape::drops ? 1 / (1 - args.dropout.rate) : 1);
        bool seen = line.row.sum != 0 && !(fabsf(factor - 1) < UNSEEN);
        to.base[i] = Shape::slopes ? fmaf(slope, line.place, base_of(line.row)) : base_of(line.row);
        to.factor[i] = seen ? factor : 1; /* the same weight, whatever the step's other queries need */
        to.delta[i] = line.delta * (Shape::drops ? 1 - args.dropout.rate : 1);
        if (masked) to.interval[i] = line.interval;
        if (masked) to.position[i] = line.position;
        if constexpr (Shape::slopes) to.place[i] = line.place;
        if constexpr (Shape::drops) to.word[i] = line.word;
        return seen;
    }

    /* What is noted is on its way while the place for it is awaited. A part of 32 queries is for one of the warps. */
    __device__ __forceinline__ void note_part(const tile_walk &walk, int part, const softmax_job &job, int kind,
                                              int head, float slope) {
        constexpr int each = (Shape::part + 63) / 64; /* queries a lane */
        bool notes_queries = half == 0 || Shape::part > 32;
        bool masked = kind & MASKED_STEP;
        int first = half * 32 + lane;
        query_line_notes line[each];
        bool scaled = false;
#pragma unroll
        for (int i = 0; i < each && notes_queries; i++)
            line[i] = load_query(walk, job, part * Shape::part + first + i * 64, masked, head);
        key_line_notes<Shape::rows> keys(args.pairs, job, first, masked);
        await(&notes.q_empty[at.stage], at.parity ^ 1);
#pragma unroll
        for (int i = 0; i < each && notes_queries; i++)
            scaled |= note_query(notes.query[at.stage], first + i * 64, line[i], masked, masked ? 0 : slope * cap.unit);
        if (masked) keys.note(notes.query[at.stage].key, notes.query[at.stage].last, first);
        scaled = __any_sync(~0u, scaled);
        if (lane == 0) notes.query[at.stage].scaled[half] = scaled;
        if (half == 0 && lane == 0)
            notes.step[at.stage] = {kind, looked >> at.stage & 1, walk.column, min(walk.columns(), Shape::step), slope};
        arrive_warp(&notes.q_full[at.stage]);
    }

    /* Whether the warp finds what is not finite in BYTES of shared memory. */
    template <int BYTES> __device__ __forceinline__ bool is_unclean(uint32_t address) const {
        return __any_sync(~0u, is_part_spoilt<T, BYTES, 32>(address, lane));
    }

    template <typename Tile> __device__ __forceinline__ bool is_half_unclean(Tile tile) const {
        constexpr int bytes = Tile::bytes / 2;
        return is_unclean<bytes>(tile.address + half * bytes);
    }

    /* Products of a masked step wait for this, where weights of 0 meet what is not finite. */
    __device__ __forceinline__ void look_over() {
        turn<Shape::dout_stages> dout = dout_of<Shape>(at);
        await(&notes.q_full[at.stage], at.parity);
        bool unclean = is_half_unclean(memory::q_at(at.stage));
        await(&notes.dout_full[dout.stage], dout.parity);
        unclean |= is_half_unclean(memory::dout_at(dout.stage));
        if (lane == 0) notes.unclean[at.stage][half] = unclean;
        arrive_warp(&notes.looked[at.stage]);
        looked ^= 1 << at.stage;
    }

    /* A job of fewer keys than a tile has rows masks the others in every step: they must add nothing to dq. With slopes
     * a step of queries among the keys counts as masked. */
    __device__ __forceinline__ void note_and_look(const tile_walk &walk, int part, const softmax_job &job, int kind,
                                                  int head, const head_slope &slope, int side) {
        if (!walk.full(Shape::step) || job.count < Shape::rows || side == 0) kind |= MASKED_STEP;
        note_part(walk, part, job, kind, head, kind & MASKED_STEP ? slope.slope : slope.slope * side);
        if (kind & MASKED_STEP) look_over();
    }

    /* Adds what the groups leave of a step's dq, by one lane; a place is free again when it has been read. */
    __device__ __forceinline__ void add_step(const tile_walk &walk, int head, int batch) {
        arrivals *read = nullptr;
#pragma unroll
        for (int first = 0; first < Shape::dq_boxes; first += Shape::dq_together, dq.advance()) {
#pragma unroll
            for (int group = 0; group < Shape::groups; group++) {
                await(&notes.dq_full[group][dq.stage], dq.parity);
#pragma unroll
                for (int box = 0; box < Shape::dq_together; box++)
                    add_box(&maps.dq_sum, Shape::dq_column(group, first + box), walk.column + Shape::dq_query(group),
                            head, batch, memory::dq_at(group, dq.stage) + box * memory::dq_box);
                end_boxes();
                if (read) {
                    await_reads<1>();
                    arrive(read);
                }
                read = &notes.dq_empty[group][dq.stage];
            }
            if (!Shape::rests_late || first != Shape::dq_places - 1) continue;
            await_reads<0>(); /* no place waits for a box that comes later */
            arrive(read);
            read = nullptr;
        }
        await_reads<0>();
        arrive(read);
    }

    /* Where results must not depend on timing: waits until the turn of the step at `behind` has come. */
    __device__ __forceinline__ void admit_step(query_turns<Shape::rows> &turns, tile_walk &behind,
                                               const head_range &heads, int batch) {
        __syncwarp(); /* its copies have begun */
        turns.enter(batch, heads.first + behind.round);
        turns.acquire(behind.column, min(behind.column + Shape::step, behind.end));
        arrive_warp(&notes.admitted[admitted.stage]);
        admitted.advance();
        behind.advance(Shape::step);
    }

    /* By one lane: adds a step that was admitted, and tells that it has arrived. */
    __device__ __forceinline__ void add_in_turn(query_turns<Shape::rows> &turns, const tile_walk &now,
                                                const tile_walk &next, int head, int batch) {
        await(&notes.admitted[admitted.stage], admitted.parity);
        admitted.advance();
        turns.enter(batch, head);
        add_step(now, head, batch);
        await_boxes();
        bool goes_on = next.running() && next.round == now.round;
        turns.release(now.column, min(now.column + Shape::step, now.end),
                      goes_on ? turns.cell_of(next.column) : INT_MAX);
    }

    __device__ __forceinline__ void look_at_keys() {
        await(&notes.job_full, (jobs - 1) & 1);
        bool spoilt = is_unclean<memory::k_tile::bytes>(memory::k_at().address);
        if (spoilt && lane == 0) notes.spoilt_keys[jobs % 2] = jobs;
        arrive_warp(&notes.keys_looked);
    }

    /* By one lane. */
    __device__ __forceinline__ void store_keys(const softmax_job &job) {
        for (int group = 0; group < Shape::groups; group++) {
            await(&notes.ended[group], (jobs - 1) & 1);
            if constexpr (Shape::boxes_keys) {
                if (!notes.boxes[group]) continue;
                int first = job.begin + group * 64;
                backward_memory<Shape>::dv_at(group).store(&maps.dv, 0, first, job.head, job.batch);
                backward_memory<Shape>::dk_at(group).store(&maps.dk, 0, first, job.head, job.batch);
            }
        }
        end_boxes();
        await_reads<0>();
        arrive(&notes.left);
    }

    __device__ __forceinline__ void run_steps(job_list_type &list, const softmax_job &job, const head_range &heads) {
        bool bends = Shape::slopes && DUTY == NOTES && args.slopes;
        place_range keys = bends ? place_range(args.pairs.key, job) : place_range();
        head_slope slope = {-1, 0, false};
        int kind = FIRST_STEP;
        for (tile_walk walk = walk_of(job, heads); walk.running(); kind = 0) {
            tile_walk now = walk;
            int head = heads.first + now.round;
            walk.advance(Shape::step);
            if (!walk.running()) kind |= LAST_STEP;
            if (DUTY == COPIES && !walk.running()) list.ask_ahead();
            if (bends && slope.head != head)
                slope = {head, scoring::slope_of(args, head, cap), keys.is_near(args.slopes[head])};
            int side = !bends ? 1 : slope.near ? side_of_keys(now, keys) : 0;
            if (DUTY == ADDS && is_leader()) add_step(now, head, job.batch);
            for (int part = 0; part < Shape::parts && DUTY != ADDS; part++, at.advance()) {
                if constexpr (DUTY == COPIES)
                    copy_part(now.column + part * Shape::part, head, job.batch);
                else
                    note_and_look(now, part, job, kind, head, slope, side);
            }
        }
    }

    __device__ __forceinline__ tile_walk walk_of(const softmax_job &job, const head_range &heads) const {
        return tile_walk(args.by_key, *job.work, heads.end - heads.first);
    }

    /* In order: turns are awaited a step behind the copies, when dq of that step is still to be found. */
    __device__ __forceinline__ void copy_and_admit(const job_list_type &list, const softmax_job &job,
                                                   const head_range &heads) {
        query_turns<Shape::rows> turns(list, job);
        tile_walk walk = walk_of(job, heads), behind = walk;
        for (bool first = true; walk.running(); first = false, walk.advance(Shape::step)) {
            for (int part = 0; part < Shape::parts; part++, at.advance())
                copy_part(walk.column + part * Shape::part, heads.first + walk.round, job.batch);
            if (!first) admit_step(turns, behind, heads, job.batch);
        }
        admit_step(turns, behind, heads, job.batch);
    }

    __device__ __forceinline__ void add_in_turns(const job_list_type &list, const softmax_job &job,
                                                 const head_range &heads) {
        query_turns<Shape::rows> turns(list, job);
        for (tile_walk walk = walk_of(job, heads); walk.running();) {
            tile_walk now = walk;
            walk.advance(Shape::step);
            if (is_leader()) add_in_turn(turns, now, walk, heads.first + now.round, job.batch);
        }
    }

    __device__ __forceinline__ void run_job(job_list_type &list, const softmax_job &job, const head_range &heads) {
        if constexpr (IN_ORDER && DUTY == COPIES)
            copy_and_admit(list, job, heads);
        else if constexpr (IN_ORDER && DUTY == ADDS)
            add_in_turns(list, job, heads);
        else
            run_steps(list, job, heads);
    }

    __device__ __forceinline__ void run() {
        job_list_type list(args, notes.deals, DUTY == COPIES ? job_list_type::ask(args) : job_list_type::none);
        for (;;) {
            softmax_job job = DUTY == COPIES ? list.deal() : list.take();
            head_range heads = readers_of(args, job.head);
            bool steps = job.count > 0 && job.work->tiles > 0 && heads.end > heads.first;
            if (DUTY == COPIES) start(job, steps);
            if (job.count == 0) break;
            jobs++;
            if (DUTY == ADDS && steps) look_at_keys();
            if (steps) run_job(list, job, heads);
            if (DUTY == ADDS && is_leader()) store_keys(job);
            __syncwarp();
        }
        if (DUTY == ADDS) await_boxes();
    }
};

template <typename T, typename Shape, bool IN_ORDER>
static __device__ __forceinline__ void run_duty(const usp_softmax &args, const backward_maps &maps, const soft_cap &cap,
                                                backward_notes<Shape> &notes) {
    int warp = uniform(threadIdx.x / 32);
    if (warp == 0)
        backward_copying<T, Shape, COPIES, IN_ORDER>(args, maps, cap, notes).run();
    else if (warp <= 2)
        backward_copying<T, Shape, NOTES, IN_ORDER>(args, maps, cap, notes).run();
    else
        backward_copying<T, Shape, ADDS, IN_ORDER>(args, maps, cap, notes).run();
}

template <typename T, typename Shape>
static __device__ __forceinline__ void run_copying(const usp_softmax &args, const backward_maps &maps,
                                                   const soft_cap &cap, backward_notes<Shape> &notes) {
    if (args.deterministic)
        run_duty<T, Shape, true>(args, maps, cap, notes);
    else
        run_duty<T, Shape, false>(args, maps, cap, notes);
}

#endif
