/* gpu_layers.c - the tests of running layers on GPUs: the bodies of the CPU suite, compared with the same oracle, and
 * those of CUDA graphs and streams. A plain program; exits 77 with the reason where there is no GPU.
 *
 *   gpu_layers                   thread-ranks that share GPU 0, then a thread a GPU over NCCL
 *   gpu_layers --threads [N]     thread-ranks that share GPU 0: worlds of 1 .. N (default 4)
 *   gpu_layers --nccl [N]        a thread a GPU, N GPUs (default: all)
 *   gpu_layers --processes L [--peer] a process a GPU, two at least, started by the launcher L (usp_launch), over NCCL
 *                                or the peer transport
 *   RANK=... gpu_layers [--peer] one of those processes, or of torchrun's */
#define _POSIX_C_SOURCE 200809L
#include "bodies.h"
#include "costs.h"
#include "formulas.h"
#include "gpu_streams.h"
#include "masks.h"
#include "replans.h"
#include "spread.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { SKIPPED = 77, SECONDS = 500, SHARED_RANKS = 4 };

/* ---- axes -------------------------------------------------------------------------------------------------------- */

#ifdef USP_HAVE_NCCL
#include <nccl.h>

/* The caller's communicator of an axis has the axis' size and ranks. */
static int check_axis(usp_rank *rank, usp_mesh *mesh, usp_axis axis) {
    ncclComm_t comm = NULL;
    int place = -1, size = -1, comm_rank = -2, comm_size = -2;
    if (usp_mesh_axis(mesh, axis, &place, &size) != USP_OK || usp_mesh_axis_comm(mesh, axis, &comm) != USP_OK)
        return usp_say(rank, "axis %d: %s", (int)axis, usp_last_error());
    if (ncclCommUserRank(comm, &comm_rank) != ncclSuccess || ncclCommCount(comm, &comm_size) != ncclSuccess)
        return usp_say(rank, "axis %d: the communicator does not answer", (int)axis);
    if (comm_rank != place || comm_size != size)
        return usp_say(rank, "axis %d: rank %d of %d in the communicator, %d of %d in the mesh", (int)axis, comm_rank,
                       comm_size, place, size);
    return 0;
}

static int axes(usp_rank *rank) {
    usp_mesh *mesh = NULL;
    int ulysses = rank->size % 2 == 0 ? 2 : 1, failed = 0;
    if (usp_mesh_create(rank->world, ulysses, 1, &mesh) != USP_OK) return usp_say(rank, "%s", usp_last_error());
    for (int axis = USP_AXIS_ULYSSES; axis <= USP_AXIS_DATA && !failed; axis++)
        failed = check_axis(rank, mesh, (usp_axis)axis);
    usp_mesh_destroy(mesh);
    return failed;
}
#else
static int axes(usp_rank *rank) {
    usp_refuse(rank, "axis communicators: this program was built without NCCL");
    return 0;
}
#endif

/* ---- limits ------------------------------------------------------------------------------------------------------ */

/* More heads than a launch holds: every rank is refused at create, by a sentence that says so. */
static int limits(usp_rank *rank) {
    usp_sequence_config tokens = {.struct_size = sizeof tokens, .tokens = 8 * rank->size};
    usp_layer_config config = {.struct_size = sizeof config,
                               .attention = USP_SOFTMAX,
                               .mask = USP_MASK_FULL,
                               .dtype = USP_BF16,
                               .batch = 65536,
                               .heads = 65536,
                               .head_dim = 8};
    usp_mesh *mesh = NULL;
    usp_sequence *sequence = NULL;
    usp_layer *layer = NULL;
    if (usp_mesh_create(rank->world, 1, rank->size, &mesh) != USP_OK ||
        usp_sequence_create(mesh, &tokens, &sequence) != USP_OK)
        return usp_say(rank, "%s", usp_last_error());
    usp_status status = usp_layer_create(mesh, sequence, &config, &layer);
    int refused = status == USP_UNSUPPORTED && strstr(usp_last_error(), "65536 x 65536") != NULL;
    if (!refused) usp_say(rank, "65536 x 65536 heads: %s, %s", usp_status_string(status), usp_last_error());
    usp_layer_destroy(layer);
    usp_sequence_destroy(sequence);
    usp_mesh_destroy(mesh);
    return !refused;
}

/* ---- what runs in one world -------------------------------------------------------------------------------------- */

typedef struct everything {
    usp_references *references;
    int graphs; /* where ranks need not meet on the host */
    int axes;   /* where ranks are joined by NCCL */
    int calls;  /* of a mix */
} everything;

static int run_tables(usp_rank *rank, usp_references *references) {
    const usp_table *const tables[] = {&usp_wide_table,    &usp_half_table,   &usp_mask_table,
                                       &usp_softmax_table, &usp_linear_table, &usp_large_table};
    for (int i = 0; i < 6; i++) {
        usp_table_run run = {.table = tables[i], .references = references};
        if (usp_body_table(rank, &run)) return 1;
    }
    usp_table_run copies = {.table = &usp_wide_table, .copies = 2, .references = references};
    if (usp_body_features(rank, references)) return 1;
    return rank->size % 2 == 0 && usp_body_table(rank, &copies);
}

/* A body that cannot go on says so; one that finds wrong results does too, and the next one runs. */
static int run_everything(usp_rank *rank, void *argument) {
    static const struct {
        const char *name;
        usp_body body;
    } properties[] = {{"arrangements", usp_body_arrangements},
                      {"repeats", usp_body_repeats},
                      {"round trip", usp_body_round_trip},
                      {"parts", usp_body_parts},
                      {"linearity", usp_body_linearity},
                      {"switch", usp_body_switch},
                      {"states", usp_body_states},
                      {"continue", usp_body_continue},
                      {"independent", usp_body_independent},
                      {"masks", usp_body_masks},
                      {"packed", usp_body_packed},
                      {"twins", usp_body_twins},
                      {"whole window", usp_body_whole_window},
                      {"chain", usp_body_chain},
                      {"no sinks", usp_body_no_sinks},
                      {"little dropout", usp_body_little_dropout},
                      {"dropped", usp_body_dropped},
                      {"replanned", usp_body_replanned},
                      {"refused replans", usp_body_refused_replans},
                      {"shared memory", usp_body_shared_memory},
                      {"groups", usp_body_groups},
                      {"not a number", usp_body_not_a_number},
                      {"spread", usp_body_spread}};
    const everything *all = argument;
    if (rank->device != USP_DEVICE_CUDA) return usp_say(rank, "the world is not on a GPU");
    if (run_tables(rank, all->references)) return usp_say(rank, "... in the tables");
    for (size_t i = 0; i < sizeof properties / sizeof properties[0]; i++)
        if (properties[i].body(rank, NULL)) return usp_say(rank, "... in %s", properties[i].name);
    if (all->graphs && usp_body_graphs(rank, NULL)) return usp_say(rank, "... in graphs");
    if (usp_body_streams(rank, NULL)) return usp_say(rank, "... in streams");
    if (usp_body_interleavings(rank, (void *)(uintptr_t)&all->calls)) return usp_say(rank, "... in interleavings");
    if (all->axes && axes(rank)) return usp_say(rank, "... in axes");
    if (limits(rank)) return usp_say(rank, "... in limits");
    if (usp_body_costs(rank, (void *)(uintptr_t)&usp_half_table)) return usp_say(rank, "... in costs");
    return 0;
}

/* ---- worlds ------------------------------------------------------------------------------------------------------ */

static int run_world(usp_ranks_kind kind, int size, const char *name, usp_transport_kind transport,
                     usp_references *references) {
    const usp_ranks ranks = {.kind = kind,
                             .transport = transport,
                             .device = USP_DEVICE_CUDA,
                             .size = size,
                             .seconds = SECONDS,
                             .stream_create = usp_gpu_stream_create,
                             .stream_destroy = usp_gpu_stream_destroy};
    everything all = {.references = references,
                      .graphs = kind != USP_RANKS_THREADS || size == 1,
                      .axes = kind != USP_RANKS_THREADS && transport != USP_TRANSPORT_PEER,
                      .calls = kind != USP_RANKS_THREADS ? 10000 : 1000};
    usp_report report;
    int failed = usp_ranks_run(&ranks, run_everything, &all, &report) || report.done == 0;
    printf("%s (%d here): %d done, %d refused, %d failures\n%s", name, size, report.done, report.refused,
           report.failures, report.text);
    fflush(stdout);
    return failed;
}

/* The same ring with more ulysses ranks gives the same bits: worlds of thread-ranks on one GPU. */
static int run_across(int most) {
    int failed = 0;
    for (int ring = 1; ring <= 2; ring++) {
        usp_across across = {.ring = ring};
        for (int ulysses = 1; ulysses * ring <= most && ulysses <= 4; ulysses *= 2) {
            const usp_ranks ranks = {.device = USP_DEVICE_CUDA,
                                     .size = ulysses * ring,
                                     .seconds = SECONDS,
                                     .stream_create = usp_gpu_stream_create,
                                     .stream_destroy = usp_gpu_stream_destroy};
            usp_report report;
            failed += usp_ranks_run(&ranks, usp_body_across_ulysses, &across, &report);
            printf("same bits, ring %d, ulysses %d: %d failures\n%s", ring, ulysses, report.failures, report.text);
        }
        usp_across_free(&across);
    }
    return failed;
}

static int run_threads(int most, usp_references *references) {
    int failed = 0;
    for (int size = 1; size <= most; size = size < 2 ? 2 : size + 2)
        failed += run_world(USP_RANKS_THREADS, size, "threads on one GPU", USP_TRANSPORT_AUTO, references);
    return failed + run_across(most);
}

static int run_nccl(int gpus, usp_references *references) {
    usp_unique_id id;
    if (usp_unique_id_create(&id) == USP_UNSUPPORTED) {
        printf("no NCCL: %s\n", usp_last_error());
        return 0;
    }
    return run_world(USP_RANKS_NCCL, gpus, "NCCL", USP_TRANSPORT_AUTO, references);
}

/* Becomes the launcher of one process a GPU. */
static int run_processes(int gpus, const char *launcher, const char *program, const char *option) {
    char count[16], seconds[16];
    snprintf(count, sizeof count, "%d", gpus);
    snprintf(seconds, sizeof seconds, "%d", SECONDS + 60);
    execl(launcher, launcher, "-n", count, "-t", seconds, program, option, (char *)NULL);
    perror(launcher);
    return 1;
}

int main(int argc, char **argv) {
    usp_references references = {0};
    int gpus = usp_device_count(USP_DEVICE_CUDA), failed = 0, number = argc > 2 ? atoi(argv[2]) : 0;
    int launched = getenv("RANK") != NULL;
    const char *mode = launched ? "--env" : argc > 1 ? argv[1] : "--all";
    if (gpus == 0) {
        printf("SKIP: no usable GPU, or the library was built without CUDA\n");
        return SKIPPED;
    }
    int peer = strcmp(argv[argc - 1], "--peer") == 0;
    if (strcmp(mode, "--processes") == 0 && argc > 2)
        return run_processes(peer && gpus < 2 ? 2 : gpus, argv[2], argv[0], peer ? argv[argc - 1] : NULL);
    if (launched)
        failed +=
            run_world(USP_RANKS_PROCESS, 1, "process", peer ? USP_TRANSPORT_PEER : USP_TRANSPORT_AUTO, &references);
    if (strcmp(mode, "--threads") == 0 || strcmp(mode, "--all") == 0)
        failed += run_threads(number > 0 ? number : SHARED_RANKS, &references);
    if (strcmp(mode, "--nccl") == 0 || strcmp(mode, "--all") == 0)
        failed += run_nccl(number > 0 && number < gpus ? number : gpus, &references);
    usp_references_free(&references);
    printf("gpu_layers: %s\n", failed ? "FAILED" : "ok");
    return failed != 0;
}
