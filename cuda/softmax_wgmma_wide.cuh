/* softmax_wgmma_wide.cuh - backward softmax attention on Hopper for wide heads: sizes of tiles, what lies in shared
 * memory beside what is copied, and the columns that one of two groups has of a result. */
#ifndef USP_CUDA_SOFTMAX_WGMMA_WIDE_CUH
#define USP_CUDA_SOFTMAX_WGMMA_WIDE_CUH
#include "softmax_wgmma_gradients.cuh"

/* ---- half the columns -------------------------------------------------------------------------------------------- */

/* What one of two groups has of DIM columns: whole slabs of 64, from the first or up to the last one, and where their
 * number is odd half of the one between. Sums are those of the slabs, then those of the half. */
template <int DIM> struct half_columns {
    static constexpr int whole = DIM / 128 * 64, rest = DIM / 2 - whole;
    static_assert(rest == 0 || rest == 32, "slabs are cut in halves");
    using sums = usp_sums<1, DIM / 16>;

    static __device__ __forceinline__ int first_whole(int group) {
        return group * (DIM - whole);
    }
    static __device__ __forceinline__ int first_rest(int group) {
        return whole + group * rest;
    }
    /* The first column of column block n. */
    static __device__ __forceinline__ int first_of(int group, int n) {
        return n < whole / 8 ? first_whole(group) + n * 8 : first_rest(group) + n * 8 - whole;
    }

    /* c = a b, or is added to: a given by its descriptor, b by its 16 rows from 16 k on. */
    template <typename T, bool LEFT_BY_COLUMNS, int ROWS>
    static __device__ __forceinline__ void issue(sums &c, uint64_t a, slabs<ROWS, DIM> b, int k, int group, bool add) {
        issue_product<T, true, LEFT_BY_COLUMNS>(reinterpret_cast<float(&)[whole / 2]>(c), a,
                                                b.rows(k, first_whole(group)), add);
        if constexpr (rest > 0)
            issue_product<T, true, LEFT_BY_COLUMNS>(reinterpret_cast<float(&)[rest / 2]>(c[0][whole / 8]), a,
                                                    b.rows(k, first_rest(group)), add);
    }
};

/* ---- sizes ------------------------------------------------------------------------------------------------------- */

/* 64 queries at a time, and as many keys: half a work item. Sums of a thread: DIM / 4 of dk and of dq, VALUE_DIM / 4 of
 * dv, 16 each of S and dP. */
template <int DIM, int VALUE_DIM> struct wide_shape {
    static constexpr int dim = DIM, value_dim = VALUE_DIM, step = 64;
    static constexpr bool caps = false, slopes = false, drops = false, extras = false;
    static constexpr int rows = 64, groups = 2, threads = 128 * (1 + groups);
    /* Wide values leave room for one place of dout, and for two boxes of dq at a time. */
    static constexpr int stages = 2, dout_stages = VALUE_DIM > 128 ? 1 : 2;
    static constexpr int queries = step / groups; /* whose S and dP one group has */
    static constexpr int dq_boxes = DIM / groups / 32, dq_together = 1, dq_places = VALUE_DIM > 128 ? 2 : 3;
    static constexpr bool boxes_keys = false;
    static constexpr int copying_registers = DIM > 192 ? 24 : 40, computing_registers = DIM > 192 ? 240 : 232;

    static __device__ __forceinline__ int dq_query(int) {
        return 0;
    }
    static __device__ __forceinline__ int dq_column(int group, int box) {
        return half_columns<DIM>::first_of(group, box * 4);
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
