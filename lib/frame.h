/* frame.h - the memory and the lists of one call, carved from workspace and saved by walking the kind's operands. */
#ifndef USP_FRAME_H
#define USP_FRAME_H
#include "exchange.h"

enum { USP_MOST_BUNDLES = 4, USP_MOST_TENSORS = 8 }; /* of one way in or out; of a call */

/* A state, or a number for each head, on its way between all heads and own heads. */
typedef struct usp_head_part {
    const usp_operand_row *row;
    int64_t elements; /* of a head */
    int batch;
    float *all;     /* the caller's */
    float *own;     /* [batch][own heads][elements] */
    float *staging; /* all heads, rank after rank; out only */
} usp_head_part;

typedef struct usp_frame {
    const usp_operand_row *rows;
    int count;
    usp_bundle in[USP_MOST_BUNDLES], out[USP_MOST_BUNDLES];
    int ins, outs;
    usp_head_part head_in[USP_MOST_BUNDLES], head_out[USP_MOST_BUNDLES];
    int head_ins, head_outs;
    usp_inner local; /* the caller's own tokens: what derive works on */
    usp_inner inner; /* what the inner stage works on */
} usp_frame;

/* Does the configuration ask for the operand? */
int usp_row_asked(const usp_layer *layer, const usp_operand_row *row);

/* Carves a pass. `args` are the caller's (NULL: to measure); without `moves` the inner stage works on them as they are.
 * `kept` is what forward keeps: memory of the caller's or, where it gives none, of the workspace. */
void usp_frame_open(const usp_layer *layer, usp_pass pass, const void *args, int moves, usp_arena *kept,
                    usp_arena *workspace, usp_frame *frame);

#endif
