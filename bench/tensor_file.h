/* tensor_file.h - .npy files as the dense tensors [B, S, heads, D] that a layer works on, and back.
 * Byte order, order of axes and float64 are the file's affair: what is read has none of them. */
#ifndef USP_TENSOR_FILE_H
#define USP_TENSOR_FILE_H
#include "npy.h"

/* The axes of a file, from the outermost on. */
typedef enum usp_order { USP_ORDER_BSHD = 0, USP_ORDER_BHSD = 1, USP_ORDER_SBHD = 2 } usp_order;

const usp_name *usp_names_order(void);
/* The same extents in the other order: [B, S, heads, D] as the file has them, or the file's as [B, S, heads, D]. */
void usp_order_shape(usp_order order, const int64_t from[4], int64_t to[4]);

/* Makes an array of four dimensions, just read, little-endian, dense and [B, S, heads, D]; float64 becomes float32.
 * INVALID with a sentence (without the file's name) if a number is beyond float32; NO_MEMORY. */
usp_status usp_tensor_arrange(usp_npy *array, usp_order order, usp_tool_error *error);
/* Writes dense [B, S, heads, D] with its axes in `order`, as `type`: that of the data, or float64 for float32. */
usp_status usp_tensor_write(const char *path, usp_order order, usp_npy_type type, const usp_npy *tensor,
                            usp_tool_error *error);

#endif
