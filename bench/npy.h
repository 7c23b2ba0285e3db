/* npy.h - reads and writes arrays in NumPy's .npy format, versions 1 to 3.
 * Only what tensors need: little-endian, C order; every byte of a file is distrusted. */
#ifndef USP_NPY_H
#define USP_NPY_H
#include "tool.h"

enum { USP_NPY_DIMS = 8 };

typedef enum usp_npy_type { USP_NPY_F32 = 0, USP_NPY_F16 = 1, USP_NPY_U16 = 2, USP_NPY_TYPES = 3 } usp_npy_type;

typedef struct usp_npy {
    usp_npy_type type;
    int dims;
    int64_t shape[USP_NPY_DIMS];
    const void *data; /* of any alignment, inside the parsed memory */
    size_t bytes;     /* of data: product of shape times element size */
    void *owned;      /* what usp_npy_free gives back */
} usp_npy;

/* Bytes of an element, and the name used in messages. */
size_t usp_npy_type_size(usp_npy_type type);
const char *usp_npy_type_name(usp_npy_type type);

/* Reads an array from memory, which must outlive it. INVALID with a sentence (without the file's name) if it is no
 * array of these types, or has more or fewer bytes than its shape says. */
usp_status usp_npy_parse(const void *memory, size_t bytes, usp_npy *array, usp_tool_error *error);
/* The same from a regular file; the sentence begins with its path. */
usp_status usp_npy_read(const char *path, usp_npy *array, usp_tool_error *error);
void usp_npy_free(usp_npy *array);

/* Writes a temporary file beside `path` and renames it, so that a reader sees the old file or the whole new one. */
usp_status usp_npy_write(const char *path, usp_npy_type type, int dims, const int64_t *shape, const void *data,
                         usp_tool_error *error);

#endif
