/* conformance.c - what every transport must do, checked from outside through its table. It knows no backend.
 *
 * Every number of a check is a hash of (seed, round, ...), so each rank knows the whole plan without being told. */
#include "conformance.h"
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { USP_ROUNDS = 24, USP_MANY = 3, USP_GUARD = 8, USP_GUARD_BYTE = 0xA5, USP_SHARED = 1 << 20 };

int usp_check(const usp_transport *transport, int good, const char *format, ...) {
    if (good) return 0;
    char text[400];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    fprintf(stderr, "rank %d of %d (%s): %s\n", transport ? transport->rank : -1, transport ? transport->size : -1,
            transport ? transport->ops->name : "no transport", text);
    return 1;
}

int usp_check_failure(const usp_transport *transport, usp_status status, usp_status wanted, const char *words) {
    const char *sentence = usp_last_error();
    return usp_check(transport, status == wanted && strstr(sentence, words), "wanted status %d with '%s', got %d: %s",
                     (int)wanted, words, (int)status, sentence);
}

int usp_check_ok(const usp_transport *transport, usp_status status, const char *what) {
    return usp_check(transport, status == USP_OK, "%s: status %d: %s", what, (int)status, usp_last_error());
}

/* ---- the plan ---------------------------------------------------------------------------------------------------- */

typedef struct usp_round {
    unsigned seed;
    int round, step;
    char *shared; /* USP_SHARED bytes */
} usp_round;

static uint64_t usp_mix(uint64_t hash, uint64_t value) {
    hash = (hash ^ value) * 0x9E3779B97F4A7C15u;
    return hash ^ (hash >> 29);
}

static uint64_t usp_draw(const usp_round *round, int a, int b, int c) {
    uint64_t hash = usp_mix(usp_mix(round->seed + 1u, (uint64_t)round->round), (uint64_t)round->step);
    return usp_mix(usp_mix(usp_mix(usp_mix(hash, (uint64_t)a + 7), (uint64_t)b + 11), (uint64_t)c + 13), 17) >> 8;
}

/* Ranks of one colour exchange with each other and know nothing of the rest. */
static int usp_colour(const usp_round *round, int rank) {
    usp_round whole = {round->seed, round->round, 0, NULL};
    return (int)(usp_draw(&whole, rank, 0, 1) % (round->round % 3 + 1u));
}

static int usp_messages(const usp_round *round, int from, int to) {
    if (from == to || usp_colour(round, from) != usp_colour(round, to)) return 0;
    return (int)(usp_draw(round, from, to, 2) % (USP_MANY + 1));
}

static size_t usp_bytes(const usp_round *round, int from, int to, int k) {
    uint64_t draw = usp_draw(round, from, to, 100 + k), rest = draw / 16;
    switch (draw % 16) {
    case 0:
        return 0;
    case 1:
        return 1;
    case 2:
        return rest % 64 == 0 ? (size_t)1 << 20 : 5;
    case 3:
        return (size_t)(rest % 100000);
    case 4:
    case 5:
        return (size_t)(rest % 3000);
    default:
        return (size_t)(rest % 40) * 240; /* in rows of many lengths */
    }
}

/* Where message k of a pair may arrive in the receiver's shared memory: some have such a place. */
static char *usp_there(const usp_round *round, int from, int to, int k) {
    size_t at = 0;
    if (usp_draw(round, from, to, 5000 + k) % 3 != 0) return NULL;
    for (int f = 0; f <= from; f++)
        for (int i = 0; i < (f < from ? usp_messages(round, f, to) : k); i++)
            at += (usp_bytes(round, f, to, i) + USP_GUARD) / USP_GUARD * USP_GUARD;
    return at + usp_bytes(round, from, to, k) <= USP_SHARED ? round->shared + at : NULL;
}

/* Rows of `row` bytes, `stride` apart. */
static void usp_fill(const usp_round *round, int from, int to, int k, unsigned char *data, size_t bytes, size_t row,
                     size_t stride) {
    uint64_t hash = usp_draw(round, from, to, 1000 + k);
    for (size_t i = 0; i < bytes; i++) {
        hash = hash * 6364136223846793005u + 1442695040888963407u;
        data[i / row * stride + i % row] = (unsigned char)(hash >> 56);
    }
}

/* ---- one side of an exchange ------------------------------------------------------------------------------------- */

/* Where a message lies, and where it may be packed. */
typedef struct usp_place {
    size_t at, bytes, row, stride, packed;
    int joined;
} usp_place;

/* The messages that go one way, with guards between them and between their rows, on the host and on the device; behind
 * all of them, where they may be packed. */
typedef struct usp_side {
    int count;
    int *peer, *k; /* of each message */
    usp_place *place;
    size_t total, with_packed;
    unsigned char *host;
    void *device;
} usp_side;

static int usp_from(const usp_transport *transport, int incoming, int peer) {
    return incoming ? peer : transport->rank;
}

static int usp_to(const usp_transport *transport, int incoming, int peer) {
    return incoming ? transport->rank : peer;
}

/* In such rounds the messages of a pair follow each other, and some are joined. */
static int usp_joins(const usp_round *round) {
    return round->round % 2;
}

/* Whether message k of a pair is joined to the one before it. */
static int usp_joined(const usp_round *round, int from, int to, int k) {
    if (!usp_joins(round) || k == 0 || usp_draw(round, from, to, 200 + k) % 2) return 0;
    return usp_bytes(round, from, to, k) % 2 == 0 && usp_bytes(round, from, to, k - 1) % 2 == 0;
}

/* The peers in an order of this rank's own; the k of a message counts its predecessors with the same peer. */
static void usp_order(const usp_transport *transport, const usp_round *round, int incoming, usp_side *side) {
    for (int peer = 0; peer < transport->size; peer++)
        for (int k = usp_messages(round, usp_from(transport, incoming, peer), usp_to(transport, incoming, peer)); k > 0;
             k--)
            side->peer[side->count++] = peer;
    for (int i = usp_joins(round) ? 0 : side->count - 1; i > 0; i--) {
        int other = (int)(usp_draw(round, transport->rank, i, 50 + incoming) % (uint64_t)(i + 1)), peer = side->peer[i];
        side->peer[i] = side->peer[other];
        side->peer[other] = peer;
    }
    for (int i = 0; i < side->count; i++)
        for (int j = 0; j < i; j++) side->k[i] += side->peer[j] == side->peer[i];
}

/* How one side cuts a message into rows is its own affair. */
static usp_place usp_place_of(const usp_round *round, const usp_transport *transport, int incoming, int i, size_t at,
                              size_t bytes) {
    const size_t rows[] = {0, 2, 4, 6, 16, 48, 80, 240};
    uint64_t draw = usp_draw(round, transport->rank, i, 3000 + incoming);
    size_t row = rows[draw % 8], gap = 2 * (size_t)(draw / 8 % 20);
    if (row == 0 || bytes % row != 0) row = bytes ? bytes : 1;
    return (usp_place){.at = at + at % 2, .bytes = bytes, .row = row, .stride = row + gap};
}

static size_t usp_extent(const usp_place *place) {
    return place->bytes ? (place->bytes / place->row - 1) * place->stride + place->row : 0;
}

static void usp_side_plan(const usp_transport *transport, const usp_round *round, int incoming, usp_side *side) {
    size_t most = (size_t)transport->size * USP_MANY + 1;
    *side = (usp_side){.peer = calloc(most, sizeof(int)), .k = calloc(most, sizeof(int))};
    side->place = calloc(most, sizeof(usp_place));
    usp_order(transport, round, incoming, side);
    for (int i = 0; i < side->count; i++) {
        int from = usp_from(transport, incoming, side->peer[i]), to = usp_to(transport, incoming, side->peer[i]);
        size_t bytes = usp_bytes(round, from, to, side->k[i]);
        side->place[i] = usp_place_of(round, transport, incoming, i, side->total + USP_GUARD, bytes);
        side->place[i].joined = usp_joined(round, from, to, side->k[i]);
        side->total = side->place[i].at + usp_extent(&side->place[i]);
    }
    side->total += USP_GUARD;
    side->with_packed = side->total;
    for (int i = 0; i < side->count; i++) {
        size_t gap = 2 * (size_t)(usp_draw(round, i, incoming, 4000) % 9);
        side->place[i].packed = side->with_packed + (side->place[i].joined ? 0 : gap + side->with_packed % 2);
        side->with_packed = side->place[i].packed + side->place[i].bytes;
    }
    side->host = malloc(side->total);
    memset(side->host, USP_GUARD_BYTE, side->total);
}

/* Writes what every message should hold. */
static void usp_side_fill(const usp_transport *transport, const usp_round *round, int incoming, const usp_side *side,
                          unsigned char *data) {
    for (int i = 0; i < side->count; i++) {
        const usp_place *place = &side->place[i];
        usp_fill(round, usp_from(transport, incoming, side->peer[i]), usp_to(transport, incoming, side->peer[i]),
                 side->k[i], data + place->at, place->bytes, place->row, place->stride);
    }
}

static void usp_side_free(const usp_transport *transport, usp_side *side) {
    if (side->device) transport->device->ops->free(transport->device, side->device);
    free(side->peer), free(side->k), free(side->place), free(side->host);
}

usp_status usp_drain(const usp_transport *transport, usp_stream stream) {
    int busy = 1;
    usp_status status = USP_OK;
    while (busy && status == USP_OK) status = transport->device->ops->query(transport->device, stream, &busy);
    return status;
}

static usp_status usp_to_device(const usp_transport *transport, usp_side *side, usp_stream stream) {
    const usp_device_ops *ops = transport->device->ops;
    usp_status status = ops->alloc(transport->device, side->with_packed, &side->device);
    if (status == USP_OK) status = ops->copy(transport->device, side->device, side->host, side->total, stream);
    return status;
}

static usp_status usp_from_device(const usp_transport *transport, usp_side *side, usp_stream stream) {
    usp_status status = transport->device->ops->copy(transport->device, side->host, side->device, side->total, stream);
    return status == USP_OK ? usp_drain(transport, stream) : status;
}

/* ---- exchange ---------------------------------------------------------------------------------------------------- */

static usp_message usp_message_of(const usp_transport *transport, const usp_round *round, const usp_side *side,
                                  int incoming, int i) {
    const usp_place *place = &side->place[i];
    int from = usp_from(transport, incoming, side->peer[i]), to = usp_to(transport, incoming, side->peer[i]);
    return (usp_message){.peer = side->peer[i],
                         .base = (char *)side->device + place->at,
                         .rows = (int64_t)(place->bytes / place->row),
                         .bytes = place->row,
                         .stride = place->stride,
                         .packed = place->bytes % 2 == 0 ? (char *)side->device + place->packed : NULL,
                         .joined = place->joined,
                         .there = usp_there(round, from, to, side->k[i]),
                         .there_stride = place->row};
}

static usp_status usp_exchange_sides(usp_transport *transport, const usp_round *round, const usp_side *out,
                                     const usp_side *in, usp_stream stream) {
    usp_message *sends = calloc((size_t)out->count + 1, sizeof *sends);
    usp_message *recvs = calloc((size_t)in->count + 1, sizeof *recvs);
    for (int i = 0; i < out->count; i++) sends[i] = usp_message_of(transport, round, out, 0, i);
    for (int i = 0; i < in->count; i++) recvs[i] = usp_message_of(transport, round, in, 1, i);
    int lane = round->round % USP_LANES;
    usp_status status = transport->ops->exchange(transport, lane, sends, out->count, recvs, in->count, stream);
    free(sends), free(recvs);
    return status;
}

static int usp_check_step(usp_transport *transport, const usp_round *round, usp_stream stream) {
    usp_side out, in;
    usp_side_plan(transport, round, 0, &out);
    usp_side_plan(transport, round, 1, &in);
    usp_side_fill(transport, round, 0, &out, out.host);
    usp_status status = usp_to_device(transport, &out, stream);
    if (status == USP_OK) status = usp_to_device(transport, &in, stream);
    if (status == USP_OK) status = usp_exchange_sides(transport, round, &out, &in, stream);
    if (status == USP_OK) status = usp_from_device(transport, &in, stream);
    int wrong = usp_check_ok(transport, status, "exchange");
    unsigned char *expected = malloc(in.total);
    memset(expected, USP_GUARD_BYTE, in.total);
    usp_side_fill(transport, round, 1, &in, expected);
    if (!wrong)
        wrong = usp_check(transport, memcmp(expected, in.host, in.total) == 0, "round %d: wrong bytes", round->round);
    free(expected);
    usp_side_free(transport, &out);
    usp_side_free(transport, &in);
    return wrong;
}

/* Groups make different numbers of exchanges in a round, so that they run apart. */
static int usp_check_exchanges(usp_transport *transport, unsigned seed, char *shared, usp_stream stream) {
    for (int i = 0; i < USP_ROUNDS; i++) {
        usp_round round = {seed, i, 0, shared};
        int steps = 1 + (int)(usp_draw(&round, usp_colour(&round, transport->rank), 0, 3) % 3);
        for (round.step = 1; round.step <= steps; round.step++)
            if (usp_check_step(transport, &round, stream)) return 1;
    }
    return 0;
}

/* ---- gather ------------------------------------------------------------------------------------------------------ */

static int usp_check_gather(usp_transport *transport, unsigned seed, size_t bytes) {
    usp_round round = {seed, (int)(bytes % 1000), 0, NULL};
    size_t total = bytes * (size_t)transport->size;
    unsigned char *mine = malloc(bytes + 1), *all = malloc(total + 1), *expected = malloc(total + 1);
    memset(all, 0, total + 1);
    memset(expected, 0, total + 1);
    usp_fill(&round, transport->rank, 0, 0, mine, bytes, bytes + 1, 0);
    for (int i = 0; i < transport->size; i++)
        usp_fill(&round, i, 0, 0, expected + (size_t)i * bytes, bytes, bytes + 1, 0);
    int wrong = usp_check_ok(transport, usp_transport_allgather(transport, mine, all, bytes), "allgather");
    if (!wrong)
        wrong = usp_check(transport, memcmp(all, expected, total + 1) == 0, "allgather of %zu: wrong bytes", bytes);
    free(mine), free(all), free(expected);
    return wrong;
}

static int usp_check_gathers(usp_transport *transport, unsigned seed) {
    const size_t sizes[] = {8, 0, 1, 1000, 70001, 1 << 20, 3};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        if (usp_check_gather(transport, seed + (unsigned)i, sizes[i])) return 1;
    return 0;
}

/* ---- refusals ---------------------------------------------------------------------------------------------------- */

/* Lists that no transport may take; nobody else hears of them. */
static int usp_check_refusals(usp_transport *transport) {
    char byte = 0;
    usp_message self = usp_message_whole(transport->rank, &byte, 1);
    usp_message beyond = usp_message_whole(transport->size, &byte, 1);
    usp_message before = usp_message_whole(-1, &byte, 1);
    usp_status status = transport->ops->exchange(transport, 0, &self, 1, NULL, 0, NULL);
    int wrong = usp_check_failure(transport, status, USP_INVALID, "itself");
    status = transport->ops->exchange(transport, 0, &beyond, 1, NULL, 0, NULL);
    wrong += usp_check_failure(transport, status, USP_INVALID, "peer");
    status = transport->ops->exchange(transport, 0, NULL, 0, &before, 1, NULL);
    return wrong + usp_check_failure(transport, status, USP_INVALID, "peer");
}

static int usp_check_all(usp_transport *transport, unsigned seed, char *shared, usp_stream stream) {
    if (usp_check_ok(transport, transport->ops->register_shared(transport, shared), "register_shared")) return 1;
    int wrong = usp_check_exchanges(transport, seed, shared, stream);
    if (!wrong) wrong = usp_check_gathers(transport, seed);
    if (!wrong) wrong = usp_check_shared(transport, shared, stream);
    if (!wrong) wrong = usp_check_refusals(transport);
    if (!wrong) wrong = usp_check_ok(transport, usp_transport_poll(transport), "poll");
    return wrong || usp_check_ok(transport, transport->ops->free_shared(transport, shared), "free_shared");
}

int usp_check_transport(usp_transport *transport, unsigned seed) {
    const usp_device_ops *ops = transport->device->ops;
    usp_stream stream = NULL;
    void *shared = NULL;
    if (usp_check_ok(transport, ops->stream_create(transport->device, &stream), "stream")) return 1;
    if (usp_check_ok(transport, transport->ops->alloc_shared(transport, USP_SHARED, &shared), "alloc_shared")) return 1;
    int wrong = usp_check_all(transport, seed, shared, stream);
    ops->stream_destroy(transport->device, stream);
    return wrong;
}

int usp_check_transport_mismatch(usp_transport *transport) {
    char out[64] = {0}, in[96], untouched[96];
    memset(in, USP_GUARD_BYTE, sizeof in);
    memset(untouched, USP_GUARD_BYTE, sizeof untouched);
    usp_message send = usp_message_whole(1, out, sizeof out);
    usp_message recv = usp_message_whole(0, in, 32), never = usp_message_whole(1, in, 96);
    usp_status status = USP_OK;
    if (transport->rank == 0) status = transport->ops->exchange(transport, 0, &send, 1, &never, 1, NULL);
    if (transport->rank == 1) status = transport->ops->exchange(transport, 0, NULL, 0, &recv, 1, NULL);
    if (transport->rank > 1) status = usp_transport_allgather(transport, out, out, 0);
    int wrong = usp_check_failure(transport, status, USP_COMM, "rank 0 sends 64 bytes to rank 1, which expects 32");
    wrong += usp_check(transport, memcmp(in, untouched, sizeof in) == 0, "bytes of the wrong size were written");
    wrong += usp_check_failure(transport, usp_transport_poll(transport), USP_COMM, "expects 32");
    status = usp_transport_allgather(transport, out, out, 0);
    return wrong + usp_check_failure(transport, status, USP_COMM, "expects 32");
}

/* ---- making ------------------------------------------------------------------------------------------------------ */

usp_status usp_make_threads(const usp_transport_config *config, usp_rendezvous *rendezvous, int rank,
                            usp_transport **transport) {
    usp_meeting meeting = {.all = NULL};
    usp_status status = usp_transport_create_threads(config, &meeting, rendezvous, rank, transport);
    usp_meeting_end(&meeting);
    return status;
}

usp_status usp_make_socket(const usp_transport_config *config, const usp_bootstrap *bootstrap,
                           usp_transport **transport) {
    usp_meeting meeting = {.bootstrap = *bootstrap};
    usp_status status = usp_transport_create_socket(config, &meeting, transport);
    usp_meeting_end(&meeting);
    return status;
}
