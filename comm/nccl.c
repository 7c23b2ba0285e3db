/* nccl.c - ranks that own one GPU each, joined by nonblocking NCCL communicators and watched over the control channel.
 * It moves bytes by grouped sends and receives alone; NCCL's collectives, multicast and environment stay untouched. */
#define _GNU_SOURCE
#include <stdio.h>

#include "error.h"
#include "list.h"
#include "nccl_state.h"
#include "thread.h"

/* ---- waiting ----------------------------------------------------------------------------------------------------- */

int usp_nccl_lock_within(usp_nccl *self, int milliseconds) {
    int64_t begin = usp_now_ms();
    for (int round = 0; pthread_mutex_trylock(&self->lock) != 0; round++) {
        if (usp_now_ms() - begin >= milliseconds) return 0;
        usp_pause(round);
    }
    return 1;
}

/* ---- failures ---------------------------------------------------------------------------------------------------- */

usp_status usp_nccl_status(ncclResult_t result) {
    switch (result) {
    case ncclUnhandledCudaError:
        return USP_DEVICE;
    case ncclInvalidArgument:
    case ncclInvalidUsage:
        return USP_INVALID;
    default:
        return USP_COMM;
    }
}

usp_status usp_nccl_fail(int rank, const char *what, ncclResult_t result) {
    const char *detail = ncclGetLastError(NULL);
    return usp_fail(usp_nccl_status(result), "rank %d: %s failed: %s; %.100s", rank, what, ncclGetErrorString(result),
                    detail != NULL ? detail : "");
}

usp_status usp_nccl_check(usp_nccl *self) {
    usp_status status = usp_channel_poll(self->base.control);
    if (status != USP_OK) usp_nccl_start_release(self, 1);
    return status;
}

usp_status usp_nccl_give_up(usp_nccl *self, usp_status status) {
    usp_channel_fail(self->base.control, status, "%s", usp_last_error());
    return usp_nccl_check(self);
}

usp_status usp_nccl_give_late(usp_nccl *self, const char *what) {
    usp_status status = self->connected ? usp_channel_overdue(self->base.control, -1) : USP_OK;
    if (status == USP_OK)
        status =
            usp_fail(USP_TIMEOUT, "rank %d: %s did not end within %d ms", self->base.rank, what, self->base.timeout_ms);
    return usp_nccl_give_up(self, status);
}

int usp_nccl_is_late(const usp_nccl *self, int64_t since) {
    return self->base.timeout_ms >= 0 && usp_now_ms() - since > self->base.timeout_ms;
}

/* ---- nonblocking calls ------------------------------------------------------------------------------------------- */

ncclResult_t usp_nccl_progress(usp_nccl *self) {
    ncclResult_t result = ncclInProgress;
    pthread_mutex_lock(&self->lock);
    if (self->comm != NULL) {
        ncclResult_t query = ncclCommGetAsyncError(self->comm, &result);
        if (query != ncclSuccess) result = query;
    }
    pthread_mutex_unlock(&self->lock);
    return result;
}

usp_status usp_nccl_settle(usp_nccl *self, ncclResult_t result, const char *what) {
    int64_t begin = usp_now_ms();
    if (!usp_nccl_went_wrong(result)) result = usp_nccl_progress(self);
    for (int round = 0; result == ncclInProgress; round++) {
        USP_TRY(usp_nccl_check(self));
        if (usp_nccl_is_late(self, begin)) return usp_nccl_give_late(self, what);
        usp_pause(round);
        result = usp_nccl_progress(self);
    }
    return result == ncclSuccess ? USP_OK : usp_nccl_give_up(self, usp_nccl_fail(self->base.rank, what, result));
}

/* ---- exchange ---------------------------------------------------------------------------------------------------- */

typedef struct usp_lists {
    const usp_message *sends, *recvs;
    int send_count, recv_count;
} usp_lists;

/* Every message of one way, packed, inside a group. The peer of the one that was refused goes to *peer. */
static ncclResult_t issue(usp_nccl *self, const usp_message *messages, int count, int receives, usp_stream stream,
                          int *peer) {
    for (int i = 0; i < count;) {
        usp_message message = usp_list_take_packed(messages, count, &i);
        if (message.bytes == 0) continue;
        *peer = message.peer;
        ncclResult_t result = receives
                                  ? ncclRecv(message.base, message.bytes, ncclUint8, message.peer, self->comm, stream)
                                  : ncclSend(message.base, message.bytes, ncclUint8, message.peer, self->comm, stream);
        if (usp_nccl_went_wrong(result)) return result;
    }
    return ncclSuccess;
}

/* One group, with the lock held. */
static ncclResult_t launch(usp_nccl *self, const usp_lists *lists, usp_stream stream, int *peer) {
    ncclResult_t result = ncclGroupStart();
    if (result != ncclSuccess) return result;
    ncclResult_t issued = issue(self, lists->sends, lists->send_count, 0, stream, peer);
    if (!usp_nccl_went_wrong(issued)) issued = issue(self, lists->recvs, lists->recv_count, 1, stream, peer);
    result = ncclGroupEnd();
    if (!usp_nccl_went_wrong(issued)) *peer = -1;
    return usp_nccl_went_wrong(issued) ? issued : result;
}

/* Notes where the exchange ends in the stream, so that watch can tell when work is overdue. A graph in capture is
 * skipped: what it holds runs when it is launched, and then nobody passes here. */
static usp_status set_probe(usp_nccl *self, int lane, usp_stream stream) {
    const usp_device_ops *ops = self->base.device->ops;
    int capturing = 0;
    USP_TRY(ops->capturing(self->base.device, stream, &capturing));
    if (capturing) self->captured = 1;
    if (capturing) return USP_OK;
    pthread_mutex_lock(&self->lock);
    usp_status status = usp_probes_record(self->base.device, &self->probes, lane, stream);
    pthread_mutex_unlock(&self->lock);
    return status;
}

static usp_status fail_launch(usp_nccl *self, ncclResult_t result, int peer) {
    char what[64];
    snprintf(what, sizeof what, "an exchange with rank %d", peer);
    return usp_nccl_give_up(self, usp_nccl_fail(self->base.rank, peer < 0 ? "the exchange" : what, result));
}

/* The messages alone, with what is sent packed. */
static usp_status move(usp_nccl *self, const usp_lists *lists, usp_stream stream) {
    int peer = -1;
    pthread_mutex_lock(&self->lock);
    ncclResult_t result = self->comm != NULL ? launch(self, lists, stream, &peer) : ncclInProgress;
    pthread_mutex_unlock(&self->lock);
    if (usp_nccl_went_wrong(result)) return fail_launch(self, result, peer);
    return usp_nccl_settle(self, result, "the exchange");
}

/* The communicator serves one stream after the other: all lanes are one queue. */
static usp_status nccl_exchange(usp_transport *transport, int lane, const usp_message *sends, int send_count,
                                const usp_message *recvs, int recv_count, usp_stream stream) {
    usp_nccl *self = usp_nccl_of(transport);
    const usp_lists lists = {sends, recvs, send_count, recv_count};
    USP_TRY(usp_list_check(transport, sends, send_count, recvs, recv_count));
    USP_TRY(usp_nccl_check(self));
    usp_channel_enter(self->base.control);
    if (usp_list_is_empty(sends, send_count) && usp_list_is_empty(recvs, recv_count)) return USP_OK;
    usp_status status = usp_list_pack(transport->device, sends, send_count, stream);
    if (status != USP_OK) return usp_nccl_give_up(self, status);
    USP_TRY(move(self, &lists, stream));
    status = usp_list_unpack(transport->device, recvs, recv_count, stream);
    if (status == USP_OK) status = set_probe(self, lane, stream);
    return status == USP_OK ? USP_OK : usp_nccl_give_up(self, status);
}

/* ---- watching ---------------------------------------------------------------------------------------------------- */

static usp_status nccl_watch(usp_transport *transport) {
    usp_nccl *self = usp_nccl_of(transport);
    ncclResult_t result = ncclSuccess;
    int busy = 0, late = 0;
    if (!usp_nccl_lock_within(self, 0)) return USP_OK; /* another thread is in a call, and will see its result */
    if (self->comm != NULL) {
        ncclResult_t query = ncclCommGetAsyncError(self->comm, &result);
        if (query != ncclSuccess) result = query;
    }
    usp_status status = usp_probes_query(transport->device, &self->probes, transport->timeout_ms, &busy, &late);
    pthread_mutex_unlock(&self->lock);
    if (usp_nccl_went_wrong(result))
        return usp_nccl_give_up(self, usp_nccl_fail(transport->rank, "the communicator", result));
    if (status != USP_OK) return usp_nccl_give_up(self, status);
    return late ? usp_nccl_give_late(self, "an exchange on the GPU") : USP_OK;
}

static void nccl_stop(usp_transport *transport, int milliseconds) {
    usp_nccl *self = usp_nccl_of(transport);
    usp_nccl_start_release(self, 1);
    if (milliseconds > 0 && !usp_nccl_await_release(self->release, milliseconds))
        usp_host_log(transport->host, 1, "rank %d: NCCL is still aborting after %d ms", transport->rank, milliseconds);
    if (milliseconds > 0 && atomic_load(&self->release->revoked))
        usp_host_log(transport->host, 3, "rank %d: NCCL revoked its work", transport->rank);
}

/* ---- the table --------------------------------------------------------------------------------------------------- */

void usp_nccl_free_scratch(usp_nccl *self) {
    const usp_device_ops *ops = self->base.device->ops;
    if (self->scratch != NULL) ops->free(self->base.device, self->scratch);
    if (self->stream != NULL) ops->stream_destroy(self->base.device, self->stream);
    self->scratch = NULL;
    self->stream = NULL;
}

/* What NCCL no longer has any hand in. */
static void free_rest(usp_nccl *self) {
    usp_device *device = self->base.device;
    const usp_host *host = self->base.host;
    while (self->shared != NULL) {
        usp_shared *next = self->shared->next;
        usp_nccl_free_piece(self, self->shared);
        self->shared = next;
    }
    usp_nccl_free_scratch(self);
    usp_probes_destroy(device, &self->probes);
    pthread_mutex_destroy(&self->lock);
    usp_host_free(host, self);
}

static void nccl_destroy(usp_transport *transport) {
    usp_nccl *self = usp_nccl_of(transport);
    int healthy = self->base.control != NULL && usp_nccl_check(self) == USP_OK;
    for (usp_shared *piece = self->shared; healthy && piece != NULL; piece = piece->next)
        usp_nccl_deregister(self, piece);
    int stuck = RELEASE_STUCK; /* where another thread was late to let go of the communicator, it has by now */
    if (self->release->comm == NULL) atomic_compare_exchange_strong(&self->release->stage, &stuck, RELEASE_NONE);
    usp_nccl_start_release(self, !healthy);
    int released = usp_nccl_finish_release(transport->host, self->release);
    if (released) free_rest(self);
}

const usp_transport_ops usp_nccl_ops = {
    .name = "nccl",
    .prepare = usp_plain_prepare,
    .exchange = nccl_exchange,
    .alloc_shared = usp_nccl_alloc_shared,
    .register_shared = usp_nccl_register_shared,
    .free_shared = usp_nccl_free_shared,
    .reach = usp_plain_reach,
    .watch = nccl_watch,
    .stop = nccl_stop,
    .destroy = nccl_destroy,
};
