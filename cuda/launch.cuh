/* launch.cuh - a checked launch. */
#ifndef USP_CUDA_LAUNCH_CUH
#define USP_CUDA_LAUNCH_CUH
#include <utility>

#include "common.cuh"

/* Launches and reports; more than 48 KB of shared memory is asked for. `what` names the kernel in the error. */
template <typename... Parameters, typename... Arguments>
static usp_status usp_cuda_launch(const char *what, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared,
                                  usp_stream stream, Arguments &&...arguments) {
    cudaError_t error = cudaSuccess;
    if (shared > 48 * 1024) {
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    }
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    if (error == cudaSuccess) {
        error = cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
    }
    if (error == cudaSuccess) return USP_OK;
    cudaGetLastError();
    return usp_fail(USP_DEVICE, "%s did not start: %s", what, cudaGetErrorString(error));
}

/* Sets memory to zeros, in the order of the stream. */
static inline usp_status usp_cuda_clear(const char *what, void *memory, size_t bytes, usp_stream stream) {
    cudaError_t error = cudaMemsetAsync(memory, 0, bytes, (cudaStream_t)stream);
    if (error == cudaSuccess) return USP_OK;
    cudaGetLastError();
    return usp_fail(USP_DEVICE, "%s could not clear memory: %s", what, cudaGetErrorString(error));
}

#endif
