/* npy.c - a strict parser of the .npy header, and writing.
 * The parser works on a memory buffer and allocates nothing, so it can be fuzzed. */
#include "npy.h"
#include "output.h"
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { NAME_BYTES = 16, HEADER_BYTES = 1 << 20 };

typedef struct usp_npy_kind {
    const char *code, *name;
    size_t size;
} usp_npy_kind;

/* By type; a code's first character is the byte order, '|' none. */
static const usp_npy_kind kinds[USP_NPY_TYPES] = {
    {"<f4", "float32", 4}, {"<f2", "float16", 2}, {"<u2", "uint16", 2}, {"<f8", "float64", 8}, {"|V2", "V2", 2}};

size_t usp_npy_type_size(usp_npy_type type) {
    return kinds[type].size;
}

const char *usp_npy_type_name(usp_npy_type type) {
    return kinds[type].name;
}

/* ---- header: a Python dict of 'descr', 'fortran_order' and 'shape' --------------------------------------------- */

typedef struct usp_text {
    const char *at, *end;
} usp_text;

static void skip_blanks(usp_text *text) {
    while (text->at < text->end && (*text->at == ' ' || *text->at == '\t' || *text->at == '\n')) text->at++;
}

/* Takes one character, after blanks. */
static int take(usp_text *text, char wanted) {
    skip_blanks(text);
    if (text->at == text->end || *text->at != wanted) return 0;
    text->at++;
    return 1;
}

static int take_word(usp_text *text, const char *word) {
    size_t length = strlen(word);
    skip_blanks(text);
    if ((size_t)(text->end - text->at) < length || memcmp(text->at, word, length)) return 0;
    text->at += length;
    return 1;
}

/* 'name' or "name" without escapes, printable, shorter than NAME_BYTES. */
static int take_string(usp_text *text, char name[NAME_BYTES]) {
    char quote = take(text, '\'') ? '\'' : take(text, '"') ? '"' : 0;
    int length = 0;
    if (!quote) return 0;
    while (text->at < text->end && *text->at != quote) {
        if (length == NAME_BYTES - 1 || *text->at < ' ' || *text->at > '~' || *text->at == '\\') return 0;
        name[length++] = *text->at++;
    }
    name[length] = 0;
    return take(text, quote);
}

static int take_extent(usp_text *text, int64_t *value) {
    skip_blanks(text);
    const char *first = text->at;
    for (*value = 0; text->at < text->end && *text->at >= '0' && *text->at <= '9'; text->at++) {
        if (*value > (INT64_MAX - 9) / 10) return 0;
        *value = *value * 10 + (*text->at - '0');
    }
    return text->at > first;
}

static int take_shape(usp_text *text, usp_npy *array) {
    array->dims = 0;
    if (!take(text, '(')) return 0;
    while (!take(text, ')')) {
        if (array->dims == USP_NPY_DIMS || !take_extent(text, &array->shape[array->dims++])) return 0;
        if (take(text, ',')) continue;
        return array->dims > 1 && take(text, ')');
    }
    return 1;
}

/* What a header said; each key must come once. */
typedef struct usp_npy_header {
    char descr[NAME_BYTES];
    int seen_descr, seen_order, seen_shape;
} usp_npy_header;

static int take_member(usp_text *text, usp_npy_header *header, usp_npy *array) {
    char key[NAME_BYTES];
    if (!take_string(text, key) || !take(text, ':')) return 0;
    if (!strcmp(key, "descr")) return !header->seen_descr++ && take_string(text, header->descr);
    if (!strcmp(key, "shape")) return !header->seen_shape++ && take_shape(text, array);
    if (strcmp(key, "fortran_order") || header->seen_order++) return 0;
    array->fortran = take_word(text, "True");
    return array->fortran || take_word(text, "False");
}

static int take_header(usp_text *text, usp_npy_header *header, usp_npy *array) {
    if (!take(text, '{')) return 0;
    while (!take(text, '}')) {
        if (!take_member(text, header, array)) return 0;
        if (take(text, ',')) continue;
        if (!take(text, '}')) return 0;
        break;
    }
    skip_blanks(text);
    return text->at == text->end && header->seen_descr && header->seen_order && header->seen_shape;
}

/* ---- parse ----------------------------------------------------------------------------------------------------- */

/* Finds the header's text and where the data begins. */
static usp_status find_header(const unsigned char *memory, size_t bytes, usp_text *text, usp_tool_error *error) {
    if (bytes < 10 || memcmp(memory, "\x93NUMPY", 6))
        return usp_tool_fail(error, USP_INVALID, "is no .npy file (wrong magic bytes)");
    int wide = memory[6] >= 2;
    size_t first = wide ? 12 : 10, length = memory[8] | (size_t)memory[9] << 8;
    if (memory[6] < 1 || memory[6] > 3 || memory[7])
        return usp_tool_fail(error, USP_INVALID, "has .npy version %d.%d, not 1.0, 2.0 or 3.0", memory[6], memory[7]);
    if (wide && bytes >= first) length |= (size_t)memory[10] << 16 | (size_t)memory[11] << 24;
    if (bytes < first || length > bytes - first || length > HEADER_BYTES)
        return usp_tool_fail(error, USP_INVALID, "is truncated: it ends inside its header");
    text->at = (const char *)memory + first;
    text->end = text->at + length;
    return USP_OK;
}

/* ml_dtypes gives V2 a byte order too. */
static usp_status find_type(const char *descr, usp_npy *array, usp_tool_error *error) {
    int ordered = *descr == '<' || *descr == '>';
    array->swapped = *descr == '>';
    for (int i = 0; i < USP_NPY_TYPES; i++)
        if ((ordered || *descr == *kinds[i].code) && !strcmp(descr + 1, kinds[i].code + 1)) {
            array->type = (usp_npy_type)i;
            return USP_OK;
        }
    return usp_tool_fail(error, USP_INVALID, "has elements of type '%s', not f2, f4 or f8 (floats), u2 or V2 (bf16)",
                         descr);
}

static int multiply(size_t *product, int64_t factor) {
    return !__builtin_mul_overflow(*product, (size_t)factor, product);
}

static usp_status check_size(usp_npy *array, size_t available, usp_tool_error *error) {
    size_t bytes = usp_npy_type_size(array->type);
    int fits = 1, empty = 0;
    for (int i = 0; i < array->dims; i++) empty |= array->shape[i] == 0;
    for (int i = 0; i < array->dims && !empty && fits; i++) fits = multiply(&bytes, array->shape[i]);
    if (!fits) return usp_tool_fail(error, USP_INVALID, "has a shape larger than any memory");
    array->bytes = empty ? 0 : bytes;
    if (available < array->bytes)
        return usp_tool_fail(error, USP_INVALID, "is truncated: its shape needs %zu bytes of data, it has %zu",
                             array->bytes, available);
    if (available > array->bytes)
        return usp_tool_fail(error, USP_INVALID, "has %zu bytes more than its shape needs", available - array->bytes);
    return USP_OK;
}

usp_status usp_npy_parse(const void *memory, size_t bytes, usp_npy *array, usp_tool_error *error) {
    usp_npy_header header = {.seen_descr = 0};
    usp_text text = {NULL, NULL};
    *array = (usp_npy){.data = NULL};
    USP_TRY(find_header(memory, bytes, &text, error));
    const char *data = text.end;
    if (!take_header(&text, &header, array))
        return usp_tool_fail(error, USP_INVALID, "has a malformed .npy header, or more than %d dimensions",
                             USP_NPY_DIMS);
    USP_TRY(find_type(header.descr, array, error));
    USP_TRY(check_size(array, bytes - (size_t)(data - (const char *)memory), error));
    array->data = data;
    return USP_OK;
}

/* ---- read ------------------------------------------------------------------------------------------------------ */

static usp_status file_failure(usp_tool_error *error, const char *path, const char *what) {
    return usp_tool_fail(error, USP_INVALID, "%s: %s: %s", path, what, strerror(errno));
}

static usp_status read_all(int file, const char *path, size_t bytes, char *memory, usp_tool_error *error) {
    for (size_t done = 0; done < bytes;) {
        ssize_t got = read(file, memory + done, bytes - done);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) return file_failure(error, path, "cannot read");
        if (got == 0) return usp_tool_fail(error, USP_INVALID, "%s: became shorter while it was read", path);
        done += (size_t)got;
    }
    return USP_OK;
}

static usp_status read_file(int file, const char *path, usp_npy *array, usp_tool_error *error) {
    struct stat info;
    usp_tool_error why = {""};
    if (fstat(file, &info)) return file_failure(error, path, "cannot read");
    if (!S_ISREG(info.st_mode)) return usp_tool_fail(error, USP_INVALID, "%s: is not a regular file", path);
    size_t bytes = (size_t)info.st_size;
    char *memory = malloc(bytes ? bytes : 1);
    if (!memory) return usp_tool_fail(error, USP_NO_MEMORY, "%s: no memory for its %zu bytes", path, bytes);
    usp_status status = read_all(file, path, bytes, memory, error);
    if (status == USP_OK && usp_npy_parse(memory, bytes, array, &why) != USP_OK)
        status = usp_tool_fail(error, USP_INVALID, "%s: %.900s", path, why.text);
    if (status == USP_OK)
        array->owned = memory;
    else
        free(memory);
    return status;
}

usp_status usp_npy_read(const char *path, usp_npy *array, usp_tool_error *error) {
    *array = (usp_npy){.data = NULL};
    int file = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* a pipe must not block before it is refused */
    if (file < 0) return file_failure(error, path, "cannot open");
    usp_status status = read_file(file, path, array, error);
    close(file);
    return status;
}

void usp_npy_free(usp_npy *array) {
    free(array->owned);
    *array = (usp_npy){.data = NULL};
}

/* ---- write ----------------------------------------------------------------------------------------------------- */

/* Magic, version, length and a dict padded with blanks to a multiple of 64 bytes. */
static size_t make_header(usp_npy_type type, int dims, const int64_t *shape, char header[512]) {
    int at = 10 + sprintf(header + 10, "{'descr': '%s', 'fortran_order': False, 'shape': (", kinds[type].code);
    for (int i = 0; i < dims; i++) at += sprintf(header + at, "%lld, ", (long long)shape[i]);
    at += sprintf(header + at, "), }");
    int whole = (at + 1 + 63) / 64 * 64;
    memset(header + at, ' ', (size_t)(whole - at));
    header[whole - 1] = '\n';
    memcpy(header, "\x93NUMPY\x01", 8); /* ends with the minor version, the string's own zero */
    header[8] = (char)((whole - 10) & 255);
    header[9] = (char)((whole - 10) >> 8);
    return (size_t)whole;
}

usp_status usp_npy_write(const char *path, usp_npy_type type, int dims, const int64_t *shape, const void *data,
                         usp_tool_error *error) {
    char header[512];
    usp_output output;
    size_t header_bytes = make_header(type, dims, shape, header), bytes = usp_npy_type_size(type);
    for (int i = 0; i < dims; i++) bytes *= (size_t)shape[i];
    USP_TRY(usp_output_open(&output, path, error));
    fwrite(header, 1, header_bytes, output.stream);
    fwrite(data, 1, bytes, output.stream);
    return usp_output_close(&output, USP_OK, error);
}
