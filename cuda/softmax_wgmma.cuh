/* softmax_wgmma.cuh - what the Hopper kernels of softmax attention share: tiles in shared memory and their products,
 * pipelines, masks on accumulators, launches and maps of tensors. */
#ifndef USP_CUDA_SOFTMAX_WGMMA_CUH
#define USP_CUDA_SOFTMAX_WGMMA_CUH
#include "hopper.cuh"
#include "softmax_mma.cuh"

/* ---- instances --------------------------------------------------------------------------------------------------- */

/* What instances with extras do beside the plain ones: a soft cap, slopes, dropout. Those with MORE also do without
 * slopes or dropout, which then change nothing, and with largest scores: a branch around either would cost registers.
 */
constexpr int CAPS = 1, SLOPES = 2, DROPS = 4, MORE = SLOPES | DROPS;

static inline int extras_of(const usp_softmax &args) {
    bool caps = args.soft_cap > 0, slopes = args.slopes, drops = args.dropout.rate > 0;
    bool more = args.peak || caps + slopes + drops > 1;
    return (caps ? CAPS : 0) | (slopes || more ? SLOPES : 0) | (drops || more ? DROPS : 0);
}

/* Calls start of the constant that extras_of gives. */
template <typename Start> static inline usp_status start_with_extras(const usp_softmax &args, const Start &start) {
    switch (extras_of(args)) {
    case CAPS:
        return start(std::integral_constant<int, CAPS>());
    case SLOPES:
        return start(std::integral_constant<int, SLOPES>());
    case DROPS:
        return start(std::integral_constant<int, DROPS>());
    case MORE:
        return start(std::integral_constant<int, MORE>());
    case CAPS | MORE:
        return start(std::integral_constant<int, CAPS | MORE>());
    default:
        return start(std::integral_constant<int, 0>());
    }
}

/* ---- tiles ------------------------------------------------------------------------------------------------------- */

/* ROWS rows of DIM elements as copies leave and store them: slab after slab of 64 columns of ROWS swizzled rows. */
template <int ROWS, int DIM> struct slabs {
    static constexpr int slab = ROWS * 128, bytes = ROWS * DIM * 2;
    uint32_t address;

    /* 16 columns from 16 k on, of the rows from `row` on, a multiple of 8, as what a product sums over. */
    __device__ __forceinline__ uint64_t columns(int k, int row = 0) const {
        return describe(address + row * 128, 16, k / 4 * slab + k % 4 * 32);
    }
    /* 16 rows from 16 k on, as what a product sums over; the columns from `first` on, a multiple of 8. */
    __device__ __forceinline__ uint64_t rows(int k, int first = 0) const {
        return describe(address + first / 64 * slab + first % 64 * 2, slab, k * 2048);
    }

    __device__ __forceinline__ void copy(const tile_map *map, int token, int head, int batch, arrivals *at) const {
#pragma unroll
        for (int s = 0; s < DIM / 64; s++) copy_box(address + s * slab, map, s * 64, token, head, batch, at);
    }
    __device__ __forceinline__ void store(const tile_map *map, int row, int token, int head, int batch) const {
#pragma unroll
        for (int s = 0; s < DIM / 64; s++) store_box(map, s * 64, token, head, batch, address + row * 128 + s * slab);
    }
};

/* The sums of COLUMNS columns from column block n on, as one list of registers. */
template <int COLUMNS, int N>
static __device__ __forceinline__ float (&list_from(usp_sums<1, N> &c, int n))[COLUMNS / 2] {
    return reinterpret_cast<float(&)[COLUMNS / 2]>(c[0][n]);
}

/* All of them. */
template <int N> static __device__ __forceinline__ float (&list_of(usp_sums<1, N> &c))[N * 4] {
    return list_from<N * 8>(c, 0);
}

template <int N> static __device__ __forceinline__ void clear(usp_sums<1, N> &c) {
#pragma unroll
    for (int n = 0; n < N; n++) c[0][n][0] = c[0][n][1] = c[0][n][2] = c[0][n][3] = 0;
}

/* c = a b^T for the 64 rows of a from `row` on and the N * 8 rows of b from `first` on. */
template <typename T, int N, int ROWS, int STEP, int DIM>
static __device__ __forceinline__ void issue_rows(usp_sums<1, N> &c, slabs<ROWS, DIM> a, int row, slabs<STEP, DIM> b,
                                                  int first = 0) {
#pragma unroll
    for (int k = 0; k < DIM / 16; k++)
        issue_product<T, false>(list_of<N>(c), a.columns(k, row), b.columns(k, first), k > 0);
}

/* A left operand of K * 16 columns in registers. */
template <int K> using left_operand = uint32_t[K][4];

/* Rounds an accumulator of K * 16 columns to T. */
template <typename T, int K>
static __device__ __forceinline__ void round_sums(left_operand<K> &a, const usp_sums<1, 2 * K> &c) {
#pragma unroll
    for (int k = 0; k < K; k++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float *pair = &c[0][2 * k + i / 2][i % 2 * 2];
            a[k][i] = usp_pack<T>(pair[0], pair[1]);
        }
    }
}

/* Writes a warp's rows of a tile from `row` on, rounded, and of them the columns from `first` on, before 64, a
 * multiple of how many they are. Chunks of 16 bytes are swizzled by row & 7, so the chunk of another column block is an
 * exclusive or away. publish_stores must follow. */
template <int K, typename Tile>
static __device__ __forceinline__ void write_rows(const left_operand<K> &a, Tile tile, int row, int first = 0) {
    int lane = threadIdx.x % 32, chunk = first / 8 + lane / 16;
    uint32_t to = tile.address + (row + lane % 16) * 128 + ((lane % 8 ^ chunk) << 4);
    pin(to);
#pragma unroll
    for (int k = 0; k < K; k++) store_blocks((to ^ k % 4 << 5) + k / 4 * Tile::slab, a[k]);
}

/* c += a b. */
template <typename T, int N, int K, int DIM>
static __device__ __forceinline__ void issue_columns(usp_sums<1, N> &c, const left_operand<K> &a,
                                                     slabs<K * 16, DIM> b) {
    constexpr int most = DIM > 128 && DIM < 256 ? 128 : DIM; /* columns at once: 192 are 128 and 64 */
#pragma unroll
    for (int k = 0; k < K; k++) {
        issue_product<T, true>(list_from<most>(c, 0), a[k], b.rows(k), true);
        if constexpr (most < DIM)
            issue_product<T, true>(list_from<DIM - most>(c, most / 8), a[k], b.rows(k, most), true);
    }
}

/* One element of a tile. */
template <typename T, int ROWS, int DIM>
static __device__ __forceinline__ float element_of(slabs<ROWS, DIM> tile, int row, int column) {
    uint32_t in_row = column % 64 * 2,
             at = tile.address + column / 64 * tile.slab + row * 128 + (in_row ^ (row & 7) << 4);
    float2 two = usp_unpack<T>(load_shared_word(at & ~3u));
    return column % 2 ? two.y : two.x;
}

/* Whether the eight elements at a shared address are not all finite. */
template <typename T> static __device__ __forceinline__ bool is_spoilt(uint32_t address) {
    uint4 eight = load_shared(address);
    uint32_t taint = usp_taint<T>(usp_taint<T>(0, eight.x), eight.y);
    return usp_taint<T>(usp_taint<T>(taint, eight.z), eight.w) != 0;
}

/* Whether those that one of THREADS threads looks at, of BYTES of shared memory, are not; in short chains. */
template <typename T, int BYTES, int THREADS>
static __device__ __forceinline__ bool is_part_spoilt(uint32_t address, int thread) {
    uint32_t taint[4] = {};
#pragma unroll 4
    for (int i = thread * 16; i < BYTES; i += THREADS * 16) {
        uint4 eight = load_shared(address + i);
        taint[0] = usp_taint<T>(taint[0], eight.x), taint[1] = usp_taint<T>(taint[1], eight.y);
        taint[2] = usp_taint<T>(taint[2], eight.z), taint[3] = usp_taint<T>(taint[3], eight.w);
    }
    return (taint[0] | taint[1] | taint[2] | taint[3]) != 0;
}

/* ---- online softmax ---------------------------------------------------------------------------------------------- */

/* Row i times factor[i]; most often both factors are 1, and a warp looks once. */
template <int N> static __device__ __forceinline__ void scale_rows(usp_sums<1, N> &c, const float (&factor)[2]) {
    if (!__any_sync(~0u, factor[0] != 1 || factor[1] != 1)) return;
    multiply_row(0, c, factor[0]);
    multiply_row(1, c, factor[1]);
}

/* ---- pipelines --------------------------------------------------------------------------------------------------- */

/* Which of STAGES places is next, and the parity of the phase in which it is filled. */
template <int STAGES> struct turn {
    int stage, parity;

    __device__ __forceinline__ void advance() {
        if (++stage < STAGES) return;
        stage = 0;
        parity ^= 1;
    }
    /* The place among twice as many, of what is wanted when this one has been left. */
    __device__ __forceinline__ int of_twice() const {
        return stage + parity * STAGES;
    }
};

/* A warp of those that an arrival barrier counts: all its lanes are done with something, or have brought it. */
static __device__ __forceinline__ void arrive_warp(arrivals *at) {
    __syncwarp();
    if (is_leader()) arrive(at);
}

/* ---- pairs ------------------------------------------------------------------------------------------------------- */

/* What usp_pairs says of a lane's columns of a step, if that is masked: on its way while a place for it is awaited. */
template <int STEP> struct column_notes {
    static constexpr int each = (STEP + 31) / 32;
    int key[each], last[each];

    template <typename Walk> __device__ __forceinline__ void load(const usp_pairs &pairs, const Walk &at) {
#pragma unroll
        for (int n = 0; n < each; n++) {
            int i = threadIdx.x % 32 + n * 32;
            key[n] = load_or(pairs.key, at.column, i, at.columns(), NOWHERE);
            if (pairs.last) last[n] = load_or(pairs.last, at.column, i, at.columns(), 0);
        }
    }

    /* By a warp. */
    __device__ __forceinline__ void note(int *to_key, int *to_last, bool trees) const {
#pragma unroll
        for (int n = 0; n < each; n++) {
            int i = threadIdx.x % 32 + n * 32;
            if (i >= STEP) continue;
            to_key[i] = key[n];
            if (trees) to_last[i] = last[n];
        }
    }
};

/* The keys that a query may see, so that one comparison tells: key - low, as a number without a sign, is at most span.
 */
struct alignas(8) key_span {
    int low;
    uint32_t span;

    /* An empty one has the last position of all, where no key is: a sequence has fewer tokens. */
    static __device__ __forceinline__ key_span of(int low, int high) {
        low = max(low, NOWHERE + 1);
        return low <= high ? key_span{low, (uint32_t)high - (uint32_t)low} : key_span{INT32_MAX, 0};
    }
    __device__ __forceinline__ bool has(int key) const {
        return (uint32_t)key - (uint32_t)low <= span;
    }
};

/* What it says of a lane's two rows, the warp's first one being `first`, as noted. */
struct row_pairs {
    key_span keys[2];
    int query[2];

    __device__ __forceinline__ void read(const key_span *keys_, const int *query_, int first) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            int i = first + usp_lane_row(0, r);
            keys[r] = keys_[i], query[r] = query_[i];
        }
    }

    /* Sets the scores of pairs that are not allowed to -inf. `last` where trees make intervals two-sided, or NULL. */
    template <int N> __device__ __forceinline__ void mask(usp_sums<1, N> &c, const int *key, const int *last) const {
#pragma unroll
        for (int n = 0; n < N; n++) {
            int2 two = *reinterpret_cast<const int2 *>(key + usp_lane_column(n));
#pragma unroll
            for (int r = 0; r < 2; r++) {
                float *pair = &c[0][n][r * 2];
                pair[0] = keys[r].has(two.x) ? pair[0] : -INFINITY;
                pair[1] = keys[r].has(two.y) ? pair[1] : -INFINITY;
            }
        }
        if (last) mask_behind(c, last);
    }

    template <int N> __device__ __forceinline__ void mask_behind(usp_sums<1, N> &c, const int *last) const {
#pragma unroll
        for (int n = 0; n < N; n++) {
            int2 two = *reinterpret_cast<const int2 *>(last + usp_lane_column(n));
#pragma unroll
            for (int r = 0; r < 2; r++) {
                float *pair = &c[0][n][r * 2];
                pair[0] = query[r] > two.x ? -INFINITY : pair[0];
                pair[1] = query[r] > two.y ? -INFINITY : pair[1];
            }
        }
    }
};

/* ---- launch ------------------------------------------------------------------------------------------------------ */

/* Starts blocks that stay and ask for jobs, as many as the GPU has multiprocessors, be there a job for each or not. */
template <typename... Parameters, typename... More>
static usp_status launch_staying(const char *what, void (*kernel)(Parameters...), const usp_gpu *gpu,
                                 const usp_softmax &args, int threads, size_t shared, usp_stream stream,
                                 const More &...more) {
    USP_TRY(usp_cuda_clear(static_cast<int *>(args.scratch), USP_WGMMA_SCRATCH / sizeof(int), stream));
    return usp_cuda_launch(what, kernel, dim3((unsigned)gpu->processors), dim3(threads), shared, stream, args, more...);
}

/* ---- the launchers of the family --------------------------------------------------------------------------------- */

extern "C" {
usp_status usp_softmax_wgmma_forward(const usp_gpu *gpu, const usp_softmax *args, usp_stream stream);
usp_status usp_softmax_wgmma_backward(const usp_gpu *gpu, const usp_softmax *args, usp_stream stream);
/* Called by that above for the widest heads, between the passes over the sums of dq. */
usp_status usp_softmax_wgmma_wide_backward(const usp_gpu *gpu, const usp_softmax *args, usp_stream stream);
}

/* ---- maps -------------------------------------------------------------------------------------------------------- */

/* The copy engine takes strides above 0 and below 2^40 bytes, of what there is more than one of. */
static inline bool is_stride(int64_t stride, int64_t extent) {
    return extent <= 1 || (stride > 0 && stride < (int64_t)1 << 38);
}

static inline bool is_copied(const usp_softmax &args, bool of_keys, const usp_tensor &x, size_t element = 2) {
    return usp_rows_aligned(x, element) && is_stride(x.stride_token, of_keys ? args.keys : args.queries) &&
           is_stride(x.stride_head, of_keys ? args.key_heads : args.heads) && is_stride(x.stride_batch, args.batch);
}

/* Boxes of `rows` tokens and 128 bytes of a tensor of the keys, or the queries, whose rows begin on 16-byte boundaries.
 * One without tokens is in no tile, and has no map. */
static inline usp_status make_map(const usp_gpu *gpu, const usp_softmax &args, usp_dtype dtype, bool of_keys,
                                  const usp_tensor &x, int dim, int rows, tile_map *map) {
    const CUtensorMapDataType types[] = {CU_TENSOR_MAP_DATA_TYPE_FLOAT32, CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                                         CU_TENSOR_MAP_DATA_TYPE_BFLOAT16}; /* by usp_dtype */
    int64_t tokens = of_keys ? args.keys : args.queries, bytes = dtype == USP_F32 ? 4 : 2;
    int heads = of_keys ? args.key_heads : args.heads, batch = args.batch;
    if (tokens == 0) return USP_OK;
    const cuuint64_t extent[4] = {(cuuint64_t)dim, (cuuint64_t)tokens, (cuuint64_t)heads, (cuuint64_t)batch};
    const int64_t unused = 16; /* of an extent of 1, whose stride may be anything */
    const cuuint64_t stride[3] = {(cuuint64_t)(tokens > 1 ? x.stride_token * bytes : unused),
                                  (cuuint64_t)(heads > 1 ? x.stride_head * bytes : unused),
                                  (cuuint64_t)(batch > 1 ? x.stride_batch * bytes : unused)};
    const cuuint32_t box[4] = {(cuuint32_t)(128 / bytes), (cuuint32_t)rows, 1, 1}, step[4] = {1, 1, 1, 1};
    auto encode = (decltype(&cuTensorMapEncodeTiled))gpu->encode_map;
    CUresult result =
        encode(map, types[dtype], 4, x.data, extent, stride, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
               CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result == CUDA_SUCCESS) return USP_OK;
    return usp_fail(USP_DEVICE, "a tensor could not be described to the copy engine: error %d", (int)result);
}

#endif
