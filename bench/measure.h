/* measure.h - runs one case on the ranks: layer, tensors, timed passes, check.
 * It prints nothing; all ranks come to the same results. */
#ifndef USP_MEASURE_H
#define USP_MEASURE_H
#include "options.h"
#include "progress.h"

/* Seconds per pass, over iterations; each is that of the slowest rank. */
typedef struct usp_timing {
    double min, mean, median, p95, p99, max, deviation;
    double call; /* a pass's part of the host's time until all of an iteration are enqueued, by calls or as graphs: the
                    slowest rank's median */
    int iterations, aggregate;
} usp_timing;

/* One row: a case and a pass. Sizes and bytes are those of the rank that has most. */
typedef struct usp_result {
    usp_case config;
    usp_pass pass;
    char refused[512]; /* why the library cannot do it; "": it ran */
    usp_timing time;
    double baseline;         /* seconds of one rank alone; 0: not measured */
    double flops, flops_max; /* of a pass: mean and largest over ranks */
    double ulysses_bytes, ring_bytes;
    double workspace, saved, tensors; /* bytes */
    int checked;
    double max_error, samples, wrong;
} usp_result;

/* Where the sweep stands, for the progress bar, and the last case timed on one rank alone. */
typedef struct usp_sweep_state {
    usp_progress progress;
    double rows_done;
    usp_case baseline_case;
    double baseline[2]; /* seconds, by usp_pass */
} usp_sweep_state;

/* Collective; every rank has its own state. Fills `results` with one row per wanted pass and sets *count. Only failures
 * that end the run are returned. */
usp_status usp_measure(usp_rank *rank, const usp_options *options, const usp_case *config, usp_sweep_state *state,
                       usp_result results[2], int *count);
/* "seq 4096 softmax zigzag 2x2 fwd" */
void usp_measure_label(const usp_case *config, usp_pass pass, char *text, size_t capacity);

#endif
