/* probes.c - whether work that was enqueued is overdue. */
#include "probes.h"
#include "error.h"
#include "thread.h"

usp_status usp_probes_create(usp_device *device, usp_probes *probes) {
    for (int i = 0; i < USP_PROBES; i++) USP_TRY(device->ops->event_create(device, &probes->event[i]));
    return USP_OK;
}

void usp_probes_destroy(usp_device *device, usp_probes *probes) {
    for (int i = 0; i < USP_PROBES; i++) device->ops->event_destroy(device, probes->event[i]);
}

usp_status usp_probes_query(usp_device *device, usp_probes *probes, int timeout_ms, int *late) {
    int busy = 0;
    *late = 0;
    while (probes->passed < probes->set) {
        USP_TRY(device->ops->event_query(device, probes->event[probes->passed % USP_PROBES], &busy));
        if (busy) break;
        probes->passed++;
        probes->waiting_since = usp_now_ms();
    }
    *late = busy && timeout_ms >= 0 && usp_now_ms() - probes->waiting_since > timeout_ms;
    return USP_OK;
}

/* Where all are in use the last one moves on: it always is behind all exchanges. */
usp_status usp_probes_record(usp_device *device, usp_probes *probes, usp_stream stream) {
    int late = 0;
    USP_TRY(usp_probes_query(device, probes, -1, &late));
    if (probes->set == probes->passed) probes->waiting_since = usp_now_ms();
    if (probes->set - probes->passed < USP_PROBES) probes->set++;
    return device->ops->event_record(device, probes->event[(probes->set - 1) % USP_PROBES], stream);
}
