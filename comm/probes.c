/* probes.c - whether work that was enqueued is overdue. */
#include "probes.h"
#include "error.h"
#include "thread.h"

usp_status usp_probes_create(usp_device *device, usp_probes *probes) {
    for (int i = 0; i < USP_LANES * USP_PROBES; i++)
        USP_TRY(device->ops->event_create(device, &probes->lane[i / USP_PROBES].event[i % USP_PROBES]));
    return USP_OK;
}

void usp_probes_destroy(usp_device *device, usp_probes *probes) {
    for (int i = 0; i < USP_LANES * USP_PROBES; i++)
        device->ops->event_destroy(device, probes->lane[i / USP_PROBES].event[i % USP_PROBES]);
}

/* Lets go of those that have passed. */
static usp_status pass(usp_device *device, usp_probe_line *line) {
    for (int busy = 0; line->passed < line->set;) {
        USP_TRY(device->ops->event_query(device, line->event[line->passed % USP_PROBES], &busy));
        if (busy) break;
        line->passed++;
        line->waiting_since = usp_now_ms();
    }
    return USP_OK;
}

usp_status usp_probes_query(usp_device *device, usp_probes *probes, int timeout_ms, int *busy, int *late) {
    *busy = *late = 0;
    for (int lane = 0; lane < USP_LANES; lane++) {
        usp_probe_line *line = &probes->lane[lane];
        USP_TRY(pass(device, line));
        if (line->passed == line->set) continue;
        *busy = 1;
        *late |= timeout_ms >= 0 && usp_now_ms() - line->waiting_since > timeout_ms;
    }
    return USP_OK;
}

/* Where all are in use the last one moves on: it always is behind all exchanges of the lane. */
usp_status usp_probes_record(usp_device *device, usp_probes *probes, int lane, usp_stream stream) {
    usp_probe_line *line = &probes->lane[lane];
    USP_TRY(pass(device, line));
    if (line->set == line->passed) line->waiting_since = usp_now_ms();
    if (line->set - line->passed < USP_PROBES) line->set++;
    return device->ops->event_record(device, line->event[(line->set - 1) % USP_PROBES], stream);
}
