/* clear.cu - sets numbers to 0. For sm_80 and up. */
#include "launch.cuh"
#include "launch.h"

static constexpr unsigned threads_per_block = 256;

static __global__ void __launch_bounds__(threads_per_block) clear_words(int *words, int64_t count) {
    begin_next_kernel();
    begin_kernel();
    int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (at < count) words[at] = 0;
}

usp_status usp_cuda_clear(int *words, int64_t count, usp_stream stream) {
    if (count == 0) return USP_OK;
    dim3 grid(static_cast<unsigned>((count + threads_per_block - 1) / threads_per_block));
    return usp_cuda_launch("clear", clear_words, grid, dim3(threads_per_block), 0, stream, words, count);
}
