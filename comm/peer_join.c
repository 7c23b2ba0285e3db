/* peer_join.c - how ranks make a peer transport: what is each one's own, then what they map of each other's. */
#define _GNU_SOURCE
#include <string.h>

#include "error.h"
#include "peer_state.h"

enum { MOST_SLOT = 64 << 20, LEAST_SLOT = 1 << 20, SLOTS = 128 << 20 /* bytes of all, but where that is too little */ };

/* ---- this rank's own --------------------------------------------------------------------------------------------- */

/* The same on all ranks. */
static size_t slot_bytes(int size) {
    size_t bytes = MOST_SLOT;
    while (bytes > LEAST_SLOT && bytes * (size_t)(size - 1) > SLOTS) bytes /= 2;
    return bytes;
}

/* Looked up, so that the library need not link the driver. */
static usp_status find_batch(usp_peer *self) {
    enum cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
    void *entry = NULL;
    cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuStreamBatchMemOp", &entry, 12000, cudaEnableDefault, &found);
    if (error != cudaSuccess) cudaGetLastError();
    if (error != cudaSuccess || found != cudaDriverEntryPointSuccess)
        return usp_fail(USP_UNSUPPORTED, "the driver has no cuStreamBatchMemOp");
    memcpy(&self->batch, &entry, sizeof entry);
    error = cudaDeviceGetAttribute(&self->flushes, cudaDevAttrCanFlushRemoteWrites, self->gpu);
    return error == cudaSuccess ? USP_OK : usp_fail(USP_DEVICE, "no attributes: %s", cudaGetErrorString(error));
}

/* What needs no other rank. */
static usp_status create_parts(usp_peer *self) {
    usp_device *device = self->base.device;
    size_t bytes = self->slot_bytes * (size_t)(self->base.size - 1);
    void *slots = NULL;
    cudaError_t error = cudaGetDevice(&self->gpu);
    if (error != cudaSuccess) return usp_fail(USP_DEVICE, "cudaGetDevice failed: %s", cudaGetErrorString(error));
    USP_TRY(find_batch(self));
    USP_TRY(usp_probes_create(device, &self->probes));
    USP_TRY(usp_peer_alloc_shared(&self->base, bytes ? bytes : 1, &slots));
    self->slots = slots;
    return USP_OK;
}

static usp_status begin(const usp_transport_config *config, const usp_bootstrap *bootstrap, usp_peer **out) {
    void *memory = NULL;
    if (config->device->ops->kind != USP_DEVICE_CUDA)
        return usp_fail(USP_UNSUPPORTED, "the peer transport joins GPUs; the device is %s", config->device->ops->name);
    size_t bytes = sizeof(usp_peer) + (size_t)bootstrap->size * sizeof(usp_peer_other);
    USP_TRY(usp_host_alloc(config->host, bytes, "the peer transport", &memory));
    usp_peer *self = memory;
    self->base = (usp_transport){
        &usp_peer_ops, bootstrap->rank, bootstrap->size, config->timeout_ms, config->device, config->host, NULL};
    self->slot_bytes = slot_bytes(bootstrap->size);
    pthread_mutex_init(&self->lock, NULL);
    *out = self;
    return create_parts(self);
}

/* ---- the others' ------------------------------------------------------------------------------------------------- */

static usp_status check_hosts(const usp_meeting *meeting) {
    for (int rank = 1; rank < meeting->bootstrap.size; rank++)
        if (meeting->all[rank].node != meeting->all[0].node)
            return usp_fail(USP_UNSUPPORTED, "the peer transport joins GPUs of one host; rank %d is on another", rank);
    return USP_OK;
}

/* The name of rank 0's board, as all ranks come to know it. */
static usp_status find_board(usp_peer *self, char name[USP_PEER_NAME]) {
    void *memory = NULL;
    USP_TRY(usp_host_alloc(self->base.host, (size_t)self->base.size * USP_PEER_NAME, "flags", &memory));
    usp_status status = usp_transport_allgather(&self->base, self->board.name, memory, USP_PEER_NAME);
    memcpy(name, memory, USP_PEER_NAME);
    usp_host_free(self->base.host, memory);
    return status;
}

static usp_status share_board(usp_peer *self) {
    char name[USP_PEER_NAME];
    if (self->base.rank == 0) USP_TRY(usp_peer_create_board(self));
    USP_TRY(find_board(self, name));
    USP_TRY(usp_peer_open_board(self, name));
    return usp_peer_try_flags(self);
}

/* Nobody shows its memory before all have the board, on which it is said who has let go of it. */
static usp_status connect_ranks(usp_peer *self, const usp_meeting *meeting) {
    USP_TRY(usp_channel_connect(self->base.control, meeting, NULL));
    usp_status status = share_board(self);
    if (status != USP_OK) return usp_transport_fail(&self->base, status);
    USP_TRY(usp_transport_allgather(&self->base, self, self, 0));
    usp_peer_unlink_board(self);
    return usp_peer_show_piece(self, self->pieces.first);
}

usp_status usp_transport_create_peer(const usp_transport_config *config, usp_meeting *meeting,
                                     usp_transport **transport) {
    usp_peer *self = NULL;
    const usp_bootstrap *bootstrap = &meeting->bootstrap;
    if (meeting->mine.status == USP_OK) usp_meeting_note(meeting, begin(config, bootstrap, &self));
    if (meeting->mine.status == USP_OK)
        usp_meeting_note(meeting, usp_channel_create(config, bootstrap, &meeting->mine.address, &self->base.control));
    usp_status status = usp_meet(meeting);
    if (status == USP_OK) status = check_hosts(meeting);
    if (status == USP_OK) status = connect_ranks(self, meeting);
    if (status == USP_OK) {
        *transport = &self->base;
        return USP_OK;
    }
    status = usp_meeting_note(meeting, status); /* before anything else is said */
    if (self) usp_transport_end(&self->base);
    return usp_meeting_note(meeting, status);
}
