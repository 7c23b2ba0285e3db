/* fuzz_npy.c - feeds damaged files to the .npy reader: fuzz_npy [seed [count]], or a libFuzzer target.
 * An accepted file must be consistent with its own size; a written array must come back the same. */
#include "../bench/tensor_file.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void require(int condition, const char *what) {
    if (condition) return;
    fprintf(stderr, "fuzz_npy: %s\n", what);
    abort();
}

/* Elements of any form become those of a dense tensor, of the same number, in any order of axes. */
static void check_arranged(usp_npy *array, usp_order order) {
    usp_tool_error error = {""};
    size_t count = array->bytes / usp_npy_type_size(array->type);
    if (array->dims != 4) return;
    if (usp_tensor_arrange(array, order, &error) == USP_OK) {
        require(!array->swapped && !array->fortran && array->type != USP_NPY_F64, "of another form once arranged");
        require(array->bytes == count * usp_npy_type_size(array->type), "another number of elements once arranged");
    } else
        require(error.text[0], "refused without a sentence");
    usp_npy_free(array);
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
        usp_order order = (usp_order)(size % 3);
        for (int i = 0; i < array.dims; i++) bytes *= (size_t)array.shape[i];
        require(array.dims >= 0 && array.dims <= USP_NPY_DIMS, "too many dimensions accepted");
        require(array.bytes == bytes, "bytes and shape differ");
        require((const char *)array.data + bytes == memory + size, "data does not end with the file");
        check_arranged(&array, order);
    } else
        require(error.text[0], "refused without a sentence");
    free(memory);
    return 0;
}

#ifndef USP_LIBFUZZER
enum { FILE_BYTES = 1024, SEEDS = 8 };

/* What mutations begin with: an array, and the form that its header is given. */
typedef struct usp_seed {
    usp_npy_type type;
    int dims;
    int64_t shape[4];
    char byte_order;
    int fortran;
    uint8_t bytes[FILE_BYTES];
    size_t size;
} usp_seed;

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

/* Writes an array and reads it back. */
static void round_trip(const char *path, usp_seed *seed) {
    uint8_t data[512];
    usp_npy array;
    usp_tool_error error = {""};
    for (size_t i = 0; i < sizeof data; i++) data[i] = (uint8_t)(i * 37 + 11);
    require(usp_npy_write(path, seed->type, seed->dims, seed->shape, data, &error) == USP_OK, error.text);
    require(usp_npy_read(path, &array, &error) == USP_OK, error.text);
    require(array.type == seed->type && array.dims == seed->dims, "type or dimensions changed");
    require(!memcmp(array.shape, seed->shape, (size_t)array.dims * sizeof *array.shape), "shape changed");
    require(!array.swapped && !array.fortran, "form changed");
    require(!memcmp(array.data, data, array.bytes), "data changed");
    usp_npy_free(&array);
    seed->size = read_bytes(path, seed->bytes);
    remove(path);
}

/* The header is 10 bytes, then {'descr': '<f4', 'fortran_order': False, ... */
static void reform(usp_seed *seed) {
    usp_npy array;
    usp_tool_error error = {""};
    seed->bytes[10 + 11] = (uint8_t)seed->byte_order;
    memcpy(seed->bytes + 10 + 11 + 3 + 3 + 17, seed->fortran ? "True " : "False", 5);
    require(usp_npy_parse(seed->bytes, seed->size, &array, &error) == USP_OK, error.text);
    require(array.type == seed->type && array.fortran == seed->fortran, "another form than the header's");
    require(array.swapped == (seed->byte_order == '>'), "another byte order than the header's");
}

/* A bit, a byte, a likely character, a cut, a removed or a doubled stretch. */
static size_t mutate(uint64_t *state, uint8_t *bytes, size_t size) {
    static const char likely[] = "{}()',:0123456789 <>|=f4uV8TrueFalse\\\"-L\x93";
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
    static usp_seed seeds[SEEDS] = {
        {.type = USP_NPY_F32, .dims = 4, .shape = {1, 4, 2, 8}, .byte_order = '<'},
        {.type = USP_NPY_F16, .dims = 3, .shape = {3, 5, 1}, .byte_order = '<'},
        {.type = USP_NPY_U16, .dims = 2, .shape = {16, 1}, .byte_order = '<'},
        {.type = USP_NPY_F32, .dims = 1, .shape = {2}, .byte_order = '<'},
        {.type = USP_NPY_F64, .dims = 4, .shape = {2, 3, 2, 1}, .byte_order = '>', .fortran = 1},
        {.type = USP_NPY_V2, .dims = 4, .shape = {1, 3, 2, 2}, .byte_order = '|'},
        {.type = USP_NPY_F32, .dims = 4, .shape = {2, 0, 3, 1}, .byte_order = '<', .fortran = 1},
        {.type = USP_NPY_V2, .dims = 4, .shape = {2, 2, 2, 3}, .byte_order = '>', .fortran = 1}};
    uint64_t state = argc > 1 ? strtoull(argv[1], NULL, 0) * 2 + 1 : 1;
    long count = argc > 2 ? strtol(argv[2], NULL, 0) : 200000;
    char path[64];
    uint8_t bytes[FILE_BYTES];
    snprintf(path, sizeof path, "fuzz_npy.%llu.npy", (unsigned long long)state);
    for (int i = 0; i < SEEDS; i++) {
        round_trip(path, &seeds[i]);
        reform(&seeds[i]);
    }
    for (long i = 0; i < count; i++) {
        const usp_seed *seed = &seeds[next_random(&state) % SEEDS];
        size_t length = seed->size;
        memcpy(bytes, seed->bytes, length);
        for (uint64_t edits = 1 + next_random(&state) % 6; edits; edits--) length = mutate(&state, bytes, length);
        LLVMFuzzerTestOneInput(bytes, length);
    }
    printf("fuzz_npy: %ld files, no fault\n", count);
    return 0;
}
#endif
