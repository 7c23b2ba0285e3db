/* gather.c - brings together what every rank of a world has, in host memory: numbers, and parts of one size. */
#include "world.h"
#include <string.h>

usp_status usp_world_gather(usp_world *world, const char *what, const void *mine, size_t own, size_t piece,
                            void **all) {
    void *part = NULL;
    usp_status status = usp_host_alloc(&world->host, piece, what, &part);
    if (status == USP_OK) status = usp_host_alloc(&world->host, piece * (size_t)world->transport->size, what, all);
    status = usp_world_agree(world, status, &(usp_agreement){.what = what});
    if (status == USP_OK && own) memcpy(part, mine, own);
    if (status == USP_OK) status = usp_transport_allgather(world->transport, part, *all, piece);
    usp_host_free(&world->host, part);
    return status;
}

usp_status usp_world_largest(usp_world *world, const char *what, int64_t mine, int64_t *most) {
    void *all = NULL;
    usp_status status = usp_world_gather(world, what, &mine, sizeof mine, sizeof mine, &all);
    const int64_t *numbers = all;
    *most = 0;
    for (int rank = 0; rank < world->transport->size && status == USP_OK; rank++)
        if (numbers[rank] > *most) *most = numbers[rank];
    usp_host_free(&world->host, all);
    return status;
}
