/* usp_bench.c - sweeps the library over meshes, kinds, layouts, lengths and types, and checks what it times.
 * Only the order of things is here; see options.c, sweep.c, measure.c, reference.c and report.c. */
#include "interrupt.h"
#include "report.h"
#include "sweep.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { SAVE_SECONDS = 2 };

typedef struct usp_bench {
    const usp_options *options;
    pthread_mutex_t mutex;        /* of the rows and the files */
    usp_report *report;           /* while it is open, else NULL */
    const usp_progress *progress; /* the same */
    double wrong;
    char idle[1024]; /* why rank 0 saw every row skipped; "": it did not */
} usp_bench;

/* The cases of a run, and where it stands. */
typedef struct usp_sweep {
    usp_case *cases;
    size_t count;
    usp_sweep_state state;
} usp_sweep;

static usp_status add_rows(usp_rank *rank, usp_bench *bench, usp_sweep_state *state, const usp_result *results,
                           int count) {
    usp_status status = USP_OK;
    if (rank->rank) return USP_OK;
    usp_progress_clear(&state->progress);
    pthread_mutex_lock(&bench->mutex);
    for (int i = 0; i < count && status == USP_OK; i++)
        status = usp_report_add(bench->report, &results[i], &rank->error);
    pthread_mutex_unlock(&bench->mutex);
    for (int i = 0; i < count && status == USP_OK; i++)
        status = usp_report_print(bench->report, &results[i], &rank->error);
    return status;
}

static usp_status run_sweep(usp_rank *rank, usp_bench *bench, usp_sweep *sweep) {
    usp_status status = USP_OK;
    for (size_t i = 0; i < sweep->count && status == USP_OK; i++) {
        usp_result results[2];
        int made = 0;
        status = usp_measure(rank, bench->options, &sweep->cases[i], &sweep->state, results, &made);
        if (status == USP_OK) status = add_rows(rank, bench, &sweep->state, results, made);
    }
    usp_progress_clear(&sweep->state.progress);
    return status;
}

/* From here to save_report a signal saves the report. */
static void show_report(usp_bench *bench, usp_report *report, const usp_progress *progress) {
    pthread_mutex_lock(&bench->mutex);
    bench->report = report;
    bench->progress = progress;
    pthread_mutex_unlock(&bench->mutex);
}

static usp_status save_report(usp_bench *bench, const char *failure, usp_tool_error *error) {
    pthread_mutex_lock(&bench->mutex);
    usp_status status = usp_report_save(bench->report, failure, error);
    bench->report = NULL;
    pthread_mutex_unlock(&bench->mutex);
    return status;
}

static usp_status report_sweep(usp_rank *rank, usp_bench *bench, usp_sweep *sweep) {
    usp_report report;
    usp_tool_error closing = {""};
    usp_status status = usp_report_open(&report, bench->options, rank);
    if (status != USP_OK) {
        usp_report_save(&report, rank->error.text, &closing);
        return status;
    }
    show_report(bench, &report, &sweep->state.progress);
    status = run_sweep(rank, bench, sweep);
    if (status != USP_OK && !rank->error.text[0]) usp_tool_fail(&rank->error, status, "%s", usp_last_error());
    bench->wrong = usp_report_wrong(&report);
    if (!usp_report_rows(&report)) usp_report_reasons(&report, bench->idle, sizeof bench->idle);
    usp_status closed = save_report(bench, status == USP_OK ? NULL : rank->error.text, &closing);
    usp_report_close(&report);
    if (status != USP_OK || closed == USP_OK) return status;
    rank->error = closing;
    return closed;
}

static usp_status run_rank(usp_rank *rank, void *user) {
    usp_bench *bench = user;
    const usp_options *options = bench->options;
    usp_sweep sweep = {.cases = usp_sweep_cases(options, rank->size, rank->device, &sweep.count, &rank->error)};
    if (!sweep.cases) return USP_INVALID;
    size_t rows = sweep.count * (size_t)(options->passes[0] + options->passes[1]);
    sweep.state.progress = usp_progress_open(rows, options->quiet || rank->rank);
    usp_status status = rank->rank ? run_sweep(rank, bench, &sweep) : report_sweep(rank, bench, &sweep);
    free(sweep.cases);
    return status;
}

/* Keeps the rows that are done. A file that nobody takes may hold the mutex, but not the process. */
static void save_rows(int signal, void *user) {
    usp_bench *bench = user;
    usp_tool_error error;
    struct timespec limit;
    clock_gettime(CLOCK_REALTIME, &limit);
    limit.tv_sec += SAVE_SECONDS;
    if (pthread_mutex_timedlock(&bench->mutex, &limit)) return;
    if (!bench->report) return;
    usp_progress_erase(bench->progress);
    usp_report_save(bench->report,
                    signal == SIGINT    ? "ended by SIGINT"
                    : signal == SIGTERM ? "ended by SIGTERM"
                                        : "ended by SIGHUP",
                    &error);
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
    else if (bench->idle[0])
        fprintf(stderr, "usp_bench: every row was skipped: %s\n", bench->idle);
    if (status != USP_OK || bench->idle[0]) return 2;
    return bench->wrong > 0 ? 1 : 0;
}

static int print_info(void) {
    usp_machine machine;
    usp_machine_describe(&machine);
    usp_report_info(&machine);
    return 0;
}

int main(int argc, char **argv) {
    usp_options options;
    usp_interrupt interrupt;
    usp_tool_error error = {""};
    usp_tool_guard_output(2);
    usp_options_parse(&options, argc, argv);
    if (options.info) return print_info();
    char *command = join_arguments(argc, argv);
    options.command = command ? command : "usp_bench";
    usp_bench bench = {.options = &options, .mutex = PTHREAD_MUTEX_INITIALIZER};
    usp_interrupt_open(&interrupt, save_rows, &bench);
    usp_status status = usp_ranks_run(&options.ranks, run_rank, &bench, &error);
    usp_interrupt_close(&interrupt);
    free(command);
    return verdict(&bench, status, &error);
}
