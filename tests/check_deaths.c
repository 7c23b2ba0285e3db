/* check_deaths.c - processes that die or stop, through the public API: every other rank gets an error that names the
 * rank, in time. In the middle of layers, after which the survivors make a new world that works; and at random moments
 * from the start of create to the end of destroy. A plain program; it forks. usage: check_deaths [KILLS [SEED]] */
#define _GNU_SOURCE
#include "port.h"
#include "usp.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { RANKS = 4, VICTIM = 2, HEALTHY_STEPS = 5, STEPS = 1000, LIMIT_MS = 3000, MARGIN_MS = 4000, ALARM = 100 };

/* How the victim ends, and in which kind of layer. */
typedef struct scene {
    const char *name;
    int signal;
    usp_attention attention;
} scene;

static double now_ms(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec * 1e3 + (double)now.tv_nsec * 1e-6;
}

static void set_number(const char *name, int value) {
    char text[16];
    snprintf(text, sizeof text, "%d", value);
    setenv(name, text, 1);
}

static usp_status join(int rank, int size, int port, int limit_ms, usp_world **world) {
    usp_world_config config = {.struct_size = sizeof config, .device = USP_DEVICE_CPU, .timeout_ms = limit_ms};
    set_number("RANK", rank);
    set_number("WORLD_SIZE", size);
    set_number("LOCAL_RANK", rank);
    set_number("MASTER_PORT", port);
    setenv("MASTER_ADDR", "127.0.0.1", 1);
    return usp_world_create_env(&config, world);
}

/* One layer and its memory. */
typedef struct model {
    usp_mesh *mesh;
    usp_sequence *sequence;
    usp_layer *layer;
    void *workspace, *saved;
    size_t bytes;
    usp_forward forward;
    usp_backward backward;
} model;

enum { TOKENS = 96, HEADS = 4, DIM = 16 };

static usp_status build(usp_world *world, int ulysses, int ring, usp_attention attention, model *m) {
    usp_sequence_config tokens = {.struct_size = sizeof tokens, .tokens = TOKENS};
    usp_layer_config config = {.struct_size = sizeof config,
                               .attention = attention,
                               .mask = USP_MASK_CAUSAL,
                               .batch = 1,
                               .heads = HEADS,
                               .head_dim = DIM};
    usp_sizes sizes = {.struct_size = sizeof sizes};
    usp_status status = usp_mesh_create(world, ulysses, ring, &m->mesh);
    if (status == USP_OK) status = usp_sequence_create(m->mesh, &tokens, &m->sequence);
    if (status == USP_OK) status = usp_layer_create(m->mesh, m->sequence, &config, &m->layer);
    if (status == USP_OK) status = usp_layer_get_sizes(m->layer, &sizes);
    m->bytes = sizes.forward_workspace > sizes.backward_workspace ? sizes.forward_workspace : sizes.backward_workspace;
    if (status == USP_OK) status = usp_world_alloc(world, m->bytes, &m->workspace);
    if (status == USP_OK) status = usp_world_alloc(world, sizes.saved + 1, &m->saved);
    return status;
}

static void point(model *m, float *memory) {
    enum { EACH = TOKENS * HEADS * DIM };
    usp_tensor tensor[8];
    for (int i = 0; i < 8; i++) tensor[i] = (usp_tensor){memory + i * EACH, EACH, HEADS * DIM, DIM};
    for (int i = 0; i < 8 * EACH; i++) memory[i] = (float)(i % 17) * 0.1f;
    m->forward = (usp_forward){.struct_size = sizeof m->forward,
                               .q = tensor[0],
                               .k = tensor[1],
                               .v = tensor[2],
                               .out = tensor[3],
                               .saved = m->saved};
    m->backward = (usp_backward){.struct_size = sizeof m->backward,
                                 .q = tensor[0],
                                 .k = tensor[1],
                                 .v = tensor[2],
                                 .out = tensor[3],
                                 .dout = tensor[4],
                                 .dq = tensor[5],
                                 .dk = tensor[6],
                                 .dv = tensor[7],
                                 .saved = m->saved};
}

static usp_status step(model *m) {
    usp_status status = usp_layer_forward(m->layer, &m->forward, m->workspace, m->bytes, NULL);
    if (status != USP_OK) return status;
    return usp_layer_backward(m->layer, &m->backward, m->workspace, m->bytes, NULL);
}

static void tear_down(usp_world *world, model *m) {
    usp_world_free(world, m->workspace);
    usp_world_free(world, m->saved);
    usp_layer_destroy(m->layer);
    usp_sequence_destroy(m->sequence);
    usp_mesh_destroy(m->mesh);
    usp_world_destroy(world);
}

static int complain(int rank, const char *what) {
    fprintf(stderr, "rank %d: %s: %s\n", rank, what, usp_last_error());
    return 1;
}

/* The survivor's view: the right status, the victim's name, in time. */
static int judge(int rank, const scene *s, usp_status status, double waited_ms) {
    char name[32];
    usp_status expected = s->signal == SIGKILL ? USP_PEER_LOST : USP_TIMEOUT;
    snprintf(name, sizeof name, "rank %d", VICTIM);
    if (status != expected) return complain(rank, "another status than expected");
    if (!strstr(usp_last_error(), name)) return complain(rank, "the rank is not named");
    return waited_ms > LIMIT_MS + MARGIN_MS ? complain(rank, "too late") : 0;
}

static int start_again(int rank, int port, usp_attention attention, float *memory) {
    usp_world *world = NULL;
    model m = {0};
    int place = rank < VICTIM ? rank : rank - 1;
    if (join(place, RANKS - 1, port, LIMIT_MS, &world) != USP_OK) return complain(rank, "new world");
    int failed = build(world, 1, RANKS - 1, attention, &m) != USP_OK;
    if (!failed) point(&m, memory);
    for (int i = 0; i < HEALTHY_STEPS && !failed; i++) failed = step(&m) != USP_OK;
    if (failed) complain(rank, "the new world does not work");
    tear_down(world, &m);
    return failed;
}

static int play(int rank, const scene *s, int port, int second_port) {
    usp_world *world = NULL;
    model m = {0};
    float *memory = malloc(8 * sizeof *memory * TOKENS * HEADS * DIM);
    if (!memory || join(rank, RANKS, port, LIMIT_MS, &world) != USP_OK) return complain(rank, "world");
    if (build(world, 2, 2, s->attention, &m) != USP_OK) return complain(rank, "layer");
    point(&m, memory);
    usp_status status = USP_OK;
    double began = now_ms();
    for (int i = 0; i < STEPS && status == USP_OK; i++) {
        if (rank == VICTIM && i == HEALTHY_STEPS) raise(s->signal);
        began = now_ms();
        status = step(&m);
    }
    int failed = judge(rank, s, status, now_ms() - began);
    tear_down(world, &m);
    if (!failed) failed = start_again(rank, second_port, s->attention, memory);
    free(memory);
    return failed;
}

static int run(const scene *s) {
    pid_t child[RANKS];
    int failures = 0, port = usp_free_port(), second_port = usp_free_port();
    for (int rank = 0; rank < RANKS; rank++) {
        child[rank] = fork();
        if (child[rank] == 0) {
            alarm(ALARM);
            _exit(play(rank, s, port, second_port));
        }
    }
    for (int rank = 0; rank < RANKS; rank++) {
        int status = 0;
        if (rank == VICTIM) continue;
        waitpid(child[rank], &status, 0);
        failures += !WIFEXITED(status) || WEXITSTATUS(status) != 0;
    }
    kill(child[VICTIM], SIGKILL);
    waitpid(child[VICTIM], NULL, 0);
    printf("%s: %d of %d survivors failed\n", s->name, failures, RANKS - 1);
    return failures;
}

/* ---- random moments ---------------------------------------------------------------------------------------------- */

enum { RANDOM_LIMIT_MS = 2000, RANDOM_STEPS = 50, RANDOM_RUN_MS = 250, RANDOM_CREATE_MS = 40 };

static int names(const char *sentence, int victim) {
    char name[32];
    size_t length = (size_t)snprintf(name, sizeof name, "rank %d", victim);
    for (const char *at = strstr(sentence, name); at; at = strstr(at + 1, name))
        if (at[length] < '0' || at[length] > '9') return 1;
    return 0;
}

/* Create, layers for a while, destroy. Whatever fails must name the victim, and come in time. */
static int live(int rank, int victim, int port) {
    usp_world *world = NULL;
    model m = {0};
    static float memory[8 * TOKENS * HEADS * DIM];
    double began = now_ms();
    usp_status status = join(rank, RANKS, port, RANDOM_LIMIT_MS, &world);
    if (status == USP_OK) began = now_ms();
    if (status == USP_OK) status = build(world, 2, 2, USP_SOFTMAX, &m);
    if (status == USP_OK) point(&m, memory);
    for (int i = 0; i < RANDOM_STEPS && status == USP_OK; i++) {
        began = now_ms();
        status = step(&m);
        if (status == USP_OK) usleep(1000 * RANDOM_RUN_MS / RANDOM_STEPS);
    }
    double waited = now_ms() - began;
    int failed = status != USP_OK && !names(usp_last_error(), victim) ? complain(rank, "the victim is not named") : 0;
    if (waited > RANDOM_LIMIT_MS + MARGIN_MS) failed = complain(rank, "too late");
    if (world) tear_down(world, &m);
    return failed;
}

static int kill_once(unsigned seed) {
    pid_t child[RANKS];
    int failures = 0, port = usp_free_port();
    srand(seed);
    int victim = rand() % RANKS, span = seed % 2 ? RANDOM_CREATE_MS : RANDOM_RUN_MS + RANDOM_CREATE_MS;
    int delay_us = (int)(rand() / (RAND_MAX + 1.0) * span * 1000);
    for (int rank = 0; rank < RANKS; rank++) {
        child[rank] = fork();
        if (child[rank] == 0) {
            alarm(ALARM);
            _exit(live(rank, victim, port));
        }
    }
    usleep((useconds_t)delay_us);
    kill(child[victim], SIGKILL);
    for (int rank = 0; rank < RANKS; rank++) {
        int status = 0;
        waitpid(child[rank], &status, 0);
        if (rank != victim) failures += !WIFEXITED(status) || WEXITSTATUS(status) != 0;
    }
    if (failures)
        printf("seed %u: rank %d killed after %.2f ms: %d survivors failed\n", seed, victim, delay_us * 1e-3, failures);
    return failures;
}

static int kill_often(int kills, unsigned seed) {
    int failures = 0;
    for (int i = 0; i < kills; i++) failures += kill_once(seed + (unsigned)i) != 0;
    printf("%d of %d kills at random moments were told wrongly\n", failures, kills);
    return failures;
}

int main(int count, char **arguments) {
    static const scene scenes[] = {{"killed in a softmax layer", SIGKILL, USP_SOFTMAX},
                                   {"killed in a linear layer", SIGKILL, USP_LINEAR},
                                   {"stopped in a softmax layer", SIGSTOP, USP_SOFTMAX},
                                   {"stopped in a linear layer", SIGSTOP, USP_LINEAR}};
    int failures = 0;
    int kills = count > 1 ? atoi(arguments[1]) : 30;
    unsigned seed = count > 2 ? (unsigned)atoi(arguments[2]) : (unsigned)time(NULL);
    for (size_t i = 0; count == 1 && i < sizeof scenes / sizeof scenes[0]; i++) failures += run(&scenes[i]);
    return failures + kill_often(kills, seed) != 0;
}
