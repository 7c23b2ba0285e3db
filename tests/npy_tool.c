/* npy_tool.c - makes, compares, cuts and attends over .npy files, for check_tools.sh.
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

/* uint16 stands for bf16. */
static usp_dtype dtype_of(usp_npy_type type) {
    return type == USP_NPY_F16 ? USP_F16 : type == USP_NPY_U16 ? USP_BF16 : USP_F32;
}

static usp_npy read_array(const char *path) {
    usp_npy array;
    usp_tool_error error;
    if (usp_npy_read(path, &array, &error) != USP_OK) stop(error.text);
    return array;
}

static double *read_doubles(const char *path, usp_npy *array) {
    *array = read_array(path);
    size_t count = array->bytes / usp_npy_type_size(array->type);
    double *values = new_doubles(count);
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
    stop("make, compare, cut or attend");
}
