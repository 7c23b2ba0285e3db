/* node.c - tells hosts apart by the identity their kernel made at boot, or by the one the configuration gives, and
 * counts the ranks of each. Chooses nothing. */
#define _GNU_SOURCE
#include "node.h"
#include "error.h"
#include <unistd.h>

/* Never 0, nor an identity that a configuration can give. */
static uint64_t host_identity(void) {
    char name[256] = "";
    if (gethostname(name, sizeof name - 1) != 0) name[0] = 0;
    return usp_hash(usp_hash_boot(2), name, sizeof name) | UINT64_C(1) << 63;
}

usp_status usp_node_find(usp_world *world, int given) {
    uint64_t mine = given ? (uint64_t)given : host_identity(), *all = world->ballots; /* a ballot has room for it */
    USP_TRY(world->comm->ops->allgather(world->comm, &mine, all, sizeof mine));
    world->nodes = world->local_rank = world->local_size = 0;
    for (int rank = 0; rank < world->comm->size; rank++) {
        int first = 1;
        for (int before = 0; before < rank; before++) first &= all[before] != all[rank];
        world->nodes += first;
        world->local_size += all[rank] == mine;
        world->local_rank += all[rank] == mine && rank < world->comm->rank;
    }
    return USP_OK;
}
