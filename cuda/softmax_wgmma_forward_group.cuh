/* softmax_wgmma_forward_group.cuh - forward softmax attention on Hopper: a computing warpgroup, which has 64 of a job's
 * 128 queries. While one group finds weights the other multiplies (but with dropout), and within each the values of one
 * step are multiplied while the largest scores and the exponents of the next are found. */
#ifndef USP_CUDA_SOFTMAX_WGMMA_FORWARD_GROUP_CUH
#define USP_CUDA_SOFTMAX_WGMMA_FORWARD_GROUP_CUH
#include "softmax_wgmma_forward.cuh"

/* ---- a computing warpgroup --------------------------------------------------------------------------------------- */

constexpr int MEET_TURN = 1, MEET_GROUP = 3; /* barriers: of each group's turn to multiply, of each group alone */

template <typename T, typename Shape> struct computing_group {
    static constexpr int N = Shape::step / 8, K = Shape::step / 16, W = Shape::value_dim / 8;
    using memory = forward_memory<Shape>;
    using notes_type = forward_notes<Shape>;
    const usp_softmax &args;
    const forward_maps &maps;
    const soft_cap &cap;
    notes_type &notes;
    int group, warp_row; /* this warp's first row of the job */
    turn<Shape::stages> k, v;
    turn<Shape::slots> slot; /* of the next job */
    int clean_parity;        /* of v_clean: a bit a stage */
    bool unclean;            /* the values that come next are of a masked step */
    bool held;               /* the place of the job before */
    step_note step;          /* that at k, */
    bool ahead;              /* if its keys are known to be there */

    usp_sums<1, W> out;
    left_operand<K> weights;
    int jobs; /* with steps, so far */

    using job_rows = forward_rows<Shape>;
    template <bool MASKED> static constexpr bool is_biased = Shape::one_sided && !MASKED;

    __device__ __forceinline__ computing_group(const usp_softmax &args_, const forward_maps &maps_,
                                               const soft_cap &cap_, notes_type &notes_)
        : args(args_), maps(maps_), cap(cap_), notes(notes_), group(uniform(threadIdx.x / 128) - 1),
          warp_row((threadIdx.x / 32 - 4) * 16), k{0, 0}, v{0, 0}, slot{0, 0}, clean_parity(0), unclean(false),
          held(false), ahead(false), jobs(0) {
        if (Shape::turns && group == 1) pass(MEET_TURN, 256);
    }

    /* ---- rows */

    __device__ __forceinline__ void begin_rows(job_rows &to, const softmax_job &job) {
        int place = slot.stage, rows = job.count - warp_row;
        int64_t line = line_of(args, job.batch, job.head, job.begin + warp_row);
        to.pairs.read(notes.keys[place], notes.query[place], warp_row);
        to.rule = scoring(args, job.head, cap);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int row = usp_lane_row(0, i);
            bool kept = !args.first && row < rows;
            to.online.begin(i, {kept ? args.top[line + row] : -INFINITY, kept ? args.sum[line + row] : 0});
        }
        if constexpr (Shape::extras) to.begin_extras(args, job, warp_row);
    }

    __device__ __forceinline__ void begin_out(const softmax_job &job, const float (&factor)[2]) {
        int rows = job.count - warp_row;
        usp_tensor acc = acc_tensor(args);
        clear(out);
        if (args.first) return;
        usp_scale_add(out, 1, usp_row<float>(acc, job.begin + warp_row, job.batch, job.head), acc.stride_token, rows,
                      args.value_dim);
        scale_rows(out, factor);
    }

    __device__ __forceinline__ void end_rows(const job_rows &from, const softmax_job &job, int place) {
        int rows = job.count - warp_row, first_row = job.begin + warp_row;
        int64_t line = line_of(args, job.batch, job.head, first_row);
        float sink = sink_of(args, job.head), kept = Shape::drops ? 1 / (1 - args.dropout.rate) : 1;
        if (Shape::more && args.peak) from.peaks.store(args, line, rows, cap.unit);
        int own = threadIdx.x & 3, own_row = usp_lane_row(0, own % 2); /* one of four lanes writes a row's state */
        row_state own_state = {};
#pragma unroll
        for (int i = 0; i < 2; i++) {
            row_state state = from.online.kept(i);
            float factor = finish_row(state, sink, kept);
            multiply_row(i, out, args.last ? factor : 1);
            if (i == own) own_state = state;
        }
        own_state = left_state(args, own_state);
        pin(own_state.top), pin(own_state.sum); /* while rows are multiplied */
        if (Shape::boxes_out && args.last && maps.has_out && job.count == Shape::rows) {
            store_out(job, place);
        } else if (args.last) {
            usp_store(out, usp_row<T>(args.out, first_row, job.batch, job.head), args.out.stride_token, rows,
                      args.value_dim);
        } else {
            usp_tensor acc = acc_tensor(args);
            usp_store(out, usp_row<float>(acc, first_row, job.batch, job.head), acc.stride_token, rows, args.value_dim);
        }
        /* Behind the boxes: what publishes them to the copy engine waits for all that was stored before. */
        if (own < 2 && own_row < rows) store_state(args, line + own_row, own_state);
    }

    /* The group's rows, by way of where its queries lay. */
    __device__ __forceinline__ void store_out(const softmax_job &job, int place) {
        left_operand<W / 2> rounded;
        round_sums<T, W / 2>(rounded, out);
        write_rows<W / 2>(rounded, memory::out_at(place), warp_row);
        publish_stores();
        meet(MEET_GROUP + group, 128);
        if (threadIdx.x % 128 != 0) return;
        memory::out_at(place).store(&maps.out, group * 64, job.begin + group * 64, job.head, job.batch);
        end_boxes();
    }

    /* Brings what was taken out of values to the rows that depend on it. */
    __device__ __forceinline__ void mend_rows(softmax_job job) {
        await_boxes();
        meet(MEET_GROUP + group, 128); /* the rows are written */
        job.begin += group * 64;
        job.count = min(job.count - group * 64, 64);
        for (int element = threadIdx.x % 128; element < args.value_dim; element += 128)
            mend<T, false>(args, job, Shape::step, false, element, args.last ? args.out : acc_tensor(args), !args.last,
                           args.v, args.value_dim);
    }

    /* ---- one step */

    /* Of a step without masks, with slopes: the left operand of biases. */
    __device__ __forceinline__ void read_slope(uint32_t (&part)[4]) const {
        part[0] = part[1] = notes.bias[k.stage].part[threadIdx.x & 3];
        part[2] = part[3] = 0;
    }

    template <bool BIASED>
    __device__ __forceinline__ void issue_scores(usp_sums<1, N> &scores, int place, const uint32_t (&slope)[4]) {
        issue_rows<T>(scores, memory::q_at(place), group * 64, memory::k_at(k.stage));
        if constexpr (BIASED)
            issue_product<T, false>(list_of<N>(scores), slope, describe_narrow(shared_address(notes.number)), true);
        end_products();
    }

    __device__ __forceinline__ void issue_values() {
        issue_columns<T>(out, weights, memory::v_at(v.stage));
        end_products();
    }

    __device__ __forceinline__ void await_values() {
        await(&notes.v_full[v.stage], v.parity);
        if (!unclean) return;
        await(&notes.v_clean[v.stage], clean_parity >> v.stage & 1);
        clean_parity ^= 1 << v.stage;
    }

    /* Subtracts slopes times distances. */
    __device__ __forceinline__ void add_biases(usp_sums<1, N> &scores, const job_rows &rows) {
        for_places(scores, notes.place[k.stage], [&](float &score, int r, float key) {
            score = rows.rule.biased(score, fabsf(rows.place[r] - key));
        });
    }

    /* Products of the step at k to scores; the stage is left. MASKED: some pairs may not be allowed, or biases are
     * still to be subtracted; else scores are each row's `shift` more than they should be. */
    template <bool MASKED>
    __device__ __forceinline__ void bend(usp_sums<1, N> &scores, job_rows &rows, float (&shift)[2]) {
        if constexpr (Shape::caps) cap_scores<4>(scores, rows.rule);
        if constexpr (is_biased<MASKED>) rows.shift_by(notes.bias[k.stage], shift);
        if constexpr (Shape::slopes && !is_biased<MASKED>) add_biases(scores, rows);
        if constexpr (MASKED)
            rows.pairs.mask(scores, notes.key[k.stage], args.pairs.last ? notes.last[k.stage] : nullptr);
        if constexpr (Shape::more) rows.peaks.look(scores);
        arrive_warp(&notes.k_empty[k.stage]);
    }

    /* Scores of the step at k, which are there behind this, and values of the step before, which may not be. */
    template <bool BIASED> __device__ __forceinline__ void issue_both(usp_sums<1, N> &scores, int place) {
        uint32_t slope[4];
        if constexpr (BIASED) read_slope(slope);
        if constexpr (Shape::turns) meet(MEET_TURN + group, 256);
        begin_products();
        issue_scores<BIASED>(scores, place, slope);
        await_values();
        begin_products();
        issue_values();
        if constexpr (Shape::turns && !Shape::long_turns) pass(MEET_TURN + (group ^ 1), 256);
        await_products<1>();
        if constexpr (Shape::turns && Shape::long_turns) pass(MEET_TURN + (group ^ 1), 256);
        pin(list_of<N>(scores));
    }

    template <bool BIASED> __device__ __forceinline__ void issue_alone(usp_sums<1, N> &scores, int place) {
        uint32_t slope[4];
        if constexpr (BIASED) read_slope(slope);
        begin_products();
        issue_scores<BIASED>(scores, place, slope);
        await_products<0>();
        pin(list_of<N>(scores));
    }

    __device__ __forceinline__ void leave_values() {
        await_products<0>();
        pin(list_of<W>(out));
        arrive_warp(&notes.v_empty[v.stage]);
        v.advance();
    }

    /* Exponents, of which those of EARLY column blocks are weights already, to weights. Dropped ones are in the sum.
     * The compiler keeps the special unit and the others at work side by side only where no branch lies between and
     * weights are rounded as they are found. */
    template <int EARLY> __device__ __forceinline__ void find_weights(usp_sums<1, N> &exponents, job_rows &rows) {
        const uint32_t *draw = Shape::drops ? notes.draw[k.of_twice()] : nullptr;
        look_ahead();
        rows.online.template find_weights<EARLY>(exponents, [&](const float *pair, int r, int n) {
            uint32_t rounded = usp_pack<T>(pair[0], pair[1]);
            if constexpr (Shape::drops) rounded &= ~dropped(draw, rows, r, n);
            weights[n / 2][n % 2 * 2 + r] = rounded;
        });
    }

    /* All bits of those of a row's pair of weights in column block n that are dropped. */
    static __device__ __forceinline__ uint32_t dropped(const uint32_t *draw, const job_rows &rows, int r, int n) {
        uint2 two = *reinterpret_cast<const uint2 *>(draw + usp_lane_column(n));
        return halves_below(usp_dropout_pair(rows.word[r], two.x), usp_dropout_pair(rows.word[r], two.y), rows.limits);
    }

    /* Steps that ask whether all products are near 0. Each warp answers for itself, so no instruction of the whole
     * group may lie on one of the ways. */
    template <bool MASKED, bool FIRST>
    static constexpr bool asks_near = Shape::caps && !Shape::more && !MASKED && !FIRST;
    template <bool MASKED, bool FIRST>
    static constexpr int early = MASKED                     ? 0
                                 : asks_near<MASKED, FIRST> ? Shape::early_near
                                                            : Shape::early;

    /* Products to exponents where all are near 0 and no base is far below: weights fit their dtype, so that no base is
     * raised, and no largest score is looked for. */
    template <bool NEAREST> __device__ __forceinline__ void find_near(usp_sums<1, N> &products, job_rows &rows) {
        arrive_warp(&notes.k_empty[k.stage]);
        auto exponent = [rule = rows.rule](float product, float base) {
            return rule.template near_exponent<NEAREST>(product, base);
        };
        online_softmax<1, 0>::find_exponents<Shape::early_near>(products, rows.online.top, exponent);
    }

    /* Products to exponents; the stage is left. Says whether rows have grown; if so, by which factors. */
    template <bool MASKED, bool FIRST>
    __device__ __forceinline__ bool find_exponents(usp_sums<1, N> &scores, job_rows &rows, float (&factor)[2]) {
        const scoring &rule = rows.rule;
        if constexpr (asks_near<MASKED, FIRST>) {
            bool based = fminf(rows.online.top[0], rows.online.top[1]) >= -rule.cap.span;
            float size = size_of(scores);
            if (__all_sync(~0u, based & (size < rule.cap.nearest_size))) return find_near<true>(scores, rows), false;
            if (__all_sync(~0u, based & (size < rule.cap.near_size))) return find_near<false>(scores, rows), false;
        }
        float best[2], shift[2] = {};
        bend<MASKED>(scores, rows, shift);
        online_softmax<1, 0>::look(scores, rule.unit, best);
        if constexpr (is_biased<MASKED>) best[0] -= shift[0], best[1] -= shift[1];
        bool grown = rows.online.raise(best, factor);
        float top[2] = {rows.online.top[0], rows.online.top[1]};
        if constexpr (is_biased<MASKED>) top[0] += shift[0], top[1] += shift[1];
        auto exponent = [&](float score, float base) { return fmaf(score, rule.unit, -base); };
        online_softmax<1, 0>::find_exponents<early<MASKED, FIRST>>(scores, top, exponent);
        return grown;
    }

    template <bool MASKED, bool FIRST, bool PENDING>
    __device__ __forceinline__ void take_step(job_rows &rows, int place, float (&factor)[2]) {
        constexpr int EARLY = early<MASKED, FIRST>;
        usp_sums<1, N> scores;
        if constexpr (PENDING)
            issue_both<is_biased<MASKED>>(scores, place);
        else
            issue_alone<is_biased<MASKED>>(scores, place);
        bool grown = find_exponents<MASKED, FIRST>(scores, rows, factor);
        if constexpr (EARLY > 0) pin(list_of<N>(scores));
        if constexpr (PENDING) leave_values();
        if (!FIRST && grown) {
            multiply_row(0, out, factor[0]);
            multiply_row(1, out, factor[1]);
        }
        find_weights<EARLY>(scores, rows);
    }

    __device__ __forceinline__ void end_steps() {
        await_values();
        begin_products();
        issue_values();
        leave_values();
    }

    __device__ __forceinline__ void await_keys() {
        if (ahead) return;
        await(&notes.k_full[k.stage], k.parity);
        step = notes.step[k.stage];
    }

    /* Leaves the step, whose note is read no more, for the one at k from now on, if its keys are there: while weights
     * are found, since to ask and to be told takes time, of which there is none later. */
    __device__ __forceinline__ void look_ahead() {
        k.advance();
        unclean = step.masked;
        ahead = __all_sync(~0u, is_over(&notes.k_full[k.stage], k.parity));
        if (ahead) step = notes.step[k.stage];
    }

    __device__ __forceinline__ bool is_bent() const {
        return Shape::one_sided ? step.bent : step.masked;
    }

    /* ---- jobs */

    /* A job whose first step is done, if it has steps. */
    struct begun_job {
        forward_job what;
        job_rows rows;
        float factor[2]; /* of what was summed before */
        bool goes_on;    /* there are more steps */
        int place;
    };

    template <bool PENDING> __device__ __forceinline__ void begin_steps(begun_job &to) {
        await_keys();
        to.goes_on = !step.last;
        if (is_bent())
            take_step<true, true, PENDING>(to.rows, to.place, to.factor);
        else
            take_step<false, true, PENDING>(to.rows, to.place, to.factor);
    }

    /* The next job; `pending`: the last values of the job before are still to be multiplied. */
    __device__ __forceinline__ void begin_job(begun_job &to, bool pending) {
        await(&notes.job_full[slot.stage], slot.parity);
        to.what = notes.job[slot.stage];
        to.place = slot.stage;
        to.goes_on = false;
        to.factor[0] = to.factor[1] = 1;
        begin_rows(to.rows, to.what.job);
        if (pending && to.what.steps)
            begin_steps<true>(to);
        else if (pending)
            end_steps();
        else if (to.what.steps)
            begin_steps<false>(to);
        slot.advance();
    }

    /* The place of the job before, whose results have been read by now. */
    __device__ __forceinline__ void leave_last(int place) {
        if (!held) return;
        held = false;
        if (threadIdx.x % 128 == 0) await_reads<0>();
        arrive_warp(&notes.job_empty[place ^ 1]);
    }

    template <bool MASKED> __device__ __forceinline__ void go_on(begun_job &now) {
        float factor[2];
        now.goes_on = !step.last;
        take_step<MASKED, false, true>(now.rows, now.place, factor);
    }

    /* Most steps are not masked: their loop has no other jump, and its code lies together. */
    __device__ __forceinline__ void run_job(begun_job &now) {
        begin_out(now.what.job, now.factor);
        leave_last(now.place);
        while (now.goes_on) {
            await_keys();
            if (is_bent()) {
                go_on<true>(now);
                continue;
            }
            do go_on<false>(now);
            while (now.goes_on && ahead && !is_bent());
        }
        if (!Shape::overlaps) arrive_warp(&notes.job_empty[0]); /* the queries have been read */
    }

    __device__ __forceinline__ void end_job(const begun_job &now) {
        jobs += now.what.steps;
        bool spoilt = now.what.steps && notes.spoilt[jobs % 4] == jobs;
        end_rows(now.rows, now.what.job, now.place);
        if (spoilt) mend_rows(now.what.job);
        held = Shape::overlaps;
    }

    __device__ __forceinline__ void run() {
        begun_job now, next;
        for (begin_job(now, false); now.what.job.count > 0; now = next) {
            run_job(now);
            if (Shape::overlaps)
                begin_job(next, now.what.steps);
            else if (now.what.steps)
                end_steps();
            end_job(now);
            if (!Shape::overlaps) begin_job(next, false);
        }
        await_boxes();
    }
};

#endif
