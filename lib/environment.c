/* environment.c - a first meeting, over TCP, of the ranks that a launcher has started. After it the ranks use
 * connections of their own.
 *
 * Rank 0 gathers and scatters. A launcher may itself listen on the port it announces (torchrun does) and other jobs on
 * those beside it, so there are a few ports; at the door (door.h) ranks of one job know each other. */
#define _GNU_SOURCE
#include "environment.h"
#include "error.h"
#include "launcher.h"
#include "text.h"
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum {
    USP_LAST_PORT = 65535,
    USP_PORTS = 8,
    USP_IPS = 8,
    USP_TWIN_MS = 50,
    USP_ATTEMPT_MS = 100,
    USP_PAUSE_MS = 20,
    USP_EARLY_MS = 1000,
    USP_FAREWELL_MS = 1000
};

struct usp_environment {
    const usp_host *host;
    usp_placement placement;
    usp_door door;
    usp_ip near;
    int timeout_ms;
    int *connections; /* [size]: rank 0 to all others, the others to rank 0 alone */
};

/* ---- rank 0 ------------------------------------------------------------------------------------------------------ */

/* What rank 0 tells the others when all have come, or why they do not meet. */
typedef struct usp_verdict {
    int32_t status;
    char sentence[252];
} usp_verdict;

/* The i-th port to try: those behind the announced one, and where there are no more those before. */
static int door_number(const usp_placement *placement, int i) {
    int port = placement->port + placement->port_taken + i;
    return port <= USP_LAST_PORT ? port : port - 2 * USP_PORTS;
}

static int is_own(const usp_ip *ip) {
    int listener, port;
    if (usp_tcp_listen(ip, 0, &listener, &port) != USP_OK) return 0;
    close(listener);
    return 1;
}

/* As written, not as resolved: to a host its own name may mean loopback, where others do not reach it. */
static int may_be_loopback(const usp_placement *placement) {
    const char *address = placement->address;
    return placement->here || strncmp(address, "127.", 4) == 0 || strcmp(address, "localhost") == 0 ||
           strcmp(address, "::1") == 0;
}

/* The announced address, where it is this host's. Where it is not (a proxy or a NAT stands for it), NULL. */
static const usp_ip *own_address(const usp_environment *environment, const usp_ip *ips, int count) {
    int loopback = may_be_loopback(&environment->placement);
    for (int i = 0; i < count; i++)
        if ((loopback || !usp_tcp_is_loopback(&ips[i])) && is_own(&ips[i])) return &ips[i];
    usp_host_log(environment->host, 1, "%s is no address of this host: rank 0 listens on %s",
                 environment->placement.address,
                 usp_tcp_interface_chosen() ? "that of USP_INTERFACE" : "all addresses");
    return NULL;
}

/* Somebody listens there already. If it is this rank of a job that is the same in everything, ranks would mix. */
static usp_status look_for_twin(const usp_environment *environment, const usp_ip *ip, int port) {
    const usp_ip loopback = {{[10] = 0xff, [11] = 0xff, [12] = 127, [15] = 1}};
    int connection = -1;
    int64_t soon = usp_tcp_deadline(USP_TWIN_MS);
    usp_status status = usp_door_connect(&environment->door, ip ? ip : &loopback, port, 0, soon, soon, &connection);
    usp_tcp_close(&connection, 1);
    return status == USP_INVALID || status == USP_MISMATCH ? status : USP_OK;
}

static usp_status open_listener(const usp_environment *environment, const usp_ip *ip, int *listener) {
    for (int i = 0; i < USP_PORTS; i++) {
        int bound, port = door_number(&environment->placement, i);
        usp_status status = usp_tcp_listen(ip, port, listener, &bound);
        if (status != USP_PEER_FAILED) return status;
        USP_TRY(look_for_twin(environment, ip, port));
    }
    return usp_fail(USP_COMM, "rank 0 cannot listen on any of the ports %d .. %d",
                    door_number(&environment->placement, 0), door_number(&environment->placement, USP_PORTS - 1));
}

/* The line to a rank has failed, which is all that is seen of its death. */
static usp_status blame(int rank, usp_status status) {
    if (status == USP_TIMEOUT) return usp_fail(status, "rank %d is silent while the ranks meet", rank);
    return status == USP_OK ? status : usp_fail(USP_PEER_LOST, "rank %d died or gave up while the ranks met", rank);
}

/* Who cannot be told any more is missed in the next step, where all are told of it. */
static usp_status tell_all(usp_environment *environment, usp_status status, int64_t deadline) {
    usp_verdict verdict = {.status = (int32_t)status};
    if (status != USP_OK) snprintf(verdict.sentence, sizeof verdict.sentence, "%s", usp_last_error());
    for (int i = 1; i < environment->placement.size; i++)
        if (environment->connections[i] >= 0)
            usp_tcp_send(environment->connections[i], &verdict, sizeof verdict, deadline);
    return status == USP_OK ? USP_OK : usp_fail(status, "%s", verdict.sentence);
}

/* Before the limit of the others, who wait for what it says. */
static int64_t host_deadline(const usp_environment *environment) {
    int time = environment->timeout_ms, early = time / 8 < USP_EARLY_MS ? time / 8 : USP_EARLY_MS;
    return usp_tcp_deadline(time < 0 ? time : time - early);
}

static usp_status receive_all(usp_environment *environment, usp_reception *reception, const usp_ip *ip,
                              int64_t deadline) {
    int listener;
    USP_TRY(open_listener(environment, ip, &listener));
    usp_status status = usp_door_accept(&environment->door, reception, listener, 1, deadline, environment->connections);
    close(listener);
    return tell_all(environment, status, deadline);
}

static usp_status host_meeting(usp_environment *environment, const usp_ip *ips, int count) {
    usp_reception *reception;
    USP_TRY(usp_reception_create(environment->host, &reception));
    const usp_ip *ip = own_address(environment, ips, count);
    usp_status status = receive_all(environment, reception, ip, host_deadline(environment));
    usp_reception_destroy(reception);
    return status;
}

/* ---- the others -------------------------------------------------------------------------------------------------- */

static int64_t sooner(int64_t a, int64_t b) {
    return a < 0 || b < a ? b : a;
}

/* Short at first, so that whoever is silent at one port does not take the time of the others. */
static int attempt_ms(int round) {
    return USP_ATTEMPT_MS << (round < 16 ? round / 4 : 4);
}

/* Tries every address and port until rank 0 answers: it may not listen yet, and others may. */
static usp_status call_host(usp_environment *environment, const usp_ip *ips, int count, int64_t deadline) {
    const usp_placement *placement = &environment->placement;
    const struct timespec pause = {0, USP_PAUSE_MS * 1000000L};
    const int doors = count * USP_PORTS;
    for (int i = 0; usp_tcp_left(deadline) != 0; i++) {
        int64_t patience = sooner(deadline, usp_tcp_deadline(attempt_ms(i / doors)));
        usp_status status =
            usp_door_connect(&environment->door, &ips[i % count], door_number(placement, i % doors / count), 0,
                             patience, deadline, &environment->connections[0]);
        if (status != USP_TIMEOUT && status != USP_PEER_FAILED) return status;
        if (i % doors == doors - 1) nanosleep(&pause, NULL);
    }
    return usp_fail(USP_TIMEOUT, "rank 0 does not answer at %.200s:%d, or is that of another job", placement->address,
                    placement->port);
}

/* What went wrong on rank 0 alone is the failure of a peer here. */
static usp_status hear_verdict(usp_environment *environment, int64_t deadline) {
    usp_verdict verdict;
    USP_TRY(blame(0, usp_tcp_recv(environment->connections[0], &verdict, sizeof verdict, deadline)));
    usp_text_clean(verdict.sentence, sizeof verdict.sentence);
    if (verdict.status == USP_OK) return USP_OK;
    int alone = verdict.status == USP_COMM || verdict.status == USP_NO_MEMORY;
    if (alone) return usp_fail(USP_PEER_FAILED, "rank 0 could not go on: %s", verdict.sentence);
    return usp_fail((usp_status)verdict.status, "%s", verdict.sentence);
}

/* ---- the meeting ------------------------------------------------------------------------------------------------- */

/* Ranks of one job have the same. The size is no part of it: the door tells of sizes that differ. */
static usp_key job_key(const usp_placement *placement) {
    const usp_key known = {"usp job"};
    char text[sizeof placement->job + sizeof placement->address + 16];
    snprintf(text, sizeof text, "%d %s %s", placement->port, placement->address, placement->job);
    return usp_hash_key(&known, text, strlen(text));
}

/* Of the two ends of the line between rank 0 and another rank, this one's. */
static usp_status find_near(usp_environment *environment) {
    int count, port;
    if (usp_tcp_interface_chosen()) return usp_tcp_own_ips(&environment->near, 1, &count);
    usp_tcp_near(environment->connections[environment->placement.rank == 0], &environment->near, &port);
    return USP_OK;
}

static usp_status meet(usp_environment *environment) {
    const usp_placement *placement = &environment->placement;
    usp_ip ips[USP_IPS];
    int count;
    int64_t deadline = usp_tcp_deadline(environment->timeout_ms);
    USP_TRY(usp_tcp_resolve(placement->address, ips, USP_IPS, &count));
    if (placement->rank == 0) {
        USP_TRY(host_meeting(environment, ips, count));
    } else {
        USP_TRY(call_host(environment, ips, count, deadline));
        deadline = usp_tcp_deadline(environment->timeout_ms); /* rank 0, which had begun already, knows before it */
        USP_TRY(hear_verdict(environment, deadline));
    }
    return find_near(environment);
}

usp_status usp_environment_open(const usp_host *host, int timeout_ms, usp_environment **result) {
    usp_placement placement;
    void *memory;
    *result = NULL;
    USP_TRY(usp_launcher_read(&placement));
    size_t bytes = sizeof(usp_environment) + (size_t)placement.size * sizeof(int);
    USP_TRY(usp_host_alloc(host, bytes, "environment", &memory));
    usp_environment *environment = memory;
    *environment = (usp_environment){.host = host, .placement = placement, .timeout_ms = timeout_ms};
    environment->door = (usp_door){job_key(&placement), placement.rank, placement.size};
    environment->connections = (int *)(environment + 1);
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
        USP_TRY(blame(i, usp_tcp_recv(environment->connections[i], &theirs, sizeof theirs, deadline)));
        if (theirs != bytes)
            return usp_fail(USP_COMM, "rank 0 gathers %zu bytes and rank %d gathers %zu", bytes, i, (size_t)theirs);
        USP_TRY(blame(i, usp_tcp_recv(environment->connections[i], all + (size_t)i * bytes, bytes, deadline)));
    }
    return USP_OK;
}

static usp_status gather_on_host(usp_environment *environment, const void *mine, char *all, size_t bytes) {
    int64_t deadline = host_deadline(environment);
    size_t total = bytes * (size_t)environment->placement.size;
    if (bytes > 0) memcpy(all, mine, bytes);
    USP_TRY(tell_all(environment, gather_to_host(environment, all, bytes, deadline), deadline));
    for (int i = 1; i < environment->placement.size; i++)
        usp_tcp_send(environment->connections[i], all, total, deadline); /* as in tell_all */
    return USP_OK;
}

static usp_status gather_by_host(usp_environment *environment, const void *mine, char *all, uint64_t bytes) {
    int64_t deadline = usp_tcp_deadline(environment->timeout_ms);
    int host = environment->connections[0];
    USP_TRY(blame(0, usp_tcp_send(host, &bytes, sizeof bytes, deadline)));
    USP_TRY(blame(0, usp_tcp_send(host, mine, bytes, deadline)));
    USP_TRY(hear_verdict(environment, deadline));
    return blame(0, usp_tcp_recv(host, all, bytes * (size_t)environment->placement.size, deadline));
}

/* A rank that fails ends its connections, so that no other waits for it; but not before its verdict has been read. */
static usp_status environment_gather(void *user, const void *mine, void *all, size_t bytes) {
    usp_environment *environment = user;
    char sentence[sizeof((usp_verdict *)0)->sentence];
    usp_status status = environment->placement.rank == 0 ? gather_on_host(environment, mine, all, bytes)
                                                         : gather_by_host(environment, mine, all, bytes);
    if (status == USP_OK) return USP_OK;
    snprintf(sentence, sizeof sentence, "%s", usp_last_error());
    usp_tcp_part(environment->connections, environment->placement.size, usp_tcp_deadline(USP_FAREWELL_MS));
    return usp_fail(status, "%s", sentence);
}

/* This host may be called by a name that it alone takes for loopback. Then ranks of other hosts need another way. */
static const usp_ip *known_near(const usp_environment *environment) {
    const usp_placement *placement = &environment->placement;
    const usp_ip *near = &environment->near;
    int elsewhere = usp_tcp_is_loopback(near) && !usp_tcp_interface_chosen() && !may_be_loopback(placement);
    return placement->size > 1 && !elsewhere ? near : NULL;
}

usp_bootstrap usp_environment_bootstrap(usp_environment *environment) {
    const usp_placement *placement = &environment->placement;
    return (usp_bootstrap){.gather = environment_gather,
                           .user = environment,
                           .rank = placement->rank,
                           .size = placement->size,
                           .secret = &environment->door.key,
                           .near = known_near(environment)};
}
