/* softmax.cuh - what all softmax attention kernels share: which job a block has, its walk over the steps of its tiles,
 * which pairs are allowed, how products become scores, and what is kept of a row. It loads and multiplies nothing.
 *
 * What is kept of a row is in base 2, in every family: the weight of a pair is 2^(x - top), where x is its score times
 * log2(e); top is a number that was rounded before any weight was taken, so forward and backward mean the same by it.
 * Between folds top is the largest x or less, by no more than weights have room for. After the last one it is the
 * base-2 log-sum-exp, rounded, and sum, near 1, is what the rounding left out. acc sums kept weights times values;
 * dropout's factor 1 / (1 - rate) comes with the last fold. */
#ifndef USP_CUDA_SOFTMAX_CUH
#define USP_CUDA_SOFTMAX_CUH
#include "dropout.h"
#include "launch.cuh"
#include "softmax.h"
#include "tiles.cuh"

constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;

/* ---- jobs -------------------------------------------------------------------------------------------------------- */

/* Rows [begin, begin + count) of one work item, for one head of one batch entry. */
struct softmax_job {
    const usp_work *work;
    int begin, count, head, batch;
};

static __host__ __device__ __forceinline__ const usp_tiles &tiles_of(const usp_softmax &args, bool key_rows) {
    return key_rows ? args.by_key : args.by_query;
}

static __host__ __device__ __forceinline__ unsigned heads_of(const usp_softmax &args, bool key_rows) {
    return (unsigned)(key_rows ? args.key_heads : args.heads);
}

/* Heads of all batch entries that the rows have. */
static __host__ __device__ __forceinline__ unsigned lines_of(const usp_softmax &args, bool key_rows) {
    return (unsigned)args.batch * heads_of(args, key_rows);
}

/* This block's job, one of those that launch_jobs starts. Inside a bundle (blockIdx.y, z) all heads of one work item
 * come before the next one of the list, whose heavy items are first, so that no heavy job starts late; blocks
 * running together still share columns in the cache. count is not positive if there is nothing to do: no such item, no
 * such part of it, or queries that neither begin nor end here and meet no key. It returns at one place only: after a
 * branch the compiler no longer knows that all threads walk alike, and the walk costs vector registers and barriers. */
template <bool KEY_ROWS> static __device__ __forceinline__ softmax_job take_job(const usp_softmax &args, int rows) {
    const usp_tiles &tiles = tiles_of(args, KEY_ROWS);
    unsigned parts = USP_WORK_ROWS / rows, lines = lines_of(args, KEY_ROWS), heads = heads_of(args, KEY_ROWS);
    unsigned first = (blockIdx.z * gridDim.y + blockIdx.y) * USP_SOFTMAX_BUNDLE;
    unsigned width = first < lines ? min((unsigned)USP_SOFTMAX_BUNDLE, lines - first) : 1, item = blockIdx.x / width;
    unsigned line = first + blockIdx.x % width, index = item / parts, skipped = item % parts * rows;
    const usp_work *work = tiles.work + min(index, (unsigned)tiles.capacity - 1);
    bool idle = !KEY_ROWS && !args.first && !args.last && work->tiles == 0;
    int left = first < lines && (int)index < tiles.count->works && !idle ? work->count - (int)skipped : 0;
    return {work, work->begin + (int)skipped, min(left, rows), (int)(line % heads), (int)(line / heads)};
}

/* How many blocks the jobs of a call take: one for every `rows` rows of a work item at most, head and batch entry. */
static inline int64_t count_jobs(const usp_softmax &args, bool key_rows, int rows) {
    return (int64_t)tiles_of(args, key_rows).capacity * (USP_WORK_ROWS / rows) * lines_of(args, key_rows);
}

/* Starts one block per job; none if there is no job. */
template <typename Kernel>
static usp_status launch_jobs(const char *what, Kernel kernel, const usp_softmax &args, bool key_rows, int rows,
                              int threads, size_t shared, usp_stream stream) {
    constexpr unsigned bundle = USP_SOFTMAX_BUNDLE, most_y = 65535;
    if (count_jobs(args, key_rows, rows) == 0) return USP_OK;
    unsigned lines = lines_of(args, key_rows), items = (unsigned)tiles_of(args, key_rows).capacity;
    unsigned width = lines < bundle ? lines : bundle, bundles = (lines + bundle - 1) / bundle;
    unsigned y = bundles < most_y ? bundles : most_y;
    dim3 grid(items * (USP_WORK_ROWS / rows) * width, y, (bundles + y - 1) / y);
    return usp_cuda_launch(what, kernel, grid, dim3(threads), shared, stream, args);
}

/* The query heads first .. end - 1 read a key head; there may be none. */
struct head_range {
    int first, end;
};

static __device__ __forceinline__ head_range readers_of(const usp_softmax &args, int key_head) {
    return {max(key_head * args.kv.group - args.kv.offset, 0),
            min((key_head + 1) * args.kv.group - args.kv.offset, args.heads)};
}

/* Where a row of a head is in what is kept per row. */
static __device__ __forceinline__ int64_t line_of(const usp_softmax &args, int batch, int head, int64_t row) {
    return ((int64_t)batch * args.heads + head) * args.queries + row;
}

/* acc as a tensor. */
static __device__ __forceinline__ usp_tensor acc_tensor(const usp_softmax &args) {
    int64_t stride = (int64_t)args.heads * args.value_dim;
    return {args.acc, stride, args.batch * stride, args.value_dim};
}

/* ---- columns ----------------------------------------------------------------------------------------------------- */

/* Walks the tiles of a work item, `step` columns at a time, `rounds` times over (once for every head that shares the
 * rows). It holds only what every step needs. */
struct tile_walk {
    const usp_tile *list;
    int column; /* first column of the step */
    int end, full_begin, full_end;
    int index, tiles, round, rounds;

    __device__ __forceinline__ tile_walk(const usp_tiles &all, const usp_work &work, int rounds_)
        : list(all.tile + work.first_tile), index(-1), tiles(work.tiles), round(0), rounds(tiles > 0 ? rounds_ : 0) {
        if (rounds > 0) next_tile();
    }

    __device__ __forceinline__ bool running() const {
        return round < rounds;
    }
    __device__ __forceinline__ int columns() const {
        return end - column;
    }
    /* Every pair of the step is allowed, whichever the row; without a step it means nothing. */
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
            column = list[index].begin;
            end = list[index].end;
        } while (column >= end);
        full_begin = list[index].full_begin;
        full_end = list[index].full_end;
    }
};

/* ---- pairs ------------------------------------------------------------------------------------------------------- */

static __device__ __forceinline__ bool pair_allowed(const usp_pairs &pairs, int query, int key) {
    int position = pairs.key[key];
    if (pairs.low[query] > position || position > pairs.high[query]) return false;
    return !pairs.last || pairs.query[query] <= pairs.last[key];
}

/* ---- scores ------------------------------------------------------------------------------------------------------ */

/* The soft cap as all heads have it. A capped score is GROWN times the product as long as that is small; far from 0 it
 * is tanh(scale product / cap) times `far`. Near 0, |scale product / cap| up to 0.4, tanh(x) / x is a polynomial of
 * x^2, to 10^-7: no instruction of the special unit, which the weights keep busy. `near` is that polynomial of the
 * product's square, times -GROWN, and GROWN is such that near 0 its value is -2 or less, a matter of two bits: the
 * upper ones of all values of a warp are looked at as one. */
struct soft_cap {
    static constexpr float GROWN = 2 / 0.94987231f;
    float unit, into, far, near[4], tangent;
    float exponent[4];             /* -near times unit: gives the score in base 2 */
    float nearest[2], slant[2];    /* up to 0.1: the same, to 2^-19, and what bend gives, to 2^-16 */
    float near_size, nearest_size; /* the largest products up to 0.4, or 0.1, 0 if their polynomial has no numbers, */
    float span;                    /* whose scores, in base 2, are at most this */
    bool used;
};

static __host__ __device__ __forceinline__ soft_cap soft_cap_of(const usp_softmax &args) {
    soft_cap cap = {args.scale * LOG2E, 0, 0, {}, 0, {}, {}, {}, 0, 0, 0, args.soft_cap > 0};
    if (!cap.used) return cap;
    cap.unit = args.scale * (LOG2E / soft_cap::GROWN);
    float into = args.scale / args.soft_cap, square = into * into;
    cap.into = 2 * LOG2E * into;
    cap.tangent = into / soft_cap::GROWN;
    cap.far = soft_cap::GROWN / into;
    cap.near[0] = -soft_cap::GROWN * 0.9999999f;
    cap.near[1] = soft_cap::GROWN * 0.33331363f * square;
    cap.near[2] = -soft_cap::GROWN * 0.13270977f * square * square;
    cap.near[3] = soft_cap::GROWN * 0.047553603f * square * square * square;
    for (int i = 0; i < 4; i++) cap.exponent[i] = -cap.near[i] * cap.unit;
    cap.nearest[0] = 0.99999834f * args.scale * LOG2E;
    cap.nearest[1] = -0.33200482f * args.scale * LOG2E * square;
    cap.slant[0] = 0.9999917f;
    cap.slant[1] = -0.99336267f * square;
    /* No such weight above a base from -span on is too large for its dtype. */
    cap.span = args.dtype == USP_F16 ? 7 : 16;
    float most = fminf(cap.span / (args.scale * LOG2E), 1e19f); /* its square is a number */
    cap.near_size = fabsf(cap.exponent[3]) < INFINITY ? fminf(most, 0.4f / into) : 0;
    cap.nearest_size = fabsf(cap.nearest[1]) < INFINITY && square < INFINITY ? fminf(most, 0.1f / into) : 0;
    return cap;
}

/* How a product q.k becomes a score, for one head; the score times `unit` is in base 2, which is left to the weight's
 * multiplication. Every kernel of a pass computes the same bits, as a score depends on its pair alone; but on Hopper,
 * for slopes, where a difference of places is taken apart, and for near_exponent, whose polynomial is shorter. */
struct scoring {
    soft_cap cap;
    float slope, unit;

    scoring() = default;
    __device__ __forceinline__ scoring(const soft_cap &cap_, float slope_) : cap(cap_), slope(slope_), unit(cap.unit) {
    }
    __device__ __forceinline__ scoring(const usp_softmax &args, int head, const soft_cap &cap_)
        : scoring(cap_, slope_of(args, head, cap_)) {
    }
    __device__ __forceinline__ scoring(const usp_softmax &args, int head) : scoring(args, head, soft_cap_of(args)) {
    }

    static __device__ __forceinline__ float slope_of(const usp_softmax &args, int head, const soft_cap &cap) {
        return args.slopes ? args.slopes[head] * LOG2E / cap.unit : 0;
    }

    /* Far from 0: tanh x = 1 - 2 / (1 + e^2x), to 2^-22 of 1. */
    __device__ __forceinline__ float capped_far(float product) const {
        return fmaf(-2 * cap.far, fast_reciprocal(1 + fast_exp2(product * cap.into)), cap.far);
    }

    /* Of a product near 0. `way` tells whether it is: is_near of its bits, or of those that several have in common. */
    __device__ __forceinline__ float capped_near(float product, float &way) const {
        float square = product * product;
        way = fmaf(square, fmaf(square, fmaf(square, cap.near[3], cap.near[2]), cap.near[1]), cap.near[0]);
        return product * -way;
    }

    /* Of a product near 0, up to 0.1 if NEAREST: what its score is above `base`, in base 2. */
    template <bool NEAREST> __device__ __forceinline__ float near_exponent(float product, float base) const {
        float square = product * product;
        const float(&c)[4] = cap.exponent;
        float of_square = NEAREST ? fmaf(square, cap.nearest[1], cap.nearest[0])
                                  : fmaf(square, fmaf(square, fmaf(square, c[3], c[2]), c[1]), c[0]);
        return fmaf(product, of_square, -base);
    }
    /* As bend, of a product up to 0.1. */
    __device__ __forceinline__ float near_bend(float product) const {
        return fmaf(product * product, cap.slant[1], cap.slant[0]);
    }
    static __device__ __forceinline__ bool is_near(uint32_t way) {
        return way >= 0xc0000000u;
    }

    __device__ __forceinline__ float capped(float product) const {
        float way, near = capped_near(product, way);
        return is_near(__float_as_uint(way)) ? near : capped_far(product);
    }

    /* The gradient by the product of a score that was capped, over the scale. */
    __device__ __forceinline__ float bend(float capped) const {
        float t = capped * cap.tangent;
        return fmaf(-t, t, 1);
    }

    __device__ __forceinline__ float biased(float score, float distance) const {
        return fmaf(-slope, distance, score);
    }

    /* `bend_by` becomes the gradient of the score by the product, over the scale. */
    __device__ __forceinline__ float score(float product, unsigned distance, float &bend_by) const {
        float x = cap.used ? capped(product) : product;
        bend_by = cap.used ? bend(x) : 1;
        return slope != 0 ? biased(x, (float)distance) : x;
    }
};

/* ---- what is kept of a row --------------------------------------------------------------------------------------- */

struct row_state {
    float top, sum;
};

/* The largest `top` that 2^(x - top) may have: 2^-inf is 0, so a row without any key so far weighs nothing as soon as
 * it gets one. */
static __device__ __forceinline__ float finite_base(float top) {
    return top == -INFINITY ? 0 : top;
}

/* Lets a sink weigh in the sum; returns what brings the row's other sums to the new top. `sink` is in base 2. */
static __device__ __forceinline__ float add_sink(row_state &row, float sink) {
    float top = fmaxf(row.top, sink), base = finite_base(top), factor = exp2f(row.top - base);
    row = {top, row.sum * factor + exp2f(sink - base)};
    return factor;
}

/* What add_sink gets: of a head without a sink, or before the last fold, a score that weighs nothing. */
static __device__ __forceinline__ float sink_of(const usp_softmax &args, int head) {
    return args.last && args.sinks ? args.sinks[head] * LOG2E : -INFINITY;
}

/* The last fold: the factor that makes acc the row of out; `kept` is dropout's. A NaN stays one: only a row without
 * keys has sum 0. */
static __device__ __forceinline__ float finish_row(row_state &row, float sink, float kept) {
    float factor = add_sink(row, sink) * kept;
    return row.sum == 0 ? 0 : __fdividef(factor, row.sum);
}

/* The same row with its log-sum-exp for top; what the logarithm is wrong by is in the sum, as its rounding is. */
static __device__ __forceinline__ row_state complete(row_state row) {
    float top = row.top + __log2f(row.sum), sum = row.sum * exp2f(row.top - top);
    return row.sum == 0 ? row_state{-INFINITY, 0} : row_state{top, sum};
}

/* What is kept of a row behind this fold. */
static __device__ __forceinline__ row_state left_state(const usp_softmax &args, row_state row) {
    return args.last ? complete(row) : row;
}

/* Writes what left_state gave to `line`. The sum of a completed row is so near 1 that it is one more than its
 * logarithm. */
static __device__ __forceinline__ void store_state(const usp_softmax &args, int64_t line, row_state left) {
    args.top[line] = left.top;
    args.sum[line] = left.sum;
    if (args.last && args.lse) args.lse[line] = fmaf(left.top, LN2, left.sum - 1);
}

/* Backward: P = 2^(x - base) * factor, which is 0 for a row without keys. */
static __device__ __forceinline__ float base_of(row_state row) {
    return row.sum == 0 ? INFINITY : row.top;
}

static __device__ __forceinline__ float factor_of(row_state row) {
    return row.sum == 0 ? 0 : __fdividef(1, row.sum);
}

/* ---- dropout ----------------------------------------------------------------------------------------------------- */

/* What the pairs of one query share; `row` is the query's. */
static __device__ __forceinline__ uint64_t dropout_row(const usp_softmax &args, int batch, int head, int row) {
    const usp_dropout &d = args.dropout;
    return usp_dropout_row(d.state[0], d.state[1], (uint32_t)batch * d.heads + d.first_head + head,
                           (uint32_t)args.pairs.query[row]);
}

#endif
