/* softmax_mma_forward.cu - forward softmax attention on tensor cores (mma.sync, sm_80 and up), 16-bit elements, dims up
 * to 128. A block folds all keys of one work item into the running sums of its queries; it never meets another one. */
#include "softmax_extras.cuh"

template <int DIM, typename Shape, bool EXTRAS> struct forward_memory {
    static constexpr int q = 0, k = Shape::rows * DIM * 2, step = Shape::step * DIM * 2;
    static constexpr int v = k + 2 * step, note = v + 2 * step;
    using pairs = shared_pairs<false, Shape, note + NOTE_BYTES>;
    static constexpr int words = pairs::end;
    static constexpr int bytes = words + (EXTRAS ? Shape::rows * 8 : 0);
};

template <typename T, int DIM, typename Shape, bool EXTRAS>
static __global__ void __launch_bounds__(Shape::threads, Shape::resident)
    softmax_forward_kernel(const __grid_constant__ usp_softmax args) {
    begin_kernel();
    constexpr int M = Shape::blocks, N = Shape::step / 8, W = DIM / 8, threads = Shape::threads;
    using memory = forward_memory<DIM, Shape, EXTRAS>;
    using pairs = typename memory::pairs;
    uint32_t base = shared_base();
    usp_shared_rows<DIM> q = {base + memory::q}, k = {base + memory::k}, v = {base + memory::v};

    softmax_job job = take_job<false>(args, Shape::rows);
    if (job.count <= 0) return;
    block_note &note = *shared_at<block_note>(memory::note);
    note = {job, 0};
    int key_head = usp_mapped_head(args.kv, job.head);
    int warp_row = threadIdx.x / 32 * M * 16, first_row = job.begin + warp_row, rows = job.count - warp_row;
    const T *keys = usp_row<T>(args.k, 0, job.batch, key_head), *values = usp_row<T>(args.v, 0, job.batch, key_head);
    auto fetch = [&](const tile_walk &at, int buffer) {
        int64_t column = at.column;
        usp_fetch<Shape::step, threads>(k.rows_from(buffer * Shape::step), keys + column * args.k.stride_token,
                                        args.k.stride_token, at.columns(), args.dim);
        usp_fetch<Shape::step, threads>(v.rows_from(buffer * Shape::step), values + column * args.v.stride_token,
                                        args.v.stride_token, at.columns(), args.value_dim);
    };

    usp_fetch<Shape::rows, threads>(q, usp_row<T>(args.q, job.begin, job.batch, job.head), args.q.stride_token,
                                    job.count, args.dim);
    tile_walk walk(args.by_query, *job.work, 1);
    if (walk.running()) fetch(walk, 0);
    bool full = walk.full(Shape::step);
    if (!full && walk.running()) pairs::fetch_columns(args.pairs, walk);
    pairs::fetch_rows(args.pairs, job);

    usp_sums<M, W> out = {};
    online_softmax<M> online;
    usp_tensor acc = acc_tensor(args);
    int64_t line = line_of(args, job.batch, job.head, first_row);
    if (!args.first)
        usp_scale_add(out, 1, usp_row<float>(acc, first_row, job.batch, job.head), acc.stride_token, rows,
                      args.value_dim);
#pragma unroll
    for (int i = 0; i < M * 2; i++) {
        int row = usp_lane_row(i / 2, i % 2);
        bool kept = !args.first && row < rows;
        online.begin(i, {kept ? args.top[line + row] : -INFINITY, kept ? args.sum[line + row] : 0});
    }

    scoring rule(args, job.head);
    lane_peaks<M> peaks;
    if (EXTRAS) load_words(shared_at<uint64_t>(memory::words), args, job);
    for (int buffer = 0; walk.running(); buffer ^= 1) {
        usp_fetched();
        __syncthreads();
        int column = walk.column, columns = walk.columns();
        usp_sums<M, N> scores = {};
        usp_multiply_rows<T>(scores, q.rows_from(warp_row), k.rows_from(buffer * Shape::step));
        walk.advance(Shape::step);
        if (walk.running()) fetch(walk, buffer ^ 1); /* here its addresses are computed in the shade of the products */
        lane_place at = {};
        if (EXTRAS) at = {note.job.begin + warp_row, note.job.count - warp_row, column, columns};
        if (EXTRAS)
            bend_scores(
                scores, rule,
                [&](int r) {
                    return bias_position(args, args.pairs.diagonal, at.row, usp_lane_row(r / 2, r % 2), at.rows);
                },
                [&](int i) { return bias_position(args, args.pairs.key, at.column, i, at.columns); });
        if (!full) {
            pairs::mask(scores, args.pairs, warp_row, -INFINITY);
            shield<T, Shape::step, threads>(v.rows_from(buffer * Shape::step), note.spoilt);
        }
        full = walk.full(Shape::step);
        if (!full && walk.running()) pairs::fetch_columns(args.pairs, walk);
        if (EXTRAS) peaks.look(scores);
        online.weigh(scores, out, rule.unit);
        if (EXTRAS)
            drop_weights(
                scores, args.dropout.rate,
                [&](int r) { return shared_at<uint64_t>(memory::words)[warp_row + usp_lane_row(r / 2, r % 2)]; },
                [&](int i) { return load_or(args.pairs.key, at.column, i, at.columns, 0); });
        usp_multiply_columns<T>(out, scores, v.rows_from(buffer * Shape::step));
    }
    usp_fetched();
    __syncthreads(); /* a job without columns has met none since its note */

    job = note.job;
    first_row = job.begin + warp_row, rows = job.count - warp_row;
    line = line_of(args, job.batch, job.head, first_row);
    if (EXTRAS && args.peak) peaks.store(args, line, rows, rule.unit);
    float sink = sink_of(args, job.head), kept = EXTRAS ? 1 / (1 - args.dropout.rate) : 1;
    int own = threadIdx.x & 3, own_row = usp_lane_row(own / 2, own % 2); /* one of four lanes writes a row's state */
    row_state own_state = {};
#pragma unroll
    for (int i = 0; i < M * 2; i++) {
        row_state state = online.kept(i);
        float factor = finish_row(state, sink, kept);
        multiply_row(i, out, args.last ? factor : 1);
        if (i == own) own_state = state;
    }
    if (own < M * 2 && own_row < rows) store_state(args, line + own_row, left_state(args, own_state));
    if (args.last)
        usp_store(out, usp_row<T>(args.out, first_row, job.batch, job.head), args.out.stride_token, rows,
                  args.value_dim);
    else
        usp_store(out, usp_row<float>(acc, first_row, job.batch, job.head), acc.stride_token, rows, args.value_dim);
    if (!note.spoilt) return;
    __syncthreads();
    mend<T, false>(args, note.job, Shape::step, false, threadIdx.x, args.last ? args.out : acc, !args.last, args.v,
                   args.value_dim);
}

/* ---- launcher ---------------------------------------------------------------------------------------------------- */

struct forward_launch {
    static constexpr const char *what = "softmax forward";
    static constexpr bool key_rows = false;
    template <int DIM> using shape = usp_forward_shape<DIM>;
    template <int DIM, typename Shape, bool EXTRAS> using memory = forward_memory<DIM, Shape, EXTRAS>;
    static bool extras(const usp_softmax &args) {
        return has_extras(args) || args.peak;
    }
    template <typename T, int DIM, typename Shape, bool EXTRAS> static auto kernel() {
        return softmax_forward_kernel<T, DIM, Shape, EXTRAS>;
    }
};

usp_status usp_softmax_mma_forward(const usp_gpu *gpu, const usp_softmax *args, usp_stream stream) {
    return start_any<forward_launch>(*gpu, *args, stream);
}
