/* softmax_buffers.h - what softmax attention carves of a workspace: where keys and their gradients lie on their way
 * round the ring, running sums, and what kernels work in. */
#ifndef USP_SOFTMAX_BUFFERS_H
#define USP_SOFTMAX_BUFFERS_H
#include "parcels.h"

enum { USP_KEY_PLACES = USP_SOFTMAX_STAGES - 1 };

typedef struct usp_softmax_buffers {
    char *own; /* keys: own, if nobody has them side by side; for readers; of stages 1, 2, ..., by turns in places */
    char *packed[USP_KEY_PLACES], *stage[USP_KEY_PLACES];
    int places;
    int32_t *arrived;            /* usp_softmax_ring's, `reached` behind it; NULL: kernels are given stage by stage */
    float *acc;                  /* forward: running output; backward: running dq */
    float *peak;                 /* [batch, heads, rows] */
    float *home;                 /* backward: fp32 gradients of own keys */
    char *leaving[2], *arriving; /* backward: fp32 gradients of stages' keys; of own keys, from readers */
    float *heads;                /* [ring + 1][heads]: every ring rank's numbers of heads */
    int32_t *turns;              /* of the kernels, as what follows */
    void *scratch;
} usp_softmax_buffers;

/* Rows of queries times batch and own heads. */
int64_t usp_softmax_rows(const usp_layer *layer);
usp_softmax_buffers usp_softmax_carve(const usp_layer *layer, usp_pass pass, int exchanged, usp_arena *arena);

/* Where the keys of stage t arrive, and those that are sent on or packed for it. */
usp_key_memory usp_softmax_keys(const usp_softmax_buffers *b, int t);
/* Of what begins at `arrived`. */
size_t usp_softmax_ring_bytes(const usp_layer *layer);

#endif
