/* check_peer.c - the peer transport: conformance, graphs, what it moves a second, deaths and stops. A plain program
 * that starts its ranks as processes, on the GPUs there are in turn: two ranks may share one.
 *
 *   check_peer [N]          N processes (default: a GPU each, two at least), then with a last one that dies or stops,
 *                           then N threads, where each has a GPU
 *   check_peer --threads    the threads alone
 * RANK=... check_peer [--kill|--stop|--kill-graph|--stop-graph] one of them */
#define _GNU_SOURCE
#include <cuda_runtime_api.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "conformance.h"
#include "crew.h"
#include "world.h"

enum {
    SKIPPED = 77,
    MOST_RANKS = USP_CREW_MOST,
    PHASE_SECONDS = 100,
    TIMEOUT_MS = 20000,
    FAULT_TIMEOUT_MS = 5000,               /* where a rank stops */
    ANSWER_MS = 12000,                     /* from the fault until all others have left */
    MANY_ROUNDS = 3 * 64 * 1048576 + 1000, /* bytes, more than slots hold */
    REPLAYS = 1000,
    ROUNDS = 20
};

static double now_ms(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec * 1e3 + (double)time.tv_nsec * 1e-6;
}

/* ---- ring steps -------------------------------------------------------------------------------------------------- */

/* One rank's tensors of a ring step: `bytes` that go, and as many that come, to shared memory or by way of slots. */
typedef struct step {
    usp_world *world;
    usp_stream stream;
    char *out, *in;
    size_t bytes;
    int shared;
} step;

static usp_status shift(const step *s) {
    usp_transport *transport = s->world->transport;
    int rank = transport->rank, size = transport->size;
    usp_message send = usp_message_whole((rank + 1) % size, s->out, s->bytes);
    usp_message recv = usp_message_whole((rank + size - 1) % size, s->in, s->bytes);
    if (s->shared) send.there = recv.there = s->in;
    return transport->ops->exchange(transport, 0, &send, 1, &recv, 1, s->stream);
}

static int open_step(step *s, usp_world *world, size_t bytes, int shared) {
    *s = (step){.world = world, .bytes = bytes, .shared = shared};
    void *in = NULL;
    int good = shared ? usp_world_alloc_shared(world, bytes, &in) == USP_OK : cudaMalloc(&in, bytes) == cudaSuccess;
    s->in = in;
    return good && cudaStreamCreateWithFlags(&s->stream, cudaStreamNonBlocking) == cudaSuccess &&
           cudaMalloc((void **)&s->out, bytes) == cudaSuccess;
}

static void close_step(step *s) {
    cudaFree(s->out);
    if (s->shared) usp_world_free_shared(s->world, s->in);
    if (!s->shared) cudaFree(s->in);
    cudaStreamDestroy(s->stream);
}

/* The ranks one after the other may not be: a rank's first byte says who it is, and what time it is. */
static int has_arrived(const step *s, int value) {
    unsigned char ends[2] = {0, 0};
    int from = (s->world->transport->rank + s->world->transport->size - 1) % s->world->transport->size;
    cudaMemcpy(&ends[0], s->in, 1, cudaMemcpyDefault);
    cudaMemcpy(&ends[1], s->in + s->bytes - 1, 1, cudaMemcpyDefault);
    unsigned char wanted = (unsigned char)(from * 16 + value % 16);
    return usp_check(s->world->transport, ends[0] == wanted && ends[1] == wanted, "arrived %d, %d, not %d", ends[0],
                     ends[1], wanted) == 0;
}

static int shift_and_look(const step *s, int value, cudaGraphExec_t graph) {
    cudaMemsetAsync(s->out, s->world->transport->rank * 16 + value % 16, s->bytes, s->stream);
    cudaMemsetAsync(s->in, 0xff, s->bytes, s->stream);
    usp_status status = graph ? (cudaGraphLaunch(graph, s->stream) == cudaSuccess ? USP_OK : USP_DEVICE) : shift(s);
    if (status == USP_OK) status = usp_world_synchronize(s->world, s->stream);
    if (usp_check(s->world->transport, status == USP_OK, "a step: %s", usp_last_error())) return 0;
    return has_arrived(s, value);
}

/* NULL after saying why. */
static cudaGraphExec_t capture(const step *s) {
    cudaGraph_t graph = NULL;
    cudaGraphExec_t exec = NULL;
    int good = cudaStreamBeginCapture(s->stream, cudaStreamCaptureModeThreadLocal) == cudaSuccess;
    usp_status status = good ? shift(s) : USP_DEVICE;
    good = good && cudaStreamEndCapture(s->stream, &graph) == cudaSuccess && status == USP_OK;
    good = good && cudaGraphInstantiate(&exec, graph, 0) == cudaSuccess;
    usp_check(s->world->transport, good, "capture: %s; %s", usp_last_error(), cudaGetErrorString(cudaGetLastError()));
    if (graph) cudaGraphDestroy(graph);
    return exec;
}

/* Replays between eager steps: both use the same memory. */
static int check_graph(usp_world *world, int shared) {
    step s;
    cudaGraphExec_t exec = open_step(&s, world, MANY_ROUNDS, shared) ? capture(&s) : NULL;
    int good = exec != NULL;
    for (int i = 0; i < REPLAYS && good; i++) good = shift_and_look(&s, i, i % 5 == 2 ? NULL : exec);
    if (exec) cudaGraphExecDestroy(exec);
    close_step(&s);
    return good;
}

/* Milliseconds a step, and microseconds of the host for its call. */
static int time_steps(usp_world *world, size_t megabytes, int shared) {
    step s;
    double host = 0;
    if (!open_step(&s, world, megabytes << 20, shared) || !shift_and_look(&s, 1, NULL)) return 0;
    double begin = now_ms();
    for (int i = 0; i < ROUNDS; i++) {
        double called = now_ms();
        if (shift(&s) != USP_OK) return 0;
        host += now_ms() - called;
    }
    if (usp_world_synchronize(world, s.stream) != USP_OK) return 0;
    double ms = (now_ms() - begin) / ROUNDS;
    if (world->transport->rank == 0)
        printf("ring step of %4zu MB, %s: %8.3f ms, %6.1f GB/s, call %5.1f us\n", megabytes,
               shared ? "straight" : "by slots", ms, (double)s.bytes / ms * 1e-6, host / ROUNDS * 1e3);
    close_step(&s);
    return 1;
}

/* ---- faults ------------------------------------------------------------------------------------------------------ */

/* Steps until one fails, by calls or by launches of a graph. */
static usp_status shift_until_failure(const step *s, cudaGraphExec_t exec) {
    usp_status status = USP_OK;
    while (status == USP_OK) {
        if (exec) cudaGraphLaunch(exec, s->stream);
        if (!exec) status = shift(s);
        if (status == USP_OK) status = usp_world_synchronize(s->world, s->stream);
    }
    return status;
}

/* The last rank dies or stops once all have made some steps; the others must find out, and whom. */
static int meet_fault(usp_world *world, const char *fault) {
    usp_transport *transport = world->transport;
    int kills = strncmp(fault, "--kill", 6) == 0, graph = strstr(fault, "graph") != NULL;
    char name[32];
    step s;
    if (!open_step(&s, world, MANY_ROUNDS, kills)) return 1;
    cudaGraphExec_t exec = graph ? capture(&s) : NULL;
    for (int i = 0; i < 3; i++)
        if (!shift_and_look(&s, i, exec)) return 1;
    usp_status status = usp_transport_allgather(transport, &s, &s, 0);
    if (transport->rank == transport->size - 1) raise(kills ? SIGKILL : SIGSTOP);
    double begin = now_ms();
    if (status == USP_OK) status = shift_until_failure(&s, exec);
    snprintf(name, sizeof name, "rank %d", transport->size - 1);
    int wrong = usp_check(transport, status == USP_PEER_LOST || (!kills && status == USP_TIMEOUT), "status %d: %s",
                          (int)status, usp_last_error());
    wrong += usp_check(transport, strstr(usp_last_error(), name) != NULL, "not %s: %s", name, usp_last_error());
    usp_world_abort(world);
    wrong += usp_check(transport, cudaStreamSynchronize(s.stream) == cudaSuccess, "the GPU still waits");
    if (exec) cudaGraphExecDestroy(exec);
    close_step(&s);
    usp_world_destroy(world);
    double took = now_ms() - begin;
    return wrong + usp_check(NULL, took < ANSWER_MS, "left after %.0f ms", took);
}

/* ---- ranks ------------------------------------------------------------------------------------------------------- */

static int play(const char *fault) {
    const usp_world_config config = {.struct_size = sizeof config,
                                     .device = USP_DEVICE_CUDA,
                                     .timeout_ms = fault ? FAULT_TIMEOUT_MS : TIMEOUT_MS,
                                     .transport = USP_TRANSPORT_PEER};
    usp_world *world = NULL;
    alarm(PHASE_SECONDS);
    usp_status status = usp_world_create_env(&config, &world);
    if (usp_check(NULL, status == USP_OK, "the world: %s", usp_last_error())) return 1;
    if (fault) return meet_fault(world, fault);
    int wrong = usp_check_transport(world->transport, 1) || usp_check_transport(world->transport, 2);
    for (int shared = 0; shared < 2; shared++) {
        wrong = wrong || !check_graph(world, shared);
        for (size_t megabytes = 1; megabytes <= 256 && !wrong; megabytes *= 4)
            wrong = !time_steps(world, megabytes, shared);
    }
    usp_world_destroy(world);
    return wrong;
}

/* ---- crews ------------------------------------------------------------------------------------------------------- */

static int gather(void *hand, const void *mine, void *all, size_t bytes) {
    return usp_crew_gather(hand, mine, all, bytes) != USP_OK;
}

static void play_hand(usp_hand *hand) {
    const usp_world_config config = {.struct_size = sizeof config,
                                     .device = USP_DEVICE_CUDA,
                                     .timeout_ms = TIMEOUT_MS,
                                     .transport = USP_TRANSPORT_PEER};
    usp_world *world = NULL;
    usp_device_select(USP_DEVICE_CUDA, hand->rank % usp_device_count(USP_DEVICE_CUDA));
    usp_status status = usp_world_create_callback(&config, gather, hand, hand->size, hand->rank, &world);
    hand->failed = usp_check(NULL, status == USP_OK, "the world: %s", usp_last_error());
    if (!hand->failed) hand->failed = usp_check_transport(world->transport, 3);
    usp_world_destroy(world);
}

/* What frees memory of a GPU waits for all that the process has begun there: two threads' ranks need two. */
static int play_threads(int size) {
    if (usp_device_count(USP_DEVICE_CUDA) < size) return 0;
    alarm(PHASE_SECONDS);
    int failed = usp_crew_threads(size, play_hand);
    printf("---- %d threads: %s\n", size, failed ? "failed" : "ok");
    return failed;
}

/* With a fault the last rank does not come back by itself. */
static int phase(int size, const char *fault) {
    pid_t ranks[MOST_RANKS];
    int failed = 0;
    printf("---- %d processes %s\n", size, fault ? fault : "");
    fflush(stdout);
    usp_crew_processes(size, fault, ranks);
    for (int i = 0; i < size; i++) {
        int state = 0, faulty = fault && i == size - 1;
        if (faulty && ranks[i] > 0) kill(ranks[i], SIGKILL);
        if (ranks[i] < 0 || waitpid(ranks[i], &state, 0) < 0) failed = 1;
        if (!faulty && (!WIFEXITED(state) || WEXITSTATUS(state) != 0)) failed = 1;
    }
    printf("---- %s\n", failed ? "failed" : "ok");
    fflush(stdout);
    return failed;
}

int main(int count, char **arguments) {
    static const char *const faults[] = {"--kill", "--stop", "--kill-graph", "--stop-graph"};
    int gpus = usp_device_count(USP_DEVICE_CUDA), size = count > 1 ? atoi(arguments[1]) : gpus < 2 ? 2 : gpus;
    if (gpus > 0 && count > 1 && strcmp(arguments[1], "--threads") == 0) return play_threads(gpus);
    if (gpus > 0 && getenv("RANK")) return play(count > 1 ? arguments[1] : NULL);
    if (gpus == 0 || size < 2 || size > MOST_RANKS) {
        printf("skipped: needs a GPU and 2 to %d ranks\n", MOST_RANKS);
        return SKIPPED;
    }
    int failed = phase(size, NULL);
    for (int i = 0; i < 4; i++) failed += phase(size, faults[i]);
    return failed + play_threads(size) != 0;
}
