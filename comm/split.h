/* split.h - what NCCL alone offers: ids for its ranks to meet by, and communicators of the caller's own. */
#ifndef USP_SPLIT_H
#define USP_SPLIT_H
#include "transport.h"

usp_status usp_nccl_unique_id(usp_unique_id *);
/* Collective: the caller's own communicator over the ranks that pass the same colour, ordered by key. All ranks make
 * the colours by one rule: lib/mesh.c sees to it. UNSUPPORTED where the transport is another one. */
usp_status usp_nccl_split(usp_transport *, int colour, int key, struct ncclComm **);
void usp_nccl_split_destroy(usp_transport *, struct ncclComm *);

#endif
