/* node.h - which ranks of a world share a host. */
#ifndef USP_NODE_H
#define USP_NODE_H
#include "world.h"

/* Collective: finds world->nodes, local_rank and local_size. `given` is the configuration's identity, 0: this host's.
 */
usp_status usp_node_find(usp_world *world, int given);

#endif
