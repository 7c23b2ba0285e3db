/* test_world.c - a world's life: made by the caller's all-gather or a rendezvous, described, logged, watched, given up
 * and ended. Looks at layers only to see that sockets give what threads give. */
#define _POSIX_C_SOURCE 200809L
#include "expect.h"
#include "reference.h"
#include "stage.h"
#include "world.h"

#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { SECONDS = 60, MOST_RANKS = 4, MOST_BYTES = 4096, SOON_MS = 5000, WHILE_MS = 300 };

/* ---- worlds beside the one that ran the body --------------------------------------------------------------------- */

typedef enum transport { THREADS, SOCKETS, TRANSPORTS } transport;

static const char *const transport_names[TRANSPORTS] = {"threads", "socket"};

typedef struct record {
    pthread_mutex_t lock;
    int count[4];      /* by level; 0: no such level */
    char text[4][512]; /* the last one of the level */
} record;

/* What the ranks of a test share. */
typedef struct meeting {
    transport over;
    int size, watchdog;
    pthread_barrier_t barrier;
    usp_rendezvous *rendezvous;
    unsigned char all[MOST_RANKS * MOST_BYTES];
    record logs[MOST_RANKS];
} meeting;

typedef struct seat {
    meeting *meeting;
    int rank;
} seat;

/* The caller's bootstrap: shared memory between two barriers. */
static int gather(void *user, const void *mine, void *all, size_t bytes) {
    seat *s = user;
    meeting *m = s->meeting;
    if (bytes > MOST_BYTES) return 1;
    memcpy(m->all + (size_t)s->rank * bytes, mine, bytes);
    pthread_barrier_wait(&m->barrier);
    memcpy(all, m->all, (size_t)m->size * bytes);
    pthread_barrier_wait(&m->barrier);
    return 0;
}

static void write_log(void *user, int level, const char *text) {
    record *l = user;
    int known = level >= 1 && level <= 3 ? level : 0;
    pthread_mutex_lock(&l->lock);
    l->count[known]++;
    strncpy(l->text[known], text, sizeof l->text[known] - 1);
    pthread_mutex_unlock(&l->lock);
}

static int logged(record *l, int level, char *text) {
    pthread_mutex_lock(&l->lock);
    int count = l->count[level];
    memcpy(text, l->text[level], sizeof l->text[level]);
    pthread_mutex_unlock(&l->lock);
    return count;
}

static usp_world_config silent(void) {
    return (usp_world_config){.struct_size = sizeof(usp_world_config), .device = USP_DEVICE_CPU};
}

static usp_world_config logging(meeting *m, const usp_rank *rank) {
    usp_world_config config = silent();
    config.watchdog = m->watchdog;
    config.log = write_log;
    config.log_user = &m->logs[rank->rank];
    return config;
}

static usp_status try_to_join(usp_rank *rank, meeting *m, usp_world_config config, usp_world **world) {
    seat s = {m, rank->rank};
    usp_heap_configure(rank->heap, &config);
    return m->over == THREADS ? usp_world_create_threads(&config, m->rendezvous, rank->rank, world)
                              : usp_world_create_callback(&config, gather, &s, m->size, rank->rank, world);
}

/* NULL after saying why. Nobody goes on before all have come: who gives up at once could end the others' create too. */
static usp_world *join(usp_rank *rank, meeting *m, usp_world_config config) {
    usp_world *world = NULL;
    usp_status status = try_to_join(rank, m, config, &world);
    if (status != USP_OK) usp_say(rank, "%s: %s", transport_names[m->over], usp_last_error());
    pthread_barrier_wait(&m->barrier);
    return world;
}

static void expect_on(transport over, int size, int watchdog, usp_body body) {
    static meeting m;
    memset(&m, 0, sizeof m);
    m.over = over;
    m.size = size;
    m.watchdog = watchdog;
    pthread_barrier_init(&m.barrier, NULL, (unsigned)size);
    for (int i = 0; i < MOST_RANKS; i++) pthread_mutex_init(&m.logs[i].lock, NULL);
    cr_assert(usp_rendezvous_create(size, &m.rendezvous) == USP_OK);
    usp_expect_ranks(size, SECONDS, body, &m);
    usp_rendezvous_destroy(m.rendezvous);
}

static void expect_on_all(int size, int watchdog, usp_body body) {
    for (int over = THREADS; over < TRANSPORTS; over++) expect_on((transport)over, size, watchdog, body);
}

static int64_t now_ms(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

static void rest(void) {
    nanosleep(&(struct timespec){.tv_nsec = 5000000}, NULL);
}

/* ---- what a world is --------------------------------------------------------------------------------------------- */

static int layer_cases(usp_rank *rank, usp_rank *over) {
    static const usp_case cases[] = {
        {.tokens = 77, .mask = USP_MASK_CAUSAL, .kv_heads = 2, .return_lse = 1},
        {.attention = USP_LINEAR, .tokens = 77, .mask = USP_MASK_CAUSAL, .decay = 1, .final_state = 1}};
    for (int i = 0; i < 2; i++) {
        usp_whole here, there;
        usp_case c = cases[i];
        c.ulysses = rank->size % 2 == 0 ? 2 : 1;
        c.ring = rank->size / c.ulysses;
        if (usp_stage_run(rank, &c, &here) != 0 || usp_stage_run(over, &c, &there) != 0) return 1;
        if (rank->rank == 0) usp_compare_bits(rank, &c, "sockets", USP_SAME_ALL, &there, &here);
        usp_whole_free(&here);
        usp_whole_free(&there);
        usp_count(rank);
    }
    return 0;
}

static int same_layers(usp_rank *rank, void *argument) {
    usp_rank over = *rank;
    over.world = join(rank, argument, silent());
    if (!over.world) return 1;
    int failed = layer_cases(rank, &over);
    usp_world_destroy(over.world);
    return failed;
}

Test(world, by_callback_gives_what_threads_give) {
    for (int size = 1; size <= 4; size++) expect_on(SOCKETS, size, 0, same_layers);
}

static int check_info(usp_rank *rank, meeting *m, int timeout_ms, int known_ms) {
    usp_world_config config = silent();
    usp_world_info info = {.struct_size = sizeof info};
    config.timeout_ms = timeout_ms;
    if (usp_device_count(USP_DEVICE_CUDA) == 0) config.device = USP_DEVICE_AUTO;
    usp_world *world = join(rank, m, config);
    if (!world) return 1;
    if (usp_world_get_info(world, &info) != USP_OK) usp_say(rank, "info: %s", usp_last_error());
    if (info.struct_size != sizeof info || info.rank != rank->rank || info.size != rank->size ||
        info.device != USP_DEVICE_CPU || info.timeout_ms != known_ms ||
        strcmp(info.transport, transport_names[m->over]) != 0)
        usp_say(rank, "%s, timeout %d: rank %d, size %d, device %d, timeout %d, transport %s", transport_names[m->over],
                timeout_ms, info.rank, info.size, (int)info.device, info.timeout_ms, info.transport);
    usp_world_destroy(world);
    usp_count(rank);
    return 0;
}

static int infos(usp_rank *rank, void *argument) {
    meeting *m = argument;
    return check_info(rank, m, 0, 600000);
}

static int infos_with_limit(usp_rank *rank, void *argument) {
    meeting *m = argument;
    return check_info(rank, m, 4321, 4321);
}

static int infos_without_limit(usp_rank *rank, void *argument) {
    meeting *m = argument;
    return check_info(rank, m, -1, -1);
}

Test(world, info) {
    expect_on_all(1, 0, infos);
    expect_on_all(3, 0, infos);
    expect_on_all(3, 0, infos_with_limit);
    expect_on_all(2, 0, infos_without_limit);
}

static int wrong_ranks(usp_rank *rank, void *argument) {
    static const int wrong[] = {-1, 1, 7};
    meeting *m = argument;
    for (int i = 0; i < 3; i++) {
        usp_world *world = NULL;
        seat s = {m, 0};
        usp_status status = m->over == THREADS ? usp_world_create_threads(NULL, m->rendezvous, wrong[i], &world)
                                               : usp_world_create_callback(NULL, gather, &s, 1, wrong[i], &world);
        if (status != USP_INVALID || world || !strstr(usp_last_error(), "rank is"))
            usp_say(rank, "%s, rank %d of 1: %s, \"%s\"", transport_names[m->over], wrong[i], usp_status_string(status),
                    usp_last_error());
        usp_count(rank);
    }
    return 0;
}

Test(world, wrong_ranks) {
    expect_on_all(1, 0, wrong_ranks);
}

/* A callback that fails is COMM, on the rank where it fails. */
static int refuse(void *user, const void *mine, void *all, size_t bytes) {
    (void)user, (void)mine, (void)all, (void)bytes;
    return 1;
}

Test(world, callback_that_fails) {
    usp_world *world = NULL;
    usp_world_config config = silent();
    usp_status status = usp_world_create_callback(&config, refuse, NULL, 2, 0, &world);
    cr_expect(status == USP_COMM && !world && strstr(usp_last_error(), "callback"), "%s, \"%s\"",
              usp_status_string(status), usp_last_error());
}

/* A bootstrap that counts. */
typedef struct counter {
    seat seat;
    int calls;
} counter;

static int count_and_gather(void *user, const void *mine, void *all, size_t bytes) {
    counter *c = user;
    c->calls++;
    return gather(&c->seat, mine, all, bytes);
}

/* What differs is found before a transport is built: ranks on different devices would build different ones. */
static int other_limits(usp_rank *rank, void *argument) {
    counter c = {{argument, rank->rank}, 0};
    usp_world *world = NULL;
    usp_world_config config = silent();
    config.timeout_ms = rank->rank == 2 ? 5000 : 6000;
    usp_heap_configure(rank->heap, &config);
    usp_status status = usp_world_create_callback(&config, count_and_gather, &c, rank->size, rank->rank, &world);
    if (status != USP_MISMATCH || world ||
        !strstr(usp_last_error(), "world.timeout_ms differs between rank 0 and rank 2"))
        usp_say(rank, "%s, \"%s\"", usp_status_string(status), usp_last_error());
    if (c.calls != 1) usp_say(rank, "found after %d gathers", c.calls);
    usp_count(rank);
    return 0;
}

/* Each rank that is wrong by itself is told of its own mistake, whoever came first. */
static int own_mistakes(usp_rank *rank, void *argument) {
    usp_world *world = NULL;
    usp_world_config config = silent();
    if (rank->rank == 0) config.timeout_ms = -7;
    if (rank->rank == 1) config.watchdog = 9;
    usp_status status = try_to_join(rank, argument, config, &world);
    const char *const words[] = {"timeout_ms is -7", "watchdog is 9", "could not join"};
    if (status != (rank->rank < 2 ? USP_INVALID : USP_PEER_FAILED) || world ||
        !strstr(usp_last_error(), words[rank->rank]))
        usp_say(rank, "%s, \"%s\"", usp_status_string(status), usp_last_error());
    status = try_to_join(rank, argument, silent(), &world); /* a call that fails uses nothing up */
    if (status != USP_OK) usp_say(rank, "the second time: \"%s\"", usp_last_error());
    usp_world_destroy(world);
    usp_count(rank);
    return 0;
}

Test(world, own_mistakes) {
    expect_on_all(3, 0, own_mistakes);
}

Test(world, other_limits) {
    expect_on(SOCKETS, 3, 0, other_limits);
}

/* Processes exchange nothing in between: the beats tell. */
static int replan_apart(usp_rank *rank, void *argument) {
    meeting *m = argument;
    usp_world *world = join(rank, m, silent());
    usp_mesh *mesh = NULL;
    usp_sequence *sequence = NULL;
    const int64_t first[] = {48, 97}, second[] = {50, 97}, *ends = rank->rank == 1 ? second : first;
    usp_sequence_config config = {
        .struct_size = sizeof config, .layout = USP_LAYOUT_ZIGZAG_PER_DOCUMENT, .tokens = 97, .max_documents = 2};
    if (!world || usp_mesh_create(world, 1, rank->size, &mesh) != USP_OK ||
        usp_sequence_create(mesh, &config, &sequence) != USP_OK)
        return usp_say(rank, "%s", usp_last_error());
    for (int i = 0; i < 100; i++) /* more than is kept of the past */
        if (usp_sequence_replan(sequence, 2, first, NULL) != USP_OK) return usp_say(rank, "%s", usp_last_error());
    if (usp_world_poll(world) != USP_OK) return usp_say(rank, "before they differ: %s", usp_last_error());
    pthread_barrier_wait(&m->barrier);
    usp_sequence_replan(sequence, 2, ends, NULL);
    usp_status status = USP_OK;
    for (int i = 0; i < 500 && status == USP_OK; i++, poll(NULL, 0, 10)) status = usp_world_poll(world);
    if (status != USP_MISMATCH || !strstr(usp_last_error(), "rank 1"))
        usp_say(rank, "%s, \"%s\"", usp_status_string(status), usp_last_error());
    usp_sequence_destroy(sequence);
    usp_mesh_destroy(mesh);
    usp_world_destroy(world);
    usp_count(rank);
    return 0;
}

Test(world, replan_apart) {
    expect_on(SOCKETS, 3, 0, replan_apart);
}

/* ---- log --------------------------------------------------------------------------------------------------------- */

static int tells_of_creation(usp_rank *rank, void *argument) {
    meeting *m = argument;
    char text[4][512], name[32];
    usp_world *world = join(rank, m, logging(m, rank));
    if (!world) return 1;
    snprintf(name, sizeof name, "rank %d of %d", rank->rank, rank->size);
    int count[4];
    for (int level = 0; level < 4; level++) count[level] = logged(&m->logs[rank->rank], level, text[level]);
    if (count[2] != 1 || !strstr(text[2], name) || !strstr(text[2], transport_names[m->over]))
        usp_say(rank, "%d infos, the last \"%s\"", count[2], text[2]);
    if (count[0] || count[1]) usp_say(rank, "\"%s\" \"%s\"", text[0], text[1]);
    usp_world_destroy(world);
    usp_count(rank);
    return 0;
}

/* Without a log nothing is called, whatever log_user is. */
static int tells_nobody(usp_rank *rank, void *argument) {
    meeting *m = argument;
    char text[512];
    usp_world_config config = logging(m, rank);
    config.log = NULL;
    usp_world *world = join(rank, m, config);
    if (!world) return 1;
    usp_world_abort(world);
    pthread_barrier_wait(&m->barrier);
    usp_world_destroy(world);
    for (int level = 0; level < 4; level++)
        if (logged(&m->logs[rank->rank], level, text)) usp_say(rank, "\"%s\" is logged without a log", text);
    usp_count(rank);
    return 0;
}

Test(world, log) {
    expect_on_all(2, 0, tells_of_creation);
    expect_on_all(2, 1, tells_nobody);
}

/* ---- watchdog ---------------------------------------------------------------------------------------------------- */

/* The last rank gives up; the others make no call. Their watchdogs, and only these, say so. */
static int gives_up(usp_rank *rank, void *argument) {
    meeting *m = argument;
    char text[512] = "", name[32];
    int odd = rank->size - 1, count = 0;
    usp_world *world = join(rank, m, logging(m, rank));
    if (!world) return 1;
    snprintf(name, sizeof name, "rank %d", odd);
    if (rank->rank == odd) usp_world_abort(world);
    pthread_barrier_wait(&m->barrier);
    for (int64_t end = now_ms() + (m->watchdog ? SOON_MS : WHILE_MS); now_ms() < end && !count; rest())
        count = logged(&m->logs[rank->rank], 1, text);
    if (m->watchdog && (count != 1 || !strstr(text, "watchdog") || !strstr(text, name)))
        usp_say(rank, "%s: the watchdog saw nothing of %s: %d warnings, \"%s\"", transport_names[m->over], name, count,
                text);
    if (!m->watchdog && count) usp_say(rank, "%s: \"%s\" without a watchdog", transport_names[m->over], text);
    pthread_barrier_wait(&m->barrier);
    usp_world_destroy(world);
    usp_count(rank);
    return 0;
}

static int stays_well(usp_rank *rank, void *argument) {
    meeting *m = argument;
    char text[512];
    usp_world *world = join(rank, m, logging(m, rank));
    if (!world) return 1;
    for (int64_t end = now_ms() + WHILE_MS; now_ms() < end;) rest();
    if (usp_world_poll(world) != USP_OK) usp_say(rank, "a healthy world fails: %s", usp_last_error());
    pthread_barrier_wait(&m->barrier); /* nobody leaves while another still looks */
    if (logged(&m->logs[rank->rank], 1, text)) usp_say(rank, "a healthy world: \"%s\"", text);
    usp_world_destroy(world);
    usp_count(rank);
    return 0;
}

Test(world, watchdog) {
    expect_on_all(3, 1, gives_up);
    expect_on_all(3, 0, gives_up);
    expect_on_all(2, 1, stays_well);
}

/* ---- signals ----------------------------------------------------------------------------------------------------- */

static atomic_int handled;

static void handle(int number) {
    atomic_store(&handled, number);
}

static int gather_alone(void *user, const void *mine, void *all, size_t bytes) {
    (void)user;
    memcpy(all, mine, bytes);
    return 0;
}

/* A signal that the program blocks, to wait for it, waits for the program: neither the watchdog nor the service of the
 * control channel takes it. */
Test(world, signals) {
    usp_world *world = NULL;
    usp_world_config config = silent();
    sigset_t signals;
    int number = 0;
    config.watchdog = 1;
    signal(SIGUSR1, handle);
    cr_assert(usp_world_create_callback(&config, gather_alone, NULL, 1, 0, &world) == USP_OK, "%s", usp_last_error());
    sigemptyset(&signals);
    sigaddset(&signals, SIGUSR1);
    pthread_sigmask(SIG_BLOCK, &signals, NULL);
    kill(getpid(), SIGUSR1);
    for (int64_t end = now_ms() + WHILE_MS; now_ms() < end;) rest();
    cr_expect(atomic_load(&handled) == 0, "a thread of the library took a signal that was not for it");
    if (atomic_load(&handled) == 0) sigwait(&signals, &number);
    cr_expect(number == SIGUSR1, "the program waited for signal %d", number);
    usp_world_destroy(world);
}

/* ---- failure and end --------------------------------------------------------------------------------------------- */

/* The same failure, which names the rank, from every call. */
static void expect_failed(usp_rank *rank, usp_world *world, usp_status expected, int odd) {
    char name[32];
    usp_mesh *mesh = NULL;
    snprintf(name, sizeof name, "rank %d", odd);
    for (int i = 0; i < 4; i++) {
        usp_status status = i == 0   ? usp_world_poll(world)
                            : i == 1 ? usp_world_synchronize(world, NULL)
                            : i == 2 ? usp_mesh_create(world, 1, rank->size, &mesh)
                                     : usp_world_poll(world);
        if (status != expected || !strstr(usp_last_error(), name) || mesh)
            usp_say(rank, "call %d after %s is gone: %s, \"%s\"", i, name, usp_status_string(status), usp_last_error());
    }
}

static void *abort_from_thread(void *world) {
    usp_world_abort(world);
    return NULL;
}

/* Rank 1 gives up, from another thread and more than once: the others find it by poll alone, and all stay failed. */
static int aborts(usp_rank *rank, void *argument) {
    meeting *m = argument;
    pthread_t thread;
    usp_world *world = join(rank, m, silent());
    if (!world) return 1;
    if (usp_world_poll(world) != USP_OK || usp_world_synchronize(world, NULL) != USP_OK)
        usp_say(rank, "a new world fails: %s", usp_last_error());
    pthread_barrier_wait(&m->barrier);
    if (rank->rank == 1) {
        if (pthread_create(&thread, NULL, abort_from_thread, world) != 0) return usp_say(rank, "no thread");
        pthread_join(thread, NULL);
        usp_world_abort(world);
    }
    for (int64_t end = now_ms() + SOON_MS; now_ms() < end && usp_world_poll(world) == USP_OK;) rest();
    expect_failed(rank, world, USP_COMM, 1);
    pthread_barrier_wait(&m->barrier);
    usp_world_destroy(world);
    usp_count(rank);
    return 0;
}

Test(world, abort) {
    usp_world_abort(NULL);
    expect_on_all(2, 0, aborts);
    expect_on_all(4, 0, aborts);
}

/* Rank 1 ends its world at once: it waits for nobody, and who waits for it learns that it has left. */
static int leaves(usp_rank *rank, void *argument) {
    meeting *m = argument;
    usp_mesh *mesh = NULL;
    usp_world *world = join(rank, m, silent());
    if (!world) return 1;
    if (rank->rank == 1) {
        int64_t begin = now_ms();
        usp_world_destroy(world);
        if (now_ms() - begin > SOON_MS) usp_say(rank, "destroy waits: %lld ms", (long long)(now_ms() - begin));
        pthread_barrier_wait(&m->barrier);
    } else {
        usp_status status = usp_mesh_create(world, 1, rank->size, &mesh);
        if (status != USP_PEER_LOST || !strstr(usp_last_error(), "rank 1"))
            usp_say(rank, "rank 1 has left: %s, \"%s\"", usp_status_string(status), usp_last_error());
        expect_failed(rank, world, USP_PEER_LOST, 1);
        pthread_barrier_wait(&m->barrier);
        usp_world_destroy(world);
    }
    usp_count(rank);
    return 0;
}

Test(world, destroy) {
    usp_world_destroy(NULL);
    expect_on_all(2, 0, leaves);
    expect_on_all(3, 0, leaves);
}

/* ---- shared memory ----------------------------------------------------------------------------------------------- */

static void expect_free(usp_rank *rank, usp_world *world, void *memory, usp_status expected, const char *words) {
    usp_status status = usp_world_free_shared(world, memory);
    if (status != expected || !strstr(expected == USP_OK ? "" : usp_last_error(), words))
        usp_say(rank, "free: %s, not %s: \"%s\"", usp_status_string(status), usp_status_string(expected),
                usp_last_error());
}

/* All ranks get what rank 2 of 3 asks for. One rank gives back what it should not: nothing is freed on any rank, and
 * the world goes on. */
static int shares(usp_rank *rank, void *argument) {
    meeting *m = argument;
    void *piece[2] = {NULL, NULL};
    int odd = rank->rank == 1;
    usp_world *world = join(rank, m, silent());
    if (!world) return 1;
    for (int i = 0; i < 2; i++) {
        size_t bytes = 100 * (size_t)rank->rank;
        if (usp_world_alloc_shared(world, bytes, &piece[i]) != USP_OK) return usp_say(rank, "%s", usp_last_error());
        memset(piece[i], 1, 200);
        if (!usp_world_find_place(world, (char *)piece[i] + 199, 1).piece) usp_say(rank, "the last byte has no place");
    }
    for (int i = 0; i < 2; i++)
        expect_free(rank, world, odd ? (i ? m : NULL) : piece[0], odd ? USP_INVALID : USP_PEER_FAILED,
                    odd ? "no shared memory" : "rank 1");
    expect_free(rank, world, piece[odd], USP_MISMATCH, "rank 1");
    expect_free(rank, world, piece[0], USP_OK, "");
    expect_free(rank, world, piece[0], USP_INVALID, "no shared memory");
    if (usp_world_poll(world) != USP_OK) usp_say(rank, "the world has failed: %s", usp_last_error());
    pthread_barrier_wait(&m->barrier);
    if (odd) usp_world_abort(world);
    expect_free(rank, world, piece[1], USP_COMM, "rank 1"); /* and has it back */
    pthread_barrier_wait(&m->barrier);
    usp_world_destroy(world);
    usp_count(rank);
    return 0;
}

Test(world, shared_memory) {
    expect_on_all(3, 0, shares);
}

/* ---- meshes ------------------------------------------------------------------------------------------------------ */

static void expect_axis(usp_rank *rank, const usp_mesh *mesh, usp_axis axis, int at, int size) {
    int r = -1, s = -1;
    if (usp_mesh_axis(mesh, axis, &r, &s) != USP_OK || r != at || s != size)
        usp_say(rank, "axis %d: %d of %d, not %d of %d", (int)axis, r, s, at, size);
}

/* World rank = (data * ring + r) * ulysses + u. */
static int axes(usp_rank *rank, void *argument) {
    (void)argument;
    for (int u = 1; u <= rank->size; u++)
        for (int r = 1; u * r <= rank->size; r++) {
            usp_mesh *mesh = NULL;
            int me = rank->rank, n = u * r;
            if (rank->size % n != 0) continue;
            if (usp_mesh_create(rank->world, u, r, &mesh) != USP_OK) return usp_say(rank, "%s", usp_last_error());
            expect_axis(rank, mesh, USP_AXIS_ULYSSES, me % u, u);
            expect_axis(rank, mesh, USP_AXIS_RING, me / u % r, r);
            expect_axis(rank, mesh, USP_AXIS_SEQUENCE, me % n, n);
            expect_axis(rank, mesh, USP_AXIS_DATA, me / n, rank->size / n);
            usp_mesh_destroy(mesh);
            usp_count(rank);
        }
    return 0;
}

/* A rank that is wrong by itself hears of that, the others of it, whatever else differs. */
static int wrong_degrees(usp_rank *rank, void *argument) {
    static const int ulysses[] = {1, 2, 0, 1}, ring[] = {4, 2, 1, 4};
    usp_mesh *mesh = NULL;
    int wrong = rank->rank == 2;
    (void)argument;
    usp_status status = usp_mesh_create(rank->world, ulysses[rank->rank], ring[rank->rank], &mesh);
    if (status != (wrong ? USP_INVALID : USP_PEER_FAILED) ||
        !strstr(usp_last_error(), wrong ? "ulysses is 0" : "rank 2"))
        usp_say(rank, "%s, \"%s\"", usp_status_string(status), usp_last_error());
    status = usp_mesh_create(rank->world, ulysses[rank->rank % 2], ring[rank->rank % 2], &mesh);
    if (status != USP_MISMATCH || !strstr(usp_last_error(), "mesh.ulysses differs between rank 0 and rank 1"))
        usp_say(rank, "%s, \"%s\"", usp_status_string(status), usp_last_error());
    usp_count(rank);
    return 0;
}

Test(mesh, wrong_degrees) {
    usp_expect_ranks(4, SECONDS, wrong_degrees, NULL);
}

/* Rank 1 asks for something else than the others: nobody is left waiting, and the world goes on. */
static int other_axes(usp_rank *rank, void *argument) {
    struct ncclComm *comm = NULL;
    usp_mesh *mesh = NULL;
    int odd = rank->rank == 1;
    const struct {
        usp_axis axis;
        struct ncclComm **comm;
        usp_status own, others;
    } calls[] = {{USP_AXIS_RING, &comm, USP_MISMATCH, USP_MISMATCH},
                 {(usp_axis)4, &comm, USP_INVALID, USP_PEER_FAILED},
                 {USP_AXIS_DATA, NULL, USP_INVALID, USP_PEER_FAILED},
                 {USP_AXIS_DATA, &comm, USP_UNSUPPORTED, USP_UNSUPPORTED}}; /* threads have no NCCL */
    (void)argument;
    if (usp_mesh_create(rank->world, 2, 1, &mesh) != USP_OK) return usp_say(rank, "%s", usp_last_error());
    for (int i = 0; i < 4; i++) {
        usp_status expected = odd ? calls[i].own : calls[i].others;
        usp_status status = usp_mesh_axis_comm(mesh, odd ? calls[i].axis : USP_AXIS_DATA, odd ? calls[i].comm : &comm);
        if (status != expected || comm)
            usp_say(rank, "call %d: %s, \"%s\"", i, usp_status_string(status), usp_last_error());
    }
    usp_mesh_destroy(mesh);
    usp_count(rank);
    return 0;
}

Test(mesh, other_axes) {
    usp_expect_ranks(4, SECONDS, other_axes, NULL);
}

Test(mesh, axes) {
    static const int sizes[] = {1, 2, 6, 8, 12};
    for (int i = 0; i < 5; i++) usp_expect_ranks(sizes[i], SECONDS, axes, NULL);
}
