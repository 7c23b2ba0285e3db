/* launch.cuh - a checked launch, and how a kernel begins. */
#ifndef USP_CUDA_LAUNCH_CUH
#define USP_CUDA_LAUNCH_CUH
#include <utility>

#include "common.cuh"

/* All that the stream had before this kernel is done, and seen, behind here. From sm_90 on blocks begin while what is
 * before them still ends, so every kernel calls this before it touches memory, of which nothing may count as constant
 * (__ldg, __restrict__). (PTX ISA, "griddepcontrol".) */
static __device__ __forceinline__ void begin_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/* The next kernel's blocks may begin from now on, as there is room for them. */
static __device__ __forceinline__ void begin_next_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

/* Whether the code of a kernel that this GPU runs has the wait of begin_kernel: that which a newer GPU's driver makes
 * of compute_80 has none. Asked each time, since GPUs differ. */
template <typename... Parameters> static bool begins_early(void (*kernel)(Parameters...)) {
    cudaFuncAttributes of = {};
    return cudaFuncGetAttributes(&of, kernel) == cudaSuccess && of.ptxVersion >= 90;
}

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
    cudaLaunchAttribute early = {};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = begins_early(kernel);
    config.attrs = &early;
    config.numAttrs = 1;
    if (error == cudaSuccess) {
        error = cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
    }
    if (error == cudaSuccess) return USP_OK;
    cudaGetLastError();
    return usp_fail(USP_DEVICE, "%s did not start: %s", what, cudaGetErrorString(error));
}

#endif
