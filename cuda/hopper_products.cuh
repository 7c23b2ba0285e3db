/* hopper_products.cuh - products of a warpgroup (wgmma, sm_90a): 64 rows by so many columns by 16, in all the widths
 * that kernels use. Sums are d[], in the order of an accumulator (tiles.cuh); operands lie in shared memory, given by
 * descriptors, or the left one in registers. `add`: to what d holds. BY_COLUMNS: the rows of the right operand
 * (LEFT_BY_COLUMNS: the left) are the 16. (PTX ISA, "Asynchronous Warpgroup Level Matrix Multiply-Accumulate".) */
#ifndef USP_CUDA_HOPPER_PRODUCTS_CUH
#define USP_CUDA_HOPPER_PRODUCTS_CUH
#include <type_traits>

#include "common.cuh"

/* ---- lists of sums, as operands and by their numbers ------------------------------------------------------------- */

/* clang-format off */
#define USP_SUMS_16 \
    "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), \
    "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
#define USP_SUMS_32 \
    USP_SUMS_16, \
    "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), \
    "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define USP_SUMS_40 \
    USP_SUMS_32, \
    "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39])
#define USP_SUMS_64 \
    USP_SUMS_32, \
    "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), \
    "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), \
    "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), \
    "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
#define USP_SUMS_128 \
    USP_SUMS_64, \
    "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71]), \
    "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79]), \
    "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83]), "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87]), \
    "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91]), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95]), \
    "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99]), "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), "+f"(d[103]), \
    "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107]), "+f"(d[108]), "+f"(d[109]), "+f"(d[110]), "+f"(d[111]), \
    "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115]), "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), "+f"(d[119]), \
    "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123]), "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), "+f"(d[127])
#define USP_NAMES_16 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define USP_NAMES_32 \
    USP_NAMES_16 \
    ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define USP_NAMES_40 \
    USP_NAMES_32 \
    ", %32, %33, %34, %35, %36, %37, %38, %39"
#define USP_NAMES_64 \
    USP_NAMES_32 \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
    ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define USP_NAMES_128 \
    USP_NAMES_64 \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
    ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95" \
    ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
    ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
/* clang-format on */

/* ---- one product ------------------------------------------------------------------------------------------------- */

template <typename T, bool BY_COLUMNS, bool LEFT_BY_COLUMNS = false>
static __device__ __forceinline__ void issue_product(float (&d)[16], uint64_t a, uint64_t b, bool add) {
    if constexpr (std::is_same_v<T, __half>)
        asm volatile("{ .reg .pred add; setp.ne.b32 add, %18, 0; "
                     "wgmma.mma_async.sync.aligned.m64n32k16.f32.f16.f16 {" USP_NAMES_16
                     "}, %16, %17, add, 1, 1, %20, %19; }"
                     : USP_SUMS_16
                     : "l"(a), "l"(b), "r"((int)add), "n"((int)BY_COLUMNS), "n"((int)LEFT_BY_COLUMNS));
    else
        asm volatile("{ .reg .pred add; setp.ne.b32 add, %18, 0; "
                     "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {" USP_NAMES_16
                     "}, %16, %17, add, 1, 1, %20, %19; }"
                     : USP_SUMS_16
                     : "l"(a), "l"(b), "r"((int)add), "n"((int)BY_COLUMNS), "n"((int)LEFT_BY_COLUMNS));
}

template <typename T, bool BY_COLUMNS, bool LEFT_BY_COLUMNS = false>
static __device__ __forceinline__ void issue_product(float (&d)[32], uint64_t a, uint64_t b, bool add) {
    if constexpr (std::is_same_v<T, __half>)
        asm volatile("{ .reg .pred add; setp.ne.b32 add, %34, 0; "
                     "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {" USP_NAMES_32
                     "}, %32, %33, add, 1, 1, %36, %35; }"
                     : USP_SUMS_32
                     : "l"(a), "l"(b), "r"((int)add), "n"((int)BY_COLUMNS), "n"((int)LEFT_BY_COLUMNS));
    else
        asm volatile("{ .reg .pred add; setp.ne.b32 add, %34, 0; "
                     "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" USP_NAMES_32
                     "}, %32, %33, add, 1, 1, %36, %35; }"
                     : USP_SUMS_32
                     : "l"(a), "l"(b), "r"((int)add), "n"((int)BY_COLUMNS), "n"((int)LEFT_BY_COLUMNS));
}

template <typename T, bool BY_COLUMNS>
static __device__ __forceinline__ void issue_product(float (&d)[32], const uint32_t (&a)[4], uint64_t b, bool add) {
    if constexpr (std::is_same_v<T, __half>)
        asm volatile("{ .reg .pred add; setp.ne.b32 add, %37, 0; "
                     "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {" USP_NAMES_32
                     "}, {%32, %33, %34, %35}, %36, add, 1, 1, %38; }"
                     : USP_SUMS_32
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)add), "n"((int)BY_COLUMNS));
    else
        asm volatile("{ .reg .pred add; setp.ne.b32 add, %37, 0; "
                     "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" USP_NAMES_32
                     "}, {%32, %33, %34, %35}, %36, add, 1, 1, %38; }"
                     : USP_SUMS_32
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)add), "n"((int)BY_COLUMNS));
}

template <typename T, bool BY_COLUMNS, bool LEFT_BY_COLUMNS = false>
static __device__ __forceinline__ void issue_product(float (&d)[40], uint64_t a, uint64_t b, bool add) {
    if constexpr (std::is_same_v<T, __half>)
        asm volatile("{ .reg .pred add; setp.ne.b32 add, %42, 0; "
                     "wgmma.mma_async.sync.aligned.m64n80k16.f32.f16.f16 {" USP_NAMES_40
                     "}, %40, %41, add, 1, 1, %44, %43; }"
                     : USP_SUMS_40
                     : "l"(a), "l"(b), "r"((int)add), "n"((int)BY_COLUMNS), "n"((int)LEFT_BY_COLUMNS));
    else
        asm volatile("{ .reg .pred add; setp.ne.b32 add, %42, 0; "
                     "wgmma.mma_async.sync.aligned.m64n80k16.f32.bf16.bf16 {" USP_NAMES_40
                     "}, %40, %41, add, 1, 1, %44, %43; }"
                     : USP_SUMS_40
                     : "l"(a), "l"(b), "r"((int)add), "n"((int)BY_COLUMNS), "n"((int)LEFT_BY_COLUMNS));
}

template <typename T, bool BY_COLUMNS>
static __device__ __forceinline__ void issue_product(float (&d)[40], const uint32_t (&a)[4], uint64_t b, bool add) {
    if constexpr (std::is_same_v<T, __half>)
        asm volatile("{ .reg .pred add; setp.ne.b32 add, %45, 0; "
                     "wgmma.mma_async.sync.aligned.m64n80k16.f32.f16.f16 {" USP_NAMES_40
                     "}, {%40, %41, %42, %43}, %44, add, 1, 1, %46; }"
                     : USP_SUMS_40
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)add), "n"((int)BY_COLUMNS));
    else
        asm volatile("{ .reg .pred add; setp.ne.b32 add, %45, 0; "
                     "wgmma.mma_async.sync.aligned.m64n80k16.f32.bf16.bf16 {" USP_NAMES_40
                     "}, {%40, %41, %42, %43}, %44, add, 1, 1, %46; }"
                     : USP_SUMS_40
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)add), "n"((int)BY_COLUMNS));
}

template <typename T, bool BY_COLUMNS, bool LEFT_BY_COLUMNS = false>
static __device__ __forceinline__ void issue_product(float (&d)[64], uint64_t a, uint64_t b, bool add) {
    if constexpr (std::is_same_v<T, __half>)
        asm volatile("{ .reg .pred add; setp.ne.b32 add, %66, 0; "
                     "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {" USP_NAMES_64
                     "}, %64, %65, add, 1, 1, %68, %67; }"
                     : USP_SUMS_64
                     : "l"(a), "l"(b), "r"((int)add), "n"((int)BY_COLUMNS), "n"((int)LEFT_BY_COLUMNS));
    else
        asm volatile("{ .reg .pred add; setp.ne.b32 add, %66, 0; "
                     "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" USP_NAMES_64
                     "}, %64, %65, add, 1, 1, %68, %67; }"
                     : USP_SUMS_64
                     : "l"(a), "l"(b), "r"((int)add), "n"((int)BY_COLUMNS), "n"((int)LEFT_BY_COLUMNS));
}

template <typename T, bool BY_COLUMNS>
static __device__ __forceinline__ void issue_product(float (&d)[64], const uint32_t (&a)[4], uint64_t b, bool add) {
    if constexpr (std::is_same_v<T, __half>)
        asm volatile("{ .reg .pred add; setp.ne.b32 add, %69, 0; "
                     "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {" USP_NAMES_64
                     "}, {%64, %65, %66, %67}, %68, add, 1, 1, %70; }"
                     : USP_SUMS_64
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)add), "n"((int)BY_COLUMNS));
    else
        asm volatile("{ .reg .pred add; setp.ne.b32 add, %69, 0; "
                     "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" USP_NAMES_64
                     "}, {%64, %65, %66, %67}, %68, add, 1, 1, %70; }"
                     : USP_SUMS_64
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)add), "n"((int)BY_COLUMNS));
}

template <typename T, bool BY_COLUMNS, bool LEFT_BY_COLUMNS = false>
static __device__ __forceinline__ void issue_product(float (&d)[128], uint64_t a, uint64_t b, bool add) {
    if constexpr (std::is_same_v<T, __half>)
        asm volatile("{ .reg .pred add; setp.ne.b32 add, %130, 0; "
                     "wgmma.mma_async.sync.aligned.m64n256k16.f32.f16.f16 {" USP_NAMES_128
                     "}, %128, %129, add, 1, 1, %132, %131; }"
                     : USP_SUMS_128
                     : "l"(a), "l"(b), "r"((int)add), "n"((int)BY_COLUMNS), "n"((int)LEFT_BY_COLUMNS));
    else
        asm volatile("{ .reg .pred add; setp.ne.b32 add, %130, 0; "
                     "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {" USP_NAMES_128
                     "}, %128, %129, add, 1, 1, %132, %131; }"
                     : USP_SUMS_128
                     : "l"(a), "l"(b), "r"((int)add), "n"((int)BY_COLUMNS), "n"((int)LEFT_BY_COLUMNS));
}

template <typename T, bool BY_COLUMNS>
static __device__ __forceinline__ void issue_product(float (&d)[128], const uint32_t (&a)[4], uint64_t b, bool add) {
    if constexpr (std::is_same_v<T, __half>)
        asm volatile("{ .reg .pred add; setp.ne.b32 add, %133, 0; "
                     "wgmma.mma_async.sync.aligned.m64n256k16.f32.f16.f16 {" USP_NAMES_128
                     "}, {%128, %129, %130, %131}, %132, add, 1, 1, %134; }"
                     : USP_SUMS_128
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)add), "n"((int)BY_COLUMNS));
    else
        asm volatile("{ .reg .pred add; setp.ne.b32 add, %133, 0; "
                     "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {" USP_NAMES_128
                     "}, {%128, %129, %130, %131}, %132, add, 1, 1, %134; }"
                     : USP_SUMS_128
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)add), "n"((int)BY_COLUMNS));
}

#endif
