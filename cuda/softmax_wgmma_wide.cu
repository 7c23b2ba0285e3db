/* softmax_wgmma_wide.cu - backward softmax attention on Hopper (sm_90a) for the widest heads, 16-bit elements, all five
 * products in one kernel. As softmax_wgmma_backward.cu, but dk and dv of 128 keys would not fit the registers: a job is
 * 64 keys, and two warpgroups share the work of a step. Each has S^T and dP^T of half its queries, writes P^T and dS^T
 * to shared memory, and then has half the columns of dv, dk and dq. Rows of accumulators are keys; of dq's, queries. */
#include "softmax_wgmma_wide.cuh"

/* ---- a computing warpgroup --------------------------------------------------------------------------------------- */

template <typename T, typename Shape> struct wide_group {
    static constexpr int N = Shape::queries / 8, K = Shape::queries / 16;
    using memory = wide_memory<Shape>;
    using notes_type = backward_notes<Shape>;
    using element = T;
    using scores = usp_sums<1, N>;
    static constexpr int D = Shape::dim / 16, E = Shape::value_dim / 16; /* column blocks of a group */
    const usp_softmax &args;
    notes_type &notes;
    int group, warp_row; /* this warp's first row of the job, or of dq of a step */
    turn<Shape::stages> at;
    turn<Shape::dq_places> place; /* of dq */
    int jobs;
    usp_sums<1, D> dk;
    usp_sums<1, E> dv;
    usp_sums<1, 4> rest; /* the last box of dq of the step before, */
    bool rests;          /* if it is still to be left */

    __device__ __forceinline__ wide_group(const usp_softmax &args_, notes_type &notes_)
        : args(args_), notes(notes_), group(uniform(threadIdx.x / 128) - 1),
          warp_row(threadIdx.x / 32 % 4 * 16), at{0, 0}, place{0, 0}, jobs(0), rests(false) {
    }

    /* ---- one step */

    /* The first of the step's queries whose scores this group has. */
    __device__ __forceinline__ int first_query() const {
        return group * Shape::queries;
    }

    __device__ __forceinline__ void issue_scores(usp_sums<1, N> &s) {
        auto k = memory::k_at();
        pin(k.address); /* no descriptors of keys are kept in registers */
        begin_products();
        issue_rows<T>(s, k, 0, memory::q_at(at.stage), first_query());
        end_products();
    }

    /* Writes this group's columns of P^T or dS^T; both groups have written theirs when it returns. */
    __device__ __forceinline__ void share_pairs(const usp_sums<1, N> &c, typename memory::tile to) {
        left_operand<K> rounded;
        round_sums<T, K>(rounded, c);
        write_rows<K>(rounded, to, warp_row, first_query());
        publish_stores();
        meet(MEET_BOTH, 256);
    }

    __device__ __forceinline__ void issue_values(int stage, int dout_stage) {
        begin_products();
#pragma unroll
        for (int k = 0; k < Shape::step / 16; k++)
            issue_product<T, true>(list_of<E>(dv), memory::p_at(stage).columns(k),
                                   memory::dout_at(dout_stage).rows(k, group * E * 8), true);
        end_products();
    }

    __device__ __forceinline__ void issue_queries(usp_sums<1, D> &dq) {
        begin_products();
#pragma unroll
        for (int k = 0; k < Shape::rows / 16; k++)
            issue_product<T, true, true>(list_of<D>(dq), memory::ds_at().rows(k), memory::k_at().rows(k, group * D * 8),
                                         k > 0);
        end_products();
    }

    __device__ __forceinline__ void issue_keys(int stage) {
        begin_products();
#pragma unroll
        for (int k = 0; k < Shape::step / 16; k++)
            issue_product<T, true>(list_of<D>(dk), memory::ds_at().columns(k),
                                   memory::q_at(stage).rows(k, group * D * 8), true);
        end_products();
    }

    /* A box of this group's share of dq of a step. There are four, and places for two: two are left before scores of
     * the next step are found, which read as much shared memory as there is time for, one behind them, when the first
     * one has been read, and one under dP of the next step. */
    static __device__ __forceinline__ const usp_sums<1, 4> &box_of(const usp_sums<1, D> &dq, int box) {
        return reinterpret_cast<const usp_sums<1, 4> &>(dq[0][box * 4]);
    }

    __device__ __forceinline__ void leave(const usp_sums<1, 4> &box) {
        leave_queries(box, args.scale, notes, group, place);
        place.advance();
    }

    __device__ __forceinline__ void leave_rest() {
        if (rests) leave(rest);
        rests = false;
    }

    /* All of them where keys are not finite, pair by pair. */
    __device__ __forceinline__ void leave_odd(int stage) {
        for (int box = 0; box < Shape::dq_boxes; box++, place.advance())
            leave_one_by_one<T, Shape>(args, notes, group, place, box, notes.step[stage], memory::ds_at());
    }

    /* dq and dk of a step whose dS^T is shared, and S^T of the next one, if there is one, whose product runs under
     * them. */
    __device__ __forceinline__ int find_queries(usp_sums<1, N> &s, int kind) {
        int stage = at.stage;
        usp_sums<1, D> dq;
        issue_queries(dq);
        issue_keys(stage);
        await_products<2>();
        pin(list_of<E>(dv));
        arrive_warp(&notes.dout_empty[dout_of<Shape>(at).stage]);
        bool odd = are_keys_spoilt(notes, jobs);
        await_products<1>();
        pin(list_of<D>(dq));
        if (!odd) leave(box_of(dq, 0)), leave(box_of(dq, 1));
        at.advance();
        if (!(kind & LAST_STEP)) await(&notes.q_full[at.stage], at.parity);
        int next_kind = notes.step[at.stage].kind;
        usp_sums<1, N> next; /* what s held is not kept for it */
        issue_scores(next);
        await_products<1>();
        pin(list_of<D>(dk));
        if (!odd) {
            leave(box_of(dq, 2));
            copy_sums(rest, box_of(dq, 3));
            rests = true;
        } else {
            await_products<0>(); /* a call may use their registers */
            pin(list_of<N>(next));
            leave_odd(stage);
        }
        arrive_warp(&notes.q_empty[stage]);
        await_products<0>();
        pin(list_of<N>(next));
        copy_sums(s, next);
        return next_kind;
    }

    /* From S^T of a step to that of the next one. dS^T is written when both groups have met over P^T: then both are
     * done with the last step's. */
    template <bool MASKED> __device__ __forceinline__ int run_step(usp_sums<1, N> &s, int kind) {
        const query_notes<Shape> &query = notes.query[at.stage];
        int stage = at.stage;
        turn<Shape::dout_stages> dout = dout_of<Shape>(at);
        usp_sums<1, N> dp;
        await(&notes.dout_full[dout.stage], dout.parity);
        begin_products();
        issue_rows<T>(dp, memory::v_at(), 0, memory::dout_at(dout.stage), first_query());
        end_products();
        leave_rest();
        query_bases<N> bases;
        bases.load(query, first_query());
        float unit = args.scale * LOG2E;
        auto exponent = [=](float score, float base, int, int) { return fmaf(score, unit, -base); };
        weigh(s, bases, query, exponent, first_query());
        if constexpr (MASKED) {
            key_pairs(query, warp_row, args.pairs.last).mask(s, query, args.pairs.last, first_query());
            await_products<0>();
            pin(list_of<N>(dp));
            clean_step<T>(notes, at, jobs);
        }
        share_pairs(s, memory::p_at(stage));
        issue_values(stage, dout.stage);
        await_products<1>();
        pin(list_of<N>(dp));
        differ<MASKED>(dp, s, query, first_query());
        share_pairs(dp, memory::ds_at());
        return find_queries(s, kind);
    }

    __device__ __forceinline__ void end_steps() {
        leave_rest();
    }

    /* ---- jobs */

    __device__ __forceinline__ void begin_job() {
        clear(dk);
        clear(dv);
    }

    __device__ __forceinline__ void begin_steps() {
    }

    template <int W>
    __device__ __forceinline__ void store(const usp_sums<1, W> &c, const usp_tensor &to, const softmax_job &job,
                                          int dim) {
        int rows = job.count - warp_row, first = job.begin + warp_row, column = group * W * 8;
        if (args.key_dtype == USP_F32)
            usp_store(c, usp_row<float>(to, first, job.batch, job.head) + column, to.stride_token, rows, dim - column);
        else
            usp_store(c, usp_row<T>(to, first, job.batch, job.head) + column, to.stride_token, rows, dim - column);
    }

    __device__ __forceinline__ bool end_job(const softmax_job &job, bool) {
        multiply_row(0, dk, args.scale);
        multiply_row(1, dk, args.scale);
        store(dk, args.dk, job, args.dim);
        store(dv, args.dv, job, args.value_dim);
        return false;
    }

    __device__ __forceinline__ void mend_rows(const softmax_job &job) {
        meet(MEET_BOTH, 256); /* the rows are written */
        mend_keys<T, Shape>(args, job, job.count < Shape::rows, threadIdx.x - 128, 256);
    }
};

/* ---- kernel ------------------------------------------------------------------------------------------------------ */

template <typename T, typename Shape>
static __global__ void __launch_bounds__(Shape::threads, 1)
    softmax_wgmma_wide_kernel(const __grid_constant__ usp_softmax args, const __grid_constant__ backward_maps maps) {
    auto &notes = *shared_at<backward_notes<Shape>>(wide_memory<Shape>::notes);
    if (threadIdx.x == 0) begin_notes(notes);
    begin_kernel();
    __syncthreads();
    if (threadIdx.x < 128) {
        give_registers<Shape::copying_registers>();
        run_copying<T, Shape>(args, maps, soft_cap{}, notes);
    } else {
        take_registers<Shape::computing_registers>();
        wide_group<T, Shape> group(args, notes);
        run_jobs(group);
    }
}

/* ---- launcher ---------------------------------------------------------------------------------------------------- */

template <typename T> static usp_status start(const usp_gpu *gpu, const usp_softmax *args, usp_stream stream) {
    using shape = wide_shape;
    static_assert(wide_memory<shape>::bytes <= 227 * 1024, "tiles must fit a Hopper GPU");
    backward_maps maps;
    if (count_jobs(*args, true, shape::rows) == 0) return USP_OK;
    USP_TRY(make_backward_maps<shape>(gpu, *args, &maps));
    return launch_staying("softmax backward", softmax_wgmma_wide_kernel<T, shape>, gpu, *args, shape::threads,
                          wide_memory<shape>::bytes, stream, maps);
}

extern "C" usp_status usp_softmax_wgmma_wide_backward(const usp_gpu *gpu, const usp_softmax *args, usp_stream stream) {
    return args->dtype == USP_F16 ? start<__half>(gpu, args, stream) : start<__nv_bfloat16>(gpu, args, stream);
}
