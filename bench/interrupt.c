/* interrupt.c - takes the signals by sigwaitinfo, and gives them back to the process with their own action.
 * A program that was told to ignore them, in the background of a shell, goes on ignoring them. */
#include "interrupt.h"
#include <stddef.h>

static void *wait_for_signal(void *argument) {
    usp_interrupt *interrupt = argument;
    siginfo_t signal_info;
    int number = sigwaitinfo(&interrupt->signals, &signal_info);
    if (number < 0 || (signal_info.si_code == SI_QUEUE && atomic_load(&interrupt->closing))) return NULL;
    interrupt->end(number, interrupt->user);
    signal(number, SIG_DFL);
    pthread_sigmask(SIG_UNBLOCK, &interrupt->signals, NULL);
    raise(number);
    return NULL;
}

/* How many of the three there are to wait for. */
static int choose_signals(sigset_t *signals) {
    const int wanted[] = {SIGINT, SIGTERM, SIGHUP};
    struct sigaction action;
    int chosen = 0;
    sigemptyset(signals);
    for (int i = 0; i < 3; i++)
        if (sigaction(wanted[i], NULL, &action) == 0 && action.sa_handler != SIG_IGN)
            chosen += sigaddset(signals, wanted[i]) == 0;
    return chosen;
}

void usp_interrupt_open(usp_interrupt *interrupt, void (*end)(int signal, void *user), void *user) {
    *interrupt = (usp_interrupt){.end = end, .user = user};
    signal(SIGPIPE, SIG_IGN); /* a reader that has gone is an error of a write */
    if (!choose_signals(&interrupt->signals)) return;
    pthread_sigmask(SIG_BLOCK, &interrupt->signals, &interrupt->before);
    interrupt->open = pthread_create(&interrupt->thread, NULL, wait_for_signal, interrupt) == 0;
    if (!interrupt->open) pthread_sigmask(SIG_SETMASK, &interrupt->before, NULL);
}

void usp_interrupt_close(usp_interrupt *interrupt) {
    if (!interrupt->open) return;
    atomic_store(&interrupt->closing, 1);
    int number = sigismember(&interrupt->signals, SIGTERM)  ? SIGTERM
                 : sigismember(&interrupt->signals, SIGINT) ? SIGINT
                                                            : SIGHUP;
    pthread_sigqueue(interrupt->thread, number, (union sigval){.sival_int = 0});
    pthread_join(interrupt->thread, NULL);
    pthread_sigmask(SIG_SETMASK, &interrupt->before, NULL);
}
