/* softmax_wgmma_forward.cuh - forward softmax attention on Hopper: sizes of tiles, what lies in shared memory, and the
 * warp that copies there what the computing ones want. */
#ifndef USP_CUDA_SOFTMAX_WGMMA_FORWARD_CUH
#define USP_CUDA_SOFTMAX_WGMMA_FORWARD_CUH
#include "softmax_extras.cuh"
#include "softmax_wgmma.cuh"

/* ---- sizes ------------------------------------------------------------------------------------------------------- */

/* STEP columns at a time. Sums of a thread: STEP / 2 scores, as many weights in half the registers, VALUE_DIM / 2 of
 * out; with addresses and rows no more than 240 registers. Two stages of keys and values fill shared memory. */
template <int DIM, int VALUE_DIM, int STEP, int EXTRAS = 0> struct forward_shape {
    static constexpr int dim = DIM, value_dim = VALUE_DIM, step = STEP;
    static constexpr bool caps = EXTRAS & CAPS, slopes = EXTRAS & SLOPES, drops = EXTRAS & DROPS;
    static constexpr bool extras = EXTRAS != 0, more = slopes && drops;
    static constexpr int rows = USP_WORK_ROWS, groups = 2, stages = 2, threads = 128 * (1 + groups);
    /* Of 65536 / 384 = 168 a thread, what the copying warpgroup has to spare goes to the others. */
    static constexpr int copying_registers = 40, computing_registers = 232;
};

/* ---- shared memory ----------------------------------------------------------------------------------------------- */

struct forward_job {
    softmax_job job;
    int steps; /* 0: its rows meet no column */
};

template <typename Shape> struct forward_notes {
    static constexpr int stages = Shape::stages;
    arrivals job_full, job_empty;
    arrivals k_full[stages], k_empty[stages], v_full[stages], v_empty[stages];
    forward_job job;
    int spoilt[2]; /* the last job of this parity whose values were not all finite */
    step_note step[stages];
    alignas(8) int key[stages][Shape::step]; /* these are read two at a time */
    int last[stages][Shape::step];
    float place[stages][Shape::slopes ? Shape::step : 2];  /* of keys, from the diagonal of the job's first row on */
    uint32_t draw[stages][Shape::drops ? Shape::step : 2]; /* what dropout draws for keys */
    uint32_t limit;                                        /* dropout's */
};

template <typename Shape> struct forward_memory {
    using q_tile = slabs<Shape::rows, Shape::dim>;
    using k_tile = slabs<Shape::step, Shape::dim>;
    using v_tile = slabs<Shape::step, Shape::value_dim>;
    static constexpr int q = 0, k = q + q_tile::bytes, v = k + Shape::stages * k_tile::bytes;
    static constexpr int notes = v + Shape::stages * v_tile::bytes;
    static constexpr int bytes = notes + (int)sizeof(forward_notes<Shape>);

    static __device__ __forceinline__ q_tile q_at() {
        return {shared_base() + q};
    }
    static __device__ __forceinline__ k_tile k_at(int stage) {
        return {shared_base() + k + stage * k_tile::bytes};
    }
    static __device__ __forceinline__ v_tile v_at(int stage) {
        return {shared_base() + v + stage * v_tile::bytes};
    }
};

struct forward_maps {
    tile_map q, k, v;
};

/* ---- the copying warp -------------------------------------------------------------------------------------------- */

template <typename Shape> struct copying_warp {
    using memory = forward_memory<Shape>;
    using notes_type = forward_notes<Shape>;
    const usp_softmax &args;
    const forward_maps &maps;
    notes_type &notes;
    turn<Shape::stages> k, v;
    int job_parity;
    bool leads;

    __device__ __forceinline__ copying_warp(const usp_softmax &args_, const forward_maps &maps_, notes_type &notes_)
        : args(args_), maps(maps_), notes(notes_), k{0, 0}, v{0, 0}, job_parity(0), leads(threadIdx.x % 32 == 0) {
    }

    /* The queries of a job, and what it is. */
    __device__ __forceinline__ void start(const softmax_job &job, bool steps) {
        job_parity ^= 1;
        if (!leads) return;
        await(&notes.job_empty, job_parity);
        notes.job = {job, steps};
        arrive_with(&notes.job_full, steps ? memory::q_tile::bytes : 0);
        if (steps) memory::q_at().copy(&maps.q, job.begin, job.head, job.batch, &notes.job_full);
    }

    /* What slopes and dropout ask of a lane's keys of a step, on its way while the place for it is awaited. */
    struct key_extras {
        static constexpr int count = Shape::slopes || Shape::drops ? Shape::step / 32 : 0;
        int key[count + 1], origin;

        __device__ __forceinline__ key_extras(const usp_softmax &args, const tile_walk &at, int first_row) {
            origin = Shape::slopes && args.slopes ? args.pairs.diagonal[first_row] : 0;
#pragma unroll
            for (int i = 0; i < count; i++)
                key[i] = load_or(args.pairs.key, at.column, threadIdx.x + i * 32, at.columns(), origin);
        }

        __device__ __forceinline__ void note(notes_type &notes, int stage) const {
#pragma unroll
            for (int i = 0; i < count; i++) {
                int column = threadIdx.x + i * 32;
                if constexpr (Shape::slopes) notes.place[stage][column] = (float)(key[i] - origin);
                if constexpr (Shape::drops) notes.draw[stage][column] = usp_dropout_key(key[i]);
            }
        }
    };

    __device__ __forceinline__ void copy_keys(const tile_walk &at, bool last, int head, const softmax_job &job) {
        bool full = at.full(Shape::step);
        key_extras extras(args, at, job.begin);
        await(&notes.k_empty[k.stage], k.parity ^ 1);
        if (!full) note_keys<Shape::step>(args.pairs, at, notes.key[k.stage], notes.last[k.stage]);
        extras.note(notes, k.stage);
        __syncwarp();
        if (leads) {
            notes.step[k.stage] = {!full, last};
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

    /* Values of a step are wanted when the products with the next step's keys have begun. */
    __device__ __forceinline__ void run() {
        job_list jobs(args, false);
        for (;;) {
            softmax_job job = jobs.next(args, false);
            bool steps = job.count > 0 && job.work->tiles > 0;
            start(job, steps);
            if (job.count == 0) return;
            if (!steps) continue;
            int head = usp_mapped_head(args.kv, job.head), values = -1;
            for (tile_walk at(args.by_query, *job.work, 1); at.running();) {
                tile_walk now = at;
                at.advance(Shape::step);
                copy_keys(now, !at.running(), head, job);
                if (values >= 0) copy_values(values, head, job.batch);
                values = now.column;
            }
            if (values >= 0) copy_values(values, head, job.batch);
        }
    }
};

#endif
