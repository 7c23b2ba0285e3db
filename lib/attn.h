/* attn.h - the table of attention kinds: what runs on the ring axis between the two head exchanges. Every kind's file
 * has the same parts in the same order: operands, buffers, forward, backward, cost, table. */
#ifndef USP_ATTN_H
#define USP_ATTN_H
#include "arena.h"
#include "device.h"
#include "operand.h"

/* One of `count` equal parts of heads. */
typedef struct usp_slice {
    int number, count;
} usp_slice;

/* The inner stage's operands: this ring rank's rows, this ulysses rank's heads. */
typedef struct usp_inner {
    usp_tensor q, k, v, out, dout, dq, dk, dv;
    float *delta, *lse, *dlse; /* [batch, heads, rows] */
    float *initial, *final, *dfinal, *dinitial;
    float *sinks, *dsinks, *max_logit;
    const uint64_t *dropout_state;
    void *keys;                /* room for k and v side by side as the ring sends them; NULL without ulysses */
    int packed;                /* they are in it */
    int exchanged;             /* operands are blocks of the workspace, not the caller's */
    int sum_queries, sum_keys; /* gradients are fp32: the exchange sums or converts them */
    usp_slice slice;           /* the own heads that are worked on now; of several only where no keys travel */
    void *kept;                /* what the kind itself keeps for backward: `saved` bytes */
    usp_arena arena;           /* what is left of the workspace */
    usp_stream stream;
} usp_inner;

/* The tensors of every kind, with which its tables begin. */
enum { USP_KEYS = 1, USP_KEY_GRADIENTS = 2 }; /* bundles */
/* clang-format off */
#define USP_FORWARD_TENSORS \
    {USP_GIVEN(usp_forward, q), USP_INNER(q), USP_FORM_TENSOR, USP_QUERY, USP_USE_KEPT, 0, 0}, \
    {USP_GIVEN(usp_forward, k), USP_INNER(k), USP_FORM_TENSOR, USP_KEY, USP_USE_KEPT, USP_KEYS, 0}, \
    {USP_GIVEN(usp_forward, v), USP_INNER(v), USP_FORM_TENSOR, USP_VALUE, USP_USE_KEPT, USP_KEYS, 0}, \
    {USP_GIVEN(usp_forward, out), USP_INNER(out), USP_FORM_TENSOR, USP_OUT, USP_USE_OUT, 0, 0}
#define USP_BACKWARD_TENSORS \
    {USP_GIVEN(usp_backward, q), USP_INNER(q), USP_FORM_TENSOR, USP_QUERY, USP_USE_KEPT, 0, 0}, \
    {USP_GIVEN(usp_backward, k), USP_INNER(k), USP_FORM_TENSOR, USP_KEY, USP_USE_KEPT, USP_KEYS, 0}, \
    {USP_GIVEN(usp_backward, v), USP_INNER(v), USP_FORM_TENSOR, USP_VALUE, USP_USE_KEPT, USP_KEYS, 0}, \
    {USP_GIVEN(usp_backward, out), USP_INNER(out), USP_FORM_TENSOR, USP_OUT, USP_USE_LOCAL, 0, 0}, \
    {USP_GIVEN(usp_backward, dout), USP_INNER(dout), USP_FORM_TENSOR, USP_OUT, USP_USE_IN, 0, 0}, \
    {USP_GIVEN(usp_backward, dq), USP_INNER(dq), USP_FORM_TENSOR, USP_QUERY, USP_USE_OUT, 0, 0}, \
    {USP_GIVEN(usp_backward, dk), USP_INNER(dk), USP_FORM_TENSOR, USP_KEY, USP_USE_OUT, USP_KEY_GRADIENTS, 0}, \
    {USP_GIVEN(usp_backward, dv), USP_INNER(dv), USP_FORM_TENSOR, USP_VALUE, USP_USE_OUT, USP_KEY_GRADIENTS, 0}
/* clang-format on */

typedef struct usp_messages usp_messages;

typedef struct usp_attn_ops {
    const char *name;
    const usp_operand_row *rows[2]; /* by usp_pass */
    int row_count[2];
    /* Measures what a pass carves from inner->arena, where operands are exchanged or not; bytes of what it keeps. */
    void (*measure)(const usp_layer *, usp_pass, int exchanged, usp_arena *);
    size_t (*saved)(const usp_layer *);
    /* Does it sum gradients over several stages? Then their blocks are fp32 where they are exchanged. NULL: never. */
    int (*sums)(const usp_layer *);
    /* Finds the derived operand from the others, `tokens` of `heads` heads, which may be those of the own tokens.
     * NULL: all operands are given. */
    usp_status (*derive)(usp_layer *, const usp_inner *, int64_t tokens, int heads);
    usp_status (*forward)(usp_layer *, usp_inner *);
    usp_status (*backward)(usp_layer *, usp_inner *);
    /* Posts what a pass sends and receives on the ring, to be counted; operations of ring rank r, a head and batch. */
    void (*count_messages)(const usp_layer *, usp_pass, usp_messages *);
    double (*flops)(const usp_layer *, usp_pass, int r);
} usp_attn_ops;

extern const usp_attn_ops usp_attn_softmax, usp_attn_linear;

/* All kinds, by usp_attention from 1 on. */
enum { USP_ATTN_KINDS = 2 };
extern const usp_attn_ops *const usp_attn_kinds[USP_ATTN_KINDS];

#endif
