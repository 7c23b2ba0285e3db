/* ops.c - plain C for the token-wise mathematics; the one matrix product that all projections share is blocked so that
 * the compiler's vectors stay in registers. It does not start threads: ranks are the threads. */
#include "ops.h"

#include <math.h>
#include <string.h>

/* One binary for old and new x86 machines: the loader picks the widest clone. Sanitizers cannot start such code. */
#if defined(__x86_64__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define TRAIN_WIDE __attribute__((target_clones("avx512f", "fma", "default")))
#else
#define TRAIN_WIDE
#endif

enum { TILE_ROWS = 4, TILE_COLUMNS = 16, TILE_DEPTH = 256 };

typedef float lanes __attribute__((vector_size(TILE_COLUMNS * sizeof(float))));

matrix matrix_of(const float *data, size_t columns) {
    return (matrix){data, columns, 1};
}

matrix matrix_transposed(const float *data, size_t columns) {
    return (matrix){data, 1, columns};
}

/* Up to TILE_COLUMNS columns of b, rows [0, depth), as dense vectors; missing columns are zero. */
static void pack_columns(lanes *panel, matrix b, size_t depth, size_t columns) {
    for (size_t p = 0; p < depth; p++) {
        float line[TILE_COLUMNS] = {0};
        for (size_t j = 0; j < columns; j++) line[j] = b.data[p * b.row + j * b.column];
        memcpy(&panel[p], line, sizeof line);
    }
}

/* c[0 .. 4) += a[4, depth] panel[depth]: 4 x 16 running sums, and rows past the end repeat the last one. */
TRAIN_WIDE static void multiply_tile(lanes c[TILE_ROWS], const float *const a[TILE_ROWS], size_t step,
                                     const lanes *panel, size_t depth) {
    lanes c0 = c[0], c1 = c[1], c2 = c[2], c3 = c[3];
    for (size_t p = 0; p < depth; p++) {
        lanes b = panel[p];
        c0 += a[0][p * step] * b;
        c1 += a[1][p * step] * b;
        c2 += a[2][p * step] * b;
        c3 += a[3][p * step] * b;
    }
    c[0] = c0, c[1] = c1, c[2] = c2, c[3] = c3;
}

static size_t smaller(size_t a, size_t b) {
    return a < b ? a : b;
}

/* One column panel of c: [m, columns] (+)= a[m, depth] panel. */
static void multiply_panel(float *c, size_t c_row, matrix a, const lanes *panel, size_t m, size_t columns, size_t depth,
                           int add) {
    for (size_t i = 0; i < m; i += TILE_ROWS) {
        size_t rows = smaller(TILE_ROWS, m - i);
        const float *row[TILE_ROWS];
        lanes sum[TILE_ROWS];
        memset(sum, 0, sizeof sum);
        for (size_t r = 0; r < TILE_ROWS; r++) {
            size_t at = i + smaller(r, rows - 1);
            row[r] = a.data + at * a.row;
            if (add) memcpy(&sum[r], c + at * c_row, columns * sizeof *c);
        }
        multiply_tile(sum, row, a.column, panel, depth);
        for (size_t r = 0; r < rows; r++) memcpy(c + (i + r) * c_row, &sum[r], columns * sizeof *c);
    }
}

void matmul(float *c, matrix a, matrix b, size_t m, size_t n, size_t k, int add) {
    lanes panel[TILE_DEPTH];
    for (size_t p = 0; p < k; p += TILE_DEPTH) {
        size_t depth = smaller(TILE_DEPTH, k - p);
        matrix slice = {a.data + p * a.column, a.row, a.column};
        for (size_t j = 0; j < n; j += TILE_COLUMNS) {
            size_t columns = smaller(TILE_COLUMNS, n - j);
            matrix strip = {b.data + p * b.row + j * b.column, b.row, b.column};
            pack_columns(panel, strip, depth, columns);
            multiply_panel(c + j, n, slice, panel, m, columns, depth, add || p > 0);
        }
    }
}

static float inverse_rms(const float *x, size_t width) {
    float sum = 0;
    for (size_t i = 0; i < width; i++) sum += x[i] * x[i];
    return 1 / sqrtf(sum / (float)width + 1e-6f);
}

void rmsnorm_forward(float *y, const float *x, const float *gain, size_t rows, size_t width) {
    for (size_t t = 0; t < rows; t++, x += width, y += width) {
        float inverse = inverse_rms(x, width);
        for (size_t i = 0; i < width; i++) y[i] = x[i] * inverse * gain[i];
    }
}

/* With r = 1 / rms: dx = r (g - x r^2 mean(g x)), g = dy * gain. */
void rmsnorm_backward(float *dx, float *dgain, const float *dy, const float *x, const float *gain, size_t rows,
                      size_t width) {
    for (size_t t = 0; t < rows; t++, x += width, dx += width, dy += width) {
        float inverse = inverse_rms(x, width), dot = 0;
        for (size_t i = 0; i < width; i++) dot += dy[i] * gain[i] * x[i];
        float pull = dot / (float)width * inverse * inverse;
        for (size_t i = 0; i < width; i++) {
            dx[i] += inverse * (dy[i] * gain[i] - x[i] * pull);
            dgain[i] += dy[i] * x[i] * inverse;
        }
    }
}

void embed_forward(float *y, const float *table, const int32_t *token, size_t rows, size_t width) {
    for (size_t t = 0; t < rows; t++) memcpy(y + t * width, table + (size_t)token[t] * width, width * sizeof *y);
}

void embed_backward(float *dtable, const float *dy, const int32_t *token, size_t rows, size_t width) {
    for (size_t t = 0; t < rows; t++)
        for (size_t i = 0; i < width; i++) dtable[(size_t)token[t] * width + i] += dy[t * width + i];
}

void rope_table(float *table, const int32_t *position, size_t positions, size_t dim) {
    for (size_t s = 0; s < positions; s++) {
        for (size_t i = 0; i < dim / 2; i++, table += 2) {
            double angle = position[s] * pow(10000, -2.0 * (double)i / (double)dim);
            table[0] = (float)cos(angle);
            table[1] = (float)sin(angle);
        }
    }
}

static void rotate(float *vector, const float *turn, size_t half, float direction) {
    for (size_t i = 0; i < half; i++) {
        float a = vector[i], b = vector[i + half], cosine = turn[2 * i], sine = direction * turn[2 * i + 1];
        vector[i] = a * cosine - b * sine;
        vector[i + half] = a * sine + b * cosine;
    }
}

/* The heads of q and then of k lie one after the other at the start of a row. */
void rope(float *qkv, const float *table, size_t positions, size_t rows, size_t heads, size_t dim, float direction) {
    for (size_t t = 0; t < rows; t++)
        for (size_t h = 0; h < 2 * heads; h++)
            rotate(qkv + (t * 3 * heads + h) * dim, table + t % positions * dim, dim / 2, direction);
}

static float sigmoid(float x) {
    return 1 / (1 + expf(-x));
}

void swiglu_forward(float *y, const float *x, size_t rows, size_t hidden) {
    for (size_t t = 0; t < rows; t++, y += hidden, x += 2 * hidden)
        for (size_t i = 0; i < hidden; i++) y[i] = x[i] * sigmoid(x[i]) * x[hidden + i];
}

/* d silu(g) / dg = s (1 + g (1 - s)), s = sigmoid(g). */
void swiglu_backward(float *dx, const float *dy, const float *x, size_t rows, size_t hidden) {
    for (size_t t = 0; t < rows; t++, dy += hidden, x += 2 * hidden, dx += 2 * hidden) {
        for (size_t i = 0; i < hidden; i++) {
            float gate = x[i], up = x[hidden + i], s = sigmoid(gate);
            dx[i] = dy[i] * up * s * (1 + gate * (1 - s));
            dx[hidden + i] = dy[i] * gate * s;
        }
    }
}

/* One row: its loss; the row becomes (softmax - one-hot) * scale where scale is not 0. */
static double cross_entropy_row(float *logits, int32_t label, size_t classes, float scale) {
    float top = logits[0], sum = 0, own = logits[label];
    for (size_t i = 1; i < classes; i++) top = logits[i] > top ? logits[i] : top;
    for (size_t i = 0; i < classes; i++) sum += expf(logits[i] - top);
    double loss = log((double)sum) + (double)top - (double)own;
    if (scale == 0) return loss;
    for (size_t i = 0; i < classes; i++) logits[i] = expf(logits[i] - top) / sum * scale;
    logits[label] -= scale;
    return loss;
}

double cross_entropy(float *logits, const int32_t *label, size_t rows, size_t classes, float scale) {
    double loss = 0;
    for (size_t t = 0; t < rows; t++, logits += classes) {
        if (label[t] >= 0)
            loss += cross_entropy_row(logits, label[t], classes, scale);
        else
            memset(logits, 0, classes * sizeof *logits);
    }
    return loss;
}
