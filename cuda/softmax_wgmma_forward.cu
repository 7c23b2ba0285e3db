/* softmax_wgmma_forward.cu - forward softmax attention on Hopper (sm_90a), 16-bit elements. A block stays and takes job
 * after job of 128 queries: one warp copies tiles, two warpgroups of 64 queries each compute, so that while one finds
 * weights the other multiplies, and within each the products of one step run under the softmax of the next. */
#include "softmax_wgmma_forward.cuh"

/* ---- a computing warpgroup --------------------------------------------------------------------------------------- */

constexpr int MEET_TURN = 1, MEET_GROUP = 3; /* barriers: of each group's turn to multiply, of each group alone */

template <typename T, typename Shape> struct computing_group {
    static constexpr int N = Shape::step / 8, K = Shape::step / 16, W = Shape::value_dim / 8;
    using memory = forward_memory<Shape>;
    using notes_type = forward_notes<Shape>;
    const usp_softmax &args;
    const soft_cap &cap;
    notes_type &notes;
    int group, warp_row; /* this warp's first row of the job */
    turn<Shape::stages> k, v;
    int job_parity;

    usp_sums<1, W> out;
    left_operand<K> weights;
    online_softmax<1, 0> online;
    int jobs; /* so far */
    lane_peaks<1> peaks;
    float place[2]; /* with slopes: of this lane's rows, as those of keys are noted */
    uint64_t word[2];

    __device__ __forceinline__ computing_group(const usp_softmax &args_, const soft_cap &cap_, notes_type &notes_)
        : args(args_), cap(cap_), notes(notes_), group(uniform(threadIdx.x / 128) - 1),
          warp_row((threadIdx.x / 32 - 4) * 16), k{0, 0}, v{0, 0}, job_parity(0), jobs(0) {
        if (group == 1) pass(MEET_TURN, 256);
    }

    /* ---- rows */

    __device__ __forceinline__ void begin_rows(const softmax_job &job) {
        int rows = job.count - warp_row;
        int64_t line = line_of(args, job.batch, job.head, job.begin + warp_row);
        usp_tensor acc = acc_tensor(args);
#pragma unroll
        for (int n = 0; n < W; n++) out[0][n][0] = out[0][n][1] = out[0][n][2] = out[0][n][3] = 0;
        if (!args.first)
            usp_scale_add(out, 1, usp_row<float>(acc, job.begin + warp_row, job.batch, job.head), acc.stride_token,
                          rows, args.value_dim);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int row = usp_lane_row(0, i);
            bool kept = !args.first && row < rows;
            online.begin(i, {kept ? args.top[line + row] : -INFINITY, kept ? args.sum[line + row] : 0});
        }
        if constexpr (Shape::extras) begin_extras(job, rows);
    }

    __device__ __forceinline__ void begin_extras(const softmax_job &job, int rows) {
        peaks = {};
#pragma unroll
        for (int r = 0; r < 2; r++) {
            int row = usp_lane_row(0, r), query = job.begin + warp_row + row;
            place[r] = 0;
            if (Shape::slopes && args.slopes && row < rows)
                place[r] = (float)(args.pairs.diagonal[query] - args.pairs.diagonal[job.begin]);
            word[r] = 0;
            if (Shape::drops && args.dropout.rate > 0 && row < rows)
                word[r] = dropout_row(args, job.batch, job.head, query);
        }
    }

    __device__ __forceinline__ void end_rows(const softmax_job &job) {
        int rows = job.count - warp_row, first_row = job.begin + warp_row;
        int64_t line = line_of(args, job.batch, job.head, first_row);
        float sink = sink_of(args, job.head), kept = Shape::drops ? 1 / (1 - args.dropout.rate) : 1;
        if (Shape::more && args.peak) peaks.store(args, line, rows, cap.unit);
        int own = threadIdx.x & 3, own_row = usp_lane_row(0, own % 2); /* one of four lanes writes a row's state */
        row_state own_state = {};
#pragma unroll
        for (int i = 0; i < 2; i++) {
            row_state state = online.kept(i);
            float factor = finish_row(state, sink, kept);
            multiply_row(i, out, args.last ? factor : 1);
            if (i == own) own_state = state;
        }
        if (own < 2 && own_row < rows) store_state(args, line + own_row, own_state);
        if (args.last) {
            usp_store(out, usp_row<T>(args.out, first_row, job.batch, job.head), args.out.stride_token, rows,
                      args.value_dim);
        } else {
            usp_tensor acc = acc_tensor(args);
            usp_store(out, usp_row<float>(acc, first_row, job.batch, job.head), acc.stride_token, rows, args.value_dim);
        }
    }

    /* Brings what was taken out of values to the rows that depend on it. */
    __device__ __forceinline__ void mend_rows(softmax_job job) {
        if (notes.spoilt[jobs % 2] != jobs) return;
        meet(MEET_GROUP + group, 128); /* the rows are written */
        job.begin += group * 64;
        job.count = min(job.count - group * 64, 64);
        for (int element = threadIdx.x % 128; element < args.value_dim; element += 128)
            mend<T, false>(args, job, Shape::step, false, element, args.last ? args.out : acc_tensor(args), !args.last,
                           args.v, args.value_dim);
    }

    /* ---- one step */

    /* A warp is done with a stage. */
    static __device__ __forceinline__ void leave(arrivals *at) {
        __syncwarp();
        if (threadIdx.x % 32 == 0) arrive(at);
    }

    __device__ __forceinline__ void issue_scores(usp_sums<1, N> &scores) {
        issue_rows<T>(scores, memory::q_at(), group * 64, memory::k_at(k.stage));
        end_products();
    }

    __device__ __forceinline__ void issue_values() {
        issue_columns<T>(out, weights, memory::v_at(v.stage));
        end_products();
    }

    /* Takes what is not finite out of the values of a step that has pairs of weight 0, if the other group has not, and
     * leaves word for both. */
    __device__ __forceinline__ void clean_values() {
        constexpr int bytes = memory::v_tile::bytes;
        uint32_t tile = memory::v_at(v.stage).address;
        await(&notes.v_full[v.stage], v.parity);
        for (int at = threadIdx.x % 128 * 16; at < bytes; at += 128 * 16) {
            if (!is_spoilt<T>(tile + at)) continue;
            notes.spoilt[jobs % 2] = jobs;
            __threadfence_block();
            for (int i = 0; i < 16; i += 4) usp_clear_pair<T>(tile + at + i);
        }
        publish_stores();
        meet(MEET_GROUP + group, 128);
    }

    /* Scores of the step at k, of stage `stage` before it was left, to weights. MASKED is notes' word. */
    template <bool MASKED>
    __device__ __forceinline__ void mask_scores(usp_sums<1, N> &scores, const row_pairs &pairs, int stage) {
        if constexpr (MASKED) pairs.mask(scores, notes.key[stage], args.pairs.last ? notes.last[stage] : nullptr);
    }

    /* Takes dropped weights out. */
    __device__ __forceinline__ void drop(usp_sums<1, N> &weights) {
        uint32_t limit = notes.limit;
#pragma unroll
        for (int n = 0; n < N; n++) {
            uint2 draw = *reinterpret_cast<const uint2 *>(notes.draw[k.stage] + usp_lane_column(n));
#pragma unroll
            for (int r = 0; r < 2; r++) {
                float *pair = &weights[0][n][r * 2];
                pair[0] = usp_dropout_pair(word[r], draw.x) < limit ? 0 : pair[0];
                pair[1] = usp_dropout_pair(word[r], draw.y) < limit ? 0 : pair[1];
            }
        }
    }

    /* Subtracts slopes times distances. */
    __device__ __forceinline__ void add_biases(usp_sums<1, N> &scores, const scoring &rule) {
#pragma unroll
        for (int n = 0; n < N; n++) {
            float2 key = *reinterpret_cast<const float2 *>(notes.place[k.stage] + usp_lane_column(n));
#pragma unroll
            for (int r = 0; r < 2; r++) {
                float *pair = &scores[0][n][r * 2];
                pair[0] = rule.biased(pair[0], fabsf(place[r] - key.x));
                pair[1] = rule.biased(pair[1], fabsf(place[r] - key.y));
            }
        }
    }

    /* Scores of the step at k to weights; the stage is left. */
    template <bool MASKED>
    __device__ __forceinline__ void weigh(usp_sums<1, N> &scores, const row_pairs &pairs, const scoring &rule,
                                          float (&factor)[2]) {
        if constexpr (!Shape::extras) {
            mask_scores<MASKED>(scores, pairs, k.stage);
            leave(&notes.k_empty[k.stage]);
            online.weigh(scores, rule.unit, factor);
        } else {
            if constexpr (Shape::caps) cap_scores<4>(scores, rule);
            if constexpr (Shape::slopes) add_biases(scores, rule);
            mask_scores<MASKED>(scores, pairs, k.stage);
            if constexpr (Shape::more) peaks.look(scores);
            online.weigh(scores, rule.unit, factor);
            if constexpr (Shape::drops) drop(scores);
            leave(&notes.k_empty[k.stage]);
        }
    }

    /* While the values of the step before are multiplied. */
    template <bool MASKED> __device__ __forceinline__ void go_on(const row_pairs &pairs, const scoring &rule) {
        usp_sums<1, N> scores;
        float factor[2];
        meet(MEET_TURN + group, 256);
        begin_products();
        issue_scores(scores);
        await(&notes.v_full[v.stage], v.parity);
        begin_products();
        issue_values();
        pass(MEET_TURN + (group ^ 1), 256);
        await_products<1>();
        pin(list_of<N>(scores));
        weigh<MASKED>(scores, pairs, rule, factor);
        await_products<0>();
        pin(list_of<W>(out));
        leave(&notes.v_empty[v.stage]);
        k.advance();
        v.advance();
        scale_rows(out, factor);
        round_sums<T, K>(weights, scores);
        if constexpr (MASKED) clean_values();
    }

    template <bool MASKED> __device__ __forceinline__ void begin(const row_pairs &pairs, const scoring &rule) {
        usp_sums<1, N> scores;
        float factor[2];
        begin_products();
        issue_scores(scores);
        await_products<0>();
        pin(list_of<N>(scores));
        weigh<MASKED>(scores, pairs, rule, factor);
        k.advance();
        scale_rows(out, factor);
        round_sums<T, K>(weights, scores);
        if constexpr (MASKED) clean_values();
    }

    __device__ __forceinline__ void end_steps() {
        await(&notes.v_full[v.stage], v.parity);
        begin_products();
        issue_values();
        await_products<0>();
        pin(list_of<W>(out));
        leave(&notes.v_empty[v.stage]);
        v.advance();
    }

    __device__ __forceinline__ step_note next_step() {
        await(&notes.k_full[k.stage], k.parity);
        return notes.step[k.stage];
    }

    __device__ __forceinline__ void run_steps(const softmax_job &job) {
        row_pairs pairs(args.pairs, job.begin + warp_row, job.count - warp_row);
        scoring rule(args, job.head, cap);
        step_note step = next_step();
        if (step.masked)
            begin<true>(pairs, rule);
        else
            begin<false>(pairs, rule);
        while (!step.last) {
            step = next_step();
            if (step.masked)
                go_on<true>(pairs, rule);
            else
                go_on<false>(pairs, rule);
        }
        leave(&notes.job_empty); /* the queries have been read */
        end_steps();
    }

    __device__ __forceinline__ void run() {
        for (;;) {
            await(&notes.job_full, job_parity);
            job_parity ^= 1;
            jobs++;
            forward_job now = notes.job;
            if (now.job.count == 0) return;
            begin_rows(now.job);
            if (now.steps)
                run_steps(now.job);
            else
                leave(&notes.job_empty);
            end_rows(now.job);
            if (now.steps) mend_rows(now.job);
        }
    }
};

/* ---- kernel ------------------------------------------------------------------------------------------------------ */

template <typename T, typename Shape>
static __global__ void __launch_bounds__(Shape::threads, 1)
    softmax_wgmma_forward_kernel(const __grid_constant__ usp_softmax args, const __grid_constant__ forward_maps maps,
                                 const __grid_constant__ soft_cap cap) {
    auto &notes = *shared_at<forward_notes<Shape>>(forward_memory<Shape>::notes);
    if (threadIdx.x == 0) {
        constexpr int warps = 4 * Shape::groups;
        begin_arrivals(&notes.job_full, 1);
        begin_arrivals(&notes.job_empty, warps);
        for (int s = 0; s < Shape::stages; s++) {
            begin_arrivals(&notes.k_full[s], 1);
            begin_arrivals(&notes.v_full[s], 1);
            begin_arrivals(&notes.k_empty[s], warps);
            begin_arrivals(&notes.v_empty[s], warps);
        }
        publish_arrivals();
        for (int &spoilt : notes.spoilt) spoilt = 0;
        notes.limit = usp_dropout_limit(args.dropout.rate);
    }
    __syncthreads();
    if (threadIdx.x < 128) {
        give_registers<Shape::copying_registers>();
        if (threadIdx.x < 32) copying_warp<Shape>(args, maps, notes).run();
    } else {
        take_registers<Shape::computing_registers>();
        computing_group<T, Shape>(args, cap, notes).run();
    }
}

/* ---- launcher ---------------------------------------------------------------------------------------------------- */

template <typename T, typename shape>
static usp_status start_shape(const usp_gpu *gpu, const usp_softmax *args, usp_stream stream) {
    static_assert(forward_memory<shape>::bytes <= 227 * 1024, "tiles must fit a Hopper GPU");
    forward_maps maps;
    int64_t jobs = count_jobs(*args, false, shape::rows);
    if (jobs == 0) return USP_OK;
    USP_TRY(make_map(gpu, *args, args->dtype, false, args->q, args->dim, shape::rows, &maps.q));
    USP_TRY(make_map(gpu, *args, args->dtype, true, args->k, args->dim, shape::step, &maps.k));
    USP_TRY(make_map(gpu, *args, args->dtype, true, args->v, args->value_dim, shape::step, &maps.v));
    dim3 grid((unsigned)(jobs < gpu->processors ? jobs : gpu->processors));
    return usp_cuda_launch("softmax forward", softmax_wgmma_forward_kernel<T, shape>, grid, dim3(shape::threads),
                           forward_memory<shape>::bytes, stream, *args, maps, soft_cap_of(*args));
}

template <typename T, int DIM>
static usp_status start_extras(const usp_gpu *gpu, const usp_softmax *args, usp_stream stream) {
    return start_with_extras(*args, [&](auto extras) {
        return start_shape<T, forward_shape<DIM, DIM, 128, decltype(extras)::value>>(gpu, args, stream);
    });
}

/* The first shape that holds both dims; what is beyond them is zeros. */
template <typename T> static usp_status start(const usp_gpu *gpu, const usp_softmax *args, usp_stream stream) {
    if (args->dim <= 64 && args->value_dim <= 64) return start_extras<T, 64>(gpu, args, stream);
    if (args->dim <= 128 && args->value_dim <= 128) return start_extras<T, 128>(gpu, args, stream);
    if (args->dim <= 192 && args->value_dim <= 128)
        return start_shape<T, forward_shape<192, 128, 128>>(gpu, args, stream);
    return start_shape<T, forward_shape<256, 256, 80>>(gpu, args, stream);
}

extern "C" usp_status usp_softmax_wgmma_forward(const usp_gpu *gpu, const usp_softmax *args, usp_stream stream) {
    return args->dtype == USP_F16 ? start<__half>(gpu, args, stream) : start<__nv_bfloat16>(gpu, args, stream);
}
