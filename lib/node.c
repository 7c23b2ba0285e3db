/* node.c - tells hosts apart by the identity their kernel made at boot, or by the one the configuration gives, and
 * counts the ranks of each. Chooses nothing. */
#define _GNU_SOURCE
#include "node.h"
#include <unistd.h>

/* Never 0, nor an identity that a configuration can give. */
static uint64_t host_identity(void) {
    char name[256] = "";
    if (gethostname(name, sizeof name - 1) != 0) name[0] = 0;
    return usp_hash(usp_hash_boot(2), name, sizeof name) | UINT64_C(1) << 63;
}

uint64_t usp_node_identity(int given) {
    return given ? (uint64_t)given : host_identity();
}

void usp_node_count(usp_world *world) {
    const int *node = world->meeting.node;
    int mine = world->transport->rank;
    for (int rank = 0; rank < world->transport->size; rank++) {
        int here = node[rank] == node[mine];
        world->nodes += node[rank] == rank;
        world->local_size += here;
        world->local_rank += here && rank < mine;
    }
}
