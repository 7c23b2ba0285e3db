/* head_exchange.h - what heads have but tokens have not (states, sinks), between all heads and own heads. */
#ifndef USP_HEAD_EXCHANGE_H
#define USP_HEAD_EXCHANGE_H
#include "frame.h"

/* Own heads of what is given for all. */
void usp_heads_slice(usp_layer *layer, const usp_head_part *part);
/* Own heads' results to every rank of the ulysses axis, and all ranks' to where they belong. */
void usp_heads_post(const usp_layer *layer, const usp_head_part *part, usp_messages *messages);
void usp_heads_unpack(usp_layer *layer, const usp_head_part *part);

#endif
