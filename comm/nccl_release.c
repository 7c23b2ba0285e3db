/* nccl_release.c - how NCCL is made to give a communicator back, in peace or by force, though it may never return. */
#define _GNU_SOURCE
#include "nccl_state.h"
#include "thread.h"

enum {
    LOCK_MS = 1000,    /* longest wait for a call of another thread that should return at once */
    REVOKE_MS = 2000,  /* longest wait for work in flight to stop */
    RELEASE_MS = 5000, /* longest wait for NCCL to give a communicator back, twice: in peace, then by abort */
};

/* A negative limit means: until the release is forced. */
static ncclResult_t await_call(usp_release *release, ncclResult_t result, int milliseconds) {
    int64_t begin = usp_now_ms();
    for (int round = 0; result == ncclInProgress; round++) {
        if (milliseconds >= 0 ? usp_now_ms() - begin > milliseconds : atomic_load(&release->forced)) break;
        usp_pause(round);
        ncclResult_t query = ncclCommGetAsyncError(release->comm, &result);
        if (query != ncclSuccess) return query;
    }
    return result;
}

/* Not in every NCCL that serves, nor in its header. */
extern ncclResult_t ncclCommRevoke(ncclComm_t comm, int flags) __attribute__((weak));

/* Stops what is in flight where this NCCL can (2.28.7 on). Not while a call is in progress: abort alone is for that. */
static void revoke(usp_release *release) {
    ncclResult_t state = ncclInProgress;
    if (ncclCommRevoke == NULL || ncclCommGetAsyncError(release->comm, &state) != ncclSuccess) return;
    if (state == ncclInProgress) return;
    ncclResult_t result = await_call(release, ncclCommRevoke(release->comm, 0), REVOKE_MS);
    atomic_store(&release->revoked, result == ncclSuccess);
}

static void *release_main(void *argument) {
    usp_release *release = argument;
    int flushed = 0;
    if (atomic_load(&release->forced))
        revoke(release);
    else
        flushed = await_call(release, ncclCommFinalize(release->comm), -1) == ncclSuccess;
    if (flushed)
        ncclCommDestroy(release->comm);
    else
        ncclCommAbort(release->comm);
    atomic_store(&release->stage, RELEASE_DONE);
    return NULL;
}

void usp_nccl_run_release(usp_release *release, ncclComm_t comm, int forced) {
    release->comm = comm;
    atomic_store(&release->forced, forced);
    atomic_store(&release->stage, RELEASE_RUNNING);
    if (usp_thread_start(&release->thread, release_main, release) != 0) atomic_store(&release->stage, RELEASE_STUCK);
}

int usp_nccl_await_release(usp_release *release, int milliseconds) {
    int64_t begin = usp_now_ms();
    for (int round = 0; atomic_load(&release->stage) == RELEASE_RUNNING; round++) {
        if (usp_now_ms() - begin > milliseconds) return 0;
        usp_pause(round);
    }
    return atomic_load(&release->stage) == RELEASE_DONE;
}

int usp_nccl_finish_release(const usp_host *host, usp_release *release) {
    int done = usp_nccl_await_release(release, RELEASE_MS);
    if (!done && !atomic_exchange(&release->forced, 1)) done = usp_nccl_await_release(release, RELEASE_MS);
    if (!done) {
        if (atomic_load(&release->stage) != RELEASE_STUCK) pthread_detach(release->thread);
        usp_host_log(host, 1, "NCCL did not free a communicator in %d ms: it is left behind", RELEASE_MS);
        return 0;
    }
    if (release->comm != NULL) pthread_join(release->thread, NULL);
    usp_host_free(host, release);
    return 1;
}

void usp_nccl_start_release(usp_nccl *self, int forced) {
    int none = RELEASE_NONE;
    if (atomic_load(&self->release->stage) != RELEASE_NONE) return;
    if (!usp_nccl_lock_within(self, LOCK_MS)) {
        atomic_compare_exchange_strong(&self->release->stage, &none, RELEASE_STUCK);
        return;
    }
    if (self->comm != NULL) {
        usp_nccl_run_release(self->release, self->comm, forced);
        self->comm = NULL;
    }
    atomic_compare_exchange_strong(&self->release->stage, &none, RELEASE_DONE); /* there was no communicator */
    pthread_mutex_unlock(&self->lock);
}
