/* check_nccl.c - the NCCL transport on the GPUs of one host: all constructors, conformance, graphs, shared memory,
 * speed, aborts, deaths. A plain program: a process a GPU (its own, or a launcher's), or with --threads N a thread.
 *
 *   check_nccl [--processes N]         starts N processes of itself (default: all GPUs), also with ranks that die
 *   check_nccl --threads N             ranks are threads
 *   RANK=... check_nccl [--kill|--stop] one rank under a launcher; with a flag the last rank dies or stops */
#define _GNU_SOURCE
#include <cuda_runtime_api.h>
#include <nccl.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "conformance.h"
#include "crew.h"
#include "environment.h"
#include "split.h"

enum {
    SKIPPED = 77,
    MOST_RANKS = USP_CREW_MOST,
    TIMEOUT_MS = 20000,       /* where nothing should go wrong */
    FAULT_TIMEOUT_MS = 5000,  /* where a rank stops */
    ABSENT_TIMEOUT_MS = 3000, /* where a rank does not come */
    LATE_MS = 300,            /* by which it comes late before that */
    MARGIN_MS = 5000,         /* from the limit to the answer */
    DEATH_MS = 2000,          /* from a death to the answer */
    PHASE_SECONDS = 150,
    REPLAYS = 20,
    ROUNDS = 20,
    RECYCLES = 24
};

/* One rank of this program. */
typedef struct usp_player {
    int rank, size;
    int is_thread;     /* then a global capture would forbid the other ranks their calls */
    const char *fault; /* NULL, "--kill" or "--stop": what the last rank does */
    usp_bootstrap bootstrap;
    usp_host host;
    usp_device *device;
    usp_stream stream;
    int failures;
} usp_player;

__attribute__((format(printf, 2, 3))) static int complain(usp_player *player, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fprintf(stderr, "rank %d: ", player->rank);
    vfprintf(stderr, format, arguments);
    fprintf(stderr, "\n");
    va_end(arguments);
    player->failures++;
    return 0;
}

__attribute__((format(printf, 2, 3))) static void report(const usp_player *player, const char *format, ...) {
    va_list arguments;
    if (player->rank != 0) return;
    va_start(arguments, format);
    vprintf(format, arguments);
    va_end(arguments);
    printf("\n");
    fflush(stdout);
}

/* 1 if the call went well. */
static int good(usp_player *player, usp_status status, const char *what) {
    if (status == USP_OK) return 1;
    return complain(player, "%s: %s: %s", what, usp_status_string(status), usp_last_error());
}

static int nccl_good(usp_player *player, ncclResult_t result, const char *what) {
    return result == ncclSuccess || complain(player, "%s: %s", what, ncclGetErrorString(result));
}

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec * 1e-9;
}

static void nap(void) {
    const struct timespec time = {.tv_nsec = 20000};
    nanosleep(&time, NULL);
}

/* ---- exchanges of known bytes ------------------------------------------------------------------------------------ */

/* Messages between every two ranks, each of its own size, in one block of memory a direction. */
typedef struct usp_traffic {
    usp_transport *transport;
    char *out, *in; /* device memory */
    size_t out_bytes, in_bytes;
    usp_message sends[MOST_RANKS];
    usp_message recvs[MOST_RANKS];
    int count;
    char *host; /* of both sizes, one after the other */
} usp_traffic;

static size_t message_bytes(int from, int to) {
    return 100003 * (size_t)(from + 1) + 17 * (size_t)to;
}

static char message_byte(int from, int to, size_t i, int round) {
    return (char)((size_t)(from * 31 + to * 7 + round * 3 + 1) * (i + 1) % 251);
}

static void lay_out(usp_traffic *traffic, const usp_player *player) {
    traffic->count = 0;
    traffic->out_bytes = traffic->in_bytes = 0;
    for (int peer = 0; peer < player->size; peer++) {
        if (peer == player->rank) continue;
        size_t out = message_bytes(player->rank, peer), in = message_bytes(peer, player->rank);
        traffic->sends[traffic->count] = usp_message_whole(peer, traffic->out + traffic->out_bytes, out);
        traffic->recvs[traffic->count++] = usp_message_whole(peer, traffic->in + traffic->in_bytes, in);
        traffic->out_bytes += out;
        traffic->in_bytes += in;
    }
}

static void close_traffic(usp_player *player, usp_traffic *traffic) {
    player->device->ops->free(player->device, traffic->out);
    player->device->ops->free(player->device, traffic->in);
    free(traffic->host);
}

static int open_traffic(usp_player *player, usp_transport *transport, usp_traffic *traffic) {
    void *out = NULL, *in = NULL;
    *traffic = (usp_traffic){.transport = transport};
    lay_out(traffic, player);
    traffic->host = malloc(traffic->out_bytes + traffic->in_bytes + 1);
    if (!good(player, player->device->ops->alloc(player->device, traffic->out_bytes, &out), "alloc")) return 0;
    if (!good(player, player->device->ops->alloc(player->device, traffic->in_bytes, &in), "alloc")) return 0;
    traffic->out = out;
    traffic->in = in;
    lay_out(traffic, player);
    return traffic->host != NULL;
}

static int fill(usp_player *player, usp_traffic *traffic, int round) {
    char *at = traffic->host;
    for (int i = 0; i < traffic->count; i++)
        for (size_t j = 0; j < traffic->sends[i].bytes; j++)
            *at++ = message_byte(player->rank, traffic->sends[i].peer, j, round);
    return cudaMemcpy(traffic->out, traffic->host, traffic->out_bytes, cudaMemcpyHostToDevice) == cudaSuccess &&
           cudaMemset(traffic->in, 0xee, traffic->in_bytes) == cudaSuccess && cudaDeviceSynchronize() == cudaSuccess;
}

/* Every byte that arrived is the one that was sent in `round`. */
static int verify(usp_player *player, usp_traffic *traffic, int round) {
    const char *at = traffic->host + traffic->out_bytes;
    if (cudaMemcpy(traffic->host + traffic->out_bytes, traffic->in, traffic->in_bytes, cudaMemcpyDeviceToHost) !=
        cudaSuccess)
        return complain(player, "the received bytes could not be read");
    for (int i = 0; i < traffic->count; i++)
        for (size_t j = 0; j < traffic->recvs[i].bytes; j++)
            if (*at++ != message_byte(traffic->recvs[i].peer, player->rank, j, round))
                return complain(player, "round %d: byte %zu from rank %d is wrong", round, j, traffic->recvs[i].peer);
    return 1;
}

static usp_status send_all(usp_player *player, usp_traffic *traffic) {
    return traffic->transport->ops->exchange(traffic->transport, 0, traffic->sends, traffic->count, traffic->recvs,
                                             traffic->count, player->stream);
}

/* Waits for the stream, polling the transport, as usp_world_synchronize does. */
static usp_status drain(usp_player *player, usp_transport *transport) {
    int busy = 1;
    while (busy) {
        usp_status status = usp_transport_poll(transport);
        if (status == USP_OK) status = player->device->ops->query(player->device, player->stream, &busy);
        if (status != USP_OK) return status;
        if (busy) nap();
    }
    return USP_OK;
}

static int check_exchange(usp_player *player, usp_transport *transport, int round) {
    usp_traffic traffic;
    if (!open_traffic(player, transport, &traffic)) return 0;
    int fine = fill(player, &traffic, round) && good(player, send_all(player, &traffic), "exchange") &&
               good(player, drain(player, transport), "the exchange") && verify(player, &traffic, round);
    close_traffic(player, &traffic);
    return fine;
}

/* ---- constructors ------------------------------------------------------------------------------------------------ */

typedef enum usp_way { BY_BOOTSTRAP, BY_ID, BY_BORROWED, BY_NONBLOCKING, WAYS } usp_way;

static const char *way_name(usp_way way) {
    static const char *const names[WAYS] = {"bootstrap", "id", "borrowed (blocking)", "borrowed (nonblocking)"};
    return names[way];
}

static usp_transport_config config_of(const usp_player *player, int timeout_ms) {
    return (usp_transport_config){player->device, &player->host, timeout_ms, timeout_ms};
}

/* One id for all ranks, by the bootstrap. */
static int share_id(usp_player *player, usp_unique_id *id) {
    static usp_unique_id none;
    usp_unique_id mine = none, all[MOST_RANKS];
    if (player->rank == 0 && !good(player, usp_nccl_unique_id(&mine), "usp_nccl_unique_id")) return 0;
    if (player->bootstrap.gather(player->bootstrap.user, &mine, all, sizeof mine) != USP_OK)
        return complain(player, "the bootstrap failed");
    *id = all[0];
    return 1;
}

/* Waits for a caller's own communicator, blocking or not. */
static int own_wait(usp_player *player, ncclComm_t own, ncclResult_t result, const char *what) {
    while (result == ncclInProgress)
        if (ncclCommGetAsyncError(own, &result) != ncclSuccess) break;
    return nccl_good(player, result, what);
}

static int own_create(usp_player *player, int blocking, ncclComm_t *own) {
    usp_unique_id id;
    ncclUniqueId copy;
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.blocking = blocking;
    if (!share_id(player, &id)) return 0;
    memcpy(&copy, id.bytes, sizeof copy);
    ncclResult_t result = ncclCommInitRankConfig(own, player->size, copy, player->rank, &config);
    return own_wait(player, *own, result, "the caller's own communicator");
}

/* The caller's own communicator over `size` ranks adds ones. */
static int own_sum(usp_player *player, ncclComm_t own, int size) {
    int one = 1, sum = 0;
    void *memory = NULL;
    if (!good(player, player->device->ops->alloc(player->device, sizeof one, &memory), "alloc")) return 0;
    cudaMemcpy(memory, &one, sizeof one, cudaMemcpyHostToDevice);
    cudaDeviceSynchronize();
    ncclResult_t result = ncclAllReduce(memory, memory, 1, ncclInt32, ncclSum, own, player->stream);
    int fine = own_wait(player, own, result, "ncclAllReduce");
    fine = fine && cudaStreamSynchronize(player->stream) == cudaSuccess;
    cudaMemcpy(&sum, memory, sizeof sum, cudaMemcpyDeviceToHost);
    player->device->ops->free(player->device, memory);
    return (fine && sum == size) || complain(player, "the sum over %d ranks is %d", size, sum);
}

static int create(usp_player *player, usp_way way, int timeout_ms, ncclComm_t borrowed, usp_transport **transport) {
    usp_transport_config config = config_of(player, timeout_ms);
    usp_meeting meeting = {.bootstrap = player->bootstrap};
    usp_unique_id id;
    double begin = now();
    usp_status status = USP_OK;
    if (way == BY_BOOTSTRAP)
        status = usp_transport_create_nccl(&config, &meeting, transport);
    else if (way != BY_ID)
        status = usp_transport_create_nccl_borrowed(&config, &meeting, borrowed, transport);
    else if (!share_id(player, &id))
        return 0;
    else
        status = usp_transport_create_nccl_id(&config, &meeting, &id, player->size, player->rank, transport);
    usp_meeting_end(&meeting);
    if (!good(player, status, way_name(way))) return 0;
    report(player, "%s: created in %.0f ms", way_name(way), (now() - begin) * 1e3);
    return 1;
}

/* ---- checks on one transport -------------------------------------------------------------------------------------- */

static int capture(usp_player *player, usp_traffic *traffic, enum cudaStreamCaptureMode mode, cudaGraphExec_t *exec) {
    cudaGraph_t graph = NULL;
    if (cudaStreamBeginCapture(player->stream, mode) != cudaSuccess) return complain(player, "no capture");
    usp_status status = send_all(player, traffic);
    cudaError_t error = cudaStreamEndCapture(player->stream, &graph);
    if (!good(player, status, "an exchange in capture")) return 0;
    if (error == cudaSuccess) error = cudaGraphInstantiate(exec, graph, 0);
    cudaGraphDestroy(graph);
    return error == cudaSuccess || complain(player, "capture: %s", cudaGetErrorString(error));
}

static int replay(usp_player *player, usp_traffic *traffic, cudaGraphExec_t exec) {
    for (int round = 0; round < REPLAYS; round++) {
        if (!fill(player, traffic, round)) return complain(player, "fill");
        if (cudaGraphLaunch(exec, player->stream) != cudaSuccess) return complain(player, "cudaGraphLaunch");
        if (!good(player, drain(player, traffic->transport), "a replay") || !verify(player, traffic, round)) return 0;
    }
    return 1;
}

/* A captured exchange moves the bytes of the moment at each replay. */
static int check_capture(usp_player *player, usp_transport *transport, enum cudaStreamCaptureMode mode) {
    usp_traffic traffic;
    cudaGraphExec_t exec = NULL;
    if (!open_traffic(player, transport, &traffic)) return 0;
    int fine = capture(player, &traffic, mode, &exec) && replay(player, &traffic, exec);
    if (exec != NULL) cudaGraphExecDestroy(exec);
    cudaDeviceSynchronize();
    close_traffic(player, &traffic);
    report(player, "capture, mode %d: %s", (int)mode, fine ? "ok" : "failed");
    return fine;
}

typedef struct usp_watch {
    usp_transport *transport;
    atomic_int stop, failed;
} usp_watch;

static void *watch(void *argument) {
    usp_watch *seen = argument;
    while (!atomic_load(&seen->stop))
        if (usp_transport_poll(seen->transport) != USP_OK) atomic_store(&seen->failed, 1);
    return NULL;
}

/* Another thread may poll at any time. */
static int check_watched(usp_player *player, usp_transport *transport) {
    usp_watch seen = {.transport = transport};
    pthread_t thread;
    int fine = 1;
    if (pthread_create(&thread, NULL, watch, &seen) != 0) return complain(player, "no thread");
    for (int round = 0; round < ROUNDS && fine; round++) fine = check_exchange(player, transport, round);
    atomic_store(&seen.stop, 1);
    pthread_join(thread, NULL);
    return fine && (!atomic_load(&seen.failed) || complain(player, "the watcher saw a failure"));
}

/* A communicator over the even and one over the odd ranks, for the caller's own sums. */
static int check_split(usp_player *player, usp_transport *transport) {
    struct ncclComm *child = NULL;
    int colour = player->rank % 2, members = (player->size + 1 - colour) / 2;
    if (!good(player, usp_nccl_split(transport, colour, player->rank, &child), "split")) return 0;
    int fine = own_sum(player, child, members);
    usp_nccl_split_destroy(transport, child);
    return fine && check_exchange(player, transport, 3);
}

/* `bytes` in equal parts to the next `peers` ranks, and from those before: the first and second half of `memory`. */
static usp_traffic spread(const usp_player *player, usp_transport *transport, char *memory, size_t bytes, int peers) {
    size_t each = bytes / (size_t)peers;
    usp_traffic traffic = {
        .transport = transport, .out = memory, .in = memory + bytes, .out_bytes = bytes, .in_bytes = bytes};
    for (int i = 1; i <= peers; i++, traffic.count++) {
        int to = (player->rank + i) % player->size, from = (player->rank + player->size - i) % player->size;
        traffic.sends[traffic.count] = usp_message_whole(to, traffic.out + each * (size_t)traffic.count, each);
        traffic.recvs[traffic.count] = usp_message_whole(from, traffic.in + each * (size_t)traffic.count, each);
    }
    return traffic;
}

/* Mean seconds of ROUNDS exchanges; *host: of the calls alone. Negative: failed. */
static double time_exchange(usp_player *player, usp_transport *transport, char *memory, size_t bytes, int all,
                            double *host) {
    usp_traffic traffic = spread(player, transport, memory, bytes, all ? player->size - 1 : 1);
    double begin = 0;
    for (int round = -3; round < ROUNDS; round++) {
        if (round == 0 && drain(player, transport) != USP_OK) return -1;
        if (round == 0) begin = now();
        if (send_all(player, &traffic) != USP_OK) return -1;
    }
    *host = (now() - begin) / ROUNDS;
    return drain(player, transport) == USP_OK ? (now() - begin) / ROUNDS : -1;
}

static int print_times(usp_player *player, usp_transport *transport, char *plain, char *shared) {
    for (size_t mb = 1; mb <= 64; mb *= 2) {
        double time[4], host = 0;
        for (int i = 0; i < 4; i++) {
            time[i] = time_exchange(player, transport, i % 2 ? shared : plain, mb << 20, i / 2, &host);
            if (time[i] < 0) return complain(player, "timing: %s", usp_last_error());
        }
        double gb = (double)(mb << 20) * 1e-9;
        report(player,
               "%2zu MB: ring %6.1f us %5.1f GB/s, shared %6.1f us %5.1f GB/s; all %6.1f us %5.1f GB/s, "
               "shared %6.1f us %5.1f GB/s; call %.1f us",
               mb, time[0] * 1e6, gb / time[0], time[1] * 1e6, gb / time[1], time[2] * 1e6, gb / time[2], time[3] * 1e6,
               gb / time[3], host * 1e6);
    }
    return 1;
}

static int check_shared(usp_player *player, usp_transport *transport) {
    const size_t bytes = (size_t)2 << 26;
    void *plain = NULL, *shared = NULL;
    if (!good(player, player->device->ops->alloc(player->device, bytes, &plain), "alloc")) return 0;
    if (!good(player, transport->ops->alloc_shared(transport, bytes, &shared), "alloc_shared")) return 0;
    if (!good(player, transport->ops->register_shared(transport, shared), "register_shared")) return 0;
    int fine = print_times(player, transport, plain, shared);
    fine = good(player, transport->ops->free_shared(transport, shared), "free_shared") && fine;
    player->device->ops->free(player->device, plain);
    return fine;
}

/* One exchange, by a call or by a launch of its graph; every sender's bytes have its rank's value. */
static int move_values(usp_player *player, usp_traffic *traffic, cudaGraphExec_t exec) {
    if (cudaMemset(traffic->out, player->rank + 1, traffic->out_bytes) != cudaSuccess ||
        cudaMemset(traffic->in, 0xee, traffic->in_bytes) != cudaSuccess || cudaDeviceSynchronize() != cudaSuccess)
        return complain(player, "cudaMemset");
    if (exec != NULL && cudaGraphLaunch(exec, player->stream) != cudaSuccess)
        return complain(player, "cudaGraphLaunch");
    if (exec == NULL && !good(player, send_all(player, traffic), "an exchange")) return 0;
    if (!good(player, drain(player, traffic->transport), "an exchange in shared memory")) return 0;
    if (cudaMemcpy(traffic->host, traffic->in, traffic->in_bytes, cudaMemcpyDeviceToHost) != cudaSuccess)
        return complain(player, "cudaMemcpy");
    for (int i = 0; i < traffic->count; i++)
        for (size_t j = 0; j < traffic->recvs[i].bytes; j++)
            if (traffic->host[(char *)traffic->recvs[i].base - traffic->in + (ptrdiff_t)j] !=
                traffic->recvs[i].peer + 1)
                return complain(player, "byte %zu from rank %d is wrong", j, traffic->recvs[i].peer);
    return 1;
}

static int use_shared(usp_player *player, usp_transport *transport, size_t bytes, char *host) {
    void *memory = NULL;
    cudaGraphExec_t exec = NULL;
    if (!good(player, transport->ops->alloc_shared(transport, 2 * bytes, &memory), "alloc_shared")) return 0;
    if (!good(player, transport->ops->register_shared(transport, memory), "register_shared")) return 0;
    usp_traffic traffic = spread(player, transport, memory, bytes, player->size - 1);
    traffic.host = host;
    int fine = move_values(player, &traffic, NULL) && move_values(player, &traffic, NULL) &&
               capture(player, &traffic, cudaStreamCaptureModeThreadLocal, &exec) &&
               move_values(player, &traffic, exec) && move_values(player, &traffic, exec);
    if (exec != NULL) cudaGraphExecDestroy(exec);
    return good(player, transport->ops->free_shared(transport, memory), "free_shared") && fine;
}

/* Shared memory goes and other comes in its place while NCCL may still remember the graph that used it. */
static int check_recycled(usp_player *player, usp_transport *transport) {
    const size_t unit = (size_t)(player->size - 1) << 21, sizes[] = {3 * unit, unit, 4 * unit, 2 * unit};
    char *host = malloc(4 * unit);
    int fine = host != NULL;
    for (int round = 0; round < RECYCLES && fine; round++) fine = use_shared(player, transport, sizes[round % 4], host);
    free(host);
    report(player, "graphs in memory that comes and goes: %s", fine ? "ok" : "failed");
    return fine;
}

static int check_made(usp_player *player, usp_way way, usp_transport *transport) {
    if (usp_check_transport(transport, 1 + (unsigned)way) != 0)
        return complain(player, "%s: conformance", way_name(way));
    if (!check_exchange(player, transport, 1)) return 0;
    if (way != BY_BOOTSTRAP) return 1;
    if (!check_watched(player, transport)) return 0;
    if (!check_capture(player, transport, cudaStreamCaptureModeThreadLocal)) return 0;
    if (!check_capture(player, transport, cudaStreamCaptureModeRelaxed)) return 0;
    if (!player->is_thread && !check_capture(player, transport, cudaStreamCaptureModeGlobal)) return 0;
    return check_split(player, transport) && check_shared(player, transport) && check_recycled(player, transport);
}

static int check_way(usp_player *player, usp_way way) {
    ncclComm_t own = NULL;
    usp_transport *transport = NULL;
    int borrows = way == BY_BORROWED || way == BY_NONBLOCKING;
    if (borrows && !own_create(player, way == BY_BORROWED, &own)) return 0;
    if (!create(player, way, TIMEOUT_MS, own, &transport)) return 0;
    int fine = check_made(player, way, transport);
    double begin = now();
    usp_transport_end(transport);
    report(player, "%s: destroyed in %.0f ms", way_name(way), (now() - begin) * 1e3);
    if (borrows) fine = fine && own_sum(player, own, player->size);
    if (borrows) ncclCommDestroy(own);
    return fine;
}

/* ---- failures ---------------------------------------------------------------------------------------------------- */

/* Waits, at most `limit_ms`, for the transport to fail while an exchange cannot end; says how long it took. */
static int await_failure(usp_player *player, usp_transport *transport, int limit_ms, usp_status wanted, int culprit) {
    char name[32], sentence[256];
    double begin = now(), took = 0;
    usp_status status = USP_OK;
    snprintf(name, sizeof name, "rank %d", culprit);
    while (status == USP_OK && took * 1e3 < limit_ms) {
        status = usp_transport_poll(transport);
        took = now() - begin;
        nap();
    }
    snprintf(sentence, sizeof sentence, "%s", usp_last_error());
    report(player, "%s after %.0f ms: %s", usp_status_string(status), took * 1e3, sentence);
    if (status != wanted) return complain(player, "expected: %s", usp_status_string(wanted));
    return strstr(sentence, name) != NULL || complain(player, "the sentence does not name %s: %s", name, sentence);
}

/* After an abort the GPU is free again. */
static int check_freed(usp_player *player, usp_transport *transport) {
    double begin = now();
    int busy = 1;
    usp_transport_abort(transport);
    report(player, "aborted in %.0f ms", (now() - begin) * 1e3);
    while (busy && now() - begin < MARGIN_MS * 1e-3 + 5)
        if (player->device->ops->query(player->device, player->stream, &busy) != USP_OK) busy = 0;
    return !busy || complain(player, "the stream is still busy");
}

static int check_abort(usp_player *player) {
    usp_transport *transport = NULL;
    usp_traffic traffic;
    if (!create(player, BY_BOOTSTRAP, TIMEOUT_MS, NULL, &transport)) return 0;
    int fine = check_exchange(player, transport, 1) && open_traffic(player, transport, &traffic);
    if (player->rank == 0)
        usp_transport_abort(transport);
    else if (fine)
        send_all(player, &traffic);
    fine = fine && await_failure(player, transport, DEATH_MS, USP_COMM, 0) && check_freed(player, transport);
    usp_transport_end(transport);
    if (fine) close_traffic(player, &traffic);
    return fine;
}

/* The last rank comes late to the first exchange and never to the second, which the others enqueue meanwhile. */
static int miss_the_second(usp_player *player, usp_traffic *traffic) {
    int late = player->rank == player->size - 1;
    if (late) usleep(LATE_MS * 1000);
    return good(player, send_all(player, traffic), "an exchange") &&
           (late || good(player, send_all(player, traffic), "an exchange with nobody"));
}

/* The last rank lives but does not come: its place in the others' streams is overdue. */
static int check_absent(usp_player *player) {
    usp_transport *transport = NULL;
    usp_traffic traffic;
    int culprit = player->size - 1;
    if (!create(player, BY_BOOTSTRAP, ABSENT_TIMEOUT_MS, NULL, &transport)) return 0;
    int fine = check_exchange(player, transport, 1) && open_traffic(player, transport, &traffic);
    fine = fine && miss_the_second(player, &traffic);
    fine = fine && await_failure(player, transport, ABSENT_TIMEOUT_MS + MARGIN_MS, USP_TIMEOUT, culprit) &&
           check_freed(player, transport);
    usp_transport_end(transport);
    if (fine) close_traffic(player, &traffic);
    return fine;
}

/* The last rank ends itself where the others wait for it. */
static void suffer(const usp_player *player) {
    if (player->rank == player->size - 1) raise(strcmp(player->fault, "--kill") == 0 ? SIGKILL : SIGSTOP);
}

static int survive(usp_player *player, usp_transport *transport) {
    usp_traffic traffic;
    int killed = strcmp(player->fault, "--kill") == 0, culprit = player->size - 1;
    if (!check_exchange(player, transport, 1) || !open_traffic(player, transport, &traffic)) return 0;
    suffer(player);
    send_all(player, &traffic);
    int fine = await_failure(player, transport, killed ? DEATH_MS : FAULT_TIMEOUT_MS + MARGIN_MS,
                             killed ? USP_PEER_LOST : USP_TIMEOUT, culprit) &&
               check_freed(player, transport);
    if (fine) close_traffic(player, &traffic);
    return fine;
}

/* The ranks that are left meet again by the launcher's address. */
static int check_smaller(usp_player *player) {
    usp_environment *environment = NULL;
    usp_transport *transport = NULL;
    char size[16];
    snprintf(size, sizeof size, "%d", --player->size);
    setenv("WORLD_SIZE", size, 1);
    if (!good(player, usp_environment_open(&player->host, TIMEOUT_MS, &environment), "meeting again")) return 0;
    player->bootstrap = usp_environment_bootstrap(environment);
    int fine = create(player, BY_BOOTSTRAP, TIMEOUT_MS, NULL, &transport) && check_exchange(player, transport, 2);
    if (fine && usp_check_transport(transport, 9) != 0) fine = complain(player, "conformance of the smaller transport");
    if (transport != NULL) usp_transport_end(transport);
    usp_environment_close(environment);
    return fine;
}

static int check_fault(usp_player *player) {
    usp_transport *transport = NULL;
    if (!create(player, BY_BOOTSTRAP, FAULT_TIMEOUT_MS, NULL, &transport)) return 0;
    int fine = survive(player, transport);
    double begin = now();
    usp_transport_end(transport);
    report(player, "destroyed in %.0f ms", (now() - begin) * 1e3);
    return fine && check_smaller(player);
}

/* ---- a rank ------------------------------------------------------------------------------------------------------ */

static void print_log(void *user, int level, const char *text) {
    const usp_player *player = user;
    if (level <= 3) fprintf(stderr, "rank %d: log: %s\n", player->rank, text);
}

static int check_all(usp_player *player) {
    if (player->fault != NULL) return check_fault(player);
    for (int way = 0; way < WAYS; way++)
        if (!check_way(player, (usp_way)way)) return 0;
    return check_abort(player) && check_absent(player) && check_way(player, BY_ID);
}

/* On the GPU that is current; 0: all well. */
static int play(usp_player *player) {
    usp_world_config config = {.struct_size = sizeof config, .log = print_log, .log_user = player};
    player->host = usp_host_from_config(&config);
    if (!good(player, usp_device_create_cuda(&player->host, &player->device), "the device")) return 1;
    if (good(player, player->device->ops->stream_create(player->device, &player->stream), "the stream")) {
        if (!check_all(player)) complain(player, "failed");
        player->device->ops->stream_destroy(player->device, player->stream);
    }
    player->device->ops->destroy(player->device);
    return player->failures != 0;
}

static int play_environment(const char *fault) {
    usp_player player = {.fault = fault};
    usp_world_config config = {.struct_size = sizeof config};
    usp_host host = usp_host_from_config(&config);
    usp_environment *environment = NULL;
    alarm(PHASE_SECONDS);
    if (!good(&player, usp_environment_open(&host, TIMEOUT_MS, &environment), "the environment")) return 1;
    player.bootstrap = usp_environment_bootstrap(environment);
    player.rank = player.bootstrap.rank;
    player.size = player.bootstrap.size;
    int gpu = usp_environment_local_rank(environment);
    int failed = good(&player, usp_device_select_cuda(gpu), "the GPU") ? play(&player) : 1;
    usp_environment_close(environment);
    return failed;
}

/* ---- ranks as threads -------------------------------------------------------------------------------------------- */

static void play_hand(usp_hand *hand) {
    usp_player player = {.rank = hand->rank, .size = hand->size, .is_thread = 1};
    player.bootstrap =
        (usp_bootstrap){.gather = usp_crew_gather, .user = hand, .rank = player.rank, .size = player.size};
    hand->failed = good(&player, usp_device_select_cuda(player.rank), "the GPU") ? play(&player) : 1;
}

static int play_threads(int size) {
    alarm(PHASE_SECONDS);
    return usp_crew_threads(size, play_hand);
}

/* ---- ranks as processes ------------------------------------------------------------------------------------------ */

/* Waits for the first `count` ranks; 0 if all ended well before `deadline`. */
static int reap(const pid_t *ranks, int count, double deadline) {
    int failed = 0, left = count;
    int ended[MOST_RANKS] = {0};
    while (left > 0 && now() < deadline) {
        for (int i = 0; i < count; i++) {
            int state = 0;
            if (ended[i] || (ranks[i] > 0 && waitpid(ranks[i], &state, WNOHANG) == 0)) continue;
            ended[i] = 1;
            left--;
            if (ranks[i] < 0 || !WIFEXITED(state) || WEXITSTATUS(state) != 0) failed = 1;
        }
        nap();
    }
    for (int i = 0; i < count; i++)
        if (!ended[i]) kill(ranks[i], SIGKILL), waitpid(ranks[i], NULL, 0);
    return failed || left > 0;
}

/* One run of all ranks. With a fault the last one does not come back by itself. */
static int phase(int size, const char *fault) {
    pid_t ranks[MOST_RANKS];
    int others = fault != NULL ? size - 1 : size;
    printf("---- %d processes%s%s\n", size, fault != NULL ? " " : "", fault != NULL ? fault : "");
    fflush(stdout);
    usp_crew_processes(size, fault, ranks);
    int failed = reap(ranks, others, now() + PHASE_SECONDS);
    if (fault != NULL && ranks[size - 1] > 0) {
        kill(ranks[size - 1], SIGKILL);
        waitpid(ranks[size - 1], NULL, 0);
    }
    printf("---- %s\n", failed ? "failed" : "ok");
    return failed;
}

static int play_processes(int size) {
    int failed = phase(size, NULL);
    failed |= phase(size, "--kill");
    failed |= phase(size, "--stop");
    return failed;
}

int main(int count, char **arguments) {
    const char *flag = count > 1 ? arguments[1] : "";
    int gpus = usp_device_count_cuda();
    int size = count > 2 ? atoi(arguments[2]) : gpus;
    if (getenv("RANK") != NULL && gpus > 0) return play_environment(flag[0] != 0 ? flag : NULL);
    if (size < 2 || size > gpus || size > MOST_RANKS) {
        printf("skipped: needs 2 GPUs at least and a GPU for every rank; %d are here\n", gpus);
        return SKIPPED;
    }
    return strcmp(flag, "--threads") == 0 ? play_threads(size) : play_processes(size);
}
