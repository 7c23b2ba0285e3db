/* ranks.c - worlds of thread-ranks or processes for tests (see ranks.h). Never leaves a caller waiting: a run that is
 * late is aborted, and given up if that does not end it. */
#define _GNU_SOURCE
#include "ranks.h"

#include <errno.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { DEFAULT_SECONDS = 60, GRACE_SECONDS = 5, GUARD_BYTES = 1 << 20 };
#ifdef __SANITIZE_THREAD__
enum { SLOWER = 4 }; /* as tests/run.sh tells Meson of this build */
#else
enum { SLOWER = 1 };
#endif

struct usp_run {
    usp_ranks how;
    usp_body body;
    void *argument;
    usp_rendezvous *rendezvous;
    usp_unique_id id;
    pthread_mutex_t lock;
    pthread_cond_t ended;
    int running;
    usp_report report;
    pthread_t *thread; /* [how.size] */
    usp_heap *heap;    /* [how.size] */
    usp_rank rank[];   /* [how.size] */
};

/* ---- what ranks say ---------------------------------------------------------------------------------------------- */

static void append(usp_report *report, int rank, const char *format, va_list arguments) {
    size_t used = strlen(report->text), room = sizeof report->text - used;
    if (room < 200) return;
    int head = snprintf(report->text + used, room, "rank %d: ", rank);
    vsnprintf(report->text + used + head, room - (size_t)head - 1, format, arguments);
    strcat(report->text, "\n");
}

int usp_say(usp_rank *rank, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    pthread_mutex_lock(&rank->run->lock);
    rank->run->report.failures++;
    append(&rank->run->report, rank->rank, format, arguments);
    pthread_mutex_unlock(&rank->run->lock);
    va_end(arguments);
    return 1;
}

void usp_count(usp_rank *rank) {
    pthread_mutex_lock(&rank->run->lock);
    rank->run->report.done++;
    pthread_mutex_unlock(&rank->run->lock);
}

void usp_refuse(usp_rank *rank, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    pthread_mutex_lock(&rank->run->lock);
    if (rank->run->report.refused++ == 0) {
        fputs("refused: ", stderr);
        vfprintf(stderr, format, arguments);
        fputc('\n', stderr);
    }
    pthread_mutex_unlock(&rank->run->lock);
    va_end(arguments);
}

/* ---- one rank ---------------------------------------------------------------------------------------------------- */

/* A process knows its rank from its launcher, if at all. */
static int node_of(const usp_run *run, int rank) {
    const char *launched = getenv("RANK");
    if (run->how.host == 0 || (run->how.kind == USP_RANKS_PROCESS && !launched)) return 0;
    return 1 + (run->how.kind == USP_RANKS_PROCESS ? atoi(launched) : rank) / run->how.host;
}

static usp_status create_world(usp_run *run, int rank, usp_world **world) {
    int gpu = run->how.kind == USP_RANKS_NCCL ? rank : 0, seconds = run->how.seconds;
    usp_world_config config = {.struct_size = sizeof config, .device = run->how.device, .timeout_ms = seconds * 500};
    config.watchdog = run->how.watchdog;
    config.transport = run->how.transport;
    config.node = node_of(run, rank);
    if (run->how.timeout_ms) config.timeout_ms = run->how.timeout_ms;
    usp_heap_configure(run->rank[rank].heap, &config);
    if (run->how.kind == USP_RANKS_PROCESS)
        return run->how.create ? run->how.create(&config, world) : usp_world_create_env(&config, world);
    usp_status status = usp_device_select(run->how.device, gpu);
    if (status != USP_OK) return status;
    if (run->how.kind == USP_RANKS_NCCL) return usp_world_create_nccl_id(&config, &run->id, run->how.size, rank, world);
    return usp_world_create_threads(&config, run->rendezvous, rank, world);
}

static usp_status begin_rank(usp_run *run, usp_rank *rank) {
    usp_world *world = NULL;
    usp_status status = create_world(run, rank->rank, &world);
    if (status != USP_OK) return status;
    usp_world_info info = {.struct_size = sizeof info};
    status = usp_world_get_info(world, &info);
    rank->rank = info.rank;
    rank->size = info.size;
    rank->device = info.device;
    pthread_mutex_lock(&run->lock);
    rank->world = world;
    pthread_mutex_unlock(&run->lock);
    if (status == USP_OK && run->how.stream_create) status = run->how.stream_create(&rank->stream);
    return status;
}

static void end_rank(usp_run *run, usp_rank *rank) {
    pthread_mutex_lock(&run->lock);
    usp_world *world = rank->world;
    rank->world = NULL;
    pthread_mutex_unlock(&run->lock);
    if (rank->stream && run->how.stream_destroy) run->how.stream_destroy(rank->stream);
    usp_world_destroy(world);
}

/* A body that failed may leave objects behind; else all memory has come back. */
static void run_rank(usp_run *run, usp_rank *rank) {
    int failed = begin_rank(run, rank) != USP_OK;
    if (failed)
        usp_say(rank, "world: %s", usp_last_error());
    else
        failed = run->body(rank, run->argument);
    if (failed) usp_world_abort(rank->world);
    end_rank(run, rank);
    int live = atomic_load(&rank->heap->live);
    if (!failed && live != 0) usp_say(rank, "%d allocations are left behind", live);
}

static void *rank_thread(void *argument) {
    usp_rank *rank = argument;
    usp_run *run = rank->run;
    run_rank(run, rank);
    pthread_mutex_lock(&run->lock);
    run->running--;
    pthread_cond_signal(&run->ended);
    pthread_mutex_unlock(&run->lock);
    return NULL;
}

/* ---- all ranks --------------------------------------------------------------------------------------------------- */

/* 1 if all ranks have ended within `seconds`. The lock is held. */
static int wait_for_ranks(usp_run *run, int seconds) {
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += seconds;
    while (run->running > 0)
        if (pthread_cond_timedwait(&run->ended, &run->lock, &until) == ETIMEDOUT) return run->running == 0;
    return 1;
}

static int wait_or_abort(usp_run *run) {
    pthread_mutex_lock(&run->lock);
    int in_time = wait_for_ranks(run, run->how.seconds);
    for (int i = 0; !in_time && i < run->how.size; i++) usp_world_abort(run->rank[i].world);
    int ended = in_time || wait_for_ranks(run, GRACE_SECONDS);
    pthread_mutex_unlock(&run->lock);
    if (!in_time)
        usp_say(&run->rank[0], "the ranks did not end within %d s%s", run->how.seconds,
                ended ? "" : ", nor after being aborted");
    return ended;
}

/* The guard is longer than any frame, so that one that leaves the stack ends there. */
static int start_rank(usp_run *run, int rank) {
    size_t stack = (size_t)run->how.stack << 10;
    pthread_attr_t attributes;
    if (pthread_attr_init(&attributes) != 0) return 1;
    int failed = stack && (pthread_attr_setstacksize(&attributes, stack) != 0 ||
                           pthread_attr_setguardsize(&attributes, GUARD_BYTES) != 0);
    if (!failed) failed = pthread_create(&run->thread[rank], &attributes, rank_thread, &run->rank[rank]) != 0;
    pthread_attr_destroy(&attributes);
    return failed;
}

static int run_threads(usp_run *run) {
    run->running = run->how.size;
    for (int i = 0; i < run->how.size; i++)
        if (start_rank(run, i)) abort();
    int ended = wait_or_abort(run);
    for (int i = 0; ended && i < run->how.size; i++) pthread_join(run->thread[i], NULL);
    return ended;
}

/* The launcher ends the other processes when this one is killed by its alarm. */
static int run_process(usp_run *run) {
    int ended = 1;
    alarm((unsigned)run->how.seconds);
    if (run->how.stack)
        ended = run_threads(run);
    else
        run_rank(run, &run->rank[0]);
    alarm(0);
    return ended;
}

static usp_run *run_create(const usp_ranks *ranks, usp_body body, void *argument) {
    int size = ranks->kind == USP_RANKS_PROCESS ? 1 : ranks->size;
    usp_run *run = calloc(1, sizeof *run + (size_t)size * sizeof run->rank[0]);
    if (run) run->thread = calloc((size_t)size, sizeof *run->thread);
    if (run) run->heap = calloc((size_t)size, sizeof *run->heap);
    if (!run || !run->thread || !run->heap) abort();
    run->how = *ranks;
    run->how.size = size;
    run->how.seconds = SLOWER * (ranks->seconds ? ranks->seconds : DEFAULT_SECONDS);
    if (run->how.device == USP_DEVICE_AUTO) run->how.device = USP_DEVICE_CPU;
    run->body = body;
    run->argument = argument;
    pthread_mutex_init(&run->lock, NULL);
    pthread_cond_init(&run->ended, NULL);
    for (int i = 0; i < size; i++)
        run->rank[i] = (usp_rank){.rank = i, .size = size, .heap = &run->heap[i], .run = run};
    return run;
}

static usp_status meet(usp_run *run) {
    if (run->how.kind == USP_RANKS_NCCL) return usp_unique_id_create(&run->id);
    if (run->how.kind == USP_RANKS_THREADS) return usp_rendezvous_create(run->how.size, &run->rendezvous);
    return USP_OK;
}

int usp_ranks_run(const usp_ranks *ranks, usp_body body, void *argument, usp_report *report) {
    usp_run *run = run_create(ranks, body, argument);
    int ended = 1;
    if (meet(run) != USP_OK)
        usp_say(&run->rank[0], "meeting: %s", usp_last_error());
    else
        ended = ranks->kind == USP_RANKS_PROCESS ? run_process(run) : run_threads(run);
    pthread_mutex_lock(&run->lock);
    *report = run->report;
    pthread_mutex_unlock(&run->lock);
    if (!ended) return 1; /* ranks may still use the run: it stays */
    usp_rendezvous_destroy(run->rendezvous);
    pthread_cond_destroy(&run->ended);
    pthread_mutex_destroy(&run->lock);
    free(run->thread);
    free(run->heap);
    free(run);
    return report->failures != 0;
}
