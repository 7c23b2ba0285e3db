/* softmax_forward.cu - forward softmax attention on tensor cores (mma.sync, sm_80 and up), 16-bit elements, dims up to 128.
 * One block folds all keys of one work item into the running sums of its queries; it never meets another block. */
#include "softmax_mma.cuh"

template <typename T, int DIM> struct usp_forward_memory {
    static constexpr int q = 0, k = usp_forward_shape::rows * DIM * 2, step = usp_forward_shape::step * DIM * 2;
    static constexpr int v = k + 2 * step, bytes = v + 2 * step;
};

template <typename T, int DIM>
static __global__ void __launch_bounds__(usp_forward_shape::threads, usp_forward_shape::resident)
    usp_softmax_forward_kernel(const __grid_constant__ usp_softmax args)
{
    using shape = usp_forward_shape;
    constexpr int M = shape::blocks, N = shape::step / 8, W = DIM / 8, threads = shape::threads;
    using memory = usp_forward_memory<T, DIM>;
    uint32_t base = usp_shared_base();
    usp_shared_rows<DIM> q = {base + memory::q}, k = {base + memory::k}, v = {base + memory::v};

    usp_job job = usp_take_job(args.tiles, args.heads, 1, true);
    usp_work work = *job.work;
    int key_head = usp_mapped_head(args.kv, job.head);
    int warp_row = threadIdx.x / 32 * M * 16, first_row = work.begin + warp_row, rows = work.count - warp_row;
    const T *keys = usp_row<T>(args.k, 0, job.batch, key_head), *values = usp_row<T>(args.v, 0, job.batch, key_head);
    auto fetch = [&](const usp_walk &at, int buffer) {
        int64_t column = at.column;
        usp_fetch<shape::step, threads>(k.rows_from(buffer * shape::step), keys + column * args.k.stride_token,
                                       args.k.stride_token, at.columns(), args.dim);
        usp_fetch<shape::step, threads>(v.rows_from(buffer * shape::step), values + column * args.v.stride_token,
                                       args.v.stride_token, at.columns(), args.value_dim);
    };

    usp_fetch<shape::rows, threads>(q, usp_row<T>(args.q, work.begin, job.batch, job.head), args.q.stride_token, work.count,
                                     args.dim);
    usp_walk walk(args.tiles.tile, work, 1);
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
        walk.advance(shape::step);
        if (walk.running()) fetch(walk, buffer ^ 1);
        usp_sums<M, N> scores = {};
        usp_multiply_rows<T>(scores, q.rows_from(warp_row), k.rows_from(buffer * shape::step));
        if (!at.full(shape::step))
            usp_mask_pairs<false>(scores, usp_band(*job.work, *at.tile), first_row, at.column, -INFINITY);
        online.weigh(scores, out, scale2);
        usp_multiply_columns<T>(out, scores, v.rows_from(buffer * shape::step));
    }
    usp_fetched();

#pragma unroll
    for (int i = 0; i < M * 2; i++) {
        int row = usp_lane_row(i / 2, i % 2);
        float value = online.finish(i, out, args.scale);
        if (row < rows && (threadIdx.x & 3) == 0) lse[row] = value;
    }
    if (args.last)
        usp_store(out, usp_row<T>(args.out, first_row, job.batch, job.head), args.out.stride_token, rows, args.value_dim);
    else
        usp_store(out, acc, acc_stride, rows, args.value_dim);
}

struct usp_forward_launch {
    template <typename T, int DIM> static usp_status with(const usp_softmax &args, usp_stream stream)
    {
        return usp_launch_jobs("softmax forward", usp_softmax_forward_kernel<T, DIM>, args, args.heads, 1,
                               usp_forward_shape::threads, usp_forward_memory<T, DIM>::bytes, stream);
    }
};

extern "C" usp_status usp_softmax_mma_forward(const usp_softmax *args, usp_stream stream)
{
    return usp_with_instance<usp_forward_launch>(*args, stream);
}
