/* conformance.c - what every comm must do, checked from outside through its table. It knows no backend.
 *
 * Every number of a check is a hash of (seed, round, ...), so each rank knows the whole plan without being told. */
#include "conformance.h"
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { USP_ROUNDS = 24, USP_MANY = 3, USP_GUARD = 8, USP_GUARD_BYTE = 0xA5 };

int usp_check(const usp_comm *comm, int good, const char *format, ...) {
    if (good) return 0;
    char text[400];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    fprintf(stderr, "rank %d of %d (%s): %s\n", comm ? comm->rank : -1, comm ? comm->size : -1,
            comm ? comm->ops->name : "no comm", text);
    return 1;
}

int usp_check_failure(const usp_comm *comm, usp_status status, usp_status wanted, const char *words) {
    const char *sentence = usp_last_error();
    return usp_check(comm, status == wanted && strstr(sentence, words), "wanted status %d with '%s', got %d: %s",
                     (int)wanted, words, (int)status, sentence);
}

static int usp_check_ok(const usp_comm *comm, usp_status status, const char *what) {
    return usp_check(comm, status == USP_OK, "%s: status %d: %s", what, (int)status, usp_last_error());
}

/* ---- the plan ---------------------------------------------------------------------------------------------------- */

typedef struct usp_round {
    unsigned seed;
    int round, step;
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
    usp_round whole = {round->seed, round->round, 0};
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
    default:
        return (size_t)(rest % 3000);
    }
}

static void usp_fill(const usp_round *round, int from, int to, int k, unsigned char *data, size_t bytes) {
    uint64_t hash = usp_draw(round, from, to, 1000 + k);
    for (size_t i = 0; i < bytes; i++) {
        hash = hash * 6364136223846793005u + 1442695040888963407u;
        data[i] = (unsigned char)(hash >> 56);
    }
}

/* ---- one side of an exchange ------------------------------------------------------------------------------------- */

/* The messages that go one way, with guards between them, on the host and on the device. */
typedef struct usp_side {
    int count;
    int *peer, *k; /* of each message */
    size_t *at, *bytes;
    size_t total;
    unsigned char *host;
    void *device;
} usp_side;

static int usp_from(const usp_comm *comm, int incoming, int peer) {
    return incoming ? peer : comm->rank;
}

static int usp_to(const usp_comm *comm, int incoming, int peer) {
    return incoming ? comm->rank : peer;
}

/* The peers in an order of this rank's own; the k of a message counts its predecessors with the same peer. */
static void usp_order(const usp_comm *comm, const usp_round *round, int incoming, usp_side *side) {
    for (int peer = 0; peer < comm->size; peer++)
        for (int k = usp_messages(round, usp_from(comm, incoming, peer), usp_to(comm, incoming, peer)); k > 0; k--)
            side->peer[side->count++] = peer;
    for (int i = side->count - 1; i > 0; i--) {
        int other = (int)(usp_draw(round, comm->rank, i, 50 + incoming) % (uint64_t)(i + 1)), peer = side->peer[i];
        side->peer[i] = side->peer[other];
        side->peer[other] = peer;
    }
    for (int i = 0; i < side->count; i++)
        for (int j = 0; j < i; j++) side->k[i] += side->peer[j] == side->peer[i];
}

static void usp_side_plan(const usp_comm *comm, const usp_round *round, int incoming, usp_side *side) {
    size_t most = (size_t)comm->size * USP_MANY + 1;
    *side = (usp_side){.peer = calloc(most, sizeof(int)), .k = calloc(most, sizeof(int))};
    side->at = calloc(most, sizeof(size_t));
    side->bytes = calloc(most, sizeof(size_t));
    usp_order(comm, round, incoming, side);
    for (int i = 0; i < side->count; i++) {
        side->at[i] = side->total + USP_GUARD;
        int from = usp_from(comm, incoming, side->peer[i]), to = usp_to(comm, incoming, side->peer[i]);
        side->bytes[i] = usp_bytes(round, from, to, side->k[i]);
        side->total = side->at[i] + side->bytes[i];
    }
    side->total += USP_GUARD;
    side->host = malloc(side->total);
    memset(side->host, USP_GUARD_BYTE, side->total);
}

/* Writes what every message should hold. */
static void usp_side_fill(const usp_comm *comm, const usp_round *round, int incoming, const usp_side *side,
                          unsigned char *data) {
    for (int i = 0; i < side->count; i++)
        usp_fill(round, usp_from(comm, incoming, side->peer[i]), usp_to(comm, incoming, side->peer[i]), side->k[i],
                 data + side->at[i], side->bytes[i]);
}

static void usp_side_free(const usp_comm *comm, usp_side *side) {
    if (side->device) comm->device->ops->free(comm->device, side->device);
    free(side->peer), free(side->k), free(side->at), free(side->bytes), free(side->host);
}

static usp_status usp_drain(const usp_comm *comm, usp_stream stream) {
    int busy = 1;
    usp_status status = USP_OK;
    while (busy && status == USP_OK) status = comm->device->ops->query(comm->device, stream, &busy);
    return status;
}

static usp_status usp_to_device(const usp_comm *comm, usp_side *side, usp_stream stream) {
    const usp_device_ops *ops = comm->device->ops;
    usp_status status = ops->alloc(comm->device, side->total, &side->device);
    if (status == USP_OK) status = ops->copy(comm->device, side->device, side->host, side->total, stream);
    return status;
}

static usp_status usp_from_device(const usp_comm *comm, usp_side *side, usp_stream stream) {
    usp_status status = comm->device->ops->copy(comm->device, side->host, side->device, side->total, stream);
    return status == USP_OK ? usp_drain(comm, stream) : status;
}

/* ---- exchange ---------------------------------------------------------------------------------------------------- */

static usp_status usp_exchange_sides(usp_comm *comm, const usp_side *out, const usp_side *in, usp_stream stream) {
    usp_send *sends = calloc((size_t)out->count + 1, sizeof *sends);
    usp_recv *recvs = calloc((size_t)in->count + 1, sizeof *recvs);
    for (int i = 0; i < out->count; i++)
        sends[i] = (usp_send){out->peer[i], (char *)out->device + out->at[i], out->bytes[i]};
    for (int i = 0; i < in->count; i++)
        recvs[i] = (usp_recv){in->peer[i], (char *)in->device + in->at[i], in->bytes[i]};
    usp_status status = comm->ops->exchange(comm, sends, out->count, recvs, in->count, stream);
    free(sends), free(recvs);
    return status;
}

static int usp_check_step(usp_comm *comm, const usp_round *round, usp_stream stream) {
    usp_side out, in;
    usp_side_plan(comm, round, 0, &out);
    usp_side_plan(comm, round, 1, &in);
    usp_side_fill(comm, round, 0, &out, out.host);
    usp_status status = usp_to_device(comm, &out, stream);
    if (status == USP_OK) status = usp_to_device(comm, &in, stream);
    if (status == USP_OK) status = usp_exchange_sides(comm, &out, &in, stream);
    if (status == USP_OK) status = usp_from_device(comm, &in, stream);
    int wrong = usp_check_ok(comm, status, "exchange");
    unsigned char *expected = malloc(in.total);
    memset(expected, USP_GUARD_BYTE, in.total);
    usp_side_fill(comm, round, 1, &in, expected);
    if (!wrong)
        wrong = usp_check(comm, memcmp(expected, in.host, in.total) == 0, "round %d: wrong bytes", round->round);
    free(expected);
    usp_side_free(comm, &out);
    usp_side_free(comm, &in);
    return wrong;
}

/* Groups make different numbers of exchanges in a round, so that they run apart. */
static int usp_check_exchanges(usp_comm *comm, unsigned seed, usp_stream stream) {
    for (int i = 0; i < USP_ROUNDS; i++) {
        usp_round round = {seed, i, 0};
        int steps = 1 + (int)(usp_draw(&round, usp_colour(&round, comm->rank), 0, 3) % 3);
        for (round.step = 1; round.step <= steps; round.step++)
            if (usp_check_step(comm, &round, stream)) return 1;
    }
    return 0;
}

/* ---- gather, shared memory --------------------------------------------------------------------------------------- */

static int usp_check_gather(usp_comm *comm, unsigned seed, size_t bytes) {
    usp_round round = {seed, (int)(bytes % 1000), 0};
    size_t total = bytes * (size_t)comm->size;
    unsigned char *mine = malloc(bytes + 1), *all = malloc(total + 1), *expected = malloc(total + 1);
    memset(all, 0, total + 1);
    memset(expected, 0, total + 1);
    usp_fill(&round, comm->rank, 0, 0, mine, bytes);
    for (int i = 0; i < comm->size; i++) usp_fill(&round, i, 0, 0, expected + (size_t)i * bytes, bytes);
    int wrong = usp_check_ok(comm, comm->ops->allgather(comm, mine, all, bytes), "allgather");
    if (!wrong) wrong = usp_check(comm, memcmp(all, expected, total + 1) == 0, "allgather of %zu: wrong bytes", bytes);
    free(mine), free(all), free(expected);
    return wrong;
}

static int usp_check_gathers(usp_comm *comm, unsigned seed) {
    const size_t sizes[] = {8, 0, 1, 1000, 70001, 1 << 20, 3};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        if (usp_check_gather(comm, seed + (unsigned)i, sizes[i])) return 1;
    return 0;
}

/* A ring step from shared memory to shared memory. */
static usp_status usp_shift_shared(usp_comm *comm, unsigned char *shared, size_t bytes, unsigned char *seen) {
    const usp_device_ops *ops = comm->device->ops;
    unsigned char mine[256];
    memset(mine, comm->rank + 1, sizeof mine);
    usp_send send = {(comm->rank + 1) % comm->size, shared, bytes};
    usp_recv recv = {(comm->rank + comm->size - 1) % comm->size, shared + bytes, bytes};
    usp_status status = ops->copy(comm->device, shared, mine, bytes, NULL);
    if (status == USP_OK && comm->size > 1) status = comm->ops->exchange(comm, &send, 1, &recv, 1, NULL);
    if (status == USP_OK && comm->size == 1) status = ops->copy(comm->device, shared + bytes, shared, bytes, NULL);
    if (status == USP_OK) status = ops->copy(comm->device, seen, shared + bytes, bytes, NULL);
    return status == USP_OK ? usp_drain(comm, NULL) : status;
}

static int usp_check_shared(usp_comm *comm) {
    unsigned char seen[256] = {0}, expected[256];
    void *shared;
    usp_status status = comm->ops->alloc_shared(comm, 2 * sizeof seen, &shared);
    if (usp_check_ok(comm, status, "alloc_shared")) return 1;
    if (usp_check_ok(comm, comm->ops->register_shared(comm, shared), "register_shared")) return 1;
    int wrong = usp_check(comm, (uintptr_t)shared % 256 == 0, "shared memory is not aligned");
    wrong += usp_check_ok(comm, usp_shift_shared(comm, shared, sizeof seen, seen), "exchange of shared memory");
    memset(expected, (comm->rank + comm->size - 1) % comm->size + 1, sizeof expected);
    wrong += usp_check(comm, memcmp(seen, expected, sizeof seen) == 0, "shared memory: wrong bytes");
    return wrong + usp_check_ok(comm, comm->ops->free_shared(comm, shared), "free_shared");
}

/* ---- refusals ---------------------------------------------------------------------------------------------------- */

/* Lists that no comm may take; nobody else hears of them. */
static int usp_check_refusals(usp_comm *comm) {
    char byte = 0;
    usp_send self = {comm->rank, &byte, 1}, beyond = {comm->size, &byte, 1};
    usp_recv before = {-1, &byte, 1};
    usp_status status = comm->ops->exchange(comm, &self, 1, NULL, 0, NULL);
    int wrong = usp_check_failure(comm, status, USP_INVALID, "itself");
    status = comm->ops->exchange(comm, &beyond, 1, NULL, 0, NULL);
    wrong += usp_check_failure(comm, status, USP_INVALID, "peer");
    status = comm->ops->exchange(comm, NULL, 0, &before, 1, NULL);
    return wrong + usp_check_failure(comm, status, USP_INVALID, "peer");
}

int usp_check_comm(usp_comm *comm, unsigned seed) {
    const usp_device_ops *ops = comm->device->ops;
    usp_stream stream = NULL;
    if (usp_check_ok(comm, ops->stream_create(comm->device, &stream), "stream")) return 1;
    int wrong = usp_check_exchanges(comm, seed, stream);
    if (!wrong) wrong = usp_check_gathers(comm, seed);
    if (!wrong) wrong = usp_check_shared(comm);
    if (!wrong) wrong = usp_check_refusals(comm);
    if (!wrong) wrong = usp_check_ok(comm, comm->ops->poll(comm), "poll");
    ops->stream_destroy(comm->device, stream);
    return wrong;
}

int usp_check_comm_mismatch(usp_comm *comm) {
    char out[64] = {0}, in[96], untouched[96];
    memset(in, USP_GUARD_BYTE, sizeof in);
    memset(untouched, USP_GUARD_BYTE, sizeof untouched);
    usp_send send = {1, out, sizeof out};
    usp_recv recv = {0, in, 32}, never = {1, in, 96};
    usp_status status = USP_OK;
    if (comm->rank == 0) status = comm->ops->exchange(comm, &send, 1, &never, 1, NULL);
    if (comm->rank == 1) status = comm->ops->exchange(comm, NULL, 0, &recv, 1, NULL);
    if (comm->rank > 1) status = comm->ops->allgather(comm, out, out, 0);
    int wrong = usp_check_failure(comm, status, USP_COMM, "rank 0 sends 64 bytes to rank 1, which expects 32");
    wrong += usp_check(comm, memcmp(in, untouched, sizeof in) == 0, "bytes of the wrong size were written");
    wrong += usp_check_failure(comm, comm->ops->poll(comm), USP_COMM, "expects 32");
    status = comm->ops->allgather(comm, out, out, 0);
    return wrong + usp_check_failure(comm, status, USP_COMM, "expects 32");
}

/* ---- making ------------------------------------------------------------------------------------------------------ */

usp_status usp_make_threads(const usp_comm_config *config, usp_rendezvous *rendezvous, int rank, usp_comm **comm) {
    usp_meeting meeting = {.all = NULL};
    usp_status status = usp_comm_create_threads(config, &meeting, rendezvous, rank, comm);
    usp_meeting_end(&meeting);
    return status;
}

usp_status usp_make_socket(const usp_comm_config *config, const usp_bootstrap *bootstrap, usp_comm **comm) {
    usp_meeting meeting = {.bootstrap = *bootstrap};
    usp_status status = usp_comm_create_socket(config, &meeting, comm);
    usp_meeting_end(&meeting);
    return status;
}
