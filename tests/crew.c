/* crew.c - ranks that a test program starts itself. */
#define _GNU_SOURCE
#include "crew.h"
#include "port.h"

#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

extern char **environ;

/* ---- threads ----------------------------------------------------------------------------------------------------- */

typedef struct usp_crew {
    pthread_barrier_t barrier;
    void (*main)(usp_hand *);
    const void *given[USP_CREW_MOST];
} usp_crew;

usp_status usp_crew_gather(void *user, const void *mine, void *all, size_t bytes_per_rank) {
    usp_hand *hand = user;
    usp_crew *crew = hand->crew;
    crew->given[hand->rank] = mine;
    pthread_barrier_wait(&crew->barrier);
    for (int i = 0; i < hand->size; i++)
        memcpy((char *)all + (size_t)i * bytes_per_rank, crew->given[i], bytes_per_rank);
    pthread_barrier_wait(&crew->barrier);
    return USP_OK;
}

static void *run_hand(void *argument) {
    usp_hand *hand = argument;
    hand->crew->main(hand);
    return NULL;
}

int usp_crew_threads(int size, void (*main)(usp_hand *)) {
    usp_crew crew = {.main = main};
    usp_hand hands[USP_CREW_MOST];
    int failed = 0;
    pthread_barrier_init(&crew.barrier, NULL, (unsigned)size);
    for (int i = 0; i < size; i++) {
        hands[i] = (usp_hand){.crew = &crew, .rank = i, .size = size};
        if (pthread_create(&hands[i].thread, NULL, run_hand, &hands[i]) != 0) abort();
    }
    for (int i = 0; i < size; i++) {
        pthread_join(hands[i].thread, NULL);
        failed += hands[i].failed != 0;
    }
    pthread_barrier_destroy(&crew.barrier);
    return failed;
}

/* ---- processes --------------------------------------------------------------------------------------------------- */

static void set_number(const char *name, int number) {
    char text[16];
    snprintf(text, sizeof text, "%d", number);
    setenv(name, text, 1);
}

void usp_crew_processes(int size, const char *option, pid_t *ranks) {
    char self[] = "rank", text[32] = "";
    char *arguments[] = {self, option ? text : NULL, NULL};
    if (option) snprintf(text, sizeof text, "%s", option);
    setenv("MASTER_ADDR", "127.0.0.1", 1);
    set_number("MASTER_PORT", usp_free_port());
    set_number("WORLD_SIZE", size);
    set_number("LOCAL_WORLD_SIZE", size);
    for (int i = 0; i < size; i++) {
        set_number("RANK", i);
        set_number("LOCAL_RANK", i);
        if (posix_spawn(&ranks[i], "/proc/self/exe", NULL, NULL, arguments, environ) != 0) ranks[i] = -1;
    }
}
