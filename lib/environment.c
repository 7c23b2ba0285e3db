/* environment.c - what a launcher tells a process through its environment, and a first meeting of its ranks over TCP.
 * It reads no file and asks no launcher; after the meeting the ranks use connections of their own.
 *
 * Rank 0 gathers and scatters. A launcher may itself listen on the port it announces (torchrun does), so there are a
 * few ports; the greeting of tcp.h tells rank 0 from whatever else answers. */
#define _GNU_SOURCE
#include "environment.h"
#include "error.h"
#include "hash.h"
#include "tcp.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum {
    USP_LAST_PORT = 65535,
    USP_PORTS = 8,
    USP_IPS = 8,
    USP_MOST_RANKS = 1 << 16,
    USP_ATTEMPT_MS = 1000,
    USP_PAUSE_MS = 20
};

/* The variables of one launcher. It is there if `size` is set. */
typedef struct usp_launcher {
    const char *name, *rank, *size, *local_rank;
    const char *job, *step;         /* name the job, and one of several groups of ranks that run in it */
    const char *local_size, *hosts; /* tell whether all ranks are on this host; both NULL: address required */
} usp_launcher;

static const usp_launcher launchers[] = {
    {"torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RUN_ID", NULL, NULL, NULL},
    {"Open MPI", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "PMIX_NAMESPACE", NULL,
     "OMPI_COMM_WORLD_LOCAL_SIZE", NULL},
    {"SLURM", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_JOB_ID", "SLURM_STEP_ID", NULL,
     "SLURM_STEP_NUM_NODES"},
    {"PMI", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "PMI_ID", NULL, "MPI_LOCALNRANKS", NULL},
};

struct usp_environment {
    const usp_host *host;
    usp_placement placement;
    int timeout_ms;
    int *connections; /* [size]: rank 0 to all others, the others to rank 0 alone */
};

/* ---- reading ----------------------------------------------------------------------------------------------------- */

/* The whole value must be a decimal number in the range. */
static usp_status read_number(const char *name, int low, int high, int *value) {
    const char *text = secure_getenv(name);
    if (!text) return usp_fail(USP_INVALID, "the variable %s is not set", name);
    size_t digits = strspn(text, "0123456789");
    long number = digits > 0 && digits < 10 && !text[digits] ? strtol(text, NULL, 10) : -1;
    if (number < low || number > high)
        return usp_fail(USP_INVALID, "the variable %s is '%.40s', not a number from %d to %d", name, text, low, high);
    *value = (int)number;
    return USP_OK;
}

static usp_status copy_text(const char *name, const char *text, char *copy, size_t capacity) {
    if (strlen(text) >= capacity) return usp_fail(USP_INVALID, "the variable %s is too long", name);
    strcpy(copy, text);
    return USP_OK;
}

static usp_status read_job(const usp_launcher *launcher, usp_placement *placement) {
    int own = secure_getenv("USP_JOB_TOKEN") != NULL; /* the caller's own name for it, whoever started the ranks */
    const char *name = own ? "USP_JOB_TOKEN" : launcher->job;
    const char *job = secure_getenv(name), *step = own || !launcher->step ? NULL : secure_getenv(launcher->step);
    char text[2 * sizeof placement->job];
    snprintf(text, sizeof text, "%s%s%s", job ? job : "", step ? "." : "", step ? step : "");
    return copy_text(name, text, placement->job, sizeof placement->job);
}

static usp_status all_here(const usp_launcher *launcher, const usp_placement *placement, int *here) {
    int count = 0;
    *here = 0;
    if (launcher->local_size && secure_getenv(launcher->local_size)) {
        USP_TRY(read_number(launcher->local_size, 1, USP_MOST_RANKS, &count));
        *here = count == placement->size;
    }
    if (launcher->hosts && secure_getenv(launcher->hosts)) {
        USP_TRY(read_number(launcher->hosts, 1, USP_MOST_RANKS, &count));
        *here = count == 1;
    }
    return USP_OK;
}

/* Ranks on one host need no address and no port: the job's name gives the port. */
static usp_status read_address(const usp_launcher *launcher, usp_placement *placement) {
    const char *address = secure_getenv("MASTER_ADDR");
    int here;
    USP_TRY(all_here(launcher, placement, &here));
    USP_REQUIRE(address || here, "the variable MASTER_ADDR is not set (ranks from %s)", launcher->name);
    if (!address) address = "127.0.0.1";
    USP_TRY(copy_text("MASTER_ADDR", address, placement->address, sizeof placement->address));
    const char *store = secure_getenv("TORCHELASTIC_USE_AGENT_STORE");
    placement->port_taken = store && strcmp(store, "True") == 0;
    if (secure_getenv("MASTER_PORT") || (launcher->local_size == NULL && launcher->hosts == NULL))
        return read_number("MASTER_PORT", 1, USP_LAST_PORT, &placement->port);
    placement->port = 20000 + (int)(usp_hash(0, placement->job, strlen(placement->job)) % 10000);
    return USP_OK;
}

usp_status usp_environment_read(usp_placement *placement) {
    *placement = (usp_placement){.launcher = "none", .size = 1};
    for (size_t i = 0; i < sizeof launchers / sizeof *launchers; i++) {
        const usp_launcher *launcher = &launchers[i];
        if (!secure_getenv(launcher->size)) continue;
        placement->launcher = launcher->name;
        USP_TRY(read_number(launcher->size, 1, USP_MOST_RANKS, &placement->size));
        USP_TRY(read_number(launcher->rank, 0, placement->size - 1, &placement->rank));
        placement->local_rank = placement->rank;
        if (secure_getenv(launcher->local_rank))
            USP_TRY(read_number(launcher->local_rank, 0, placement->size - 1, &placement->local_rank));
        USP_TRY(read_job(launcher, placement));
        return placement->size == 1 ? USP_OK : read_address(launcher, placement);
    }
    return USP_OK;
}

/* ---- the meeting ------------------------------------------------------------------------------------------------- */

/* What rank 0 tells the others when all have come or its time is over. */
typedef struct usp_verdict {
    int32_t status;
    char sentence[252];
} usp_verdict;

/* Ranks of one job and size have the same. */
static usp_token job_token(const usp_placement *placement) {
    usp_token token;
    char text[200];
    snprintf(text, sizeof text, "%s/%d", placement->job, placement->size);
    for (size_t i = 0; i < sizeof token.bytes; i++)
        token.bytes[i] = (unsigned char)(usp_hash(i + 1, text, strlen(text)) >> 32);
    return token;
}

/* As written, not as resolved: to a host its own name may mean loopback. */
static int is_loopback(const char *address) {
    return strncmp(address, "127.", 4) == 0 || strcmp(address, "localhost") == 0 || strcmp(address, "::1") == 0;
}

/* The i-th port to try: those behind the announced one, and where there are no more those before. */
static int door_number(const usp_placement *placement, int i) {
    int port = placement->port + placement->port_taken + i;
    return port <= USP_LAST_PORT ? port : port - 2 * USP_PORTS;
}

static usp_status open_listener(const usp_placement *placement, const usp_ip *ip, int *listener) {
    const usp_ip *door = is_loopback(placement->address) ? ip : NULL;
    usp_status status = USP_OK;
    for (int i = 0; i < USP_PORTS; i++) {
        int bound;
        status = usp_tcp_listen(door, door_number(placement, i), listener, &bound);
        if (status == USP_OK) return USP_OK;
    }
    return status;
}

static usp_status host_meeting(usp_environment *environment, const usp_ip *ip, const usp_token *token,
                               int64_t deadline) {
    usp_verdict verdict = {0};
    int listener, size = environment->placement.size;
    USP_TRY(open_listener(&environment->placement, ip, &listener));
    usp_status status = usp_tcp_accept(listener, token, 0, 1, size, deadline, environment->connections);
    close(listener);
    verdict.status = (int32_t)status;
    if (status != USP_OK) snprintf(verdict.sentence, sizeof verdict.sentence, "%s", usp_last_error());
    for (int i = 1; i < size; i++) {
        int connection = environment->connections[i];
        usp_status sent = connection < 0 ? USP_OK : usp_tcp_send(connection, &verdict, sizeof verdict, deadline);
        if (status == USP_OK) status = sent;
    }
    return verdict.status == USP_OK ? status : usp_fail((usp_status)verdict.status, "%s", verdict.sentence);
}

static int64_t sooner(int64_t a, int64_t b) {
    return a < 0 || b < a ? b : a;
}

/* Tries every address and port until rank 0 answers: it may not listen yet, and others may. */
static usp_status call_host(usp_environment *environment, const usp_ip *ips, int count, const usp_token *token,
                            int64_t deadline) {
    const usp_placement *placement = &environment->placement;
    const struct timespec pause = {0, USP_PAUSE_MS * 1000000L};
    for (int i = 0; usp_tcp_left(deadline) != 0; i = (i + 1) % (count * USP_PORTS)) {
        int port = door_number(placement, i / count);
        int64_t limit = sooner(deadline, usp_tcp_deadline(USP_ATTEMPT_MS));
        usp_status status =
            usp_tcp_connect(&ips[i % count], port, token, placement->rank, 0, limit, &environment->connections[0]);
        if (status == USP_OK) return USP_OK;
        if (i == count * USP_PORTS - 1) nanosleep(&pause, NULL);
    }
    return usp_fail(USP_TIMEOUT, "rank 0 does not answer at %.200s:%d", placement->address, placement->port);
}

static usp_status attend_meeting(usp_environment *environment, int64_t deadline) {
    usp_verdict verdict;
    if (usp_tcp_recv(environment->connections[0], &verdict, sizeof verdict, deadline) != USP_OK)
        return usp_fail(USP_TIMEOUT, "rank 0 waits for other ranks, or has given up");
    verdict.sentence[sizeof verdict.sentence - 1] = 0;
    if (verdict.status == USP_OK) return USP_OK;
    return usp_fail(USP_TIMEOUT, "%s", verdict.sentence);
}

static usp_status meet(usp_environment *environment) {
    const usp_placement *placement = &environment->placement;
    usp_ip ips[USP_IPS];
    int count;
    usp_token token = job_token(placement);
    int64_t deadline = usp_tcp_deadline(environment->timeout_ms);
    USP_TRY(usp_tcp_resolve(placement->address, ips, USP_IPS, &count));
    if (placement->rank == 0) return host_meeting(environment, ips, &token, deadline);
    USP_TRY(call_host(environment, ips, count, &token, deadline));
    return attend_meeting(environment, deadline);
}

usp_status usp_environment_open(const usp_host *host, int timeout_ms, usp_environment **result) {
    usp_placement placement;
    void *memory;
    *result = NULL;
    USP_TRY(usp_environment_read(&placement));
    size_t bytes = sizeof(usp_environment) + (size_t)placement.size * sizeof(int);
    USP_TRY(usp_host_alloc(host, bytes, "environment", &memory));
    usp_environment *environment = memory;
    *environment = (usp_environment){host, placement, timeout_ms, (int *)(environment + 1)};
    for (int i = 0; i < placement.size; i++) environment->connections[i] = -1;
    usp_status status = placement.size > 1 ? meet(environment) : USP_OK;
    if (status == USP_OK)
        *result = environment;
    else
        usp_environment_close(environment);
    return status;
}

void usp_environment_close(usp_environment *environment) {
    if (!environment) return;
    usp_host host = *environment->host;
    usp_tcp_close(environment->connections, environment->placement.size);
    usp_host_free(&host, environment);
}

int usp_environment_local_rank(const usp_environment *environment) {
    return environment->placement.local_rank;
}

/* ---- the bootstrap ----------------------------------------------------------------------------------------------- */

static usp_status gather_to_host(usp_environment *environment, char *all, size_t bytes, int64_t deadline) {
    for (int i = 1; i < environment->placement.size; i++) {
        uint64_t theirs;
        USP_TRY(usp_tcp_recv(environment->connections[i], &theirs, sizeof theirs, deadline));
        if (theirs != bytes)
            return usp_fail(USP_COMM, "rank 0 gathers %zu bytes and rank %d gathers %zu", bytes, i, (size_t)theirs);
        USP_TRY(usp_tcp_recv(environment->connections[i], all + (size_t)i * bytes, bytes, deadline));
    }
    return USP_OK;
}

static usp_status scatter_from_host(usp_environment *environment, const char *all, size_t bytes, int64_t deadline) {
    size_t total = bytes * (size_t)environment->placement.size;
    for (int i = 1; i < environment->placement.size; i++)
        USP_TRY(usp_tcp_send(environment->connections[i], all, total, deadline));
    return USP_OK;
}

static usp_status gather_by_host(usp_environment *environment, const void *mine, char *all, uint64_t bytes,
                                 int64_t deadline) {
    int host = environment->connections[0];
    USP_TRY(usp_tcp_send(host, &bytes, sizeof bytes, deadline));
    USP_TRY(usp_tcp_send(host, mine, bytes, deadline));
    return usp_tcp_recv(host, all, bytes * (size_t)environment->placement.size, deadline);
}

/* A rank that fails closes its connections, so that no other waits for it. */
static usp_status environment_gather(void *user, const void *mine, void *all, size_t bytes) {
    usp_environment *environment = user;
    int64_t deadline = usp_tcp_deadline(environment->timeout_ms);
    usp_status status = USP_OK;
    if (environment->placement.rank == 0) {
        if (bytes > 0) memcpy(all, mine, bytes);
        status = gather_to_host(environment, all, bytes, deadline);
        if (status == USP_OK) status = scatter_from_host(environment, all, bytes, deadline);
    } else {
        status = gather_by_host(environment, mine, all, bytes, deadline);
    }
    if (status != USP_OK) usp_tcp_close(environment->connections, environment->placement.size);
    return status;
}

usp_bootstrap usp_environment_bootstrap(usp_environment *environment) {
    const usp_placement *placement = &environment->placement;
    return (usp_bootstrap){environment_gather, environment, placement->rank, placement->size};
}
