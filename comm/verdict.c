/* verdict.c - keeps the first failure of a communicator: written once under a mutex, read without one. It knows no
 * communicator. */
#include "verdict.h"
#include "error.h"
#include <stdio.h>

void usp_verdict_init(usp_verdict *verdict)
{
    pthread_mutex_init(&verdict->mutex, NULL);
    atomic_init(&verdict->status, USP_OK);
    verdict->sentence[0] = 0;
}

void usp_verdict_destroy(usp_verdict *verdict)
{
    pthread_mutex_destroy(&verdict->mutex);
}

void usp_verdict_set(usp_verdict *verdict, usp_status status)
{
    pthread_mutex_lock(&verdict->mutex);
    if (atomic_load(&verdict->status) == USP_OK) {
        snprintf(verdict->sentence, sizeof verdict->sentence, "%s", usp_last_error());
        atomic_store(&verdict->status, (int)status);
    }
    pthread_mutex_unlock(&verdict->mutex);
}

usp_status usp_verdict_get(usp_verdict *verdict)
{
    usp_status status = (usp_status)atomic_load(&verdict->status);
    return status == USP_OK ? USP_OK : usp_fail(status, "%s", verdict->sentence);
}
