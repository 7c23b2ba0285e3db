/* probes.h - whether work that was enqueued is overdue: events behind exchanges of a lane, of which the oldest that has
 * not passed tells. The caller lets one thread at a time in. */
#ifndef USP_PROBES_H
#define USP_PROBES_H
#include "transport.h"

enum { USP_PROBES = 64 };

/* Of one lane. */
typedef struct usp_probe_line {
    usp_event *event[USP_PROBES]; /* number n in event[n % USP_PROBES] */
    uint64_t set, passed;         /* those between the two are not known to be done */
    int64_t waiting_since;        /* when the oldest of them became the oldest */
} usp_probe_line;

typedef struct usp_probes {
    usp_probe_line lane[USP_LANES];
} usp_probes;

usp_status usp_probes_create(usp_device *device, usp_probes *probes); /* what failed half is destroy's */
void usp_probes_destroy(usp_device *device, usp_probes *probes);
/* Behind what the lane's stream has now, which no graph captures. */
usp_status usp_probes_record(usp_device *device, usp_probes *probes, int lane, usp_stream stream);
/* *busy: not all is known to be done. *late: on some lane no exchange has ended for timeout_ms (-1: no limit), though
 * some are in flight. */
usp_status usp_probes_query(usp_device *device, usp_probes *probes, int timeout_ms, int *busy, int *late);

#endif
