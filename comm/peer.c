/* peer.c - GPUs of one host that write into each other's memory. Copy engines move the bytes, rows as they lie, and
 * streams wait for flags: no kernel runs, and the host waits for nobody. An exchange may be captured in a graph. */
#define _GNU_SOURCE

#include "error.h"
#include "list.h"
#include "peer_state.h"
#include "thread.h"

static usp_peer *peer_of(usp_transport *transport) {
    return (usp_peer *)transport;
}

/* This rank has failed by `status`, whose sentence is recorded: all ranks hear of it. Returns the first failure. */
static usp_status give_up(usp_peer *self, usp_status status) {
    return usp_channel_fail(self->base.control, status, "rank %d: %s", self->base.rank, usp_last_error());
}

/* ---- flags ------------------------------------------------------------------------------------------------------- */

static usp_status run_batch(usp_peer *self, CUstreamBatchMemOpParams *operations, unsigned count, usp_stream stream) {
    CUresult result = self->batch((CUstream)stream, count, operations, 0);
    return result == CUDA_SUCCESS ? USP_OK : usp_fail(USP_DEVICE, "cuStreamBatchMemOp failed: %d", (int)result);
}

static CUstreamBatchMemOpParams write_of(uint32_t *flag, uint32_t value) {
    CUstreamBatchMemOpParams operation = {.writeValue = {.operation = CU_STREAM_MEM_OP_WRITE_VALUE_32,
                                                         .address = (CUdeviceptr)(uintptr_t)flag,
                                                         .value = value,
                                                         .flags = CU_STREAM_WRITE_VALUE_DEFAULT}};
    return operation;
}

usp_status usp_peer_take_flag(usp_peer *self, uint32_t *flag, usp_stream stream) {
    CUstreamBatchMemOpParams operations[2] = {{.waitValue = {.operation = CU_STREAM_MEM_OP_WAIT_VALUE_32,
                                                             .address = (CUdeviceptr)(uintptr_t)flag,
                                                             .value = 1,
                                                             .flags = CU_STREAM_WAIT_VALUE_GEQ}},
                                              write_of(flag, 0)};
    return run_batch(self, operations, 2, stream);
}

usp_status usp_peer_set_flag(usp_peer *self, uint32_t *flag, usp_stream stream) {
    CUstreamBatchMemOpParams operation = write_of(flag, 1);
    return run_batch(self, &operation, 1, stream);
}

/* ---- one way of one pair ----------------------------------------------------------------------------------------- */

/* Bytes `at` .. `at` + `bytes` - 1 of a message to or from where they are side by side. */
static usp_status copy_part(usp_device *device, const usp_message *message, size_t at, size_t bytes, char *slot,
                            int sends, usp_stream stream) {
    for (size_t done = 0, moved; done < bytes; done += moved) {
        size_t run, left = bytes - done;
        char *lies = usp_message_at(message, at + done, &run), *packed = slot + done;
        size_t rows = usp_message_lies_apart(message) && run == message->bytes ? left / run : 0;
        void *to = sends ? packed : lies;
        const void *from = sends ? lies : packed;
        size_t distance = rows ? message->stride : run;
        moved = rows ? rows * run : run < left ? run : left;
        if (rows)
            USP_TRY(device->ops->copy_2d(device, to, sends ? run : distance, from, sends ? distance : run, run,
                                         (int64_t)rows, stream));
        else
            USP_TRY(device->ops->copy(device, to, from, moved, stream));
    }
    return USP_OK;
}

/* The stream of bytes that a list has for one peer, or wants from it, and where it is in the slots. */
typedef struct usp_flow {
    usp_peer *self;
    int peer, sends;
    usp_peer_way *way;
    char *slot; /* NULL: none is taken */
    size_t used;
} usp_flow;

static usp_status take_slot(usp_flow *flow) {
    usp_peer *self = flow->self;
    usp_peer_flags *own = usp_peer_flags_of(self->region, flow->peer);
    int slot = flow->way->slot;
    char *region = flow->sends ? self->link[flow->peer].region : self->region;
    USP_TRY(usp_peer_take_flag(self, flow->sends ? &own->free[slot] : &own->full[slot], flow->way->stream));
    flow->slot = usp_peer_slot(self, region, flow->sends ? self->base.rank : flow->peer, slot);
    flow->used = 0;
    return USP_OK;
}

static usp_status pass_slot(usp_flow *flow) {
    usp_peer *self = flow->self;
    usp_peer_flags *there = usp_peer_flags_of(self->link[flow->peer].region, self->base.rank);
    int slot = flow->way->slot;
    flow->slot = NULL;
    flow->way->slot = (slot + 1) % USP_PEER_SLOTS;
    return usp_peer_set_flag(self, flow->sends ? &there->full[slot] : &there->free[slot], flow->way->stream);
}

static usp_status move_message(usp_flow *flow, const usp_message *message) {
    usp_device *device = flow->self->base.device;
    size_t bytes = usp_message_bytes(message), whole = flow->self->slot_bytes;
    for (size_t at = 0, part; at < bytes; at += part) {
        if (!flow->slot) USP_TRY(take_slot(flow));
        part = bytes - at < whole - flow->used ? bytes - at : whole - flow->used;
        USP_TRY(copy_part(device, message, at, part, flow->slot + flow->used, flow->sends, flow->way->stream));
        flow->used += (part + USP_PEER_ALIGNMENT - 1) / USP_PEER_ALIGNMENT * USP_PEER_ALIGNMENT;
        if (flow->used >= whole) USP_TRY(pass_slot(flow));
    }
    return USP_OK;
}

/* All messages of one way of one pair, on the way's stream, between two points of `stream`. */
static usp_status move_way(usp_peer *self, const usp_message *messages, int count, int peer, int sends,
                           usp_stream stream) {
    const usp_device_ops *ops = self->base.device->ops;
    usp_peer_way *way = sends ? &self->link[peer].out : &self->link[peer].in;
    usp_flow flow = {.self = self, .peer = peer, .sends = sends, .way = way};
    int i = usp_list_next(messages, count, 0, peer);
    if (i == USP_NO_MESSAGE) return USP_OK;
    USP_TRY(ops->event_wait(self->base.device, self->begun, way->stream));
    for (; i != USP_NO_MESSAGE; i = usp_list_next(messages, count, i + 1, peer))
        USP_TRY(move_message(&flow, &messages[i]));
    if (flow.slot) USP_TRY(pass_slot(&flow));
    USP_TRY(ops->event_record(self->base.device, way->done, way->stream));
    return ops->event_wait(self->base.device, way->done, stream);
}

/* ---- exchange ---------------------------------------------------------------------------------------------------- */

/* A graph in capture is skipped: what it holds runs when it is launched, and then nobody passes here. */
static usp_status set_probe(usp_peer *self, usp_stream stream) {
    usp_device *device = self->base.device;
    int capturing = 0;
    USP_TRY(device->ops->capturing(device, stream, &capturing));
    if (capturing) return USP_OK;
    pthread_mutex_lock(&self->lock);
    usp_status status = usp_probes_record(device, &self->probes, stream);
    pthread_mutex_unlock(&self->lock);
    return status;
}

static usp_status move_all(usp_peer *self, const usp_message *sends, int send_count, const usp_message *recvs,
                           int recv_count, usp_stream stream) {
    USP_TRY(self->base.device->ops->event_record(self->base.device, self->begun, stream));
    for (int i = 1; i < self->base.size; i++) {
        int to = (self->base.rank + i) % self->base.size;
        int from = (self->base.rank + self->base.size - i) % self->base.size;
        USP_TRY(move_way(self, sends, send_count, to, 1, stream));
        USP_TRY(move_way(self, recvs, recv_count, from, 0, stream));
    }
    return set_probe(self, stream);
}

static usp_status peer_exchange(usp_transport *transport, const usp_message *sends, int send_count,
                                const usp_message *recvs, int recv_count, usp_stream stream) {
    usp_peer *self = peer_of(transport);
    USP_TRY(usp_list_check(transport, sends, send_count, recvs, recv_count));
    USP_TRY(usp_channel_poll(transport->control));
    usp_channel_progress(transport->control, ++self->exchanges, -1);
    usp_status status = move_all(self, sends, send_count, recvs, recv_count, stream);
    return status == USP_OK ? USP_OK : give_up(self, status);
}

/* ---- watching ---------------------------------------------------------------------------------------------------- */

static usp_status peer_watch(usp_transport *transport) {
    usp_peer *self = peer_of(transport);
    int late = 0;
    if (pthread_mutex_trylock(&self->lock) != 0) return USP_OK; /* an exchange is being enqueued */
    usp_status status = usp_probes_query(transport->device, &self->probes, transport->timeout_ms, &late);
    pthread_mutex_unlock(&self->lock);
    if (status != USP_OK) return give_up(self, status);
    return late ? usp_channel_overdue(transport->control, -1) : USP_OK;
}

int usp_peer_is_idle(usp_peer *self) {
    usp_device *device = self->base.device;
    int busy = 0;
    for (int i = 0; i < self->base.size && !busy; i++) {
        const usp_peer_link *link = &self->link[i];
        if (link->out.stream && device->ops->query(device, link->out.stream, &busy) != USP_OK) return 1;
        if (!busy && link->in.stream && device->ops->query(device, link->in.stream, &busy) != USP_OK) return 1;
    }
    return !busy;
}

/* Whatever waits for a flag finds it set, again and again: a stream may have many waits in it. */
static void peer_stop(usp_transport *transport, int milliseconds) {
    usp_peer *self = peer_of(transport);
    usp_device *device = transport->device;
    int64_t begin = usp_now_ms();
    size_t bytes = (size_t)transport->size * sizeof(usp_peer_flags);
    for (int round = 0;; round++) {
        if (device->ops->copy(device, self->region, self->set, bytes, self->rescue) != USP_OK) return;
        if (usp_now_ms() - begin >= milliseconds || usp_peer_is_idle(self)) return;
        usp_pause(round);
    }
}

/* ---- the table --------------------------------------------------------------------------------------------------- */

static void peer_destroy(usp_transport *transport) {
    usp_peer *self = peer_of(transport);
    int64_t begin = usp_now_ms();
    int healthy = transport->control && usp_channel_poll(transport->control) == USP_OK;
    for (int round = 0; healthy && !usp_peer_is_idle(self) && usp_now_ms() - begin < USP_PEER_LIMIT_MS; round++)
        usp_pause(round);
    if (self->region && !usp_peer_is_idle(self)) peer_stop(transport, USP_PEER_LIMIT_MS);
    if (transport->control) usp_channel_leave(transport->control);
    if (usp_peer_is_idle(self))
        usp_peer_end(self);
    else
        usp_host_log(transport->host, 1,
                     "rank %d: the GPU does not end what it has begun: the transport's memory stays", transport->rank);
}

const usp_transport_ops usp_peer_ops = {
    .name = "peer",
    .prepare = usp_plain_prepare,
    .exchange = peer_exchange,
    .alloc_shared = usp_plain_alloc_shared,
    .register_shared = usp_plain_register_shared,
    .free_shared = usp_plain_free_shared,
    .watch = peer_watch,
    .stop = peer_stop,
    .destroy = peer_destroy,
};
