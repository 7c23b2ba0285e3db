/* softmax_wgmma_turns.cuh - the order in which blocks add to the sums of dq, where results must not depend on timing.
 * The jobs of one head of keys have ranks, in which they are dealt. Queries are cut into cells of USP_TURN_ROWS; a job
 * adds to a cell when all jobs of lower rank that see some of its queries have. A job waits for such as were dealt
 * before it alone, so some job can always go on. One warp waits for turns, a step ahead of the one that adds. */
#ifndef USP_CUDA_SOFTMAX_WGMMA_TURNS_CUH
#define USP_CUDA_SOFTMAX_WGMMA_TURNS_CUH
#include <climits>

#include "softmax_wgmma_jobs.cuh"

/* A warp acquires, one lane of another releases. args.turns of a cell is one more than the rank of the job that added
 * last. */
template <int ROWS> struct query_turns {
    using job_list_type = job_list<ROWS, true, true>;
    const job_list_type &list;
    int rank, head;
    int *turn;         /* of the cells of `head` */
    int before, until; /* the rank of the job before this one, -1 if none, in cells from the last one asked for on */
    int held;          /* the first cell whose turn has not come */

    __device__ __forceinline__ query_turns(const job_list_type &list_, const softmax_job &job)
        : list(list_), head(-1), turn(nullptr), before(-1), until(0), held(0) {
        int item = (int)(job.work - list.args.by_key.work) * list.parts + (job.begin - job.work->begin) / ROWS;
        rank = list.ranked(item);
    }

    static __device__ __forceinline__ int cell_of(int row) {
        return row / USP_TURN_ROWS;
    }

    /* Steps of a head of queries follow. */
    __device__ __forceinline__ void enter(int batch, int head_) {
        if (head == head_) return;
        int64_t cells = (list.args.queries + USP_TURN_ROWS - 1) / USP_TURN_ROWS;
        head = head_;
        turn = list.args.turns + ((int64_t)batch * list.args.heads + head) * cells;
        until = held = 0;
    }

    /* Whether the job of a rank sees queries of a cell, and the first cell behind where that may be otherwise. */
    __device__ __forceinline__ bool sees(int other, int cell, int &end) const {
        int item = list.ranked(other);
        const usp_work *work = list.args.by_key.work + item / list.parts;
        end = INT_MAX;
        if (work->count <= item % list.parts * ROWS) return false;
        for (int i = 0; i < work->tiles; i++) {
            usp_tile tile = list.args.by_key.tile[work->first_tile + i];
            if (tile.begin >= tile.end || cell_of(tile.end - 1) < cell) continue;
            bool now = cell_of(tile.begin) <= cell;
            end = now ? cell_of(tile.end - 1) + 1 : cell_of(tile.begin);
            return now;
        }
        return false;
    }

    /* Finds `before` and `until` of a cell: 32 ranks at a time, from this one down. */
    __device__ __forceinline__ void find(int cell) {
        before = -1;
        until = INT_MAX;
        for (int top = rank - 1; top >= 0 && before < 0; top -= 32) {
            int other = top - (int)(threadIdx.x % 32), end = INT_MAX;
            unsigned seen = __ballot_sync(~0u, other >= 0 && sees(other, cell, end));
            int nearest = seen ? __ffs((int)seen) - 1 : 31;
            if ((int)(threadIdx.x % 32) > nearest) end = INT_MAX;
            until = min(until, __reduce_min_sync(~0u, end));
            if (seen) before = top - nearest;
        }
    }

    /* Waits until the job may add to queries [row, end). */
    __device__ __forceinline__ void acquire(int row, int end) {
        for (held = max(held, cell_of(row)); held <= cell_of(end - 1); held++) {
            if (held >= until) find(held);
            await_above(&turn[held], before);
        }
    }

    /* What this lane added to queries [row, end) has arrived; the job's next ones are in cells from `next` on. */
    __device__ __forceinline__ void release(int row, int end, int next) const {
        for (int cell = cell_of(row); cell < min(next, cell_of(end - 1) + 1); cell++) publish(&turn[cell], rank + 1);
    }
};

#endif
