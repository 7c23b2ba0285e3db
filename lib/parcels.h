/* parcels.h - the messages of softmax attention's route: keys toward their readers, gradients back to their owners. */
#ifndef USP_PARCELS_H
#define USP_PARCELS_H
#include "exchange.h"
#include "slices.h"

/* k and v side by side, as the ring sends them: of the layer's dtype; as fp32 gradients. */
usp_bundle usp_parcels_bundle(const usp_layer *layer);
int64_t usp_parcels_bytes(const usp_layer *layer, int64_t rows, usp_dtype dtype);

/* Keys of stage t: what relays send on or owners give to their readers, and where they arrive. Any may be NULL, to
 * count. */
typedef struct usp_key_memory {
    char *own;           /* the own block */
    usp_tensor lying[2]; /* own k and v, for keys that go in parts */
    char *packed;        /* those of own rows that do not lie side by side */
    char *before;        /* keys of stage t - 1, which a relay sends on */
    char *arriving;      /* of stage t */
} usp_key_memory;

/* Own keys go in parts, k and v of each batch entry, from where they lie: to where they belong they are rows. */
static inline int usp_parcels_go_in_parts(const usp_layer *layer) {
    const usp_route_plan *route = &layer->plan->route;
    int few = 2 * layer->config.batch <= USP_MOST_PIECES;
    return usp_layer_reaches(layer, USP_AXIS_RING) && layer->mesh.ulysses == 1 && usp_route_is_single(route) &&
           route->pack_limit == 0 && few;
}

/* Adds copies of what must be packed for the readers of stage t. */
void usp_parcels_pack(usp_layer *layer, int t, const usp_key_memory *memory);
void usp_parcels_post_keys(const usp_layer *layer, int t, const usp_key_memory *memory, usp_messages *messages);

/* k (part 0) or v of so many rows of own keys, or of a stage's: of keys that go in parts one behind the other, else
 * side by side. */
usp_tensor usp_parcels_block(const usp_layer *layer, void *block, int64_t rows, int part);

/* Gradients of stage t's keys to their owners, and those of own keys from their readers. */
void usp_parcels_post_gradients(const usp_layer *layer, int t, const char *leaving, char *arriving,
                                usp_messages *messages);
/* Adds what has arrived to the own rows' sums, reader after reader. */
usp_status usp_parcels_add(usp_layer *layer, int t, char *arrived, const usp_tensor sums[2], usp_stream stream);

/* The same of one slice of the heads, of a stage that has one source and one reader: where in a block of gradients of
 * so many rows the slice's dk (part 0) and dv are; the layer's list of messages; and what arrived. */
usp_tensor usp_parcels_slice_block(const usp_layer *layer, char *block, int64_t rows, usp_slice slice, int part);
void usp_parcels_post_slice(usp_layer *layer, int t, char *leaving, char *arriving, usp_slice slice);
usp_status usp_parcels_add_slice(usp_layer *layer, int t, char *arrived, const usp_tensor sums[2], usp_slice slice,
                                 usp_stream stream);

#endif
