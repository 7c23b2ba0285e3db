/* softmax_wgmma_wide.cuh - backward softmax attention on Hopper for the widest heads: sizes of tiles, what lies in
 * shared memory beside what is copied. */
#ifndef USP_CUDA_SOFTMAX_WGMMA_WIDE_CUH
#define USP_CUDA_SOFTMAX_WGMMA_WIDE_CUH
#include "softmax_wgmma_gradients.cuh"

/* ---- sizes ------------------------------------------------------------------------------------------------------- */

/* 64 queries at a time, and as many keys: half a work item. Sums of a thread: 64 each of dk, dq and dv, 16 each of S,
 * dP, and dq of the step before. */
struct wide_shape {
    static constexpr int dim = 256, value_dim = 256, step = 64, parts = 1, part = step;
    static constexpr bool caps = false, slopes = false, drops = false;
    static constexpr int rows = 64, groups = 2, threads = 128 * (1 + groups);
    static constexpr int stages = 2, dout_stages = 1; /* there is room for one place of dout */
    static constexpr int queries = step / groups;     /* whose S and dP one group has */
    static constexpr int dq_boxes = dim / groups / 32, dq_together = 1, dq_places = 2;
    static constexpr bool rests_late = true, boxes_keys = false;
    static constexpr int copying_registers = 24, computing_registers = 240;

    static __device__ __forceinline__ int dq_query(int) {
        return 0;
    }
    static __device__ __forceinline__ int dq_column(int group, int box) {
        return group * (dim / groups) + box * 32;
    }
};

/* ---- shared memory ----------------------------------------------------------------------------------------------- */

/* P^T of a step has the place of its stage: it is written while the other group may still read the last one's. */
template <typename Shape> struct wide_memory : backward_tiles<Shape> {
    using tile = pairs_tile<Shape>;
    static constexpr int p = backward_tiles<Shape>::end, ds = p + Shape::stages * tile::bytes;
    static constexpr int notes = ds + tile::bytes;
    static constexpr int bytes = notes + (int)sizeof(backward_notes<Shape>);

    static __device__ __forceinline__ tile p_at(int stage) {
        return {shared_base() + p + stage * tile::bytes};
    }
    static __device__ __forceinline__ tile ds_at() {
        return {shared_base() + ds};
    }
};

#endif
