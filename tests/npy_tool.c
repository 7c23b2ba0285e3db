/* npy_tool.c - makes, compares, cuts, rewrites and attends over .npy files, for check_tools.sh.
 * Its attention is a plain double loop over whole tensors that shares no code with the library or usp_bench. */
#include "../bench/npy.h"
#include "../bench/number.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void stop(const char *text) {
    fprintf(stderr, "npy_tool: %s\n", text);
    exit(2);
}

static double *new_doubles(size_t count) {
    double *memory = calloc(count ? count : 1, sizeof *memory);
    if (!memory) stop("no memory");
    return memory;
}

/* uint16 and V2 stand for bf16. */
static usp_dtype dtype_of(usp_npy_type type) {
    return type == USP_NPY_F16 ? USP_F16 : type == USP_NPY_U16 || type == USP_NPY_V2 ? USP_BF16 : USP_F32;
}

static usp_npy read_array(const char *path) {
    usp_npy array;
    usp_tool_error error;
    if (usp_npy_read(path, &array, &error) != USP_OK) stop(error.text);
    if (array.swapped || array.fortran) stop("an array that is not little-endian or not in C order");
    return array;
}

static double *read_doubles(const char *path, usp_npy *array) {
    *array = read_array(path);
    size_t count = array->bytes / usp_npy_type_size(array->type);
    double *values = new_doubles(count);
    if (array->type == USP_NPY_F64)
        memcpy(values, array->data, array->bytes);
    else
        for (size_t i = 0; i < count; i++) values[i] = usp_number_load(dtype_of(array->type), array->data, i);
    return values;
}

static void write_doubles(const char *path, usp_npy_type type, int dims, const int64_t *shape, const double *values) {
    size_t count = 1;
    usp_tool_error error;
    for (int i = 0; i < dims; i++) count *= (size_t)shape[i];
    double *data = new_doubles(count);
    for (size_t i = 0; i < count; i++) usp_number_store(dtype_of(type), data, i, values[i]);
    if (usp_npy_write(path, type, dims, shape, data, &error) != USP_OK) stop(error.text);
    free(data);
}

/* make FILE TYPE SEED EXTENT... : normal numbers. */
static int make(int argc, char **argv) {
    int64_t shape[USP_NPY_DIMS], count = 1;
    int dims = argc - 3;
    if (dims < 1 || dims > USP_NPY_DIMS) stop("make FILE f32|f16|bf16 SEED EXTENT...");
    usp_npy_type type = argv[1][0] == 'b' ? USP_NPY_U16 : strcmp(argv[1], "f16") ? USP_NPY_F32 : USP_NPY_F16;
    for (int i = 0; i < dims; i++) count *= shape[i] = strtoll(argv[3 + i], NULL, 10);
    double *values = new_doubles((size_t)count);
    for (int64_t i = 0; i < count; i++) values[i] = usp_number_random(100 + strtoull(argv[2], NULL, 10), (uint64_t)i);
    write_doubles(argv[0], type, dims, shape, values);
    free(values);
    return 0;
}

/* compare FILE FILE TOLERANCE : RMS of the difference over the RMS of the second, which must not be all zero. */
static int compare(int argc, char **argv) {
    usp_npy a, b;
    double difference = 0, size = 0;
    if (argc != 3) stop("compare FILE FILE TOLERANCE");
    double *x = read_doubles(argv[0], &a), *y = read_doubles(argv[1], &b);
    if (a.type != b.type || a.dims != b.dims || memcmp(a.shape, b.shape, (size_t)a.dims * sizeof *a.shape))
        stop("type or shape differ");
    for (size_t i = 0; i < a.bytes / usp_npy_type_size(a.type); i++) {
        difference += (x[i] - y[i]) * (x[i] - y[i]);
        size += y[i] * y[i];
    }
    double error = sqrt(difference / size);
    printf("%s %s: %.3g\n", argv[0], argv[1], error);
    free(x);
    free(y);
    usp_npy_free(&a);
    usp_npy_free(&b);
    return error <= strtod(argv[2], NULL) ? 0 : 1;
}

/* cut FILE OUT FIRST COUNT : that many tokens of [batch, tokens, heads, dim]. */
static int cut(int argc, char **argv) {
    usp_npy array;
    if (argc != 4) stop("cut FILE OUT FIRST COUNT");
    double *values = read_doubles(argv[0], &array);
    int64_t first = strtoll(argv[2], NULL, 10), count = strtoll(argv[3], NULL, 10);
    int64_t row = array.shape[2] * array.shape[3], shape[4] = {array.shape[0], count, array.shape[2], array.shape[3]};
    if (first < 0 || count < 0 || first + count > array.shape[1]) stop("cut: no such tokens");
    double *part = new_doubles((size_t)(shape[0] * count * row));
    for (int64_t b = 0; b < shape[0]; b++)
        memcpy(part + b * count * row, values + (b * array.shape[1] + first) * row,
               (size_t)(count * row) * sizeof *part);
    write_doubles(argv[1], array.type, 4, shape, part);
    free(values);
    free(part);
    usp_npy_free(&array);
    return 0;
}

/* ---- another form ---------------------------------------------------------------------------------------------- */

static void write_header(FILE *file, const char *descr, const char *fortran, int dims, const int64_t *shape) {
    char text[246]; /* 10 + 246 bytes are a multiple of 64 */
    int at = snprintf(text, sizeof text, "{'descr': '%s', 'fortran_order': %s, 'shape': (", descr, fortran);
    for (int i = 0; i < dims; i++) at += snprintf(text + at, sizeof text - (size_t)at, "%lld, ", (long long)shape[i]);
    snprintf(text + at, sizeof text - (size_t)at, ")}");
    fprintf(file, "\x93NUMPY%c%c%c%c%-245s\n", 1, 0, 246, 0, text);
}

static void write_element(FILE *file, const char *descr, double value) {
    unsigned char bytes[8];
    int size = descr[2] - '0';
    if (size == 8)
        memcpy(bytes, &value, sizeof value);
    else
        usp_number_store(size == 4 ? USP_F32 : descr[1] == 'f' ? USP_F16 : USP_BF16, bytes, 0, value);
    for (int i = 0; i < size; i++) fputc(bytes[*descr == '>' ? size - 1 - i : i], file);
}

/* Index in an array of four dimensions, C order, of the element that comes i-th in an array of `shape` whose axis k is
 * axis order[k] of the first, in Fortran order or not. */
static int64_t source_of(const int64_t *whole, const char *order, const int64_t *shape, int fortran, int64_t i) {
    int64_t at[4], index = 0;
    for (int k = 0; k < 4; k++) {
        int axis = fortran ? k : 3 - k;
        at[order[axis] - '0'] = i % shape[axis];
        i /= shape[axis];
    }
    for (int k = 0; k < 4; k++) index = index * whole[k] + at[k];
    return index;
}

/* form IN OUT DESCR True|False ORDER : the same numbers in another form; ORDER 0213 has the third axis second. */
static int form(int argc, char **argv) {
    usp_npy array;
    int64_t shape[4], count = 1;
    if (argc != 5) stop("form IN OUT DESCR True|False ORDER");
    double *values = read_doubles(argv[0], &array);
    FILE *file = fopen(argv[1], "wb");
    if (!file || array.dims != 4) stop("form: no four dimensions, or no file to write");
    for (int i = 0; i < 4; i++) count *= shape[i] = array.shape[argv[4][i] - '0'];
    write_header(file, argv[2], argv[3], 4, shape);
    for (int64_t i = 0; i < count; i++)
        write_element(file, argv[2], values[source_of(array.shape, argv[4], shape, argv[3][0] == 'T', i)]);
    fclose(file);
    free(values);
    usp_npy_free(&array);
    return 0;
}

/* ---- attention ------------------------------------------------------------------------------------------------- */

typedef struct problem {
    int64_t batch, tokens, keys, heads, key_heads, dim, value_dim;
    const double *q, *k, *v;
    int linear, causal;
    double lambda;
} problem;

static double score(const problem *p, int64_t b, int64_t t, int64_t h, int64_t key) {
    const double *q = p->q + ((b * p->tokens + t) * p->heads + h) * p->dim;
    const double *k = p->k + ((b * p->keys + key) * p->key_heads + h * p->key_heads / p->heads) * p->dim;
    double sum = 0;
    for (int64_t i = 0; i < p->dim; i++) sum += q[i] * k[i];
    return p->linear ? sum : sum / sqrt((double)p->dim);
}

/* One output row; softmax subtracts the largest score first. */
static void attend_row(const problem *p, int64_t b, int64_t t, int64_t h, double *out) {
    int64_t keys = p->causal ? t + 1 : p->keys;
    double largest = -INFINITY, total = 0;
    for (int64_t key = 0; key < keys; key++) largest = fmax(largest, score(p, b, t, h, key));
    for (int64_t key = 0; key < keys; key++) {
        double s = score(p, b, t, h, key);
        double weight = p->linear ? s * pow(p->lambda, (double)(t - key)) : exp(s - largest);
        const double *v = p->v + ((b * p->keys + key) * p->key_heads + h * p->key_heads / p->heads) * p->value_dim;
        for (int64_t i = 0; i < p->value_dim; i++) out[i] += weight * v[i];
        total += weight;
    }
    for (int64_t i = 0; i < p->value_dim && !p->linear; i++) out[i] /= total;
}

/* attend Q K V OUT softmax|linear causal|full LAMBDA : LAMBDA is 1 unless linear and causal. */
static int attend(int argc, char **argv) {
    usp_npy q, k, v;
    if (argc != 7) stop("attend Q K V OUT softmax|linear causal|full LAMBDA");
    problem p = {.linear = argv[4][0] == 'l', .causal = argv[5][0] == 'c', .lambda = strtod(argv[6], NULL)};
    double *values[3] = {read_doubles(argv[0], &q), read_doubles(argv[1], &k), read_doubles(argv[2], &v)};
    p.q = values[0], p.k = values[1], p.v = values[2];
    p.batch = q.shape[0], p.tokens = q.shape[1], p.heads = q.shape[2], p.dim = q.shape[3];
    p.keys = k.shape[1], p.key_heads = k.shape[2], p.value_dim = v.shape[3];
    const int64_t shape[4] = {p.batch, p.tokens, p.heads, p.value_dim};
    double *out = new_doubles((size_t)(shape[0] * shape[1] * shape[2] * shape[3]));
    for (int64_t row = 0; row < p.batch * p.tokens * p.heads; row++)
        attend_row(&p, row / p.heads / p.tokens, row / p.heads % p.tokens, row % p.heads, out + row * p.value_dim);
    write_doubles(argv[3], q.type, 4, shape, out);
    for (int i = 0; i < 3; i++) free(values[i]);
    free(out);
    usp_npy_free(&q);
    usp_npy_free(&k);
    usp_npy_free(&v);
    return 0;
}

int main(int argc, char **argv) {
    if (argc > 1 && !strcmp(argv[1], "make")) return make(argc - 2, argv + 2);
    if (argc > 1 && !strcmp(argv[1], "compare")) return compare(argc - 2, argv + 2);
    if (argc > 1 && !strcmp(argv[1], "attend")) return attend(argc - 2, argv + 2);
    if (argc > 1 && !strcmp(argv[1], "cut")) return cut(argc - 2, argv + 2);
    if (argc > 1 && !strcmp(argv[1], "form")) return form(argc - 2, argv + 2);
    stop("make, compare, cut, form or attend");
}
