/* gpu_layers.c - the tests of running layers on GPUs: the bodies of the CPU suite, compared with the same oracle, and
 * those of CUDA graphs and streams. A plain program; exits 77 with the reason where there is no GPU.
 *
 *   gpu_layers                 thread-ranks that share GPU 0, then a thread a GPU over NCCL
 *   gpu_layers --threads [N]   thread-ranks that share GPU 0: worlds of 1 .. N (default 4)
 *   gpu_layers --nccl [N]      a thread a GPU, N GPUs (default: all), over NCCL alone
 *   gpu_layers --gpus [N]      the same by lanes, each of which takes the transport that serves it best
 *   gpu_layers --processes L [TRANSPORT]
 *                              a process a GPU, two at least for --peer, started by the launcher L (usp_launch)
 *   RANK=... gpu_layers [TRANSPORT]
 *                              one of those processes, or of torchrun's
 *   RANK=... gpu_layers --two-hosts
 *                              one of those, of which each half passes for those of one host: what is of lanes alone
 *
 * TRANSPORT: --peer or --nccl for one alone; else lanes. */
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
#include <time.h>
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

static int axes(usp_rank *rank, void *argument) {
    usp_mesh *mesh = NULL;
    int ulysses = rank->size % 2 == 0 ? 2 : 1, failed = 0;
    (void)argument;
    if (usp_mesh_create(rank->world, ulysses, 1, &mesh) != USP_OK) return usp_say(rank, "%s", usp_last_error());
    for (int axis = USP_AXIS_ULYSSES; axis <= USP_AXIS_DATA && !failed; axis++)
        failed = check_axis(rank, mesh, (usp_axis)axis);
    usp_mesh_destroy(mesh);
    return failed;
}
#else
static int axes(usp_rank *rank, void *argument) {
    (void)argument;
    usp_refuse(rank, "axis communicators: this program was built without NCCL");
    return 0;
}
#endif

/* ---- limits ------------------------------------------------------------------------------------------------------ */

/* More heads than a launch holds: every rank is refused at create, by a sentence that says so. */
static int limits(usp_rank *rank, void *argument) {
    (void)argument;
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

/* What a world is good for. */
enum {
    WHOLE = 1,  /* there is time for everything */
    GRAPHS = 2, /* ranks need not meet on the host */
    AXES = 4    /* ranks are joined by NCCL */
};

typedef struct everything {
    usp_references *references;
    int can;   /* of the above */
    int calls; /* of a mix */
} everything;

static int tables(usp_rank *rank, void *argument) {
    const usp_table *const all[] = {&usp_wide_table,    &usp_half_table,   &usp_mask_table,
                                    &usp_softmax_table, &usp_linear_table, &usp_large_table};
    usp_references *references = ((const everything *)argument)->references;
    for (int i = 0; i < 6; i++) {
        usp_table_run run = {.table = all[i], .references = references};
        if (usp_body_table(rank, &run)) return 1;
    }
    usp_table_run copies = {.table = &usp_wide_table, .copies = 2, .references = references};
    if (usp_body_features(rank, references)) return 1;
    return rank->size % 2 == 0 && usp_body_table(rank, &copies);
}

static int interleavings(usp_rank *rank, void *argument) {
    int calls = ((const everything *)argument)->calls;
    return usp_body_interleavings(rank, &calls);
}

static int costs(usp_rank *rank, void *argument) {
    (void)argument;
    return usp_body_costs(rank, (void *)(uintptr_t)&usp_half_table);
}

static const struct part {
    const char *name;
    usp_body body; /* argument: everything, or none */
    int needs;
} parts[] = {{"tables", tables, WHOLE},
             {"arrangements", usp_body_arrangements, WHOLE},
             {"repeats", usp_body_repeats, WHOLE},
             {"round trip", usp_body_round_trip, WHOLE},
             {"parts", usp_body_parts, WHOLE},
             {"linearity", usp_body_linearity, WHOLE},
             {"switch", usp_body_switch, WHOLE},
             {"states", usp_body_states, WHOLE},
             {"continue", usp_body_continue, WHOLE},
             {"independent", usp_body_independent, WHOLE},
             {"masks", usp_body_masks, WHOLE},
             {"packed", usp_body_packed, WHOLE},
             {"twins", usp_body_twins, WHOLE},
             {"whole window", usp_body_whole_window, WHOLE},
             {"chain", usp_body_chain, WHOLE},
             {"no sinks", usp_body_no_sinks, WHOLE},
             {"little dropout", usp_body_little_dropout, WHOLE},
             {"dropped", usp_body_dropped, WHOLE},
             {"replanned", usp_body_replanned, WHOLE},
             {"refused replans", usp_body_refused_replans, WHOLE},
             {"shared memory", usp_body_shared_memory, WHOLE},
             {"groups", usp_body_groups, WHOLE},
             {"not a number", usp_body_not_a_number, WHOLE},
             {"spread", usp_body_spread, WHOLE},
             {"limits", limits, WHOLE},
             {"graphs", usp_body_graphs, GRAPHS},
             {"streams", usp_body_streams, 0},
             {"interleavings", interleavings, 0},
             {"axes", axes, AXES},
             {"costs", costs, 0},
             {"lanes", usp_body_lanes, 0}};

/* A body that cannot go on says so; one that finds wrong results does too, and the next one runs. */
static int run_everything(usp_rank *rank, void *argument) {
    const everything *all = argument;
    if (rank->device != USP_DEVICE_CUDA) return usp_say(rank, "the world is not on a GPU");
    for (size_t i = 0; i < sizeof parts / sizeof parts[0]; i++) {
        time_t begun = time(NULL);
        if (parts[i].needs & ~all->can) continue;
        if (parts[i].body(rank, argument)) return usp_say(rank, "... in %s", parts[i].name);
        if (rank->rank == 0) printf("%5d s %s\n", (int)(time(NULL) - begun), parts[i].name);
        fflush(stdout);
    }
    return 0;
}

/* ---- worlds ------------------------------------------------------------------------------------------------------ */

/* `host`: how many ranks pass for those of one host, and there is time for little then; 0: those that are. */
static int run_world(usp_ranks_kind kind, int size, const char *name, usp_transport_kind transport, int host,
                     usp_references *references) {
    const usp_ranks ranks = {.kind = kind,
                             .transport = transport,
                             .host = host,
                             .device = USP_DEVICE_CUDA,
                             .size = size,
                             .seconds = SECONDS,
                             .stream_create = usp_gpu_stream_create,
                             .stream_destroy = usp_gpu_stream_destroy};
    everything all = {.references = references, .calls = kind != USP_RANKS_THREADS && !host ? 10000 : 1000};
    if (!host) all.can |= WHOLE;
    if (kind != USP_RANKS_THREADS || size == 1) all.can |= GRAPHS;
    if (kind != USP_RANKS_THREADS && transport != USP_TRANSPORT_PEER) all.can |= AXES;
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
        failed += run_world(USP_RANKS_THREADS, size, "threads on one GPU", USP_TRANSPORT_AUTO, 0, references);
    return failed + run_across(most);
}

static int run_nccl(int gpus, usp_transport_kind transport, usp_references *references) {
    usp_unique_id id;
    if (usp_unique_id_create(&id) == USP_UNSUPPORTED) {
        printf("no NCCL: %s\n", usp_last_error());
        return 0;
    }
    return run_world(USP_RANKS_NCCL, gpus, transport == USP_TRANSPORT_NCCL ? "NCCL" : "lanes", transport, 0,
                     references);
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

/* Of the command's last word. */
static usp_transport_kind transport_of(const char *option) {
    if (strcmp(option, "--peer") == 0) return USP_TRANSPORT_PEER;
    return strcmp(option, "--nccl") == 0 ? USP_TRANSPORT_NCCL : USP_TRANSPORT_AUTO;
}

static int run_launched(const char *option, usp_references *references) {
    const char *size = getenv("WORLD_SIZE");
    int host = strcmp(option, "--two-hosts") == 0 && size ? atoi(size) / 2 : 0;
    return run_world(USP_RANKS_PROCESS, 1, "process", transport_of(option), host, references);
}

int main(int argc, char **argv) {
    usp_references references = {0};
    int gpus = usp_device_count(USP_DEVICE_CUDA), failed = 0, number = argc > 2 ? atoi(argv[2]) : 0;
    int launched = getenv("RANK") != NULL;
    const char *mode = launched ? "" : argc > 1 ? argv[1] : "--all", *option = argv[argc - 1];
    if (gpus == 0) {
        printf("SKIP: no usable GPU, or the library was built without CUDA\n");
        return SKIPPED;
    }
    if (strcmp(mode, "--processes") == 0 && argc > 2) {
        int least = transport_of(option) == USP_TRANSPORT_PEER ? 2 : 1;
        return run_processes(gpus < least ? least : gpus, argv[2], argv[0], argc > 3 ? option : NULL);
    }
    if (launched) failed += run_launched(option, &references);
    if (strcmp(mode, "--threads") == 0 || strcmp(mode, "--all") == 0)
        failed += run_threads(number > 0 ? number : SHARED_RANKS, &references);
    int some = number > 0 && number < gpus ? number : gpus;
    if (strcmp(mode, "--nccl") == 0 || strcmp(mode, "--all") == 0)
        failed += run_nccl(some, USP_TRANSPORT_NCCL, &references);
    if (strcmp(mode, "--gpus") == 0) failed += run_nccl(some, USP_TRANSPORT_AUTO, &references);
    usp_references_free(&references);
    printf("gpu_layers: %s\n", failed ? "FAILED" : "ok");
    return failed != 0;
}
