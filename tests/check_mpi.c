/* check_mpi.c - the MPI transport: conformance, and the ways in which a rank can let the others down. A plain program
 * for mpirun with 2 ranks or more; a death is not tried, since mpirun ends all ranks then. */
#define _POSIX_C_SOURCE 200809L
#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "conformance.h"
#include "split.h"
#include "error.h"

enum { CALM_MS = 30000, LIMIT_MS = 500, MARGIN_MS = 1500, GUARD = 0x5a };

/* `mine`: a failure that this rank comes with, its sentence recorded. */
static usp_status make(const usp_transport_config *config, int fortran_comm, usp_status mine,
                       usp_transport **transport) {
    usp_meeting meeting = {.all = NULL};
    usp_meeting_note(&meeting, mine);
    usp_status status = usp_transport_create_mpi(config, &meeting, fortran_comm, transport);
    usp_meeting_end(&meeting);
    return status;
}

/* One scene on a transport of its own; returns how many things went wrong. */
typedef int (*usp_scene)(usp_transport *transport);

static double now_ms(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec * 1e3 + (double)now.tv_nsec * 1e-6;
}

static void rest(int milliseconds) {
    const struct timespec time = {milliseconds / 1000, milliseconds % 1000 * 1000000L};
    nanosleep(&time, NULL);
}

/* ---- scenes ------------------------------------------------------------------------------------------------------ */

static int conform(usp_transport *transport) {
    int wrong = 0;
    for (unsigned seed = 1; seed <= 3 && !wrong; seed++) wrong = usp_check_transport(transport, seed);
    return wrong;
}

static int refuse_split(usp_transport *transport) {
    struct ncclComm *child = NULL;
    return usp_check_failure(transport, usp_nccl_split(transport, 0, 0, &child), USP_UNSUPPORTED, "NCCL");
}

/* Rank 0 sends rank 1 another size than it expects. Every rank hears of it; nothing is written behind the buffer. */
static int mismatch(usp_transport *transport, size_t sent, size_t expected, const char *words) {
    char data[256], untouched[256];
    usp_message send = usp_message_whole(1, data, sent);
    usp_message recv = usp_message_whole(0, data, expected);
    usp_status status = USP_OK;
    memset(data, GUARD, sizeof data);
    memset(untouched, GUARD, sizeof untouched);
    if (transport->rank == 0) memset(data, 1, sizeof data);
    if (transport->rank == 0) status = transport->ops->exchange(transport, 0, &send, 1, NULL, 0, NULL);
    if (transport->rank == 1) status = transport->ops->exchange(transport, 0, NULL, 0, &recv, 1, NULL);
    if (status == USP_OK) status = usp_transport_allgather(transport, data, data, 0);
    int wrong = usp_check_failure(transport, status, USP_COMM, words);
    if (transport->rank == 1)
        wrong += usp_check(transport, memcmp(data + expected, untouched, sizeof data - expected) == 0,
                           "bytes behind the buffer were written");
    return wrong + usp_check_failure(transport, usp_transport_poll(transport), USP_COMM, words);
}

static int too_long(usp_transport *transport) {
    return mismatch(transport, 64, 32, "rank 0 sends more than the 32 bytes that rank 1 expects");
}

static int too_short(usp_transport *transport) {
    return mismatch(transport, 32, 64, "rank 0 sends 32 bytes to rank 1, which expects 64");
}

/* Rank 0 lives but does not come. The others name it in time. */
static int stay_away(usp_transport *transport) {
    char byte = 0;
    usp_message recv = usp_message_whole(0, &byte, 1);
    double begin = now_ms();
    if (transport->rank == 0) rest(LIMIT_MS + MARGIN_MS);
    usp_status status = transport->ops->exchange(transport, 0, NULL, 0, &recv, transport->rank != 0, NULL);
    double took = now_ms() - begin;
    int wrong = usp_check_failure(transport, status, USP_TIMEOUT, "rank 0");
    if (transport->rank == 0) return wrong;
    return wrong +
           usp_check(transport, took >= LIMIT_MS - 1 && took < LIMIT_MS + MARGIN_MS, "answered after %.0f ms", took);
}

/* Rank 0 gives up while the others wait for it. */
static int give_up(usp_transport *transport) {
    char byte = 0;
    usp_message recv = usp_message_whole(0, &byte, 1);
    if (transport->rank == 0) usp_transport_abort(transport);
    usp_status status = transport->ops->exchange(transport, 0, NULL, 0, &recv, transport->rank != 0, NULL);
    return usp_check_failure(transport, status, USP_COMM, "rank 0");
}

/* Rank 0 leaves in peace while the others wait for it: at the time limit they know. */
static int leave(usp_transport *transport) {
    char byte = 0;
    usp_message recv = usp_message_whole(0, &byte, 1);
    if (transport->rank == 0) return 0;
    return usp_check_failure(transport, transport->ops->exchange(transport, 0, NULL, 0, &recv, 1, NULL), USP_PEER_LOST,
                             "rank 0");
}

/* ---- creation that is late --------------------------------------------------------------------------------------- */

/* Memory that is given back but never used again, so that whoever still writes there is seen. */
typedef struct block {
    struct block *next;
    size_t bytes;
    int is_back;
    _Alignas(16) unsigned char data[];
} block;

typedef struct memory {
    block *blocks;
    int calls, slow_call; /* the allocation in which this rank is late; 0: none */
} memory;

static void *take(void *user, size_t bytes) {
    memory *m = user;
    block *one = malloc(sizeof *one + bytes);
    if (++m->calls == m->slow_call) rest(2 * LIMIT_MS);
    if (one == NULL) return NULL;
    *one = (block){.next = m->blocks, .bytes = bytes};
    m->blocks = one;
    return one->data;
}

static void give_back(void *user, void *data) {
    memory *m = user;
    for (block *one = m->blocks; one != NULL; one = one->next) {
        if (one->data != data) continue;
        one->is_back = 1;
        memset(one->data, GUARD, one->bytes);
    }
}

static int written_after(const memory *m) {
    int wrong = 0;
    for (const block *one = m->blocks; one != NULL; one = one->next)
        for (size_t i = 0; one->is_back && i < one->bytes; i++) wrong += one->data[i] != GUARD;
    return wrong;
}

/* Rank 0 is late in one of its allocations, and MPI ends what the others have given up. All are told in time, and MPI
 * writes to no memory that was given back. */
static int come_late(const usp_transport_config *config, int slow_call) {
    memory m = {.slow_call = 0}; /* never freed: some of it is left to MPI */
    usp_host careful = {.alloc = take, .free = give_back, .user = &m};
    usp_transport_config own = {
        .device = config->device, .host = &careful, .timeout_ms = LIMIT_MS, .silence_ms = LIMIT_MS};
    usp_transport *transport = NULL;
    int rank = 0, all = 0;
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    if (rank == 0) m.slow_call = slow_call;
    double begin = now_ms();
    usp_status status = make(&own, MPI_Comm_c2f(MPI_COMM_WORLD), USP_OK, &transport);
    double took = now_ms() - begin;
    int wrong = usp_check_failure(NULL, status, USP_TIMEOUT, "within 500 ms");
    wrong += usp_check(NULL, took < 3 * LIMIT_MS + MARGIN_MS, "answered after %.0f ms", took);
    for (int i = 0; i < 20; i++) MPI_Barrier(MPI_COMM_WORLD);
    int written = written_after(&m);
    wrong += usp_check(NULL, written == 0, "rank %d: %d bytes were written after they were freed", rank, written);
    MPI_Allreduce(&wrong, &all, 1, MPI_INT, MPI_SUM, MPI_COMM_WORLD);
    if (rank == 0) printf("late in allocation %d: %s\n", slow_call, all == 0 ? "ok" : "failed");
    return all;
}

/* Rank 1 comes with a failure of its own: all hear of it at once, and the communicator is fit for another try. */
static int fail_first(const usp_transport_config *config) {
    int rank = 0, all = 0;
    usp_transport *transport = NULL;
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    usp_status mine = rank == 1 ? usp_fail(USP_INVALID, "a wrong field") : USP_OK;
    usp_transport_config own = {.device = rank == 1 ? NULL : config->device,
                                .host = config->host,
                                .timeout_ms = CALM_MS,
                                .silence_ms = CALM_MS};
    usp_status status = make(&own, MPI_Comm_c2f(MPI_COMM_WORLD), mine, &transport);
    int wrong = rank == 1 ? usp_check_failure(NULL, status, USP_INVALID, "a wrong field")
                          : usp_check_failure(NULL, status, USP_PEER_FAILED, "rank 1");
    MPI_Allreduce(&wrong, &all, 1, MPI_INT, MPI_SUM, MPI_COMM_WORLD);
    if (rank == 0) printf("a rank that failed before: %s\n", all == 0 ? "ok" : "failed");
    return all;
}

/* Numbers that are no communicator, on every rank. */
static int refuse_handles(const usp_transport_config *config) {
    const int handles[] = {-1, 12345, MPI_Comm_c2f(MPI_COMM_NULL)};
    int wrong = 0;
    for (int i = 0; i < 3; i++) {
        usp_transport *transport = NULL;
        wrong += usp_check_failure(NULL, make(config, handles[i], USP_OK, &transport), USP_INVALID, "no communicator");
    }
    return wrong;
}

/* ---- the play ---------------------------------------------------------------------------------------------------- */

static int play(const usp_transport_config *config, int timeout_ms, const char *name, usp_scene scene) {
    usp_transport_config own = *config;
    usp_transport *transport = NULL;
    own.timeout_ms = own.silence_ms = timeout_ms;
    usp_status status = make(&own, MPI_Comm_c2f(MPI_COMM_WORLD), USP_OK, &transport);
    if (usp_check(NULL, status == USP_OK, "%s: not created: %s", name, usp_last_error())) return 1;
    int rank = transport->rank, wrong = scene(transport), all = 0;
    usp_transport_end(transport);
    MPI_Allreduce(&wrong, &all, 1, MPI_INT, MPI_SUM, MPI_COMM_WORLD); /* the caller's communicator lives on */
    if (rank == 0) printf("%s: %s\n", name, all == 0 ? "ok" : "failed");
    return all;
}

static int play_all(const usp_transport_config *config) {
    int wrong = play(config, CALM_MS, "conformance", conform);
    wrong += play(config, CALM_MS, "split", refuse_split);
    wrong += play(config, CALM_MS, "too long", too_long);
    wrong += play(config, CALM_MS, "too short", too_short);
    wrong += play(config, LIMIT_MS, "stay away", stay_away);
    wrong += play(config, CALM_MS, "give up", give_up);
    wrong += play(config, LIMIT_MS, "leave", leave);
    wrong += fail_first(config) + refuse_handles(config);
    wrong += come_late(config, 1) + come_late(config, 3); /* in the transport's part and in the control channel's */
    return wrong + play(config, CALM_MS, "conformance again", conform);
}

static int refuse_early(const usp_transport_config *config) {
    usp_transport *transport = NULL;
    return usp_check_failure(NULL, make(config, 0, USP_OK, &transport), USP_INVALID, "MPI is not initialised");
}

int main(int count, char **arguments) {
    usp_world_config defaults = {.struct_size = sizeof defaults};
    usp_host host = usp_host_from_config(&defaults);
    usp_transport_config config = {.host = &host, .timeout_ms = CALM_MS};
    int provided = 0;
    if (usp_check(NULL, usp_device_create_cpu(&host, &config.device) == USP_OK, "no device")) return 1;
    int wrong = refuse_early(&config);
    MPI_Init_thread(&count, &arguments, MPI_THREAD_FUNNELED, &provided);
    wrong += play_all(&config);
    MPI_Finalize();
    config.device->ops->destroy(config.device);
    return wrong != 0;
}
