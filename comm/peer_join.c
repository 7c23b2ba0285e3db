/* peer_join.c - how ranks make a peer transport: what is each one's own, then what they map of each other's. By itself,
 * for GPUs of one host, or beside another transport, for those of each host. */
#define _GNU_SOURCE
#include <stdio.h>
#include <string.h>

#include "error.h"
#include "peer_state.h"

enum { MOST_SLOT = 64 << 20, LEAST_SLOT = 1 << 20, SLOTS = 128 << 20 /* bytes of all, but where that is too little */ };

/* ---- this rank's own --------------------------------------------------------------------------------------------- */

/* The same on all ranks of a host. */
static size_t slot_bytes(int slots) {
    size_t bytes = MOST_SLOT;
    while (bytes > LEAST_SLOT && bytes * (size_t)slots > SLOTS) bytes /= 2;
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
    int slots = USP_LANES * (self->seats - 1);
    void *memory = NULL;
    cudaError_t error = cudaGetDevice(&self->gpu);
    if (error != cudaSuccess) return usp_fail(USP_DEVICE, "cudaGetDevice failed: %s", cudaGetErrorString(error));
    USP_TRY(find_batch(self));
    USP_TRY(usp_probes_create(device, &self->probes));
    self->slot_bytes = slot_bytes(slots);
    USP_TRY(usp_peer_alloc_shared(&self->base, slots ? self->slot_bytes * (size_t)slots : 1, &memory));
    self->slots = memory;
    return USP_OK;
}

static usp_status begin(const usp_transport_config *config, int rank, int size, usp_peer **out) {
    void *memory = NULL, *words = NULL;
    if (config->device->ops->kind != USP_DEVICE_CUDA)
        return usp_fail(USP_UNSUPPORTED, "the peer transport joins GPUs; the device is %s", config->device->ops->name);
    size_t bytes = sizeof(usp_peer) + (size_t)size * sizeof(usp_peer_other);
    USP_TRY(usp_host_alloc(config->host, (size_t)size * sizeof(usp_peer_word), "the peer transport", &words));
    usp_status status = usp_host_alloc(config->host, bytes, "the peer transport", &memory);
    if (status != USP_OK) {
        usp_host_free(config->host, words);
        return status;
    }
    usp_peer *self = memory;
    self->base =
        (usp_transport){&usp_peer_ops, rank, size, config->timeout_ms, config->device, config->host, NULL, NULL};
    self->words = words;
    pthread_mutex_init(&self->lock, NULL);
    *out = self;
    return USP_OK;
}

/* `node`: of each rank, a number of its host. */
static void take_seats(usp_peer *self, const int *node) {
    int rank = self->base.rank;
    for (int peer = 0; peer < self->base.size; peer++) {
        int here = node[peer] == node[rank];
        self->other[peer].near = here && peer != rank;
        self->other[peer].seat = self->seats;
        self->seats += here;
    }
}

/* ---- the others' ------------------------------------------------------------------------------------------------- */

/* The same on all ranks: OK, or the first rank to which a step was not. */
static usp_status agree(usp_peer *self, usp_status mine) {
    usp_peer_word word = {.status = (int32_t)mine};
    if (mine != USP_OK) snprintf(word.sentence, sizeof word.sentence, "%s", usp_last_error());
    USP_TRY(usp_transport_allgather(&self->base, &word, self->words, sizeof word));
    for (int rank = 0; rank < self->base.size; rank++)
        if (self->words[rank].status != USP_OK)
            return usp_fail((usp_status)self->words[rank].status, "rank %d: %.*s", rank, (int)sizeof word.sentence - 1,
                            self->words[rank].sentence);
    return USP_OK;
}

/* The first of this host's ranks. */
static int first_of_host(const usp_peer *self) {
    int rank = 0;
    while (rank != self->base.rank && !self->other[rank].near) rank++;
    return rank;
}

/* Its board has a name, which all ranks come to know. */
static usp_status share_board(usp_peer *self) {
    usp_peer_word name = {.status = USP_OK};
    int first = first_of_host(self);
    usp_status mine = first == self->base.rank ? usp_peer_create_board(self) : USP_OK;
    memcpy(name.sentence, self->board.name, USP_PEER_NAME);
    USP_TRY(usp_transport_allgather(&self->base, &name, self->words, sizeof name));
    if (mine == USP_OK) mine = usp_peer_open_board(self, self->words[first].sentence);
    return mine == USP_OK ? usp_peer_try_flags(self) : mine;
}

/* Nobody shows its memory before all have the board, on which it is said who has let go of it. */
static usp_status join(usp_peer *self) {
    USP_TRY(agree(self, create_parts(self)));
    usp_status status = agree(self, share_board(self));
    usp_peer_unlink_board(self);
    return status == USP_OK ? agree(self, usp_peer_show_piece(self, self->pieces.first)) : status;
}

/* ---- by itself --------------------------------------------------------------------------------------------------- */

static usp_status check_hosts(const usp_meeting *meeting) {
    for (int rank = 1; rank < meeting->bootstrap.size; rank++)
        if (meeting->node[rank] != meeting->node[0])
            return usp_fail(USP_UNSUPPORTED, "the peer transport joins GPUs of one host; rank %d is on another", rank);
    return USP_OK;
}

static usp_status connect_ranks(usp_peer *self, const usp_meeting *meeting) {
    USP_TRY(usp_channel_connect(self->base.control, meeting, NULL));
    take_seats(self, meeting->node);
    usp_status status = join(self);
    return status == USP_OK ? USP_OK : usp_channel_fail(self->base.control, status, "%s", usp_last_error());
}

usp_status usp_transport_create_peer(const usp_transport_config *config, usp_meeting *meeting,
                                     usp_transport **transport) {
    usp_peer *self = NULL;
    const usp_bootstrap *bootstrap = &meeting->bootstrap;
    if (meeting->mine.status == USP_OK)
        usp_meeting_note(meeting, begin(config, bootstrap->rank, bootstrap->size, &self));
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

/* ---- beside another ---------------------------------------------------------------------------------------------- */

usp_status usp_transport_create_near(const usp_transport_config *config, const int *node, usp_transport *transport) {
    usp_peer *self = NULL;
    usp_status status = begin(config, transport->rank, transport->size, &self);
    if (status != USP_OK) return usp_transport_fail(transport, status);
    self->guest = 1;
    self->base.control = transport->control;
    take_seats(self, node);
    status = join(self);
    if (status == USP_OK) {
        transport->near = &self->base;
        return USP_OK;
    }
    usp_host_log(config->host, 1, "GPUs of one host do without the peer transport: %s", usp_last_error());
    usp_peer_ops.destroy(&self->base);
    return usp_transport_poll(transport);
}
