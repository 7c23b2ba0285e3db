/* tiles.cuh - verbs on tiles of 2-byte elements in shared memory (fetch, multiply) and on fp32 accumulators in
 * registers. It knows no kind of attention; the sizes of tiles that kernels choose stand in one place at the end. */
#ifndef USP_CUDA_TILES_CUH
#define USP_CUDA_TILES_CUH
#include <type_traits>

#include "machine.cuh"

/* ---- shared memory ----------------------------------------------------------------------------------------------- */

/* Rows of DIM elements in shared memory. The 16-byte chunk c of row r lies at place c ^ (r & 7), so that the eight rows
 * of one chunk, which ldmatrix reads together, never share a bank. A tile begins at a multiple of 256 bytes. */
template <int DIM> struct usp_shared_rows {
    static constexpr int bytes = DIM * 2;
    uint32_t base;

    __device__ __forceinline__ usp_shared_rows rows_from(int row) const {
        return {base + row * bytes};
    }
};

/* 16 x 16 elements as ldmatrix deals them to a warp: quarters (rows 0-7, columns 0-7), (8-15, 0-7), (0-7, 8-15),
 * (8-15, 8-15). */
struct usp_fragment {
    uint32_t part[4];
};

/* The address this lane gives to ldmatrix for the first 16 x 16 block; usp_block_at moves it to another block. */
template <int DIM> static __device__ __forceinline__ uint32_t usp_lane_address(usp_shared_rows<DIM> rows) {
    int lane = threadIdx.x & 31;
    return rows.base + (lane & 15) * rows.bytes + (((lane >> 4) ^ (lane & 7)) << 4);
}

/* The same for the right operand of a product with rows: the two middle quarters change places, so that each half of
 * the fragment is one register pair, as mma wants it. */
template <int DIM> static __device__ __forceinline__ uint32_t usp_lane_address_right(usp_shared_rows<DIM> rows) {
    int lane = threadIdx.x & 31;
    return rows.base + ((lane & 7) + (lane >> 4) * 8) * rows.bytes + (((lane >> 3 & 1) ^ (lane & 7)) << 4);
}

/* A column block is two chunks, so moving by blocks is a plain xor of the address; row blocks keep r & 7. */
template <int DIM>
static __device__ __forceinline__ uint32_t usp_block_at(uint32_t lane_address, int row16, int column16) {
    return (lane_address ^ (column16 << 5)) + row16 * 16 * DIM * 2;
}

static __device__ __forceinline__ usp_fragment usp_load_block(uint32_t address) {
    usp_fragment f;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(f.part[0]), "=r"(f.part[1]), "=r"(f.part[2]), "=r"(f.part[3])
                 : "r"(address)
                 : "memory");
    return f;
}

static __device__ __forceinline__ usp_fragment usp_load_block_transposed(uint32_t address) {
    usp_fragment f;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(f.part[0]), "=r"(f.part[1]), "=r"(f.part[2]), "=r"(f.part[3])
                 : "r"(address)
                 : "memory");
    return f;
}

/* Starts copying ROWS rows; rows from `rows` on and elements from `dim` on become zero (a copy of 0 bytes reads
 * nothing). `from` is the first row. */
template <int ROWS, int THREADS, int DIM, typename T>
static __device__ __forceinline__ void usp_fetch(usp_shared_rows<DIM> to, const T *from, int64_t stride, int rows,
                                                 int dim) {
    constexpr int chunks = DIM / 8, pass = THREADS / chunks;
    static_assert(ROWS % pass == 0 && pass % 8 == 0, "a thread keeps its chunk and its row & 7");
    int chunk = threadIdx.x % chunks, first = threadIdx.x / chunks;
    uint32_t address = to.base + first * to.bytes + ((chunk ^ (first & 7)) << 4);
    const T *source = from + first * stride + chunk * 8;
    int live = chunk * 8 < dim ? rows - first : 0;
#pragma unroll
    for (int row = 0; row < ROWS; row += pass) {
        asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(address + row * to.bytes),
                     "l"(source), "r"(row < live ? 16 : 0)
                     : "memory");
        source += pass * stride;
    }
}

/* Starts copying one word, or writes `otherwise` where it does not exist. */
static __device__ __forceinline__ void usp_fetch_word(int32_t *to, const int32_t *from, bool exists,
                                                      int32_t otherwise) {
    if (exists) {
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(to)), "l"(from) : "memory");
    } else {
        *to = otherwise;
    }
}

/* Waits for everything this thread has fetched; a barrier must follow. */
static __device__ __forceinline__ void usp_fetched() {
    asm volatile("cp.async.wait_all;" ::: "memory");
}

/* ---- products ---------------------------------------------------------------------------------------------------- */

/* c (16 x 8, fp32) += a (16 x 16) b (16 x 8). */
template <typename T>
static __device__ __forceinline__ void usp_mma(float (&c)[4], const usp_fragment &a, uint32_t b0, uint32_t b1);

template <>
__device__ __forceinline__ void usp_mma<__nv_bfloat16>(float (&c)[4], const usp_fragment &a, uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a.part[0]), "r"(a.part[1]), "r"(a.part[2]), "r"(a.part[3]), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void usp_mma<__half>(float (&c)[4], const usp_fragment &a, uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a.part[0]), "r"(a.part[1]), "r"(a.part[2]), "r"(a.part[3]), "r"(b0), "r"(b1));
}

/* A warp's accumulator of M * 16 rows and N * 8 columns: this lane holds, of row block m and column block n, elements
 * (row g, columns t, t + 1), (row g + 8, columns t, t + 1) with g = lane / 4 and t = 2 (lane % 4). */
template <int M, int N> using usp_sums = float[M][N][4];

/* c[M * 16 rows][N * 8] += a b^T: both operands have DIM columns, b has N * 8 rows. */
template <typename T, int DIM, int M, int N>
static __device__ __forceinline__ void usp_multiply_rows(usp_sums<M, N> &c, usp_shared_rows<DIM> a,
                                                         usp_shared_rows<DIM> b) {
    uint32_t a_lane = usp_lane_address(a), b_lane = usp_lane_address_right(b);
#pragma unroll
    for (int k = 0; k < DIM / 16; k++) {
        usp_fragment left[M];
#pragma unroll
        for (int m = 0; m < M; m++) left[m] = usp_load_block(usp_block_at<DIM>(a_lane, m, k));
#pragma unroll
        for (int n = 0; n < N / 2; n++) {
            usp_fragment right = usp_load_block(usp_block_at<DIM>(b_lane, n, k));
#pragma unroll
            for (int m = 0; m < M; m++) {
                usp_mma<T>(c[m][2 * n], left[m], right.part[0], right.part[1]);
                usp_mma<T>(c[m][2 * n + 1], left[m], right.part[2], right.part[3]);
            }
        }
    }
}

/* c[M * 16 rows][DIM] += p b: p is an accumulator of K * 8 columns, rounded to T here, and b has K * 8 rows. */
template <typename T, int DIM, int M, int K>
static __device__ __forceinline__ void usp_multiply_columns(usp_sums<M, DIM / 8> &c, const usp_sums<M, K> &p,
                                                            usp_shared_rows<DIM> b) {
    uint32_t b_lane = usp_lane_address(b);
#pragma unroll
    for (int k = 0; k < K / 2; k++) {
        usp_fragment left[M];
#pragma unroll
        for (int m = 0; m < M; m++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float *pair = &p[m][2 * k + i / 2][i % 2 * 2];
                left[m].part[i] = usp_pack<T>(pair[0], pair[1]);
            }
        }
#pragma unroll
        for (int n = 0; n < DIM / 16; n++) {
            usp_fragment right = usp_load_block_transposed(usp_block_at<DIM>(b_lane, k, n));
#pragma unroll
            for (int m = 0; m < M; m++) {
                usp_mma<T>(c[m][2 * n], left[m], right.part[0], right.part[1]);
                usp_mma<T>(c[m][2 * n + 1], left[m], right.part[2], right.part[3]);
            }
        }
    }
}

/* ---- accumulators ------------------------------------------------------------------------------------------------ */

/* Row, inside the warp's rows, of this lane's elements 2 * half and 2 * half + 1 of row block m. */
static __device__ __forceinline__ int usp_lane_row(int m, int half) {
    return m * 16 + half * 8 + (threadIdx.x & 31) / 4;
}

/* Column of this lane's first element of column block n; the second is the next. */
static __device__ __forceinline__ int usp_lane_column(int n) {
    return n * 8 + 2 * (threadIdx.x & 3);
}

/* c = c * factor + from, for `rows` rows of `dim` elements; from NULL: c = c * factor. */
template <int M, int N>
static __device__ __forceinline__ void usp_scale_add(usp_sums<M, N> &c, float factor, const float *from, int64_t stride,
                                                     int rows, int dim) {
#pragma unroll
    for (int i = 0; i < M * 2; i++) {
        int row = usp_lane_row(i / 2, i % 2);
#pragma unroll
        for (int n = 0; n < N; n++) {
            float *pair = &c[i / 2][n][i % 2 * 2];
            float2 old = {0, 0};
            if (from && row < rows && usp_lane_column(n) < dim)
                old = *reinterpret_cast<const float2 *>(from + row * stride + usp_lane_column(n));
            pair[0] = pair[0] * factor + old.x;
            pair[1] = pair[1] * factor + old.y;
        }
    }
}

static __device__ __forceinline__ void usp_put_pair(float *to, const float *pair) {
    *reinterpret_cast<float2 *>(to) = make_float2(pair[0], pair[1]);
}

template <typename T> static __device__ __forceinline__ void usp_put_pair(T *to, const float *pair) {
    *reinterpret_cast<uint32_t *>(to) = usp_pack<T>(pair[0], pair[1]);
}

/* Writes `rows` rows of `dim` elements, converted to T. */
template <typename T, int M, int N>
static __device__ __forceinline__ void usp_store(const usp_sums<M, N> &c, T *to, int64_t stride, int rows, int dim) {
#pragma unroll
    for (int i = 0; i < M * 2; i++) {
        int row = usp_lane_row(i / 2, i % 2);
#pragma unroll
        for (int n = 0; n < N; n++) {
            if (row < rows && usp_lane_column(n) < dim)
                usp_put_pair(to + row * stride + usp_lane_column(n), &c[i / 2][n][i % 2 * 2]);
        }
    }
}

/* ---- numbers that are not finite --------------------------------------------------------------------------------- */

/* A pair that must not count has weight 0, but 0 times a NaN or an infinity is a NaN: such numbers are kept out of
 * products with these weights, and reach the results that depend on them by another way. */

/* Is there a NaN or an infinity in this thread's share of a tile of ROWS rows? */
template <typename T, int ROWS, int THREADS, int DIM>
static __device__ __forceinline__ bool usp_spoilt(usp_shared_rows<DIM> tile) {
    uint32_t taint = 0;
#pragma unroll 4
    for (int at = threadIdx.x * 16; at < ROWS * tile.bytes; at += THREADS * 16) {
        uint4 eight = load_shared(tile.base + at);
        taint = usp_taint<T>(usp_taint<T>(taint, eight.x), eight.y);
        taint = usp_taint<T>(usp_taint<T>(taint, eight.z), eight.w);
    }
    return taint != 0;
}

/* Makes it 0 in the two elements at an address. */
template <typename T> static __device__ __forceinline__ void usp_clear_pair(uint32_t address) {
    float2 x = usp_unpack<T>(load_shared_word(address));
    store_shared(address, usp_pack<T>(isfinite(x.x) ? x.x : 0, isfinite(x.y) ? x.y : 0));
}

/* ---- sizes ------------------------------------------------------------------------------------------------------- */

/* One block of threads has WARPS warps of BLOCKS row blocks of 16, takes STEP columns at a time, and shares its
 * multiprocessor with RESIDENT - 1 others like it. */
template <int WARPS, int BLOCKS, int STEP, int RESIDENT> struct usp_tile_shape {
    static constexpr int warps = WARPS, blocks = BLOCKS, step = STEP, resident = RESIDENT;
    static constexpr int threads = WARPS * 32, rows = WARPS * BLOCKS * 16;
};

/* Shared memory that a block may have on every GPU from sm_80 on. */
constexpr int USP_LEAST_SHARED = 99 * 1024;

/* The shape for dim 128 or that for dim 64: the largest whose sums fit 255 registers a thread, with two blocks
 * resident. Two row blocks a warp use every fragment of the column side twice, which halves the reads of shared memory,
 * the bound of mma.sync on Hopper; a longer step has fewer barriers and less to do beside the products. */
template <int DIM, typename Shape128, typename Shape64>
using usp_shape_of_dim = std::conditional_t<DIM == 128, Shape128, Shape64>;

/* Forward: out and scores are 128 + 64 sums a lane at dim 128, 64 + 128 at dim 64. */
template <int DIM>
using usp_forward_shape = usp_shape_of_dim<DIM, usp_tile_shape<4, 2, 64, 2>, usp_tile_shape<4, 2, 128, 2>>;

/* dq: dq, S and dP are 128 + 32 + 32 at dim 128, 64 + 64 + 64 at dim 64. */
template <int DIM>
using usp_backward_query_shape = usp_shape_of_dim<DIM, usp_tile_shape<4, 2, 32, 2>, usp_tile_shape<4, 2, 64, 2>>;

/* dk, dv: dk, dv, S and dP are 64 + 64 + 32 + 32 at dim 128, with one row block a warp, and at dim 64. */
template <int DIM>
using usp_backward_key_shape = usp_shape_of_dim<DIM, usp_tile_shape<4, 1, 64, 2>, usp_tile_shape<4, 2, 32, 2>>;

/* Where a grid of such blocks would leave multiprocessors idle, the same kernels run with half the rows a block. Rows
 * are summed in the same steps either way, so results do not depend on the choice. */
template <typename Shape>
using usp_half_shape = usp_tile_shape<Shape::warps, Shape::blocks / 2, Shape::step, Shape::resident>;

/* Extras take registers and memory: half the rows a block, or half the step where no fewer rows are left. */
template <typename Shape>
using usp_extras_shape =
    std::conditional_t<(Shape::blocks > 1), usp_half_shape<Shape>,
                       usp_tile_shape<Shape::warps, Shape::blocks, Shape::step / 2, Shape::resident>>;

#endif
