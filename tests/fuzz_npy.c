/* fuzz_npy.c - feeds damaged files to the .npy reader: fuzz_npy [seed [count]], or a libFuzzer target.
 * An accepted file must be consistent with its own size; a written array must come back the same. */
#include "../bench/npy.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void require(int condition, const char *what) {
    if (condition) return;
    fprintf(stderr, "fuzz_npy: %s\n", what);
    abort();
}

/* The bytes are copied to memory of just their size, so that a sanitizer sees any access beyond. */
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    usp_npy array;
    usp_tool_error error = {""};
    char *memory = malloc(size ? size : 1);
    if (!memory) return 0;
    memcpy(memory, data, size);
    if (usp_npy_parse(memory, size, &array, &error) == USP_OK) {
        size_t bytes = usp_npy_type_size(array.type);
        for (int i = 0; i < array.dims; i++) bytes *= (size_t)array.shape[i];
        require(array.dims >= 0 && array.dims <= USP_NPY_DIMS, "too many dimensions accepted");
        require(array.bytes == bytes, "bytes and shape differ");
        require((const char *)array.data + bytes == memory + size, "data does not end with the file");
    } else
        require(error.text[0], "refused without a sentence");
    free(memory);
    return 0;
}

#ifndef USP_LIBFUZZER
enum { FILE_BYTES = 1024 };

static uint64_t next_random(uint64_t *state) {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    return *state ^= *state << 17;
}

static size_t read_bytes(const char *path, uint8_t *bytes) {
    FILE *file = fopen(path, "rb");
    require(file != NULL, "cannot open the file just written");
    size_t size = fread(bytes, 1, FILE_BYTES, file);
    fclose(file);
    return size;
}

/* Writes an array, reads it back, and leaves its bytes as the seed of mutations. */
static size_t round_trip(const char *path, usp_npy_type type, int dims, const int64_t *shape, uint8_t *bytes) {
    uint8_t data[512];
    usp_npy array;
    usp_tool_error error = {""};
    for (size_t i = 0; i < sizeof data; i++) data[i] = (uint8_t)(i * 37 + 11);
    require(usp_npy_write(path, type, dims, shape, data, &error) == USP_OK, error.text);
    require(usp_npy_read(path, &array, &error) == USP_OK, error.text);
    require(array.type == type && array.dims == dims, "type or dimensions changed");
    require(!memcmp(array.shape, shape, (size_t)dims * sizeof *shape), "shape changed");
    require(!memcmp(array.data, data, array.bytes), "data changed");
    usp_npy_free(&array);
    size_t size = read_bytes(path, bytes);
    remove(path);
    return size;
}

/* A bit, a byte, a likely character, a cut, a removed or a doubled stretch. */
static size_t mutate(uint64_t *state, uint8_t *bytes, size_t size) {
    static const char likely[] = "{}()',:0123456789 <f4uTrueFalse\\\"-L\x93";
    size_t at = next_random(state) % size, length = next_random(state) % 8;
    switch (next_random(state) % 6) {
    case 0:
        bytes[at] ^= (uint8_t)(1 << next_random(state) % 8);
        return size;
    case 1:
        bytes[at] = (uint8_t)next_random(state);
        return size;
    case 2:
        bytes[at] = (uint8_t)likely[next_random(state) % (sizeof likely - 1)];
        return size;
    case 3:
        return at ? at : 1;
    case 4:
        if (at + length >= size) return size;
        memmove(bytes + at, bytes + at + length, size - at - length);
        return size - length;
    default:
        if (at + length >= size || size + length > FILE_BYTES) return size;
        memmove(bytes + at + length, bytes + at, size - at);
        return size + length;
    }
}

int main(int argc, char **argv) {
    static const int64_t shapes[4][4] = {{1, 4, 2, 8}, {3, 5, 1, 1}, {16, 1, 1, 1}, {2, 0, 3, 1}};
    uint64_t state = argc > 1 ? strtoull(argv[1], NULL, 0) * 2 + 1 : 1;
    long count = argc > 2 ? strtol(argv[2], NULL, 0) : 200000;
    char path[64];
    uint8_t seed[4][FILE_BYTES], bytes[FILE_BYTES];
    size_t size[4];
    snprintf(path, sizeof path, "fuzz_npy.%llu.npy", (unsigned long long)state);
    for (int i = 0; i < 4; i++)
        size[i] = round_trip(path, (usp_npy_type)(i % USP_NPY_TYPES), 4 - i, shapes[i], seed[i]);
    for (long i = 0; i < count; i++) {
        size_t which = next_random(&state) % 4, length = size[which];
        memcpy(bytes, seed[which], length);
        for (uint64_t edits = 1 + next_random(&state) % 6; edits; edits--) length = mutate(&state, bytes, length);
        LLVMFuzzerTestOneInput(bytes, length);
    }
    printf("fuzz_npy: %ld files, no fault\n", count);
    return 0;
}
#endif
