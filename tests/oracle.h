/* oracle.h - the truth: attention of the whole sequence in double precision, forward and backward, on one thread.
 * Does not know ranks, layouts or strides, and shares no code with the library. */
#ifndef USP_TESTS_ORACLE_H
#define USP_TESTS_ORACLE_H
#include <stdint.h>

/* Tensors are dense [batch, token, head, dim]; lse [batch, token, head]; states [batch, out head, dim, value_dim].
 * Output head h reads head h * x / H of a tensor with x heads, H = the most heads of the three. */
typedef struct usp_oracle {
    int linear, causal;
    /* Which pairs are allowed, by its words: the window around the diagonal (0: no limit, -1: no key), which lies at
     * the beginning or at the end of each document; documents by their ends (0: one); prefixes; parents. Keys are the
     * queries unless key_ends are given or their number differs. */
    int64_t left, right;
    int bottom_right;
    int64_t documents;
    const int64_t *ends, *key_ends, *prefixes, *parents;
    int batch, heads, key_heads, value_heads, dim, value_dim;
    int64_t tokens, keys;
    double scale;
    const float *decay;            /* [H] natural logarithms, NULL: none */
    double soft_cap;               /* 0: none */
    const float *slopes, *sinks;   /* [H], NULL: none */
    float dropout;                 /* 0: none; the words are those of lib/dropout.h */
    const uint64_t *dropout_state; /* seed, offset */
    const double *dlse;            /* [batch, token, head], NULL: none */
    /* NULL: exact. Else the oracle becomes a plain computation in a lower precision: what such a computation stores in
     * that precision is rounded: results, and the operands of products: probabilities, score gradients, states. */
    double (*round)(double);
    int exact_operands;                                              /* with round: only results are rounded */
    const double *q, *k, *v, *dout, *initial_state, *dfinal_state;   /* the states may be NULL */
    double *out, *lse, *dq, *dk, *dv, *final_state, *dinitial_state; /* all are written */
    double *dsinks, *max_logit;                                      /* [H], softmax: written too, unless NULL */
} usp_oracle;

int usp_oracle_allows(const usp_oracle *o, int64_t query, int64_t key);

int usp_oracle_heads(const usp_oracle *o); /* H */
void usp_oracle_run(const usp_oracle *o);

#endif
