/* nccl_join.c - how ranks come to share an NCCL communicator: over a bootstrap, by an id, or by splitting the caller's.
 */
#define _GNU_SOURCE
#include <cuda_runtime_api.h>
#include <stdio.h>
#include <string.h>

#include "error.h"
#include "split.h"
#include "nccl_state.h"
#include "thread.h"

enum { OLDEST_NCCL = 22803 /* 2.28.3 */ };

/* A split of a communicator whose own mode (blocking or not) is the caller's choice: in a thread, as usp_release. */
typedef struct usp_split {
    ncclComm_t parent, child;
    ncclConfig_t config;
    ncclResult_t result;
    int rank;
    pthread_t thread;
    atomic_int done;
} usp_split;

/* ---- creation ---------------------------------------------------------------------------------------------------- */

/* Nonblocking, since only such a communicator can be waited for with a limit and aborted. */
static ncclConfig_t own_config(void) {
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.blocking = 0;
    config.splitShare = 0;
    config.collnetEnable = 0;
    return config;
}

static usp_status check_backend(const usp_transport_config *config, int *gpu) {
    int version = 0;
    if (config->device->ops->kind != USP_DEVICE_CUDA)
        return usp_fail(USP_UNSUPPORTED, "NCCL joins GPUs; the device is %s", config->device->ops->name);
    if (ncclGetVersion(&version) != ncclSuccess || version < OLDEST_NCCL)
        return usp_fail(USP_UNSUPPORTED, "NCCL %d is too old: %d or newer is needed", version, (int)OLDEST_NCCL);
    cudaError_t error = cudaGetDevice(gpu);
    return error == cudaSuccess ? USP_OK : usp_fail(USP_DEVICE, "no usable GPU: %s", cudaGetErrorString(error));
}

/* The part that needs no other rank. */
static usp_status begin(const usp_transport_config *config, int size, int rank, usp_nccl **out) {
    void *memory = NULL, *release = NULL;
    int gpu = 0;
    USP_TRY(check_backend(config, &gpu));
    size_t bytes = sizeof(usp_nccl) + (size_t)size * sizeof(int);
    USP_TRY(usp_host_alloc(config->host, bytes, "the NCCL transport", &memory));
    usp_status status = usp_host_alloc(config->host, sizeof(usp_release), "the NCCL transport", &release);
    if (status != USP_OK) {
        usp_host_free(config->host, memory);
        return status;
    }
    usp_nccl *self = memory;
    self->base =
        (usp_transport){&usp_nccl_ops, rank, size, config->timeout_ms, config->device, config->host, NULL, NULL};
    self->gpu = gpu;
    self->release = release;
    pthread_mutex_init(&self->lock, NULL);
    *out = self;
    return usp_probes_create(config->device, &self->probes);
}

/* Waits for the work on `stream` with the time limit. */
static usp_status drain(usp_nccl *self, usp_stream stream) {
    int64_t start = usp_now_ms();
    int busy = 1;
    for (int round = 0; busy; round++) {
        USP_TRY(usp_nccl_check(self));
        USP_TRY(self->base.device->ops->query(self->base.device, stream, &busy));
        if (busy && usp_nccl_is_late(self, start))
            return usp_nccl_give_late(self, "an exchange while the transport was set up");
        if (busy) usp_pause(round);
    }
    return USP_OK;
}

/* Every rank sends its block of `all`, in device memory, to every other. */
static usp_status exchange_blocks(usp_nccl *self, char *all, size_t bytes, usp_stream stream) {
    int size = self->base.size, rank = self->base.rank, count = 0;
    void *memory = NULL;
    USP_TRY(usp_host_alloc(self->base.host, 2 * sizeof(usp_message) * (size_t)size, "lists", &memory));
    usp_message *recvs = memory, *sends = recvs + size;
    for (int peer = 0; peer < size; peer++) {
        if (peer == rank) continue;
        sends[count] = usp_message_whole(peer, all + (size_t)rank * bytes, bytes);
        recvs[count++] = usp_message_whole(peer, all + (size_t)peer * bytes, bytes);
    }
    usp_status status = usp_nccl_ops.exchange(&self->base, 0, sends, count, recvs, count, stream);
    usp_host_free(self->base.host, memory);
    return status;
}

/* An all-gather of host memory by way of the GPUs. It connects every two ranks, which makes the first real exchange as
 * fast as the next. On failure the scratch stays until destroy: a stuck kernel may still use it. */
static usp_status gather(usp_nccl *self, const void *mine, void *all, size_t bytes) {
    usp_device *device = self->base.device;
    size_t whole = bytes * (size_t)self->base.size;
    USP_TRY(device->ops->alloc(device, whole, &self->scratch));
    USP_TRY(device->ops->stream_create(device, &self->stream));
    char *own = (char *)self->scratch + (size_t)self->base.rank * bytes;
    USP_TRY(device->ops->copy(device, own, mine, bytes, self->stream));
    USP_TRY(exchange_blocks(self, self->scratch, bytes, self->stream));
    USP_TRY(drain(self, self->stream));
    USP_TRY(device->ops->copy(device, all, self->scratch, whole, self->stream));
    USP_TRY(drain(self, self->stream));
    usp_nccl_free_scratch(self);
    return USP_OK;
}

static usp_status gather_cards(void *user, const void *mine, void *all, size_t bytes_per_rank) {
    return gather(user, mine, all, bytes_per_rank);
}

/* Two ranks on one GPU are NCCL's to refuse; the bytes that arrive are checked here. */
static usp_status connect_all(usp_nccl *self) {
    int32_t mine = self->base.rank;
    void *memory = NULL;
    USP_TRY(usp_host_alloc(self->base.host, sizeof mine * (size_t)self->base.size, "first words", &memory));
    const int32_t *all = memory;
    usp_status status = gather(self, &mine, memory, sizeof mine);
    for (int rank = 0; status == USP_OK && rank < self->base.size; rank++)
        if (all[rank] != rank)
            status = usp_fail(USP_COMM, "rank %d heard %d from rank %d", self->base.rank, (int)all[rank], rank);
    usp_host_free(self->base.host, memory);
    return status;
}

static usp_status join(usp_nccl *self, const ncclUniqueId *id) {
    ncclConfig_t config = own_config();
    pthread_mutex_lock(&self->lock);
    ncclResult_t result = ncclCommInitRankConfig(&self->comm, self->base.size, *id, self->base.rank, &config);
    if (usp_nccl_went_wrong(result)) self->comm = NULL;
    pthread_mutex_unlock(&self->lock);
    return usp_nccl_settle(self, result, "ncclCommInitRankConfig");
}

static usp_status connect_ranks(usp_nccl *self, const usp_meeting *meeting) {
    USP_TRY(usp_channel_connect(self->base.control, meeting, NULL));
    self->connected = 1;
    return USP_OK;
}

/* Ranks without a bootstrap meet over the communicator that stands. */
static usp_status meet_over_gpus(usp_nccl *self, usp_meeting *meeting) {
    meeting->bootstrap.user = self;
    USP_TRY(usp_meet(meeting));
    return connect_ranks(self, meeting);
}

static usp_status finish(usp_nccl *self, usp_status status, usp_transport **out) {
    char sentence[256];
    if (status == USP_OK) status = connect_all(self);
    if (status == USP_OK) {
        *out = &self->base;
        return USP_OK;
    }
    if (self->base.control != NULL) status = usp_nccl_give_up(self, status);
    snprintf(sentence, sizeof sentence, "%s", usp_last_error());
    usp_transport_end(&self->base);
    return usp_fail(status, "%s", sentence);
}

/* What needs no other rank. */
static usp_status prepare_self(const usp_transport_config *config, usp_meeting *meeting, usp_nccl **self) {
    const usp_bootstrap *bootstrap = &meeting->bootstrap;
    usp_card *mine = &meeting->mine;
    ncclGetVersion(&mine->terms.transport_version);
    USP_TRY(begin(config, bootstrap->size, bootstrap->rank, self));
    return usp_channel_create(config, bootstrap, &mine->address, &(*self)->base.control);
}

/* Rank 0's id counts. */
static usp_status make_id(usp_card *mine) {
    ncclUniqueId id;
    _Static_assert(sizeof mine->id == sizeof id, "a card holds an ncclUniqueId");
    ncclResult_t result = ncclGetUniqueId(&id);
    if (result != ncclSuccess) return usp_fail(USP_COMM, "ncclGetUniqueId failed: %s", ncclGetErrorString(result));
    memcpy(mine->id, &id, sizeof id);
    return USP_OK;
}

usp_status usp_transport_create_nccl(const usp_transport_config *config, usp_meeting *meeting,
                                     usp_transport **transport) {
    usp_nccl *self = NULL;
    ncclUniqueId id;
    usp_card *mine = &meeting->mine;
    if (mine->status == USP_OK) usp_meeting_note(meeting, prepare_self(config, meeting, &self));
    if (mine->status == USP_OK && meeting->bootstrap.rank == 0) usp_meeting_note(meeting, make_id(mine));
    usp_status status = usp_meet(meeting);
    if (self == NULL) return status;
    if (status == USP_OK) status = connect_ranks(self, meeting);
    if (status == USP_OK) memcpy(&id, meeting->all[0].id, sizeof id);
    if (status == USP_OK) status = join(self, &id);
    return finish(self, status, transport);
}

usp_status usp_transport_create_nccl_id(const usp_transport_config *config, usp_meeting *meeting,
                                        const usp_unique_id *id, int size, int rank, usp_transport **transport) {
    usp_nccl *self = NULL;
    ncclUniqueId copy;
    memcpy(&copy, id->bytes, sizeof copy);
    USP_TRY(usp_meeting_note(meeting, USP_OK));
    meeting->bootstrap = (usp_bootstrap){.gather = gather_cards, .rank = rank, .size = size};
    usp_status status = prepare_self(config, meeting, &self);
    if (self == NULL) return status;
    if (status == USP_OK) status = join(self, &copy);
    if (status == USP_OK) status = meet_over_gpus(self, meeting);
    return finish(self, status, transport);
}

/* ---- a borrowed communicator ------------------------------------------------------------------------------------- */

static void *split_main(void *argument) {
    usp_split *split = argument;
    ncclResult_t result = ncclCommSplit(split->parent, 0, split->rank, &split->child, &split->config);
    for (int round = 0; !usp_nccl_went_wrong(result); round++) {
        ncclResult_t query = ncclCommGetAsyncError(split->parent, &result);
        if (query != ncclSuccess) result = query;
        if (result == ncclSuccess) break;
        usp_pause(round);
    }
    split->result = result;
    atomic_store(&split->done, 1);
    return NULL;
}

/* Waits for the thread with the time limit; a thread that is late keeps `split`. */
static usp_status finish_split(usp_nccl *self, usp_split *split) {
    int64_t start = usp_now_ms();
    for (int round = 0; !atomic_load(&split->done); round++) {
        if (usp_nccl_is_late(self, start)) {
            pthread_detach(split->thread);
            return usp_nccl_give_late(self, "ncclCommSplit of the borrowed communicator");
        }
        usp_pause(round);
    }
    pthread_join(split->thread, NULL);
    usp_status status = USP_OK;
    if (split->result == ncclSuccess)
        self->comm = split->child;
    else
        status = usp_nccl_fail(self->base.rank, "ncclCommSplit", split->result);
    usp_host_free(self->base.host, split);
    return status;
}

static usp_status split_borrowed(usp_nccl *self, ncclComm_t borrowed) {
    void *memory = NULL;
    USP_TRY(usp_host_alloc(self->base.host, sizeof(usp_split), "a split communicator", &memory));
    usp_split *split = memory;
    split->parent = borrowed;
    split->config = own_config();
    split->rank = self->base.rank;
    if (usp_thread_start(&split->thread, split_main, split) != 0) {
        usp_host_free(self->base.host, split);
        return usp_fail(USP_NO_MEMORY, "a thread could not be started");
    }
    USP_TRY(finish_split(self, split));
    return usp_nccl_settle(self, usp_nccl_progress(self), "ncclCommSplit");
}

static usp_status look_at_borrowed(ncclComm_t borrowed, int *size, int *rank) {
    int gpu = 0, current = 0;
    ncclResult_t result = ncclCommCount(borrowed, size);
    if (result == ncclSuccess) result = ncclCommUserRank(borrowed, rank);
    if (result == ncclSuccess) result = ncclCommCuDevice(borrowed, &gpu);
    if (result != ncclSuccess)
        return usp_fail(usp_nccl_status(result), "the communicator cannot be used: %s", ncclGetErrorString(result));
    USP_REQUIRE(cudaGetDevice(&current) == cudaSuccess && gpu == current,
                "the communicator is on GPU %d, but GPU %d is current", gpu, current);
    return USP_OK;
}

usp_status usp_transport_create_nccl_borrowed(const usp_transport_config *config, usp_meeting *meeting,
                                              struct ncclComm *borrowed, usp_transport **transport) {
    usp_nccl *self = NULL;
    int size = 0, rank = 0, gpu = 0;
    USP_TRY(usp_meeting_note(meeting, USP_OK));
    USP_TRY(check_backend(config, &gpu));
    USP_TRY(look_at_borrowed(borrowed, &size, &rank));
    meeting->bootstrap = (usp_bootstrap){.gather = gather_cards, .rank = rank, .size = size};
    usp_status status = prepare_self(config, meeting, &self);
    if (self == NULL) return status;
    if (status == USP_OK) status = split_borrowed(self, borrowed);
    if (status == USP_OK) status = meet_over_gpus(self, meeting);
    return finish(self, status, transport);
}

usp_status usp_nccl_unique_id(usp_unique_id *id) {
    _Static_assert(sizeof id->bytes == sizeof(ncclUniqueId), "usp_unique_id holds an ncclUniqueId");
    ncclUniqueId made;
    ncclResult_t result = ncclGetUniqueId(&made);
    if (result != ncclSuccess) return usp_fail(USP_COMM, "ncclGetUniqueId failed: %s", ncclGetErrorString(result));
    memcpy(id->bytes, &made, sizeof made);
    return USP_OK;
}
