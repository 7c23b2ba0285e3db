/* check_race.c - worlds of up to 8 thread-ranks with mixed layers, several worlds at once, watchdogs and threads that
 * poll: for ThreadSanitizer. A plain program; results are compared with the oracle too. */
#include "bodies.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

enum { SECONDS = 300, WORLDS = 3 };

static const usp_case cases[] = {
    {.tokens = 61, .mask = USP_MASK_CAUSAL, .heads = 8, .kv_heads = 2, .return_lse = 1},
    {.attention = USP_LINEAR, .tokens = 61, .mask = USP_MASK_CAUSAL, .decay = 1, .initial_state = 1, .final_state = 1},
    {.attention = USP_LINEAR,
     .tokens = 61,
     .mask = USP_MASK_CAUSAL,
     .decay = 1,
     .recompute_state = 1,
     .state_exchange = USP_STATE_CHAIN},
    {.tokens = 7, .layout = USP_LAYOUT_STRIPE, .dtype = USP_BF16},
};
static const usp_table table = {"race", USP_SOFTMAX, cases, sizeof cases / sizeof cases[0]};

/* A thread of the program that polls a world while its rank works. */
typedef struct poller {
    usp_world *world;
    atomic_int stop;
    int polls;
} poller;

static void *poll_world(void *argument) {
    poller *p = argument;
    while (!atomic_load(&p->stop)) p->polls += usp_world_poll(p->world) == USP_OK;
    return NULL;
}

static int polled_table(usp_rank *rank, void *argument) {
    pthread_t thread;
    poller p = {.world = rank->world};
    if (rank->rank == 0) pthread_create(&thread, NULL, poll_world, &p);
    int failed = usp_body_table(rank, argument);
    atomic_store(&p.stop, 1);
    if (rank->rank == 0) pthread_join(thread, NULL);
    return failed;
}

static int report(const char *name, int failed, const usp_report *r) {
    if (failed || r->done == 0) fprintf(stderr, "%s: %d failures, %d done\n%s", name, r->failures, r->done, r->text);
    return failed || r->done == 0;
}

static int run_tables(int size, int watchdog) {
    usp_references references = {0};
    usp_table_run run = {.table = &table, .references = &references};
    const usp_ranks ranks = {.size = size, .seconds = SECONDS, .watchdog = watchdog};
    usp_report r;
    int failed = report("table", usp_ranks_run(&ranks, polled_table, &run, &r), &r);
    usp_references_free(&references);
    return failed;
}

static int run_body(usp_body body, int size) {
    const usp_ranks ranks = {.size = size, .seconds = SECONDS, .watchdog = 1};
    usp_report r;
    return report("body", usp_ranks_run(&ranks, body, NULL, &r), &r);
}

static void *one_world(void *argument) {
    int *failed = argument;
    *failed = run_tables(2, 1) + run_tables(3, 0) + run_body(usp_body_switch, 2);
    return NULL;
}

static int worlds_at_once(void) {
    pthread_t threads[WORLDS];
    int failed[WORLDS] = {0}, all = 0;
    for (int i = 0; i < WORLDS; i++)
        if (pthread_create(&threads[i], NULL, one_world, &failed[i]) != 0) abort();
    for (int i = 0; i < WORLDS; i++) {
        pthread_join(threads[i], NULL);
        all += failed[i];
    }
    return all;
}

int main(void) {
    int failed = run_tables(8, 1) + run_body(usp_body_repeats, 4) + run_body(usp_body_switch, 8) + worlds_at_once();
    printf("check_race: %s\n", failed ? "FAILED" : "ok");
    return failed != 0;
}
