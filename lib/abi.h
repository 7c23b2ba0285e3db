/* abi.h - reads and writes structs that begin with struct_size. */
#ifndef USP_ABI_H
#define USP_ABI_H
#include "usp.h"

/* Copies the caller's struct into `known` (known_size bytes, zeroed first): a shorter one fills the front, a longer one
 * must be zero beyond. INVALID, naming the struct, for NULL, a size below sizeof(size_t) or within a word, or a
 * non-zero tail. */
usp_status usp_abi_read(void *known, size_t known_size, const void *given, const char *name);

/* Copies `known` into the caller's struct, as much as its struct_size has room for; its struct_size stays. */
usp_status usp_abi_write(const void *known, size_t known_size, void *given, const char *name);

#endif
