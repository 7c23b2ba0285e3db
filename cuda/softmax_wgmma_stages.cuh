/* softmax_wgmma_stages.cuh - forward softmax attention on Hopper over a ring: which stages of a job a launch folds, and
 * the walk over their steps.
 *
 * A launch never waits for keys, since it may hold every multiprocessor, and what brings them needs some. It folds the
 * stages that are here when a job is dealt, and keeps the rest of the job for a later launch: acc and (top, sum) in
 * memory, and how far it came. No result depends on where that happens. */
#ifndef USP_CUDA_SOFTMAX_WGMMA_STAGES_CUH
#define USP_CUDA_SOFTMAX_WGMMA_STAGES_CUH
#include "softmax_wgmma.cuh"

/* ---- stages ------------------------------------------------------------------------------------------------------ */

struct forward_stage {
    const usp_work *work;
    const usp_tile *tile;
    const int32_t *key, *last; /* as in usp_pairs */
    usp_tensor v;
};

/* Of a call without a ring all is known when it is compiled but the one stage. */
template <bool RING> struct forward_stages {
    static constexpr int room = RING ? USP_SOFTMAX_STAGES : 1;
    forward_stage stage[room];
    int count, here;        /* all of the call; those that are here when the launch begins */
    const int32_t *arrived; /* as in usp_softmax_ring, as what follows */
    int32_t *reached;
};

/* ---- jobs -------------------------------------------------------------------------------------------------------- */

/* Rows of a work item for one head of one batch entry, as softmax_job has them, and which of its stages are folded now:
 * from .. until - 1, of which the first and the last one have steps, if any has. In few words, since registers are
 * dear. `count` is 0 where there is no job. */
template <bool RING> struct stage_job {
    int item, begin, count, head, batch;
    uint32_t how;

    static constexpr uint32_t STEPS = 1 << 8, BEGINS = 1 << 9, ENDS = 1 << 10, MORE = 1 << 12;

    __device__ __forceinline__ int from() const {
        return RING ? how & 15 : 0;
    }
    __device__ __forceinline__ int until() const {
        return RING ? how >> 4 & 15 : steps();
    }
    /* Its rows meet columns; nothing of them is kept so far; nothing will be. */
    __device__ __forceinline__ bool steps() const {
        return RING ? how & STEPS : how;
    }
    __device__ __forceinline__ int begins(const usp_softmax &args) const {
        return RING ? how & BEGINS : args.first;
    }
    __device__ __forceinline__ int ends(const usp_softmax &args) const {
        return RING ? how & ENDS : args.last;
    }
    /* There are steps of another stage; from then on one less. */
    __device__ __forceinline__ bool goes_on() {
        if (!RING || how < MORE) return false;
        how -= MORE;
        return true;
    }
};
static_assert(USP_SOFTMAX_STAGES < 16, "their numbers have four bits");

template <bool RING> struct stage_list : job_list<USP_WORK_ROWS, false> {
    using job_type = stage_job<RING>;
    static constexpr uint32_t NOTHING = ~0u;
    const forward_stages<RING> &stages;

    __device__ __forceinline__ stage_list(const usp_softmax &args_, const forward_stages<RING> &stages_,
                                          job_deals &deals_)
        : job_list(args_, deals_), stages(stages_) {
        if (RING && !are_alike()) bundle = USP_SOFTMAX_BUNDLE;
    }

    /* In all stages the last item weighs as much as the first one. */
    __device__ __forceinline__ bool are_alike() const {
        bool alike = items > 0;
        for (int s = 1; s < stages.count && alike; s++) {
            const forward_stage &stage = stages.stage[s];
            usp_tiles tiles = {stage.work, stage.tile, nullptr, 0};
            alike = columns_of(tiles, stage.work[0]) == columns_of(tiles, stage.work[items - 1]);
        }
        return alike;
    }

    /* Before the first deal: if earlier launches have done all jobs, there is none. */
    __device__ __forceinline__ void begin() {
        int64_t all = (int64_t)items * lines;
        if (RING && stages.reached[0] == all) asked = all;
    }

    /* Which stages of from .. until - 1 have steps. */
    __device__ __forceinline__ uint32_t steps_of(int item, int from, int until) const {
        uint32_t how = 0;
        for (int s = from; s < until; s++) {
            if (stages.stage[s].work[item].tiles == 0) continue;
            how = how ? (how & ~0xf0u) + job_type::MORE : s | job_type::STEPS;
            how |= (s + 1) << 4;
        }
        return how;
    }

    /* What there is to do of a job of a ring, which is noted as done. */
    __device__ __forceinline__ uint32_t part_of(const softmax_job &job) const {
        int item = (int)(job.work - args.by_query.work);
        int64_t line = (int64_t)job.batch * args.heads + job.head;
        int32_t *reached = stages.reached + 1 + line * args.by_query.capacity + item;
        int from = uniform(*reached), come = min(acquire(stages.arrived) + 1, stages.count);
        int until = uniform(max(stages.here, come));
        uint32_t how = steps_of(item, from, until);
        how |= (from == 0 ? job_type::BEGINS : 0) | (until == stages.count ? job_type::ENDS : 0);
        if (from >= until || !(how & (job_type::STEPS | job_type::ENDS))) return NOTHING;
        if (threadIdx.x == 0) {
            *reached = until;
            if (how & job_type::ENDS) atomicAdd(stages.reached, 1);
        }
        return how;
    }

    /* NOTHING, or the job's `how`. Without a ring queries that begin or end are written even if they meet no key. */
    __device__ __forceinline__ uint32_t how_of(const softmax_job &job) const {
        if constexpr (RING) {
            return part_of(job);
        } else {
            uint32_t steps = job.work->tiles > 0;
            return steps || args.first || args.last ? steps : NOTHING;
        }
    }

    __device__ __forceinline__ job_type with(const softmax_job &job, uint32_t how) const {
        return {(int)(job.work - args.by_query.work), job.begin, job.count, job.head, job.batch, how};
    }

    /* By the first warp, as in job_list; how to work at the job is dealt with its number. */
    __device__ __forceinline__ job_type deal() {
        for (;;) {
            int64_t number = uniform(asked < 0 ? ask() : asked);
            softmax_job job = job_of(number);
            asked = ask();
            uint32_t how = job.count > 0 ? how_of(job) : 0;
            if (job.count < 0 || how == NOTHING) continue;
            if (threadIdx.x == 0) {
                await(&deals.empty[at.stage], at.parity ^ 1);
                deals.number[at.stage] = number | (int64_t)how << 32;
                arrive(&deals.full[at.stage]);
            }
            at.advance();
            return with(job, how);
        }
    }

    /* By the others. */
    __device__ __forceinline__ job_type take() {
        await(&deals.full[at.stage], at.parity);
        int64_t number = deals.number[at.stage];
        softmax_job job = job_of((uint32_t)number);
        __syncwarp();
        if (threadIdx.x % 32 == 0) arrive(&deals.empty[at.stage]);
        at.advance();
        return with(job, (uint32_t)(number >> 32));
    }
};

/* ---- steps ------------------------------------------------------------------------------------------------------- */

/* Walks the tiles of a job's stages, one stage after the other. It holds only what every step needs. */
template <bool RING> struct stage_walk {
    const forward_stages<RING> &stages;
    int item, stage, until;
    const usp_tile *next; /* tile of the stage, of which so many are left */
    int left;
    int column, end, full_begin, full_end;

    __device__ __forceinline__ stage_walk(const forward_stages<RING> &stages_, const stage_job<RING> &job)
        : stages(stages_), item(job.item), stage(job.from()), until(job.until()) {
        if (running()) open();
    }

    __device__ __forceinline__ const forward_stage &here() const {
        return stages.stage[RING ? stage : 0];
    }
    __device__ __forceinline__ bool running() const {
        return stage < until;
    }
    __device__ __forceinline__ int columns() const {
        return end - column;
    }
    /* Every pair of the step is allowed, whichever the row; without a step it means nothing. */
    __device__ __forceinline__ bool full(int step) const {
        return column >= full_begin && column + step <= full_end;
    }
    /* The step is the last one of its stage. */
    __device__ __forceinline__ bool ends_stage(int step) const {
        return left == 0 && column + step >= end;
    }

    __device__ __forceinline__ void open() {
        const usp_work &work = here().work[item];
        next = here().tile + work.first_tile;
        left = work.tiles;
        next_tile();
    }

    __device__ __forceinline__ void next_tile() {
        column = next->begin;
        end = next->end;
        full_begin = next->full_begin;
        full_end = next->full_end;
        next++;
        left--;
    }

    __device__ __forceinline__ void advance(int step) {
        column += step;
        if (column < end) return;
        if (left == 0)
            next_stage();
        else
            next_tile();
    }

    __device__ __forceinline__ void next_stage() {
        stage++;
        if constexpr (RING) {
            while (stage < until && here().work[item].tiles == 0) stage++;
            if (stage < until) open();
        }
    }
};

/* ---- numbers that are not finite --------------------------------------------------------------------------------- */

/* Brings what was taken out of one element of values to the rows of a job that depend on it. */
template <typename T, bool RING>
static __device__ __noinline__ void mend_stages(const usp_softmax &args, const forward_stages<RING> &stages,
                                                stage_job<RING> job, int step, int element) {
    usp_tensor result = job.ends(args) ? args.out : acc_tensor(args);
    for (int s = job.from(); s < job.until(); s++) {
        const forward_stage &stage = stages.stage[RING ? s : 0];
        usp_pairs pairs = args.pairs;
        pairs.key = stage.key, pairs.last = stage.last;
        mend_element<T, false>(args, pairs, stage.tile,
                               {stage.work + job.item, job.begin, job.count, job.head, job.batch}, step, false, element,
                               result, !job.ends(args), stage.v, args.value_dim);
    }
}

/* ---- launch ------------------------------------------------------------------------------------------------------ */

/* The call with one of its stages for the only one. */
static inline usp_softmax at_stage(const usp_softmax &args, int s) {
    usp_softmax one = args;
    if (!args.ring) return one;
    const usp_softmax_stage &stage = args.ring->stage[s];
    one.keys = stage.keys;
    one.k = stage.k, one.v = stage.v;
    one.pairs = stage.pairs;
    one.by_query = stage.by_query;
    return one;
}

static inline int stages_of(const usp_softmax &args) {
    return args.ring ? args.ring->stages : 1;
}

template <bool RING> static inline forward_stages<RING> make_stages(const usp_softmax &args) {
    forward_stages<RING> stages = {};
    stages.count = stages_of(args);
    for (int s = 0; s < stages.count; s++) {
        usp_softmax one = at_stage(args, s);
        stages.stage[s] = {one.by_query.work, one.by_query.tile, one.pairs.key, one.pairs.last, one.v};
    }
    if (!RING) return stages;
    stages.here = min(args.ring->at + 1, stages.count);
    stages.arrived = args.ring->arrived;
    stages.reached = args.ring->reached;
    return stages;
}

/* The call as blocks see it: what is the same in all stages, and the keys of all. Of a ring any job may begin. */
static inline usp_softmax whole_call(const usp_softmax &args) {
    usp_softmax whole = at_stage(args, 0);
    if (args.ring) whole.first = 1;
    for (int s = 1; s < stages_of(args); s++) whole.keys += args.ring->stage[s].keys;
    return whole;
}

#endif
