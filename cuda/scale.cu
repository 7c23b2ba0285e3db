/* scale.cu - numbers times one factor. For sm_80 and up. */
#include "launch.cuh"
#include "launch.h"

static constexpr unsigned threads_per_block = 128;

static __global__ void __launch_bounds__(threads_per_block) scale_floats(float *data, int64_t count, float factor) {
    begin_kernel();
    int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (at < count) data[at] *= factor;
}

usp_status usp_cuda_scale(float *data, int64_t count, float factor, usp_stream stream) {
    if (count == 0) return USP_OK;
    dim3 grid(static_cast<unsigned>((count + threads_per_block - 1) / threads_per_block));
    return usp_cuda_launch("scale", scale_floats, grid, dim3(threads_per_block), 0, stream, data, count, factor);
}
