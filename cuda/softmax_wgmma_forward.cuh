/* softmax_wgmma_forward.cuh - forward softmax attention on Hopper: sizes of tiles, what lies in shared memory, what
 * computing lanes keep, the order of steps, and the warps that bring what the computing ones want. */
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
    static constexpr bool one_sided = slopes && !more; /* biases of steps on one side are added to keys and rows */
    static constexpr int rows = USP_WORK_ROWS, groups = 2, stages = 2, threads = 128 * (1 + groups);
    /* Where exponentials take as long as products, a group's turn to multiply ends with its scores, not with its issue.
     */
    static constexpr bool long_turns = DIM <= 64;
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
    int side; /* with slopes: 1 if no key is behind any query of the job, -1 if none is before one, 0 if neither, or if
                 the queries are too far from each other */
};

template <typename Shape> struct forward_notes {
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
    uint32_t limit;      /* below which pairs are dropped */

    /* Each by `slope` times the row's place. */
    __device__ __forceinline__ void move_tops(float slope) {
        if constexpr (!Shape::one_sided) return;
        online.top[0] = fmaf(slope, place[0], online.top[0]);
        online.top[1] = fmaf(slope, place[1], online.top[1]);
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

/* ---- the copying warp -------------------------------------------------------------------------------------------- */

template <typename Shape> struct copying_warp {
    using memory = forward_memory<Shape>;
    using notes_type = forward_notes<Shape>;
    const usp_softmax &args;
    const forward_maps &maps;
    notes_type &notes;
    turn<Shape::stages> k, v;
    turn<Shape::slots> slot;
    bool leads;

    __device__ __forceinline__ copying_warp(const usp_softmax &args_, const forward_maps &maps_, notes_type &notes_)
        : args(args_), maps(maps_), notes(notes_), k{0, 0}, v{0, 0}, slot{0, 0}, leads(threadIdx.x % 32 == 0) {
    }

    /* The queries of a job, and what it is. */
    __device__ __forceinline__ void start(const softmax_job &job, bool steps) {
        arrivals *full = &notes.job_full[slot.stage];
        if (leads) {
            await(&notes.job_empty[slot.stage], slot.parity ^ 1);
            notes.job[slot.stage] = {job, steps};
            arrive_with(full, steps ? memory::q_tile::bytes : 0);
            if (steps) memory::q_at(slot.stage).copy(&maps.q, job.begin, job.head, job.batch, full);
        }
        slot.advance();
    }

    /* What slopes and dropout ask of a lane's keys of a step, on its way while the place for it is awaited. */
    struct key_extras {
        static constexpr int count = Shape::slopes || Shape::drops ? Shape::step / 32 : 0;
        int key[count + 1], origin;

        __device__ __forceinline__ key_extras(const usp_softmax &args, const forward_walk<Shape> &at, int first_row) {
            origin = Shape::slopes && args.slopes ? args.pairs.diagonal[first_row] : 0;
#pragma unroll
            for (int i = 0; i < count; i++)
                key[i] = load_or(args.pairs.key, at.column, threadIdx.x + i * 32, at.columns(), origin);
        }

        /* As step_note has it. */
        __device__ __forceinline__ int side_of_queries(const place_range &queries) const {
            bool before = true, behind = true;
#pragma unroll
            for (int i = 0; i < count; i++) {
                before = before && key[i] <= queries.first;
                behind = behind && key[i] >= queries.last;
            }
            return side_of(before, behind);
        }

        __device__ __forceinline__ void note(notes_type &notes, const turn<Shape::stages> &k) const {
#pragma unroll
            for (int i = 0; i < count; i++) {
                int column = threadIdx.x + i * 32;
                if constexpr (Shape::slopes) notes.place[k.stage][column] = (float)(key[i] - origin);
                if constexpr (Shape::drops) notes.draw[k.of_twice()][column] = usp_dropout_key(key[i]);
            }
        }
    };

    __device__ __forceinline__ bool has_sides() const {
        return Shape::one_sided && args.slopes;
    }

    __device__ __forceinline__ void copy_keys(const forward_walk<Shape> &at, bool last, int head,
                                              const softmax_job &job, const place_range &queries) {
        bool full = at.full(Shape::step);
        key_extras extras(args, at, job.begin);
        int side = has_sides() ? extras.side_of_queries(queries) : 1;
        bool bent = !full || side == 0;
        column_notes<Shape::step> columns;
        if (bent) columns.load(args.pairs, at);
        await(&notes.k_empty[k.stage], k.parity ^ 1);
        if (bent) columns.note(notes.key[k.stage], notes.last[k.stage], args.pairs.last);
        extras.note(notes, k);
        __syncwarp();
        if (leads) {
            notes.step[k.stage] = {!full, last, side};
            arrive_with(&notes.k_full[k.stage], memory::k_tile::bytes);
            memory::k_at(k.stage).copy(&maps.k, at.column, head, job.batch, &notes.k_full[k.stage]);
        }
        k.advance();
    }

    __device__ __forceinline__ void copy_values(int column, int head, int batch) {
        if (leads) {
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

    /* Values of a step are wanted when the products with the next step's keys have begun; the next job's queries, where
     * jobs overlap, as soon as there is room for them, which is after the first step. Returns the next job. */
    __device__ __forceinline__ softmax_job copy_steps(const softmax_job &job, job_list<Shape::rows, false> &list) {
        softmax_job next = {nullptr, 0, -1, 0, 0};
        place_range queries = has_sides() ? place_range(args.pairs.diagonal, job) : place_range();
        if (has_sides() && !queries.is_near(args.slopes[job.head])) queries.spread();
        int head = usp_mapped_head(args.kv, job.head), values = -1, steps = 0;
        for (forward_walk<Shape> at(args.by_query, *job.work, 1); at.running(); steps++) {
            forward_walk<Shape> now = at;
            at.advance(Shape::step);
            if (steps == 0) list.ask_ahead();
            copy_keys(now, !at.running(), head, job, queries);
            if (values >= 0) copy_values(values, head, job.batch);
            if (Shape::overlaps && steps == 2) next = start_next(list);
            values = now.column;
        }
        if (values >= 0) copy_values(values, head, job.batch);
        return next.count >= 0 ? next : start_next(list);
    }

    __device__ __forceinline__ void run() {
        job_list<Shape::rows, false> list(args, notes.deals);
        softmax_job job = start_next(list);
        while (job.count > 0) job = copy_steps(job, list);
    }
};

/* ---- warps beside the copying one -------------------------------------------------------------------------------- */

/* A warp that notes what usp_pairs says of a job's rows. It is on its way while the place for it is awaited. */
template <typename Shape>
static __device__ __forceinline__ void note_rows(const usp_softmax &args, forward_notes<Shape> &notes) {
    constexpr int most = Shape::rows / 32;
    turn<Shape::slots> slot = {0, 0};
    job_list<Shape::rows, false> list(args, notes.deals);
    for (softmax_job job = {nullptr, 0, 1, 0, 0}; job.count > 0; slot.advance()) {
        key_span keys[most];
        int query[most], lane = threadIdx.x % 32;
        job = list.take();
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
    }
}

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
