/* bootstrap.c - what ranks can do that have nothing but an all-gather yet. It opens no connection. */
#include "comm.h"
#include "error.h"

usp_status usp_bootstrap_gather(const usp_bootstrap *bootstrap, const void *mine, void *all, size_t bytes_per_rank) {
    if (bootstrap->allgather(bootstrap->user, mine, all, bytes_per_rank) == 0) return USP_OK;
    return usp_fail(USP_COMM, "the all-gather callback failed on rank %d", bootstrap->rank);
}

usp_status usp_bootstrap_agree(const usp_bootstrap *bootstrap, usp_status mine) {
    unsigned char status = (unsigned char)mine, all[USP_BOOTSTRAP_AGREE];
    if (bootstrap->size > USP_BOOTSTRAP_AGREE) return mine;
    int failed = bootstrap->allgather(bootstrap->user, &status, all, 1);
    if (mine != USP_OK) return mine;
    if (failed) return usp_fail(USP_COMM, "the all-gather callback failed on rank %d", bootstrap->rank);
    for (int i = 0; i < bootstrap->size; i++)
        if (all[i] != USP_OK)
            return usp_fail(USP_PEER_FAILED, "rank %d could not join: %s", i, usp_status_string((usp_status)all[i]));
    return USP_OK;
}
