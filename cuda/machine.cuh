/* machine.cuh - single instructions that C++ has no word for, of every GPU from sm_80 on, each as a verb. */
#ifndef USP_CUDA_MACHINE_CUH
#define USP_CUDA_MACHINE_CUH
#include "common.cuh"

/* ---- shared memory by address ------------------------------------------------------------------------------------ */

static __device__ __forceinline__ uint32_t shared_address(const void *memory) {
    return (uint32_t)__cvta_generic_to_shared(memory);
}

static __device__ __forceinline__ uint4 load_shared(uint32_t address) {
    uint4 x;
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "r"(address)
                 : "memory");
    return x;
}

static __device__ __forceinline__ uint32_t load_shared_word(uint32_t address) {
    uint32_t x;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(address) : "memory");
    return x;
}

static __device__ __forceinline__ void store_shared(uint32_t address, uint32_t x) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(x) : "memory");
}

static __device__ __forceinline__ void store_shared_pair(uint32_t address, float x, float y) {
    asm volatile("st.shared.v2.f32 [%0], {%1,%2};" ::"r"(address), "f"(x), "f"(y) : "memory");
}

/* ---- arithmetic -------------------------------------------------------------------------------------------------- */

static __device__ __forceinline__ float fast_exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

static __device__ __forceinline__ float fast_reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* A pair rounded to T; what is below 0 becomes 0. */
template <typename T> static __device__ __forceinline__ uint32_t pack_positive(float low, float high);

template <> __device__ __forceinline__ uint32_t pack_positive<__nv_bfloat16>(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

template <> __device__ __forceinline__ uint32_t pack_positive<__half>(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.relu.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

/* Of two words, a half for each: all its bits if the number in the word's bits 16 to 30 is below that half of `limits`,
 * else none. Numbers are compared as floats of 16 bits; above 0x7c00 they are none, and below nothing. */
static __device__ __forceinline__ uint32_t halves_below(uint32_t first, uint32_t second, uint32_t limits) {
    uint32_t below;
    asm("{ .reg .b32 pair; prmt.b32 pair, %1, %2, 0x7632; abs.f16x2 pair, pair;\n"
        "set.lt.u32.f16x2 %0, pair, %3; }"
        : "=r"(below)
        : "r"(first), "r"(second), "r"(limits));
    return below;
}

/* taint + 0 * pair: stays 0 as long as pairs are finite. */
template <typename T> static __device__ __forceinline__ uint32_t usp_taint(uint32_t taint, uint32_t pair);

template <> __device__ __forceinline__ uint32_t usp_taint<__nv_bfloat16>(uint32_t taint, uint32_t pair) {
    asm("fma.rn.bf16x2 %0, %1, %2, %0;" : "+r"(taint) : "r"(pair), "r"(0));
    return taint;
}

template <> __device__ __forceinline__ uint32_t usp_taint<__half>(uint32_t taint, uint32_t pair) {
    asm("fma.rn.f16x2 %0, %1, %2, %0;" : "+r"(taint) : "r"(pair), "r"(0));
    return taint;
}

#endif
