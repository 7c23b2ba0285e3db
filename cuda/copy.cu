/* copy.cu - rows of one tensor into another, with conversion between element types or addition to fp32 sums.
 * Any strides; rows that both begin on 16 bytes and keep their type move 16 bytes at a time. For sm_80 and up. */
#include "common.cuh"
#include "launch.h"

static constexpr unsigned threads_per_block = 256, most_blocks = 132 * 16;

/* Unit x of the copy is `column` of a row: columns run fastest, then heads, batches and tokens. */
struct copy_unit {
    unsigned token, batch, head, column;
};

static __device__ __forceinline__ copy_unit find_unit(const usp_copy &copy, unsigned x, unsigned columns) {
    copy_unit unit;
    unsigned row = x / columns;
    unit.column = x - row * columns;
    unit.head = row % copy.heads;
    row /= copy.heads;
    unit.batch = row % copy.batch;
    unit.token = row / copy.batch;
    return unit;
}

/* A row is `columns` vectors. */
static __global__ void __launch_bounds__(threads_per_block)
    copy_vectors(usp_copy copy, unsigned units, unsigned columns) {
    for (unsigned x = blockIdx.x * blockDim.x + threadIdx.x; x < units; x += gridDim.x * blockDim.x) {
        copy_unit unit = find_unit(copy, x, columns);
        size_t skip = unit.column * sizeof(uint4);
        const char *from = usp_row_bytes(copy.from, copy.from_dtype, unit.token, unit.batch, unit.head) + skip;
        char *to = usp_row_bytes(copy.to, copy.to_dtype, unit.token, unit.batch, unit.head) + skip;
        *reinterpret_cast<uint4 *>(to) = *reinterpret_cast<const uint4 *>(from);
    }
}

template <typename From, typename To>
static __global__ void __launch_bounds__(threads_per_block)
    copy_elements(usp_copy copy, unsigned units, unsigned columns) {
    for (unsigned x = blockIdx.x * blockDim.x + threadIdx.x; x < units; x += gridDim.x * blockDim.x) {
        copy_unit unit = find_unit(copy, x, columns);
        float value = usp_to_float(usp_row<From>(copy.from, unit.token, unit.batch, unit.head)[unit.column]);
        To *to = usp_row<To>(copy.to, unit.token, unit.batch, unit.head) + unit.column;
        *to = usp_from_float<To>(copy.accumulate ? usp_to_float(*to) + value : value);
    }
}

/* ---- launchers --------------------------------------------------------------------------------------------------- */

typedef void (*copy_kernel)(usp_copy, unsigned units, unsigned columns);

template <typename From> static copy_kernel element_kernel(usp_dtype to) {
    if (to == USP_F32) return copy_elements<From, float>;
    if (to == USP_F16) return copy_elements<From, __half>;
    return copy_elements<From, __nv_bfloat16>;
}

static copy_kernel choose_kernel(const usp_copy *copy, bool vectors) {
    if (vectors) return copy_vectors;
    if (copy->from_dtype == USP_F32) return element_kernel<float>(copy->to_dtype);
    if (copy->from_dtype == USP_F16) return element_kernel<__half>(copy->to_dtype);
    return element_kernel<__nv_bfloat16>(copy->to_dtype);
}

static bool whole_vectors(const usp_copy *copy) {
    size_t element = usp_dtype_size(copy->from_dtype);
    return copy->from_dtype == copy->to_dtype && !copy->accumulate && copy->dim * element % sizeof(uint4) == 0 &&
           usp_rows_aligned(copy->from, element) && usp_rows_aligned(copy->to, element);
}

static int64_t units_of_row(const usp_copy *copy, bool vectors) {
    return vectors ? copy->dim * usp_dtype_size(copy->from_dtype) / sizeof(uint4) : copy->dim;
}

static usp_status launch(const usp_copy *copy, bool vectors, usp_stream stream) {
    int64_t columns = units_of_row(copy, vectors);
    unsigned units = static_cast<unsigned>(columns * copy->heads * copy->batch * copy->tokens);
    unsigned blocks = (units + threads_per_block - 1) / threads_per_block;
    return usp_cuda_launch("copy_rows", choose_kernel(copy, vectors), dim3(blocks < most_blocks ? blocks : most_blocks),
                           dim3(threads_per_block), 0, stream, *copy, units, static_cast<unsigned>(columns));
}

/* ---- parts ------------------------------------------------------------------------------------------------------- */

/* How many of `extent` pieces of `units` each make up `most` units: one at least. */
static int64_t pieces(int64_t most, int64_t units, int64_t extent) {
    int64_t count = most / units;
    return count < 1 ? 1 : count < extent ? count : extent;
}

static int64_t least(int64_t a, int64_t b) {
    return a < b ? a : b;
}

/* The part from (token, batch, head) on that is as large as `size`, or what is left of it. */
static usp_copy cut(const usp_copy *copy, const usp_copy *size, int64_t token, int batch, int head) {
    usp_copy part = *copy;
    part.tokens = least(size->tokens, copy->tokens - token);
    part.batch = static_cast<int>(least(size->batch, copy->batch - batch));
    part.heads = static_cast<int>(least(size->heads, copy->heads - head));
    part.from.data = usp_row_bytes(copy->from, copy->from_dtype, token, batch, head);
    part.to.data = usp_row_bytes(copy->to, copy->to_dtype, token, batch, head);
    return part;
}

usp_status usp_cuda_copy_rows(const usp_copy *copy, int64_t most, usp_stream stream) {
    bool vectors = whole_vectors(copy);
    int64_t units = units_of_row(copy, vectors);
    usp_copy size = *copy;
    if (units == 0 || copy->heads == 0 || copy->batch == 0) return USP_OK;
    size.heads = static_cast<int>(pieces(most, units, copy->heads));
    size.batch = static_cast<int>(pieces(most, units * size.heads, copy->batch));
    size.tokens = pieces(most, units * size.heads * size.batch, copy->tokens);
    for (int64_t token = 0; token < copy->tokens; token += size.tokens) {
        for (int batch = 0; batch < copy->batch; batch += size.batch) {
            for (int head = 0; head < copy->heads; head += size.heads) {
                usp_copy part = cut(copy, &size, token, batch, head);
                USP_TRY(launch(&part, vectors, stream));
            }
        }
    }
    return USP_OK;
}
