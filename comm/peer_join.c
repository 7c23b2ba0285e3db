/* peer_join.c - how ranks come to have each other's regions mapped, and how they let go of them. */
#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "error.h"
#include "peer_state.h"
#include "thread.h"

enum { MOST_SLOT = 16 << 20, LEAST_SLOT = 1 << 20, REGION = 256 << 20, LEAST_QUEUES = 8 /* CUDA's default */ };

/* How others find a region. */
typedef struct usp_peer_card {
    uint64_t process;
    char *region;
    int32_t gpu, pad;
    cudaIpcMemHandle_t handle;
} usp_peer_card;

static usp_status check(const char *what, cudaError_t error) {
    if (error == cudaSuccess) return USP_OK;
    cudaGetLastError();
    return usp_fail(USP_DEVICE, "%s failed: %s", what, cudaGetErrorString(error));
}

/* ---- this rank's own --------------------------------------------------------------------------------------------- */

/* The same on all ranks. */
static size_t slot_bytes(int size) {
    size_t bytes = MOST_SLOT;
    while (bytes > LEAST_SLOT && bytes * USP_PEER_SLOTS * (size_t)(size - 1) > REGION) bytes /= 2;
    return bytes;
}

static size_t region_bytes(const usp_peer *self) {
    size_t slots = (size_t)(self->base.size - 1) * USP_PEER_SLOTS;
    return usp_peer_head_bytes(self->base.size) + slots * self->slot_bytes;
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
    return check("cudaDeviceGetAttribute",
                 cudaDeviceGetAttribute(&self->flushes, cudaDevAttrCanFlushRemoteWrites, self->gpu));
}

static usp_status create_streams(usp_peer *self) {
    usp_device *device = self->base.device;
    int least = 0, greatest = 0;
    USP_TRY(check("cudaDeviceGetStreamPriorityRange", cudaDeviceGetStreamPriorityRange(&least, &greatest)));
    USP_TRY(check("cudaStreamCreateWithPriority",
                  cudaStreamCreateWithPriority(&self->rescue, cudaStreamNonBlocking, greatest)));
    USP_TRY(device->ops->stream_create(device, &self->out));
    USP_TRY(device->ops->stream_create(device, &self->in));
    USP_TRY(device->ops->event_create(device, &self->begun));
    USP_TRY(device->ops->event_create(device, &self->sent));
    USP_TRY(device->ops->event_create(device, &self->received));
    return usp_probes_create(device, &self->probes);
}

/* No slot is full, all are free. */
static usp_status set_flags(usp_peer *self) {
    usp_peer_flags *flags = self->stopped;
    size_t bytes = (size_t)self->base.size * sizeof *flags;
    memset(flags, 0, bytes);
    for (int i = 0; i < self->base.size * USP_PEER_SLOTS; i++)
        flags[i / USP_PEER_SLOTS].free[i % USP_PEER_SLOTS].set = 1;
    USP_TRY(
        check("cudaMemsetAsync", cudaMemsetAsync(self->region, 0, usp_peer_head_bytes(self->base.size), self->rescue)));
    USP_TRY(check("cudaMemcpyAsync", cudaMemcpyAsync(self->region, flags, bytes, cudaMemcpyDefault, self->rescue)));
    return check("cudaStreamSynchronize", cudaStreamSynchronize(self->rescue));
}

/* What flags become when ranks have failed; tries on one of them whether streams can wait as they will. */
static usp_status prepare_stop(usp_peer *self) {
    usp_peer_flag *flag = &usp_peer_flags_of(self->region, self->base.rank)->free[0];
    for (int i = 0; i < self->base.size * USP_PEER_SLOTS; i++) {
        usp_peer_flags *flags = &self->stopped[i / USP_PEER_SLOTS];
        flags->full[i % USP_PEER_SLOTS] = flags->free[i % USP_PEER_SLOTS] = (usp_peer_flag){1, 1};
    }
    if (usp_peer_take_flag(self, flag, self->flushes, self->in) != USP_OK)
        return usp_fail(USP_UNSUPPORTED, "the GPU's streams cannot wait for 64-bit numbers");
    return USP_OK;
}

/* Streams that share a queue wait for each other: the one that lets the others go must not wait behind them. */
static usp_status check_queues(void) {
    const char *queues = getenv("CUDA_DEVICE_MAX_CONNECTIONS");
    if (!queues || atoi(queues) >= LEAST_QUEUES) return USP_OK;
    return usp_fail(USP_UNSUPPORTED, "CUDA_DEVICE_MAX_CONNECTIONS is %.16s: the peer transport needs %d or more",
                    queues, (int)LEAST_QUEUES);
}

/* What needs no other rank. */
static usp_status create_parts(usp_peer *self) {
    usp_device *device = self->base.device;
    size_t size = (size_t)self->base.size;
    void *region = NULL, *page = NULL;
    USP_TRY(check_queues());
    USP_TRY(check("cudaGetDevice", cudaGetDevice(&self->gpu)));
    USP_TRY(find_batch(self));
    USP_TRY(create_streams(self));
    USP_TRY(device->ops->alloc_host(device, size * (sizeof(usp_peer_flags) + sizeof(uint32_t)), &page));
    self->stopped = page;
    self->closed = (uint32_t *)(self->stopped + size);
    USP_TRY(device->ops->alloc(device, region_bytes(self), &region));
    self->region = region;
    USP_TRY(set_flags(self));
    USP_TRY(prepare_stop(self));
    if (size == 1 || cudaIpcGetMemHandle(&self->handle, region) == cudaSuccess) return USP_OK;
    return usp_fail(USP_UNSUPPORTED, "memory cannot be shared here: %s", cudaGetErrorString(cudaGetLastError()));
}

static usp_status begin(const usp_transport_config *config, const usp_bootstrap *bootstrap, usp_peer **out) {
    void *memory = NULL;
    if (config->device->ops->kind != USP_DEVICE_CUDA)
        return usp_fail(USP_UNSUPPORTED, "the peer transport joins GPUs; the device is %s", config->device->ops->name);
    size_t bytes = sizeof(usp_peer) + (size_t)bootstrap->size * sizeof(usp_peer_link);
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

/* Numbers of processes are of a name space. */
static uint64_t process_identity(void) {
    struct stat space = {0};
    stat("/proc/self/ns/pid", &space);
    return (uint64_t)space.st_ino << 32 ^ (uint64_t)getpid();
}

/* Of another process, or of another thread of this one. */
static cudaError_t open_region(usp_peer *self, const usp_peer_card *card, usp_peer_link *link) {
    void *mapped = card->region;
    cudaError_t error = cudaSuccess;
    link->mapped = card->process != process_identity();
    if (link->mapped) error = cudaIpcOpenMemHandle(&mapped, card->handle, cudaIpcMemLazyEnablePeerAccess);
    if (!link->mapped && card->gpu != self->gpu) error = cudaDeviceEnablePeerAccess(card->gpu, 0);
    if (error != cudaSuccess) cudaGetLastError();
    if (error == cudaErrorPeerAccessAlreadyEnabled) error = cudaSuccess;
    if (error == cudaSuccess) link->region = mapped;
    return error;
}

static usp_status map_region(usp_peer *self, int peer, const usp_peer_card *card) {
    cudaError_t error = open_region(self, card, &self->link[peer]);
    if (error == cudaSuccess) return USP_OK;
    return usp_fail(USP_UNSUPPORTED, "rank %d cannot use the memory of rank %d's GPU: %s", self->base.rank, peer,
                    cudaGetErrorString(error));
}

static usp_status map_all(usp_peer *self) {
    const usp_peer_card mine = {process_identity(), self->region, self->gpu, 0, self->handle};
    void *memory = NULL;
    USP_TRY(usp_host_alloc(self->base.host, sizeof mine * (size_t)self->base.size, "regions", &memory));
    const usp_peer_card *all = memory;
    self->shown = 1;
    usp_status status = usp_transport_allgather(&self->base, &mine, memory, sizeof mine);
    for (int peer = 0; peer < self->base.size && status == USP_OK; peer++)
        if (peer != self->base.rank) status = map_region(self, peer, &all[peer]);
    usp_host_free(self->base.host, memory);
    return status;
}

static usp_status check_hosts(const usp_meeting *meeting) {
    for (int rank = 1; rank < meeting->bootstrap.size; rank++)
        if (meeting->all[rank].node != meeting->all[0].node)
            return usp_fail(USP_UNSUPPORTED, "the peer transport joins GPUs of one host; rank %d is on another", rank);
    return USP_OK;
}

static usp_status connect_ranks(usp_peer *self, const usp_meeting *meeting) {
    USP_TRY(usp_channel_connect(self->base.control, meeting, NULL));
    usp_status status = map_all(self);
    return status == USP_OK ? USP_OK : usp_transport_fail(&self->base, status);
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

/* ---- the end ----------------------------------------------------------------------------------------------------- */

void usp_peer_let_go(usp_peer *self) {
    for (int peer = 0; peer < self->base.size; peer++) {
        usp_peer_link *link = &self->link[peer];
        if (!link->region) continue;
        usp_peer_set_flag(self, &usp_peer_closed(self, link->region)[self->base.rank], self->rescue);
        cudaStreamSynchronize(self->rescue);
        if (link->mapped) cudaIpcCloseMemHandle(link->region);
    }
    cudaGetLastError();
}

/* How many ranks may have this region mapped; -1: the GPU does not say. */
static int count_open(usp_peer *self) {
    size_t bytes = (size_t)self->base.size * sizeof *self->closed;
    const uint32_t *closed = usp_peer_closed(self, self->region);
    int open = 0;
    if (cudaMemcpyAsync(self->closed, closed, bytes, cudaMemcpyDefault, self->rescue) != cudaSuccess) return -1;
    if (cudaStreamSynchronize(self->rescue) != cudaSuccess) return -1;
    for (int peer = 0; peer < self->base.size; peer++)
        open += peer != self->base.rank && !self->closed[peer] && !self->link[peer].lost;
    return open;
}

static void free_region(usp_peer *self) {
    int64_t begun = usp_now_ms();
    int open = 0;
    for (int round = 0; self->shown && (open = count_open(self)) > 0; round++) {
        if (usp_now_ms() - begun > USP_PEER_LIMIT_MS) break;
        usp_pause(round);
    }
    if (open == 0) self->base.device->ops->free(self->base.device, self->region);
    if (open != 0)
        usp_host_log(self->base.host, 1, "rank %d leaves %zu bytes of its GPU's memory to ranks that had it mapped",
                     self->base.rank, region_bytes(self));
    cudaGetLastError();
}

void usp_peer_end(usp_peer *self) {
    usp_device *device = self->base.device;
    if (self->region) free_region(self);
    usp_probes_destroy(device, &self->probes);
    device->ops->event_destroy(device, self->begun);
    device->ops->event_destroy(device, self->sent);
    device->ops->event_destroy(device, self->received);
    device->ops->stream_destroy(device, self->out);
    device->ops->stream_destroy(device, self->in);
    if (self->rescue) cudaStreamDestroy(self->rescue);
    device->ops->free_host(device, self->stopped);
    pthread_mutex_destroy(&self->lock);
    usp_host_free(self->base.host, self);
}
