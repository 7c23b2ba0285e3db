/* tensor_core.cuh - the instructions of sm_80 and up that move 16-bit tiles and multiply them, one function each.
 * It knows no tile shape beyond one instruction's. */
#ifndef USP_CUDA_TENSOR_CORE_CUH
#define USP_CUDA_TENSOR_CORE_CUH
#include "common.cuh"

static __device__ __forceinline__ uint32_t usp_shared_address(const void *shared)
{
    return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

/* 16 bytes from global to shared memory without a register; zeros if `bytes` is 0 instead of 16. */
static __device__ __forceinline__ void usp_copy_async(uint32_t shared, const void *global, int bytes)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(bytes) : "memory");
}

static __device__ __forceinline__ void usp_copy_commit()
{
    asm volatile("cp.async.commit_group;" ::: "memory");
}

/* Waits until at most `Pending` of this thread's groups are still under way. */
template <int Pending> static __device__ __forceinline__ void usp_copy_wait()
{
    asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

/* Four 8x8 tiles; lane l gives the address of row l % 8 of tile l / 8, and gets two neighbours of row l / 4 of each. */
static __device__ __forceinline__ void usp_load_tiles(uint32_t (&x)[4], uint32_t shared)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(shared)
                 : "memory");
}

/* The same, each tile transposed on the way. */
static __device__ __forceinline__ void usp_load_tiles_transposed(uint32_t (&x)[4], uint32_t shared)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(shared)
                 : "memory");
}

/* c[16, 8] += a[16, 16] b[16, 8]. Lane l holds of c: rows l / 4 and l / 4 + 8, columns 2 (l % 4) and the next. */
template <typename T>
static __device__ __forceinline__ void usp_multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ __forceinline__ void usp_multiply<__nv_bfloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                                            uint32_t b1)
{
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void usp_multiply<__half>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1)
{
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

#endif
