/* test_failures.c - ranks that stall, leave or give up while the others need them: each of the others gets an error
 * that names the rank, in time, and the process goes on with a new world. Processes that die are in the plain programs.
 */
#include "expect.h"
#include "error.h"
#include "stage.h"
#include "world.h"

#include <stdio.h>
#include <string.h>
#include <threads.h>
#include <time.h>

enum { TIMEOUT_MS = 700, MARGIN_MS = 3000, SECONDS = 60 };

typedef enum deed { STALL, LEAVE, ABORT, BREAK_IN_CALL, BREAK_IN_WAIT, DEEDS } deed;

static const char *const deed_names[DEEDS] = {"stalls", "leaves", "gives up", "has a broken device in a call",
                                              "has a broken device while it waits"};

/* What goes wrong in a world, and when. */
typedef struct scene {
    deed deed;
    int odd;      /* the rank that does it */
    int backward; /* while the others are in backward, not in forward */
    usp_case c;
} scene;

static int64_t now_ms(void) {
    struct timespec now;
    timespec_get(&now, TIME_UTC);
    return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

static void rest(int ms) {
    const int64_t end = now_ms() + ms;
    const struct timespec pause = {.tv_nsec = 10000000};
    while (now_ms() < end) thrd_sleep(&pause, NULL);
}

/* The next call of a layer that has run before. */
static usp_status next_call(usp_stage *stage, int backward) {
    usp_forward f = usp_stage_forward_arguments(stage, 1);
    usp_backward b = usp_stage_backward_arguments(stage);
    if (backward)
        return usp_layer_backward(stage->layer, &b, stage->workspace.device, stage->sizes.backward_workspace, NULL);
    return usp_layer_forward(stage->layer, &f, stage->workspace.device, stage->sizes.forward_workspace, NULL);
}

static int is_expected(deed what, usp_status status) {
    if (what == STALL) return status == USP_TIMEOUT || status == USP_PEER_LOST;
    if (what >= BREAK_IN_CALL) return status == USP_DEVICE;
    return what == LEAVE ? status == USP_PEER_LOST : status == USP_COMM;
}

/* The first call that fails must blame the odd rank, in time; and the world stays failed. */
static void judge(usp_rank *rank, const scene *s, usp_status status, int64_t took) {
    char name[32];
    snprintf(name, sizeof name, "rank %d", s->odd);
    if (!is_expected(s->deed, status) || !strstr(usp_last_error(), name))
        usp_say(rank, "%s %s: %s, \"%s\"", name, deed_names[s->deed], usp_status_string(status), usp_last_error());
    if (took > TIMEOUT_MS + MARGIN_MS)
        usp_say(rank, "%s: the error took %lld ms", deed_names[s->deed], (long long)took);
    if (usp_world_poll(rank->world) != status) usp_say(rank, "%s: the world forgets its failure", deed_names[s->deed]);
}

/* ---- a device that breaks ---------------------------------------------------------------------------------------- */

static usp_status no_softmax(usp_device *device, const usp_softmax *softmax, usp_stream stream) {
    (void)device, (void)softmax, (void)stream;
    return usp_fail(USP_DEVICE, "the device is broken");
}

/* A device may also lack memory of its own: for a world that runs it is broken then. */
static usp_status no_linear(usp_device *device, const usp_linear *linear, usp_stream stream) {
    (void)device, (void)linear, (void)stream;
    return usp_fail(USP_NO_MEMORY, "the device is broken");
}

static usp_status no_query(usp_device *device, usp_stream stream, int *busy) {
    (void)device, (void)stream, (void)busy;
    return usp_fail(USP_DEVICE, "the device is broken");
}

static usp_status break_device(usp_stage *stage, const scene *s) {
    usp_device *device = stage->rank->world->device;
    const usp_device_ops *whole = device->ops;
    usp_device_ops broken = *whole;
    broken.softmax_forward = broken.softmax_backward = no_softmax;
    broken.linear_totals = no_linear;
    broken.query = no_query;
    device->ops = &broken;
    usp_status status =
        s->deed == BREAK_IN_CALL ? next_call(stage, s->backward) : usp_world_synchronize(stage->rank->world, NULL);
    device->ops = whole;
    return status;
}

/* ---- the play ---------------------------------------------------------------------------------------------------- */

static int play(usp_rank *rank, void *argument) {
    const scene *s = argument;
    usp_stage stage;
    if (usp_stage_open(rank, &s->c, &stage) != USP_OK) return usp_say(rank, "%s", usp_last_error());
    if (usp_stage_fill(&stage)) return 1;
    int64_t begin = now_ms();
    usp_status status = next_call(&stage, 0); /* may meet the failure already */
    if (rank->rank == s->odd) {
        if (status != USP_OK) usp_say(rank, "%s", usp_last_error());
        if (s->deed == STALL) rest(TIMEOUT_MS + MARGIN_MS);
        if (s->deed == ABORT) usp_world_abort(rank->world);
        if (s->deed >= BREAK_IN_CALL) judge(rank, s, break_device(&stage, s), now_ms() - begin);
    } else {
        for (int i = 0; i < 100 && status == USP_OK; i++) status = next_call(&stage, s->backward);
        judge(rank, s, status, now_ms() - begin);
    }
    usp_stage_close(&stage);
    usp_count(rank);
    return 0;
}

static int work(usp_rank *rank, void *argument) {
    const scene *s = argument;
    usp_whole whole;
    if (usp_stage_run(rank, &s->c, &whole) != 0) return 1;
    usp_whole_free(&whole);
    usp_count(rank);
    return 0;
}

static void run_scene(scene s, int ulysses, int ring, int watchdog) {
    const usp_ranks ranks = {
        .size = ulysses * ring, .seconds = SECONDS, .watchdog = watchdog, .timeout_ms = TIMEOUT_MS};
    usp_report report;
    s.c.ulysses = ulysses;
    s.c.ring = ring;
    usp_ranks_run(&ranks, play, &s, &report);
    cr_expect(report.failures == 0 && report.done == ranks.size, "U%d R%d, rank %d %s: %d came back\n%s", ulysses, ring,
              s.odd, deed_names[s.deed], report.done, report.text);
    usp_expect_ranks(ranks.size, SECONDS, work, &s);
}

static void run_scenes(const usp_case *c, int watchdog) {
    for (int what = STALL; what < DEEDS; what++)
        for (int i = 0; i < 3; i++) {
            static const int shapes[3][2] = {{1, 2}, {1, 3}, {2, 2}};
            scene s = {
                .deed = (deed)what, .odd = i == 0 ? 0 : shapes[i][0] * shapes[i][1] - 1, .backward = i == 1, .c = *c};
            run_scene(s, shapes[i][0], shapes[i][1], watchdog);
        }
}

Test(failures, in_softmax, .timeout = 120) {
    run_scenes(&(usp_case){.tokens = 40, .mask = USP_MASK_CAUSAL}, 0);
}

Test(failures, in_linear, .timeout = 120) {
    run_scenes(&(usp_case){.attention = USP_LINEAR,
                           .tokens = 40,
                           .mask = USP_MASK_CAUSAL,
                           .decay = 1,
                           .state_exchange = USP_STATE_CHAIN,
                           .final_state = 1},
               1);
}

/* A rank that never comes to a collective create. */
static int missing_create(usp_rank *rank, void *argument) {
    usp_mesh *mesh = NULL;
    const scene *s = argument;
    if (rank->rank == s->odd) {
        rest(TIMEOUT_MS + MARGIN_MS / 2);
    } else {
        int64_t begin = now_ms();
        usp_status status = usp_mesh_create(rank->world, 1, rank->size, &mesh);
        judge(rank, s, status, now_ms() - begin);
    }
    usp_count(rank);
    return 0;
}

Test(failures, in_create, .timeout = 60) {
    const usp_ranks ranks = {.size = 3, .seconds = SECONDS, .timeout_ms = TIMEOUT_MS};
    usp_report report;
    scene s = {.deed = STALL, .odd = 1, .c = {.tokens = 40}};
    usp_ranks_run(&ranks, missing_create, &s, &report);
    cr_expect(report.failures == 0 && report.done == 3, "%d came back\n%s", report.done, report.text);
    usp_expect_ranks(3, SECONDS, work, &s);
}
