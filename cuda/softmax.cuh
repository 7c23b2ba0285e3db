/* softmax.cuh - what all softmax attention kernels share: which job a block has, its walk over the steps of its tiles,
 * the band that decides a pair, and the online softmax. It loads and multiplies nothing. */
#ifndef USP_CUDA_SOFTMAX_CUH
#define USP_CUDA_SOFTMAX_CUH
#include "softmax.h"
#include "tiles.cuh"

constexpr float USP_LOG2E = 1.4426950408889634f;

/* ---- jobs -------------------------------------------------------------------------------------------------------- */

/* Rows [begin, begin + count) of one work item, for one head of one batch entry. */
struct usp_job {
    const usp_work *work;
    int begin, count, head, batch;
};

/* This block's job, one of those that usp_launch_jobs starts. Inside a bundle all heads of one work item come before
 * the next one of the list, whose heaviest items are first, so that no heavy job starts late; blocks running together
 * still share columns in the cache. count is not positive if the work item has no such part. */
static __device__ __forceinline__ usp_job usp_take_job(const usp_softmax &args, int heads, int rows) {
    constexpr unsigned most_lines = USP_SOFTMAX_BUNDLE;
    unsigned parts = USP_WORK_ROWS / rows, items = args.tiles.works * parts, bundle = blockIdx.x / (items * most_lines);
    unsigned inside = blockIdx.x % (items * most_lines),
             width = min(most_lines, args.batch * heads - bundle * most_lines);
    unsigned item = inside / width, line = bundle * most_lines + inside % width;
    const usp_work *work = args.tiles.work + item / parts;
    int skipped = item % parts * rows;
    return {work, work->begin + skipped, min(work->count - skipped, rows), (int)(line % heads), (int)(line / heads)};
}

/* How many blocks the jobs of a call take: one for every `rows` rows of a work item at most, head and batch entry. */
static inline int64_t usp_jobs(const usp_softmax &args, int heads, int rows) {
    return (int64_t)args.tiles.works * (USP_WORK_ROWS / rows) * heads * args.batch;
}

/* Starts one block per job; none if there is no job. There are no more than a grid holds (softmax.c). */
template <typename Kernel>
static usp_status usp_launch_jobs(const char *what, Kernel kernel, const usp_softmax &args, int heads, int rows,
                                  int threads, size_t shared, usp_stream stream) {
    int64_t jobs = usp_jobs(args, heads, rows);
    if (jobs == 0) return USP_OK;
    return usp_cuda_launch(what, kernel, dim3((unsigned)jobs), dim3(threads), shared, stream, args);
}

/* The query heads first .. end - 1 read a key head; there may be none. */
struct usp_readers {
    int first, end;
};

static __device__ __forceinline__ usp_readers usp_readers_of(const usp_softmax &args, int key_head) {
    return {max(key_head * args.kv.group - args.kv.offset, 0),
            min((key_head + 1) * args.kv.group - args.kv.offset, args.heads)};
}

/* ---- columns ----------------------------------------------------------------------------------------------------- */

/* Walks the tiles of a work item, `step` columns at a time, `rounds` times over (once for every head that shares the
 * rows). It holds only what every step needs; the rest of a tile is read again where a mask needs it. */
struct usp_walk {
    const usp_tile *list;
    int column; /* first column of the step */
    int end, full_begin, full_end;
    int index, tiles, round, rounds;

    __device__ __forceinline__ usp_walk(const usp_tiles &all, const usp_work &work, int rounds_)
        : list(all.tile + work.first_tile), index(-1), tiles(work.tiles), round(0), rounds(tiles > 0 ? rounds_ : 0) {
        if (rounds > 0) next_tile();
    }

    __device__ __forceinline__ bool running() const {
        return round < rounds;
    }
    __device__ __forceinline__ const usp_tile &tile() const {
        return list[index];
    }
    __device__ __forceinline__ int columns() const {
        return end - column;
    }
    /* Every pair of the step is allowed, whichever the row. */
    __device__ __forceinline__ bool full(int step) const {
        return column >= full_begin && column + step <= full_end;
    }

    __device__ __forceinline__ void advance(int step) {
        column += step;
        if (column >= end) next_tile();
    }

    __device__ __forceinline__ void next_tile() {
        do {
            if (++index == tiles) {
                index = 0;
                if (++round == rounds) return;
            }
            column = tile().begin;
            end = tile().end;
        } while (column >= end);
        full_begin = tile().full_begin;
        full_end = tile().full_end;
    }
};

/* A position is right modulo 2^32 at every step of this sum. */
static __device__ __forceinline__ int usp_position(int origin, int stride, int i) {
    return (int)((unsigned)origin + (unsigned)stride * (unsigned)i);
}

/* Decides the pairs of a work item's rows and a tile's columns. */
struct usp_band {
    int row_origin, row_stride, column_origin, column_stride, end, low, high;

    __device__ __forceinline__ usp_band(const usp_work &work, const usp_tile &tile)
        : row_origin(work.origin), row_stride(work.stride), column_origin(tile.origin), column_stride(tile.stride),
          end(tile.end), low(tile.low), high(tile.high) {
    }

    /* KEY_ROWS: rows are keys and columns queries, else the reverse. Columns before the tile's begin are never asked
     * for. */
    template <bool KEY_ROWS> __device__ __forceinline__ bool allows(int row, int column) const {
        int at_row = usp_position(row_origin, row_stride, row);
        int at_column = usp_position(column_origin, column_stride, column);
        int offset = KEY_ROWS ? at_row - at_column : at_column - at_row;
        return column < end && offset >= low && offset <= high;
    }
};

/* Sets the elements of pairs that are not allowed; `row` and `column` are those of the accumulator's first element. */
template <bool KEY_ROWS, int M, int N>
static __device__ __forceinline__ void usp_mask_pairs(usp_sums<M, N> &c, const usp_band &band, int row, int column,
                                                      float value) {
#pragma unroll
    for (int n = 0; n < N; n++) {
#pragma unroll
        for (int m = 0; m < M; m++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                if (!band.allows<KEY_ROWS>(row + usp_lane_row(m, i / 2), column + usp_lane_column(n) + i % 2))
                    c[m][n][i] = value;
            }
        }
    }
}

/* ---- online softmax ---------------------------------------------------------------------------------------------- */

/* Over the four lanes that share a row of an accumulator. */
static __device__ __forceinline__ float usp_row_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

static __device__ __forceinline__ float usp_row_sum(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}

/* 2^-inf is 0, so a row without any allowed key so far weighs nothing as soon as it gets one. */
static __device__ __forceinline__ float usp_exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* The softmax of M * 16 rows of a warp, fed step by step. Weights are 2^(scale2 (score - top)); `top` follows a row's
 * largest score only when that has grown by more than a factor 2^USP_SLACK of weight, so that the sums are rarely
 * rescaled; weights and sums stay far inside fp32 (and weights inside fp16) either way. `scale2` must be positive. */
constexpr int USP_SLACK = 8;

template <int M> struct usp_online {
    float top[M * 2]; /* in scores, before any scale */
    float sum[M * 2]; /* this lane's share of the row's weights */

    /* Rows that have seen no key yet. */
    __device__ __forceinline__ usp_online() {
#pragma unroll
        for (int i = 0; i < M * 2; i++) {
            top[i] = -INFINITY;
            sum[i] = 0;
        }
    }

    /* Takes up row i of `sums`, normalised, with its log-sum-exp. It stands for a weight of 2^USP_SLACK at a score so
     * much lower: next to a long past, the weights of single keys would lose bits in fp16. */
    template <int W> __device__ __forceinline__ void resume(int i, usp_sums<M, W> &sums, float lse, float scale) {
        constexpr float weight = 1 << USP_SLACK;
        top[i] = (lse - USP_SLACK / USP_LOG2E) / scale;
        sum[i] = (threadIdx.x & 3) == 0 ? weight : 0;
        multiply(i, sums, weight);
    }

    /* Turns scores into weights, and brings `sums`, what was weighed so far, to the same base. */
    template <int N, int W>
    __device__ __forceinline__ void weigh(usp_sums<M, N> &scores, usp_sums<M, W> &sums, float scale2) {
        raise(scores, sums, scale2);
#pragma unroll
        for (int i = 0; i < M * 2; i++) {
            float base = top[i] == -INFINITY ? 0 : top[i] * scale2;
#pragma unroll
            for (int n = 0; n < N; n++) {
                float *pair = &scores[i / 2][n][i % 2 * 2];
                pair[0] = usp_exp2(fmaf(pair[0], scale2, -base));
                pair[1] = usp_exp2(fmaf(pair[1], scale2, -base));
                sum[i] += pair[0] + pair[1];
            }
        }
    }

    /* Raises `top` where a score is far above it. Each row decides alone; the warp only agrees to look. */
    template <int N, int W>
    __device__ __forceinline__ void raise(const usp_sums<M, N> &scores, usp_sums<M, W> &sums, float scale2) {
        float best[M * 2];
        bool grown = false;
#pragma unroll
        for (int i = 0; i < M * 2; i++) {
            best[i] = -INFINITY;
#pragma unroll
            for (int n = 0; n < N; n++)
                best[i] = fmaxf(best[i], fmaxf(scores[i / 2][n][i % 2 * 2], scores[i / 2][n][i % 2 * 2 + 1]));
            best[i] = usp_row_max(best[i]);
            if ((best[i] - top[i]) * scale2 > USP_SLACK)
                grown = true;
            else
                best[i] = top[i];
        }
        if (!__any_sync(~0u, grown)) return;
#pragma unroll
        for (int i = 0; i < M * 2; i++) {
            float factor = best[i] == top[i] ? 1 : usp_exp2((top[i] - best[i]) * scale2);
            top[i] = best[i];
            sum[i] *= factor;
            multiply(i, sums, factor);
        }
    }

    /* Normalises row i of `sums`; returns its log-sum-exp. A NaN stays one: only a row without keys has sum 0. */
    template <int W> __device__ __forceinline__ float finish(int i, usp_sums<M, W> &sums, float scale) {
        float total = usp_row_sum(sum[i]);
        multiply(i, sums, total == 0 ? 0 : 1 / total);
        return total == 0 ? -INFINITY : top[i] * scale + logf(total);
    }

    template <int W> static __device__ __forceinline__ void multiply(int i, usp_sums<M, W> &sums, float factor) {
#pragma unroll
        for (int n = 0; n < W; n++) {
            sums[i / 2][n][i % 2 * 2] *= factor;
            sums[i / 2][n][i % 2 * 2 + 1] *= factor;
        }
    }
};

#endif
