/* door.c - connections that only ranks of one job can open. Each end says who it is, with a number of its own that
 * never comes again; then each proves, the listener first, to know the key, by a keyed hash of all that both have said.
 * So nothing that is heard, asked or recorded here helps anybody to prove it elsewhere or later. */
#define _GNU_SOURCE
#include "door.h"
#include "error.h"
#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <unistd.h>

enum {
    USP_CALLERS = 256,
    USP_FAREWELL_MS = 1000, /* for other ranks to come and be told why the job cannot be */
    USP_SENTENCE = 256
};

static const char door_magic[8] = {'u', 's', 'p', ' ', 't', 'c', 'p', '2'};

/* What each end says first, in clear. The port is the one called: who passes on what others say listens at another. */
typedef struct usp_greeting {
    char magic[8];
    int32_t from, to, size, port;
    unsigned char nonce[16];
} usp_greeting;

/* All that an end says: the caller waits for the other's before it proves. */
typedef struct usp_speech {
    usp_greeting greeting;
    uint64_t proof;
} usp_speech;

static uint64_t prove(const usp_key *key, char role, const usp_greeting *caller, const usp_greeting *listener) {
    const struct {
        char role[8];
        usp_greeting caller, listener;
    } said = {{role}, *caller, *listener};
    return usp_hash_keyed(key, &said, sizeof said);
}

static usp_status greet(const usp_door *door, int to, int port, usp_greeting *greeting) {
    *greeting = (usp_greeting){.from = door->rank, .to = to, .size = door->size, .port = port};
    memcpy(greeting->magic, door_magic, sizeof door_magic);
    if (getrandom(greeting->nonce, sizeof greeting->nonce, 0) == sizeof greeting->nonce) return USP_OK;
    return usp_fail(USP_COMM, "no random numbers: %s", strerror(errno));
}

static usp_status sizes_differ(int rank, int size, int other, int other_size) {
    return usp_fail(USP_MISMATCH, "rank %d says the job has %d ranks, rank %d says %d", rank, size, other, other_size);
}

static usp_status came_twice(int rank) {
    return usp_fail(
        USP_INVALID,
        "rank %d came twice: two jobs have the same name, address and port; give each another USP_JOB_TOKEN", rank);
}

/* ---- calling ----------------------------------------------------------------------------------------------------- */

static usp_status dial(const usp_ip *ip, int port, int peer, int64_t deadline, int *connection) {
    int reason = usp_tcp_dial(ip, port, deadline, connection);
    if (reason == 0) return USP_OK;
    if (usp_tcp_exhausted(reason)) return usp_fail(USP_COMM, "no socket: %s", strerror(reason));
    return usp_fail(reason == ETIMEDOUT ? USP_TIMEOUT : USP_PEER_FAILED, "cannot connect to rank %d: %s", peer,
                    strerror(reason));
}

static int is_right(const usp_door *door, const usp_greeting *mine, const usp_speech *theirs) {
    const usp_greeting *greeting = &theirs->greeting;
    return memcmp(greeting->magic, door_magic, sizeof door_magic) == 0 && greeting->from == mine->to &&
           greeting->to == mine->from && greeting->port == mine->port &&
           theirs->proof == prove(&door->key, 'l', mine, greeting);
}

/* The other end learns of differing sizes by this rank's proof. */
static usp_status enter(const usp_door *door, int connection, const usp_greeting *mine, const usp_speech *theirs,
                        int64_t deadline) {
    uint64_t proof = prove(&door->key, 'c', mine, &theirs->greeting);
    int32_t verdict = USP_OK;
    usp_status status = usp_tcp_send(connection, &proof, sizeof proof, deadline);
    if (theirs->greeting.size != door->size)
        return sizes_differ(door->rank, door->size, mine->to, theirs->greeting.size);
    if (status == USP_OK) status = usp_tcp_recv(connection, &verdict, sizeof verdict, deadline);
    if (status != USP_OK) return usp_fail(USP_TIMEOUT, "rank %d does not answer", mine->to);
    return verdict == USP_OK ? USP_OK : came_twice(door->rank);
}

static usp_status introduce(const usp_door *door, int connection, int port, int peer, int64_t patience,
                            int64_t deadline) {
    usp_greeting mine;
    usp_speech theirs;
    USP_TRY(greet(door, peer, port, &mine));
    usp_status status = usp_tcp_send(connection, &mine, sizeof mine, patience);
    if (status == USP_OK) status = usp_tcp_recv(connection, &theirs, sizeof theirs, patience);
    if (status != USP_OK) return usp_fail(USP_TIMEOUT, "rank %d does not answer", peer);
    if (is_right(door, &mine, &theirs)) return enter(door, connection, &mine, &theirs, deadline);
    return usp_fail(USP_PEER_FAILED, "another program answers in place of rank %d", peer);
}

usp_status usp_door_connect(const usp_door *door, const usp_ip *ip, int port, int peer, int64_t patience,
                            int64_t deadline, int *connection) {
    int called;
    USP_TRY(dial(ip, port, peer, patience, &called));
    usp_status status = introduce(door, called, port, peer, patience, deadline);
    if (status == USP_OK)
        *connection = called;
    else
        close(called);
    return status;
}

/* ---- listening --------------------------------------------------------------------------------------------------- */

/* Somebody who has called and is not let in yet. */
typedef struct usp_caller {
    int descriptor; /* -1: free */
    uint32_t heard; /* bytes of said */
    usp_speech said;
    usp_greeting answer;
} usp_caller;

/* The callers sit in a ring: who comes takes the place of the one who came USP_CALLERS before, and has had its time. */
struct usp_reception {
    const usp_host *host;
    const usp_door *door; /* from here to `sentence`: of the call that goes on */
    int listener, port, first;
    int *connections;
    int64_t deadline;
    usp_status failure;
    char sentence[USP_SENTENCE];
    unsigned next;
    usp_caller callers[USP_CALLERS];
};

static void dismiss(usp_caller *caller) {
    if (caller->descriptor >= 0) close(caller->descriptor);
    caller->descriptor = -1;
}

/* The job cannot be; how long to go on so that others hear of it. The first reason counts. */
static void give_up(usp_reception *reception, usp_status status, int timeout_ms) {
    if (reception->failure != USP_OK) return;
    int64_t end = usp_tcp_deadline(timeout_ms);
    reception->failure = status;
    snprintf(reception->sentence, sizeof reception->sentence, "%s", usp_last_error());
    if (reception->deadline < 0 || end < reception->deadline) reception->deadline = end;
}

/* A rank whose first connection has ended may come again; while it lives nobody takes its place. */
static usp_status judge(const usp_reception *reception, const usp_greeting *caller) {
    const usp_door *door = reception->door;
    int from = caller->from;
    if (caller->size != door->size) return sizes_differ(from, caller->size, door->rank, door->size);
    if (from == door->rank) return came_twice(from);
    if (from < reception->first || from >= door->size)
        return usp_fail(USP_PEER_FAILED, "nobody waits for rank %d", from);
    int before = reception->connections[from];
    return before < 0 || usp_tcp_is_gone(before) ? USP_OK : came_twice(from);
}

/* Who has proved to know the key: it gets its rank's place, or is told why not. */
static void let_in(usp_reception *reception, usp_caller *caller) {
    usp_status status = judge(reception, &caller->said.greeting);
    int32_t verdict = (int32_t)status;
    if (status == USP_MISMATCH || status == USP_INVALID) give_up(reception, status, USP_FAREWELL_MS);
    int gone = usp_tcp_is_gone(caller->descriptor) ||
               send(caller->descriptor, &verdict, sizeof verdict, MSG_NOSIGNAL) != (ssize_t)sizeof verdict;
    if (status == USP_OK && !gone) {
        int *place = &reception->connections[caller->said.greeting.from];
        usp_tcp_close(place, 1);
        *place = caller->descriptor;
        caller->descriptor = -1;
    }
    dismiss(caller);
}

static void answer(usp_reception *reception, usp_caller *caller) {
    const usp_door *door = reception->door;
    const usp_greeting *said = &caller->said.greeting;
    usp_speech speech = {.proof = 0};
    int wanted = said->to == door->rank && said->port == reception->port &&
                 greet(door, said->from, reception->port, &speech.greeting) == USP_OK;
    caller->answer = speech.greeting;
    speech.proof = prove(&door->key, 'l', said, &caller->answer);
    if (!wanted || send(caller->descriptor, &speech, sizeof speech, MSG_NOSIGNAL) != (ssize_t)sizeof speech)
        dismiss(caller);
}

/* A first wrong byte is enough. */
static int may_go_on(const usp_caller *caller) {
    size_t known = caller->heard < sizeof door_magic ? caller->heard : sizeof door_magic;
    return memcmp(caller->said.greeting.magic, door_magic, known) == 0;
}

static void hear(usp_reception *reception, usp_caller *caller) {
    size_t goal = caller->heard < sizeof(usp_greeting) ? sizeof(usp_greeting) : sizeof(usp_speech);
    ssize_t got = recv(caller->descriptor, (char *)&caller->said + caller->heard, goal - caller->heard, 0);
    if (got < 0 && (errno == EAGAIN || errno == EINTR)) return;
    if (got > 0) caller->heard += (uint32_t)got;
    if (got <= 0 || !may_go_on(caller)) {
        dismiss(caller);
        return;
    }
    if (caller->heard < goal) return;
    if (goal == sizeof(usp_greeting))
        answer(reception, caller);
    else if (caller->said.proof == prove(&reception->door->key, 'c', &caller->said.greeting, &caller->answer))
        let_in(reception, caller);
    else
        dismiss(caller);
}

static int count_missing(const usp_reception *reception) {
    int missing = 0;
    for (int i = reception->first; i < reception->door->size; i++) missing += reception->connections[i] < 0;
    return missing;
}

/* Gives up the oldest caller, where the callers hold descriptors enough for all who are missing; whether that is so.
 * Where they do not, ranks would take each other's place until the time is over. */
static int make_room(usp_reception *reception) {
    usp_caller *oldest = NULL;
    int callers = 0;
    for (unsigned i = 0; i < USP_CALLERS; i++) {
        usp_caller *caller = &reception->callers[(reception->next + i) % USP_CALLERS];
        if (caller->descriptor < 0) continue;
        if (!oldest) oldest = caller;
        callers++;
    }
    if (!oldest || callers < count_missing(reception)) return 0;
    dismiss(oldest);
    return 1;
}

/* All who have called, as many as there are places. */
static void take_calls(usp_reception *reception) {
    for (int i = 0; i < USP_CALLERS; i++) {
        int connection = usp_tcp_take(reception->listener);
        if (connection < 0 && usp_tcp_exhausted(errno) && make_room(reception)) continue;
        if (connection < 0 && usp_tcp_exhausted(errno))
            give_up(reception, usp_fail(USP_COMM, "no connection can be taken: %s", strerror(errno)), 0);
        if (connection < 0) return;
        usp_caller *caller = &reception->callers[reception->next++ % USP_CALLERS];
        dismiss(caller);
        *caller = (usp_caller){.descriptor = connection};
        hear(reception, caller);
    }
}

/* One round of whatever has come. poll() takes no more entries than the process may have descriptors. */
static void receive_calls(usp_reception *reception) {
    struct pollfd polls[USP_CALLERS + 1] = {{.fd = reception->listener, .events = POLLIN}};
    usp_caller *caller[USP_CALLERS + 1];
    nfds_t count = 1;
    for (int i = 0; i < USP_CALLERS; i++) {
        if (reception->callers[i].descriptor < 0) continue;
        caller[count] = &reception->callers[i];
        polls[count++] = (struct pollfd){.fd = reception->callers[i].descriptor, .events = POLLIN};
    }
    if (poll(polls, count, usp_tcp_left(reception->deadline)) <= 0) return;
    for (nfds_t i = 1; i < count; i++)
        if (polls[i].revents) hear(reception, caller[i]);
    if (polls[0].revents) take_calls(reception);
}

static usp_status name_missing(const usp_reception *reception) {
    char ranks[160];
    size_t length = 0;
    for (int i = reception->first; i < reception->door->size && length + 16 < sizeof ranks; i++)
        if (reception->connections[i] < 0)
            length += (size_t)snprintf(ranks + length, sizeof ranks - length, "%srank %d", length ? ", " : "", i);
    return usp_fail(USP_TIMEOUT, "%d did not connect in time: %s", count_missing(reception), ranks);
}

static usp_status receive_all(usp_reception *reception) {
    while ((count_missing(reception) > 0 || reception->failure != USP_OK) && usp_tcp_left(reception->deadline) != 0)
        receive_calls(reception);
    if (reception->failure != USP_OK) return usp_fail(reception->failure, "%s", reception->sentence);
    return count_missing(reception) > 0 ? name_missing(reception) : USP_OK;
}

usp_status usp_door_accept(const usp_door *door, usp_reception *reception, int listener, int first, int64_t deadline,
                           int *connections) {
    usp_ip ip;
    reception->door = door;
    reception->listener = listener;
    reception->first = first;
    reception->connections = connections;
    reception->deadline = deadline;
    reception->failure = USP_OK;
    usp_tcp_near(listener, &ip, &reception->port);
    return receive_all(reception);
}

usp_status usp_reception_create(const usp_host *host, usp_reception **result) {
    void *memory;
    USP_TRY(usp_host_alloc(host, sizeof(usp_reception), "callers", &memory));
    usp_reception *reception = memory;
    reception->host = host;
    for (int i = 0; i < USP_CALLERS; i++) reception->callers[i].descriptor = -1;
    *result = reception;
    return USP_OK;
}

void usp_reception_destroy(usp_reception *reception) {
    if (!reception) return;
    for (int i = 0; i < USP_CALLERS; i++) dismiss(&reception->callers[i]);
    usp_host_free(reception->host, reception);
}
