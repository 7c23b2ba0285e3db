/* peer.c - GPUs of one host that write into each other's memory. Copy engines move the bytes, rows as they lie, and
 * streams wait for flags: no kernel runs, and the host waits for nobody. An exchange may be captured in a graph.
 *
 * An exchange goes in rounds, of which one is enough where all that a pair moves may arrive where it belongs, or fits
 * into a slot. In a round a rank first says to all from which it receives that it is ready. Then, peer after peer, it
 * waits until they are, writes, and says so; and last it waits for what others write. So what a rank waits for its
 * peer's stream has before its first wait of the same round, or before all its later ones: nothing can block. Between
 * two exchanges all flags are down, so that graphs and calls may follow each other in any order. */
#define _GNU_SOURCE

#include "error.h"
#include "list.h"
#include "peer_state.h"
#include "thread.h"

/* This rank has failed by `status`, whose sentence is recorded: all ranks hear of it. Returns the first failure. */
static usp_status give_up(usp_peer *self, usp_status status) {
    return usp_channel_fail(self->base.control, status, "rank %d: %s", self->base.rank, usp_last_error());
}

/* ---- one way of one pair ----------------------------------------------------------------------------------------- */

/* The whole message that moves. A receiver copies what arrives elsewhere than where it belongs. */
static usp_status move_there(usp_peer *self, const usp_peer_flow *flow, usp_stream stream) {
    const usp_message *message = &flow->messages[flow->message];
    usp_message there = *message;
    there.base = flow->sends ? usp_pieces_reach(&self->pieces, flow->peer, message->there, 1) : message->there;
    there.stride = message->there_stride;
    if (flow->sends) return usp_message_copy(self->base.device, &there, message, stream);
    if (message->there == message->base) return USP_OK;
    return usp_message_copy(self->base.device, message, &there, stream);
}

/* Bytes `at` .. `at` + `bytes` - 1 of a message to or from where they are side by side. */
static usp_status move_part(usp_peer *self, const usp_peer_flow *flow, size_t bytes, char *slot, usp_stream stream) {
    const usp_message *message = &flow->messages[flow->message];
    for (size_t done = 0, moved; done < bytes; done += moved) {
        size_t run, left = bytes - done;
        usp_message part = {.base = usp_message_at(message, flow->at + done, &run), .rows = 1};
        part.stride = message->stride;
        part.bytes = run < left ? run : left;
        if (part.bytes == message->bytes) part.rows = (int64_t)(left / part.bytes);
        moved = usp_message_bytes(&part);
        usp_message packed = usp_message_whole(flow->peer, slot + done, moved);
        USP_TRY(
            usp_message_copy(self->base.device, flow->sends ? &packed : &part, flow->sends ? &part : &packed, stream));
    }
    return USP_OK;
}

static void advance(usp_peer_flow *flow, size_t bytes) {
    flow->at += bytes;
    if (flow->at < usp_message_bytes(&flow->messages[flow->message])) return;
    flow->message = usp_list_next(flow->messages, flow->count, flow->message + 1, flow->peer);
    flow->at = 0;
}

/* What moves in one round: messages in order, until the slot is full. */
static usp_status move_round(usp_peer *self, usp_peer_flow *flow, char *slot, usp_stream stream) {
    for (size_t used = 0; flow->message != USP_NO_MESSAGE && used < self->slot_bytes;) {
        const usp_message *message = &flow->messages[flow->message];
        size_t part = usp_message_bytes(message) - flow->at;
        if (message->there) {
            USP_TRY(move_there(self, flow, stream));
        } else {
            if (part > self->slot_bytes - used) part = self->slot_bytes - used;
            USP_TRY(move_part(self, flow, part, slot + used, stream));
            used += (part + USP_PEER_ALIGNMENT - 1) / USP_PEER_ALIGNMENT * USP_PEER_ALIGNMENT;
        }
        advance(flow, part);
    }
    return USP_OK;
}

/* One call of exchange, and what it is about to do to flags. */
typedef struct errand {
    int lane;
    usp_stream stream;
    usp_peer_batch batch;
} errand;

static usp_status send_round(usp_peer *self, int peer, errand *e) {
    int rank = self->base.rank;
    char *slot = usp_pieces_reach(&self->pieces, peer, usp_peer_slot(self, e->lane, peer, rank), 1);
    USP_TRY(usp_peer_await(self, &e->batch, &usp_peer_flags_of(self, e->lane, rank, peer)->ready, e->stream));
    USP_TRY(usp_peer_run(self, &e->batch, e->stream));
    USP_TRY(move_round(self, &self->other[peer].out, slot, e->stream));
    return usp_peer_set(self, &e->batch, &usp_peer_flags_of(self, e->lane, peer, rank)->full, e->stream);
}

static usp_status receive_round(usp_peer *self, int peer, errand *e) {
    int rank = self->base.rank;
    USP_TRY(usp_peer_await(self, &e->batch, &usp_peer_flags_of(self, e->lane, rank, peer)->full, e->stream));
    USP_TRY(usp_peer_run(self, &e->batch, e->stream));
    return move_round(self, &self->other[peer].in, usp_peer_slot(self, e->lane, rank, peer), e->stream);
}

/* ---- exchange ---------------------------------------------------------------------------------------------------- */

static int moves(const usp_peer_flow *flow) {
    return flow->message != USP_NO_MESSAGE;
}

/* Peers in an order in which not all ranks write to the same one. */
static usp_status run_round(usp_peer *self, errand *e) {
    int size = self->base.size, rank = self->base.rank;
    for (int peer = 0; peer < size; peer++)
        if (moves(&self->other[peer].in))
            USP_TRY(usp_peer_set(self, &e->batch, &usp_peer_flags_of(self, e->lane, peer, rank)->ready, e->stream));
    for (int i = 1; i < size; i++)
        if (moves(&self->other[(rank + i) % size].out)) USP_TRY(send_round(self, (rank + i) % size, e));
    for (int i = size - 1; i > 0; i--)
        if (moves(&self->other[(rank + i) % size].in)) USP_TRY(receive_round(self, (rank + i) % size, e));
    return usp_peer_run(self, &e->batch, e->stream);
}

static int anything_moves(const usp_peer *self) {
    for (int peer = 0; peer < self->base.size; peer++)
        if (moves(&self->other[peer].out) || moves(&self->other[peer].in)) return 1;
    return 0;
}

static usp_peer_flow flow_of(const usp_message *messages, int count, int peer, int sends) {
    return (usp_peer_flow){messages, count, peer, sends, usp_list_next(messages, count, 0, peer), 0};
}

static usp_status move_all(usp_peer *self, const usp_message *sends, int send_count, const usp_message *recvs,
                           int recv_count, errand *e) {
    for (int peer = 0; peer < self->base.size; peer++) {
        self->other[peer].out = flow_of(sends, send_count, peer, 1);
        self->other[peer].in = flow_of(recvs, recv_count, peer, 0);
    }
    while (anything_moves(self)) USP_TRY(run_round(self, e));
    return USP_OK;
}

static usp_status check_places(const usp_peer *self, const usp_message *messages, int count) {
    for (int i = 0; i < count; i++) {
        const usp_message *m = &messages[i];
        USP_REQUIRE(self->other[m->peer].near, "rank %d is on another host", m->peer);
        USP_REQUIRE(!m->there || usp_pieces_reach(&self->pieces, m->peer, m->there, usp_message_extent(m)),
                    "a message to or from rank %d arrives outside of shared memory", m->peer);
    }
    return USP_OK;
}

/* A graph in capture is skipped: what it holds runs when it is launched, and then nobody passes here. */
static usp_status set_probe(usp_peer *self, int lane, usp_stream stream) {
    usp_device *device = self->base.device;
    int capturing = 0;
    USP_TRY(device->ops->capturing(device, stream, &capturing));
    if (capturing) return USP_OK;
    pthread_mutex_lock(&self->lock);
    usp_status status = usp_probes_record(device, &self->probes, lane, stream);
    pthread_mutex_unlock(&self->lock);
    return status;
}

static usp_status peer_exchange(usp_transport *transport, int lane, const usp_message *sends, int send_count,
                                const usp_message *recvs, int recv_count, usp_stream stream) {
    usp_peer *self = usp_peer_of(transport);
    errand e = {.lane = lane, .stream = stream};
    USP_TRY(usp_list_check(transport, sends, send_count, recvs, recv_count));
    USP_TRY(check_places(self, sends, send_count));
    USP_TRY(check_places(self, recvs, recv_count));
    USP_TRY(usp_channel_poll(transport->control));
    usp_channel_enter(transport->control);
    if (usp_list_is_empty(sends, send_count) && usp_list_is_empty(recvs, recv_count)) return USP_OK;
    usp_status status = move_all(self, sends, send_count, recvs, recv_count, &e);
    if (status == USP_OK) status = set_probe(self, lane, stream);
    return status == USP_OK ? USP_OK : give_up(self, status);
}

static void *peer_reach(usp_transport *transport, int peer, const void *memory) {
    return usp_pieces_reach(&usp_peer_of(transport)->pieces, peer, memory, 1);
}

/* ---- watching ---------------------------------------------------------------------------------------------------- */

static usp_status peer_watch(usp_transport *transport) {
    usp_peer *self = usp_peer_of(transport);
    int busy = 0, late = 0;
    if (pthread_mutex_trylock(&self->lock) != 0) return USP_OK; /* an exchange is being enqueued */
    usp_status status = usp_probes_query(transport->device, &self->probes, transport->timeout_ms, &busy, &late);
    pthread_mutex_unlock(&self->lock);
    if (status != USP_OK) return give_up(self, status);
    return late ? usp_channel_overdue(transport->control, -1) : USP_OK;
}

/* Looks whether what exchanges have begun is done, but for graphs. A GPU that has failed does nothing more. */
static int is_idle(usp_peer *self) {
    int busy = 0, late = 0;
    pthread_mutex_lock(&self->lock);
    usp_status status = usp_probes_query(self->base.device, &self->probes, -1, &busy, &late);
    pthread_mutex_unlock(&self->lock);
    return status != USP_OK || !busy;
}

static void await_idle(usp_peer *self, int milliseconds) {
    int64_t begun = usp_now_ms();
    for (int round = 0; usp_now_ms() - begun < milliseconds && !is_idle(self); round++) usp_pause(round);
}

/* What goes on then moves what is void: the failure of the ranks is known here before. */
static void peer_stop(usp_transport *transport, int milliseconds) {
    usp_peer_release(usp_peer_of(transport));
    await_idle(usp_peer_of(transport), milliseconds);
}

/* ---- the end ----------------------------------------------------------------------------------------------------- */

/* What is not done by then fails all ranks: it must not pass for what it is not. A rank whose line ends has let go. The
 * control of a guest stays: others use it. */
static void finish(usp_peer *self) {
    usp_control *control = self->base.control;
    if (usp_channel_poll(control) == USP_OK) await_idle(self, USP_PEER_LIMIT_MS);
    if (!is_idle(self))
        usp_channel_fail(control, USP_PEER_LOST, "rank %d left before its transfers had ended", self->base.rank);
    if (usp_channel_poll(control) != USP_OK) peer_stop(&self->base, USP_PEER_LIMIT_MS);
    if (is_idle(self)) usp_peer_let_go(self);
    for (int peer = 0; peer < self->base.size; peer++) self->other[peer].lost = usp_channel_has_lost(control, peer);
    if (!self->guest) usp_channel_leave(control);
}

static void free_parts(usp_peer *self) {
    usp_peer_free_pieces(self);
    usp_probes_destroy(self->base.device, &self->probes);
    usp_peer_close_board(self);
    pthread_mutex_destroy(&self->lock);
    usp_host_free(self->base.host, self->words);
    usp_host_free(self->base.host, self);
}

static void peer_destroy(usp_transport *transport) {
    usp_peer *self = usp_peer_of(transport);
    if (self->shown) finish(self);
    if (!self->shown) usp_peer_let_go(self);
    if (!self->shown || is_idle(self))
        free_parts(self);
    else
        usp_host_log(transport->host, 1,
                     "rank %d: the GPU does not end what it has begun: the transport's memory stays", transport->rank);
}

const usp_transport_ops usp_peer_ops = {
    .name = "peer",
    .reaches = 1,
    .prepare = usp_plain_prepare,
    .exchange = peer_exchange,
    .alloc_shared = usp_peer_alloc_shared,
    .register_shared = usp_peer_register_shared,
    .free_shared = usp_peer_free_shared,
    .reach = peer_reach,
    .watch = peer_watch,
    .stop = peer_stop,
    .destroy = peer_destroy,
};
