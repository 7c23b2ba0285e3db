/* exchange.h - the head exchange (Ulysses): own tokens of all heads <-> all tokens of the ring rank for own heads.
 *
 * A bundle is one or two operands that travel as one row per (token, batch): [rows][batch][heads * dim ...]. Toward
 * heads tensors are packed per peer and land in place; toward tokens blocks leave in place and are unpacked per peer.
 */
#ifndef USP_EXCHANGE_H
#define USP_EXCHANGE_H
#include "layer.h"

typedef struct usp_bundle {
    int parts;
    usp_operand operand[2];
    int dim[2];
    usp_dtype dtype; /* on the wire and in the block */
    int keys;        /* rows are keys, not queries */
} usp_bundle;

usp_bundle usp_bundle_of(const usp_layer *layer, usp_operand operand, usp_dtype dtype); /* one operand alone */
usp_bundle usp_bundle_keys(const usp_layer *layer, usp_dtype dtype);                    /* k and v */
usp_bundle usp_bundle_rows(usp_operand operand); /* one fp32 number per token and head: lse, delta */

/* Room for the ring block for own heads, whatever the documents become. */
int64_t usp_bundle_block_bytes(const usp_layer *layer, const usp_bundle *bundle);

/* Part `part` of a packed block that holds ulysses rank u's heads, as a tensor. */
usp_tensor usp_bundle_view(const usp_layer *layer, const usp_bundle *bundle, void *block, int part, int u);
/* Elements of one (token, batch) row with ulysses rank u's heads. */
int64_t usp_bundle_row(const usp_layer *layer, const usp_bundle *bundle, int u);

/* The buffers of one bundle in flight: the ring block; own tokens packed for, or received from, all other peers; where
 * messages lie whose rows are scattered in the block (NULL: they land in place); the fp32 sum of replicated heads. */
typedef struct usp_transit {
    usp_bundle bundle;
    void *block, *staging, *landing, *sum;
} usp_transit;

/* Carves staging, landing and (if `toward_tokens`) sum; block is the caller's. */
usp_transit usp_transit_carve(const usp_layer *layer, const usp_bundle *bundle, void *block, int toward_tokens,
                              usp_arena *arena);

/* Toward heads: pack own tokens (of dtype `from`), post messages, and after the exchange land. */
usp_status usp_transit_pack(usp_layer *layer, const usp_transit *transit, const usp_tensor *tokens, usp_dtype from,
                            usp_stream stream);
void usp_transit_post_to_heads(const usp_layer *layer, const usp_transit *transit, usp_messages *messages);
usp_status usp_transit_land(usp_layer *layer, const usp_transit *transit, usp_stream stream);

/* Toward tokens: lift scattered rows, post messages, and after the exchange unpack into own tokens (of dtype `to`),
 * summing replicated heads in rank order. */
usp_status usp_transit_lift(usp_layer *layer, const usp_transit *transit, usp_stream stream);
void usp_transit_post_to_tokens(const usp_layer *layer, const usp_transit *transit, usp_messages *messages);
usp_status usp_transit_unpack(usp_layer *layer, const usp_transit *transit, const usp_tensor *tokens, usp_dtype to,
                              usp_stream stream);

#endif
