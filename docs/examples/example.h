/* example.h - what all examples need and none is about: stopping on an error, numbers to compute, a plain reference.
 * The reference is the definition of causal attention written down, one rank, no blocks. */
#ifndef EXAMPLE_H
#define EXAMPLE_H
#include "usp.h"

enum { EXAMPLE_SKIPPED = 77 }; /* the exit status of "this machine lacks what the example needs" */

/* Ends the program with the library's sentence unless all is well. */
void must(usp_status status);
/* Zeroed memory, or the end of the program. */
void *must_allocate(size_t bytes);

/* Numbers between -1 and 1, the same for the same seed. */
void fill(float *data, size_t count, unsigned seed);
/* Largest |a - b| over the largest |b|. */
double difference(const float *a, const float *b, size_t count);
/* Prints what was compared; returns 1 where the error is too large. */
int report(const char *what, double error, double allowed);

/* A dense [batch, tokens, heads, dim] tensor. */
usp_tensor dense(void *data, int64_t tokens, int64_t heads, int64_t dim);

typedef struct example_shape {
    int batch, tokens, heads, dim;
} example_shape;

size_t example_elements(const example_shape *shape);
/* Causal softmax attention of dense tensors with scale 1 / sqrt(dim). */
void plain_forward(const example_shape *shape, const float *q, const float *k, const float *v, float *out);
void plain_backward(const example_shape *shape, const float *q, const float *k, const float *v, const float *dout,
                    float *dq, float *dk, float *dv);

#endif
