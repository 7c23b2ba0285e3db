/* exchange.h - the head exchange (Ulysses): own tokens of all heads <-> all tokens of the ring rank for own heads.
 *
 * A bundle is one or two operands that travel together, in pieces. Where the tokens of a rank lie in the block in few
 * runs, a piece is one run of one part, and travels from where it is to where it belongs as rows. Where they do not, as
 * with many documents on the per-document layout, a piece is a whole part, which copies pack and land by the plan's
 * maps of rows. Copies serve the ends that hold another dtype, whose heads lie apart, or that are summed, too. All in
 * one list however many peers, parts and documents there are. */
#ifndef USP_EXCHANGE_H
#define USP_EXCHANGE_H
#include "layer.h"

/* One operand at both ends: own tokens with all heads, the ring block's rows with own heads. */
typedef struct usp_bundle_part {
    usp_operand like; /* has its heads */
    int dim;
    usp_dtype tokens_dtype, block_dtype;
    usp_tensor tokens, block;
} usp_bundle_part;

enum { USP_MOST_PIECES = USP_MOST_RUNS }; /* of a bundle between two ranks, batch entries counted */

typedef struct usp_bundle {
    int parts;
    int keys;       /* rows are keys, not queries */
    int sums;       /* toward tokens: parts of shared heads are summed, in fp32 in rank order */
    usp_dtype wire; /* of messages */
    usp_bundle_part part[2];
    usp_slice slice;                /* what travels of the heads of each rank */
    int carved;                     /* the block is: what is sent may arrive in it */
    char *tokens_side, *block_side; /* packed: own tokens for all other peers; other peers' tokens of the block */
    float *sum;                     /* own tokens of all heads */
} usp_bundle;

/* Elements of one (token, batch) row with ulysses rank u's heads. */
int64_t usp_bundle_row(const usp_layer *layer, const usp_bundle *bundle, int u);

/* Bytes of the ring block for own heads, and its parts side by side as views of it. */
int64_t usp_bundle_block_bytes(const usp_layer *layer, const usp_bundle *bundle, usp_dtype dtype);
usp_tensor usp_bundle_block(const usp_layer *layer, const usp_bundle *bundle, void *block, usp_dtype dtype, int part);

/* A copy of rank u's heads of a part, still without its ends. */
usp_copy usp_bundle_copy(const usp_layer *layer, const usp_bundle *bundle, int part, int u, int64_t tokens);

/* Carves what lies between the two ends. */
void usp_bundle_carve(const usp_layer *layer, usp_bundle *bundle, usp_arena *arena);

/* Own tokens' own heads, which do not travel, of all groups: adds copies to the block or, where nothing is summed, from
 * it. */
void usp_bundle_keep(usp_layer *layer, const usp_bundle *bundle, int to_heads);

/* Toward heads: pack adds copies, post messages; when these have arrived land adds copies. */
void usp_bundle_pack(usp_layer *layer, const usp_bundle *bundle);
void usp_bundle_land(usp_layer *layer, const usp_bundle *bundle);

/* Messages to each peer and from each. */
void usp_bundle_post(const usp_layer *layer, const usp_bundle *bundle, usp_messages *messages, int to_heads);

/* Toward tokens: lift adds copies, post messages; when these have arrived unpack copies, at once where it sums. */
void usp_bundle_lift(usp_layer *layer, const usp_bundle *bundle);
usp_status usp_bundle_unpack(usp_layer *layer, const usp_bundle *bundle, usp_stream stream);

/* Bytes of workspace of the head exchange as a call of its own (exchange_alone.c), noted in `shape`. */
size_t usp_exchange_alone_bytes(const usp_layer *layer, usp_arena *shape);

/* Copies of any one list of `bundles` bundles at most, and messages of one way. */
static inline int64_t usp_bundle_copies(const usp_layer *layer, int bundles) {
    return bundles * (USP_MOST_PIECES * (int64_t)layer->mesh.ulysses + 4);
}
static inline int64_t usp_bundle_messages(const usp_layer *layer, int bundles) {
    return bundles * USP_MOST_PIECES * (int64_t)layer->mesh.ulysses;
}

#endif
