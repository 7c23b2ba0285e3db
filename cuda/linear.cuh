/* linear.cuh - what the kernels of linear attention share: where a thread block works, rows in order of time,
 * documents, decay. It holds no kernel. */
#ifndef USP_CUDA_LINEAR_CUH
#define USP_CUDA_LINEAR_CUH
#include "launch.cuh"
#include "linear.h"

/* lambda^rows = exp2(rows * this). The bound keeps lambda = 0 from making 0 * infinity of no rows at all. */
static __device__ __forceinline__ float usp_log2_decay(const float *log_decay, int head) {
    return log_decay ? fmaxf(log_decay[head] * 1.4426950408889634f, -1e30f) : 0.0f;
}

static __device__ __forceinline__ float usp_decay(float log2_decay, int rows) {
    return exp2f(log2_decay * rows);
}

/* The block, batch and head of a thread block. Heads run fastest, so that heads that share k or v meet in the cache. */
struct usp_place {
    int block, batch, head;
};

static __device__ __forceinline__ usp_place usp_find_place(const usp_linear &linear) {
    unsigned row = blockIdx.x / linear.heads;
    return {static_cast<int>(row / linear.batch), static_cast<int>(row % linear.batch),
            static_cast<int>(blockIdx.x % linear.heads)};
}

static inline dim3 usp_place_grid(const usp_linear *linear, unsigned parts) {
    return dim3(static_cast<unsigned>(linear->blocks) * linear->batch * linear->heads, parts);
}

/* The rows of a block in the order of time: row t is token first + t * step. */
struct usp_time {
    int64_t first;
    int step, count;
};

static __device__ __forceinline__ usp_time usp_block_time(const usp_linear &linear, const usp_block &block) {
    if (linear.reverse) return {block.begin + block.count - 1, -1, block.count};
    return {block.begin, 1, block.count};
}

/* Rows of the chunk before the first row in time of the block. */
static __device__ __forceinline__ int usp_chunk_rows_before(const usp_linear &linear, const usp_block &block) {
    return linear.reverse ? block.chunk_rows - block.distance - block.count : block.distance;
}

/* ---- documents, in the order of time: a block's first row is row 0 ----------------------------------------------- */

/* The first row in time of row t's document; less than 0 where it began before the block. */
static __device__ __forceinline__ int usp_document_begin(const usp_linear &linear, const usp_time &time, int t) {
    const int32_t *begins = linear.reverse ? linear.ends : linear.begins;
    return static_cast<int>(begins[time.first + t * time.step] - time.first) * time.step;
}

/* The last one; time.count or more where the document goes on behind the block. */
static __device__ __forceinline__ int usp_document_end(const usp_linear &linear, const usp_time &time, int t) {
    const int32_t *ends = linear.reverse ? linear.begins : linear.ends;
    return static_cast<int>(ends[time.first + t * time.step] - time.first) * time.step;
}

/* The rows whose products leave the block: those of its last document in time. */
static __device__ __forceinline__ usp_time usp_leaving_time(const usp_linear &linear, const usp_time &time) {
    if (!linear.begins || time.count == 0) return time;
    int skip = max(usp_document_begin(linear, time, time.count - 1), 0);
    return {time.first + skip * time.step, time.step, time.count - skip};
}

/* How many rows, the first ones in time, go on with the state of `before` rows before the block. */
static __device__ __forceinline__ int usp_entered_rows(const usp_linear &linear, const usp_time &time, int before) {
    if (!linear.begins || time.count == 0) return time.count;
    if (usp_document_begin(linear, time, 0) >= -before) return 0;
    return min(usp_document_end(linear, time, 0) + 1, time.count);
}

/* ---- states and sums --------------------------------------------------------------------------------------------- */

/* State `index` of one batch and head. */
static __device__ __forceinline__ float *usp_state(const usp_linear &linear, int index, const usp_place &place) {
    int64_t slot = (static_cast<int64_t>(index) * linear.batch + place.batch) * linear.heads + place.head;
    return linear.states + slot * linear.dim * linear.value_dim;
}

/* Element [d][e] of a state, however it is stored. */
static __device__ __forceinline__ int usp_state_index(const usp_linear &linear, int d, int e) {
    return linear.transposed ? e * linear.dim + d : d * linear.value_dim + e;
}

/* The running sums of one token. */
static __device__ __forceinline__ float *usp_sums_row(const usp_linear &linear, int64_t token, const usp_place &place) {
    return linear.acc + ((token * linear.batch + place.batch) * linear.heads + place.head) * linear.value_dim;
}

#endif
