/* tensor_file.c - walks over the elements of an array in the order in which they shall lie.
 * All orders of axes are their own inverse, so reading and writing are one walk. */
#include "tensor_file.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* The axis that comes i-th in the other order. */
static const int axes[][4] = {
    [USP_ORDER_BSHD] = {0, 1, 2, 3}, [USP_ORDER_BHSD] = {0, 2, 1, 3}, [USP_ORDER_SBHD] = {1, 0, 2, 3}};

const usp_name *usp_names_order(void) {
    static const usp_name names[] = {
        {"bshd", USP_ORDER_BSHD}, {"bhsd", USP_ORDER_BHSD}, {"sbhd", USP_ORDER_SBHD}, {NULL, 0}};
    return names;
}

void usp_order_shape(usp_order order, const int64_t from[4], int64_t to[4]) {
    for (int i = 0; i < 4; i++) to[i] = from[axes[order][i]];
}

/* ---- elements -------------------------------------------------------------------------------------------------- */

/* Where the elements of an array lie, by axes in the order that is wanted. */
typedef struct usp_walk {
    const char *data;
    int64_t extent[4], stride[4]; /* in elements */
    size_t from, to;              /* bytes of an element, and of what it becomes; only float64 has 8 */
    int swapped;
} usp_walk;

static usp_walk walk_of(const usp_npy *array, usp_order order, usp_npy_type to) {
    int64_t stride[4], step = 1;
    usp_walk walk = {.data = array->data,
                     .from = usp_npy_type_size(array->type),
                     .to = usp_npy_type_size(to),
                     .swapped = array->swapped};
    for (int i = 0; i < 4; i++) {
        int axis = array->fortran ? i : 3 - i;
        stride[axis] = step;
        step *= array->shape[axis];
    }
    usp_order_shape(order, array->shape, walk.extent);
    usp_order_shape(order, stride, walk.stride);
    return walk;
}

/* 1, or 0 if a float64 is beyond float32. */
static int convert(const usp_walk *walk, const char *from, char *to) {
    char bytes[sizeof(double)];
    double wide;
    float narrow;
    for (size_t i = 0; i < walk->from; i++) bytes[i] = from[walk->swapped ? walk->from - 1 - i : i];
    if (walk->from == walk->to) return memcpy(to, bytes, walk->to), 1;
    if (walk->from < walk->to) {
        memcpy(&narrow, bytes, sizeof narrow);
        wide = narrow;
        return memcpy(to, &wide, sizeof wide), 1;
    }
    memcpy(&wide, bytes, sizeof wide);
    narrow = (float)wide;
    memcpy(to, &narrow, sizeof narrow);
    return !isfinite(wide) || isfinite(narrow);
}

/* One innermost axis, whose first element is number `first`. */
static int take_row(const usp_walk *walk, int64_t first, char *to) {
    const char *from = walk->data + (size_t)first * walk->from;
    int64_t count = walk->extent[3], stride = walk->stride[3];
    int good = 1;
    if (stride == 1 && walk->from == walk->to && !walk->swapped) return memcpy(to, from, (size_t)count * walk->to), 1;
    for (int64_t i = 0; i < count && good; i++)
        good = convert(walk, from + (size_t)(i * stride) * walk->from, to + (size_t)i * walk->to);
    return good;
}

static int take_all(const usp_walk *walk, char *to) {
    const int64_t *extent = walk->extent, *stride = walk->stride;
    size_t row = (size_t)extent[3] * walk->to;
    int good = 1;
    for (int64_t a = 0; a < extent[0]; a++)
        for (int64_t b = 0; b < extent[1]; b++)
            for (int64_t c = 0; c < extent[2] && good; c++, to += row)
                good = take_row(walk, a * stride[0] + b * stride[1] + c * stride[2], to);
    return good;
}

/* ---- files ----------------------------------------------------------------------------------------------------- */

/* Nothing about the elements changes. */
static int is_plain(const usp_npy *array, usp_order order, usp_npy_type to) {
    return order == USP_ORDER_BSHD && !array->fortran && !array->swapped &&
           usp_npy_type_size(array->type) == usp_npy_type_size(to);
}

/* A new array of the same elements: dense, little-endian, axes in the other order, of type `to`. */
static usp_status rearrange(const usp_npy *from, usp_order order, usp_npy_type to, usp_npy *made,
                            usp_tool_error *error) {
    *made = (usp_npy){.type = to, .dims = 4};
    made->bytes = from->bytes / usp_npy_type_size(from->type) * usp_npy_type_size(to);
    made->data = made->owned = usp_tool_alloc(error, made->bytes, 1);
    usp_order_shape(order, from->shape, made->shape);
    if (!made->owned) return USP_NO_MEMORY;
    if (!made->bytes) return USP_OK; /* the other extents may be any numbers */
    usp_walk walk = walk_of(from, order, to);
    return take_all(&walk, made->owned) ? USP_OK : usp_tool_fail(error, USP_INVALID, "has a number beyond float32");
}

usp_status usp_tensor_arrange(usp_npy *array, usp_order order, usp_tool_error *error) {
    usp_npy made;
    usp_npy_type to = array->type == USP_NPY_F64 ? USP_NPY_F32 : array->type;
    if (is_plain(array, order, to)) return USP_OK;
    usp_status status = rearrange(array, order, to, &made, error);
    usp_npy_free(array);
    *array = made;
    return status;
}

usp_status usp_tensor_write(const char *path, usp_order order, usp_npy_type type, const usp_npy *tensor,
                            usp_tool_error *error) {
    usp_npy made;
    if (is_plain(tensor, order, type))
        return usp_npy_write(path, type, tensor->dims, tensor->shape, tensor->data, error);
    usp_status status = rearrange(tensor, order, type, &made, error);
    if (status == USP_OK) status = usp_npy_write(path, type, tensor->dims, made.shape, made.data, error);
    usp_npy_free(&made);
    return status;
}
