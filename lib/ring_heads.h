/* ring_heads.h - numbers of heads, one for each own head, from every ring rank to every other. */
#ifndef USP_RING_HEADS_H
#define USP_RING_HEADS_H
#include "layer.h"

/* Posts them, and theirs to `all`, [ring][own heads]. Both NULL: to count. */
void usp_ring_heads_post(const usp_layer *layer, const float *mine, float *all, usp_messages *messages);
/* The same as an exchange of its own, which `stream` waits for; `all` has the own ones too then. */
usp_status usp_ring_heads_gather(usp_layer *layer, const float *mine, float *all, usp_stream stream);

#endif
