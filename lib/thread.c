/* thread.c - threads that the library starts in the program's process. */
#define _POSIX_C_SOURCE 200809L
#include "thread.h"
#include <signal.h>

int usp_thread_start(pthread_t *thread, void *(*body)(void *), void *argument) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int reason = pthread_create(thread, NULL, body, argument);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return reason;
}
