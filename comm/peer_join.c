/* peer_join.c - how ranks come to have each other's regions mapped, and how they let go of them. */
#define _GNU_SOURCE
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "error.h"
#include "peer_state.h"
#include "thread.h"

enum { MOST_SLOT = 16 << 20, LEAST_SLOT = 1 << 20, REGION = 256 << 20 };

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
    size_t slots = (size_t)self->base.size * USP_PEER_SLOTS;
    return usp_peer_flags_bytes(self->base.size) + slots * self->slot_bytes;
}

/* Looked up, so that the library need not link the driver. */
static usp_status find_batch(usp_peer *self) {
    enum cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
    void *entry = NULL;
    cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuStreamBatchMemOp", &entry, 12000, cudaEnableDefault, &found);
    if (error != cudaSuccess || found != cudaDriverEntryPointSuccess)
        return usp_fail(USP_UNSUPPORTED, "the driver has no cuStreamBatchMemOp");
    memcpy(&self->batch, &entry, sizeof entry);
    return USP_OK;
}

/* No slot is full, all are free. */
static usp_status set_flags(usp_peer *self) {
    usp_device *device = self->base.device;
    usp_peer_flags *flags = (usp_peer_flags *)(void *)self->set;
    size_t bytes = (size_t)self->base.size * sizeof *flags;
    memset(flags, 0, bytes);
    for (int rank = 0; rank < self->base.size; rank++)
        for (int slot = 0; slot < USP_PEER_SLOTS; slot++) flags[rank].free[slot] = 1;
    USP_TRY(device->ops->copy(device, self->region, flags, bytes, self->rescue));
    USP_TRY(check("cudaStreamSynchronize", cudaStreamSynchronize(self->rescue)));
    for (int rank = 0; rank < self->base.size; rank++)
        for (int slot = 0; slot < USP_PEER_SLOTS; slot++) flags[rank].full[slot] = 1;
    return USP_OK;
}

static usp_status create_way(usp_device *device, usp_peer_way *way) {
    USP_TRY(device->ops->stream_create(device, &way->stream));
    return device->ops->event_create(device, &way->done);
}

static usp_status create_parts(usp_peer *self) {
    usp_device *device = self->base.device;
    void *region = NULL, *set = NULL;
    USP_TRY(check("cudaGetDevice", cudaGetDevice(&self->gpu)));
    USP_TRY(find_batch(self));
    USP_TRY(device->ops->stream_create(device, &self->rescue));
    USP_TRY(device->ops->event_create(device, &self->begun));
    USP_TRY(usp_probes_create(device, &self->probes));
    USP_TRY(device->ops->alloc_host(device, (size_t)self->base.size * sizeof(usp_peer_flags), &set));
    self->set = set;
    for (int peer = 0; peer < self->base.size; peer++) {
        if (peer == self->base.rank) continue;
        USP_TRY(create_way(device, &self->link[peer].out));
        USP_TRY(create_way(device, &self->link[peer].in));
    }
    USP_TRY(device->ops->alloc(device, region_bytes(self), &region));
    self->region = region;
    return set_flags(self);
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

static usp_status map_region(usp_peer *self, int peer, const usp_peer_card *card) {
    usp_peer_link *link = &self->link[peer];
    void *mapped = NULL;
    if (card->process != process_identity()) {
        USP_TRY(
            check("cudaIpcOpenMemHandle", cudaIpcOpenMemHandle(&mapped, card->handle, cudaIpcMemLazyEnablePeerAccess)));
        link->region = mapped;
        link->mapped = 1;
        return USP_OK;
    }
    cudaError_t error = card->gpu == self->gpu ? cudaSuccess : cudaDeviceEnablePeerAccess(card->gpu, 0);
    if (error == cudaErrorPeerAccessAlreadyEnabled) {
        cudaGetLastError();
        error = cudaSuccess;
    }
    link->region = card->region;
    return check("cudaDeviceEnablePeerAccess", error);
}

static usp_status map_all(usp_peer *self) {
    usp_peer_card mine = {.process = process_identity(), .region = self->region, .gpu = self->gpu};
    void *memory = NULL;
    USP_TRY(check("cudaIpcGetMemHandle", cudaIpcGetMemHandle(&mine.handle, self->region)));
    USP_TRY(usp_host_alloc(self->base.host, sizeof mine * (size_t)self->base.size, "regions", &memory));
    const usp_peer_card *all = memory;
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

static int close_link(usp_peer *self, int peer) {
    usp_peer_link *link = &self->link[peer];
    if (!link->region) return 0;
    usp_peer_set_flag(self, &usp_peer_flags_of(link->region, self->base.rank)->closed, self->rescue);
    cudaStreamSynchronize(self->rescue);
    if (link->mapped) cudaIpcCloseMemHandle(link->region);
    return 1;
}

/* How many of those that have mapped this region have not let go of it. */
static int count_open(usp_peer *self) {
    usp_peer_flags *flags = (usp_peer_flags *)(void *)self->set;
    size_t bytes = (size_t)self->base.size * sizeof *flags;
    int open = 0;
    cudaMemcpyAsync(flags, self->region, bytes, cudaMemcpyDefault, self->rescue);
    cudaStreamSynchronize(self->rescue);
    for (int peer = 0; peer < self->base.size; peer++) open += peer != self->base.rank && !flags[peer].closed;
    return open;
}

static void free_region(usp_peer *self) {
    int64_t begin = usp_now_ms();
    int links = 0, open = 0;
    for (int peer = 0; peer < self->base.size; peer++) links += close_link(self, peer);
    for (int round = 0; links && (open = count_open(self)) && usp_now_ms() - begin < USP_PEER_LIMIT_MS; round++)
        usp_pause(round);
    if (!open) self->base.device->ops->free(self->base.device, self->region);
    if (open)
        usp_host_log(self->base.host, 1, "rank %d leaves %zu bytes of its GPU's memory to %d ranks that had it mapped",
                     self->base.rank, region_bytes(self), open);
}

void usp_peer_end(usp_peer *self) {
    usp_device *device = self->base.device;
    if (self->region) free_region(self);
    for (int peer = 0; peer < self->base.size; peer++) {
        usp_peer_way *ways[] = {&self->link[peer].out, &self->link[peer].in};
        for (int i = 0; i < 2; i++) {
            device->ops->event_destroy(device, ways[i]->done);
            device->ops->stream_destroy(device, ways[i]->stream);
        }
    }
    usp_probes_destroy(device, &self->probes);
    device->ops->event_destroy(device, self->begun);
    device->ops->stream_destroy(device, self->rescue);
    device->ops->free_host(device, self->set);
    pthread_mutex_destroy(&self->lock);
    usp_host_free(self->base.host, self);
}
