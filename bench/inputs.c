/* inputs.c - rows of pseudo-random test tensors.
 * Elements have mean 0 and variance 1, on which the checker's tolerances rest. */
#include "inputs.h"
#include "number.h"

int usp_inputs_out_heads(const usp_case *c) {
    return c->kv_heads > c->heads ? c->kv_heads : c->heads;
}

int usp_inputs_heads(const usp_case *c, usp_input input) {
    if (input == USP_INPUT_DOUT) return usp_inputs_out_heads(c);
    return input == USP_INPUT_Q ? c->heads : c->kv_heads;
}

int usp_inputs_dim(const usp_case *c, usp_input input) {
    return input == USP_INPUT_Q || input == USP_INPUT_K ? c->dim : c->value_dim;
}

/* Index of the row's first element in the whole [batch, seq, heads, dim]. */
static uint64_t row_index(const usp_case *c, usp_input input, int batch, int64_t token, int head) {
    uint64_t row = ((uint64_t)batch * (uint64_t)c->seq + (uint64_t)token) * (uint64_t)usp_inputs_heads(c, input);
    return (row + (uint64_t)head) * (uint64_t)usp_inputs_dim(c, input);
}

void usp_inputs_row(const usp_case *c, usp_input input, int batch, int64_t token, int head, double *row) {
    uint64_t first = row_index(c, input, batch, token, head);
    usp_number_random_row(c->dtype, (uint64_t)input, first, usp_inputs_dim(c, input), row);
}

void usp_inputs_fill(const usp_case *c, usp_input input, const usp_sequence *sequence, int rank, void *local) {
    int64_t tokens = usp_sequence_local_tokens(sequence, rank);
    size_t width = (size_t)usp_inputs_heads(c, input) * (size_t)usp_inputs_dim(c, input);
    char *at = local;
    for (int b = 0; b < c->batch; b++)
        for (int64_t t = 0; t < tokens; t++, at += width * usp_dtype_size(c->dtype)) {
            uint64_t first = row_index(c, input, b, usp_sequence_to_global(sequence, rank, t), 0);
            usp_number_random_fill(c->dtype, (uint64_t)input, first, width, at);
        }
}

void usp_inputs_sinks(const usp_case *c, float *sinks) {
    enum { STREAM = USP_INPUT_DOUT + 1 };
    for (int h = 0; h < c->heads; h++) sinks[h] = (float)usp_number_random(STREAM, (uint64_t)h);
}
