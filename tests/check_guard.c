/* check_guard.c - who may use a world, and how long its objects live: a child of fork is told at once, a second thread
 * too, and objects are destroyed in any order. A plain program; it forks. */
#define _GNU_SOURCE
#include "heap.h"
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { TOKENS = 24, HEADS = 2, DIM = 8, COUNT = TOKENS * HEADS * DIM, OBJECTS = 5, CHILD_SECONDS = 20, LAYERS = 5000 };

static int check(int good, const char *what) {
    if (!good) printf("%s: \"%s\"\n", what, usp_last_error());
    return !good;
}

/* ---- one rank and all its objects -------------------------------------------------------------------------------- */

typedef struct rank {
    usp_rendezvous *rendezvous; /* NULL: the world is made from the environment, over sockets */
    usp_world *world;
    usp_mesh *mesh;
    usp_sequence *sequence;
    usp_layer *layer;
    usp_heap heap;
    float tensor[4][COUNT];
    void *workspace;
    size_t bytes;
} rank;

static int open_rank(rank *r, int threads) {
    usp_world_config world = {.struct_size = sizeof world, .device = USP_DEVICE_CPU};
    usp_sequence_config tokens = {
        .struct_size = sizeof tokens, .layout = USP_LAYOUT_ZIGZAG_PER_DOCUMENT, .tokens = TOKENS, .max_documents = 2};
    usp_layer_config layer = {.struct_size = sizeof layer,
                              .attention = USP_SOFTMAX,
                              .mask = USP_MASK_CAUSAL,
                              .batch = 1,
                              .heads = HEADS,
                              .head_dim = DIM};
    usp_sizes sizes = {.struct_size = sizeof sizes};
    memset(r, 0, sizeof *r);
    usp_heap_configure(&r->heap, &world);
    usp_status status = threads ? usp_rendezvous_create(1, &r->rendezvous) : usp_world_create_env(&world, &r->world);
    if (threads && status == USP_OK) status = usp_world_create_threads(&world, r->rendezvous, 0, &r->world);
    if (status == USP_OK) status = usp_mesh_create(r->world, 1, 1, &r->mesh);
    if (status == USP_OK) status = usp_sequence_create(r->mesh, &tokens, &r->sequence);
    if (status == USP_OK) status = usp_layer_create(r->mesh, r->sequence, &layer, &r->layer);
    if (status == USP_OK) status = usp_layer_get_sizes(r->layer, &sizes);
    r->bytes = sizes.forward_workspace;
    if (status == USP_OK) status = usp_world_alloc(r->world, r->bytes, &r->workspace);
    return check(status == USP_OK, "open");
}

static usp_status forward(rank *r) {
    usp_tensor t[4];
    for (int i = 0; i < 4; i++) t[i] = (usp_tensor){r->tensor[i], COUNT, HEADS * DIM, DIM};
    usp_forward f = {.struct_size = sizeof f, .q = t[0], .k = t[1], .v = t[2], .out = t[3]};
    return usp_layer_forward(r->layer, &f, r->workspace, r->bytes, NULL);
}

static void destroy_object(rank *r, int object) {
    if (object == 0) usp_rendezvous_destroy(r->rendezvous);
    if (object == 1) usp_world_destroy(r->world);
    if (object == 2) usp_mesh_destroy(r->mesh);
    if (object == 3) usp_sequence_destroy(r->sequence);
    if (object == 4) usp_layer_destroy(r->layer);
}

/* ---- orders ------------------------------------------------------------------------------------------------------ */

/* The layer works until it is destroyed itself. */
static int destroy_in_order(const int *order) {
    static rank r;
    if (open_rank(&r, 1)) return 1;
    usp_world_free(r.world, r.workspace);
    r.workspace = malloc(r.bytes + 256);
    void *memory = r.workspace;
    r.workspace = (char *)memory + (256 - (uintptr_t)memory % 256) % 256;
    int wrong = 0, alive = 1;
    for (int i = 0; i < OBJECTS; i++) {
        alive = alive && order[i] != 4;
        destroy_object(&r, order[i]);
        if (alive) wrong += check(forward(&r) == USP_OK, "a layer whose world is gone for its owner");
    }
    free(memory);
    if (atomic_load(&r.heap.live) != 0) printf("%ld allocations are left behind\n", (long)atomic_load(&r.heap.live));
    return wrong + (atomic_load(&r.heap.live) != 0);
}

static int destroy_in_all_orders(int *order, int from) {
    if (from == OBJECTS) return destroy_in_order(order);
    int wrong = 0;
    for (int i = from; i < OBJECTS; i++) {
        int chosen = order[i];
        order[i] = order[from], order[from] = chosen;
        wrong += destroy_in_all_orders(order, from + 1);
        order[from] = order[i], order[i] = chosen;
    }
    return wrong;
}

/* ---- a child of fork --------------------------------------------------------------------------------------------- */

static int is_refused(usp_status status, const char *what) {
    return check(status == USP_INVALID && strstr(usp_last_error(), "fork"), what);
}

static int use_in_child(rank *r) {
    const int64_t ends[] = {TOKENS};
    int64_t count;
    int32_t words[TOKENS];
    void *memory = NULL;
    usp_mesh *mesh = NULL;
    usp_world *world = NULL;
    usp_layer *layer = NULL;
    usp_world_info info = {.struct_size = sizeof info};
    usp_shard shard = {.struct_size = sizeof shard};
    usp_cost cost = {.struct_size = sizeof cost};
    usp_sizes sizes = {.struct_size = sizeof sizes};
    usp_tensor t = {r->tensor[0], COUNT, HEADS * DIM, DIM};
    int wrong = is_refused(usp_world_poll(r->world), "poll") + is_refused(usp_world_get_info(r->world, &info), "info");
    wrong += is_refused(usp_world_synchronize(r->world, NULL), "synchronize");
    wrong += is_refused(usp_world_alloc(r->world, 8, &memory), "alloc");
    wrong += is_refused(usp_world_copy(r->world, words, words + 1, 4, NULL), "copy");
    wrong += is_refused(usp_world_alloc_shared(r->world, 8, &memory), "alloc_shared");
    wrong += is_refused(usp_world_free_shared(r->world, memory), "free_shared");
    wrong += is_refused(usp_mesh_create(r->world, 1, 1, &mesh), "mesh");
    wrong += is_refused(usp_mesh_axis(r->mesh, USP_AXIS_RING, NULL, NULL), "axis");
    wrong += is_refused(usp_mesh_axis_comm(r->mesh, USP_AXIS_RING, NULL), "axis_comm");
    wrong += is_refused(usp_sequence_create(r->mesh, NULL, NULL), "sequence");
    wrong += is_refused(usp_sequence_replan(r->sequence, 1, ends, NULL), "replan");
    wrong += is_refused(usp_sequence_segments(r->sequence, 0, 0, NULL, &count), "segments");
    wrong += is_refused(usp_sequence_positions(r->sequence, words), "positions");
    wrong += is_refused(usp_sequence_labels(r->sequence, words, 0, words), "labels");
    wrong += is_refused(usp_sequence_scatter(r->sequence, 1, 4, words, words), "scatter");
    wrong += is_refused(usp_sequence_gather(r->sequence, 1, 4, words, words), "gather");
    wrong += is_refused(usp_layer_create(r->mesh, r->sequence, NULL, &layer), "layer");
    wrong += is_refused(usp_layer_get_sizes(r->layer, &sizes), "sizes");
    wrong += is_refused(usp_layer_get_cost(r->layer, USP_PASS_FORWARD, &cost), "cost");
    wrong += is_refused(usp_layer_get_shard(r->layer, &shard), "shard");
    wrong +=
        is_refused(forward(r), "forward") + is_refused(usp_layer_backward(r->layer, NULL, NULL, 0, NULL), "backward");
    wrong += is_refused(usp_layer_tokens_to_heads(r->layer, USP_QUERY, &t, &t, NULL, 0, NULL), "tokens_to_heads");
    wrong += is_refused(usp_layer_heads_to_tokens(r->layer, USP_QUERY, &t, &t, NULL, 0, NULL), "heads_to_tokens");
    if (r->rendezvous) wrong += is_refused(usp_world_create_threads(NULL, r->rendezvous, 0, &world), "threads");
    usp_world_abort(r->world);
    for (int i = 0; i < OBJECTS; i++) destroy_object(r, i);
    return wrong;
}

/* The parent's world goes on as if nothing had been. */
static int fork_and_use(int threads) {
    static rank r;
    int state = 0;
    if (open_rank(&r, threads)) return 1;
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        alarm(CHILD_SECONDS);
        int wrong = use_in_child(&r);
        fflush(stdout);
        _exit(wrong != 0);
    }
    waitpid(child, &state, 0);
    if (!WIFEXITED(state) || WEXITSTATUS(state)) printf("the child ended with state %d\n", state);
    int wrong = !WIFEXITED(state) || WEXITSTATUS(state) != 0;
    wrong += check(forward(&r) == USP_OK && usp_world_poll(r.world) == USP_OK, "the parent");
    usp_world_free(r.world, r.workspace);
    for (int i = OBJECTS - 1; i >= 0; i--) destroy_object(&r, i);
    return wrong;
}

/* ---- two threads ------------------------------------------------------------------------------------------------- */

/* Two thread-ranks; a second thread of rank 0 comes while the first one waits for rank 1 in a mesh. */
typedef struct pair {
    usp_rendezvous *rendezvous;
    pthread_barrier_t ready;
    usp_world *world[2];
    int wrong[3];
} pair;

static void rest(void) {
    const struct timespec pause = {.tv_nsec = 200000000};
    nanosleep(&pause, NULL);
}

static void come(pair *p, int number) {
    usp_world_config config = {.struct_size = sizeof config, .device = USP_DEVICE_CPU, .timeout_ms = 20000};
    usp_mesh *mesh = NULL;
    usp_status status = usp_world_create_threads(&config, p->rendezvous, number, &p->world[number]);
    p->wrong[number] = check(status == USP_OK, "world");
    pthread_barrier_wait(&p->ready);
    if (number == 1) rest(), rest();
    p->wrong[number] += check(usp_mesh_create(p->world[number], 1, 2, &mesh) == USP_OK, "mesh");
    usp_mesh_destroy(mesh);
    pthread_barrier_wait(&p->ready);
    usp_world_destroy(p->world[number]);
}

static void *come_first(void *argument) {
    come(argument, 0);
    return NULL;
}

static void *come_late(void *argument) {
    come(argument, 1);
    return NULL;
}

static void *come_between(void *argument) {
    pair *p = argument;
    usp_mesh *mesh = NULL;
    pthread_barrier_wait(&p->ready);
    rest();
    usp_status status = usp_mesh_create(p->world[0], 1, 2, &mesh);
    p->wrong[2] = check(status == USP_INVALID && !mesh && strstr(usp_last_error(), "another thread"), "second thread");
    p->wrong[2] += check(usp_world_poll(p->world[0]) == USP_OK, "poll from any thread");
    pthread_barrier_wait(&p->ready);
    return NULL;
}

static int use_from_two_threads(void) {
    void *(*const bodies[])(void *) = {come_first, come_late, come_between};
    pair p = {.rendezvous = NULL};
    pthread_t thread[3];
    int wrong = 0;
    if (usp_rendezvous_create(2, &p.rendezvous) != USP_OK) return 1;
    pthread_barrier_init(&p.ready, NULL, 3);
    for (int i = 0; i < 3; i++)
        if (pthread_create(&thread[i], NULL, bodies[i], &p) != 0) exit(1);
    for (int i = 0; i < 3; i++) {
        pthread_join(thread[i], NULL);
        wrong += p.wrong[i];
    }
    usp_rendezvous_destroy(p.rendezvous);
    return wrong;
}

/* ---- a garbage collector ----------------------------------------------------------------------------------------- */

/* One thread makes layers and runs them, another destroys them, whatever the first is in. Layers of two masks have two
 * schedules of the one sequence, which come and go. */
typedef struct collector {
    _Atomic(usp_layer *) garbage;
    atomic_int done;
} collector;

static void *collect(void *argument) {
    collector *c = argument;
    for (;;) {
        int done = atomic_load(&c->done);
        usp_layer *layer = atomic_exchange(&c->garbage, NULL);
        usp_layer_destroy(layer);
        if (!layer && done) return NULL;
        if (!layer) sched_yield();
    }
}

static usp_status make_layer(rank *r, usp_mask mask) {
    usp_layer_config config = {.struct_size = sizeof config,
                               .attention = USP_SOFTMAX,
                               .mask = mask,
                               .batch = 1,
                               .heads = HEADS,
                               .head_dim = DIM};
    return usp_layer_create(r->mesh, r->sequence, &config, &r->layer);
}

static int destroy_from_another_thread(void) {
    static rank r;
    collector c = {NULL, 0};
    pthread_t thread;
    int wrong = open_rank(&r, 1), live = atomic_load(&r.heap.live);
    usp_layer *first = r.layer;
    if (wrong || pthread_create(&thread, NULL, collect, &c) != 0) return 1;
    for (int i = 0; i < LAYERS && !wrong; i++) {
        wrong += check(make_layer(&r, i % 2 ? USP_MASK_FULL : USP_MASK_CAUSAL) == USP_OK, "a layer beside a collector");
        wrong += wrong || check(forward(&r) == USP_OK, "forward beside a collector");
        for (usp_layer *full = NULL; !wrong && !atomic_compare_exchange_weak(&c.garbage, &full, r.layer); full = NULL)
            sched_yield();
    }
    atomic_store(&c.done, 1);
    pthread_join(thread, NULL);
    if (!wrong && atomic_load(&r.heap.live) != live) wrong = 1, printf("layers are left behind\n");
    r.layer = first;
    usp_world_free(r.world, r.workspace);
    for (int i = OBJECTS - 1; i >= 0; i--) destroy_object(&r, i);
    return wrong;
}

int main(void) {
    int order[OBJECTS] = {0, 1, 2, 3, 4};
    int wrong = destroy_in_all_orders(order, 0);
    wrong += fork_and_use(1) + fork_and_use(0) + use_from_two_threads() + destroy_from_another_thread();
    printf("%s: %d wrong\n", wrong ? "FAIL" : "ok", wrong);
    return wrong != 0;
}
