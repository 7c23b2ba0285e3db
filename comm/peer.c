/* peer.c - GPUs of one host that write into each other's memory. Copy engines move the bytes, rows as they lie, and
 * streams wait for flags: no kernel runs, and the host waits for nobody. An exchange may be captured in a graph.
 *
 * In step i of an exchange a rank sends to the i-th rank behind it and receives from the i-th before it, slot by slot
 * in turn. So an operation waits for none that another rank enqueues later, by (exchange, step, slot): nothing can
 * block, even where the GPU puts all streams into one queue. */
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

/* Waits until the flag is set, and puts it back. */
usp_status usp_peer_take_flag(usp_peer *self, usp_peer_flag *flag, int flushes, usp_stream stream) {
    unsigned how = CU_STREAM_WAIT_VALUE_GEQ | (flushes ? CU_STREAM_WAIT_VALUE_FLUSH : 0u);
    CUstreamBatchMemOpParams operations[2] = {{.waitValue = {.operation = CU_STREAM_MEM_OP_WAIT_VALUE_64,
                                                             .address = (CUdeviceptr)(uintptr_t)flag,
                                                             .value64 = 1,
                                                             .flags = how}},
                                              write_of(&flag->set, 0)};
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
        usp_message part = {.base = usp_message_at(message, at + done, &run), .rows = 1, .stride = message->stride};
        part.bytes = run < left ? run : left;
        if (part.bytes == message->bytes) part.rows = (int64_t)(left / part.bytes);
        moved = usp_message_bytes(&part);
        usp_message packed = usp_message_whole(message->peer, slot + done, moved);
        USP_TRY(usp_message_copy(device, sends ? &packed : &part, sends ? &part : &packed, stream));
    }
    return USP_OK;
}

/* The stream of bytes that a list has for one peer, or wants from it. */
typedef struct usp_flow {
    usp_peer *self;
    const usp_message *messages;
    int count, peer, sends;
    int message; /* the one that moves, or USP_NO_MESSAGE */
    size_t at;   /* its bytes so far */
    int slot;    /* the next one */
} usp_flow;

static usp_flow flow_of(usp_peer *self, const usp_message *messages, int count, int peer, int sends) {
    return (usp_flow){.self = self,
                      .messages = messages,
                      .count = count,
                      .peer = peer,
                      .sends = sends,
                      .message = usp_list_next(messages, count, 0, peer)};
}

static usp_status fill_slot(usp_flow *flow, char *slot, usp_stream stream) {
    size_t whole = flow->self->slot_bytes;
    for (size_t used = 0; flow->message != USP_NO_MESSAGE && used < whole;) {
        const usp_message *message = &flow->messages[flow->message];
        size_t left = usp_message_bytes(message) - flow->at, part = left < whole - used ? left : whole - used;
        USP_TRY(copy_part(flow->self->base.device, message, flow->at, part, slot + used, flow->sends, stream));
        used += (part + USP_PEER_ALIGNMENT - 1) / USP_PEER_ALIGNMENT * USP_PEER_ALIGNMENT;
        flow->at += part;
        if (part < left) continue;
        flow->message = usp_list_next(flow->messages, flow->count, flow->message + 1, flow->peer);
        flow->at = 0;
    }
    return USP_OK;
}

/* Waits for the next slot, moves what it holds, and passes it on. */
static usp_status move_slot(usp_flow *flow) {
    usp_peer *self = flow->self;
    int rank = self->base.rank, peer = flow->peer, number = flow->slot;
    char *there = self->link[peer].region;
    usp_peer_flags *own = usp_peer_flags_of(self->region, peer), *its = usp_peer_flags_of(there, rank);
    usp_stream stream = flow->sends ? self->out : self->in;
    char *slot = flow->sends ? usp_peer_slot(self, there, peer, rank, number)
                             : usp_peer_slot(self, self->region, rank, peer, number);
    flow->slot = (number + 1) % USP_PEER_SLOTS;
    USP_TRY(usp_peer_take_flag(self, flow->sends ? &own->free[number] : &own->full[number],
                               self->flushes && !flow->sends, stream));
    USP_TRY(fill_slot(flow, slot, stream));
    return usp_peer_set_flag(self, flow->sends ? &its->full[number].set : &its->free[number].set, stream);
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

static usp_status begin(usp_peer *self, usp_stream stream) {
    usp_device *device = self->base.device;
    USP_TRY(device->ops->event_record(device, self->begun, stream));
    USP_TRY(device->ops->event_wait(device, self->begun, self->out));
    return device->ops->event_wait(device, self->begun, self->in);
}

static usp_status end(usp_peer *self, usp_stream stream) {
    usp_device *device = self->base.device;
    USP_TRY(device->ops->event_record(device, self->sent, self->out));
    USP_TRY(device->ops->event_record(device, self->received, self->in));
    USP_TRY(device->ops->event_wait(device, self->sent, stream));
    USP_TRY(device->ops->event_wait(device, self->received, stream));
    return set_probe(self, stream);
}

static usp_status move_all(usp_peer *self, const usp_message *sends, int send_count, const usp_message *recvs,
                           int recv_count, usp_stream stream) {
    int size = self->base.size, rank = self->base.rank;
    USP_TRY(begin(self, stream));
    for (int i = 1; i < size; i++) {
        usp_flow out = flow_of(self, sends, send_count, (rank + i) % size, 1);
        usp_flow in = flow_of(self, recvs, recv_count, (rank + size - i) % size, 0);
        while (out.message != USP_NO_MESSAGE || in.message != USP_NO_MESSAGE) {
            if (out.message != USP_NO_MESSAGE) USP_TRY(move_slot(&out));
            if (in.message != USP_NO_MESSAGE) USP_TRY(move_slot(&in));
        }
    }
    return end(self, stream);
}

static usp_status peer_exchange(usp_transport *transport, const usp_message *sends, int send_count,
                                const usp_message *recvs, int recv_count, usp_stream stream) {
    usp_peer *self = peer_of(transport);
    USP_TRY(usp_list_check(transport, sends, send_count, recvs, recv_count));
    USP_TRY(usp_channel_poll(transport->control));
    usp_channel_progress(transport->control, ++self->exchanges, -1);
    if (usp_list_is_empty(sends, send_count) && usp_list_is_empty(recvs, recv_count)) return USP_OK;
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
    int sending = 0, receiving = 0;
    if (device->ops->query(device, self->out, &sending) != USP_OK) return 1;
    if (device->ops->query(device, self->in, &receiving) != USP_OK) return 1;
    return !sending && !receiving;
}

static void await_idle(usp_peer *self, int milliseconds) {
    int64_t begun = usp_now_ms();
    for (int round = 0; usp_now_ms() - begun < milliseconds && !usp_peer_is_idle(self); round++) usp_pause(round);
}

/* Whatever waits for a flag goes on, now and later, in streams and in graphs. What it moves then is void: the failure
 * of the ranks is known here before. */
static void peer_stop(usp_transport *transport, int milliseconds) {
    usp_peer *self = peer_of(transport);
    size_t bytes = (size_t)transport->size * sizeof *self->stopped;
    if (transport->device->ops->copy(transport->device, self->region, self->stopped, bytes, self->rescue) == USP_OK)
        await_idle(self, milliseconds);
}

/* ---- the table --------------------------------------------------------------------------------------------------- */

/* What is not done by then fails all ranks: it must not pass for what it is not. A rank whose line ends has let go. */
static void finish(usp_peer *self) {
    usp_control *control = self->base.control;
    if (usp_channel_poll(control) == USP_OK) await_idle(self, USP_PEER_LIMIT_MS);
    if (!usp_peer_is_idle(self))
        usp_channel_fail(control, USP_PEER_LOST, "rank %d left before its transfers had ended", self->base.rank);
    if (usp_channel_poll(control) != USP_OK) peer_stop(&self->base, USP_PEER_LIMIT_MS);
    if (usp_peer_is_idle(self)) usp_peer_let_go(self);
    for (int peer = 0; peer < self->base.size; peer++) self->link[peer].lost = usp_channel_has_lost(control, peer);
    usp_channel_leave(control);
}

static void peer_destroy(usp_transport *transport) {
    usp_peer *self = peer_of(transport);
    if (self->shown) finish(self);
    if (!self->shown || usp_peer_is_idle(self))
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
