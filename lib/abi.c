/* abi.c - reads and writes structs that begin with struct_size (see abi.h). It knows no particular struct. */
#include "abi.h"
#include "error.h"
#include <string.h>

static usp_status given_size(const void *given, const char *name, size_t *size) {
    USP_REQUIRE(given, "%s is NULL", name);
    memcpy(size, given, sizeof *size);
    USP_REQUIRE(*size >= sizeof *size && *size <= 65536, "%s.struct_size is %zu: set it to sizeof the struct", name,
                *size);
    return USP_OK;
}

usp_status usp_abi_read(void *known, size_t known_size, const void *given, const char *name) {
    size_t size = 0;
    USP_TRY(given_size(given, name, &size));
    /* No version ends within a word; to go on would take half of a pointer. */
    USP_REQUIRE(size % sizeof size == 0, "%s.struct_size is %zu: set it to sizeof the struct", name, size);
    for (size_t i = known_size; i < size; i++)
        USP_REQUIRE(((const unsigned char *)given)[i] == 0,
                    "%s.struct_size is %zu, this library knows %zu bytes and byte %zu is not zero", name, size,
                    known_size, i);
    memset(known, 0, known_size);
    memcpy(known, given, size < known_size ? size : known_size);
    memcpy(known, &known_size, sizeof known_size);
    return USP_OK;
}

usp_status usp_abi_write(const void *known, size_t known_size, void *given, const char *name) {
    size_t size = 0;
    USP_TRY(given_size(given, name, &size));
    size_t room = size < known_size ? size : known_size;
    memcpy((char *)given + sizeof size, (const char *)known + sizeof size, room - sizeof size);
    return USP_OK;
}
