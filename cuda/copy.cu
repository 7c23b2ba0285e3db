/* copy.cu - rows of tensors into others, with conversion between element types or addition to fp32 sums. Copies that
 * take the same kernel share a launch. Any strides and row maps; where both rows begin on 16 bytes, 16 bytes move at a
 * time if they keep their type, else four elements. For sm_80 and up. */
#include "launch.cuh"
#include "launch.h"
#include <type_traits>

static constexpr unsigned threads_per_block = 256, most_blocks = 132 * 16;

/* Copies of one launch; a row of copy i is `columns[i]` units, elements or 16-byte vectors. */
struct copy_list {
    usp_copy copy[16];
    unsigned units[16], columns[16];
    int count;
};
static_assert(sizeof(copy_list) <= 4096, "what a launch takes");

/* Where unit x of a copy is: columns run fastest, then heads, batches and tokens. */
struct copy_unit {
    int64_t from_row, to_row;
    unsigned batch, head, column;
};

static __device__ __forceinline__ copy_unit find_unit(const usp_copy &copy, unsigned x, unsigned columns) {
    copy_unit unit;
    unsigned row = x / columns;
    unit.column = x - row * columns;
    unit.head = row % copy.heads;
    row /= copy.heads;
    unit.batch = row % copy.batch;
    row /= copy.batch;
    unit.from_row = copy.from_row ? copy.from_row[row] : row;
    unit.to_row = copy.to_row ? copy.to_row[row] : row;
    return unit;
}

/* Calls move(copy, unit) for every unit of copy blockIdx.y. */
template <typename Move> static __device__ __forceinline__ void for_units(const copy_list &list, const Move &move) {
    const usp_copy &copy = list.copy[blockIdx.y];
    unsigned units = list.units[blockIdx.y], columns = list.columns[blockIdx.y];
    for (unsigned x = blockIdx.x * blockDim.x + threadIdx.x; x < units; x += gridDim.x * blockDim.x)
        move(copy, find_unit(copy, x, columns));
}

static __global__ void __launch_bounds__(threads_per_block) copy_vectors(const __grid_constant__ copy_list list) {
    begin_kernel();
    for_units(list, [](const usp_copy &copy, const copy_unit &unit) {
        size_t skip = unit.column * sizeof(uint4);
        const char *from = usp_row_bytes(copy.from, copy.from_dtype, unit.from_row, unit.batch, unit.head) + skip;
        char *to = usp_row_bytes(copy.to, copy.to_dtype, unit.to_row, unit.batch, unit.head) + skip;
        *reinterpret_cast<uint4 *>(to) = *reinterpret_cast<const uint4 *>(from);
    });
}

/* What keeps its type keeps its bits, of any NaN too. */
template <typename To, typename From>
static __device__ __forceinline__ To converted(From from, const To &to, int adds) {
    if constexpr (std::is_same_v<From, To>)
        if (!adds) return from;
    float value = usp_to_float(from);
    return usp_from_float<To>(adds ? usp_to_float(to) + value : value);
}

template <typename T, int n> struct alignas(n * sizeof(T)) element_pack { T x[n]; };

/* n elements at a time. */
template <typename From, typename To, int n>
static __global__ void __launch_bounds__(threads_per_block) copy_elements(const __grid_constant__ copy_list list) {
    typedef element_pack<From, n> from_pack;
    typedef element_pack<To, n> to_pack;
    begin_kernel();
    for_units(list, [](const usp_copy &copy, const copy_unit &unit) {
        const From *from = usp_row<From>(copy.from, unit.from_row, unit.batch, unit.head) + unit.column * n;
        To *to = usp_row<To>(copy.to, unit.to_row, unit.batch, unit.head) + unit.column * n;
        from_pack value = *reinterpret_cast<const from_pack *>(from);
        to_pack sum = {};
        if (copy.accumulate) sum = *reinterpret_cast<const to_pack *>(to);
        for (int i = 0; i < n; i++) sum.x[i] = converted<To>(value.x[i], sum.x[i], copy.accumulate);
        *reinterpret_cast<to_pack *>(to) = sum;
    });
}

/* ---- launches ---------------------------------------------------------------------------------------------------- */

typedef void (*copy_kernel)(copy_list);

/* What moves at a time. */
enum copy_width { one_element, four_elements, sixteen_bytes };

template <typename From, int n> static copy_kernel element_kernel(usp_dtype to) {
    if (to == USP_F32) return copy_elements<From, float, n>;
    if (to == USP_F16) return copy_elements<From, __half, n>;
    return copy_elements<From, __nv_bfloat16, n>;
}

template <int n> static copy_kernel kernel_of(const usp_copy *copy) {
    if (copy->from_dtype == USP_F32) return element_kernel<float, n>(copy->to_dtype);
    if (copy->from_dtype == USP_F16) return element_kernel<__half, n>(copy->to_dtype);
    return element_kernel<__nv_bfloat16, n>(copy->to_dtype);
}

static copy_kernel choose_kernel(const usp_copy *copy, copy_width width) {
    if (width == sixteen_bytes) return copy_vectors;
    return width == four_elements ? kernel_of<4>(copy) : kernel_of<1>(copy);
}

static copy_width width_of(const usp_copy *copy) {
    size_t from = usp_dtype_size(copy->from_dtype), to = usp_dtype_size(copy->to_dtype);
    if (!usp_rows_aligned(copy->from, from) || !usp_rows_aligned(copy->to, to)) return one_element;
    if (copy->from_dtype == copy->to_dtype && !copy->accumulate && copy->dim * from % sizeof(uint4) == 0)
        return sixteen_bytes;
    return copy->dim % 4 == 0 ? four_elements : one_element;
}

static int64_t units_of_row(const usp_copy *copy, copy_width width) {
    if (width == sixteen_bytes) return copy->dim * usp_dtype_size(copy->from_dtype) / sizeof(uint4);
    return width == four_elements ? copy->dim / 4 : copy->dim;
}

/* What is about to be launched: copies that take one kernel. */
struct copy_launch {
    copy_list list;
    copy_kernel kernel;
    usp_stream stream;
};

/* Every copy has as many blocks as the largest one needs; those that find nothing to do return at once. */
static usp_status flush(copy_launch *launch) {
    copy_list &list = launch->list;
    unsigned most = 0, share = most_blocks / (list.count > 0 ? list.count : 1);
    for (int i = 0; i < list.count; i++) most = list.units[i] > most ? list.units[i] : most;
    if (most == 0) return USP_OK;
    unsigned blocks = (most + threads_per_block - 1) / threads_per_block;
    usp_status status = usp_cuda_launch("copy_rows", launch->kernel, dim3(blocks < share ? blocks : share, list.count),
                                        dim3(threads_per_block), 0, launch->stream, list);
    list.count = 0;
    return status;
}

/* Puts a copy of less than 2^32 units into the next launch; what is there already goes first if it does not fit. */
static usp_status push(copy_launch *launch, const usp_copy *copy, copy_width width) {
    copy_list &list = launch->list;
    copy_kernel kernel = choose_kernel(copy, width);
    if (list.count == sizeof list.copy / sizeof *list.copy || kernel != launch->kernel) USP_TRY(flush(launch));
    int64_t columns = units_of_row(copy, width);
    launch->kernel = kernel;
    list.copy[list.count] = *copy;
    list.columns[list.count] = static_cast<unsigned>(columns);
    list.units[list.count++] = static_cast<unsigned>(columns * copy->heads * copy->batch * copy->tokens);
    return USP_OK;
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
    part.from.data = usp_row_bytes(copy->from, copy->from_dtype, copy->from_row ? 0 : token, batch, head);
    part.to.data = usp_row_bytes(copy->to, copy->to_dtype, copy->to_row ? 0 : token, batch, head);
    if (copy->from_row) part.from_row += token;
    if (copy->to_row) part.to_row += token;
    return part;
}

/* A copy in parts of `most` units. */
static usp_status push_parts(copy_launch *launch, const usp_copy *copy, int64_t most) {
    copy_width width = width_of(copy);
    int64_t units = units_of_row(copy, width);
    usp_copy size = *copy;
    if (units == 0 || copy->heads == 0 || copy->batch == 0) return USP_OK;
    size.heads = static_cast<int>(pieces(most, units, copy->heads));
    size.batch = static_cast<int>(pieces(most, units * size.heads, copy->batch));
    size.tokens = pieces(most, units * size.heads * size.batch, copy->tokens);
    for (int64_t token = 0; token < copy->tokens; token += size.tokens) {
        for (int batch = 0; batch < copy->batch; batch += size.batch) {
            for (int head = 0; head < copy->heads; head += size.heads) {
                usp_copy part = cut(copy, &size, token, batch, head);
                USP_TRY(push(launch, &part, width));
            }
        }
    }
    return USP_OK;
}

usp_status usp_cuda_copy_rows(const usp_copy *copies, int count, int64_t most, usp_stream stream) {
    copy_launch launch = {};
    launch.stream = stream;
    for (int i = 0; i < count; i++) USP_TRY(push_parts(&launch, &copies[i], most));
    return flush(&launch);
}
