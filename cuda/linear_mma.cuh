/* linear_mma.cuh - what the tensor core kernels of linear_mma.cu are made of. It holds no kernel.
 *
 * A warp owns 16 value columns of the state for all of its life: in fp32, in registers, never in shared
 * memory.
 *
 * Rows go by in the order of time, `rows` at a time. The state is kept transposed, [value][dim]: as the accumulator of
 * v^T k it then has the very places that the right operand of q state needs. States that leave the kernel, or come into
 * it, take part in products as sums of two 16-bit numbers (high + low), so that no rounding of the dtype touches them;
 * the pairs (q.k) of one step and the rows that a block adds to its own running state are rounded once.
 *
 * Products stand in the order in which they run: what adds to the same sums is kept a few products apart, since each
 * takes longer than it keeps the tensor core busy. */
#ifndef USP_CUDA_LINEAR_MMA_CUH
#define USP_CUDA_LINEAR_MMA_CUH
#include "linear.cuh"
#include "tiles.cuh"
#include <type_traits>

static constexpr int rows = 64;              /* of one step */
static constexpr int row_blocks = rows / 16; /* a fragment is 16 rows or columns */
static constexpr int pair_bytes = rows * rows * 2;
static constexpr int table_bytes = 1024; /* decays[0 .. rows], the words below, and up to where a tile may begin */
static constexpr int spare_words = 72;   /* where a spare word a warp begins, in words */
static constexpr int begin_words = 80;   /* begins of the documents of two steps */

/* What the warps of a thread block share while it works on one block of one head. */
struct work {
    usp_place place;
    usp_time time;
    float log2_decay;
    const float *decays; /* decay^t for t = 0 .. rows, in shared memory */
};

/* ---- rows -------------------------------------------------------------------------------------------------------- */

/* Starts fetching the `rows` rows from `first` on in time; rows after the block become zero. */
template <typename T, int DIM, int THREADS>
static __device__ __forceinline__ void fetch(usp_shared_rows<DIM> to, const usp_tensor &x, const work &work, int first,
                                             int head) {
    int64_t token = work.time.first + static_cast<int64_t>(first) * work.time.step;
    usp_fetch<rows, THREADS, DIM>(to, usp_row<const T>(x, token, work.place.batch, head),
                                  work.time.step * x.stride_token, work.time.count - first, DIM);
}

/* Where the documents of the `rows` rows from `first` on begin, counted from the step's first row. */
static __device__ __forceinline__ void find_begins(int *begins, const usp_linear &linear, const work &work, int first) {
    int t = first + threadIdx.x;
    if (threadIdx.x < rows && t < work.time.count)
        begins[threadIdx.x] = usp_document_begin(linear, work.time, t) - first;
}

/* Makes the first `count` rows of a step 0. */
template <int DIM, int THREADS> static __device__ __forceinline__ void clear_rows(usp_shared_rows<DIM> x, int count) {
    for (int at = threadIdx.x * 16; at < count * x.bytes; at += THREADS * 16)
        asm volatile("st.shared.v4.u32 [%0], {%1,%1,%1,%1};" ::"r"(x.base + at), "r"(0) : "memory");
}

/* ---- the state --------------------------------------------------------------------------------------------------- */

/* This lane's elements of the state of its warp: 16 values by DIM. */
template <int DIM> using state_sums = usp_sums<1, DIM / 8>;

/* Calls body(element, index in the stored state). */
template <int DIM, typename Body>
static __device__ __forceinline__ void for_state(state_sums<DIM> &state, const usp_linear &linear, Body body) {
    int value = threadIdx.x / 32 * 16;
#pragma unroll
    for (int n = 0; n < DIM / 8; n++) {
#pragma unroll
        for (int i = 0; i < 4; i++)
            body(state[0][n][i], usp_state_index(linear, usp_lane_column(n) + i % 2, value + usp_lane_row(0, i / 2)));
    }
}

/* Block (row, column) and the one below it or beside it. Loaded a turn before they are used, which hides the way from
 * shared memory. */
template <int DIM, bool TRANSPOSED>
static __device__ __forceinline__ void load_pair(usp_fragment (&to)[2], uint32_t lane, int row, int column, int down,
                                                 int right) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        uint32_t at = usp_block_at<DIM>(lane, row + i * down, column + i * right);
        to[i] = TRANSPOSED ? usp_load_block_transposed(at) : usp_load_block(at);
    }
}

/* Rows r * 16 .. + 16 of the step as left operand v^T, each times its weight; `low` is what `high` leaves of it. */
template <typename T, int VALUE>
static __device__ __forceinline__ void weigh_values(usp_fragment &high, usp_fragment &low, uint32_t v_lane, int r,
                                                    const float *decays, int last, float factor) {
    usp_fragment loaded = usp_load_block_transposed(usp_block_at<VALUE>(v_lane, r, threadIdx.x / 32));
#pragma unroll
    for (int i = 0; i < 4; i++) { /* quarters: values by i % 2, rows by i / 2 */
        int after = last - (r * 16 + i / 2 * 8 + usp_lane_column(0));
        float2 x = usp_unpack<T>(loaded.part[i % 2 * 2 + i / 2]);
        x.x *= factor * decays[max(after, 0)];
        x.y *= factor * decays[max(after - 1, 0)];
        high.part[i] = usp_pack<T>(x.x, x.y);
        float2 rounded = usp_unpack<T>(high.part[i]);
        low.part[i] = usp_pack<T>(x.x - rounded.x, x.y - rounded.y);
    }
}

/* state += sum over the rows of k (weight v)^T, row t of the step with weight factor decay^(last - t), last <= rows.
 * SPLIT: with weights and rows in more than the precision of T. */
template <typename T, int DIM, int VALUE, bool SPLIT>
static __device__ __forceinline__ void add_rows(state_sums<DIM> &state, usp_shared_rows<DIM> k,
                                                usp_shared_rows<VALUE> v, const float *decays, int last, float factor) {
    constexpr int turns = DIM / 32; /* of two blocks of dims, for each block of rows */
    uint32_t k_lane = usp_lane_address(k), v_lane = usp_lane_address(v);
    usp_fragment high, low, right[2], next[2];
    load_pair<DIM, true>(next, k_lane, 0, 0, 0, 1);
#pragma unroll
    for (int turn = 0; turn < row_blocks * turns; turn++) {
        int r = turn / turns, n = turn % turns * 4, after = turn + 1;
        if (n == 0) weigh_values<T, VALUE>(high, low, v_lane, r, decays, last, factor);
        right[0] = next[0], right[1] = next[1];
        if (after < row_blocks * turns) load_pair<DIM, true>(next, k_lane, after / turns, after % turns * 2, 0, 1);
#pragma unroll
        for (int i = 0; i < 4; i++)
            usp_mma<T>(state[0][n + i], high, right[i / 2].part[i % 2 * 2], right[i / 2].part[i % 2 * 2 + 1]);
#pragma unroll
        for (int i = 0; SPLIT && i < 4; i++)
            usp_mma<T>(state[0][n + i], low, right[i / 2].part[i % 2 * 2], right[i / 2].part[i % 2 * 2 + 1]);
    }
}

/* The largest size(element) of the warp's state; NaNs do not count. */
template <int DIM, typename Size>
static __device__ __forceinline__ float largest_element(const state_sums<DIM> &state, Size size) {
    float largest = 0;
#pragma unroll
    for (int n = 0; n < DIM / 8; n++) {
#pragma unroll
        for (int i = 0; i < 4; i++) largest = fmaxf(largest, size(state[0][n][i]));
    }
    for (int lanes = 16; lanes > 0; lanes /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, lanes));
    return largest;
}

/* A power of two that brings the warp's state well inside T's range; bf16 has fp32's. An infinity loses its value
 * column but no other. */
template <typename T, int DIM> static __device__ __forceinline__ float state_unit(const state_sums<DIM> &state) {
    if (std::is_same<T, __nv_bfloat16>::value) return 1;
    float largest = largest_element<DIM>(state, [](float x) { return fabsf(x); });
    if (largest == INFINITY) largest = largest_element<DIM>(state, [](float x) { return isinf(x) ? 0 : fabsf(x); });
    int exponent = (__float_as_int(largest) >> 23) - 127;
    return __int_as_float((min(max(exponent - 10, -100), 100) + 127) << 23);
}

/* ---- output ------------------------------------------------------------------------------------------------------ */

/* A warp's 16 columns of the output of one step. */
using out_sums = usp_sums<row_blocks, 2>;

/* Dims 16 d .. + 16 of the state as right operand: high + low = state / unit. */
template <typename T, int DIM>
static __device__ __forceinline__ void split_state(uint32_t (&high)[2][2], uint32_t (&low)[2][2],
                                                   const state_sums<DIM> &state, int d, float per_unit) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float *pair = &state[0][2 * d + i % 2][i / 2 * 2];
        float x = pair[0] * per_unit, y = pair[1] * per_unit;
        high[i / 2][i % 2] = usp_pack<T>(x, y);
        float2 rounded = usp_unpack<T>(high[i / 2][i % 2]);
        low[i / 2][i % 2] = usp_pack<T>(x - rounded.x, y - rounded.y);
    }
}

/* out = q (state / unit). */
template <typename T, int DIM>
static __device__ __forceinline__ void multiply_state(out_sums &out, usp_shared_rows<DIM> q,
                                                      const state_sums<DIM> &state, float per_unit) {
    uint32_t q_lane = usp_lane_address(q);
#pragma unroll
    for (int m = 0; m < row_blocks; m++) {
#pragma unroll
        for (int i = 0; i < 8; i++) out[m][i / 4][i % 4] = 0;
    }
    constexpr int turns = row_blocks / 2; /* of two blocks of rows, for each block of dims */
    usp_fragment left[2], next[2];
    uint32_t high[2][2], low[2][2]; /* [8 values][8 dims] */
    load_pair<DIM, false>(next, q_lane, 0, 0, 1, 0);
#pragma unroll
    for (int turn = 0; turn < DIM / 16 * turns; turn++) {
        int d = turn / turns, m = turn % turns * 2, after = turn + 1;
        if (m == 0) split_state<T, DIM>(high, low, state, d, per_unit);
        left[0] = next[0], left[1] = next[1];
        if (after < DIM / 16 * turns) load_pair<DIM, false>(next, q_lane, after % turns * 2, after / turns, 1, 0);
#pragma unroll
        for (int i = 0; i < 4; i++) usp_mma<T>(out[m + i / 2][i % 2], left[i / 2], high[i % 2][0], high[i % 2][1]);
#pragma unroll
        for (int i = 0; i < 4; i++) usp_mma<T>(out[m + i / 2][i % 2], left[i / 2], low[i % 2][0], low[i % 2][1]);
    }
}

/* out *= factor decay^row. */
static __device__ __forceinline__ void weigh_rows(out_sums &out, float factor, const float *decays) {
#pragma unroll
    for (int i = 0; i < row_blocks * 2; i++) {
        float weight = factor * decays[usp_lane_row(i / 2, i % 2)];
#pragma unroll
        for (int n = 0; n < 2; n++) {
            out[i / 2][n][i % 2 * 2] *= weight;
            out[i / 2][n][i % 2 * 2 + 1] *= weight;
        }
    }
}

/* Makes the rows 0 that do not follow the state: for which follows(row of the step) is false. */
template <typename Follows> static __device__ __forceinline__ void drop_rows(out_sums &out, Follows follows) {
#pragma unroll
    for (int i = 0; i < row_blocks * 2; i++) {
        bool keep = follows(usp_lane_row(i / 2, i % 2));
#pragma unroll
        for (int n = 0; n < 4; n++) {
            float &x = out[i / 2][n / 2][i % 2 * 2 + n % 2];
            x = keep ? x : 0;
        }
    }
}

/* The decayed products q.k of 16 rows and 32 keys of the step, zero where the key is later or of a document before
 * (`begins`, if DOCUMENTS), into shared memory. */
template <typename T, int DIM, bool DOCUMENTS>
static __device__ __forceinline__ void make_pairs(unsigned char *pairs, usp_shared_rows<DIM> q, usp_shared_rows<DIM> k,
                                                  int row_block, int half, float scale, const float *decays,
                                                  const int *begins) {
    usp_sums<1, 4> product = {};
    usp_multiply_rows<T, DIM, 1, 4>(product, q.rows_from(row_block * 16), k.rows_from(half * 32));
#pragma unroll
    for (int n = 0; n < 4; n++) {
        int key = half * 32 + usp_lane_column(n);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int row = row_block * 16 + usp_lane_row(0, i), distance = row - key;
            int far = DOCUMENTS ? row - begins[row] : distance; /* the largest distance in the document */
            bool first = distance >= 0 && distance <= far, second = distance >= 1 && distance - 1 <= far;
            float x = first ? product[0][n][2 * i] * scale * decays[distance] : 0;
            float y = second ? product[0][n][2 * i + 1] * scale * decays[distance - 1] : 0;
            int place = row * rows * 2 + (((key / 8) ^ (row & 7)) << 4) + key % 8 * 2;
            *reinterpret_cast<uint32_t *>(pairs + place) = usp_pack<T>(x, y);
        }
    }
}

/* out += pairs v; blocks above the diagonal hold nothing. True if v is not finite everywhere in this warp's columns:
 * then pairs of 0 have spoilt rows that are before it. */
template <typename T, int VALUE>
static __device__ __forceinline__ bool add_pairs(out_sums &out, usp_shared_rows<rows> pairs, usp_shared_rows<VALUE> v) {
    uint32_t pair_lane = usp_lane_address(pairs), v_lane = usp_lane_address(v), taint = 0;
#pragma unroll
    for (int key = 0; key < row_blocks; key++) {
        usp_fragment right = usp_load_block_transposed(usp_block_at<VALUE>(v_lane, key, threadIdx.x / 32));
#pragma unroll
        for (int i = 0; i < 4; i++) taint = usp_taint<T>(taint, right.part[i]);
#pragma unroll
        for (int m = key; m < row_blocks; m++) {
            usp_fragment left = usp_load_block(usp_block_at<rows>(pair_lane, m, key));
            usp_mma<T>(out[m][0], left, right.part[0], right.part[1]);
            usp_mma<T>(out[m][1], left, right.part[2], right.part[3]);
        }
    }
    return __any_sync(~0u, taint != 0);
}

/* Makes what is not finite 0 in this warp's columns. */
template <typename T, int VALUE> static __device__ __forceinline__ void clear_columns(usp_shared_rows<VALUE> v) {
#pragma unroll 1
    for (int row = threadIdx.x % 32 / 8; row < rows; row += 4) {
        int chunk = (threadIdx.x / 32 * 2 + threadIdx.x / 4 % 2) ^ (row & 7);
        usp_clear_pair<T>(v.base + row * v.bytes + (chunk << 4) + threadIdx.x % 4 * 4);
    }
    __syncwarp();
}

/* Writes 16 columns of a row as T: lanes swap halves with their neighbour, so that four lanes fill 32 bytes at once. */
template <typename T>
static __device__ __forceinline__ void put_values(T *to, const float *left, const float *right, bool live) {
    int lane = threadIdx.x & 3, odd = lane & 1;
    uint32_t first = usp_pack<T>(left[0], left[1]), second = usp_pack<T>(right[0], right[1]);
    uint32_t other = __shfl_xor_sync(~0u, odd ? first : second, 1);
    uint2 four = odd ? make_uint2(other, second) : make_uint2(first, other);
    if (live) *reinterpret_cast<uint2 *>(to + odd * 8 + lane / 2 * 4) = four;
}

/* Adds what was there, and writes the rows of the step from `first` on in time. */
template <typename T>
static __device__ __forceinline__ void put_rows(out_sums &out, const usp_linear &linear, const work &work, int first) {
    int value = threadIdx.x / 32 * 16;
    T *out_row = usp_row<T>(linear.out, work.time.first, work.place.batch, work.place.head) + value;
    float *acc_row = usp_sums_row(linear, work.time.first, work.place) + value + usp_lane_column(0);
    int64_t out_step = work.time.step * linear.out.stride_token;
    int64_t acc_step = static_cast<int64_t>(work.time.step * linear.batch) * linear.heads * linear.value_dim;
#pragma unroll
    for (int i = 0; i < row_blocks * 2; i++) {
        int t = first + usp_lane_row(i / 2, i % 2);
        bool live = t < work.time.count;
        float *left = &out[i / 2][0][i % 2 * 2], *right = &out[i / 2][1][i % 2 * 2], *acc = acc_row + t * acc_step;
        if (!linear.first && live) {
            float2 x = *reinterpret_cast<const float2 *>(acc), y = *reinterpret_cast<const float2 *>(acc + 8);
            left[0] += x.x, left[1] += x.y, right[0] += y.x, right[1] += y.y;
        }
        if (linear.last) {
            put_values(out_row + t * out_step, left, right, live);
        } else if (live) {
            usp_put_pair(acc, left);
            usp_put_pair(acc + 8, right);
        }
    }
}

/* Writes what is not finite in this warp's columns of v to the rows of the block and document that are not before it in
 * time; the running state left it out too. A lane has one column. */
template <typename T> static __device__ __noinline__ void mend(const usp_linear &linear) {
    usp_place place = usp_find_place(linear);
    usp_time time = usp_block_time(linear, linear.block[place.block]);
    int v_head = usp_mapped_head(linear.v_map, place.head), column = threadIdx.x / 32 * 16 + threadIdx.x % 32;
    __syncwarp(); /* the rows are written */
    for (int key = 0; key < time.count && threadIdx.x % 32 < 16; key++) {
        float x = usp_to_float(usp_row<T>(linear.v, time.first + key * time.step, place.batch, v_head)[column]);
        int end = linear.begins ? min(usp_document_end(linear, time, key) + 1, time.count) : time.count;
        for (int t = key; t < end && !isfinite(x); t++) {
            int64_t token = time.first + t * time.step;
            if (linear.last)
                usp_row<T>(linear.out, token, place.batch, place.head)[column] = usp_from_float<T>(x);
            else
                usp_sums_row(linear, token, place)[column] = x;
        }
    }
}

#endif
