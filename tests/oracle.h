/* oracle.h - the truth: attention of the whole sequence in double precision, forward and backward, on one thread.
 * Does not know ranks, layouts or strides, and shares no code with the library. */
#ifndef USP_TESTS_ORACLE_H
#define USP_TESTS_ORACLE_H
#include <stdint.h>

/* Tensors are dense [batch, token, head, dim]; lse [batch, token, head]; states [batch, out head, dim, value_dim].
 * Output head h reads head h * x / H of a tensor with x heads, H = the most heads of the three. */
typedef struct usp_oracle {
    int linear, causal;
    int batch, heads, key_heads, value_heads, dim, value_dim;
    int64_t tokens, keys;
    double scale;
    const float *decay; /* [H] natural logarithms, NULL: none */
    /* NULL: exact. Else the oracle becomes a plain computation in a lower precision: what such a computation stores in
     * that precision is rounded: results, and the operands of products: probabilities, score gradients, states. */
    double (*round)(double);
    int exact_operands;                                              /* with round: only results are rounded */
    const double *q, *k, *v, *dout, *initial_state, *dfinal_state;   /* the states may be NULL */
    double *out, *lse, *dq, *dk, *dv, *final_state, *dinitial_state; /* all are written */
} usp_oracle;

int usp_oracle_heads(const usp_oracle *o); /* H */
void usp_oracle_run(const usp_oracle *o);

#endif
