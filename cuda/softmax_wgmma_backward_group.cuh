/* softmax_wgmma_backward_group.cuh - backward softmax attention on Hopper: a computing warpgroup, which has 64 of a
 * job's 128 keys, goes through all queries that see them, some at a time, and keeps dk and dv in registers. Rows of
 * accumulators are keys. */
#ifndef USP_CUDA_SOFTMAX_WGMMA_BACKWARD_GROUP_CUH
#define USP_CUDA_SOFTMAX_WGMMA_BACKWARD_GROUP_CUH
#include "softmax_wgmma_gradients.cuh"

/* ---- a computing warpgroup --------------------------------------------------------------------------------------- */

template <typename T, typename Shape> struct backward_group {
    static constexpr int N = Shape::part / 8, K = Shape::part / 16, D = Shape::dim / 8, E = Shape::value_dim / 8;
    using memory = backward_memory<Shape>;
    using notes_type = backward_notes<Shape>;
    using element = T;
    using scores = usp_sums<1, N>;
    /* dq is found in pieces, each with a place of its own: one in each part, and one more in the last. */
    static constexpr int Q = Shape::dq_together * 4, pieces = Shape::dq_places, late = pieces - Shape::parts;
    static_assert(late == 0 || late == 1, "a part has one more");
    template <int PART> static constexpr bool ends = PART == Shape::parts - 1;
    /* A wait that is over at once takes time too, of which there is some where products are awaited. Steps of 128
     * queries and parts of steps are there too late for that. */
    static constexpr bool waits_early = Shape::step == 64 && Shape::parts == 1;
    template <int PART> static constexpr bool finds_late = late > 0 && ends<PART>;
    const usp_softmax &args;
    const soft_cap &cap;
    const backward_maps &maps;
    notes_type &notes;
    int group, warp_row; /* this warp's first row of the job */
    turn<Shape::stages> at;
    turn<Shape::dq_places> place; /* of dq */
    int jobs;
    query_bases<N> bases; /* of the part */
    usp_sums<1, D> dk;
    usp_sums<1, E> dv;

    __device__ __forceinline__ backward_group(const usp_softmax &args_, const soft_cap &cap_,
                                              const backward_maps &maps_, notes_type &notes_)
        : args(args_), cap(cap_), maps(maps_), notes(notes_), group(uniform(threadIdx.x / 128) - 1),
          warp_row((threadIdx.x / 32 - 4) * 16), at{0, 0}, place{0, 0}, jobs(0) {
    }

    /* Of the group's keys; every one that does not exist is masked. */
    __device__ __forceinline__ void note_keys() {
        const softmax_job &job = notes.job.job;
        int i = threadIdx.x % 128 + group * 64, first = args.pairs.key[job.begin];
        if (threadIdx.x % 128 < 64) {
            int key = load_or(args.pairs.key, job.begin, i, job.count, first);
            notes.place[i] = (float)(key - first);
            notes.draw[i] = usp_dropout_key(key);
        }
        meet(MEET_GROUP + group, 128);
    }

    /* ---- one step */

    /* Of a score of the job's key `row`. The query's share of a bias is in the base where nothing is masked. */
    template <bool MASKED>
    __device__ __forceinline__ float exponent_of(float score, float base, const scoring &rule,
                                                 const query_notes<Shape> &query, int row, int column) const {
        float place = Shape::slopes ? notes.place[row] : 0;
        if constexpr (Shape::slopes && MASKED) score = rule.biased(score, fabsf(place - query.place[column]));
        if constexpr (Shape::slopes && !MASKED) base = fmaf(-rule.slope * rule.unit, place, base);
        return fmaf(score, rule.unit, -base);
    }

    /* With a soft cap or dropout: S^T to P^T times the gradient of scores by products, below 0 where the pair is
     * dropped; P^T itself, as far as it is kept, is rounded on the way. */
    template <bool MASKED>
    __device__ __forceinline__ void weigh_extras(usp_sums<1, N> &s, left_operand<K> &p, const query_notes<Shape> &query,
                                                 const scoring &rule) {
        if constexpr (Shape::caps && !Shape::more && !MASKED) {
            bool near = !(query.scaled[0] | query.scaled[1]) && __all_sync(~0u, size_of(s) < rule.cap.nearest_size);
            if (near) return weigh_near(s, p, query, rule);
        }
        if constexpr (Shape::caps) cap_scores<2>(s, rule);
        weigh_capped<MASKED>(s, p, query, rule);
    }

    /* The same of products up to 0.1 of the cap, where no factor is seen. */
    __device__ __forceinline__ void weigh_near(usp_sums<1, N> &s, left_operand<K> &p, const query_notes<Shape> &query,
                                               const scoring &rule) {
#pragma unroll
        for (int n = 0; n < N; n++) {
            float *c = s[0][n], bend[4];
#pragma unroll
            for (int e = 0; e < 4; e++) {
                int column = usp_lane_column(n) + e % 2;
                bend[e] = rule.near_bend(c[e]);
                c[e] = fast_exp2(rule.template near_exponent<true>(c[e], query.base[column]));
            }
#pragma unroll
            for (int r = 0; r < 2; r++) p[n / 2][n % 2 * 2 + r] = usp_pack<T>(c[r * 2], c[r * 2 + 1]);
#pragma unroll
            for (int e = 0; e < 4; e++) c[e] *= bend[e];
        }
    }

    /* The same of capped scores. */
    template <bool MASKED>
    __device__ __forceinline__ void weigh_capped(usp_sums<1, N> &s, left_operand<K> &p, const query_notes<Shape> &query,
                                                 const scoring &rule) {
        uint32_t limit = notes.limit;
        key_pairs rows(query, warp_row, args.pairs.last);
#pragma unroll
        for (int n = 0; n < N; n++) {
            int i = usp_lane_column(n);
            float *c = s[0][n], bend[4];
#pragma unroll
            for (int e = 0; e < 4; e++) {
                int row = warp_row + usp_lane_row(0, e / 2), column = i + e % 2;
                if constexpr (Shape::caps) bend[e] = rule.bend(c[e]);
                float exponent = exponent_of<MASKED>(c[e], query.base[column], rule, query, row, column);
                c[e] = fast_exp2(exponent) * query.factor[column];
            }
#pragma unroll
            for (int e = 0; e < 4; e++) {
                int row = warp_row + usp_lane_row(0, e / 2), column = i + e % 2;
                if constexpr (Shape::drops)
                    c[e] = usp_dropout_pair(query.word[column], notes.draw[row]) < limit ? -c[e] : c[e];
            }
            if constexpr (MASKED) {
                rows.mask_interval(s[0][n], query, i);
                if (args.pairs.last) rows.mask_behind(s[0][n], query, i);
            }
#pragma unroll
            for (int r = 0; r < 2; r++) p[n / 2][n % 2 * 2 + r] = pack_positive<T>(c[r * 2], c[r * 2 + 1]);
#pragma unroll
            for (int e = 0; e < 4 && Shape::caps; e++) c[e] = !MASKED || is_weight(c[e]) ? c[e] * bend[e] : c[e];
        }
    }

    /* With dropout: what weigh_extras left, and dP^T, to dS^T over the scale. */
    template <bool MASKED>
    __device__ __forceinline__ void differ_kept(usp_sums<1, N> &dp, const usp_sums<1, N> &p,
                                                const query_notes<Shape> &query) {
#pragma unroll
        for (int n = 0; n < N; n++) {
            float2 delta = *reinterpret_cast<const float2 *>(query.delta + usp_lane_column(n));
#pragma unroll
            for (int e = 0; e < 4; e++) {
                float weight = p[0][n][e], &x = dp[0][n][e];
                float all = fmaf(fmaxf(weight, 0), x, -fabsf(weight) * (e % 2 ? delta.y : delta.x));
                x = !MASKED || is_weight(weight) ? all : 0;
            }
        }
    }

    /* The place of dS of the step that is under way. */
    __device__ __forceinline__ int turn_of_pairs() const {
        return Shape::parts == 1 ? at.stage : at.parity;
    }

    /* A tile; the compiler keeps descriptors of it in registers, for which wide heads leave none. */
    template <typename Tile> static __device__ __forceinline__ Tile described_anew(Tile tile) {
        if constexpr (Shape::parts > 1) pin(tile.address);
        return tile;
    }

    /* A piece of this group's share of dq of the step whose dS has a place. */
    __device__ __forceinline__ void issue_queries(usp_sums<1, Q> &dq, int piece, int turn) {
        auto ds = described_anew(memory::ds_at(turn));
        auto k = described_anew(memory::k_at());
        begin_products();
#pragma unroll
        for (int i = 0; i < Shape::rows / 16; i++)
            issue_product<T, true, true>(list_of<Q>(dq), ds.rows(i, Shape::dq_query(group)),
                                         k.rows(i, Shape::dq_column(group, piece * Shape::dq_together)), i > 0);
        end_products();
    }

    __device__ __forceinline__ void leave(const usp_sums<1, Q> &dq) {
        leave_queries(dq, args.scale, notes, group, place);
        place.advance();
    }

    /* Where keys are not finite: as leave, for the step that was kept; its dS has been read when both groups meet. */
    __device__ __forceinline__ void leave_kept(int piece, int turn) {
        meet(MEET_BOTH, 256);
        leave_one_by_one<T, Shape>(args, notes, group, place, piece * Shape::dq_together, notes.before[group],
                                   memory::ds_at(turn));
        meet(MEET_BOTH, 256);
        place.advance();
    }

    __device__ __forceinline__ void issue_scores(usp_sums<1, N> &s) {
        begin_products();
        issue_rows<T>(s, described_anew(memory::k_at()), group * 64, described_anew(memory::q_at(at.stage)));
        end_products();
        if constexpr (Shape::early_bases) bases.load(notes.query[at.stage]);
    }

    /* S^T of a part to P^T, rounded to p, while dP^T is found. */
    template <bool MASKED>
    __device__ __forceinline__ void weigh_part(usp_sums<1, N> &s, usp_sums<1, N> &dp, left_operand<K> &p, int kind) {
        const query_notes<Shape> &query = notes.query[at.stage];
        if (!waits_early || (kind & FIRST_STEP)) await(&notes.dout_full[at.stage], at.parity);
        begin_products();
        issue_rows<T>(dp, described_anew(memory::v_at()), group * 64, described_anew(memory::dout_at(at.stage)));
        end_products();
        const scoring rule(cap, notes.step[at.stage].slope);
        if constexpr (Shape::caps || Shape::drops) {
            weigh_extras<MASKED>(s, p, query, rule);
        } else {
            if constexpr (!Shape::early_bases) bases.load(query);
            weigh(s, bases, query, [&](float score, float base, int r, int column) {
                return exponent_of<MASKED>(score, base, rule, query, warp_row + usp_lane_row(0, r), column);
            });
            if constexpr (MASKED) key_pairs(query, warp_row, args.pairs.last).mask(s, query, args.pairs.last);
            round_sums<T, K>(p, s);
        }
        if constexpr (MASKED) {
            await_products<0>();
            pin(list_of<N>(dp));
            clean_step<T>(notes, at, jobs);
        }
    }

    /* dP^T to dS^T, rounded to ds, while dv is added to. dS has place `turn`, which the other group may still read. */
    template <bool MASKED>
    __device__ __forceinline__ void differ_part(const usp_sums<1, N> &s, usp_sums<1, N> &dp, const left_operand<K> &p,
                                                left_operand<K> &ds, int turn) {
        const query_notes<Shape> &query = notes.query[at.stage];
        begin_products();
        issue_columns<T>(dv, p, memory::dout_at(at.stage));
        end_products();
        if constexpr (waits_early) await(&notes.paired, turn ^ 1);
        await_products<1>();
        pin(list_of<N>(dp));
        if constexpr (Shape::drops)
            differ_kept<MASKED>(dp, s, query);
        else
            differ<MASKED>(dp, s, query);
        round_sums<T, K>(ds, dp);
    }

    /* In turns, queries are copied when the step before the last one may be added, which must not wait for them. */
    __device__ __forceinline__ bool queries_come_early() const {
        return waits_early && !args.deterministic;
    }

    /* Whether a part is not a job's last one. */
    template <int PART> static __device__ __forceinline__ bool goes_on(int kind) {
        return !ends<PART> || !(kind & LAST_STEP);
    }

    /* What a part finds of dq of the step before, whose dS has a place; dk is added to, and the next part is at hand.
     * Returns whether keys are not finite: then dq is not left. */
    template <int PART> __device__ __forceinline__ bool find_queries(const left_operand<K> &ds, int kind, int turn) {
        usp_sums<1, Q> dq;
        issue_queries(dq, PART, turn);
        await_products<1>();
        pin(list_of<E>(dv));
        arrive_warp(&notes.dout_empty[at.stage]);
        begin_products();
        issue_columns<T>(dk, ds, memory::q_at(at.stage));
        end_products();
        bool odd = are_keys_spoilt(notes, jobs);
        at.advance();
        if (queries_come_early() && goes_on<PART>(kind)) await(&notes.q_full[at.stage], at.parity);
        await_products<1>();
        pin(list_of<Q>(dq));
        if constexpr (ends<PART> && !finds_late<PART>) arrive_warp(&notes.paired);
        if (!(kind & FIRST_STEP) && !odd) leave(dq);
        if constexpr (finds_late<PART>) {
            issue_queries(dq, PART + 1, turn);
            await_products<0>();
            pin(list_of<Q>(dq));
            arrive_warp(&notes.paired);
            if (!(kind & FIRST_STEP) && !odd) leave(dq);
        }
        return odd;
    }

    /* From S^T of a part to that of the next one and its kind; behind a job's last part they are of nothing. dq is that
     * of the step before, whose dS both groups have long written, so that neither waits for the other; in a job's first
     * step it is of nothing. What a step is stays in shared memory: registers are dear. */
    template <bool MASKED, int PART> __device__ __forceinline__ int run_part(usp_sums<1, N> &s, int kind) {
        int stage = at.stage, turn = turn_of_pairs();
        left_operand<K> p, ds;
        usp_sums<1, N> dp;
        weigh_part<MASKED>(s, dp, p, kind);
        differ_part<MASKED>(s, dp, p, ds, turn);
        if constexpr (PART == 0 && !waits_early) await(&notes.paired, turn ^ 1);
        write_rows<K>(ds, memory::ds_at(turn), warp_row, PART * Shape::part);
        publish_stores();
        bool odd = find_queries<PART>(ds, kind, turn ^ 1);
        if (!queries_come_early() && goes_on<PART>(kind)) await(&notes.q_full[at.stage], at.parity);
        int next_kind = notes.step[at.stage].kind;
        usp_sums<1, N> next; /* what s held is not kept for it */
        issue_scores(next);
        if (waits_early && goes_on<PART>(kind)) await(&notes.dout_full[at.stage], at.parity);
        await_products<1>();
        pin(list_of<D>(dk));
        if (odd) {
            await_products<0>(); /* a call may use their registers */
            pin(list_of<N>(next));
            if (!(kind & FIRST_STEP)) leave_kept(PART, turn ^ 1);
            if (!(kind & FIRST_STEP) && finds_late<PART>) leave_kept(PART + 1, turn ^ 1);
            if (ends<PART> && threadIdx.x % 128 == 0) notes.before[group] = notes.step[stage];
        }
        arrive_warp(&notes.q_empty[stage]);
        await_products<0>();
        pin(list_of<N>(next));
        copy_sums(s, next);
        return next_kind;
    }

    template <bool MASKED> __device__ __forceinline__ int run_step(usp_sums<1, N> &s, int kind) {
        if constexpr (Shape::parts == 2) run_part<MASKED, 0>(s, kind);
        return run_part<MASKED, Shape::parts - 1>(s, kind);
    }

    /* dq of the last step. */
    __device__ __forceinline__ void end_steps() {
        int turn = turn_of_pairs() ^ 1;
        bool odd = are_keys_spoilt(notes, jobs);
        await(&notes.paired, turn);
#pragma unroll
        for (int piece = 0; piece < pieces; piece++) {
            usp_sums<1, Q> dq;
            issue_queries(dq, piece, turn);
            await_products<0>();
            pin(list_of<Q>(dq));
            if (odd)
                leave_kept(piece, turn);
            else
                leave(dq);
        }
    }

    /* ---- jobs */

    __device__ __forceinline__ void begin_job() {
        clear(dk);
        clear(dv);
    }

    __device__ __forceinline__ void begin_steps() {
        if constexpr (Shape::slopes || Shape::drops) note_keys();
    }

    template <int W>
    __device__ __forceinline__ void store(const usp_sums<1, W> &c, const usp_tensor &to, const softmax_job &job,
                                          int dim) {
        int rows = job.count - warp_row, first = job.begin + warp_row;
        if (args.key_dtype == USP_F32)
            usp_store(c, usp_row<float>(to, first, job.batch, job.head), to.stride_token, rows, dim);
        else
            usp_store(c, usp_row<T>(to, first, job.batch, job.head), to.stride_token, rows, dim);
    }

    template <int W, typename Tile> __device__ __forceinline__ void leave_rows(const usp_sums<1, W> &c, Tile tile) {
        left_operand<W / 2> rounded;
        round_sums<T, W / 2>(rounded, c);
        write_rows<W / 2>(rounded, tile, warp_row - group * 64);
    }

    /* Whether dk and dv are left in shared memory: those of a spoilt job are mended where they are wanted. */
    __device__ __forceinline__ bool end_job(const softmax_job &job, bool spoilt) {
        bool boxes = maps.has_keys && job.count == Shape::rows && !spoilt;
        multiply_row(0, dk, args.scale);
        multiply_row(1, dk, args.scale);
        if (boxes) {
            meet(MEET_BOTH, 256); /* dS of the last step has been read */
            leave_rows(dv, memory::dv_at(group));
            for (int i = 0; i < Shape::dq_places; i++) await(&notes.dq_empty[group][i], place.parity ^ 1);
            leave_rows(dk, memory::dk_at(group));
            publish_stores();
        } else {
            store(dk, args.dk, job, args.dim);
            store(dv, args.dv, job, args.value_dim);
        }
        return boxes;
    }

    __device__ __forceinline__ void mend_rows(softmax_job job) {
        meet(MEET_GROUP + group, 128); /* the rows are written */
        bool every = job.count < Shape::rows || (Shape::slopes && args.slopes);
        job.begin += group * 64;
        job.count = min(job.count - group * 64, 64);
        mend_keys<T, Shape>(args, job, every, threadIdx.x % 128, 128);
    }
};

#endif
