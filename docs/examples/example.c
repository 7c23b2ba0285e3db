/* example.c - the helpers of all examples.
 * Nothing here shows how to use the library; the numbered programs do. */
#include "example.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

void must(usp_status status) {
    if (status == USP_OK) return;
    fprintf(stderr, "%s: %s\n", usp_status_string(status), usp_last_error());
    exit(1);
}

void *must_allocate(size_t bytes) {
    void *memory = calloc(bytes + 1, 1);
    if (!memory) must(USP_NO_MEMORY);
    return memory;
}

void fill(float *data, size_t count, unsigned seed) {
    uint32_t state = seed * 2654435761u + 1;
    for (size_t i = 0; i < count; i++) {
        state = state * 1664525u + 1013904223u;
        data[i] = (float)(state >> 8) / (float)(1 << 23) - 1;
    }
}

double difference(const float *a, const float *b, size_t count) {
    double apart = 0, largest = 0;
    for (size_t i = 0; i < count; i++) {
        double distance = fabs((double)a[i] - b[i]);
        if (!(distance <= apart)) apart = distance;
        if (fabs(b[i]) > largest) largest = fabs(b[i]);
    }
    return largest > 0 ? apart / largest : apart;
}

int report(const char *what, double error, double allowed) {
    int good = error <= allowed;
    printf("%-40s error %.1e  %s\n", what, error, good ? "ok" : "WRONG");
    return !good;
}

usp_tensor dense(void *data, int64_t tokens, int64_t heads, int64_t dim) {
    return (usp_tensor){data, tokens * heads * dim, heads * dim, dim};
}

size_t example_elements(const example_shape *shape) {
    return (size_t)shape->batch * (size_t)shape->tokens * (size_t)shape->heads * (size_t)shape->dim;
}

/* Offset of the vector of (batch, token, head). */
static size_t at(const example_shape *s, int b, int t, int h) {
    return ((((size_t)b * (size_t)s->tokens + (size_t)t) * (size_t)s->heads) + (size_t)h) * (size_t)s->dim;
}

static double dot(const float *a, const float *b, int dim) {
    double sum = 0;
    for (int i = 0; i < dim; i++) sum += (double)a[i] * b[i];
    return sum;
}

static void add_scaled(float *to, double scale, const float *from, int dim) {
    for (int i = 0; i < dim; i++) to[i] += (float)(scale * from[i]);
}

/* weight[0 .. t] = softmax over the keys that query t may see. */
static void weigh(const example_shape *s, const float *q, const float *k, int b, int t, int h, double *weight) {
    double sum = 0;
    for (int j = 0; j <= t; j++) {
        weight[j] = exp(dot(q + at(s, b, t, h), k + at(s, b, j, h), s->dim) / sqrt(s->dim));
        sum += weight[j];
    }
    for (int j = 0; j <= t; j++) weight[j] /= sum;
}

void plain_forward(const example_shape *s, const float *q, const float *k, const float *v, float *out) {
    double *weight = must_allocate((size_t)s->tokens * sizeof *weight);
    for (size_t i = 0; i < example_elements(s); i++) out[i] = 0;
    for (int row = 0; row < s->batch * s->tokens * s->heads; row++) {
        int h = row % s->heads, t = row / s->heads % s->tokens, b = row / s->heads / s->tokens;
        weigh(s, q, k, b, t, h, weight);
        for (int j = 0; j <= t; j++) add_scaled(out + at(s, b, t, h), weight[j], v + at(s, b, j, h), s->dim);
    }
    free(weight);
}

/* One query's part: dP = dout v, dS = P (dP - sum P dP), dq += dS k, dk += dS q, dv += P dout. */
static void backward_row(const example_shape *s, size_t query, const size_t *key, int keys, const double *weight,
                         const float *q, const float *k, const float *v, const float *dout, float *dq, float *dk,
                         float *dv) {
    double mean = 0;
    for (int j = 0; j < keys; j++) mean += weight[j] * dot(dout + query, v + key[j], s->dim);
    for (int j = 0; j < keys; j++) {
        double dscore = weight[j] * (dot(dout + query, v + key[j], s->dim) - mean) / sqrt(s->dim);
        add_scaled(dq + query, dscore, k + key[j], s->dim);
        add_scaled(dk + key[j], dscore, q + query, s->dim);
        add_scaled(dv + key[j], weight[j], dout + query, s->dim);
    }
}

void plain_backward(const example_shape *s, const float *q, const float *k, const float *v, const float *dout,
                    float *dq, float *dk, float *dv) {
    double *weight = must_allocate((size_t)s->tokens * sizeof *weight);
    size_t *key = must_allocate((size_t)s->tokens * sizeof *key);
    for (size_t i = 0; i < example_elements(s); i++) dq[i] = dk[i] = dv[i] = 0;
    for (int row = 0; row < s->batch * s->tokens * s->heads; row++) {
        int h = row % s->heads, t = row / s->heads % s->tokens, b = row / s->heads / s->tokens;
        weigh(s, q, k, b, t, h, weight);
        for (int j = 0; j <= t; j++) key[j] = at(s, b, j, h);
        backward_row(s, at(s, b, t, h), key, t + 1, weight, q, k, v, dout, dq, dk, dv);
    }
    free(key);
    free(weight);
}
