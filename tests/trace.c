/* trace.c - the counting transports and the device beside them (see trace.h): every entry goes to the one inside. */
#include "trace.h"
#include "world.h"

#include <stdlib.h>
#include <string.h>

/* The device's table while its calls are written down. */
typedef struct watch {
    usp_device_ops ops; /* first: what the device points to */
    const usp_device_ops *inside;
    usp_trace *trace;
} watch;

/* A transport around one of the world's. */
typedef struct wire {
    usp_transport transport; /* first: a wire is a transport */
    usp_transport_ops ops;
    usp_transport *inside;
    usp_trace *trace;
} wire;

struct usp_trace {
    wire far, near; /* the world's transport and the one beside it, or one that passes for that */
    usp_world *world;
    usp_traffic traffic;
    watch watch;
    int exchanging; /* inside the transport, whose own waits and copies are not the layer's */
    int64_t messages;
    size_t bytes; /* announced */
};

static wire *wire_of(usp_transport *transport) {
    return (wire *)transport;
}

static void note(usp_trace *trace, char what) {
    size_t length = strlen(trace->traffic.order);
    if (!trace->exchanging && length + 1 < sizeof trace->traffic.order) trace->traffic.order[length] = what;
}

/* ---- the device -------------------------------------------------------------------------------------------------- */

/* Writes a letter down and finds the true table. */
static const usp_device_ops *inside(const usp_device *device, char what) {
    const watch *w = (const watch *)device->ops;
    note(w->trace, what);
    return w->inside;
}

static usp_status copy_rows(usp_device *device, const usp_copy *copies, int count, usp_stream stream) {
    return inside(device, copies->accumulate ? '+' : 'C')->copy_rows(device, copies, count, stream);
}

static usp_status linear_output(usp_device *device, const usp_linear *arguments, usp_stream stream) {
    return inside(device, 'I')->linear_output(device, arguments, stream);
}

static usp_status linear_apply(usp_device *device, const usp_linear *arguments, usp_stream stream) {
    return inside(device, 'A')->linear_apply(device, arguments, stream);
}

static usp_status event_wait(usp_device *device, usp_event *event, usp_stream stream) {
    return inside(device, stream == (usp_stream)(const void *)device->ops ? 'F' : 'W')
        ->event_wait(device, event, stream);
}

/* ---- the transport ----------------------------------------------------------------------------------------------- */

static usp_status prepare(usp_transport *transport, int64_t messages, size_t bytes) {
    const wire *w = wire_of(transport);
    w->trace->messages = messages;
    w->trace->bytes = bytes;
    return w->inside->ops->prepare(w->inside, messages, bytes);
}

/* A list of one way. Returns its bytes. */
static size_t count_messages(wire *w, const usp_message *messages, int count, int64_t *by_peer) {
    const int *node = w->trace->world->meeting.node;
    int near = w == &w->trace->near;
    size_t bytes = 0;
    for (int i = 0; i < count; bytes += usp_message_bytes(&messages[i++])) {
        by_peer[messages[i].peer] += (int64_t)usp_message_bytes(&messages[i]);
        w->trace->traffic.strays += near && node[messages[i].peer] != node[w->transport.rank];
    }
    *(near ? &w->trace->traffic.near : &w->trace->traffic.far) += (int64_t)bytes;
    return bytes;
}

static usp_status exchange(usp_transport *transport, int lane, const usp_message *sends, int send_count,
                           const usp_message *recvs, int recv_count, usp_stream stream) {
    wire *w = wire_of(transport);
    usp_trace *trace = w->trace;
    note(trace, 'X');
    size_t bytes = count_messages(w, sends, send_count, trace->traffic.sent);
    bytes += count_messages(w, recvs, recv_count, trace->traffic.received);
    trace->traffic.unprepared += send_count + recv_count > trace->messages || bytes > trace->bytes;
    trace->exchanging = 1;
    usp_status status = w->inside->ops->exchange(w->inside, lane, sends, send_count, recvs, recv_count, stream);
    trace->exchanging = 0;
    return status;
}

static usp_status alloc_shared(usp_transport *transport, size_t bytes, void **memory) {
    return wire_of(transport)->inside->ops->alloc_shared(wire_of(transport)->inside, bytes, memory);
}

static usp_status register_shared(usp_transport *transport, void *memory) {
    return wire_of(transport)->inside->ops->register_shared(wire_of(transport)->inside, memory);
}

static usp_status free_shared(usp_transport *transport, void *memory) {
    return wire_of(transport)->inside->ops->free_shared(wire_of(transport)->inside, memory);
}

static void *reach(usp_transport *transport, int peer, const void *memory) {
    return wire_of(transport)->inside->ops->reach(wire_of(transport)->inside, peer, memory);
}

static usp_status watch_inside(usp_transport *transport) {
    return wire_of(transport)->inside->ops->watch(wire_of(transport)->inside);
}

static void stop(usp_transport *transport, int milliseconds) {
    wire_of(transport)->inside->ops->stop(wire_of(transport)->inside, milliseconds);
}

/* Both, by way of the far one, whether the near one is in use just now or not. */
static void destroy(usp_transport *transport) {
    usp_trace *trace = wire_of(transport)->trace;
    if (wire_of(transport) == &trace->near) return;
    if (trace->watch.inside) transport->device->ops = trace->watch.inside;
    if (trace->near.inside != trace->far.inside) trace->near.inside->ops->destroy(trace->near.inside);
    trace->far.inside->ops->destroy(trace->far.inside);
    free(trace);
}

static void wrap(wire *w, usp_trace *trace, usp_transport *inside, const char *name) {
    *w = (wire){.transport = *inside, .inside = inside, .trace = trace};
    w->ops = (usp_transport_ops){.name = name,
                                 .reaches = inside->ops->reaches,
                                 .prepare = prepare,
                                 .exchange = exchange,
                                 .alloc_shared = alloc_shared,
                                 .register_shared = register_shared,
                                 .free_shared = free_shared,
                                 .reach = reach,
                                 .watch = watch_inside,
                                 .stop = stop,
                                 .destroy = destroy};
    w->transport.ops = &w->ops;
    w->transport.near = NULL;
}

usp_trace *usp_trace_insert(usp_world *world) {
    usp_transport *far = world->transport, *near = far->near;
    usp_trace *trace = calloc(1, sizeof *trace);
    if (!trace) return NULL;
    trace->world = world;
    wrap(&trace->far, trace, far, "far");
    wrap(&trace->near, trace, near ? near : far, "near");
    world->transport = &trace->far.transport;
    usp_trace_near(trace, near != NULL);
    return trace;
}

/* What passes for a near transport reaches more than the far one does. */
void usp_trace_near(usp_trace *trace, int on) {
    int passes = trace->near.inside == trace->far.inside;
    trace->far.transport.near = on ? &trace->near.transport : NULL;
    trace->far.ops.reaches = trace->far.inside->ops->reaches && !(on && passes);
}

/* The CPU has no streams: any address tells transfer streams from the caller's. */
void usp_trace_watch(usp_trace *trace, usp_world *world) {
    watch *w = &trace->watch;
    for (int lane = 0; lane < USP_LANES; lane++) world->transfer[lane] = (usp_stream)(void *)w;
    *w = (watch){.ops = *world->device->ops, .inside = world->device->ops, .trace = trace};
    w->ops.copy_rows = copy_rows;
    w->ops.linear_output = linear_output;
    w->ops.linear_apply = linear_apply;
    w->ops.event_wait = event_wait;
    world->device->ops = &w->ops;
}

usp_traffic usp_trace_take(usp_trace *trace) {
    usp_traffic traffic = trace->traffic;
    trace->traffic = (usp_traffic){0};
    return traffic;
}
