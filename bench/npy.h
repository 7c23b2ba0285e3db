/* npy.h - reads and writes arrays in NumPy's .npy format, versions 1 to 3.
 * Only what tensors need, in either byte order and either order of axes; every byte of a file is distrusted. */
#ifndef USP_NPY_H
#define USP_NPY_H
#include "tool.h"

enum { USP_NPY_DIMS = 8 };

/* V2, two bytes without a meaning, is how bf16 leaves JAX and ml_dtypes. */
typedef enum usp_npy_type {
    USP_NPY_F32 = 0,
    USP_NPY_F16 = 1,
    USP_NPY_U16 = 2,
    USP_NPY_F64 = 3,
    USP_NPY_V2 = 4,
    USP_NPY_TYPES = 5
} usp_npy_type;

typedef struct usp_npy {
    usp_npy_type type;
    int swapped; /* elements are big-endian */
    int fortran; /* the first axis lies closest */
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

/* Little-endian, in C order; a reader sees the old file or the whole new one. */
usp_status usp_npy_write(const char *path, usp_npy_type type, int dims, const int64_t *shape, const void *data,
                         usp_tool_error *error);

#endif
