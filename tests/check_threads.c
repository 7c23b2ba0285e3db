/* check_threads.c - the transport whose ranks are threads: conformance, and every way in which a rank can let the
 * others down. A plain program, so that it runs under ThreadSanitizer; it needs no GPU. */
#define _POSIX_C_SOURCE 200809L
#include "conformance.h"
#include "split.h"
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { USP_MOST = 8, USP_STORMS = 40 };

typedef struct usp_crew usp_crew;
typedef int (*usp_scene)(const usp_crew *crew, usp_transport *transport);

/* The ranks of one rendezvous, each a thread playing the same scene. */
struct usp_crew {
    usp_rendezvous *rendezvous;
    usp_scene scene;
    int size, timeout_ms;
    int odd; /* the rank that behaves differently */
    unsigned seed;
};

typedef struct usp_actor {
    const usp_crew *crew;
    int rank, wrong;
    pthread_t thread;
} usp_actor;

static void usp_rest(int milliseconds) {
    struct timespec time = {milliseconds / 1000, (long)(milliseconds % 1000) * 1000000L};
    nanosleep(&time, NULL);
}

static double usp_seconds(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

static void usp_words(char text[32], int rank) {
    snprintf(text, 32, "rank %d ", rank);
}

/* ---- the crew ---------------------------------------------------------------------------------------------------- */

static void *usp_act(void *argument) {
    usp_actor *actor = argument;
    const usp_crew *crew = actor->crew;
    usp_world_config defaults = {.struct_size = sizeof defaults};
    usp_host host = usp_host_from_config(&defaults);
    usp_device *device;
    usp_transport *transport;
    if (usp_check(NULL, usp_device_create_cpu(&host, &device) == USP_OK, "no device")) exit(1);
    usp_transport_config config = {.device = device, .host = &host, .timeout_ms = crew->timeout_ms};
    usp_status status = usp_make_threads(&config, crew->rendezvous, actor->rank, &transport);
    actor->wrong = usp_check(NULL, status == USP_OK, "rank %d could not join: %s", actor->rank, usp_last_error());
    if (status == USP_OK) {
        actor->wrong = crew->scene(crew, transport);
        usp_transport_end(transport);
    }
    device->ops->destroy(device);
    return NULL;
}

/* Plays `scene` on a new rendezvous; `count` of its ranks come. */
static int usp_play_some(usp_crew crew, int count) {
    usp_actor actors[USP_MOST];
    int wrong = 0;
    if (usp_check(NULL, usp_rendezvous_create(crew.size, &crew.rendezvous) == USP_OK, "no rendezvous")) return 1;
    for (int i = 0; i < count; i++) {
        actors[i] = (usp_actor){.crew = &crew, .rank = i};
        if (pthread_create(&actors[i].thread, NULL, usp_act, &actors[i]) != 0) exit(1);
    }
    for (int i = 0; i < count; i++) {
        pthread_join(actors[i].thread, NULL);
        wrong += actors[i].wrong;
    }
    usp_rendezvous_destroy(crew.rendezvous);
    return wrong;
}

static int usp_play(usp_scene scene, int size, int timeout_ms, int odd) {
    return usp_play_some((usp_crew){NULL, scene, size, timeout_ms, odd, 1}, size);
}

/* ---- scenes ------------------------------------------------------------------------------------------------------ */

static int usp_scene_conformance(const usp_crew *crew, usp_transport *transport) {
    return usp_check_transport(transport, crew->seed + (unsigned)transport->size);
}

static int usp_scene_mismatch(const usp_crew *crew, usp_transport *transport) {
    (void)crew;
    return usp_check_transport_mismatch(transport);
}

/* One step of a ring, or one exchange of everybody with everybody. */
static usp_status usp_ring_step(usp_transport *transport) {
    char in[16], out[16] = {0};
    usp_message send = usp_message_whole((transport->rank + 1) % transport->size, out, sizeof out);
    usp_message recv = usp_message_whole((transport->rank + transport->size - 1) % transport->size, in, sizeof in);
    return transport->ops->exchange(transport, 0, &send, 1, &recv, 1, NULL);
}

static usp_status usp_all_step(usp_transport *transport) {
    char in[USP_MOST][16], out[16] = {0};
    usp_message sends[USP_MOST];
    usp_message recvs[USP_MOST];
    int count = 0;
    for (int peer = 0; peer < transport->size; peer++) {
        if (peer == transport->rank) continue;
        sends[count] = usp_message_whole(peer, out, sizeof out);
        recvs[count++] = usp_message_whole(peer, in[peer], sizeof in[peer]);
    }
    return transport->ops->exchange(transport, 0, sends, count, recvs, count, NULL);
}

/* Exchanges until something fails, which it must. */
static usp_status usp_run_ring(usp_transport *transport) {
    usp_status status;
    do status = usp_ring_step(transport);
    while (status == USP_OK);
    return status;
}

/* The odd rank stops coming after some steps; all, itself included, learn that it was it. */
static int usp_scene_late(const usp_crew *crew, usp_transport *transport) {
    char odd[32];
    usp_words(odd, crew->odd);
    double start = usp_seconds();
    usp_status status = USP_OK;
    for (int i = 0; i < 5 && status == USP_OK; i++) status = usp_ring_step(transport);
    if (transport->rank == crew->odd) usp_rest(2 * crew->timeout_ms);
    status = usp_run_ring(transport);
    double limit = 1e-3 * (transport->rank == crew->odd ? 4 : 2) * crew->timeout_ms + 1.0;
    int wrong = usp_check_failure(transport, status, USP_TIMEOUT, odd);
    wrong += usp_check(transport, usp_seconds() - start < limit, "took too long");
    return wrong + usp_check_failure(transport, usp_transport_poll(transport), USP_TIMEOUT, odd);
}

/* Each rank waits for the next one, the first rank longest: it must look past those that wait themselves. */
static int usp_scene_chain(const usp_crew *crew, usp_transport *transport) {
    char last[32], byte = 0;
    usp_message send = usp_message_whole(transport->rank - 1, &byte, 1);
    usp_message recv = usp_message_whole(transport->rank + 1, &byte, 1);
    usp_words(last, transport->size - 1);
    int is_last = transport->rank == transport->size - 1;
    usp_rest(is_last ? 3 * crew->timeout_ms : 20 * transport->rank);
    usp_status status = transport->ops->exchange(transport, 0, NULL, 0, &recv, !is_last, NULL);
    if (status == USP_OK) status = transport->ops->exchange(transport, 0, &send, 1, NULL, 0, NULL);
    return usp_check_failure(transport, status, USP_TIMEOUT, last);
}

static int usp_scene_late_gather(const usp_crew *crew, usp_transport *transport) {
    char odd[32], all[USP_MOST];
    usp_words(odd, crew->odd);
    if (transport->rank == crew->odd) usp_rest(2 * crew->timeout_ms);
    return usp_check_failure(transport, usp_transport_allgather(transport, odd, all, 1), USP_TIMEOUT, odd);
}

static int usp_scene_left(const usp_crew *crew, usp_transport *transport) {
    char odd[32];
    usp_words(odd, crew->odd);
    if (transport->rank == crew->odd) return 0;
    double start = usp_seconds();
    int wrong = usp_check_failure(transport, usp_all_step(transport), USP_PEER_LOST, odd);
    return wrong + usp_check(transport, usp_seconds() - start < 5, "a rank that left was waited for");
}

static int usp_scene_left_gather(const usp_crew *crew, usp_transport *transport) {
    char odd[32], all[USP_MOST];
    usp_words(odd, crew->odd);
    if (transport->rank == crew->odd) return 0;
    return usp_check_failure(transport, usp_transport_allgather(transport, odd, all, 1), USP_PEER_LOST, odd);
}

/* A rank that is not needed may leave while the others go on. */
static int usp_scene_left_early(const usp_crew *crew, usp_transport *transport) {
    char byte = 0;
    int wrong = usp_check(transport, usp_ring_step(transport) == USP_OK, "first step: %s", usp_last_error());
    for (int i = 0; i < 100 && transport->rank != crew->odd && transport->rank < 2; i++) {
        usp_message send = usp_message_whole(1 - transport->rank, &byte, 1);
        usp_message recv = usp_message_whole(1 - transport->rank, &byte, 1);
        usp_status status = transport->rank == 0 ? transport->ops->exchange(transport, 0, &send, 1, NULL, 0, NULL)
                                                 : transport->ops->exchange(transport, 0, NULL, 0, &recv, 1, NULL);
        wrong += usp_check(transport, status == USP_OK, "step %d: %s", i, usp_last_error());
    }
    return wrong;
}

static void *usp_abort_soon(void *argument) {
    usp_transport *transport = argument;
    usp_rest(1);
    for (int i = 0; i < 3; i++) usp_transport_abort(transport);
    return NULL;
}

/* Another thread of the odd rank aborts in the middle of whatever all ranks do. */
static int usp_scene_abort(const usp_crew *crew, usp_transport *transport) {
    char odd[32];
    pthread_t thread;
    usp_words(odd, crew->odd);
    if (transport->rank == crew->odd && pthread_create(&thread, NULL, usp_abort_soon, transport) != 0) exit(1);
    usp_status status;
    do status = crew->seed % 2 ? usp_ring_step(transport) : usp_all_step(transport);
    while (status == USP_OK);
    int wrong = usp_check_failure(transport, status, USP_COMM, odd);
    if (transport->rank == crew->odd) pthread_join(thread, NULL);
    return wrong + usp_check_failure(transport, usp_transport_poll(transport), USP_COMM, odd);
}

static int usp_scene_overdue(const usp_crew *crew, usp_transport *transport) {
    usp_status status = transport->rank == crew->odd ? usp_transport_overdue(transport) : usp_run_ring(transport);
    return usp_check_failure(transport, status, USP_TIMEOUT, "behind");
}

/* Gathers of different sizes. */
static int usp_scene_gather_sizes(const usp_crew *crew, usp_transport *transport) {
    char all[2 * USP_MOST], mine[2] = {0};
    usp_status status = usp_transport_allgather(transport, mine, all, transport->rank == crew->odd ? 2 : 1);
    return usp_check_failure(transport, status, USP_COMM, "bytes");
}

static int usp_scene_split(const usp_crew *crew, usp_transport *transport) {
    struct ncclComm *axis;
    (void)crew;
    return usp_check_failure(transport, usp_nccl_split(transport, 0, 0, &axis), USP_UNSUPPORTED, "NCCL");
}

/* ---- events ------------------------------------------------------------------------------------------------------ */

/* The CPU's device, counting what the transport would have streams wait for. */
typedef struct usp_counter {
    usp_device base;
    usp_device *real;
    usp_device_ops ops;
    int records, waits;
} usp_counter;

static usp_status usp_count_record(usp_device *device, usp_event *event, usp_stream stream) {
    usp_counter *counter = (usp_counter *)device;
    counter->records++;
    return counter->real->ops->event_record(counter->real, event, stream);
}

static usp_status usp_count_wait(usp_device *device, usp_event *event, usp_stream stream) {
    usp_counter *counter = (usp_counter *)device;
    counter->waits++;
    return counter->real->ops->event_wait(counter->real, event, stream);
}

/* A receiver's stream waits for the sender's, and the sender's for the receiver's, once a message. */
static int usp_scene_events(const usp_crew *crew, usp_transport *transport) {
    usp_device *real = transport->device;
    usp_counter counter = {.real = real, .ops = *real->ops};
    (void)crew;
    counter.base = (usp_device){&counter.ops, real->host};
    counter.ops.event_record = usp_count_record;
    counter.ops.event_wait = usp_count_wait;
    transport->device = &counter.base;
    int wrong = usp_check(transport, usp_all_step(transport) == USP_OK, "exchange: %s", usp_last_error());
    transport->device = real;
    int messages = transport->size - 1;
    wrong += usp_check(transport, counter.records == 1 + messages, "%d records", counter.records);
    wrong +=
        usp_check(transport, counter.waits >= 1 + messages && counter.waits <= 2 * messages, "%d waits", counter.waits);
    return wrong;
}

/* ---- joining ----------------------------------------------------------------------------------------------------- */

/* Ranks come, but not the last one. */
static void *usp_join_in_vain(void *argument) {
    usp_actor *actor = argument;
    usp_world_config defaults = {.struct_size = sizeof defaults};
    usp_host host = usp_host_from_config(&defaults);
    usp_device *device;
    usp_transport *transport = NULL;
    if (usp_device_create_cpu(&host, &device) != USP_OK) exit(1);
    usp_transport_config config = {.device = device, .host = &host, .timeout_ms = actor->crew->timeout_ms};
    usp_status status = usp_make_threads(&config, actor->crew->rendezvous, actor->rank, &transport);
    actor->wrong =
        usp_check_failure(NULL, status, USP_TIMEOUT, "rank 3 ") + usp_check(NULL, !transport, "a transport remains");
    status = usp_make_threads(&config, actor->crew->rendezvous, actor->rank, &transport); /* the place is free again */
    actor->wrong += usp_check_failure(NULL, status, USP_TIMEOUT, "rank 3 ");
    device->ops->destroy(device);
    return NULL;
}

/* `count` ranks, each of which joins by itself. */
static int usp_gather_crew(void *(*body)(void *), int size, int count, int timeout_ms) {
    usp_crew crew = {.size = size, .timeout_ms = timeout_ms};
    usp_actor actors[USP_MOST];
    int wrong = 0;
    if (usp_rendezvous_create(crew.size, &crew.rendezvous) != USP_OK) return 1;
    for (int i = 0; i < count; i++) {
        actors[i] = (usp_actor){.crew = &crew, .rank = i};
        if (pthread_create(&actors[i].thread, NULL, body, &actors[i]) != 0) exit(1);
    }
    for (int i = 0; i < count; i++) {
        pthread_join(actors[i].thread, NULL);
        wrong += actors[i].wrong;
    }
    usp_rendezvous_destroy(crew.rendezvous);
    return wrong;
}

static int usp_check_arguments(void) {
    usp_rendezvous *rendezvous;
    int wrong = usp_check_failure(NULL, usp_rendezvous_create(0, &rendezvous), USP_INVALID, "size");
    wrong += usp_check_failure(NULL, usp_rendezvous_create(2, NULL), USP_INVALID, "rendezvous");
    usp_rendezvous_destroy(NULL);
    return wrong;
}

/* ---- a copy that does not end ------------------------------------------------------------------------------------ */

static usp_status usp_copy_late(usp_device *device, void *to, const void *from, size_t bytes, usp_stream stream) {
    (void)device, (void)stream;
    usp_rest(3000);
    memcpy(to, from, bytes);
    return USP_OK;
}

/* What rank 1 leaves behind is no leak. */
static _Alignas(16) char usp_pool[1 << 14];

static void *usp_draw_memory(void *user, size_t bytes) {
    size_t *used = user, at = *used;
    *used += (bytes + 15) / 16 * 16;
    return *used <= sizeof usp_pool ? usp_pool + at : NULL;
}

static void usp_keep_memory(void *user, void *memory) {
    (void)user, (void)memory;
}

/* Rank 0 sends to rank 1 and is stuck in its copy from rank 2. */
static usp_status usp_exchange_stuck(usp_transport *transport) {
    char in[4], out[4] = {0};
    usp_message send = usp_message_whole(transport->rank == 0 ? 1 : 0, out, sizeof out);
    usp_message recv = usp_message_whole(transport->rank == 0 ? 2 : 0, in, sizeof in);
    usp_rest(transport->rank == 0 ? 50 : transport->rank == 1 ? 200 : 0);
    return transport->ops->exchange(transport, 0, &send, transport->rank != 1, &recv, transport->rank != 2, NULL);
}

/* Rank 1 has its message and leaves: not at once, since rank 0 still needs its event, and not when rank 0 is done. */
static void *usp_meet_stuck(void *argument) {
    usp_actor *actor = argument;
    usp_world_config defaults = {.struct_size = sizeof defaults};
    usp_host host = usp_host_from_config(&defaults);
    size_t used = 0;
    if (actor->rank == 1) host = (usp_host){.alloc = usp_draw_memory, .free = usp_keep_memory, .user = &used};
    usp_device *device;
    usp_transport *transport;
    if (usp_device_create_cpu(&host, &device) != USP_OK) exit(1);
    usp_device_ops slow = *device->ops;
    slow.copy = usp_copy_late;
    if (actor->rank == 0) device->ops = &slow;
    usp_transport_config config = {.device = device, .host = &host, .timeout_ms = actor->crew->timeout_ms};
    if (usp_make_threads(&config, actor->crew->rendezvous, actor->rank, &transport) != USP_OK) exit(1);
    usp_status status = usp_exchange_stuck(transport);
    double begin = usp_seconds();
    if (actor->rank == 1) {
        actor->wrong = usp_check(transport, status == USP_OK, "%s", usp_last_error());
        usp_transport_end(transport);
        actor->wrong += usp_check(NULL, usp_seconds() - begin < 2, "left after %.1f s", usp_seconds() - begin);
    } else {
        actor->wrong = usp_check_failure(transport, status, USP_TIMEOUT, "rank 0");
        usp_transport_end(transport);
    }
    device->ops->destroy(device);
    return NULL;
}

/* ---- all of it --------------------------------------------------------------------------------------------------- */

/* 300 ms: on a busy host, also a rank that is all right may not run for a tenth of a second. */
static int usp_check_failures(int size, int odd) {
    int wrong = usp_play(usp_scene_late, size, 300, odd);
    wrong += usp_play(usp_scene_late_gather, size, 300, odd);
    wrong += usp_play(usp_scene_left, size, 20000, odd);
    wrong += usp_play(usp_scene_left_gather, size, 20000, odd);
    wrong += usp_play(usp_scene_overdue, size, 20000, odd);
    wrong += usp_play(usp_scene_gather_sizes, size, 20000, odd);
    return wrong + usp_play(usp_scene_mismatch, size, 20000, odd);
}

static int usp_check_storms(void) {
    int wrong = 0;
    for (unsigned i = 0; i < USP_STORMS; i++) {
        int size = 2 + (int)(i % 5);
        wrong += usp_play_some((usp_crew){NULL, usp_scene_abort, size, 20000, (int)i % size, i}, size);
    }
    return wrong;
}

int main(void) {
    int wrong = usp_check_arguments() + usp_gather_crew(usp_join_in_vain, 4, 3, 500);
    wrong += usp_gather_crew(usp_meet_stuck, 3, 3, 1000);
    for (int size = 1; size <= USP_MOST; size++) wrong += usp_play(usp_scene_conformance, size, 20000, 0);
    for (int size = 2; size <= 6; size += 2) wrong += usp_check_failures(size, size / 2);
    wrong += usp_play(usp_scene_conformance, 3, -1, 0);
    wrong += usp_play(usp_scene_left_early, 4, 20000, 3);
    wrong += usp_play(usp_scene_split, 2, 20000, 0);
    wrong += usp_play(usp_scene_events, 2, 20000, 0) + usp_play(usp_scene_events, 5, 20000, 0);
    wrong += usp_play(usp_scene_chain, 5, 300, 4);
    wrong += usp_check_storms();
    printf("%s: %d wrong\n", wrong ? "FAIL" : "ok", wrong);
    return wrong != 0;
}
