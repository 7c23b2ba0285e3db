/* thread.c - the library's own threads, and how any of its threads waits. */
#define _POSIX_C_SOURCE 200809L
#include "thread.h"
#include <sched.h>
#include <signal.h>
#include <time.h>

int usp_thread_start(pthread_t *thread, void *(*body)(void *), void *argument) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int reason = pthread_create(thread, NULL, body, argument);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return reason;
}

int64_t usp_now_ms(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

void usp_pause(int round) {
    const struct timespec nap = {.tv_nsec = round < 2000 ? 20000 : 50000};
    if (round < 500)
        sched_yield();
    else
        nanosleep(&nap, NULL);
}
