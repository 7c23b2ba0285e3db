/* softmax_wgmma_backward.cu - backward softmax attention on Hopper (sm_90a), 16-bit elements, all five products in one
 * kernel. A block stays and takes job after job of 128 keys: one warp copies, others note and watch, and add dq to fp32
 * sums in memory, in any order or in turns; two warpgroups compute. */
#include "softmax_query_sums.cuh"
#include "softmax_wgmma_backward_group.cuh"

/* ---- kernel ------------------------------------------------------------------------------------------------------ */

template <typename T, typename Shape>
static __global__ void __launch_bounds__(Shape::threads, 1)
    softmax_wgmma_backward_kernel(const __grid_constant__ usp_softmax args, const __grid_constant__ backward_maps maps,
                                  const __grid_constant__ soft_cap cap) {
    auto &notes = *shared_at<backward_notes<Shape>>(backward_memory<Shape>::notes);
    if (threadIdx.x == 0) {
        begin_notes(notes);
        notes.limit = usp_dropout_limit(args.dropout.rate) << 17;
    }
    begin_kernel();
    __syncthreads();
    if (threadIdx.x < 128) {
        give_registers<Shape::copying_registers>();
        run_copying<T, Shape>(args, maps, cap, notes);
    } else {
        take_registers<Shape::computing_registers>();
        backward_group<T, Shape> group(args, cap, maps, notes);
        run_jobs(group);
    }
}

/* ---- launcher ---------------------------------------------------------------------------------------------------- */

template <typename T, typename shape>
static usp_status start_shape(const usp_gpu *gpu, const usp_softmax *args, usp_stream stream) {
    static_assert(backward_memory<shape>::bytes <= 227 * 1024, "tiles must fit a Hopper GPU");
    backward_maps maps;
    if (count_jobs(*args, true, shape::rows) == 0) return USP_OK;
    USP_TRY(make_backward_maps<shape>(gpu, *args, &maps));
    return launch_staying("softmax backward", softmax_wgmma_backward_kernel<T, shape>, gpu, *args, shape::threads,
                          backward_memory<shape>::bytes, stream, maps, soft_cap_of(*args));
}

template <typename T, int DIM>
static usp_status start_extras(const usp_gpu *gpu, const usp_softmax *args, usp_stream stream) {
    return start_with_extras(*args, [&](auto extras) {
        constexpr int step = DIM <= 64 && decltype(extras)::value == 0 ? 128 : 64;
        return start_shape<T, backward_shape<DIM, DIM, step, decltype(extras)::value>>(gpu, args, stream);
    });
}

static usp_status clear_turns(const usp_softmax &args, usp_stream stream) {
    int64_t cells = (args.queries + USP_TURN_ROWS - 1) / USP_TURN_ROWS, turns = cells * args.batch * args.heads;
    return usp_cuda_clear(args.turns, turns, stream);
}

/* Sums of dq begin with the first block of keys, and become dq with the last. */
template <typename T> static usp_status start(const usp_gpu *gpu, const usp_softmax *args, usp_stream stream) {
    if (args->first) USP_TRY((pass_sums<T, false>(gpu, args, stream)));
    if (args->deterministic) USP_TRY(clear_turns(*args, stream));
    if (args->dim <= 64 && args->value_dim <= 64)
        USP_TRY((start_extras<T, 64>(gpu, args, stream)));
    else if (args->dim <= 128 && args->value_dim <= 128)
        USP_TRY((start_extras<T, 128>(gpu, args, stream)));
    else if (args->dim <= 192 && args->value_dim <= 128)
        USP_TRY((start_shape<T, backward_shape<192, 128, 64>>(gpu, args, stream)));
    else
        USP_TRY(usp_softmax_wgmma_wide_backward(gpu, args, stream));
    return args->last ? pass_sums<T, true>(gpu, args, stream) : USP_OK;
}

extern "C" usp_status usp_softmax_wgmma_backward(const usp_gpu *gpu, const usp_softmax *args, usp_stream stream) {
    return args->dtype == USP_F16 ? start<__half>(gpu, args, stream) : start<__nv_bfloat16>(gpu, args, stream);
}
