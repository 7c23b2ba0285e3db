/* launcher.h - what the launcher of this process tells it through its environment. */
#ifndef USP_LAUNCHER_H
#define USP_LAUNCHER_H
#include "usp.h"

/* One process among those of its job. */
typedef struct usp_placement {
    const char *launcher; /* "none" for a process alone */
    int rank, size, local_rank;
    int here;          /* all ranks are known to be on this host */
    char address[256]; /* where rank 0 listens, without brackets; "" for a process alone */
    int port;
    int port_taken; /* the launcher itself listens on `port`: begin at the next one */
    char job[256];  /* keeps jobs apart */
} usp_placement;

/* The launcher that started the process, before the one that made the allocation: torchrun and usp_launch, Open MPI,
 * PMI, SLURM; none: rank 0 of 1. INVALID names the variable, or two launchers that contradict each other. */
usp_status usp_launcher_read(usp_placement *placement);

#endif
