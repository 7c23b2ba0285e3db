/* lines.c - one connection between every two ranks of a world, made over a bootstrap: addresses and tokens on cards,
 * then calls in rounds. It knows nothing of what is sent. */
#define _GNU_SOURCE
#include "lines.h"
#include "error.h"
#include "hash.h"
#include "tcp.h"
#include <errno.h>
#include <string.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

enum {
    USP_ROUND_MS = 1000, /* of calling and of hearing, until ranks tell each other how it goes */
    USP_CARD_IPS = 8
};

/* What every rank tells the others. */
typedef struct usp_card {
    uint64_t network; /* ranks with equal numbers reach each other over loopback */
    usp_token token;  /* rank 0's is the world's */
    int32_t status, port, ip_count;
    int32_t waiting; /* for ranks that are late */
    usp_ip ips[USP_CARD_IPS];
} usp_card;

typedef struct usp_making {
    const usp_bootstrap *bootstrap;
    usp_card mine;
    usp_card *cards; /* [size] */
    int listener;
    int64_t deadline;
    int *connections;
} usp_making;

/* Names the boot of this machine and the network namespace of this process. */
static uint64_t network_identity(void) {
    struct stat space = {0};
    if (stat("/proc/self/ns/net", &space) != 0) space.st_ino = 0;
    return usp_hash_boot((uint64_t)space.st_ino);
}

/* Shares the cards; another rank's failure becomes everybody's. */
static usp_status share_cards(usp_making *making, usp_status mine) {
    const usp_bootstrap *bootstrap = making->bootstrap;
    making->mine.status = mine;
    USP_TRY(usp_bootstrap_gather(bootstrap, &making->mine, making->cards, sizeof making->mine));
    if (mine != USP_OK) return mine;
    for (int i = 0; i < bootstrap->size; i++)
        if (making->cards[i].status != USP_OK)
            return usp_fail(USP_PEER_FAILED, "rank %d could not connect to the others: %s", i,
                            usp_status_string((usp_status)making->cards[i].status));
    return USP_OK;
}

static usp_status identify(usp_making *making) {
    making->mine.network = network_identity();
    if (getrandom(making->mine.token.bytes, sizeof making->mine.token.bytes, 0) == sizeof making->mine.token.bytes)
        return USP_OK;
    return usp_fail(USP_COMM, "no random numbers: %s", strerror(errno));
}

/* Loopback where all are on one host. */
static usp_status open_door(usp_making *making) {
    const usp_ip loopback = {{[10] = 0xff, [11] = 0xff, [12] = 127, [15] = 1}};
    usp_card *mine = &making->mine;
    int local = 1, port;
    for (int i = 0; i < making->bootstrap->size; i++) local &= making->cards[i].network == mine->network;
    USP_TRY(usp_tcp_listen(local ? &loopback : NULL, 0, &making->listener, &port));
    mine->port = port;
    mine->ips[0] = loopback;
    mine->ip_count = local ? 1 : usp_tcp_own_ips(mine->ips, USP_CARD_IPS);
    if (mine->ip_count == 0) return usp_fail(USP_COMM, "rank %d has no network address", making->bootstrap->rank);
    return USP_OK;
}

/* The end of something that begins now and may take a round. */
static int64_t round_end(const usp_making *making) {
    int left = usp_tcp_left(making->deadline);
    return left >= 0 && left <= USP_ROUND_MS ? making->deadline : usp_tcp_deadline(USP_ROUND_MS);
}

/* An address may lead elsewhere (a bridge, a private network): each round begins with another one. */
static usp_status call(usp_making *making, const usp_token *token, int peer, int round) {
    const usp_card *card = &making->cards[peer];
    usp_status status = usp_fail(USP_COMM, "rank %d has no address", peer);
    for (int i = 0; i < card->ip_count && i < USP_CARD_IPS; i++) {
        const usp_ip *ip = &card->ips[(round + i) % card->ip_count];
        status = usp_tcp_connect(ip, card->port, token, making->bootstrap->rank, peer, round_end(making),
                                 &making->connections[peer]);
        if (status == USP_OK || status == USP_TIMEOUT) break;
    }
    return status;
}

/* A rank that does not answer may be late, and is called again; who cannot be called at all is a failure. */
static usp_status call_all(usp_making *making, const usp_token *token, int round) {
    for (int peer = 0; peer < making->bootstrap->rank; peer++) {
        if (making->connections[peer] >= 0) continue;
        usp_status status = call(making, token, peer, round);
        int late = status == USP_TIMEOUT && usp_tcp_left(making->deadline) != 0;
        making->mine.waiting |= late;
        if (!late) USP_TRY(status);
    }
    return USP_OK;
}

static usp_status hear_all(usp_making *making, const usp_token *token) {
    const usp_bootstrap *bootstrap = making->bootstrap;
    usp_status status = usp_tcp_accept(making->listener, token, bootstrap->rank, bootstrap->rank + 1, bootstrap->size,
                                       round_end(making), making->connections);
    int late = status == USP_TIMEOUT && usp_tcp_left(making->deadline) != 0;
    making->mine.waiting |= late;
    return late ? USP_OK : status;
}

static int anybody_waits(const usp_making *making) {
    int waiting = 0;
    for (int i = 0; i < making->bootstrap->size; i++) waiting |= making->cards[i].waiting;
    return waiting;
}

/* Each rank calls the ranks before it, then hears those after it; rank 0 only hears, so the calls end. In rounds, since
 * a rank that could not call another is a failure that nobody else sees. */
static usp_status connect_all(usp_making *making, const usp_token *token) {
    for (int round = 0;; round++) {
        making->mine.waiting = 0;
        usp_status status = call_all(making, token, round);
        if (status == USP_OK) status = hear_all(making, token);
        USP_TRY(share_cards(making, status));
        if (!anybody_waits(making)) return USP_OK;
    }
}

static usp_status make_lines(usp_making *making) {
    USP_TRY(share_cards(making, identify(making)));
    usp_token token = making->cards[0].token;
    USP_TRY(share_cards(making, open_door(making)));
    return connect_all(making, &token);
}

usp_status usp_lines_connect(const usp_host *host, const usp_bootstrap *bootstrap, int timeout_ms, int *connections) {
    usp_making making = {.bootstrap = bootstrap, .listener = -1, .connections = connections};
    void *cards = NULL;
    for (int i = 0; i < bootstrap->size; i++) connections[i] = -1;
    usp_status status = usp_host_alloc(host, (size_t)bootstrap->size * sizeof(usp_card), "addresses", &cards);
    status = usp_bootstrap_agree(bootstrap, status);
    making.cards = cards;
    making.deadline = usp_tcp_deadline(timeout_ms);
    if (status == USP_OK) status = make_lines(&making);
    if (making.listener >= 0) close(making.listener);
    if (status != USP_OK) usp_tcp_close(connections, bootstrap->size);
    usp_host_free(host, cards);
    return status;
}
