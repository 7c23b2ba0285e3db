/* node.h - which ranks share a host. */
#ifndef USP_NODE_H
#define USP_NODE_H
#include "world.h"

/* Of this host; `given` (usp_world_config.node) counts if not 0. */
uint64_t usp_node_identity(int given);
/* Sets nodes, local_rank and local_size. */
void usp_node_count(usp_world *world);

#endif
