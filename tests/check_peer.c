/* check_peer.c - the peer transport: conformance, graphs, what it moves a second, deaths and stops. A plain program
 * that starts its ranks as processes, on the GPUs there are in turn: two ranks may share one.
 *
 *   check_peer [N]          N processes (default: a GPU each, two at least), then with a last one that dies or stops
 *   RANK=... check_peer [--kill|--stop] one of them */
#define _GNU_SOURCE
#include <cuda_runtime_api.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "conformance.h"
#include "port.h"
#include "world.h"

enum {
    SKIPPED = 77,
    MOST_RANKS = 64,
    PHASE_SECONDS = 100,
    TIMEOUT_MS = 20000,
    FAULT_TIMEOUT_MS = 5000, /* where a rank stops */
    ANSWER_MS = 12000,       /* from the fault until all others have left */
    REPLAYS = 50,
    ROUNDS = 20
};

extern char **environ;

static double now_ms(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec * 1e3 + (double)time.tv_nsec * 1e-6;
}

/* ---- ring steps -------------------------------------------------------------------------------------------------- */

/* One rank's tensors of a ring step: `bytes` that go, and as many that come. */
typedef struct step {
    usp_world *world;
    usp_stream stream;
    char *out, *in;
    size_t bytes;
} step;

static usp_status shift(const step *s) {
    usp_transport *transport = s->world->transport;
    int rank = transport->rank, size = transport->size;
    usp_message send = usp_message_whole((rank + 1) % size, s->out, s->bytes);
    usp_message recv = usp_message_whole((rank + size - 1) % size, s->in, s->bytes);
    return transport->ops->exchange(transport, &send, 1, &recv, 1, s->stream);
}

static int open_step(step *s, usp_world *world, size_t bytes) {
    *s = (step){.world = world, .bytes = bytes};
    return cudaStreamCreateWithFlags(&s->stream, cudaStreamNonBlocking) == cudaSuccess &&
           cudaMalloc((void **)&s->out, bytes) == cudaSuccess && cudaMalloc((void **)&s->in, bytes) == cudaSuccess;
}

static void close_step(step *s) {
    cudaFree(s->out);
    cudaFree(s->in);
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

/* Replays between eager steps: both use the same slots in turn. */
static int check_graph(usp_world *world) {
    cudaGraph_t graph = NULL;
    cudaGraphExec_t exec = NULL;
    step s;
    int good = open_step(&s, world, 3 * 16 * 1048576 + 1000);
    good = good && cudaStreamBeginCapture(s.stream, cudaStreamCaptureModeThreadLocal) == cudaSuccess;
    usp_status status = good ? shift(&s) : USP_DEVICE;
    good = good && cudaStreamEndCapture(s.stream, &graph) == cudaSuccess && status == USP_OK;
    good = good && cudaGraphInstantiate(&exec, graph, 0) == cudaSuccess;
    if (usp_check(world->transport, good, "capture: %s; %s", usp_last_error(), cudaGetErrorString(cudaGetLastError())))
        return 0;
    for (int i = 0; i < REPLAYS && good; i++) good = shift_and_look(&s, i, i % 5 == 2 ? NULL : exec);
    cudaGraphExecDestroy(exec);
    cudaGraphDestroy(graph);
    close_step(&s);
    return good;
}

/* Milliseconds a step, and microseconds of the host for its call. */
static int time_steps(usp_world *world, size_t megabytes) {
    step s;
    double host = 0;
    if (!open_step(&s, world, megabytes << 20) || !shift_and_look(&s, 1, NULL)) return 0;
    double begin = now_ms();
    for (int i = 0; i < ROUNDS; i++) {
        double called = now_ms();
        if (shift(&s) != USP_OK) return 0;
        host += now_ms() - called;
    }
    if (usp_world_synchronize(world, s.stream) != USP_OK) return 0;
    double ms = (now_ms() - begin) / ROUNDS;
    if (world->transport->rank == 0)
        printf("ring step of %4zu MB: %8.3f ms, %6.1f GB/s, call %5.1f us\n", megabytes, ms,
               (double)s.bytes / ms * 1e-6, host / ROUNDS * 1e3);
    close_step(&s);
    return 1;
}

/* ---- faults ------------------------------------------------------------------------------------------------------ */

/* The last rank dies or stops in the middle of steps; the others must find out, and whom. */
static int meet_fault(usp_world *world, const char *fault) {
    usp_transport *transport = world->transport;
    usp_status wanted = strcmp(fault, "--kill") == 0 ? USP_PEER_LOST : USP_TIMEOUT, status = USP_OK;
    char name[32];
    step s;
    if (!open_step(&s, world, 64 << 20)) return 1;
    for (int i = 0; i < 3 && status == USP_OK; i++) status = shift(&s);
    if (status == USP_OK) status = usp_world_synchronize(world, s.stream);
    if (transport->rank == transport->size - 1) raise(strcmp(fault, "--kill") == 0 ? SIGKILL : SIGSTOP);
    double begin = now_ms();
    while (status == USP_OK) {
        status = shift(&s);
        if (status == USP_OK) status = usp_world_synchronize(world, s.stream);
    }
    if (status == USP_PEER_LOST) wanted = USP_PEER_LOST; /* a rank that stops may be lost before it is late */
    snprintf(name, sizeof name, "rank %d", transport->size - 1);
    int wrong = usp_check_failure(transport, status, wanted, name);
    usp_world_abort(world);
    wrong += usp_check(transport, cudaStreamSynchronize(s.stream) == cudaSuccess, "the GPU still waits");
    close_step(&s);
    usp_world_destroy(world);
    double took = now_ms() - begin;
    wrong += usp_check(NULL, took < ANSWER_MS, "left after %.0f ms", took);
    return wrong;
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
    wrong = wrong || !check_graph(world);
    for (size_t megabytes = 1; megabytes <= 256 && !wrong; megabytes *= 4) wrong = !time_steps(world, megabytes);
    usp_world_destroy(world);
    return wrong;
}

static void set_number(const char *name, int number) {
    char text[16];
    snprintf(text, sizeof text, "%d", number);
    setenv(name, text, 1);
}

static void start(int size, char *fault, pid_t *ranks) {
    char self[] = "check_peer";
    char *arguments[] = {self, fault, NULL};
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

/* With a fault the last rank does not come back by itself. */
static int phase(int size, char *fault) {
    pid_t ranks[MOST_RANKS];
    int failed = 0;
    printf("---- %d processes %s\n", size, fault ? fault : "");
    fflush(stdout);
    start(size, fault, ranks);
    for (int i = 0; i < size; i++) {
        int state = 0, faulty = fault && i == size - 1;
        if (faulty && ranks[i] > 0) kill(ranks[i], SIGKILL);
        if (ranks[i] < 0 || waitpid(ranks[i], &state, 0) < 0) failed = 1;
        if (!faulty && (!WIFEXITED(state) || WEXITSTATUS(state) != 0)) failed = 1;
    }
    printf("---- %s\n", failed ? "failed" : "ok");
    return failed;
}

int main(int count, char **arguments) {
    char kill_[] = "--kill", stop[] = "--stop";
    int gpus = usp_device_count(USP_DEVICE_CUDA), size = count > 1 ? atoi(arguments[1]) : gpus < 2 ? 2 : gpus;
    if (gpus > 0 && getenv("RANK")) return play(count > 1 ? arguments[1] : NULL);
    if (gpus == 0 || size < 2 || size > MOST_RANKS) {
        printf("skipped: needs a GPU and 2 to %d ranks\n", MOST_RANKS);
        return SKIPPED;
    }
    int failed = phase(size, NULL);
    failed += phase(size, kill_);
    return failed + phase(size, stop) != 0;
}
