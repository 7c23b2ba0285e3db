/* check_processes.c - the transport of processes over sockets: conformance, ranks that die, stop, leave or come late,
 * and the meeting by a launcher's environment. A plain program that forks its ranks; it needs no GPU and no launcher.
 */
#define _GNU_SOURCE
#include "conformance.h"
#include "environment.h"
#include "error.h"
#include "port.h"
#include "tcp.h"
#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { USP_MOST = 6, USP_CHILD_SECONDS = 100 };

/* What one rank of a play knows. */
typedef struct usp_cast {
    int rank, size, timeout_ms;
    int odd;    /* the rank that behaves differently */
    int signal; /* what hits it */
    int delay;  /* and when, in ms */
    unsigned seed;
    int port;        /* of the environment's meeting */
    const int *pipe; /* to each other rank */
    double *struck;  /* shared by all: when the odd rank was hit */
} usp_cast;

typedef int (*usp_scene)(const usp_cast *cast, usp_host *host, usp_device *device);

static double usp_seconds(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

static void usp_rest(int milliseconds) {
    struct timespec time = {milliseconds / 1000, (long)(milliseconds % 1000) * 1000000L};
    nanosleep(&time, NULL);
}

static void usp_words(char text[32], int rank) {
    snprintf(text, 32, "rank %d ", rank);
}

/* ---- a bootstrap over the pipes of some of the ranks ------------------------------------------------------------- */

/* The ranks of a new world are cast members, in ascending order. */
typedef struct usp_circle {
    const usp_cast *cast;
    int member[USP_MOST], size, rank;
} usp_circle;

static int usp_read_all(int pipe, char *data, size_t bytes) {
    for (size_t done = 0; done < bytes;) {
        ssize_t got = read(pipe, data + done, bytes - done);
        if (got <= 0) return 1;
        done += (size_t)got;
    }
    return 0;
}

static int usp_write_all(int pipe, const char *data, size_t bytes) {
    for (size_t done = 0; done < bytes;) {
        ssize_t sent = write(pipe, data + done, bytes - done);
        if (sent <= 0) return 1;
        done += (size_t)sent;
    }
    return 0;
}

static usp_status usp_circle_gather(void *user, const void *mine, void *all, size_t bytes) {
    const usp_circle *circle = user;
    const int *pipe = circle->cast->pipe, *member = circle->member;
    int failed = 0;
    if (circle->rank > 0) {
        failed |= usp_write_all(pipe[member[0]], mine, bytes);
        failed |= usp_read_all(pipe[member[0]], all, bytes * (size_t)circle->size);
        return failed ? usp_fail(USP_COMM, "a pipe failed") : USP_OK;
    }
    memcpy(all, mine, bytes);
    for (int i = 1; i < circle->size; i++)
        failed |= usp_read_all(pipe[member[i]], (char *)all + (size_t)i * bytes, bytes);
    for (int i = 1; i < circle->size; i++) failed |= usp_write_all(pipe[member[i]], all, bytes * (size_t)circle->size);
    return failed ? usp_fail(USP_COMM, "a pipe failed") : USP_OK;
}

/* All ranks but `without` (-1: all). */
static usp_circle usp_circle_make(const usp_cast *cast, int without) {
    usp_circle circle = {.cast = cast};
    for (int i = 0; i < cast->size; i++) {
        if (i == without) continue;
        if (i == cast->rank) circle.rank = circle.size;
        circle.member[circle.size++] = i;
    }
    return circle;
}

static usp_status usp_join(usp_circle *circle, const usp_host *host, usp_device *device, usp_transport **transport) {
    int limit = circle->cast->timeout_ms;
    usp_transport_config config = {.device = device, .host = host, .timeout_ms = limit, .silence_ms = limit};
    usp_bootstrap bootstrap = {.gather = usp_circle_gather, .user = circle, .rank = circle->rank, .size = circle->size};
    return usp_make_socket(&config, &bootstrap, transport);
}

/* A world of all ranks but one, conformance, and its end. */
static int usp_play_world(const usp_cast *cast, int without, const usp_host *host, usp_device *device) {
    usp_circle circle = usp_circle_make(cast, without);
    usp_transport *transport;
    usp_status status = usp_join(&circle, host, device, &transport);
    if (usp_check(NULL, status == USP_OK, "rank %d could not join: %s", cast->rank, usp_last_error())) return 1;
    int wrong = usp_check_transport(transport, cast->seed + (unsigned)cast->size);
    usp_transport_end(transport);
    return wrong;
}

/* ---- scenes ------------------------------------------------------------------------------------------------------ */

static int usp_scene_conformance(const usp_cast *cast, usp_host *host, usp_device *device) {
    return usp_play_world(cast, -1, host, device);
}

static usp_status usp_ring_step(usp_transport *transport, size_t bytes) {
    static char in[1 << 18], out[1 << 18];
    usp_message send = usp_message_whole((transport->rank + 1) % transport->size, out, bytes);
    usp_message recv = usp_message_whole((transport->rank + transport->size - 1) % transport->size, in, bytes);
    return transport->ops->exchange(transport, 0, &send, 1, &recv, 1, NULL);
}

/* Exchanges of changing sizes until something fails, which it must. */
static usp_status usp_run_ring(usp_transport *transport) {
    usp_status status = USP_OK;
    for (size_t i = 0; status == USP_OK; i++) status = usp_ring_step(transport, i % 7 == 0 ? 1 << 18 : 1 + i % 1000);
    return status;
}

static void *usp_strike_soon(void *argument) {
    const usp_cast *cast = argument;
    usp_rest(cast->delay + (int)(cast->seed % 20));
    *cast->struck = usp_seconds();
    kill(getpid(), cast->signal);
    return NULL;
}

/* The signal comes in the middle of exchanges. A dead rank is missed at once, a stopped one within the time limit. */
static int usp_check_survivor(const usp_cast *cast, usp_transport *transport) {
    char odd[32];
    usp_words(odd, cast->odd);
    int stopped = cast->signal == SIGSTOP;
    int wrong = usp_check_failure(transport, usp_run_ring(transport), stopped ? USP_TIMEOUT : USP_PEER_LOST, odd);
    double late = usp_seconds() - *cast->struck, limit = stopped ? 1e-3 * cast->timeout_ms + 1.0 : 1.0;
    wrong += usp_check(transport, late < limit, "noticed after %.3f s", late);
    return wrong +
           usp_check_failure(transport, usp_transport_poll(transport), stopped ? USP_TIMEOUT : USP_PEER_LOST, odd);
}

static int usp_scene_struck(const usp_cast *cast, usp_host *host, usp_device *device) {
    usp_circle circle = usp_circle_make(cast, -1);
    usp_transport *transport;
    pthread_t thread;
    usp_cast own = *cast;
    if (usp_check(NULL, usp_join(&circle, host, device, &transport) == USP_OK, "join: %s", usp_last_error())) return 1;
    if (cast->rank == cast->odd && pthread_create(&thread, NULL, usp_strike_soon, &own) != 0) return 1;
    int wrong = usp_check_survivor(cast, transport);
    usp_transport_end(transport);
    own.timeout_ms = 10000;
    return wrong + usp_play_world(&own, cast->odd, host, device);
}

static int usp_scene_gather_struck(const usp_cast *cast, usp_host *host, usp_device *device) {
    usp_circle circle = usp_circle_make(cast, -1);
    usp_transport *transport;
    char odd[32], all[USP_MOST];
    usp_words(odd, cast->odd);
    if (usp_check(NULL, usp_join(&circle, host, device, &transport) == USP_OK, "join: %s", usp_last_error())) return 1;
    if (cast->rank == cast->odd) kill(getpid(), cast->signal);
    usp_status wanted = cast->signal == SIGSTOP ? USP_TIMEOUT : USP_PEER_LOST;
    int wrong = usp_check_failure(transport, usp_transport_allgather(transport, odd, all, 1), wanted, odd);
    usp_transport_end(transport);
    return wrong;
}

/* The odd rank stays alive and simply does not come. */
static int usp_scene_late(const usp_cast *cast, usp_host *host, usp_device *device) {
    usp_circle circle = usp_circle_make(cast, -1);
    usp_transport *transport;
    char odd[32];
    usp_words(odd, cast->odd);
    if (usp_check(NULL, usp_join(&circle, host, device, &transport) == USP_OK, "join: %s", usp_last_error())) return 1;
    for (int i = 0; i < 10; i++) usp_ring_step(transport, 100);
    if (cast->rank == cast->odd) usp_rest(2 * cast->timeout_ms);
    int wrong = usp_check_failure(transport, usp_run_ring(transport), USP_TIMEOUT, odd);
    usp_transport_end(transport);
    return wrong;
}

/* Each rank waits for the next one, the first rank longest: it must look past those that wait themselves. */
static int usp_scene_chain(const usp_cast *cast, usp_host *host, usp_device *device) {
    usp_circle circle = usp_circle_make(cast, -1);
    usp_transport *transport;
    char last[32], byte = 0;
    if (usp_check(NULL, usp_join(&circle, host, device, &transport) == USP_OK, "join: %s", usp_last_error())) return 1;
    usp_message send = usp_message_whole(transport->rank - 1, &byte, 1);
    usp_message recv = usp_message_whole(transport->rank + 1, &byte, 1);
    usp_words(last, transport->size - 1);
    int is_last = transport->rank == transport->size - 1;
    usp_rest(is_last ? 2 * cast->timeout_ms : 40 * transport->rank);
    usp_status status = transport->ops->exchange(transport, 0, NULL, 0, &recv, !is_last, NULL);
    if (status == USP_OK) status = transport->ops->exchange(transport, 0, &send, 1, NULL, 0, NULL);
    int wrong = usp_check_failure(transport, status, USP_TIMEOUT, last);
    usp_transport_end(transport);
    return wrong;
}

/* Rank 1 is stopped while it waits for rank 2, which is slow but comes: rank 0, which waits for rank 1, and rank 2 must
 * not blame each other. */
static int usp_scene_stopped_waiting(const usp_cast *cast, usp_host *host, usp_device *device) {
    usp_circle circle = usp_circle_make(cast, -1);
    usp_transport *transport;
    pthread_t thread;
    usp_cast own = *cast;
    char byte = 0;
    if (usp_check(NULL, usp_join(&circle, host, device, &transport) == USP_OK, "join: %s", usp_last_error())) return 1;
    if (cast->rank == 1 && pthread_create(&thread, NULL, usp_strike_soon, &own) != 0) return 1;
    usp_message recv = usp_message_whole(cast->rank == 1 ? 2 : 1, &byte, 1);
    if (cast->rank == 2) usp_rest(cast->timeout_ms * 3 / 4);
    int wrong = usp_check_failure(transport, transport->ops->exchange(transport, 0, NULL, 0, &recv, 1, NULL),
                                  USP_TIMEOUT, "rank 1 ");
    usp_transport_end(transport);
    return wrong;
}

static int usp_scene_left_gather(const usp_cast *cast, usp_host *host, usp_device *device) {
    usp_circle circle = usp_circle_make(cast, -1);
    usp_transport *transport;
    char odd[32], all[USP_MOST];
    int wrong = 0;
    usp_words(odd, cast->odd);
    if (usp_check(NULL, usp_join(&circle, host, device, &transport) == USP_OK, "join: %s", usp_last_error())) return 1;
    double start = usp_seconds();
    if (cast->rank == cast->odd)
        usp_rest(100);
    else
        wrong = usp_check_failure(transport, usp_transport_allgather(transport, odd, all, 1), USP_PEER_LOST, odd);
    wrong += usp_check(transport, usp_seconds() - start < 2, "a rank that left was waited for");
    usp_transport_end(transport);
    return wrong;
}

static int usp_scene_left(const usp_cast *cast, usp_host *host, usp_device *device) {
    usp_circle circle = usp_circle_make(cast, -1);
    usp_transport *transport;
    char odd[32];
    int wrong = 0;
    usp_words(odd, cast->odd);
    if (usp_check(NULL, usp_join(&circle, host, device, &transport) == USP_OK, "join: %s", usp_last_error())) return 1;
    double start = usp_seconds();
    if (cast->rank != cast->odd) wrong = usp_check_failure(transport, usp_run_ring(transport), USP_PEER_LOST, odd);
    wrong += usp_check(transport, usp_seconds() - start < 2, "a rank that left was waited for");
    usp_transport_end(transport);
    return wrong;
}

static void *usp_abort_soon(void *argument) {
    usp_transport *transport = argument;
    usp_rest(10);
    for (int i = 0; i < 3; i++) usp_transport_abort(transport);
    return NULL;
}

static int usp_scene_abort(const usp_cast *cast, usp_host *host, usp_device *device) {
    usp_circle circle = usp_circle_make(cast, -1);
    usp_transport *transport;
    pthread_t thread;
    char odd[32];
    usp_words(odd, cast->odd);
    if (usp_check(NULL, usp_join(&circle, host, device, &transport) == USP_OK, "join: %s", usp_last_error())) return 1;
    if (cast->rank == cast->odd && pthread_create(&thread, NULL, usp_abort_soon, transport) != 0) return 1;
    int wrong = usp_check_failure(transport, usp_run_ring(transport), USP_COMM, odd);
    if (cast->rank == cast->odd) pthread_join(thread, NULL);
    usp_transport_end(transport);
    return wrong;
}

static int usp_scene_mismatch(const usp_cast *cast, usp_host *host, usp_device *device) {
    usp_circle circle = usp_circle_make(cast, -1);
    usp_transport *transport;
    if (usp_check(NULL, usp_join(&circle, host, device, &transport) == USP_OK, "join: %s", usp_last_error())) return 1;
    int wrong = usp_check_transport_mismatch(transport);
    usp_transport_end(transport);
    return wrong;
}

/* Memory that ends after some allocations. */
static void *usp_spend(void *user, size_t bytes) {
    int *left = user;
    return (*left)-- > 0 ? malloc(bytes) : NULL;
}

static void usp_return(void *user, void *memory) {
    (void)user;
    free(memory);
}

/* Every allocation of the odd rank fails once: all ranks leave, and the next try is as good as the first. */
static int usp_scene_memory(const usp_cast *cast, usp_host *host, usp_device *device) {
    usp_circle circle = usp_circle_make(cast, -1);
    usp_transport *transport;
    char odd[32];
    int wrong = 0, tries = 0, left = 0;
    (void)host;
    usp_words(odd, cast->odd);
    usp_host poor = {.alloc = usp_spend, .free = usp_return, .user = &left};
    usp_status wanted = cast->rank == cast->odd ? USP_NO_MEMORY : USP_PEER_FAILED, status = wanted;
    for (; status == wanted && tries < 50; tries++) {
        left = cast->rank == cast->odd ? tries : 1000;
        status = usp_join(&circle, &poor, device, &transport);
        if (status != USP_OK) wrong += usp_check_failure(NULL, status, wanted, cast->rank == cast->odd ? "" : odd);
    }
    wrong += usp_check(NULL, status == USP_OK && tries > 2, "%d allocations, then: %s", tries, usp_last_error());
    if (status != USP_OK) return wrong;
    wrong += usp_check_transport(transport, 3);
    usp_transport_end(transport);
    return wrong;
}

/* The own established connections in the order in which they were made: for two ranks control, then data. */
static int usp_find_connection(int index) {
    for (int i = 3; i < 1024; i++) {
        struct tcp_info info;
        socklen_t length = sizeof info;
        if (getsockopt(i, IPPROTO_TCP, TCP_INFO, &info, &length) == 0 && info.tcpi_state == TCP_ESTABLISHED &&
            index-- == 0)
            return i;
    }
    exit(1);
}

/* The world has failed and the other rank leaves: nothing is left to do. */
static int usp_check_rest(usp_transport *transport) {
    usp_rest(1200);
    clock_t begin = clock();
    usp_rest(500);
    double busy = (double)(clock() - begin) / CLOCKS_PER_SEC;
    return usp_check(transport, busy < 0.1, "busy for %.1f s", busy);
}

/* Both ranks live, and a connection between them does not, or carries what no rank says: three sentences, all COMM. */
static int usp_check_cut(const usp_cast *cast, usp_host *host, usp_device *device, int index, const char *words) {
    usp_circle circle = usp_circle_make(cast, -1);
    usp_transport *transport;
    if (usp_check(NULL, usp_join(&circle, host, device, &transport) == USP_OK, "join: %s", usp_last_error())) return 1;
    for (int i = 0; i < 10; i++) usp_ring_step(transport, 100);
    if (cast->rank == cast->odd && index >= 0) shutdown(usp_find_connection(index), SHUT_RDWR);
    if (cast->rank == cast->odd && index < 0) send(usp_find_connection(0), "nonsense of 16 b and more of it", 31, 0);
    double start = usp_seconds();
    usp_status status = usp_run_ring(transport);
    double took = usp_seconds() - start;
    int wrong = usp_check_failure(transport, status, USP_COMM, words) +
                usp_check(transport, took < 2, "known after %.1f s", took);
    wrong += usp_check(transport, strstr(usp_last_error(), "rank 0") && strstr(usp_last_error(), "rank 1"), "who? %s",
                       usp_last_error());
    usp_rest(300); /* or the other, which has yet to look, finds this one gone */
    if (cast->rank != cast->odd && index < 0) wrong += usp_check_rest(transport);
    usp_transport_end(transport);
    return wrong;
}

static int usp_scene_cut_data(const usp_cast *cast, usp_host *host, usp_device *device) {
    return usp_check_cut(cast, host, device, 1, "the data connection between ");
}

static int usp_scene_cut_control(const usp_cast *cast, usp_host *host, usp_device *device) {
    return usp_check_cut(cast, host, device, 0, "the control line between ");
}

static int usp_scene_nonsense(const usp_cast *cast, usp_host *host, usp_device *device) {
    return usp_check_cut(cast, host, device, -1, "hears nonsense");
}

/* The odd rank dies and a child of its fork keeps its connections: it is silent, and that is noticed. */
static int usp_scene_child_holds(const usp_cast *cast, usp_host *host, usp_device *device) {
    usp_circle circle = usp_circle_make(cast, -1);
    usp_bootstrap bootstrap = {.gather = usp_circle_gather, .user = &circle, .rank = circle.rank, .size = circle.size};
    usp_transport_config config = {.device = device, .host = host, .timeout_ms = cast->timeout_ms, .silence_ms = 800};
    usp_transport *transport;
    char odd[32];
    usp_words(odd, cast->odd);
    if (usp_check(NULL, usp_make_socket(&config, &bootstrap, &transport) == USP_OK, "join: %s", usp_last_error()))
        return 1;
    if (cast->rank == cast->odd) {
        if (fork() == 0) {
            usp_rest(6000);
            _exit(0);
        }
        raise(SIGKILL);
    }
    double start = usp_seconds();
    int wrong = usp_check_failure(transport, usp_run_ring(transport), USP_TIMEOUT, odd);
    wrong += usp_check(transport, usp_seconds() - start < 3, "noticed after %.1f s", usp_seconds() - start);
    usp_transport_end(transport);
    return wrong;
}

/* ---- scenes of the environment ----------------------------------------------------------------------------------- */

static void usp_set_number(const char *name, int value) {
    char text[16];
    snprintf(text, sizeof text, "%d", value);
    setenv(name, text, 1);
}

static void usp_set_environment(const usp_cast *cast) {
    usp_set_number("RANK", cast->rank);
    usp_set_number("WORLD_SIZE", cast->size);
    usp_set_number("LOCAL_RANK", cast->rank);
    usp_set_number("MASTER_PORT", cast->port);
    setenv("MASTER_ADDR", "127.0.0.1", 1);
}

/* Talks nonsense to the meeting, some of it in the right form, and stays. */
static void usp_annoy(int port) {
    const struct {
        char magic[8];
        int from, to, size, port;
        char nonce[16], proof[8];
    } forged = {"usp tcp", 1, 0, 4, port, "any", "none"};
    char hello[sizeof forged];
    memcpy(hello, &forged, sizeof hello);
    hello[7] = '2';
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    for (int i = 0; i < 20; i++) {
        int stranger = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        if (connect(stranger, (struct sockaddr *)&address, sizeof address) != 0)
            usp_rest(5);
        else if (i % 3 == 1)
            send(stranger, "GET / HTTP/1.0\r\n\r\n and much more of the same kind", 50, MSG_NOSIGNAL);
        else if (i % 3 == 2)
            send(stranger, hello, sizeof hello, MSG_NOSIGNAL);
    }
}

static int usp_scene_environment(const usp_cast *cast, usp_host *host, usp_device *device) {
    usp_environment *environment;
    usp_transport *transport;
    usp_set_environment(cast);
    if (cast->rank == cast->size - 1) usp_annoy(cast->port);
    usp_status status = usp_environment_open(host, cast->timeout_ms, &environment);
    if (usp_check(NULL, status == USP_OK, "environment of rank %d: %s", cast->rank, usp_last_error())) return 1;
    int wrong = usp_check(NULL, usp_environment_local_rank(environment) == cast->rank, "wrong local rank");
    usp_transport_config config = {
        .device = device, .host = host, .timeout_ms = cast->timeout_ms, .silence_ms = cast->timeout_ms};
    usp_bootstrap bootstrap = usp_environment_bootstrap(environment);
    status = usp_make_socket(&config, &bootstrap, &transport);
    usp_environment_close(environment);
    if (usp_check(NULL, status == USP_OK, "socket transport: %s", usp_last_error())) return 1;
    wrong += usp_check_transport(transport, 5);
    usp_transport_end(transport);
    return wrong;
}

/* Takes all descriptors but some. */
static void usp_take_descriptors(int but) {
    int last = -1, next;
    setrlimit(RLIMIT_NOFILE, &(struct rlimit){100, 100});
    while ((next = dup(0)) >= 0) last = next;
    for (int i = 0; i < but; i++) close(last - i);
}

/* The last rank has descriptors to listen and none to call: it knows at once, and tells the others where it has a line,
 * who see that it has gone where it has none. */
static int usp_scene_no_call(const usp_cast *cast, usp_host *host, usp_device *device) {
    usp_circle circle = usp_circle_make(cast, -1);
    usp_transport *transport;
    int odd = cast->rank == cast->size - 1;
    char name[32];
    usp_words(name, cast->size - 1);
    if (odd) usp_take_descriptors(4);
    double start = usp_seconds();
    usp_status status = usp_join(&circle, host, device, &transport);
    int wrong = usp_check(NULL, odd ? status == USP_COMM : status == USP_PEER_FAILED || status == USP_PEER_LOST,
                          "rank %d: status %d", cast->rank, (int)status);
    wrong += usp_check_failure(NULL, status, status, odd ? "no socket" : name);
    return wrong + usp_check(NULL, usp_seconds() - start < 3, "found out after %.1f s", usp_seconds() - start);
}

/* A bootstrap after which the odd rank is late to call. */
static usp_status usp_late_gather(void *user, const void *mine, void *all, size_t bytes) {
    const usp_circle *circle = user;
    usp_status status = usp_circle_gather(user, mine, all, bytes);
    if (circle->cast->rank == circle->cast->odd) usp_rest(1300);
    return status;
}

/* Others have called the odd rank, or waited for its call, for more than a round: it still comes. */
static int usp_scene_late_call(const usp_cast *cast, usp_host *host, usp_device *device) {
    usp_circle circle = usp_circle_make(cast, -1);
    usp_bootstrap bootstrap = {.gather = usp_late_gather, .user = &circle, .rank = circle.rank, .size = circle.size};
    usp_transport_config config = {
        .device = device, .host = host, .timeout_ms = cast->timeout_ms, .silence_ms = cast->timeout_ms};
    usp_transport *transport;
    usp_status status = usp_make_socket(&config, &bootstrap, &transport);
    if (usp_check(NULL, status == USP_OK, "rank %d: %s", cast->rank, usp_last_error())) return 1;
    int wrong = usp_check_transport(transport, 7);
    usp_transport_end(transport);
    return wrong;
}

/* The odd rank and the one after it never come, and rank 0 comes late: rank 1, whose own time is over by then, waits
 * for its verdict. A machine with much else to do may wake rank 0 seconds later. */
static int usp_scene_environment_absent(const usp_cast *cast, usp_host *host, usp_device *device) {
    usp_environment *environment;
    char absent[32];
    (void)device;
    usp_set_environment(cast);
    if (cast->rank == cast->odd || cast->rank == cast->odd + 1) return 0;
    if (cast->rank == 0) usp_rest(cast->timeout_ms);
    usp_status status = usp_environment_open(host, 12 * cast->timeout_ms, &environment);
    snprintf(absent, sizeof absent, ": rank %d, rank %d", cast->odd, cast->odd + 1);
    return usp_check_failure(NULL, status, USP_TIMEOUT, absent);
}

/* ---- the stage --------------------------------------------------------------------------------------------------- */

/* One rank's process. */
static int usp_act(const usp_cast *cast, usp_scene scene) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    alarm(USP_CHILD_SECONDS);
    usp_world_config defaults = {.struct_size = sizeof defaults};
    usp_host host = usp_host_from_config(&defaults);
    usp_device *device;
    if (usp_check(NULL, usp_device_create_cpu(&host, &device) == USP_OK, "no device")) return 1;
    int wrong = scene(cast, &host, device);
    device->ops->destroy(device);
    return wrong != 0;
}

/* Waits for the ranks that go on; one that was hit must have died of it, or is still there and is ended here. */
static int usp_reap(const usp_cast *cast, const pid_t *children) {
    int wrong = 0, state;
    for (int i = 0; i < cast->size; i++) {
        if (cast->signal && i == cast->odd) continue;
        waitpid(children[i], &state, 0);
        wrong += usp_check(NULL, WIFEXITED(state) && WEXITSTATUS(state) == 0, "rank %d ended with state %d", i, state);
    }
    if (!cast->signal) return wrong;
    if (cast->signal == SIGSTOP) kill(children[cast->odd], SIGKILL);
    waitpid(children[cast->odd], &state, 0);
    int killed = WIFSIGNALED(state) && WTERMSIG(state) == SIGKILL;
    return wrong + usp_check(NULL, killed, "the hit rank has state %d", state);
}

static void usp_open_pipes(int size, int pipes[USP_MOST][USP_MOST]) {
    for (int i = 0; i < size; i++)
        for (int j = 0; j < i; j++) {
            int pair[2];
            if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) != 0) exit(1);
            pipes[i][j] = pair[0];
            pipes[j][i] = pair[1];
        }
}

static void usp_close_pipes(int size, int pipes[USP_MOST][USP_MOST], int except) {
    for (int i = 0; i < size; i++)
        for (int j = 0; j < size; j++)
            if (i != j && i != except) close(pipes[i][j]);
}

static int usp_play(usp_scene scene, usp_cast cast) {
    int pipes[USP_MOST][USP_MOST];
    pid_t children[USP_MOST];
    fflush(stdout);
    usp_open_pipes(cast.size, pipes);
    for (cast.rank = 0; cast.rank < cast.size; cast.rank++) {
        children[cast.rank] = fork();
        if (children[cast.rank] < 0) exit(1);
        if (children[cast.rank] > 0) continue;
        usp_close_pipes(cast.size, pipes, cast.rank);
        cast.pipe = pipes[cast.rank];
        exit(usp_act(&cast, scene));
    }
    usp_close_pipes(cast.size, pipes, -1);
    return usp_reap(&cast, children);
}

static int usp_check_deaths(double *struck) {
    int wrong = 0;
    for (unsigned seed = 0; seed < 8; seed++) {
        int size = 2 + (int)(seed % 4), odd = (int)(seed * 7 + 1) % size;
        usp_cast cast = {.size = size, .timeout_ms = 10000, .odd = odd, .seed = seed, .struck = struck};
        cast.signal = SIGKILL;
        cast.delay = 30;
        wrong += usp_play(usp_scene_struck, cast);
        cast.signal = SIGSTOP;
        cast.timeout_ms = 600;
        if (seed % 2) wrong += usp_play(usp_scene_struck, cast);
    }
    return wrong;
}

/* What breaks between ranks that live, and a death that no connection tells. */
static int usp_check_lines(void) {
    usp_cast cast = {.size = 2, .timeout_ms = 10000};
    int wrong = 0;
    for (cast.odd = 0; cast.odd < 2; cast.odd++) {
        wrong += usp_play(usp_scene_cut_data, cast) + usp_play(usp_scene_cut_control, cast);
        wrong += usp_play(usp_scene_nonsense, cast);
    }
    cast = (usp_cast){.size = 3, .timeout_ms = 10000, .odd = 1, .signal = SIGKILL};
    return wrong + usp_play(usp_scene_child_holds, cast);
}

static int usp_check_others(double *struck) {
    usp_cast cast = {.size = 4, .timeout_ms = 10000, .odd = 2, .port = usp_free_port()};
    int wrong = usp_play(usp_scene_left, cast) + usp_play(usp_scene_abort, cast) + usp_play(usp_scene_mismatch, cast);
    wrong += usp_play(usp_scene_environment, cast) + usp_play(usp_scene_left_gather, cast);
    wrong += usp_play(usp_scene_memory, cast) + usp_play(usp_scene_no_call, cast);
    for (cast.odd = 0; cast.odd < 2; cast.odd++) wrong += usp_play(usp_scene_late_call, cast);
    cast.odd = 2;
    cast.timeout_ms = 500;
    wrong +=
        usp_play(usp_scene_chain, cast) + usp_play(usp_scene_late, cast) + usp_play(usp_scene_environment_absent, cast);
    cast.size = 1;
    cast.odd = 0;
    wrong += usp_play(usp_scene_environment, cast);
    cast.timeout_ms = 500;
    cast.size = 3;
    cast.signal = SIGSTOP;
    cast.struck = struck;
    wrong += usp_play(usp_scene_gather_struck, cast);
    cast.odd = 1;
    cast.delay = 200; /* several beats */
    wrong += usp_play(usp_scene_stopped_waiting, cast);
    cast.signal = SIGKILL;
    cast.timeout_ms = 10000;
    return wrong + usp_play(usp_scene_gather_struck, cast);
}

int main(void) {
    int wrong = 0;
    double *struck = mmap(NULL, sizeof *struck, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (struck == MAP_FAILED) return 1;
    for (int size = 1; size <= USP_MOST; size++)
        wrong += usp_play(usp_scene_conformance, (usp_cast){.size = size, .timeout_ms = 20000});
    wrong += usp_play(usp_scene_conformance, (usp_cast){.size = 2, .timeout_ms = -1, .seed = 9});
    wrong += usp_check_deaths(struck) + usp_check_lines() + usp_check_others(struck);
    munmap(struck, sizeof *struck);
    printf("%s: %d wrong\n", wrong ? "FAIL" : "ok", wrong);
    return wrong != 0;
}
