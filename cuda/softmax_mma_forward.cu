/* softmax_mma_forward.cu - forward softmax attention on tensor cores (mma.sync, sm_80 and up), 16-bit elements, dims up
 * to 128. A block folds all keys of one work item into the running sums of its queries; it never meets another one. */
#include "softmax_mma.cuh"

template <int DIM, typename Shape> struct usp_forward_memory {
    static constexpr int q = 0, k = Shape::rows * DIM * 2, step = Shape::step * DIM * 2;
    static constexpr int v = k + 2 * step, spoilt = v + 2 * step, bytes = spoilt + Shape::threads * 4;
};

template <typename T, int DIM, typename Shape>
static __global__ void __launch_bounds__(Shape::threads, Shape::resident)
    usp_softmax_forward_kernel(const __grid_constant__ usp_softmax args) {
    constexpr int M = Shape::blocks, N = Shape::step / 8, W = DIM / 8, threads = Shape::threads;
    using memory = usp_forward_memory<DIM, Shape>;
    uint32_t base = usp_shared_base();
    usp_shared_rows<DIM> q = {base + memory::q}, k = {base + memory::k}, v = {base + memory::v};

    usp_job job = usp_take_job(args, args.heads, Shape::rows);
    if (job.count <= 0) return;
    usp_spare_word(memory::spoilt) = 0;
    int key_head = usp_mapped_head(args.kv, job.head);
    int warp_row = threadIdx.x / 32 * M * 16, first_row = job.begin + warp_row, rows = job.count - warp_row;
    const T *keys = usp_row<T>(args.k, 0, job.batch, key_head), *values = usp_row<T>(args.v, 0, job.batch, key_head);
    auto fetch = [&](const usp_walk &at, int buffer) {
        int64_t column = at.column;
        usp_fetch<Shape::step, threads>(k.rows_from(buffer * Shape::step), keys + column * args.k.stride_token,
                                        args.k.stride_token, at.columns(), args.dim);
        usp_fetch<Shape::step, threads>(v.rows_from(buffer * Shape::step), values + column * args.v.stride_token,
                                        args.v.stride_token, at.columns(), args.value_dim);
    };

    usp_fetch<Shape::rows, threads>(q, usp_row<T>(args.q, job.begin, job.batch, job.head), args.q.stride_token,
                                    job.count, args.dim);
    usp_walk walk(args.tiles, *job.work, 1);
    if (walk.running()) fetch(walk, 0);

    usp_sums<M, W> out = {};
    usp_online<M> online;
    int64_t acc_stride = (int64_t)args.batch * args.heads * args.value_dim;
    float *acc = args.acc + first_row * acc_stride + ((int64_t)job.batch * args.heads + job.head) * args.value_dim;
    float *lse = args.lse + ((int64_t)job.batch * args.heads + job.head) * args.queries + first_row;
    if (!args.first) {
        usp_scale_add(out, 1, acc, acc_stride, rows, args.value_dim);
#pragma unroll
        for (int i = 0; i < M * 2; i++) {
            int row = usp_lane_row(i / 2, i % 2);
            online.resume(i, out, row < rows ? lse[row] : -INFINITY, args.scale);
        }
    }

    float scale2 = args.scale * USP_LOG2E;
    for (int buffer = 0; walk.running(); buffer ^= 1) {
        usp_fetched();
        __syncthreads();
        usp_walk at = walk;
        usp_sums<M, N> scores = {};
        usp_multiply_rows<T>(scores, q.rows_from(warp_row), k.rows_from(buffer * Shape::step));
        walk.advance(Shape::step);
        if (walk.running()) fetch(walk, buffer ^ 1); /* here its addresses are computed in the shade of the products */
        if (!at.full(Shape::step)) {
            usp_mask_pairs<false>(scores, usp_band(*job.work, at.tile()), first_row, at.column, -INFINITY);
            usp_shield<T, Shape::step, threads>(v.rows_from(buffer * Shape::step), usp_spare_word(memory::spoilt));
        }
        online.weigh(scores, out, scale2);
        usp_multiply_columns<T>(out, scores, v.rows_from(buffer * Shape::step));
    }
    usp_fetched();

#pragma unroll
    for (int i = 0; i < M * 2; i++) {
        int row = usp_lane_row(i / 2, i % 2);
        float value = online.finish(i, out, args.scale);
        if (row < rows && (threadIdx.x & 3) == 0) lse[row] = value;
    }
    if (args.last)
        usp_store(out, usp_row<T>(args.out, first_row, job.batch, job.head), args.out.stride_token, rows,
                  args.value_dim);
    else
        usp_store(out, acc, acc_stride, rows, args.value_dim);
    if (usp_spare_word(memory::spoilt)) {
        usp_tensor sum = {args.acc, (int64_t)args.heads * args.value_dim, acc_stride, args.value_dim};
        usp_mend<T, false, Shape>(args, sum, args.out, args.v, args.value_dim);
    }
}

/* ---- launcher ---------------------------------------------------------------------------------------------------- */

struct usp_forward_launch {
    static constexpr const char *what = "softmax forward";
    template <int DIM> using shape = usp_forward_shape<DIM>;
    template <int DIM, typename Shape> using memory = usp_forward_memory<DIM, Shape>;
    static int heads(const usp_softmax &args) {
        return args.heads;
    }
    template <typename T, int DIM, typename Shape> static auto kernel() {
        return usp_softmax_forward_kernel<T, DIM, Shape>;
    }
};

usp_status usp_softmax_mma_forward(const usp_gpu *gpu, const usp_softmax *args, usp_stream stream) {
    return usp_start_any<usp_forward_launch>(*gpu, *args, stream);
}
