/* verdict.h - the first failure of a communicator with its sentence, kept for good and said again in any thread. It
 * tells no other rank: that is the control channel's. */
#ifndef USP_VERDICT_H
#define USP_VERDICT_H
#include "usp.h"
#include <pthread.h>
#include <stdatomic.h>

typedef struct usp_verdict {
    pthread_mutex_t mutex; /* of the one write of `sentence` */
    atomic_int status;
    char sentence[256];
} usp_verdict;

void usp_verdict_init(usp_verdict *verdict);
void usp_verdict_destroy(usp_verdict *verdict);
/* The communicator has failed by `status` for the reason in usp_last_error(). Later failures change nothing. */
void usp_verdict_set(usp_verdict *verdict, usp_status status);
/* OK, or the failure, its sentence recorded for usp_last_error(). Never waits. */
usp_status usp_verdict_get(usp_verdict *verdict);

#endif
