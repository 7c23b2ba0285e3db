/* attn.h - the table of attention kinds: what runs on the ring axis between the two head exchanges. Every kind's file
 * has the same parts in the same order: buffers, forward, backward, cost, table. */
#ifndef USP_ATTN_H
#define USP_ATTN_H
#include "arena.h"
#include "device.h"

/* The inner stage's tensors: this ring rank's rows, this ulysses rank's heads. Gradients are of the layer's dtype, or
 * fp32 where sum_queries or sum_keys says that the head exchange will still add replicas. */
typedef struct usp_inner {
    usp_tensor q, k, v, out, dout, dq, dk, dv;
    void *key_block;      /* room for k and v packed as the ring sends them, where ulysses > 1 */
    int packed;           /* they are in it */
    const float *delta;   /* softmax backward: [batch, heads, rows] */
    float *lse;           /* softmax: [batch, heads, rows] */
    float *states;        /* linear: kept states, or NULL: recompute */
    const float *initial; /* linear, own heads: states and their gradients going in and coming out */
    float *final;
    const float *dfinal;
    float *dinitial;
    int sum_queries, sum_keys;
    usp_arena arena; /* what is left of the workspace */
    usp_stream stream;
} usp_inner;

typedef struct usp_messages usp_messages;

typedef struct usp_attn_ops {
    const char *name;
    /* Bytes of workspace that forward or backward carves from inner->arena; of saved. */
    size_t (*workspace)(const usp_layer *, usp_pass);
    size_t (*saved)(const usp_layer *);
    usp_status (*forward)(usp_layer *, usp_inner *);
    usp_status (*backward)(usp_layer *, usp_inner *);
    /* Posts what a pass sends and receives on the ring, to be counted; operations of ring rank r, a head and batch. */
    void (*count_messages)(const usp_layer *, usp_pass, usp_messages *);
    double (*flops)(const usp_layer *, usp_pass, int r);
} usp_attn_ops;

extern const usp_attn_ops usp_attn_softmax, usp_attn_linear;

#endif
