/* environment.h - a first meeting, over TCP, of the ranks that a launcher has started. */
#ifndef USP_ENVIRONMENT_H
#define USP_ENVIRONMENT_H
#include "transport.h"
#include "door.h"

typedef struct usp_environment usp_environment;

/* Collective. Rank 0 listens at the address that the launcher announces, the others call it; TIMEOUT names the ranks
 * that did not come, MISMATCH two ranks that do not agree on the size, INVALID a rank that came twice. */
usp_status usp_environment_open(const usp_host *host, int timeout_ms, usp_environment **environment);
/* Valid until close. Each gather takes at most the time limit. Its secret is the job's key; near is this rank's own
 * address on the way to rank 0, or that of USP_INTERFACE. */
usp_bootstrap usp_environment_bootstrap(usp_environment *environment);
int usp_environment_local_rank(const usp_environment *environment);
void usp_environment_close(usp_environment *environment); /* NULL is fine */

#endif
