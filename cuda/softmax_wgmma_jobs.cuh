/* softmax_wgmma_jobs.cuh - the jobs of softmax attention on Hopper: in which order blocks that stay take them, and how
 * a block's warps learn of them. */
#ifndef USP_CUDA_SOFTMAX_WGMMA_JOBS_CUH
#define USP_CUDA_SOFTMAX_WGMMA_JOBS_CUH
#include "softmax_wgmma.cuh"

/* The jobs of all blocks are numbered, heavy ones first inside a bundle of heads, whose columns the cache holds. A
 * block asks for one after the other: with jobs of such different weights no fixed order keeps all blocks busy, and
 * some begin late, where transfers hold multiprocessors. Its first warp asks, some time before it needs the
 * answer but no job earlier, and deals the jobs to the warps that walk with it. */
constexpr int DEALS = 2;
constexpr int LONG_HEAD = 32768; /* columns */
constexpr int LONG_BUNDLE = 4;   /* key heads side by side backward: at 64K 1 to 9 % faster than 16 or 8, at 16K not */
constexpr int FEW_RUNS = 8;      /* of the jobs of a head, where it is worth their while to go backward */

struct job_deals {
    arrivals full[DEALS], empty[DEALS];
    softmax_job job[DEALS];
};

static __device__ __forceinline__ void begin_deals(job_deals &deals, int readers) {
    for (int i = 0; i < DEALS; i++) {
        begin_arrivals(&deals.full[i], 1);
        begin_arrivals(&deals.empty[i], readers);
    }
}

/* Jobs of ROWS rows of a work item at most. `count` is 0 when there is none left. IN_ORDER: blocks add in the order of
 * their jobs, so none holds a number while it works at another job. */
template <int ROWS, bool KEY_ROWS, bool IN_ORDER = false> struct job_list {
    static constexpr int parts = USP_WORK_ROWS / ROWS; /* of a work item */
    /* No memory holds the rows of 2^32 jobs. Forward, a division of 32 bits takes less time, which is all others' where
     * jobs are short; backward was measured to lose 1.7 % by it. */
    using number = std::conditional_t<KEY_ROWS, int64_t, uint32_t>;
    static constexpr number none = (number)-1;
    const usp_softmax &args;
    job_deals &deals;
    turn<DEALS> at;
    int items, lines, bundle, last; /* last: forward, the first line of the last bundle */
    int run;                        /* in order: jobs of a head that go one way, or none if all do */
    number asked;                   /* by the first thread: the number to come, or none */

    /* `asked_`: by the first warp, its first number, which is on its way while the list is looked at.
     * Heads side by side:
     * - Where all items weigh alike, as without a mask, one: nothing is gained from several.
     * - Forward over long heads many all the same: blocks of one head lose step with each other, and a few of each head
     *   find more in the cache.
     * - Backward of other long heads a few, whose columns the cache holds; not in order, where jobs wait for others.
     * - Forward the last bundle has up to twice as many, and so more light jobs for the end of the launch. */
    __device__ __forceinline__ job_list(const usp_softmax &args_, job_deals &deals_, number asked_ = none)
        : args(args_), deals(deals_), at{0, 0}, lines((int)lines_of(args, KEY_ROWS)), asked(asked_) {
        usp_tile_count count = *tiles_of(args, KEY_ROWS).count;
        items = count.works * parts;
        bool long_heads = (KEY_ROWS ? args.queries : args.keys) > LONG_HEAD;
        bundle = KEY_ROWS && !IN_ORDER && long_heads ? LONG_BUNDLE : USP_SOFTMAX_BUNDLE;
        if (count.even && (KEY_ROWS || !long_heads)) bundle = 1;
        last = max(lines - 1 - bundle, 0) / bundle * bundle;
        run = IN_ORDER ? run_of(min(bundle, lines * max(args.slices, 1))) : 0;
    }

    /* In order, a job of a causal mask would wait until the one before it, which begins two steps sooner, has come to
     * where it begins itself. So where a head has few jobs, and none goes through several heads, they are cut into
     * runs, of two jobs of every block that works on the head, and every other run goes backward: its jobs come one
     * behind the other. With many jobs, or smaller ones, which begin a step sooner, that costs what it gives: jobs that
     * are far apart find less in the cache. The order is that of the whole call, `width` of whose heads are worked on
     * side by side, in whatever slices it comes. */
    __device__ __forceinline__ int run_of(int width) const {
        int jobs = 2 * (int)gridDim.x / width;
        return jobs > 1 && items * parts <= FEW_RUNS * jobs && args.heads == args.key_heads ? jobs : 0;
    }

    /* The item of a rank of a head, or the rank of an item. */
    __device__ __forceinline__ int ranked(int item) const {
        if (!IN_ORDER || run == 0 || item / run % 2) return item;
        int first = item / run * run;
        return first + min(first + run, items) - 1 - item;
    }

    static __device__ __forceinline__ number ask(const usp_softmax &args) {
        return threadIdx.x == 0 ? atomicAdd(static_cast<unsigned *>(args.scratch), 1u) : 0;
    }

    /* By the first warp, some time before it deals. */
    __device__ __forceinline__ void ask_ahead() {
        asked = ask(args);
    }

    /* By the first warp. Numbers without a job are not dealt. */
    __device__ __forceinline__ softmax_job deal() {
        for (;;) {
            softmax_job job = job_of(uniform(asked == none ? ask(args) : asked));
            asked = none;
            if (job.count < 0) continue;
            if (threadIdx.x == 0) {
                await(&deals.empty[at.stage], at.parity ^ 1);
                deals.job[at.stage] = job;
                arrive(&deals.full[at.stage]);
            }
            at.advance();
            return job;
        }
    }

    /* By the others. */
    __device__ __forceinline__ softmax_job take() {
        await(&deals.full[at.stage], at.parity);
        softmax_job job = deals.job[at.stage];
        arrive_warp(&deals.empty[at.stage]);
        at.advance();
        return job;
    }

    /* count is negative if there is nothing to do. */
    __device__ __forceinline__ softmax_job job_of(number n) const {
        if (n >= (number)items * (number)lines) return {nullptr, 0, 0, 0, 0};
        int first = (int)(n / ((number)items * (number)bundle)) * bundle, width = min(bundle, lines - first);
        if (!KEY_ROWS && first >= last) first = last, width = lines - last;
        int rest = (int)(n - (number)first * (number)items), line = first + rest % width;
        int item = ranked(rest / width), skipped = item % parts * ROWS, heads = (int)heads_of(args, KEY_ROWS);
        const usp_work *work = tiles_of(args, KEY_ROWS).work + item / parts;
        bool idle = !KEY_ROWS && !args.first && !args.last && work->tiles == 0;
        if (idle || work->count <= skipped) return {nullptr, 0, -1, 0, 0};
        return {work, work->begin + skipped, min(work->count - skipped, ROWS), line % heads, line / heads};
    }
};

#endif
