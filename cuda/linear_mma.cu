/* linear_mma.cu - linear attention on tensor cores (mma.sync, sm_80 and up), 16-bit elements, dims 64 and 128, rows on
 * 16 bytes. The kernels and their launchers; linear_mma.cuh says how they work. */
#include "linear_mma.cuh"

/* ---- kernels ----------------------------------------------------------------------------------------------------- */

/* A barrier must follow before the decays are read. */
static __device__ __forceinline__ work find_work(const usp_linear &linear, float *decays, bool decaying) {
    usp_place place = usp_find_place(linear);
    float log2_decay = decaying ? usp_log2_decay(linear.log_decay, place.head) : 0;
    if (threadIdx.x <= rows) decays[threadIdx.x] = usp_decay(log2_decay, threadIdx.x);
    return {place, usp_block_time(linear, linear.block[place.block]), log2_decay, decays};
}

/* A warp for every 16 values; two thread blocks fit a multiprocessor of sm_90. */
static constexpr int threads_per_value = 2;

template <typename T, int DIM, int VALUE>
static __global__ void __launch_bounds__(threads_per_value *VALUE, 2)
    totals(const __grid_constant__ usp_linear linear) {
    begin_kernel();
    extern __shared__ __align__(1024) unsigned char shared[];
    constexpr int stage = rows * (DIM + VALUE) * 2, threads = threads_per_value * VALUE;
    uint32_t base = static_cast<uint32_t>(__cvta_generic_to_shared(shared)) + table_bytes;
    work work = find_work(linear, reinterpret_cast<float *>(shared), true);
    work.time = usp_leaving_time(linear, work.time);
    int k_head = usp_mapped_head(linear.k_map, work.place.head);
    int v_head = usp_mapped_head(linear.v_map, work.place.head);
    state_sums<DIM> state = {};
    for (int first = -rows; first < work.time.count; first += rows) { /* the first turn only fetches */
        int next = first + rows;
        usp_fetched();
        __syncthreads();
        if (next < work.time.count) {
            uint32_t to = base + next / rows % 2 * stage;
            fetch<T, DIM, threads>({to}, linear.k, work, next, k_head);
            fetch<T, VALUE, threads>({to + rows * DIM * 2}, linear.v, work, next, v_head);
        }
        if (first < 0) continue;
        uint32_t from = base + first / rows % 2 * stage;
        int last = work.time.count - 1 - first + linear.shift, near = min(last, rows);
        float factor = usp_decay(work.log2_decay, last - near);
        if (work.log2_decay == 0) /* weights of 1 leave nothing in the low parts */
            add_rows<T, DIM, VALUE, false>(state, {from}, {from + rows * DIM * 2}, work.decays, near, factor);
        else
            add_rows<T, DIM, VALUE, true>(state, {from}, {from + rows * DIM * 2}, work.decays, near, factor);
    }
    float *to = usp_state(linear, work.place.block, work.place);
    for_state<DIM>(state, linear, [=](float &x, int index) { to[index] = x; });
}

/* DOCUMENTS: there are begins and ends. */
template <typename T, int DIM, int VALUE, bool DOCUMENTS>
static __global__ void __launch_bounds__(threads_per_value *VALUE, 2)
    output(const __grid_constant__ usp_linear linear) {
    begin_kernel();
    extern __shared__ __align__(1024) unsigned char shared[];
    constexpr int q_bytes = rows * DIM * 2, stage = rows * (2 * DIM + VALUE) * 2, threads = threads_per_value * VALUE;
    uint32_t base = static_cast<uint32_t>(__cvta_generic_to_shared(shared)) + table_bytes + pair_bytes;
    int warp = threadIdx.x / 32;
    work work = find_work(linear, reinterpret_cast<float *>(shared), true);
    int q_head = usp_mapped_head(linear.q_map, work.place.head);
    int k_head = usp_mapped_head(linear.k_map, work.place.head);
    int v_head = usp_mapped_head(linear.v_map, work.place.head);
    int &spoilt = reinterpret_cast<int *>(shared)[spare_words + warp]; /* here, since registers are dear */
    spoilt = 0;
    int *begins = reinterpret_cast<int *>(shared) + begin_words;
    state_sums<DIM> state;
    for (int first = -rows; first < work.time.count; first += rows) {
        int next = first + rows;
        usp_fetched();
        __syncthreads();
        if (next < work.time.count) {
            uint32_t to = base + next / rows % 2 * stage;
            fetch<T, DIM, threads>({to}, linear.q, work, next, q_head);
            fetch<T, DIM, threads>({to + q_bytes}, linear.k, work, next, k_head);
            fetch<T, VALUE, threads>({to + 2 * q_bytes}, linear.v, work, next, v_head);
            if (DOCUMENTS) find_begins(begins + next / rows % 2 * rows, linear, work, next);
        }
        if (first < 0) {
            const float *from = usp_state(linear, work.place.block, work.place);
            float decay = usp_decay(work.log2_decay, linear.shift);
            for_state<DIM>(state, linear, [=](float &x, int index) { x = decay * from[index]; });
            continue;
        }
        uint32_t from = base + first / rows % 2 * stage;
        usp_shared_rows<DIM> q = {from}, k = {from + q_bytes};
        usp_shared_rows<VALUE> v = {from + 2 * q_bytes};
        const int *begin = begins + first / rows % 2 * rows;
        for (int half = warp / row_blocks; half <= warp % row_blocks / 2; half += threads / 32 / row_blocks)
            make_pairs<T, DIM, DOCUMENTS>(shared + table_bytes, q, k, warp % row_blocks, half, linear.scale,
                                          work.decays, begin);
        out_sums out;
        float unit = state_unit<T, DIM>(state);
        for (bool again = false;; again = true) { /* again: without what is not finite in v, for mend to bring */
            multiply_state<T, DIM>(out, q, state, 1 / unit);
            weigh_rows(out, linear.scale * unit, work.decays);
            if (DOCUMENTS) drop_rows(out, [=](int row) { return begin[row] < 0; });
            if (!again) __syncthreads();
            if (!add_pairs<T, VALUE>(out, {base - pair_bytes}, v)) break;
            clear_columns<T>(v);
            spoilt = 1;
        }
        put_rows<T>(out, linear, work, first);
        if (next >= work.time.count) break;
        float decay = work.decays[rows];
        bool anew = DOCUMENTS && begin[rows - 1] >= 0;
        for_state<DIM>(state, linear, [=](float &x, int) { x = anew ? 0 : x * decay; });
        if (anew) { /* only the last document goes on; v is finite here, so that rows of 0 in k are enough */
            clear_rows<DIM, threads>(k, begin[rows - 1]);
            __syncthreads();
        }
        add_rows<T, DIM, VALUE, false>(state, k, v, work.decays, rows, 1);
    }
    if (spoilt) mend<T>(linear);
}

template <typename T, int DIM, int VALUE>
static __global__ void __launch_bounds__(threads_per_value *VALUE, 2) apply(const __grid_constant__ usp_linear linear) {
    begin_kernel();
    extern __shared__ __align__(1024) unsigned char shared[];
    constexpr int stage = rows * DIM * 2, threads = threads_per_value * VALUE;
    uint32_t base = static_cast<uint32_t>(__cvta_generic_to_shared(shared)) + table_bytes;
    work work = find_work(linear, reinterpret_cast<float *>(shared), linear.causal);
    const usp_block &block = linear.block[work.place.block];
    int q_head = usp_mapped_head(linear.q_map, work.place.head);
    int before = usp_chunk_rows_before(linear, block), entered = usp_entered_rows(linear, work.time, before);
    state_sums<DIM> state;
    float unit = 1;
    for (int first = -rows; first < work.time.count; first += rows) {
        int next = first + rows;
        usp_fetched();
        __syncthreads();
        if (next < work.time.count) {
            fetch<T, DIM, threads>({base + next / rows % 2 * stage}, linear.q, work, next, q_head);
        }
        if (first < 0) {
            const float *from = usp_state(linear, block.chunk, work.place);
            for_state<DIM>(state, linear, [=](float &x, int index) { x = from[index]; });
            unit = state_unit<T, DIM>(state);
            continue;
        }
        out_sums out;
        multiply_state<T, DIM>(out, {base + first / rows % 2 * stage}, state, 1 / unit);
        weigh_rows(out, linear.scale * unit * usp_decay(work.log2_decay, linear.shift + before + first), work.decays);
        if (entered < work.time.count) drop_rows(out, [=](int row) { return first + row < entered; });
        put_rows<T>(out, linear, work, first);
    }
}

/* ---- launchers --------------------------------------------------------------------------------------------------- */

typedef void (*linear_kernel)(usp_linear);

template <typename T, int DIM, int VALUE>
static linear_kernel choose_call(const usp_linear *linear, usp_linear_call call) {
    if (call == USP_CALL_TOTALS) return totals<T, DIM, VALUE>;
    if (call == USP_CALL_APPLY) return apply<T, DIM, VALUE>;
    return linear->begins ? output<T, DIM, VALUE, true> : output<T, DIM, VALUE, false>;
}

template <typename T> static linear_kernel choose_dims(const usp_linear *linear, usp_linear_call call) {
    bool narrow = linear->value_dim == 64;
    if (linear->dim == 64) return narrow ? choose_call<T, 64, 64>(linear, call) : choose_call<T, 64, 128>(linear, call);
    return narrow ? choose_call<T, 128, 64>(linear, call) : choose_call<T, 128, 128>(linear, call);
}

static size_t shared_bytes(usp_linear_call call, int dim, int value_dim) {
    size_t columns[] = {static_cast<size_t>(dim + value_dim), static_cast<size_t>(2 * dim + value_dim),
                        static_cast<size_t>(dim)};
    return table_bytes + 2 * rows * columns[call] * 2 + (call == USP_CALL_OUTPUT ? pair_bytes : 0);
}

static usp_status launch(const char *what, const usp_linear *linear, usp_linear_call call, usp_stream stream) {
    linear_kernel kernel =
        linear->dtype == USP_F16 ? choose_dims<__half>(linear, call) : choose_dims<__nv_bfloat16>(linear, call);
    return usp_cuda_launch(what, kernel, usp_place_grid(linear, 1), dim3(threads_per_value * linear->value_dim),
                           shared_bytes(call, linear->dim, linear->value_dim), stream, *linear);
}

static usp_status launch_totals(const usp_gpu *, const usp_linear *linear, usp_stream stream) {
    return launch("linear_totals", linear, USP_CALL_TOTALS, stream);
}

static usp_status launch_output(const usp_gpu *, const usp_linear *linear, usp_stream stream) {
    return launch("linear_output", linear, USP_CALL_OUTPUT, stream);
}

static usp_status launch_apply(const usp_gpu *, const usp_linear *linear, usp_stream stream) {
    return launch("linear_apply", linear, USP_CALL_APPLY, stream);
}

/* ---- the family -------------------------------------------------------------------------------------------------- */

static size_t most_shared(int dim, int value_dim) {
    return shared_bytes(USP_CALL_OUTPUT, dim, value_dim);
}

static bool whole_dim(int dim) {
    return dim == 64 || dim == 128;
}

static int fits(const usp_gpu *, const usp_linear *linear, usp_linear_call call) {
    bool reads_q = call != USP_CALL_TOTALS, reads_kv = call != USP_CALL_APPLY, writes = reads_q && linear->last;
    return linear->dtype != USP_F32 && whole_dim(linear->dim) && whole_dim(linear->value_dim) &&
           (!reads_q || usp_rows_aligned(linear->q, 2)) && (!writes || usp_rows_aligned(linear->out, 2)) &&
           (!reads_kv || (usp_rows_aligned(linear->k, 2) && usp_rows_aligned(linear->v, 2))) &&
           (reinterpret_cast<uintptr_t>(linear->acc) & 7) == 0;
}

extern "C" const usp_linear_family usp_linear_mma = {
    USP_SM_80, most_shared, fits, {launch_totals, launch_output, launch_apply}};
