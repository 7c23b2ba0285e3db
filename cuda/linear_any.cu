/* linear_any.cu - linear attention for any element type, dim, stride and alignment, in plain fp32.
 * It is for what the tensor core kernels do not take, and made to be right before it is fast. For sm_80 and up. */
#include "linear.cuh"

/* 16 x 16 threads: thread (y, x) owns rows y, y + 16, ... and columns x, x + 16, ... of a tile. */
static constexpr int side = 16, threads_per_block = side * side;
static constexpr int depth = 32;      /* rows or dims in shared memory at a time */
static constexpr int state_tile = 32; /* a thread block makes state_tile x state_tile elements of a state */
static constexpr int value_tile = 64; /* ... or value_tile columns of the output */

/* A tile of `ROWS` rows of `depth` dims in fp32, padded against bank conflicts. */
template <int ROWS> struct tile { float at[ROWS][depth + 1]; };

/* Rows first .. first + ROWS in time, dims from `column` on; zero outside the block and the row. */
template <typename T, int ROWS>
static __device__ void load_tile(tile<ROWS> &to, const usp_tensor &x, const usp_time &time, int first, int column,
                                 int dim, int batch, int head) {
    for (int i = threadIdx.x; i < ROWS * depth; i += threads_per_block) {
        int row = i / depth, c = i % depth, t = first + row;
        bool live = t < time.count && column + c < dim;
        to.at[row][c] = live ? usp_to_float(usp_row<T>(x, time.first + t * time.step, batch, head)[column + c]) : 0.0f;
    }
}

/* ---- totals ------------------------------------------------------------------------------------------------------ */

/* sum[i][j] += weighted k[., d] v[., e] over the `depth` rows of the tiles, for this thread's d and e. */
static __device__ void add_products(float (&sum)[2][2], const tile<depth> &k, const tile<depth> &v, int y, int x) {
#pragma unroll
    for (int row = 0; row < depth; row++) {
        for (int i = 0; i < 4; i++) sum[i / 2][i % 2] += k.at[row][y + i / 2 * side] * v.at[row][x + i % 2 * side];
    }
}

/* Grid: (places, state tiles). */
template <typename T> static __global__ void __launch_bounds__(threads_per_block) totals(usp_linear linear) {
    begin_kernel();
    __shared__ tile<depth> k, v;
    usp_place place = usp_find_place(linear);
    usp_time time = usp_leaving_time(linear, usp_block_time(linear, linear.block[place.block]));
    float log2_decay = usp_log2_decay(linear.log_decay, place.head), sum[2][2] = {};
    int across = (linear.value_dim + state_tile - 1) / state_tile;
    int d = blockIdx.y / across * state_tile, e = blockIdx.y % across * state_tile;
    int k_head = usp_mapped_head(linear.k_map, place.head), v_head = usp_mapped_head(linear.v_map, place.head);
    int y = threadIdx.x / side, x = threadIdx.x % side;
    for (int first = 0; first < time.count; first += depth) {
        load_tile<T>(k, linear.k, time, first, d, linear.dim, place.batch, k_head);
        load_tile<T>(v, linear.v, time, first, e, linear.value_dim, place.batch, v_head);
        __syncthreads();
        for (int i = threadIdx.x; i < depth * depth; i += threads_per_block) {
            int after = time.count - 1 - (first + i / depth);
            if (after >= 0) k.at[i / depth][i % depth] *= usp_decay(log2_decay, after + linear.shift);
        }
        __syncthreads();
        add_products(sum, k, v, y, x);
        __syncthreads();
    }
    float *state = usp_state(linear, place.block, place);
    for (int i = 0; i < 4; i++) {
        int row = d + y + i / 2 * side, column = e + x + i % 2 * side;
        if (row < linear.dim && column < linear.value_dim) {
            state[usp_state_index(linear, row, column)] = sum[i / 2][i % 2];
        }
    }
}

/* ---- output and apply -------------------------------------------------------------------------------------------- */

static constexpr int value_columns = value_tile / side; /* of one thread */

/* What one thread block works on: `side` rows of the block from `row`, value_tile columns from `column`. */
struct output_work {
    usp_place place;
    usp_time time;
    int q_head, k_head, v_head, row, column;
    float log2_decay;
};

/* sum = q^T state for this thread's row and columns. */
template <typename T>
static __device__ void multiply_state(float (&sum)[value_columns], tile<side> &q, const usp_linear &linear,
                                      const output_work &work, const float *state) {
    int y = threadIdx.x / side, x = threadIdx.x % side;
    for (int d = 0; d < linear.dim; d += depth) {
        load_tile<T>(q, linear.q, work.time, work.row, d, linear.dim, work.place.batch, work.q_head);
        __syncthreads();
        for (int c = 0; c < value_columns; c++) {
            int e = work.column + x + c * side;
            for (int i = 0; i < depth && d + i < linear.dim && e < linear.value_dim; i++)
                sum[c] += q.at[y][i] * state[usp_state_index(linear, d + i, e)];
        }
        __syncthreads();
    }
}

/* q . k of this thread's pair of rows: row y of the queries at work.row, row x of the keys at `key`. */
template <typename T>
static __device__ float multiply_pair(tile<side> &q, tile<side> &k, const usp_linear &linear, const output_work &work,
                                      int key) {
    int y = threadIdx.x / side, x = threadIdx.x % side;
    float sum = 0;
    for (int d = 0; d < linear.dim; d += depth) {
        load_tile<T>(q, linear.q, work.time, work.row, d, linear.dim, work.place.batch, work.q_head);
        load_tile<T>(k, linear.k, work.time, key, d, linear.dim, work.place.batch, work.k_head);
        __syncthreads();
        for (int i = 0; i < depth; i++) sum += q.at[y][i] * k.at[x][i];
        __syncthreads();
    }
    return sum;
}

/* Of row t: the first row in the block of its document. */
static __device__ int first_partner(const usp_linear &linear, const usp_time &time, int t) {
    return linear.begins && t < time.count ? max(usp_document_begin(linear, time, t), 0) : 0;
}

/* sum += decayed (q . k) v over the rows of the block and of the document that are not after this thread's row in time;
 * others are not even multiplied, since 0 times a NaN would be a NaN. */
template <typename T>
static __device__ void add_pairs(float (&sum)[value_columns], tile<side> &q, tile<side> &k, const usp_linear &linear,
                                 const output_work &work) {
    __shared__ float pair[side][side + 1];
    int y = threadIdx.x / side, x = threadIdx.x % side;
    int begin = first_partner(linear, work.time, work.row + y);
    for (int key = first_partner(linear, work.time, work.row) / side * side; key <= work.row; key += side) {
        int distance = work.row + y - (key + x);
        pair[y][x] = multiply_pair<T>(q, k, linear, work, key) * usp_decay(work.log2_decay, max(distance, 0));
        __syncthreads();
        int end = min(min(distance + x + 1, work.time.count - key), side);
        for (int j = max(begin - key, 0); j < end; j++) {
            int64_t token = work.time.first + (key + j) * work.time.step;
            const T *v = usp_row<T>(linear.v, token, work.place.batch, work.v_head);
            for (int c = 0; c < value_columns; c++) {
                int e = work.column + x + c * side;
                if (e < linear.value_dim) sum[c] += pair[y][j] * usp_to_float(v[e]);
            }
        }
        __syncthreads();
    }
}

template <typename T>
static __device__ void put_row(const float (&sum)[value_columns], const usp_linear &linear, const output_work &work) {
    int t = work.row + threadIdx.x / side;
    if (t >= work.time.count) return;
    int64_t token = work.time.first + t * work.time.step;
    float *acc = usp_sums_row(linear, token, work.place);
    T *out = usp_row<T>(linear.out, token, work.place.batch, work.place.head);
    for (int c = 0; c < value_columns; c++) {
        int e = work.column + threadIdx.x % side + c * side;
        if (e >= linear.value_dim) break;
        float value = linear.scale * sum[c] + (linear.first ? 0.0f : acc[e]);
        if (linear.last)
            out[e] = usp_from_float<T>(value);
        else
            acc[e] = value;
    }
}

/* Grid: (places, value tiles). PAIRS: the products inside the block and the state before it; else the chunk's state. */
template <typename T, bool PAIRS>
static __global__ void __launch_bounds__(threads_per_block) output(usp_linear linear) {
    begin_kernel();
    __shared__ tile<side> q, k;
    output_work work;
    work.place = usp_find_place(linear);
    const usp_block &block = linear.block[work.place.block];
    work.time = usp_block_time(linear, block);
    work.q_head = usp_mapped_head(linear.q_map, work.place.head);
    work.k_head = usp_mapped_head(linear.k_map, work.place.head);
    work.v_head = usp_mapped_head(linear.v_map, work.place.head);
    work.column = blockIdx.y * value_tile;
    work.log2_decay = linear.causal ? usp_log2_decay(linear.log_decay, work.place.head) : 0.0f;
    const float *state = usp_state(linear, PAIRS ? work.place.block : block.chunk, work.place);
    int before = PAIRS ? 0 : usp_chunk_rows_before(linear, block);
    int entered = usp_entered_rows(linear, work.time, before);
    for (work.row = 0; work.row < work.time.count; work.row += side) {
        float sum[value_columns] = {};
        multiply_state<T>(sum, q, linear, work, state);
        int t = work.row + threadIdx.x / side;
        float decay = usp_decay(work.log2_decay, linear.shift + before + t);
        for (int c = 0; c < value_columns; c++) sum[c] = t < entered ? sum[c] * decay : 0;
        if (PAIRS) add_pairs<T>(sum, q, k, linear, work);
        put_row<T>(sum, linear, work);
    }
}

/* ---- launchers --------------------------------------------------------------------------------------------------- */

static unsigned parts(int size, int tile) {
    return static_cast<unsigned>((size + tile - 1) / tile);
}

static usp_status launch_totals(const usp_gpu *, const usp_linear *linear, usp_stream stream) {
    auto kernel = usp_of_dtype(linear->dtype, totals<float>, totals<__half>, totals<__nv_bfloat16>);
    dim3 grid = usp_place_grid(linear, parts(linear->dim, state_tile) * parts(linear->value_dim, state_tile));
    return usp_cuda_launch("linear_totals", kernel, grid, dim3(threads_per_block), 0, stream, *linear);
}

static usp_status launch_output(const usp_gpu *, const usp_linear *linear, usp_stream stream) {
    auto kernel = usp_of_dtype(linear->dtype, output<float, true>, output<__half, true>, output<__nv_bfloat16, true>);
    dim3 grid = usp_place_grid(linear, parts(linear->value_dim, value_tile));
    return usp_cuda_launch("linear_output", kernel, grid, dim3(threads_per_block), 0, stream, *linear);
}

static usp_status launch_apply(const usp_gpu *, const usp_linear *linear, usp_stream stream) {
    auto kernel =
        usp_of_dtype(linear->dtype, output<float, false>, output<__half, false>, output<__nv_bfloat16, false>);
    dim3 grid = usp_place_grid(linear, parts(linear->value_dim, value_tile));
    return usp_cuda_launch("linear_apply", kernel, grid, dim3(threads_per_block), 0, stream, *linear);
}

/* ---- the family -------------------------------------------------------------------------------------------------- */

static size_t most_shared(int, int) {
    return 0;
}

static int fits(const usp_gpu *, const usp_linear *, usp_linear_call) {
    return 1;
}

extern "C" const usp_linear_family usp_linear_any = {
    USP_SM_80, most_shared, fits, {launch_totals, launch_output, launch_apply}};
