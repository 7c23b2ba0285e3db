/* environment.h - what a launcher tells a process through its environment, and a first meeting of ranks over TCP. */
#ifndef USP_ENVIRONMENT_H
#define USP_ENVIRONMENT_H
#include "comm.h"

typedef struct usp_environment usp_environment;

/* One process among those of its job. */
typedef struct usp_placement {
    const char *launcher; /* "none" for a process alone */
    int rank, size, local_rank;
    char address[256]; /* where rank 0 listens; "" for a process alone */
    int port;
    int port_taken; /* the launcher itself listens on `port`: begin at the next one */
    char job[128];  /* keeps jobs apart */
} usp_placement;

/* torchrun and usp_launch, Open MPI, SLURM, PMI, in this order; none: rank 0 of 1. INVALID names the variable. */
usp_status usp_environment_read(usp_placement *placement);

/* Collective. Rank 0 listens at the address, the others call it; TIMEOUT names the ranks that did not come. */
usp_status usp_environment_open(const usp_host *host, int timeout_ms, usp_environment **environment);
/* Valid until close. Each gather takes at most the time limit. */
usp_bootstrap usp_environment_bootstrap(usp_environment *environment);
int usp_environment_local_rank(const usp_environment *environment);
void usp_environment_close(usp_environment *environment); /* NULL is fine */

#endif
