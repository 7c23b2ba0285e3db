/* common.cuh - what all kernels share: element types, rows of a tensor, sums of a warp.
 * It holds no kernel and knows no attention kind. */
#ifndef USP_CUDA_COMMON_CUH
#define USP_CUDA_COMMON_CUH
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

extern "C" {
#include "device.h"
#include "error.h"
}

/* ---- elements ---------------------------------------------------------------------------------------------------- */

static __device__ __forceinline__ float usp_to_float(float x) {
    return x;
}
static __device__ __forceinline__ float usp_to_float(__half x) {
    return __half2float(x);
}
static __device__ __forceinline__ float usp_to_float(__nv_bfloat16 x) {
    return __bfloat162float(x);
}

/* Round to nearest even. */
template <typename T> static __device__ __forceinline__ T usp_from_float(float x);
template <> __device__ __forceinline__ float usp_from_float<float>(float x) {
    return x;
}
template <> __device__ __forceinline__ __half usp_from_float<__half>(float x) {
    return __float2half_rn(x);
}
template <> __device__ __forceinline__ __nv_bfloat16 usp_from_float<__nv_bfloat16>(float x) {
    return __float2bfloat16_rn(x);
}

/* Two neighbouring elements in one register, the first one in the low half. */
template <typename T> static __device__ __forceinline__ uint32_t usp_pack(float low, float high);
template <> __device__ __forceinline__ uint32_t usp_pack<__half>(float low, float high) {
    __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<uint32_t *>(&pair);
}
template <> __device__ __forceinline__ uint32_t usp_pack<__nv_bfloat16>(float low, float high) {
    __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<uint32_t *>(&pair);
}
template <typename T> static __device__ __forceinline__ float2 usp_unpack(uint32_t pair);
template <> __device__ __forceinline__ float2 usp_unpack<__half>(uint32_t pair) {
    return __half22float2(*reinterpret_cast<__half2 *>(&pair));
}
template <> __device__ __forceinline__ float2 usp_unpack<__nv_bfloat16>(uint32_t pair) {
    return __bfloat1622float2(*reinterpret_cast<__nv_bfloat162 *>(&pair));
}

/* ---- rows -------------------------------------------------------------------------------------------------------- */

/* The `dim` elements of one token of one head. */
template <typename T>
static __host__ __device__ __forceinline__ T *usp_row(const usp_tensor &x, int64_t token, int64_t batch, int64_t head) {
    return static_cast<T *>(x.data) + token * x.stride_token + batch * x.stride_batch + head * x.stride_head;
}

/* The same where the element type is known only at run time. */
static __host__ __device__ __forceinline__ char *usp_row_bytes(const usp_tensor &x, usp_dtype dtype, int64_t token,
                                                               int64_t batch, int64_t head) {
    int64_t element = dtype == USP_F32 ? 4 : 2;
    return static_cast<char *>(x.data) +
           element * (token * x.stride_token + batch * x.stride_batch + head * x.stride_head);
}

static __device__ __forceinline__ int usp_mapped_head(usp_head_map map, int head) {
    return (head + map.offset) / map.group;
}

/* Does every row of the tensor begin on a 16-byte boundary? */
static inline bool usp_rows_aligned(const usp_tensor &x, size_t element) {
    uint64_t bits = static_cast<uint64_t>(x.stride_token | x.stride_batch | x.stride_head) * element;
    return ((bits | reinterpret_cast<uint64_t>(x.data)) & 15) == 0;
}

/* Over the lanes of a warp. */
static __device__ __forceinline__ float usp_warp_sum(float x) {
    for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
    return x;
}

/* ---- choice ------------------------------------------------------------------------------------------------------ */

/* The kernel among three that serves a dtype. */
template <typename Kernel> static Kernel usp_of_dtype(usp_dtype dtype, Kernel f32, Kernel f16, Kernel bf16) {
    return dtype == USP_F32 ? f32 : dtype == USP_F16 ? f16 : bf16;
}

#endif
