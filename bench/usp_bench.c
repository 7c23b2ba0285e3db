/* usp_bench.c - sweeps the library over meshes, kinds, layouts, lengths and types, and checks what it times.
 * Only the order of things is here; see options.c, measure.c, reference.c and report.c. */
#include "report.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct usp_bench {
    const usp_options *options;
    double wrong;
    int idle; /* rank 0 saw every row skipped */
} usp_bench;

static usp_status add_rows(usp_rank *rank, usp_report *report, usp_sweep_state *state, const usp_result *results,
                           int count) {
    if (rank->rank) return USP_OK;
    usp_progress_clear(&state->progress);
    for (int i = 0; i < count; i++) USP_TRY(usp_report_add(report, &results[i], &rank->error));
    return USP_OK;
}

static usp_status sweep(usp_rank *rank, usp_bench *bench, usp_report *report) {
    const usp_options *options = bench->options;
    size_t count;
    usp_case *cases = usp_options_cases(options, rank->size, rank->device, &count, &rank->error);
    if (!cases) return USP_INVALID;
    size_t rows = count * (size_t)(options->passes[0] + options->passes[1]);
    usp_sweep_state state = {.progress = usp_progress_open(rows, options->quiet || rank->rank)};
    usp_status status = USP_OK;
    for (size_t i = 0; i < count && status == USP_OK; i++) {
        usp_result results[2];
        int made = 0;
        status = usp_measure(rank, options, &cases[i], &state, results, &made);
        if (status == USP_OK) status = add_rows(rank, report, &state, results, made);
    }
    usp_progress_clear(&state.progress);
    free(cases);
    return status;
}

static usp_status report_sweep(usp_rank *rank, usp_bench *bench, usp_report *report) {
    USP_TRY(usp_report_open(report, bench->options, rank));
    usp_status status = sweep(rank, bench, report);
    if (status != USP_OK && !rank->error.text[0]) usp_tool_fail(&rank->error, status, "%s", usp_last_error());
    bench->wrong = usp_report_wrong(report);
    bench->idle = usp_report_rows(report) == 0;
    usp_tool_error closing = {""};
    usp_status closed = usp_report_close(report, status == USP_OK ? NULL : rank->error.text, &closing);
    if (status != USP_OK || closed == USP_OK) return status;
    rank->error = closing;
    return closed;
}

static usp_status run_rank(usp_rank *rank, void *user) {
    usp_bench *bench = user;
    usp_report report;
    return rank->rank ? sweep(rank, bench, NULL) : report_sweep(rank, bench, &report);
}

/* All arguments with blanks between them, for the header. */
static char *join_arguments(int argc, char **argv) {
    size_t bytes = 1;
    for (int i = 0; i < argc; i++) bytes += strlen(argv[i]) + 1;
    char *text = malloc(bytes), *at = text;
    for (int i = 0; i < argc && text; i++) at += sprintf(at, i ? " %s" : "%s", argv[i]);
    return text;
}

static int verdict(const usp_bench *bench, usp_status status, const usp_tool_error *error) {
    if (status != USP_OK)
        fprintf(stderr, "usp_bench: %s\n", error->text);
    else if (bench->idle)
        fputs("usp_bench: every row was skipped\n", stderr);
    if (status != USP_OK || bench->idle) return 2;
    return bench->wrong > 0 ? 1 : 0;
}

int main(int argc, char **argv) {
    usp_options options;
    usp_tool_error error = {""};
    usp_options_parse(&options, argc, argv);
    if (options.info) {
        usp_machine machine;
        usp_machine_describe(&machine);
        usp_report_info(&machine);
        return 0;
    }
    char *command = join_arguments(argc, argv);
    options.command = command ? command : "usp_bench";
    usp_bench bench = {.options = &options};
    usp_status status = usp_ranks_run(&options.ranks, run_rank, &bench, &error);
    free(command);
    return verdict(&bench, status, &error);
}
