/* transport.c - a control and the transports of the same ranks, used together; and the entries of a transport that has
 * nothing to do for them. */
#include "transport.h"
#include "error.h"

enum { STOP_MS = 5000 }; /* longest wait for a transport that is aborted */

/* ---- together ---------------------------------------------------------------------------------------------------- */

/* Both, before any is waited for. */
static void stop(usp_transport *transport, int milliseconds) {
    if (transport->near) transport->near->ops->stop(transport->near, 0);
    transport->ops->stop(transport, milliseconds);
    if (transport->near && milliseconds > 0) transport->near->ops->stop(transport->near, milliseconds);
}

/* What has failed is to let go of the device. The failure is said last, whatever was said meanwhile. */
static usp_status judge(usp_transport *transport, usp_status status, int milliseconds) {
    if (status == USP_OK) return USP_OK;
    stop(transport, milliseconds);
    usp_status said = transport->control->ops->poll(transport->control);
    return said != USP_OK ? said : status;
}

usp_status usp_transport_poll(usp_transport *transport) {
    usp_status status = transport->control->ops->poll(transport->control);
    if (status == USP_OK) status = transport->ops->watch(transport);
    if (status == USP_OK && transport->near) status = transport->near->ops->watch(transport->near);
    return judge(transport, status, 0);
}

usp_status usp_transport_allgather(usp_transport *transport, const void *mine, void *all, size_t bytes_per_rank) {
    usp_control *control = transport->control;
    return judge(transport, control->ops->allgather(control, mine, all, bytes_per_rank), 0);
}

usp_status usp_transport_fail(usp_transport *transport, usp_status status) {
    return judge(transport, transport->control->ops->fail(transport->control, status), 0);
}

usp_status usp_transport_overdue(usp_transport *transport) {
    return judge(transport, transport->control->ops->overdue(transport->control), STOP_MS);
}

void usp_transport_abort(usp_transport *transport) {
    transport->control->ops->abort(transport->control);
    stop(transport, STOP_MS);
}

void usp_transport_end(usp_transport *transport) {
    if (!transport) return;
    usp_control *control = transport->control;
    if (transport->near) transport->near->ops->destroy(transport->near);
    transport->near = NULL;
    transport->ops->destroy(transport);
    if (control) control->ops->destroy(control);
}

/* ---- plain entries ----------------------------------------------------------------------------------------------- */

usp_status usp_plain_prepare(usp_transport *transport, int64_t messages, size_t bytes) {
    (void)transport, (void)messages, (void)bytes;
    return USP_OK;
}

usp_status usp_plain_alloc_shared(usp_transport *transport, size_t bytes, void **memory) {
    return transport->device->ops->alloc(transport->device, bytes, memory);
}

usp_status usp_plain_register_shared(usp_transport *transport, void *memory) {
    (void)transport, (void)memory;
    return USP_OK;
}

usp_status usp_plain_free_shared(usp_transport *transport, void *memory) {
    transport->device->ops->free(transport->device, memory);
    return USP_OK;
}

void *usp_plain_reach(usp_transport *transport, int peer, const void *memory) {
    (void)transport, (void)peer, (void)memory;
    return NULL;
}

usp_status usp_plain_watch(usp_transport *transport) {
    (void)transport;
    return USP_OK;
}

void usp_plain_stop(usp_transport *transport, int milliseconds) {
    (void)transport, (void)milliseconds;
}
