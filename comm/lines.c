/* lines.c - connections between every two ranks of a world: where each rank listens, and how all call each other. It
 * knows nothing of what is sent, and has no way to tell another rank of a failure: its caller does. */
#define _GNU_SOURCE
#include "lines.h"
#include "error.h"
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/random.h>
#include <sys/stat.h>

enum {
    USP_ROUND_MS = 500, /* of calling or of hearing, before the caller looks what else has happened */
    USP_PROBE_MS = 200,
    USP_LINES_SENTENCE = 256
};

static const usp_ip loopback = {{[10] = 0xff, [11] = 0xff, [12] = 127, [15] = 1}};

/* ---- listening --------------------------------------------------------------------------------------------------- */

/* Names the boot of this machine and the network namespace of this process. */
static uint64_t network_identity(void) {
    struct stat space = {0};
    if (stat("/proc/self/ns/net", &space) != 0) space.st_ino = 0;
    return usp_hash_boot((uint64_t)space.st_ino);
}

/* Ranks that met over loopback, and those of a host without a network, have only the near ear. */
static usp_status open_ears(usp_ears *ears, const usp_ip *near, usp_address *mine) {
    int port = 0;
    USP_TRY(usp_tcp_listen(&loopback, 0, &ears->near, &port));
    mine->near_port = port;
    if (near && usp_tcp_is_loopback(near)) return USP_OK;
    if (near) mine->ips[mine->ip_count++] = *near;
    if (!near) USP_TRY(usp_tcp_own_ips(mine->ips, USP_ADDRESS_IPS, &mine->ip_count));
    if (mine->ip_count == 0) return USP_OK;
    USP_TRY(usp_tcp_listen(near, 0, &ears->far, &port));
    mine->far_port = port;
    return USP_OK;
}

usp_status usp_lines_listen(usp_ears *ears, const usp_ip *near, usp_address *mine) {
    *ears = (usp_ears){-1, -1};
    *mine = (usp_address){.network = network_identity()};
    if (getrandom(mine->nonce.bytes, sizeof mine->nonce.bytes, 0) != sizeof mine->nonce.bytes)
        return usp_fail(USP_COMM, "no random numbers: %s", strerror(errno));
    return open_ears(ears, near, mine);
}

void usp_lines_deafen(usp_ears *ears) {
    usp_tcp_close(&ears->near, 1);
    usp_tcp_close(&ears->far, 1);
}

/* ---- calling ----------------------------------------------------------------------------------------------------- */

static int all_near(const usp_lines *lines) {
    int near = 1;
    for (int i = 1; i < lines->size; i++) near &= lines->addresses[i].network == lines->addresses[0].network;
    return near;
}

void usp_lines_begin(usp_lines *lines, const usp_key *secret, usp_ears *ears) {
    const usp_key none = {"usp lines"};
    const usp_key *nonce = &lines->addresses[0].nonce;
    int near = all_near(lines), *unused = near ? &ears->far : &ears->near;
    usp_tcp_close(unused, 1);
    lines->listener = near ? ears->near : ears->far;
    lines->door = (usp_door){.key = usp_hash_key(secret ? secret : &none, nonce, sizeof *nonce),
                             .rank = lines->rank * lines->lines,
                             .size = lines->size * lines->lines};
    for (int i = 0; i < lines->size * lines->lines; i++) lines->connections[i] = -1;
}

/* Where to call a rank: the i-th of *count ways. */
static usp_ip way_to(const usp_lines *lines, int peer, int i, int *count, int *port) {
    const usp_address *address = &lines->addresses[peer];
    int near = all_near(lines), known = address->ip_count < USP_ADDRESS_IPS ? address->ip_count : USP_ADDRESS_IPS;
    *count = near ? 1 : known;
    *port = near ? address->near_port : address->far_port;
    return near || known < 1 ? loopback : address->ips[i % known];
}

static int64_t round_end(int64_t deadline) {
    int64_t soon = usp_tcp_deadline(USP_ROUND_MS);
    return deadline >= 0 && deadline < soon ? deadline : soon;
}

static usp_status gave_up(int peer) {
    return usp_fail(USP_PEER_LOST, "rank %d died or gave up while the ranks connected", peer);
}

/* An address may lead elsewhere (a bridge, a private network): each round begins with another one. */
static usp_status call(usp_lines *lines, int peer, int line, int round, int64_t deadline) {
    usp_door door = lines->door;
    int64_t end = round_end(deadline);
    int count = 1, port;
    usp_status status = USP_OK;
    door.rank += line;
    for (int i = 0; i < count; i++) {
        usp_ip ip = way_to(lines, peer, round + i, &count, &port);
        if (count == 0) return usp_fail(USP_COMM, "rank %d has no network address", peer);
        status = usp_door_connect(&door, &ip, port, peer * lines->lines, end, end,
                                  &lines->connections[peer * lines->lines + line]);
        if (status != USP_PEER_FAILED) return status;
    }
    if (!usp_lines_listens(lines, peer)) return gave_up(peer);
    return usp_fail(USP_COMM, "rank %d cannot be called by rank %d", peer, lines->rank);
}

/* A rank that does not answer may be late, and is called again. All are called; the last failure counts. */
static usp_status call_all(usp_lines *lines, int round, int64_t deadline, char sentence[USP_LINES_SENTENCE]) {
    usp_status failure = USP_OK;
    for (int i = 0; i < lines->rank * lines->lines; i++) {
        if (lines->connections[i] >= 0) continue;
        usp_status status = call(lines, i / lines->lines, i % lines->lines, round, deadline);
        if (status == USP_OK || status == USP_TIMEOUT) continue;
        snprintf(sentence, USP_LINES_SENTENCE, "%s", usp_last_error());
        failure = status;
    }
    return failure;
}

static usp_status hear_all(usp_lines *lines, int64_t deadline) {
    usp_status status = usp_door_accept(&lines->door, lines->reception, lines->listener,
                                        (lines->rank + 1) * lines->lines, round_end(deadline), lines->connections);
    return status == USP_TIMEOUT ? USP_OK : status;
}

static int first_missing(const usp_lines *lines) {
    for (int i = 0; i < lines->size * lines->lines; i++)
        if (i / lines->lines != lines->rank && lines->connections[i] < 0) return i / lines->lines;
    return -1;
}

/* Rank 0 only hears, so the calls of all end. Also who has failed to call somebody hears: others may know why. */
usp_status usp_lines_round(usp_lines *lines, int round, int64_t deadline, int *missing) {
    char sentence[USP_LINES_SENTENCE];
    usp_status called = call_all(lines, round, deadline, sentence), heard = hear_all(lines, deadline);
    *missing = first_missing(lines);
    if (*missing >= 0 && !usp_lines_listens(lines, *missing)) return gave_up(*missing);
    return called == USP_OK ? heard : usp_fail(called, "%s", sentence);
}

int usp_lines_listens(const usp_lines *lines, int peer) {
    int count = 1, port, connection = -1;
    for (int i = 0; i < count; i++) {
        usp_ip ip = way_to(lines, peer, i, &count, &port);
        if (count == 0) return 1; /* it cannot be asked */
        int reason = usp_tcp_dial(&ip, port, usp_tcp_deadline(USP_PROBE_MS), &connection);
        usp_tcp_close(&connection, 1);
        if (reason != ECONNREFUSED) return 1;
    }
    return 0;
}
