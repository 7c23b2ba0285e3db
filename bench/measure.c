/* measure.c - set up, warm up, time, check, tear down.
 * Clocks are the host's, around work that has been waited for. */
#include "measure.h"
#include "reference.h"
#include "setup.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

void usp_measure_label(const usp_case *c, usp_pass pass, char *text, size_t capacity) {
    snprintf(text, capacity, "seq %lld %s %s %s %dx%d %s", (long long)c->seq,
             usp_name_of(usp_names_attention(), (int)c->kind), usp_name_of(usp_names_dtype(), (int)c->dtype),
             usp_name_of(usp_names_layout(), (int)c->layout), c->ulysses, c->ring, pass ? "bwd" : "fwd");
}

/* ---- passes ---------------------------------------------------------------------------------------------------- */

/* By calls, or by launches of their graph. */
static usp_status enqueue(usp_setup *s, usp_pass pass, int times) {
    if (s->graph) {
        for (int i = 0; i < times; i += s->recorded)
            USP_TRY(usp_graph_launch(s->graph, s->rank->stream, &s->rank->error));
        return USP_OK;
    }
    for (int i = 0; i < times; i++) USP_TRY(usp_setup_pass(s, pass));
    return USP_OK;
}

/* Enqueues `times` passes and waits for them. *called: a pass's part of the time until all are enqueued. */
static usp_status run_passes(usp_setup *s, usp_pass pass, int times, double *seconds, double *called) {
    double begin = now();
    USP_TRY(enqueue(s, pass, times));
    *called = (now() - begin) / times;
    USP_TRY(usp_world_synchronize(s->rank->world, s->rank->stream));
    *seconds = now() - begin;
    return USP_OK;
}

/* ---- timing ---------------------------------------------------------------------------------------------------- */

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* The smallest time that `part` of the iterations do not exceed. */
static double quantile(const double *sorted, int count, double part) {
    int index = (int)ceil(part * count) - 1;
    return sorted[index < 0 ? 0 : index];
}

static double median_of(double *sorted, int count) {
    qsort(sorted, (size_t)count, sizeof *sorted, ascending);
    return 0.5 * (sorted[(count - 1) / 2] + sorted[count / 2]);
}

static void summarise(double *seconds, int count, usp_timing *time) {
    double sum = 0, squares = 0;
    time->median = median_of(seconds, count);
    for (int i = 0; i < count; i++) sum += seconds[i];
    time->mean = sum / count;
    for (int i = 0; i < count; i++) squares += (seconds[i] - time->mean) * (seconds[i] - time->mean);
    time->deviation = sqrt(squares / count);
    time->min = seconds[0];
    time->max = seconds[count - 1];
    time->p95 = quantile(seconds, count, 0.95);
    time->p99 = quantile(seconds, count, 0.99);
    time->iterations = count;
}

/* Passes per iteration: as asked, else so many that an iteration takes 2 ms. Agreed, since `pass_time` is. */
static int aggregate_of(const usp_options *o, double pass_time) {
    double wanted = ceil(2e-3 / (pass_time > 1e-9 ? pass_time : 1e-9));
    return o->aggregate ? o->aggregate : wanted > 20 ? 20 : wanted < 1 ? 1 : (int)wanted;
}

static usp_status warm_up(usp_setup *s, usp_pass pass, double *pass_time) {
    double mine = 0, called;
    *pass_time = 0;
    for (int i = 0; i < s->options->warmup; i++) {
        USP_TRY(run_passes(s, pass, 1, &mine, &called));
        USP_TRY(usp_rank_max(s->rank, mine, pass_time));
        if (s->options->budget > 0 && *pass_time * (i + 1) > s->options->budget) break;
    }
    return USP_OK;
}

static void show(usp_setup *s, usp_sweep_state *state, usp_pass pass, double part) {
    char label[128];
    if (!state || s->rank->rank) return;
    usp_measure_label(s->config, pass, label, sizeof label);
    usp_progress_show(&state->progress, state->rows_done + part, label);
}

/* Done on all ranks before any launches: what makes a graph may wait for GPUs, and those then for other ranks. */
static usp_status record(usp_setup *s, usp_pass pass, int passes) {
    usp_stream stream = s->rank->stream;
    USP_TRY(usp_graph_begin(stream, &s->rank->error));
    usp_status status = enqueue(s, pass, passes);
    usp_status ended = usp_graph_end(stream, &s->graph, &s->rank->error);
    s->recorded = passes;
    if (status != USP_OK || ended != USP_OK) return status != USP_OK ? status : ended;
    return usp_world_synchronize(s->rank->world, stream);
}

/* The gather of an iteration's times is the next one's barrier, and lets all ranks end together. `seconds`: for all
 * iterations, and as many again. */
static usp_status time_iterations(usp_setup *s, usp_pass pass, usp_sweep_state *state, double *seconds,
                                  usp_timing *time) {
    const usp_options *o = s->options;
    double spent = 0, mine = 0, *called = seconds + o->iterations;
    int count = 0;
    for (; count < o->iterations && (count < 3 || o->budget <= 0 || spent < o->budget); count++) {
        show(s, state, pass, (double)count / o->iterations);
        USP_TRY(run_passes(s, pass, time->aggregate, &mine, &called[count]));
        USP_TRY(usp_rank_max(s->rank, mine, &mine));
        seconds[count] = mine / time->aggregate;
        spent += mine;
    }
    summarise(seconds, count, time);
    return usp_rank_max(s->rank, median_of(called, count), &time->call);
}

/* Poisons the results, and then runs `aggregate` passes an iteration, or the graph of so many some times. */
static usp_status time_prepared(usp_setup *s, usp_pass pass, int aggregate, usp_sweep_state *state, double *seconds,
                                usp_timing *time) {
    time->aggregate = aggregate;
    USP_TRY(usp_rank_agree(s->rank, usp_setup_poison(s, pass)));
    if (s->options->graphs > 0) {
        USP_TRY(usp_rank_agree(s->rank, record(s, pass, aggregate)));
        time->aggregate *= s->options->graphs;
    }
    return time_iterations(s, pass, state, seconds, time);
}

static usp_status time_pass(usp_setup *s, usp_pass pass, usp_sweep_state *state, usp_timing *time) {
    double pass_time;
    double *seconds = usp_tool_alloc(&s->rank->error, 2 * (size_t)s->options->iterations, sizeof *seconds);
    if (!seconds) return USP_NO_MEMORY;
    usp_status status = warm_up(s, pass, &pass_time);
    if (status == USP_OK) status = time_prepared(s, pass, aggregate_of(s->options, pass_time), state, seconds, time);
    usp_graph_destroy(s->graph);
    s->graph = NULL;
    free(seconds);
    return status;
}

/* ---- check ----------------------------------------------------------------------------------------------------- */

/* Host copies of what a pass gave. */
static usp_status fetch_results(usp_setup *s, usp_pass pass, usp_reference *r) {
    USP_TRY(usp_setup_fetch(s, s->lse, usp_setup_lse_bytes(s), &r->lse));
    USP_TRY(usp_setup_fetch(s, s->tensor[USP_O], s->bytes[USP_O], &r->out));
    if (pass == USP_PASS_FORWARD) return USP_OK;
    USP_TRY(usp_setup_fetch(s, s->tensor[USP_DQ], s->bytes[USP_DQ], &r->dq));
    USP_TRY(usp_setup_fetch(s, s->tensor[USP_DK], s->bytes[USP_DK], &r->dk));
    USP_TRY(usp_setup_fetch(s, s->tensor[USP_DV], s->bytes[USP_DV], &r->dv));
    return usp_setup_fetch(s, s->dsinks, sizeof(float) * (size_t)s->config->heads, &r->dsinks);
}

static usp_status check_results(usp_setup *s, usp_pass pass, const usp_reference *r, usp_verdict *verdict) {
    usp_tool_error *error = &s->rank->error;
    if (pass == USP_PASS_FORWARD) return usp_reference_check(r, USP_CHECK_OUT, error, verdict);
    USP_TRY(usp_reference_check(r, USP_CHECK_DQ, error, verdict));
    USP_TRY(usp_reference_check(r, USP_CHECK_DK, error, verdict));
    USP_TRY(usp_reference_check(r, USP_CHECK_DV, error, verdict));
    return r->dsinks ? usp_reference_check_sinks(r, error, verdict) : USP_OK;
}

static usp_status add_verdicts(usp_rank *rank, const usp_verdict *mine, usp_result *result) {
    usp_verdict *all = usp_tool_alloc(&rank->error, (size_t)rank->size, sizeof *all);
    if (!all) return USP_NO_MEMORY;
    usp_status status = usp_rank_gather(rank, mine, all, sizeof *all);
    for (int i = 0; i < rank->size && status == USP_OK; i++) {
        if (all[i].max_error > result->max_error) result->max_error = all[i].max_error;
        result->samples += (double)all[i].checked;
        result->wrong += (double)all[i].wrong;
    }
    result->checked = 1;
    free(all);
    return status;
}

static usp_status check_pass(usp_setup *s, usp_pass pass, usp_result *result) {
    usp_reference r = {.config = s->config,
                       .layer = &s->layer_config,
                       .sequence = s->sequence,
                       .rank = s->rank->rank,
                       .sinks = s->sinks,
                       .dropout_state = usp_setup_dropout_state};
    usp_verdict verdict = {0};
    usp_status status =
        usp_documents_number(s->document_end, s->documents, s->config->seq, &s->rank->error, &r.document);
    if (status == USP_OK) status = fetch_results(s, pass, &r);
    if (status == USP_OK) status = check_results(s, pass, &r, &verdict);
    void *const taken[] = {r.document, r.lse, r.out, r.dq, r.dk, r.dv, r.dsinks};
    for (size_t i = 0; i < sizeof taken / sizeof *taken; i++) free(taken[i]);
    return status == USP_OK ? add_verdicts(s->rank, &verdict, result) : status;
}

/* ---- one row --------------------------------------------------------------------------------------------------- */

static usp_status fill_cost(usp_setup *s, usp_pass pass, usp_result *result) {
    usp_cost cost = {.struct_size = sizeof cost};
    size_t workspace = usp_setup_workspace(s, pass);
    size_t tensors = 0;
    for (int i = 0; i < USP_TENSORS; i++) tensors += s->bytes[i];
    USP_TRY(usp_layer_get_cost(s->layer, pass, &cost));
    result->flops = cost.flops_mean;
    result->flops_max = cost.flops_max;
    USP_TRY(usp_rank_max(s->rank, (double)cost.ulysses_send, &result->ulysses_bytes));
    USP_TRY(usp_rank_max(s->rank, (double)cost.ring_send, &result->ring_bytes));
    USP_TRY(usp_rank_max(s->rank, (double)workspace, &result->workspace));
    USP_TRY(usp_rank_max(s->rank, (double)s->saved_bytes, &result->saved));
    return usp_rank_max(s->rank, (double)tensors, &result->tensors);
}

static usp_status measure_pass(usp_setup *s, usp_pass pass, usp_sweep_state *state, usp_result *result) {
    double ignored;
    result->config = *s->config;
    result->pass = pass;
    show(s, state, pass, 0);
    if (pass == USP_PASS_BACKWARD) USP_TRY(run_passes(s, USP_PASS_FORWARD, 1, &ignored, &ignored));
    USP_TRY(fill_cost(s, pass, result));
    USP_TRY(time_pass(s, pass, state, &result->time));
    return s->options->check ? check_pass(s, pass, result) : USP_OK;
}

static usp_status measure_passes(usp_setup *s, usp_sweep_state *state, usp_result results[2], int *count) {
    *count = 0;
    for (int pass = 0; pass < 2; pass++) {
        if (!s->options->passes[pass]) continue;
        USP_TRY(measure_pass(s, (usp_pass)pass, state, &results[*count]));
        ++*count;
        if (state) state->rows_done++;
    }
    return USP_OK;
}

/* What the library will not do, and what does not fit into memory, ends the case and not the run. */
static int is_refusal(usp_status status) {
    return status == USP_INVALID || status == USP_UNSUPPORTED || status == USP_NO_MEMORY || status == USP_PEER_FAILED;
}

static void refuse(usp_setup *s, usp_sweep_state *state, usp_result results[2], int *count) {
    const char *why = s->rank->error.text[0] ? s->rank->error.text : usp_last_error();
    *count = 0;
    for (int pass = 0; pass < 2; pass++) {
        if (!s->options->passes[pass]) continue;
        usp_result *result = &results[(*count)++];
        *result = (usp_result){.config = *s->config, .pass = (usp_pass)pass};
        snprintf(result->refused, sizeof result->refused, "%.500s", why);
        if (state) state->rows_done++;
    }
    s->rank->error.text[0] = 0;
}

static usp_status measure(usp_rank *rank, const usp_options *options, const usp_case *config, usp_sweep_state *state,
                          usp_result results[2], int *count) {
    usp_setup s = {.options = options, .config = config, .rank = rank};
    usp_status status = usp_setup_open(&s);
    if (is_refusal(status)) {
        refuse(&s, state, results, count);
        status = USP_OK;
    } else if (status == USP_OK)
        status = measure_passes(&s, state, results, count);
    usp_status closed = usp_setup_close(&s);
    return status == USP_OK ? closed : status;
}

/* ---- baseline -------------------------------------------------------------------------------------------------- */

static usp_status measure_single(usp_rank *beside, const usp_options *options, const usp_case *alone,
                                 double seconds[2]) {
    usp_options one = *options;
    usp_rank single = {.stream = NULL};
    usp_rendezvous *rendezvous = NULL;
    usp_result results[2] = {{.time = {0}}, {.time = {0}}};
    int count = 0;
    one.check = one.shared_memory = 0;
    usp_status status = usp_rank_open_single(&single, &rendezvous, beside);
    if (status == USP_OK) status = measure(&single, &one, alone, NULL, results, &count);
    for (int i = 0; i < count; i++) seconds[results[i].pass] = results[i].time.median;
    usp_rank_close_single(&single, rendezvous);
    return status;
}

/* All ranks must find the same here, so padding may not count. */
static int same_case(const usp_case *a, const usp_case *b) {
    return a->seq == b->seq && a->batch == b->batch && a->heads == b->heads && a->kv_heads == b->kv_heads &&
           a->dim == b->dim && a->value_dim == b->value_dim && a->dtype == b->dtype && a->kind == b->kind &&
           a->layout == b->layout && a->mask == b->mask && a->ulysses == b->ulysses && a->ring == b->ring;
}

/* Rank 0 works, the others wait. Cases that differ only in their mesh share a baseline. */
static usp_status refresh_baseline(usp_rank *rank, const usp_options *options, const usp_case *config,
                                   usp_sweep_state *state) {
    usp_case alone = *config;
    double mine[2] = {0};
    alone.ulysses = alone.ring = 1;
    if (same_case(&alone, &state->baseline_case)) return USP_OK;
    double *all = usp_tool_alloc(&rank->error, (size_t)rank->size, sizeof mine);
    if (!all) return USP_NO_MEMORY;
    usp_status status = rank->rank == 0 ? measure_single(rank, options, &alone, mine) : USP_OK;
    if (status == USP_OK) status = usp_rank_gather(rank, mine, all, sizeof mine);
    memcpy(state->baseline, all, sizeof mine);
    state->baseline_case = alone;
    free(all);
    return status;
}

usp_status usp_measure(usp_rank *rank, const usp_options *options, const usp_case *config, usp_sweep_state *state,
                       usp_result results[2], int *count) {
    results[0] = results[1] = (usp_result){.config = *config};
    USP_TRY(measure(rank, options, config, state, results, count));
    if (!options->baseline || rank->size == 1 || results[0].refused[0]) return USP_OK;
    USP_TRY(refresh_baseline(rank, options, config, state));
    for (int i = 0; i < *count; i++) results[i].baseline = state->baseline[results[i].pass];
    return USP_OK;
}
