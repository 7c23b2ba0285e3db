/* lines.c - connections between every two ranks of a world: where each rank listens, and how all call each other. It
 * knows nothing of what is sent, and has no way to tell another rank of a failure: its caller does. */
#define _GNU_SOURCE
#include "lines.h"
#include "error.h"
#include "hash.h"
#include <errno.h>
#include <string.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

enum {
    USP_ROUND_MS = 500, /* of calling or of hearing, before the caller looks what else has happened */
    USP_PROBE_MS = 200
};

static const usp_ip loopback = {{[10] = 0xff, [11] = 0xff, [12] = 127, [15] = 1}};

/* ---- listening --------------------------------------------------------------------------------------------------- */

/* Names the boot of this machine and the network namespace of this process. */
static uint64_t network_identity(void) {
    struct stat space = {0};
    if (stat("/proc/self/ns/net", &space) != 0) space.st_ino = 0;
    return usp_hash_boot((uint64_t)space.st_ino);
}

/* A host without a network has only the near ear. */
static usp_status open_ears(usp_ears *ears, usp_address *mine) {
    int port = 0;
    USP_TRY(usp_tcp_listen(&loopback, 0, &ears->near, &port));
    mine->near_port = port;
    mine->ip_count = usp_tcp_own_ips(mine->ips, USP_ADDRESS_IPS);
    if (mine->ip_count == 0) return USP_OK;
    USP_TRY(usp_tcp_listen(NULL, 0, &ears->far, &port));
    mine->far_port = port;
    return USP_OK;
}

usp_status usp_lines_listen(usp_ears *ears, usp_address *mine) {
    *ears = (usp_ears){-1, -1};
    *mine = (usp_address){.network = network_identity()};
    if (getrandom(mine->nonce.bytes, sizeof mine->nonce.bytes, 0) != sizeof mine->nonce.bytes)
        return usp_fail(USP_COMM, "no random numbers: %s", strerror(errno));
    return open_ears(ears, mine);
}

void usp_lines_deafen(usp_ears *ears) {
    if (ears->near >= 0) close(ears->near);
    if (ears->far >= 0) close(ears->far);
    *ears = (usp_ears){-1, -1};
}

/* ---- calling ----------------------------------------------------------------------------------------------------- */

static int all_near(const usp_lines *lines) {
    int near = 1;
    for (int i = 1; i < lines->size; i++) near &= lines->addresses[i].network == lines->addresses[0].network;
    return near;
}

void usp_lines_begin(usp_lines *lines, usp_ears *ears) {
    int near = all_near(lines), *unused = near ? &ears->far : &ears->near;
    if (*unused >= 0) close(*unused);
    *unused = -1;
    lines->listener = near ? ears->near : ears->far;
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

/* An address may lead elsewhere (a bridge, a private network): each round begins with another one. */
static usp_status call(usp_lines *lines, int peer, int line, int round, int64_t deadline) {
    const usp_token *token = &lines->addresses[0].nonce;
    int from = lines->rank * lines->lines + line, count = 1, port;
    usp_status status = USP_OK;
    for (int i = 0; i < count; i++) {
        usp_ip ip = way_to(lines, peer, round + i, &count, &port);
        if (count == 0) return usp_fail(USP_COMM, "rank %d has no network address", peer);
        status = usp_tcp_connect(&ip, port, token, from, peer, round_end(deadline),
                                 &lines->connections[peer * lines->lines + line]);
        if (status == USP_OK || status == USP_TIMEOUT) break;
    }
    return status;
}

/* A rank that does not answer may be late, and is called again. */
static usp_status call_all(usp_lines *lines, int round, int64_t deadline) {
    for (int i = 0; i < lines->rank * lines->lines; i++) {
        if (lines->connections[i] >= 0) continue;
        usp_status status = call(lines, i / lines->lines, i % lines->lines, round, deadline);
        if (status != USP_TIMEOUT) USP_TRY(status);
    }
    return USP_OK;
}

static usp_status hear_all(usp_lines *lines, int64_t deadline) {
    const usp_token *token = &lines->addresses[0].nonce;
    usp_status status = usp_tcp_accept(lines->listener, token, lines->rank, (lines->rank + 1) * lines->lines,
                                       lines->size * lines->lines, round_end(deadline), lines->connections);
    return status == USP_TIMEOUT ? USP_OK : status;
}

static int first_missing(const usp_lines *lines) {
    for (int i = 0; i < lines->size * lines->lines; i++)
        if (i / lines->lines != lines->rank && lines->connections[i] < 0) return i / lines->lines;
    return -1;
}

/* Rank 0 only hears, so the calls of all end. */
usp_status usp_lines_round(usp_lines *lines, int round, int64_t deadline, int *missing) {
    usp_status status = call_all(lines, round, deadline);
    if (status == USP_OK) status = hear_all(lines, deadline);
    *missing = first_missing(lines);
    if (*missing < 0 || usp_lines_listens(lines, *missing)) return status;
    return usp_fail(USP_PEER_LOST, "rank %d died or gave up while the ranks connected", *missing);
}

int usp_lines_listens(const usp_lines *lines, int peer) {
    int count = 1, port;
    for (int i = 0; i < count; i++) {
        usp_ip ip = way_to(lines, peer, i, &count, &port);
        if (count > 0 && usp_tcp_probe(&ip, port, usp_tcp_deadline(USP_PROBE_MS)) != ECONNREFUSED) return 1;
    }
    return 0;
}
