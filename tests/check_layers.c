/* check_layers.c - layers of all tables against the oracle in one world, without a test framework: for sanitizers, and
 * for ranks that are processes. A plain program for the CPU; run by a launcher it is one rank, else it starts
 * thread-ranks.
 *
 *   check_layers [N [PART [KIB]]]       N thread-ranks (default 4); all parts, or one of the list below; on stacks of
 *                                       KIB KiB (default the system's); PART "all" is all of them
 *   RANK=... check_layers [N [PART]]    one process of a launcher's, over sockets
 *   mpirun check_layers --mpi [PART]    one process of mpirun's, over MPI (where the build has it) */
#include "bodies.h"
#include "costs.h"
#include "formulas.h"
#include "masks.h"
#include "replans.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#ifdef USP_HAVE_MPI
#include <mpi.h>
#endif

enum { SECONDS = 280, DEFAULT_RANKS = 4 };

static int half_costs(usp_rank *rank, void *argument) {
    (void)argument;
    return usp_body_costs(rank, (void *)(uintptr_t)&usp_half_table);
}

/* A table against the oracle, or a body of its own. */
static const struct part {
    const char *name;
    const usp_table *table;
    usp_body body;
} parts[] = {
    {"masks", &usp_mask_table, NULL},
    {"half", &usp_half_table, NULL},
    {"linear", &usp_linear_table, NULL},
    {"softmax", &usp_softmax_table, NULL},
    {"features", NULL, usp_body_features},
    {"switch", NULL, usp_body_switch},
    {"repeats", NULL, usp_body_repeats},
    {"round_trip", NULL, usp_body_round_trip},
    {"parts", NULL, usp_body_parts},
    {"states", NULL, usp_body_states},
    {"continue", NULL, usp_body_continue},
    {"costs", NULL, half_costs},
    {"independent", NULL, usp_body_masks},
    {"packed", NULL, usp_body_packed},
    {"twins", NULL, usp_body_twins},
    {"window", NULL, usp_body_whole_window},
    {"chain", NULL, usp_body_chain},
    {"sinks", NULL, usp_body_no_sinks},
    {"little_dropout", NULL, usp_body_little_dropout},
    {"dropped", NULL, usp_body_dropped},
    {"replanned", NULL, usp_body_replanned},
    {"refused_replans", NULL, usp_body_refused_replans},
    {"groups", NULL, usp_body_groups},
    {"lanes", NULL, usp_body_lanes},
};
enum { PARTS = sizeof parts / sizeof parts[0] };

typedef struct choice {
    const char *only; /* NULL: all parts */
    usp_references references;
} choice;

static int is_part(const char *name) {
    for (int i = 0; i < PARTS; i++)
        if (strcmp(name, parts[i].name) == 0) return 1;
    fprintf(stderr, "check_layers: no part '%s'; the parts are", name);
    for (int i = 0; i < PARTS; i++) fprintf(stderr, " %s", parts[i].name);
    return fputs("\n", stderr), 0;
}

/* argument: choice */
static int run_parts(usp_rank *rank, void *argument) {
    choice *chosen = argument;
    int failed = 0;
    for (int i = 0; i < PARTS && !failed; i++) {
        usp_table_run run = {.table = parts[i].table, .references = &chosen->references};
        if (chosen->only && strcmp(chosen->only, parts[i].name) != 0) continue;
        failed = parts[i].table ? usp_body_table(rank, &run) : parts[i].body(rank, &chosen->references);
    }
    return failed;
}

static int run_as(const usp_ranks *ranks, const char *only) {
    choice chosen = {.only = only};
    usp_report report;
    if (only && !is_part(only)) return 2;
    int failed = usp_ranks_run(ranks, run_parts, &chosen, &report);
    int counts = !only || ranks->kind == USP_RANKS_THREADS; /* of processes, rank 0 alone counts the cases of a table */
    failed |= counts && report.done == 0;
    usp_references_free(&chosen.references);
    printf("check_layers: %d done, %d refused, %d failures\n%s", report.done, report.refused, report.failures,
           report.text);
    return failed;
}

#ifdef USP_HAVE_MPI
static usp_status create_mpi(const usp_world_config *config, usp_world **world) {
    return usp_world_create_mpi(config, (int)MPI_Comm_c2f(MPI_COMM_WORLD), world);
}

/* The runner makes the world in another thread than this one. */
static int run_mpi(int argc, char **argv) {
    int provided = 0;
    MPI_Init_thread(&argc, &argv, MPI_THREAD_MULTIPLE, &provided);
    int failed = run_as(&(usp_ranks){.kind = USP_RANKS_PROCESS, .seconds = SECONDS, .create = create_mpi}, argv[2]);
    MPI_Finalize();
    return failed;
}
#else
static int run_mpi(int argc, char **argv) {
    (void)argc, (void)argv;
    puts("this build has no MPI");
    return 77;
}
#endif

int main(int argc, char **argv) {
    if (argc > 1 && strcmp(argv[1], "--mpi") == 0) return run_mpi(argc, argv);
    int size = argc > 1 ? atoi(argv[1]) : DEFAULT_RANKS, launched = getenv("RANK") != NULL;
    return run_as(&(usp_ranks){.kind = launched ? USP_RANKS_PROCESS : USP_RANKS_THREADS,
                               .size = size,
                               .host = 2,
                               .stack = argc > 3 ? atoi(argv[3]) : 0,
                               .seconds = SECONDS},
                  argc > 2 && strcmp(argv[2], "all") != 0 ? argv[2] : NULL);
}
