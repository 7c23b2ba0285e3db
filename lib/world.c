/* world.c - making, watching and ending a world. The only file that knows the constructors of all transports. */
#define _POSIX_C_SOURCE 200809L
#include "world.h"
#include "abi.h"
#include "environment.h"
#include "error.h"
#include "split.h"
#include "node.h"
#include "thread.h"
#include <stdio.h>
#include <string.h>
#include <time.h>

enum { DEFAULT_TIMEOUT_MS = 600000, LEAST_SILENCE_MS = 2000, MOST_SILENCE_MS = 10000, WATCHDOG_PERIOD_MS = 20 };

/* ---- making a world ---------------------------------------------------------------------------------------------- */

static usp_status check_config(const usp_world_config *config) {
    USP_REQUIRE(config->device >= USP_DEVICE_AUTO && config->device <= USP_DEVICE_CUDA,
                "usp_world_config.device is %d: no such device", (int)config->device);
    USP_REQUIRE(config->timeout_ms >= -1,
                "usp_world_config.timeout_ms is %d: give milliseconds, 0 for the default or "
                "-1 for no limit",
                config->timeout_ms);
    USP_REQUIRE(config->silence_ms >= -1,
                "usp_world_config.silence_ms is %d: give milliseconds, 0 for the default or -1 for no limit",
                config->silence_ms);
    USP_REQUIRE(config->transport >= USP_TRANSPORT_AUTO && config->transport <= USP_TRANSPORT_PEER,
                "usp_world_config.transport is %d: no such transport", (int)config->transport);
    USP_REQUIRE(config->watchdog == 0 || config->watchdog == 1, "usp_world_config.watchdog is %d: 0 or 1",
                config->watchdog);
    USP_REQUIRE(config->node >= 0, "usp_world_config.node is %d: must not be negative", config->node);
    USP_REQUIRE(!config->host_alloc == !config->host_free,
                "usp_world_config.host_alloc and host_free must be given together");
    return USP_OK;
}

static usp_status read_config(const usp_world_config *given, usp_world_config *config) {
    static const usp_world_config defaults = {.struct_size = sizeof defaults};
    USP_TRY(usp_abi_read(config, sizeof *config, given ? given : &defaults, "usp_world_config"));
    return check_config(config);
}

/* A config that is refused is replaced, but for a time limit that is one: half an allocator must not be used to tell
 * the others, yet this rank shall not wait for them longer than it said. */
static usp_status check_call(const usp_world_config *given, usp_world_config *config, usp_world **out) {
    *config = (usp_world_config){0};
    usp_status status = read_config(given, config);
    if (status == USP_OK && !out) status = usp_fail(USP_INVALID, "world is NULL");
    if (status != USP_OK) *config = (usp_world_config){.timeout_ms = config->timeout_ms < -1 ? 0 : config->timeout_ms};
    return status;
}

static int limit_of(const usp_world_config *config) {
    return config->timeout_ms ? config->timeout_ms : DEFAULT_TIMEOUT_MS;
}

/* Well under the time limit, and long enough for a machine that has much to do. */
static int silence_of(const usp_world_config *config) {
    if (config->silence_ms) return config->silence_ms;
    int limit = limit_of(config), part = limit < 0 ? MOST_SILENCE_MS : limit / 4;
    if (part > MOST_SILENCE_MS) return MOST_SILENCE_MS;
    return part > LEAST_SILENCE_MS ? part : limit < LEAST_SILENCE_MS ? limit : LEAST_SILENCE_MS;
}

/* The end of a world, half-built ones too. */
static void free_world(usp_object *object) {
    usp_world *world = (usp_world *)object;
    if (world->watching) {
        atomic_store(&world->stop, 1);
        pthread_join(world->watchdog, NULL);
    }
    usp_transport_end(world->transport);
    if (world->device) {
        world->device->ops->event_destroy(world->device, world->event);
        for (int i = 0; i < USP_LANES; i++) world->device->ops->stream_destroy(world->device, world->transfer[i]);
        world->device->ops->destroy(world->device);
    }
    usp_host host = world->host;
    while (world->pieces) {
        usp_piece *next = world->pieces->next;
        usp_host_free(&host, world->pieces);
        world->pieces = next;
    }
    usp_meeting_end(&world->meeting);
    usp_host_free(&host, world);
}

/* The part of a world that needs no other rank. */
static usp_status begin_world(const usp_world_config *config, usp_world **out) {
    usp_host host = usp_host_from_config(config);
    void *memory = NULL;
    USP_TRY(usp_host_alloc(&host, sizeof(usp_world), "world", &memory));
    usp_world *world = memory;
    usp_object_begin(&world->object, world, NULL, free_world);
    usp_turn_begin(&world->turn);
    world->host = host;
    world->timeout_ms = limit_of(config);
    world->silence_ms = silence_of(config);
    usp_status status = usp_device_create(&world->host, config->device, &world->device);
    for (int i = 0; i < USP_LANES && status == USP_OK; i++)
        status = world->device->ops->stream_create(world->device, &world->transfer[i]);
    if (status == USP_OK) status = world->device->ops->event_create(world->device, &world->event);
    if (status != USP_OK) {
        usp_world_destroy(world);
        return status;
    }
    *out = world;
    return USP_OK;
}

static void *watch(void *argument) {
    usp_world *world = argument;
    const struct timespec period = {.tv_nsec = WATCHDOG_PERIOD_MS * 1000000L};
    while (!atomic_load(&world->stop)) {
        if (usp_transport_poll(world->transport) != USP_OK) {
            usp_host_log(&world->host, 1, "watchdog: %s", usp_last_error());
            usp_transport_abort(world->transport);
            return NULL;
        }
        nanosleep(&period, NULL);
    }
    return NULL;
}

static usp_status start_watchdog(usp_world *world) {
    if (usp_thread_start(&world->watchdog, watch, world) != 0)
        return usp_fail(USP_NO_MEMORY, "the watchdog thread could not be started");
    world->watching = 1;
    return USP_OK;
}

/* A world that is being made: the part that needs no other rank, and what the ranks will tell each other. */
typedef struct making {
    usp_world_config config;
    usp_host host;
    usp_world *world; /* NULL where this rank has failed, which it tells the others */
    usp_meeting meeting;
    usp_transport_config settings;
    usp_transport *transport;
} making;

static void read_call(making *m, const usp_world_config *given, usp_world **out) {
    *m = (making){.world = NULL};
    usp_meeting_note(&m->meeting, check_call(given, &m->config, out));
    m->host = usp_host_from_config(&m->config);
}

static void prepare(making *m) {
    usp_card *mine = &m->meeting.mine;
    int limit = limit_of(&m->config), silence = silence_of(&m->config);
    if (mine->status == USP_OK) usp_meeting_note(&m->meeting, begin_world(&m->config, &m->world));
    mine->node = usp_node_identity(m->config.node);
    mine->terms = (usp_terms){.version = usp_version(), .timeout_ms = limit, .silence_ms = silence};
    m->settings = (usp_transport_config){.host = &m->host, .timeout_ms = limit, .silence_ms = silence};
    if (!m->world) return;
    mine->terms.device = (int32_t)m->world->device->ops->kind;
    mine->terms.transport = (int32_t)m->config.transport;
    m->settings.device = m->world->device;
    m->settings.host = &m->world->host;
}

/* Of a constructor that leaves no choice. */
static void expect_transport(making *m, usp_transport_kind only) {
    usp_transport_kind wanted = m->config.transport;
    if (wanted != USP_TRANSPORT_AUTO && wanted != only)
        usp_meeting_note(&m->meeting, usp_fail(USP_INVALID,
                                               "usp_world_config.transport is %d: this way to make a world "
                                               "leaves no such choice",
                                               (int)wanted));
}

static void begin(making *m, const usp_world_config *given, usp_transport_kind only, usp_world **out) {
    read_call(m, given, out);
    expect_transport(m, only);
    prepare(m);
}

/* Beside a transport between GPUs that does not reach their memory, unless it was asked for by name, and where any two
 * ranks share a host. */
static usp_status join_near(const making *m) {
    usp_world *world = m->world;
    int gpus = world->device->ops->kind == USP_DEVICE_CUDA, alone = world->nodes == world->transport->size;
    if (!gpus || world->transport->ops->reaches || m->config.transport || alone) return USP_OK;
    return usp_transport_create_near(&m->settings, world->meeting.node, world->transport);
}

/* The transport stands. Whether each rank can go on they tell each other as they will from now on. */
static usp_status start_world(making *m) {
    usp_world *world = m->world;
    world->transport = m->transport;
    world->meeting = m->meeting;
    usp_node_count(world);
    usp_status mine = join_near(m);
    if (mine == USP_OK && m->config.watchdog) mine = start_watchdog(world);
    return usp_world_agree(world, mine, &(usp_agreement){.what = "world"});
}

/* `status`: how the transport was made. */
static usp_status finish(making *m, usp_status status, usp_world **out) {
    usp_world *world = m->world;
    if (status == USP_OK)
        status = start_world(m);
    else
        usp_meeting_end(&m->meeting);
    if (status != USP_OK) {
        usp_world_destroy(world);
        return status;
    }
    usp_host_log(&world->host, 2, "world: rank %d of %d, %s over %s%s", world->transport->rank, world->transport->size,
                 world->device->ops->name, world->transport->ops->name,
                 world->transport->near ? ", peer beside it" : "");
    *out = world;
    return USP_OK;
}

static usp_status check_rank(int rank, int size) {
    USP_REQUIRE(size >= 1, "size is %d: a world has at least one rank", size);
    USP_REQUIRE(rank >= 0 && rank < size, "rank is %d: must be in 0 .. %d", rank, size - 1);
    return USP_OK;
}

usp_status usp_world_create_threads(const usp_world_config *given, usp_rendezvous *rendezvous, int rank,
                                    usp_world **out) {
    making m;
    USP_REQUIRE(rendezvous, "rendezvous is NULL");
    begin(&m, given, USP_TRANSPORT_AUTO, out);
    return finish(&m, usp_transport_create_threads(&m.settings, &m.meeting, rendezvous, rank, &m.transport), out);
}

usp_status usp_world_create_nccl_id(const usp_world_config *given, const usp_unique_id *id, int size, int rank,
                                    usp_world **out) {
    making m;
    USP_REQUIRE(id, "id is NULL");
    USP_TRY(check_rank(rank, size));
    begin(&m, given, USP_TRANSPORT_NCCL, out);
    return finish(&m, usp_transport_create_nccl_id(&m.settings, &m.meeting, id, size, rank, &m.transport), out);
}

usp_status usp_world_create_nccl(const usp_world_config *given, struct ncclComm *comm, usp_world **out) {
    making m;
    USP_REQUIRE(comm, "comm is NULL");
    begin(&m, given, USP_TRANSPORT_NCCL, out);
    return finish(&m, usp_transport_create_nccl_borrowed(&m.settings, &m.meeting, comm, &m.transport), out);
}

usp_status usp_world_create_mpi(const usp_world_config *given, int fortran_comm, usp_world **out) {
    making m;
    read_call(&m, given, out);
    if (m.config.device == USP_DEVICE_AUTO) m.config.device = USP_DEVICE_CPU; /* MPI moves host memory */
    expect_transport(&m, USP_TRANSPORT_AUTO);
    prepare(&m);
    return finish(&m, usp_transport_create_mpi(&m.settings, &m.meeting, fortran_comm, &m.transport), out);
}

/* NCCL on GPUs unless told otherwise, with peer beside it unless told so, sockets elsewhere; a rank that has failed
 * before can say so over any. */
static usp_status create_over(making *m, const usp_bootstrap *bootstrap, usp_world **out) {
    int gpus = m->world && m->world->device->ops->kind == USP_DEVICE_CUDA;
    usp_status (*create)(const usp_transport_config *, usp_meeting *, usp_transport **) = usp_transport_create_socket;
    if (gpus || m->config.transport) create = usp_transport_create_nccl;
    if (m->config.transport == USP_TRANSPORT_PEER) create = usp_transport_create_peer;
    m->meeting.bootstrap = *bootstrap;
    return finish(m, create(&m->settings, &m->meeting, &m->transport), out);
}

/* The caller's all-gather. */
typedef struct callback {
    usp_allgather_fn allgather;
    void *user;
    int rank;
} callback;

static usp_status gather_by_callback(void *user, const void *mine, void *all, size_t bytes_per_rank) {
    const callback *own = user;
    if (own->allgather(own->user, mine, all, bytes_per_rank) == 0) return USP_OK;
    return usp_fail(USP_COMM, "the all-gather callback failed on rank %d", own->rank);
}

usp_status usp_world_create_callback(const usp_world_config *given, usp_allgather_fn allgather, void *user, int size,
                                     int rank, usp_world **out) {
    making m;
    callback own = {allgather, user, rank};
    USP_REQUIRE(allgather, "allgather is NULL");
    USP_TRY(check_rank(rank, size));
    read_call(&m, given, out);
    prepare(&m);
    return create_over(&m, &(usp_bootstrap){.gather = gather_by_callback, .user = &own, .rank = rank, .size = size},
                       out);
}

/* A process for each GPU, by its place on the host. */
static usp_status select_local_gpu(const usp_world_config *config, const usp_environment *environment) {
    int gpus = config->device == USP_DEVICE_CPU ? 0 : usp_device_count_cuda();
    return gpus > 0 ? usp_device_select_cuda(usp_environment_local_rank(environment) % gpus) : USP_OK;
}

usp_status usp_world_create_env(const usp_world_config *given, usp_world **out) {
    making m;
    usp_environment *environment = NULL;
    read_call(&m, given, out);
    usp_status met = usp_environment_open(&m.host, limit_of(&m.config), &environment);
    if (met != USP_OK) return usp_meeting_note(&m.meeting, met);
    if (m.meeting.mine.status == USP_OK) usp_meeting_note(&m.meeting, select_local_gpu(&m.config, environment));
    prepare(&m);
    usp_bootstrap bootstrap = usp_environment_bootstrap(environment);
    usp_status status = create_over(&m, &bootstrap, out);
    usp_environment_close(environment);
    return status;
}

/* ---- a world's life ---------------------------------------------------------------------------------------------- */

usp_status usp_world_get_info(const usp_world *world, usp_world_info *info) {
    USP_REQUIRE(world, "world is NULL");
    USP_TRY(usp_guard_process(world));
    usp_world_info known = {.rank = world->transport->rank,
                            .size = world->transport->size,
                            .device = world->device->ops->kind,
                            .timeout_ms = world->timeout_ms,
                            .nodes = world->nodes,
                            .local_rank = world->local_rank,
                            .local_size = world->local_size,
                            .watchdog = world->watching,
                            .silence_ms = world->silence_ms};
    snprintf(known.transport, sizeof known.transport, "%s%s", world->transport->ops->name,
             world->transport->near ? "+peer" : "");
    return usp_abi_write(&known, sizeof known, info, "usp_world_info");
}

usp_status usp_world_fork(usp_world *world, usp_stream from, usp_stream to) {
    if (from == to) return USP_OK;
    USP_TRY(world->device->ops->event_record(world->device, world->event, from));
    return world->device->ops->event_wait(world->device, world->event, to);
}

usp_status usp_world_exchange(usp_world *world, const usp_lane *lane, const usp_message *sends, int send_count,
                              const usp_message *recvs, int recv_count) {
    return lane->transport->ops->exchange(lane->transport, lane->number, sends, send_count, recvs, recv_count,
                                          world->transfer[lane->number]);
}

usp_status usp_world_conclude(usp_world *world, usp_status status) {
    if (status == USP_OK || status == USP_UNSUPPORTED) return status;
    return usp_transport_fail(world->transport, status == USP_NO_MEMORY ? USP_DEVICE : status);
}

usp_status usp_world_poll(usp_world *world) {
    USP_REQUIRE(world, "world is NULL");
    USP_TRY(usp_guard_process(world));
    return usp_transport_poll(world->transport);
}

usp_status usp_world_wait(usp_world *world, usp_stream stream) {
    int64_t begin = usp_now_ms();
    struct timespec pause = {.tv_nsec = 20000};
    for (;;) {
        int busy = 0;
        usp_status status = world->device->ops->query(world->device, stream, &busy);
        USP_TRY(usp_transport_poll(world->transport)); /* behind it: a failure lets streams end */
        if (status != USP_OK || !busy) return usp_world_conclude(world, status);
        if (world->timeout_ms >= 0 && usp_now_ms() - begin > world->timeout_ms)
            return usp_transport_overdue(world->transport);
        nanosleep(&pause, NULL);
        if (pause.tv_nsec < 500000) pause.tv_nsec *= 2;
    }
}

usp_status usp_world_synchronize(usp_world *world, usp_stream stream) {
    USP_REQUIRE(world, "world is NULL");
    USP_TRY(usp_guard_enter(world));
    return usp_guard_leave(world, usp_world_wait(world, stream));
}

void usp_world_abort(usp_world *world) {
    if (world && usp_guard_process(world) == USP_OK) usp_transport_abort(world->transport);
}

void usp_world_destroy(usp_world *world) {
    if (world) usp_object_drop(&world->object);
}

/* ---- NCCL -------------------------------------------------------------------------------------------------------- */

usp_status usp_unique_id_create(usp_unique_id *id) {
    USP_REQUIRE(id, "id is NULL");
    return usp_nccl_unique_id(id);
}
