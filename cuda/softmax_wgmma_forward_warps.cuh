/* softmax_wgmma_forward_warps.cuh - forward softmax attention on Hopper: the warps that bring what the computing ones
 * want to shared memory. */
#ifndef USP_CUDA_SOFTMAX_WGMMA_FORWARD_WARPS_CUH
#define USP_CUDA_SOFTMAX_WGMMA_FORWARD_WARPS_CUH
#include "softmax_wgmma_forward.cuh"

/* ---- what steps ask ---------------------------------------------------------------------------------------------- */

template <typename T> static __device__ __forceinline__ float round_to(float x) {
    return usp_to_float(usp_from_float<T>(x));
}

/* What slopes and dropout ask of a lane's keys of a step. */
template <typename T, typename Shape> struct key_extras {
    static constexpr int count = Shape::slopes || Shape::drops ? Shape::step / 32 : 0;
    int key[count + 1], origin;

    __device__ __forceinline__ key_extras(const usp_softmax &args, const forward_walk<Shape> &at, int first_row) {
        origin = Shape::slopes && args.slopes ? args.pairs.diagonal[first_row] : 0;
#pragma unroll
        for (int i = 0; i < count; i++)
            key[i] = load_or(args.pairs.key, at.column, (int)(threadIdx.x % 32) + i * 32, at.columns(), origin);
    }

    /* 1 if no key is behind any query of the job, -1 if none is before one, else 0. */
    __device__ __forceinline__ int side_of_queries(const place_range &queries) const {
        bool before = true, behind = true;
#pragma unroll
        for (int i = 0; i < count; i++) {
            before = before && key[i] <= queries.first;
            behind = behind && key[i] >= queries.last;
        }
        return side_of(before, behind);
    }

    /* From one key to the next, 0 if that is not the same for all. */
    __device__ __forceinline__ int pace() const {
        unsigned first = (unsigned)uniform(key[0]), pace = (unsigned)uniform(key[0], 1) - first;
        bool even = true;
#pragma unroll
        for (int i = 0; i < count; i++) even = even && (unsigned)key[i] == first + pace * (threadIdx.x % 32 + i * 32);
        return __all_sync(~0u, even) ? (int)pace : 0;
    }

    /* Whether there is a bias_note: where its numbers are no larger than scores are, and fit the dtype. `scale` is that
     * of products. */
    __device__ __forceinline__ bool find_bias(bias_note &to, const place_range &queries, float slope,
                                              float scale) const {
        int side = side_of_queries(queries), apart = pace();
        float part = __fdividef(side * slope, scale) * apart, next = part - round_to<T>(part);
        to = {usp_pack<T>(part, next), usp_pack<T>(next - round_to<T>(next), 0), 0, 0,
              side * slope * LOG2E,    (float)(uniform(key[0]) - origin)};
        return side != 0 && apart != 0 && fabsf(slope * apart) <= 1 && fabsf(part) <= 4096;
    }

    __device__ __forceinline__ void note(forward_notes<Shape> &notes, const turn<Shape::stages> &k) const {
#pragma unroll
        for (int i = 0; i < count; i++) {
            int column = threadIdx.x % 32 + i * 32;
            if constexpr (Shape::slopes) notes.place[k.stage][column] = (float)(key[i] - origin);
            if constexpr (Shape::drops) notes.draw[k.of_twice()][column] = usp_dropout_key(key[i]);
        }
    }
};

/* What all steps of a job share. */
template <typename Shape> struct biased_job {
    int first_row;
    float slope;
    place_range queries;

    __device__ __forceinline__ biased_job(const usp_softmax &args, const softmax_job &job) : first_row(job.begin) {
        if constexpr (!Shape::one_sided) return;
        slope = args.slopes[job.head];
        queries = place_range(args.pairs.diagonal, job);
        if (!queries.is_near(slope)) queries.spread();
    }
};

/* What a step is and asks of its keys: by a warp, on its way while the place for it is awaited. */
template <typename T, typename Shape> struct step_notes {
    bool masked, bent;
    key_extras<T, Shape> extras;
    bias_note bias;
    column_notes<Shape::step> columns;

    __device__ __forceinline__ step_notes(const usp_softmax &args, const forward_walk<Shape> &at,
                                          const biased_job<Shape> &job)
        : masked(!at.full(Shape::step)), bent(masked), extras(args, at, job.first_row) {
        if constexpr (Shape::one_sided) bent = !extras.find_bias(bias, job.queries, job.slope, args.scale) || masked;
        if (bent) columns.load(args.pairs, at);
    }

    __device__ __forceinline__ void note(const usp_softmax &args, forward_notes<Shape> &notes,
                                         const turn<Shape::stages> &k, bool last) const {
        if (bent) columns.note(notes.key[k.stage], notes.last[k.stage], args.pairs.last);
        extras.note(notes, k);
        if (threadIdx.x % 32 != 0) return;
        notes.step[k.stage] = {masked, last, bent};
        if constexpr (Shape::one_sided) notes.bias[k.stage] = bias;
    }
};

/* ---- the copying warp -------------------------------------------------------------------------------------------- */

template <typename T, typename Shape> struct copying_warp {
    using memory = forward_memory<Shape>;
    using notes_type = forward_notes<Shape>;
    const usp_softmax &args;
    const forward_maps &maps;
    notes_type &notes;
    turn<Shape::stages> k, v;
    turn<Shape::slots> slot;

    __device__ __forceinline__ copying_warp(const usp_softmax &args_, const forward_maps &maps_, notes_type &notes_)
        : args(args_), maps(maps_), notes(notes_), k{0, 0}, v{0, 0}, slot{0, 0} {
    }

    /* The queries of a job, and what it is. */
    __device__ __forceinline__ void start(const softmax_job &job, bool steps) {
        arrivals *full = &notes.job_full[slot.stage];
        if (is_leader()) {
            await(&notes.job_empty[slot.stage], slot.parity ^ 1);
            notes.job[slot.stage] = {job, steps};
            arrive_with(full, steps ? memory::q_tile::bytes : 0);
            if (steps) memory::q_at(slot.stage).copy(&maps.q, job.begin, job.head, job.batch, full);
        }
        slot.advance();
    }

    __device__ __forceinline__ void copy_keys(const forward_walk<Shape> &at, const softmax_job &job, int head) {
        if (is_leader()) {
            arrive_with(&notes.k_full[k.stage], memory::k_tile::bytes);
            memory::k_at(k.stage).copy(&maps.k, at.column, head, job.batch, &notes.k_full[k.stage]);
        }
        k.advance();
    }

    /* And what the step asks, unless that is much. */
    __device__ __forceinline__ void begin_step(const forward_walk<Shape> &at, bool last, const softmax_job &job,
                                               int head) {
        if constexpr (Shape::notes_apart) {
            if (is_leader()) await(&notes.k_empty[k.stage], k.parity ^ 1);
        } else {
            step_notes<T, Shape> step(args, at, biased_job<Shape>(args, job));
            await(&notes.k_empty[k.stage], k.parity ^ 1);
            step.note(args, notes, k, last);
            __syncwarp();
        }
        copy_keys(at, job, head);
    }

    __device__ __forceinline__ void copy_values(int column, int head, int batch) {
        if (is_leader()) {
            await(&notes.v_empty[v.stage], v.parity ^ 1);
            arrive_with(&notes.v_full[v.stage], memory::v_tile::bytes);
            memory::v_at(v.stage).copy(&maps.v, column, head, batch, &notes.v_full[v.stage]);
        }
        v.advance();
    }

    static __device__ __forceinline__ bool has_steps(const softmax_job &job) {
        return job.count > 0 && job.work->tiles > 0;
    }

    __device__ __forceinline__ softmax_job start_next(job_list<Shape::rows, false> &list) {
        softmax_job next = list.deal();
        bool steps = has_steps(next);
        if (steps) fetch_ahead(args.by_query.tile + next.work->first_tile);
        start(next, steps);
        return next;
    }

    /* The next job's queries are wanted, where jobs overlap, as soon as their place is left, which is in the job's
     * first step; asked for in the third one they do not hold up keys. With fewer steps, or one place, at the job's
     * end. */
    static __device__ __forceinline__ bool is_next_wanted(int steps, bool goes_on) {
        if (!Shape::overlaps) return !goes_on;
        return goes_on ? steps == 2 : steps <= 2;
    }

    /* Values of a step are wanted when the products with the next step's keys have begun. Returns the next job. */
    __device__ __forceinline__ softmax_job copy_steps(const softmax_job &job, job_list<Shape::rows, false> &list) {
        softmax_job next;
        int head = usp_mapped_head(args.kv, job.head), values;
        forward_walk<Shape> at(args.by_query, *job.work, 1);
        for (int steps = 0;; steps++) {
            forward_walk<Shape> now = at;
            bool goes_on = now.running();
            if (goes_on) at.advance(Shape::step);
            if (steps == 0) list.ask_ahead();
            if (goes_on) begin_step(now, !at.running(), job, head);
            if (steps > 0) copy_values(values, head, job.batch);
            if (is_next_wanted(steps, goes_on)) next = start_next(list);
            if (!goes_on) return next;
            values = now.column;
        }
    }

    __device__ __forceinline__ void run() {
        using jobs = job_list<Shape::rows, false>;
        jobs list(args, notes.deals, jobs::ask(args));
        softmax_job job = start_next(list);
        while (job.count > 0) job = copy_steps(job, list);
    }
};

/* ---- the noting warp --------------------------------------------------------------------------------------------- */

/* A warp that notes what usp_pairs says of a job's rows, and what steps ask if that is much. All is on its way while
 * the place for it is awaited. */
template <typename T, typename Shape> struct noting_warp {
    const usp_softmax &args;
    forward_notes<Shape> &notes;
    turn<Shape::stages> k;
    turn<Shape::slots> slot;
    int lane;

    __device__ __forceinline__ noting_warp(const usp_softmax &args_, forward_notes<Shape> &notes_)
        : args(args_), notes(notes_), k{0, 0}, slot{0, 0}, lane(threadIdx.x % 32) {
    }

    __device__ __forceinline__ void note_rows(const softmax_job &job) {
        constexpr int most = Shape::rows / 32;
        key_span keys[most];
        int query[most];
#pragma unroll
        for (int n = 0; n < most; n++) {
            int i = lane + n * 32;
            keys[n] = key_span::of(load_or(args.pairs.low, job.begin, i, job.count, 0),
                                   load_or(args.pairs.high, job.begin, i, job.count, NOWHERE));
            query[n] = args.pairs.last ? load_or(args.pairs.query, job.begin, i, job.count, 0) : 0;
        }
        await(&notes.job_empty[slot.stage], slot.parity ^ 1);
#pragma unroll
        for (int n = 0; n < most; n++) {
            notes.keys[slot.stage][lane + n * 32] = keys[n];
            notes.query[slot.stage][lane + n * 32] = query[n];
        }
        arrive_warp(&notes.job_full[slot.stage]);
        slot.advance();
    }

    __device__ __forceinline__ void note_steps(const softmax_job &job) {
        biased_job<Shape> biased(args, job);
        for (forward_walk<Shape> at(args.by_query, *job.work, 1); at.running(); k.advance()) {
            step_notes<T, Shape> step(args, at, biased);
            at.advance(Shape::step);
            await(&notes.k_empty[k.stage], k.parity ^ 1);
            step.note(args, notes, k, !at.running());
            arrive_warp(&notes.k_full[k.stage]);
        }
    }

    __device__ __forceinline__ void run() {
        job_list<Shape::rows, false> list(args, notes.deals);
        for (;;) {
            softmax_job job = list.take();
            note_rows(job);
            if (job.count == 0) return;
            if (Shape::notes_apart && job.work->tiles > 0) note_steps(job);
        }
    }
};

/* ---- watching warps ---------------------------------------------------------------------------------------------- */

/* Two warps that walk as the copying one does, and take what is not finite out of the values of masked steps, which
 * have pairs of weight 0. */
template <typename T, typename Shape> struct watching_warps {
    using memory = forward_memory<Shape>;
    static constexpr int threads = 64;
    const usp_softmax &args;
    forward_notes<Shape> &notes;
    turn<Shape::stages> v;
    int jobs, thread;

    __device__ __forceinline__ watching_warps(const usp_softmax &args_, forward_notes<Shape> &notes_)
        : args(args_), notes(notes_), v{0, 0}, jobs(0), thread(threadIdx.x - 64) {
    }

    __device__ __forceinline__ void clean(uint32_t tile) {
        notes.spoilt[jobs % 4] = jobs;
#pragma unroll 1
        for (int at = thread * 16; at < memory::v_tile::bytes; at += threads * 16)
            for (int i = 0; i < 16; i += 4) usp_clear_pair<T>(tile + at + i);
        publish_stores();
    }

    __device__ __forceinline__ void look(uint32_t tile) {
        if (is_part_spoilt<T, memory::v_tile::bytes, threads>(tile, thread)) clean(tile);
    }

    __device__ __forceinline__ void run() {
        job_list<Shape::rows, false> list(args, notes.deals);
        for (;;) {
            softmax_job job = list.take();
            if (job.count == 0) return;
            if (job.work->tiles == 0) continue;
            jobs++;
            for (forward_walk<Shape> at(args.by_query, *job.work, 1); at.running();
                 at.advance(Shape::step), v.advance()) {
                await(&notes.v_full[v.stage], v.parity);
                if (!at.full(Shape::step)) {
                    look(memory::v_at(v.stage).address);
                    arrive_warp(&notes.v_clean[v.stage]);
                }
                arrive_warp(&notes.v_empty[v.stage]); /* or a stage might be filled twice meanwhile */
            }
        }
    }
};

#endif
