/* softmax_wgmma_forward.cu - forward softmax attention on Hopper (sm_90a), 16-bit elements. A block stays and takes job
 * after job of 128 queries: one warp copies tiles, others note and watch, two warpgroups compute. */
#include "softmax_wgmma_forward_group.cuh"
#include "softmax_wgmma_forward_warps.cuh"

/* ---- kernel ------------------------------------------------------------------------------------------------------ */

template <typename T, typename Shape>
static __global__ void __launch_bounds__(Shape::threads, 1)
    softmax_wgmma_forward_kernel(const __grid_constant__ usp_softmax args, const __grid_constant__ forward_maps maps,
                                 const __grid_constant__ soft_cap cap) {
    auto &notes = *shared_at<forward_notes<Shape>>(forward_memory<Shape>::notes);
    if (threadIdx.x == 0) {
        constexpr int warps = 4 * Shape::groups;
        for (int s = 0; s < Shape::slots; s++) {
            begin_arrivals(&notes.job_full[s], 2); /* the copying warp, the noting one */
            begin_arrivals(&notes.job_empty[s], warps);
        }
        for (int s = 0; s < Shape::stages; s++) {
            begin_arrivals(&notes.k_full[s], 1 + Shape::notes_apart); /* as job_full */
            begin_arrivals(&notes.v_full[s], 1);
            begin_arrivals(&notes.k_empty[s], warps);
            begin_arrivals(&notes.v_empty[s], warps + 2); /* and watching ones */
            begin_arrivals(&notes.v_clean[s], 2);         /* watching warps */
        }
        begin_deals(notes.deals, 3); /* the warps beside the copying one */
        publish_arrivals();
        for (int &spoilt : notes.spoilt) spoilt = 0;
    }
    if constexpr (Shape::one_sided) number_keys<T>(notes.number);
    begin_kernel();
    __syncthreads();
    if (threadIdx.x < 128) {
        give_registers<Shape::copying_registers>();
        int warp = uniform(threadIdx.x / 32);
        if (warp == 0)
            copying_warp<T, Shape>(args, maps, notes).run();
        else if (warp == 1)
            noting_warp<T, Shape>(args, notes).run();
        else
            watching_warps<T, Shape>(args, notes).run();
    } else {
        take_registers<Shape::computing_registers>();
        computing_group<T, Shape>(args, maps, cap, notes).run();
    }
}

/* ---- launcher ---------------------------------------------------------------------------------------------------- */

template <typename T, typename shape>
static usp_status start_shape(const usp_gpu *gpu, const usp_softmax *args, usp_stream stream) {
    static_assert(forward_memory<shape>::bytes <= 227 * 1024, "tiles must fit a Hopper GPU");
    forward_maps maps;
    if (count_jobs(*args, false, shape::rows) == 0) return USP_OK;
    USP_TRY(make_map(gpu, *args, args->dtype, false, args->q, args->dim, shape::rows, &maps.q));
    USP_TRY(make_map(gpu, *args, args->dtype, true, args->k, args->dim, shape::step, &maps.k));
    USP_TRY(make_map(gpu, *args, args->dtype, true, args->v, args->value_dim, shape::step, &maps.v));
    maps.has_out = shape::boxes_out && args->last && is_copied(*args, false, args->out);
    if (maps.has_out) USP_TRY(make_map(gpu, *args, args->dtype, false, args->out, args->value_dim, 64, &maps.out));
    return launch_staying("softmax forward", softmax_wgmma_forward_kernel<T, shape>, gpu, *args, shape::threads,
                          forward_memory<shape>::bytes, stream, maps, soft_cap_of(*args));
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
