/* stage.h - one rank's part of a case: mesh, sequence, layer, tensors; set up, run and gathered into whole tensors.
 * Knows the public API only. */
#ifndef USP_TESTS_STAGE_H
#define USP_TESTS_STAGE_H
#include "cases.h"
#include "ranks.h"

typedef enum usp_part { USP_Q, USP_K, USP_V, USP_O, USP_DOUT, USP_DQ, USP_DK, USP_DV, USP_PARTS } usp_part;

/* Inputs of a case, by the numbers that their random elements come from. */
enum { USP_INITIAL_STATE = 10, USP_DFINAL_STATE = 11, USP_SINKS = 12, USP_DLSE = 13 };

/* The dropout state of all cases: seed and offset. */
extern const uint64_t usp_dropout_words[2];

/* One element of a whole input ([batch, token, head, dim], or a state) that is made another. */
typedef struct usp_spot {
    int input; /* a usp_part, or a state as above */
    int64_t index;
    double value;
} usp_spot;

typedef struct usp_stage {
    usp_rank *rank;
    usp_case c; /* completed */
    int p;      /* sequence rank */
    usp_mesh *mesh;
    usp_sequence *sequence,
        *keys; /* keys: says which tokens the local keys are; the sequence itself without key_tokens */
    usp_layer *layer;
    int64_t tokens, key_tokens; /* local */
    usp_sizes sizes;
    usp_view view[USP_PARTS];
    usp_buffer memory[USP_PARTS];
    int holder[USP_PARTS]; /* whose memory the view is in */
    usp_buffer lse, initial_state, final_state, dfinal_state, dinitial_state, workspace, saved;
    usp_buffer sinks, dsinks, dlse, max_logit, dropout_state;
    uint64_t input_hash;
} usp_stage;

/* All ranks' results together, as the dtype holds them; the states as this rank has them. Any may be NULL: not wanted.
 */
typedef struct usp_whole {
    int64_t out_count, lse_count, dq_count, dk_count, dv_count, state_count, head_count;
    float *out, *lse, *dq, *dk, *dv, *final_state, *dinitial_state; /* lse as [batch, token, head] */
    float *dsinks, *max_logit;                                      /* [heads], as this rank has them */
    usp_status refusal;                                             /* what create said where it refused */
} usp_whole;

/* Collective. Creates mesh, sequence and layer; on failure all of them are gone again and the status is the same on all
 * ranks. */
usp_status usp_stage_open(usp_rank *rank, const usp_case *c, usp_stage *stage);
/* Tensors, poisoned, with the case's inputs. 0, or 1 after saying why. */
int usp_stage_fill(usp_stage *stage);
/* Makes v = first * (tensor 2 of the seed) + second * (tensor 9). */
int usp_stage_mix_values(usp_stage *stage, double first, double second);
/* Other states than the case's; NULL: as they are. */
int usp_stage_set_states(usp_stage *stage, const float *initial, const float *dfinal);
/* Makes this rank's part of an input NaN. */
int usp_stage_spoil(usp_stage *stage, usp_part part);
/* Sets one element, on the rank that owns it. */
int usp_stage_set(usp_stage *stage, const usp_spot *spot);
/* Makes q, k and v the other's out, which has the same shape. */
int usp_stage_feed(usp_stage *stage, usp_stage *from);
/* Makes dout the sum of dq, dk and dv of the one that was fed. */
int usp_stage_feed_back(usp_stage *stage, usp_stage *fed);
/* The calls are given the bytes that they ask for, of which the last one is that of the stage's workspace. */
int usp_stage_forward(usp_stage *stage, int keep); /* keep: with saved */
int usp_stage_backward(usp_stage *stage);
/* The same results through tokens_to_heads, the inner calls and heads_to_tokens; for cases without lse and states. */
int usp_stage_forward_parts(usp_stage *stage);
int usp_stage_backward_parts(usp_stage *stage);
/* q, k, v and dout to heads and back, into dq, dk, dv and out. */
int usp_stage_round_trip(usp_stage *stage);
/* Poisons the results and the workspace again. */
int usp_stage_clear(usp_stage *stage);
/* Downloads, checks that nothing but the results was written, and gathers. Collective. */
int usp_stage_gather(usp_stage *stage, int backward, usp_whole *whole);
void usp_stage_close(usp_stage *stage);

usp_forward usp_stage_forward_arguments(const usp_stage *stage, int keep);
usp_backward usp_stage_backward_arguments(const usp_stage *stage);

void usp_whole_free(usp_whole *whole);

/* All of the above in one: 0 and the result, 1 after saying why, -1 if the create call refused. */
int usp_stage_run(usp_rank *rank, const usp_case *c, usp_whole *whole);
int usp_stage_run_spotted(usp_rank *rank, const usp_case *c, const usp_spot *spot, usp_whole *whole); /* NULL: none */

/* Collective over the mesh of the stage: every rank's `bytes` bytes, in order of p. */
int usp_stage_share(usp_stage *stage, const void *mine, size_t bytes, void *all);

#endif
