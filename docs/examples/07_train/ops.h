/* ops.h - the token-wise mathematics of the model: everything that needs no other token than its own.
 * It knows nothing of ranks: each rank calls it on the rows (tokens) that it owns. */
#ifndef TRAIN_OPS_H
#define TRAIN_OPS_H
#include <stddef.h>
#include <stdint.h>

/* A matrix view: element (i, j) is data[i * row + j * column]. A transpose is a view with the two strides swapped. */
typedef struct matrix {
    const float *data;
    size_t row, column;
} matrix;

matrix matrix_of(const float *data, size_t columns);
matrix matrix_transposed(const float *data, size_t columns); /* data is [*, columns] before transposing */

/* c[m, n] = a[m, k] b[k, n], added to what c holds if `add`. */
void matmul(float *c, matrix a, matrix b, size_t m, size_t n, size_t k, int add);

/* y = x / rms(x) * gain for each of `rows` rows of `width`. */
void rmsnorm_forward(float *y, const float *x, const float *gain, size_t rows, size_t width);
/* dx += ..., dgain += ... */
void rmsnorm_backward(float *dx, float *dgain, const float *dy, const float *x, const float *gain, size_t rows,
                      size_t width);

/* y[rows, width] = table[token]; dtable[token] += dy. */
void embed_forward(float *y, const float *table, const int32_t *token, size_t rows, size_t width);
void embed_backward(float *dtable, const float *dy, const int32_t *token, size_t rows, size_t width);

/* Rotary embedding: table[position][dim / 2][2] holds cosine and sine of position * 10000^(-2 i / dim); rope turns the
 * pairs (i, i + dim / 2) of q and k inside qkv[rows, 3, heads, dim] by it, repeating the table over the batch.
 * `direction` 1: forward, -1: its transpose, which is the backward pass. */
void rope_table(float *table, const int32_t *position, size_t positions, size_t dim);
void rope(float *qkv, const float *table, size_t positions, size_t rows, size_t heads, size_t dim, float direction);

/* y[rows, hidden] = silu(gate) * up, where x[rows, 2, hidden] holds gate and up. */
void swiglu_forward(float *y, const float *x, size_t rows, size_t hidden);
void swiglu_backward(float *dx, const float *dy, const float *x, size_t rows, size_t hidden);

/* Sum of the losses of all rows with label >= 0. Where scale is not 0, logits become their gradient times scale. */
double cross_entropy(float *logits, const int32_t *label, size_t rows, size_t classes, float scale);

#endif
