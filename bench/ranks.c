/* ranks.c - rank threads with a common start, and small collectives over host memory.
 * Everything goes through usp.h: an all-gather is the gather of a sequence with one token a rank. */
#include "ranks.h"
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct usp_job usp_job;

typedef struct usp_job_thread {
    usp_job *job;
    pthread_t thread;
    usp_rank rank;
    usp_status status;
} usp_job_thread;

struct usp_job {
    const usp_ranks_config *config;
    usp_rank_main run;
    void *user;
    int size;
    usp_rendezvous *rendezvous;
    usp_unique_id id;
    pthread_mutex_t mutex;
    pthread_cond_t changed;
    int gate; /* 0: wait, 1: go, -1: a thread could not be started */
};

/* ---- one rank -------------------------------------------------------------------------------------------------- */

static usp_status open_everyone(usp_rank *rank) {
    usp_world_info info = {.struct_size = sizeof info};
    USP_TRY(usp_world_get_info(rank->world, &info));
    rank->rank = info.rank;
    rank->size = info.size;
    rank->device = info.device;
    memcpy(rank->transport, info.transport, sizeof rank->transport);
    /* 2 is CUDA's handle for the calling thread's own stream: thread-ranks of one GPU must not share one. */
    if (info.device == USP_DEVICE_CUDA) rank->stream = (usp_stream)(uintptr_t)2;
    usp_sequence_config config = {.struct_size = sizeof config, .layout = USP_LAYOUT_CONTIGUOUS, .tokens = info.size};
    USP_TRY(usp_mesh_create(rank->world, 1, info.size, &rank->mesh));
    return usp_sequence_create(rank->mesh, &config, &rank->everyone);
}

static void close_rank(usp_rank *rank) {
    usp_sequence_destroy(rank->everyone);
    usp_mesh_destroy(rank->mesh);
    usp_world_destroy(rank->world);
}

/* The world is up: runs the tool's function; afterwards nobody leaves before all are done, so that nobody looks lost.
 */
static usp_status run_rank(usp_rank *rank, usp_rank_main run, void *user) {
    usp_status status = open_everyone(rank);
    if (status == USP_OK) status = run(rank, user);
    if (status == USP_OK) status = usp_rank_agree(rank, USP_OK);
    if (status != USP_OK && !rank->error.text[0]) usp_tool_fail(&rank->error, status, "%s", usp_last_error());
    if (status != USP_OK) usp_world_abort(rank->world);
    close_rank(rank);
    return status;
}

static usp_world_config world_config(const usp_ranks_config *config, usp_device_kind device) {
    return (usp_world_config){.struct_size = sizeof(usp_world_config),
                              .device = device,
                              .timeout_ms = config->timeout_ms,
                              .transport = config->transport};
}

/* ---- threads --------------------------------------------------------------------------------------------------- */

static usp_status create_world(const usp_job *job, int rank, usp_world **world) {
    usp_world_config config = world_config(job->config, job->config->gpus ? USP_DEVICE_CUDA : job->config->device);
    if (config.device == USP_DEVICE_AUTO)
        config.device = usp_device_count(USP_DEVICE_CUDA) ? USP_DEVICE_CUDA : USP_DEVICE_CPU;
    USP_TRY(usp_device_select(config.device, job->config->gpus ? rank : 0));
    if (job->config->gpus) return usp_world_create_nccl_id(&config, &job->id, job->size, rank, world);
    return usp_world_create_threads(&config, job->rendezvous, rank, world);
}

static int wait_for_gate(usp_job *job) {
    pthread_mutex_lock(&job->mutex);
    while (!job->gate) pthread_cond_wait(&job->changed, &job->mutex);
    int go = job->gate > 0;
    pthread_mutex_unlock(&job->mutex);
    return go;
}

static void open_gate(usp_job *job, int go) {
    pthread_mutex_lock(&job->mutex);
    job->gate = go ? 1 : -1;
    pthread_cond_broadcast(&job->changed);
    pthread_mutex_unlock(&job->mutex);
}

static void *thread_main(void *argument) {
    usp_job_thread *self = argument;
    if (!wait_for_gate(self->job)) return NULL;
    self->status = create_world(self->job, self->rank.rank, &self->rank.world);
    if (self->status == USP_OK)
        self->status = run_rank(&self->rank, self->job->run, self->job->user);
    else
        usp_tool_fail(&self->rank.error, self->status, "%s", usp_last_error());
    return NULL;
}

static int is_cause(usp_status status) {
    return status != USP_OK && status != USP_PEER_FAILED && status != USP_PEER_LOST && status != USP_COMM;
}

/* The rank that failed by itself, else any that failed. */
static usp_status first_failure(const usp_job *job, const usp_job_thread *threads, usp_tool_error *error) {
    int chosen = -1;
    for (int i = job->size - 1; i >= 0; i--) {
        usp_status best = chosen < 0 ? USP_OK : threads[chosen].status;
        if (threads[i].status != USP_OK && (is_cause(threads[i].status) || !is_cause(best))) chosen = i;
    }
    if (chosen < 0) return USP_OK;
    usp_status status = threads[chosen].status;
    const char *text = threads[chosen].rank.error.text;
    return usp_tool_fail(error, status, "rank %d: %.900s", chosen, text[0] ? text : usp_status_string(status));
}

static usp_status start_and_join(usp_job *job, usp_job_thread *threads, usp_tool_error *error) {
    int started = 0;
    for (; started < job->size; started++) {
        threads[started].job = job;
        threads[started].rank.rank = started;
        if (pthread_create(&threads[started].thread, NULL, thread_main, &threads[started])) break;
    }
    open_gate(job, started == job->size);
    for (int i = 0; i < started; i++) pthread_join(threads[i].thread, NULL);
    if (started < job->size) return usp_tool_fail(error, USP_NO_MEMORY, "cannot start %d threads", job->size);
    return first_failure(job, threads, error);
}

#ifdef USP_HAVE_CUDA
#define NO_GPU "no GPU is usable in this process"
#else
#define NO_GPU "no GPU is usable: this build has no CUDA"
#endif

static usp_status check_gpus(const usp_ranks_config *config, usp_tool_error *error) {
    int usable = usp_device_count(USP_DEVICE_CUDA);
    int wanted = config->gpus ? config->gpus : config->device == USP_DEVICE_CUDA ? 1 : 0;
    if (wanted && !usable) return usp_tool_fail(error, USP_UNSUPPORTED, "%s", NO_GPU);
    if (wanted <= usable) return USP_OK;
    return usp_tool_fail(error, USP_UNSUPPORTED, "%d GPUs wanted, %d usable in this process", wanted, usable);
}

static usp_status prepare_job(usp_job *job, usp_tool_error *error) {
    int gpus = job->config->gpus;
    USP_TRY(check_gpus(job->config, error));
    usp_status status = gpus ? usp_unique_id_create(&job->id) : usp_rendezvous_create(job->size, &job->rendezvous);
    return status == USP_OK ? status : usp_tool_fail(error, status, "%s", usp_last_error());
}

static usp_status run_threads(const usp_ranks_config *config, usp_rank_main run, void *user, usp_tool_error *error) {
    usp_job job = {.config = config,
                   .run = run,
                   .user = user,
                   .size = config->gpus ? config->gpus : config->threads,
                   .mutex = PTHREAD_MUTEX_INITIALIZER,
                   .changed = PTHREAD_COND_INITIALIZER};
    usp_job_thread *threads = usp_tool_alloc(error, (size_t)job.size, sizeof *threads);
    if (!threads) return USP_NO_MEMORY;
    usp_status status = prepare_job(&job, error);
    if (status == USP_OK) status = start_and_join(&job, threads, error);
    usp_rendezvous_destroy(job.rendezvous);
    pthread_cond_destroy(&job.changed);
    pthread_mutex_destroy(&job.mutex);
    free(threads);
    return status;
}

/* ---- processes ------------------------------------------------------------------------------------------------- */

/* The variables by which usp_world_create_env knows the launcher. */
static int has_launcher(void) {
    const char *const sizes[] = {"WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "PMI_SIZE"};
    int found = 0;
    for (int i = 0; i < 4; i++) found |= getenv(sizes[i]) != NULL;
    return found;
}

static usp_status run_process(const usp_ranks_config *config, usp_rank_main run, void *user, usp_tool_error *error) {
    usp_rank rank = {.world = NULL};
    usp_world_config settings = world_config(config, config->device);
    usp_status status = usp_world_create_env(&settings, &rank.world);
    if (status != USP_OK) return usp_tool_fail(error, status, "%s", usp_last_error());
    status = run_rank(&rank, run, user);
    if (status == USP_OK) return status;
    return usp_tool_fail(error, status, "rank %d: %.900s", rank.rank,
                         rank.error.text[0] ? rank.error.text : usp_status_string(status));
}

usp_status usp_ranks_run(const usp_ranks_config *config, usp_rank_main run, void *user, usp_tool_error *error) {
    usp_ranks_config one = *config;
    if (config->threads || config->gpus) return run_threads(config, run, user, error);
    if (has_launcher()) return run_process(config, run, user, error);
    one.threads = config->otherwise ? config->otherwise : 1;
    return run_threads(&one, run, user, error);
}

usp_status usp_rank_open_single(usp_rank *single, usp_rendezvous **rendezvous, const usp_rank *beside) {
    usp_ranks_config defaults = {.device = beside->device};
    usp_world_config config = world_config(&defaults, beside->device);
    USP_TRY(usp_rendezvous_create(1, rendezvous));
    USP_TRY(usp_world_create_threads(&config, *rendezvous, 0, &single->world));
    return open_everyone(single);
}

void usp_rank_close_single(usp_rank *single, usp_rendezvous *rendezvous) {
    close_rank(single);
    usp_rendezvous_destroy(rendezvous);
}

/* ---- collectives ----------------------------------------------------------------------------------------------- */

usp_status usp_rank_gather(usp_rank *rank, const void *mine, void *all, size_t bytes) {
    return usp_sequence_gather(rank->everyone, 1, bytes, mine, all);
}

static usp_status first_of(usp_rank *rank, usp_status mine, const int32_t *all) {
    for (int i = 0; i < rank->size && mine == USP_OK; i++)
        if (all[i] != USP_OK)
            return usp_tool_fail(&rank->error, USP_PEER_FAILED, "rank %d: %s", i,
                                 usp_status_string((usp_status)all[i]));
    return mine;
}

usp_status usp_rank_agree(usp_rank *rank, usp_status mine) {
    int32_t code = (int32_t)mine;
    int32_t *all = usp_tool_alloc(&rank->error, (size_t)rank->size, sizeof *all);
    if (!all) return USP_NO_MEMORY;
    usp_status status = usp_rank_gather(rank, &code, all, sizeof code);
    if (status == USP_OK) status = first_of(rank, mine, all);
    free(all);
    return status;
}

usp_status usp_rank_max(usp_rank *rank, double mine, double *max) {
    double *all = usp_tool_alloc(&rank->error, (size_t)rank->size, sizeof *all);
    if (!all) return USP_NO_MEMORY;
    usp_status status = usp_rank_gather(rank, &mine, all, sizeof mine);
    *max = mine;
    for (int i = 0; i < rank->size && status == USP_OK; i++)
        if (!(all[i] <= *max)) *max = all[i];
    free(all);
    return status;
}
