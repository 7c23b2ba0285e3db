/* interrupt.h - what a program still does when SIGINT, SIGTERM or SIGHUP ends it.
 * A thread waits for the signals, so that the work may take locks and write files. */
#ifndef USP_INTERRUPT_H
#define USP_INTERRUPT_H
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>

typedef struct usp_interrupt {
    pthread_t thread;
    sigset_t signals; /* those of the three that are not ignored */
    sigset_t before;  /* the program's mask */
    void (*end)(int signal, void *user);
    void *user;
    int open;
    atomic_int closing; /* the next queued signal is only to wake the thread */
} usp_interrupt;

/* Before any other thread is started: from now on the three signals call `end` and then end the process. Where no
 * thread can be had they end it at once, as ever. */
void usp_interrupt_open(usp_interrupt *interrupt, void (*end)(int signal, void *user), void *user);
void usp_interrupt_close(usp_interrupt *interrupt);

#endif
