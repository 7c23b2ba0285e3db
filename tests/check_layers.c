/* check_layers.c - layers of all tables against the oracle in one world, without a test framework: for sanitizers, and
 * for ranks that are processes. A plain program for the CPU; run by a launcher it is one rank, else it starts
 * thread-ranks.
 *
 *   check_layers [N [KIB]]       N thread-ranks (default 4) on stacks of KIB KiB (default the system's)
 *   RANK=... check_layers [..]   one process of a launcher's, over sockets
 *   mpirun check_layers --mpi    one process of mpirun's, over MPI (where the build has it) */
#include "bodies.h"
#include "costs.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#ifdef USP_HAVE_MPI
#include <mpi.h>
#endif

enum { SECONDS = 280, DEFAULT_RANKS = 4 };

/* argument: usp_references */
static int run_all(usp_rank *rank, void *argument) {
    static const usp_table *const tables[] = {&usp_half_table, &usp_linear_table, &usp_softmax_table};
    static const usp_body bodies[] = {usp_body_switch, usp_body_repeats, usp_body_round_trip,
                                      usp_body_parts,  usp_body_states,  usp_body_continue};
    for (int i = 0; i < 3; i++) {
        usp_table_run run = {.table = tables[i], .references = argument};
        if (usp_body_table(rank, &run)) return 1;
    }
    for (int i = 0; i < 6; i++)
        if (bodies[i](rank, NULL)) return 1;
    return usp_body_costs(rank, (void *)(uintptr_t)&usp_half_table);
}

static int run_as(const usp_ranks *ranks) {
    usp_references references = {0};
    usp_report report;
    int failed = usp_ranks_run(ranks, run_all, &references, &report) || report.done == 0;
    usp_references_free(&references);
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
    int failed = run_as(&(usp_ranks){.kind = USP_RANKS_PROCESS, .seconds = SECONDS, .create = create_mpi});
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
    int size = argc > 1 ? atoi(argv[1]) : DEFAULT_RANKS, stack = argc > 2 ? atoi(argv[2]) : 0;
    return run_as(&(usp_ranks){.kind = getenv("RANK") ? USP_RANKS_PROCESS : USP_RANKS_THREADS,
                               .size = size,
                               .stack = stack,
                               .seconds = SECONDS});
}
