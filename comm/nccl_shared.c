/* nccl_shared.c - what NCCL gives to the caller: memory that it has registered, and communicators. */
#define _GNU_SOURCE
#include <cuda_runtime_api.h>

#include "error.h"
#include "split.h"
#include "nccl_state.h"

/* ---- shared memory ----------------------------------------------------------------------------------------------- */

static usp_status use_gpu(const usp_nccl *self) {
    cudaError_t error = cudaSetDevice(self->gpu);
    return error == cudaSuccess ? USP_OK : usp_fail(USP_DEVICE, "cudaSetDevice failed: %s", cudaGetErrorString(error));
}

static usp_status alloc_piece(usp_nccl *self, size_t bytes, usp_shared **piece) {
    const usp_host *host = self->base.host;
    void *memory = NULL;
    USP_TRY(use_gpu(self));
    USP_TRY(usp_host_alloc(host, sizeof(usp_shared), "shared memory", &memory));
    *piece = memory;
    (*piece)->bytes = bytes;
    ncclResult_t result = ncclMemAlloc(&(*piece)->memory, bytes);
    if (result == ncclSuccess) return USP_OK;
    usp_host_free(host, *piece);
    *piece = NULL;
    cudaGetLastError();
    return usp_fail(USP_NO_MEMORY, "rank %d cannot allocate %zu bytes of shared memory: %s", self->base.rank, bytes,
                    ncclGetErrorString(result));
}

void usp_nccl_free_piece(usp_nccl *self, usp_shared *piece) {
    if (piece == NULL) return;
    if (use_gpu(self) == USP_OK) ncclMemFree(piece->memory);
    usp_host_free(self->base.host, piece);
}

/* Rounded up to what NCCL registers; what is more than there can be stays so. */
static size_t whole_bytes(size_t bytes) {
    const size_t unit = NCCL_WIN_REQUIRED_ALIGNMENT, most = SIZE_MAX / unit;
    size_t units = bytes / unit + (bytes % unit != 0);
    return unit * (units < 1 ? 1 : units < most ? units : most);
}

/* The smallest spare piece that is large enough: all ranks have the same ones. */
static usp_shared *take_spare(usp_nccl *self, size_t bytes) {
    usp_shared *best = NULL;
    for (usp_shared *piece = self->shared; piece != NULL; piece = piece->next)
        if (piece->spare && piece->bytes >= bytes && (best == NULL || piece->bytes < best->bytes)) best = piece;
    if (best != NULL) best->spare = 0;
    return best;
}

usp_status usp_nccl_alloc_shared(usp_transport *transport, size_t bytes, void **memory) {
    usp_nccl *self = usp_nccl_of(transport);
    size_t whole = whole_bytes(bytes);
    USP_TRY(usp_nccl_check(self));
    usp_shared *piece = take_spare(self, whole);
    if (piece == NULL) {
        USP_TRY(alloc_piece(self, whole, &piece));
        piece->next = self->shared;
        self->shared = piece;
    }
    piece->fresh = 1;
    *memory = piece->memory;
    return USP_OK;
}

static usp_shared **link_of(usp_nccl *self, void *memory) {
    usp_shared **link = &self->shared;
    while ((*link)->memory != memory) link = &(*link)->next;
    return link;
}

/* Where NCCL refuses to register memory, it refuses on all ranks, and plain memory does. A piece whose registration
 * failed stays in the list: NCCL may still hold it, and destroy knows when it does not. */
usp_status usp_nccl_register_shared(usp_transport *transport, void *memory) {
    usp_nccl *self = usp_nccl_of(transport);
    usp_shared *piece = *link_of(self, memory);
    ncclResult_t result = ncclInProgress;
    piece->fresh = 0;
    if (piece->window != NULL) return USP_OK;
    pthread_mutex_lock(&self->lock);
    if (self->comm != NULL)
        result = ncclCommWindowRegister(self->comm, memory, piece->bytes, &piece->window, NCCL_WIN_COLL_SYMMETRIC);
    pthread_mutex_unlock(&self->lock);
    if (!usp_nccl_went_wrong(result)) USP_TRY(usp_nccl_settle(self, result, "ncclCommWindowRegister"));
    if (piece->window == NULL)
        usp_host_log(transport->host, 1, "rank %d: NCCL did not register %zu bytes: exchanges with them are slower",
                     transport->rank, piece->bytes);
    return USP_OK;
}

void usp_nccl_deregister(usp_nccl *self, usp_shared *piece) {
    ncclResult_t result = ncclSuccess;
    pthread_mutex_lock(&self->lock);
    if (self->comm != NULL && piece->window != NULL) result = ncclCommWindowDeregister(self->comm, piece->window);
    pthread_mutex_unlock(&self->lock);
    if (usp_nccl_went_wrong(result))
        usp_host_log(self->base.host, 1, "rank %d: NCCL did not let go of %zu registered bytes: %s", self->base.rank,
                     piece->bytes, ncclGetErrorString(result));
    piece->window = NULL;
}

static usp_status has_any_captured(usp_nccl *self, int *any) {
    USP_TRY(usp_transport_allgather(&self->base, &self->captured, self->flags, sizeof self->captured));
    for (int rank = 0; rank < self->base.size; rank++) *any |= self->flags[rank];
    return USP_OK;
}

/* All ranks have come before this one takes its memory away; one that is fresh goes back as it came.
 * Where ranks have failed destroy frees it. */
usp_status usp_nccl_free_shared(usp_transport *transport, void *memory) {
    usp_nccl *self = usp_nccl_of(transport);
    usp_shared **link = link_of(self, memory), *piece = *link;
    piece->spare = piece->fresh && piece->window != NULL;
    if (!piece->fresh) USP_TRY(has_any_captured(self, &piece->spare));
    if (piece->spare) return USP_OK;
    *link = piece->next;
    usp_nccl_deregister(self, piece);
    usp_nccl_free_piece(self, piece);
    return USP_OK;
}

/* ---- communicators for the caller -------------------------------------------------------------------------------- */

usp_status usp_nccl_split(usp_transport *transport, int colour, int key, struct ncclComm **child) {
    usp_nccl *self = usp_nccl_of(transport);
    if (transport->ops != &usp_nccl_ops)
        return usp_fail(USP_UNSUPPORTED, "an ncclComm_t is made by the NCCL transport alone; this one is %s",
                        transport->ops->name);
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.blocking = 1;
    config.splitShare = 0;
    USP_TRY(usp_nccl_check(self));
    self->child = NULL;
    pthread_mutex_lock(&self->lock);
    ncclResult_t result = ncclInProgress;
    if (self->comm != NULL) result = ncclCommSplit(self->comm, colour, key, &self->child, &config);
    pthread_mutex_unlock(&self->lock);
    USP_TRY(usp_nccl_settle(self, result, "ncclCommSplit"));
    *child = self->child;
    return USP_OK;
}

void usp_nccl_split_destroy(usp_transport *transport, struct ncclComm *child) {
    void *memory = NULL;
    if (child == NULL) return;
    if (usp_host_alloc(transport->host, sizeof(usp_release), "a communicator's end", &memory) != USP_OK) {
        usp_host_log(transport->host, 1, "no memory to free a communicator: it is left behind");
        return;
    }
    usp_nccl_run_release(memory, child, usp_nccl_check(usp_nccl_of(transport)) != USP_OK);
    usp_nccl_finish_release(transport->host, memory);
}
