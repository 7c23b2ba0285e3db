/* trace.c - the counting transport and the device beside it (see trace.h): every entry goes to the one inside. */
#include "trace.h"
#include "world.h"

#include <stdlib.h>
#include <string.h>

/* The device's table while its calls are written down. */
typedef struct watch {
    usp_device_ops ops; /* first: what the device points to */
    const usp_device_ops *inside;
    usp_trace *trace;
    usp_stream transfer;
} watch;

struct usp_trace {
    usp_transport transport; /* first: a trace is a transport */
    usp_transport_ops ops;
    usp_transport *inside;
    usp_traffic traffic;
    watch watch;
    int exchanging; /* inside the transport, whose own waits and copies are not the layer's */
    int64_t messages;
    size_t bytes; /* announced */
};

static usp_trace *trace_of(usp_transport *transport) {
    return (usp_trace *)transport;
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
    int transfer = stream == ((const watch *)device->ops)->transfer;
    return inside(device, transfer ? 'F' : 'W')->event_wait(device, event, stream);
}

/* ---- the transport ----------------------------------------------------------------------------------------------- */

static usp_status prepare(usp_transport *transport, int64_t messages, size_t bytes) {
    trace_of(transport)->messages = messages;
    trace_of(transport)->bytes = bytes;
    return trace_of(transport)->inside->ops->prepare(trace_of(transport)->inside, messages, bytes);
}

static usp_status exchange(usp_transport *transport, const usp_message *sends, int send_count, const usp_message *recvs,
                           int recv_count, usp_stream stream) {
    usp_trace *trace = trace_of(transport);
    size_t bytes = 0;
    note(trace, 'X');
    for (int i = 0; i < send_count; bytes += usp_message_bytes(&sends[i++]))
        trace->traffic.sent[sends[i].peer] += (int64_t)usp_message_bytes(&sends[i]);
    for (int i = 0; i < recv_count; bytes += usp_message_bytes(&recvs[i++]))
        trace->traffic.received[recvs[i].peer] += (int64_t)usp_message_bytes(&recvs[i]);
    trace->traffic.unprepared += send_count + recv_count > trace->messages || bytes > trace->bytes;
    trace->exchanging = 1;
    usp_status status = trace->inside->ops->exchange(trace->inside, sends, send_count, recvs, recv_count, stream);
    trace->exchanging = 0;
    return status;
}

static usp_status alloc_shared(usp_transport *transport, size_t bytes, void **memory) {
    return trace_of(transport)->inside->ops->alloc_shared(trace_of(transport)->inside, bytes, memory);
}

static usp_status register_shared(usp_transport *transport, void *memory) {
    return trace_of(transport)->inside->ops->register_shared(trace_of(transport)->inside, memory);
}

static usp_status free_shared(usp_transport *transport, void *memory) {
    return trace_of(transport)->inside->ops->free_shared(trace_of(transport)->inside, memory);
}

static void *reach(usp_transport *transport, int peer, const void *memory) {
    return trace_of(transport)->inside->ops->reach(trace_of(transport)->inside, peer, memory);
}

static usp_status watch_inside(usp_transport *transport) {
    return trace_of(transport)->inside->ops->watch(trace_of(transport)->inside);
}

static void stop(usp_transport *transport, int milliseconds) {
    trace_of(transport)->inside->ops->stop(trace_of(transport)->inside, milliseconds);
}

static void destroy(usp_transport *transport) {
    if (trace_of(transport)->watch.inside) transport->device->ops = trace_of(transport)->watch.inside;
    trace_of(transport)->inside->ops->destroy(trace_of(transport)->inside);
    free(trace_of(transport));
}

static const usp_transport_ops ops = {.name = "trace",
                                      .prepare = prepare,
                                      .exchange = exchange,
                                      .alloc_shared = alloc_shared,
                                      .register_shared = register_shared,
                                      .free_shared = free_shared,
                                      .reach = reach,
                                      .watch = watch_inside,
                                      .stop = stop,
                                      .destroy = destroy};

usp_trace *usp_trace_insert(usp_world *world) {
    usp_trace *trace = calloc(1, sizeof *trace);
    if (!trace) return NULL;
    trace->inside = world->transport;
    trace->transport = *world->transport;
    trace->ops = ops;
    trace->ops.reaches = trace->inside->ops->reaches;
    trace->transport.ops = &trace->ops;
    world->transport = &trace->transport;
    return trace;
}

/* The CPU has no streams: any address tells the transfer stream from the caller's. */
void usp_trace_watch(usp_trace *trace, usp_world *world) {
    watch *w = &trace->watch;
    if (!world->transfer) world->transfer = (usp_stream)(void *)w;
    *w = (watch){.ops = *world->device->ops, .inside = world->device->ops, .trace = trace, .transfer = world->transfer};
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
