/* lines.h - one connection between every two ranks of a world. */
#ifndef USP_LINES_H
#define USP_LINES_H
#include "comm.h"

/* Collective over the bootstrap: connections[own rank] = -1; over loopback where all ranks are on one host. The same
 * verdict everywhere. */
usp_status usp_lines_connect(const usp_host *host, const usp_bootstrap *bootstrap, int timeout_ms, int *connections);

#endif
