/* report.c - prints and writes rows.
 * Lines that are not rows begin with '#', as those who read such tables by programs expect. */
#include "report.h"
#include "json.h"
#include "model.h"
#include <fields.h>
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>

enum { MOST_REASONS = 3 };

/* ---- columns --------------------------------------------------------------------------------------------------- */

static double tflops(const usp_result *r) {
    return r->time.median > 0 ? r->flops / r->time.median * 1e-12 : 0;
}

static double memory(const usp_result *r) {
    return r->workspace + r->saved;
}

static double speedup(const usp_result *r) {
    return r->time.median > 0 ? r->baseline / r->time.median : 0;
}

static const char *pass_name(usp_pass pass) {
    return pass == USP_PASS_FORWARD ? "fwd" : "bwd";
}

enum { MASK_BYTES = 160 };

/* "causal window_left 4096 documents 256:16384" */
static const char *mask_text(const usp_options *o, const usp_case *c, char text[MASK_BYTES]) {
    const size_t room = MASK_BYTES;
    size_t at = (size_t)snprintf(text, room, "%s", usp_name_of(usp_names_mask(), (int)c->mask));
    for (const usp_layer_field *f = usp_layer_fields; f->name && c->kind == USP_SOFTMAX; f++) {
        char value[USP_FIELD_TEXT];
        double number = usp_layer_field_value(f, &o->layer);
        if (f->form == USP_FIELD_INT64 && number != 0 && (!f->mask || f->mask == c->mask) && at < room)
            at += (size_t)snprintf(text + at, room - at, " %s %s", f->name, usp_layer_field_text(f, number, value));
    }
    if (o->packed && at < room) snprintf(text + at, room - at, " documents %s", o->packed);
    for (char *comma; (comma = strchr(text, ','));) *comma = '+'; /* it is one column */
    return text;
}

static void print_heading(const usp_report *report) {
    int baseline = report->options->baseline;
    printf("#\n# %9s %5s %5s %4s %7s %5s %8s %11s %4s %4s %4s | %11s %11s %8s %14s %12s %9s %8s %6s%s\n", "seq",
           "batch", "heads", "kv", "dim", "type", "kind", "layout", "ulys", "ring", "pass", "time", "p99", "TFLOP/s",
           "bytes(ulysses)", "bytes(ring)", "mem", "maxerr", "#wrong", baseline ? "  speedup" : "");
    printf("# %9s %5s %5s %4s %7s %5s %8s %11s %4s %4s %4s | %11s %11s %8s %14s %12s %9s %8s %6s%s\n", "(tokens)", "",
           "", "", "", "", "", "", "", "", "", "(us)", "(us)", "(/rank)", "(B)", "(B)", "(MiB)", "", "",
           baseline ? "     (x)" : "");
}

static void print_case(const usp_result *r) {
    const usp_case *c = &r->config;
    char dim[24];
    snprintf(dim, sizeof dim, c->value_dim == c->dim ? "%d" : "%d/%d", c->dim, c->value_dim);
    printf("%9lld %5d %5d %4d %7s %5s %8s %11s %4d %4d %4s |", (long long)c->seq, c->batch, c->heads, c->kv_heads, dim,
           usp_name_of(usp_names_dtype(), (int)c->dtype), usp_name_of(usp_names_attention(), (int)c->kind),
           usp_name_of(usp_names_layout(), (int)c->layout), c->ulysses, c->ring, pass_name(r->pass));
}

static void print_row(const usp_report *report, const usp_result *r) {
    fputs(r->refused[0] ? "# " : "  ", stdout);
    print_case(r);
    if (r->refused[0]) {
        printf(" skipped: %s\n", r->refused);
        return;
    }
    printf(" %11.2f %11.2f %8.*f %14.0f %12.0f %9.2f", r->time.median * 1e6, r->time.p99 * 1e6, tflops(r) < 10 ? 4 : 2,
           tflops(r), r->ulysses_bytes, r->ring_bytes, memory(r) / 0x1p20);
    if (r->checked)
        printf(" %8.1e %6.0f", r->max_error, r->wrong);
    else
        printf(" %8s %6s", "N/A", "N/A");
    if (report->options->baseline) printf(r->baseline > 0 ? " %8.2f" : "      N/A", speedup(r));
    putchar('\n');
}

/* "#   plan: here 743.3 us, 0.98 of the time; 2 ranks 2x1 743.3 1x2 531.0; ..." */
static void print_plan(const usp_result *r) {
    const usp_case *c = &r->config;
    double here = usp_model_pass(c, r->pass, c->ulysses, c->ring, r->baseline);
    if (r->baseline <= 0 || here <= 0) return;
    printf("#   plan: here %.1f us, %.2f of the time", here * 1e6, here / r->time.median);
    for (int ranks = 2; ranks <= 8; ranks *= 2) {
        printf("; %d ranks", ranks);
        for (int ring = 1; ring <= ranks; ring *= 2) {
            double time = usp_model_pass(c, r->pass, ranks / ring, ring, r->baseline);
            if (time > 0) printf(" %dx%d %.1f", ranks / ring, ring, time * 1e6);
        }
    }
    putchar('\n');
}

static void print_details(const usp_report *report, const usp_result *r) {
    struct rusage usage = {0};
    const usp_timing *t = &r->time;
    if (report->options->statistics)
        printf("#   %d iterations of %d: min %.2f mean %.2f median %.2f p95 %.2f p99 %.2f max %.2f us, cv %.1f %%, a "
               "call %.2f us of the host\n",
               t->iterations, t->aggregate, t->min * 1e6, t->mean * 1e6, t->median * 1e6, t->p95 * 1e6, t->p99 * 1e6,
               t->max * 1e6, 100 * t->deviation / t->mean, t->call * 1e6);
    if (report->options->plan) print_plan(r);
    if (!report->options->memory) return;
    getrusage(RUSAGE_SELF, &usage);
    printf("#   workspace %.2f saved %.2f tensors %.2f MiB a rank, process peak %.2f MiB\n", r->workspace / 0x1p20,
           r->saved / 0x1p20, r->tensors / 0x1p20, (double)usage.ru_maxrss / 1024);
}

/* ---- CSV ------------------------------------------------------------------------------------------------------- */

static void write_csv_heading(FILE *csv) {
    fputs(
        "seq,batch,heads,kv,dim,value_dim,type,kind,layout,mask,ranks,ulysses,ring,pass,time_us,p99_us,tflops_per_rank,"
        "imbalance,bytes_ulysses,bytes_ring,mem_mib,maxerr,wrong,speedup\n",
        csv);
}

/* What is not known stays empty. */
static void write_csv_row(FILE *csv, const usp_options *o, const usp_result *r) {
    const usp_case *c = &r->config;
    char mask[MASK_BYTES];
    fprintf(csv, "%lld,%d,%d,%d,%d,%d,%s,%s,%s,%s,%d,%d,%d,%s,", (long long)c->seq, c->batch, c->heads, c->kv_heads,
            c->dim, c->value_dim, usp_name_of(usp_names_dtype(), (int)c->dtype),
            usp_name_of(usp_names_attention(), (int)c->kind), usp_name_of(usp_names_layout(), (int)c->layout),
            mask_text(o, c, mask), c->ulysses * c->ring, c->ulysses, c->ring, pass_name(r->pass));
    fprintf(csv, "%.3f,%.3f,%.6g,%.4f,%.0f,%.0f,%.4f,", r->time.median * 1e6, r->time.p99 * 1e6, tflops(r),
            r->flops > 0 ? r->flops_max / r->flops : 1, r->ulysses_bytes, r->ring_bytes, memory(r) / 0x1p20);
    if (r->checked && isfinite(r->max_error)) fprintf(csv, "%.4e", r->max_error);
    if (r->checked)
        fprintf(csv, ",%.0f,", r->wrong);
    else
        fputs(",,", csv);
    if (r->baseline > 0) fprintf(csv, "%.4f", speedup(r));
    fputc('\n', csv);
    fflush(csv);
}

/* ---- JSON ------------------------------------------------------------------------------------------------------ */

static void write_machine(usp_json *json, const usp_report *report) {
    const usp_machine *m = &report->machine;
    usp_json_open(json, "machine", '{');
    usp_json_text(json, "host", m->host);
    usp_json_text(json, "processor", m->processor);
    usp_json_integer(json, "cores", m->cores);
    usp_json_integer(json, "gpus", m->gpus);
    usp_json_text(json, "gpu", m->gpu[0] ? m->gpu : NULL);
    usp_json_text(json, "driver", m->driver[0] ? m->driver : NULL);
    usp_json_text(json, "compiler", m->compiler);
    usp_json_integer(json, "cuda_runtime", m->cuda);
    usp_json_integer(json, "nccl", m->nccl);
    usp_json_close(json, '}');
}

static void write_config(usp_json *json, const usp_case *c) {
    usp_json_integer(json, "seq", c->seq);
    usp_json_integer(json, "batch", c->batch);
    usp_json_integer(json, "heads", c->heads);
    usp_json_integer(json, "kv_heads", c->kv_heads);
    usp_json_integer(json, "head_dim", c->dim);
    usp_json_integer(json, "value_dim", c->value_dim);
    usp_json_text(json, "type", usp_name_of(usp_names_dtype(), (int)c->dtype));
    usp_json_text(json, "kind", usp_name_of(usp_names_attention(), (int)c->kind));
    usp_json_text(json, "layout", usp_name_of(usp_names_layout(), (int)c->layout));
    usp_json_text(json, "mask", usp_name_of(usp_names_mask(), (int)c->mask));
    usp_json_integer(json, "ulysses", c->ulysses);
    usp_json_integer(json, "ring", c->ring);
}

/* What of a layer is an option, default or not. */
static void write_options(usp_json *json, const usp_options *o) {
    for (const usp_layer_field *field = usp_layer_fields; field->name; field++) {
        char text[USP_FIELD_TEXT];
        double value = usp_layer_field_value(field, &o->layer);
        if (!field->help) continue;
        if (field->form == USP_FIELD_FLAG)
            usp_json_bool(json, field->name, value != 0);
        else if (field->values)
            usp_json_text(json, field->name, usp_layer_field_text(field, value, text));
        else
            usp_json_real(json, field->name, value);
    }
    usp_json_bool(json, "sinks", o->layer.sinks);
    usp_json_text(json, "slopes", o->slopes ? "alibi" : "none");
    usp_json_text(json, "documents", o->packed);
    usp_json_integer(json, "max_documents", o->max_documents);
}

static void write_time(usp_json *json, const usp_timing *t) {
    usp_json_open(json, "time_us", '{');
    usp_json_real(json, "median", t->median * 1e6);
    usp_json_real(json, "p95", t->p95 * 1e6);
    usp_json_real(json, "p99", t->p99 * 1e6);
    usp_json_real(json, "min", t->min * 1e6);
    usp_json_real(json, "max", t->max * 1e6);
    usp_json_real(json, "mean", t->mean * 1e6);
    usp_json_real(json, "deviation", t->deviation * 1e6);
    usp_json_real(json, "call", t->call * 1e6);
    usp_json_close(json, '}');
    usp_json_integer(json, "iterations", t->iterations);
    usp_json_integer(json, "passes_per_iteration", t->aggregate);
}

static void write_measured(usp_json *json, const usp_result *r) {
    write_time(json, &r->time);
    usp_json_real(json, "tflops_per_rank", tflops(r));
    usp_json_real(json, "flops_per_rank", r->flops);
    usp_json_real(json, "imbalance", r->flops > 0 ? r->flops_max / r->flops : 1);
    usp_json_real(json, "bytes_ulysses", r->ulysses_bytes);
    usp_json_real(json, "bytes_ring", r->ring_bytes);
    usp_json_real(json, "workspace_bytes", r->workspace);
    usp_json_real(json, "saved_bytes", r->saved);
    usp_json_real(json, "tensor_bytes", r->tensors);
    if (r->checked) {
        usp_json_real(json, "max_error", r->max_error);
        usp_json_real(json, "samples", r->samples);
        usp_json_real(json, "wrong", r->wrong);
    }
    if (r->baseline <= 0) return;
    usp_json_real(json, "baseline_us", r->baseline * 1e6);
    usp_json_real(json, "speedup", speedup(r));
    usp_json_real(json, "plan_us",
                  1e6 * usp_model_pass(&r->config, r->pass, r->config.ulysses, r->config.ring, r->baseline));
}

static void write_result(usp_json *json, const usp_result *r) {
    usp_json_open(json, NULL, '{');
    write_config(json, &r->config);
    usp_json_text(json, "pass", pass_name(r->pass));
    usp_json_text(json, "status", r->refused[0] ? "skipped" : r->wrong > 0 ? "wrong" : "ok");
    if (r->refused[0])
        usp_json_text(json, "reason", r->refused);
    else
        write_measured(json, r);
    usp_json_close(json, '}');
}

static size_t checked_rows(const usp_report *report) {
    size_t rows = 0;
    for (size_t i = 0; i < report->count; i++) rows += (size_t)report->results[i].checked;
    return rows;
}

static void write_document(FILE *stream, const usp_report *report, const char *failure) {
    usp_json json = {.stream = stream};
    usp_json_open(&json, NULL, '{');
    usp_json_integer(&json, "schema", USP_JSON_SCHEMA);
    usp_json_text(&json, "program", "usp_bench");
    usp_json_text(&json, "library", report->machine.library);
    usp_json_text(&json, "commit", report->options->commit);
    usp_json_text(&json, "command", report->options->command);
    usp_json_text(&json, "date", report->machine.date);
    write_machine(&json, report);
    usp_json_text(&json, "device", usp_name_of(usp_names_device(), (int)report->rank->device));
    usp_json_text(&json, "transport", report->rank->transport);
    usp_json_integer(&json, "ranks", report->rank->size);
    usp_json_integer(&json, "graph_launches", report->options->graphs);
    usp_json_bool(&json, "shared_memory", report->options->shared_memory);
    write_options(&json, report->options);
    usp_json_text(&json, "error", failure);
    usp_json_integer(&json, "timed", (int64_t)usp_report_rows(report));
    usp_json_integer(&json, "checked", (int64_t)checked_rows(report));
    usp_json_real(&json, "wrong", usp_report_wrong(report));
    usp_json_open(&json, "results", '[');
    for (size_t i = 0; i < report->count; i++) write_result(&json, &report->results[i]);
    usp_json_close(&json, ']');
    usp_json_close(&json, '}');
}

/* ---- report ---------------------------------------------------------------------------------------------------- */

void usp_report_info(const usp_machine *m) {
    printf("# usp_bench, libusp %s (%s)\n", m->library, m->compiler);
    printf("# host %s, %s, %d cores\n", m->host[0] ? m->host : "?", m->processor[0] ? m->processor : "?", m->cores);
    printf("# GPUs usable: %d%s%s\n", m->gpus, m->gpu[0] ? ", " : "", m->gpu);
    if (m->driver[0]) printf("# driver %s\n", m->driver);
    if (m->cuda) printf("# CUDA runtime %d.%d\n", m->cuda / 1000, m->cuda % 1000 / 10);
    if (m->nccl) printf("# NCCL %d.%d.%d\n", m->nccl / 10000, m->nccl / 100 % 100, m->nccl % 100);
}

/* Nobody is there to read the rest of a table that cannot be written. */
static usp_status flush_table(usp_tool_error *error) {
    if (fflush(stdout) == 0) return USP_OK;
    return usp_tool_fail(error, USP_INVALID, "cannot write to standard output: %s", strerror(errno));
}

usp_status usp_report_open(usp_report *report, const usp_options *options, usp_rank *rank) {
    const usp_case whole = {.kind = USP_SOFTMAX, .mask = options->mask};
    char mask[MASK_BYTES];
    *report = (usp_report){.options = options, .rank = rank};
    usp_machine_describe(&report->machine);
    if (options->csv) USP_TRY(usp_output_open(&report->csv, options->csv, &rank->error));
    if (options->json) USP_TRY(usp_output_open(&report->json, options->json, &rank->error));
    if (options->csv) write_csv_heading(report->csv.stream);
    usp_report_info(&report->machine);
    printf("# %s\n# %s: %s, %d rank%s over %s, mask %s, check %s\n", report->machine.date, options->command,
           usp_name_of(usp_names_device(), (int)rank->device), rank->size, rank->size > 1 ? "s" : "", rank->transport,
           mask_text(options, &whole, mask), options->check ? "on" : "off");
    print_heading(report);
    return flush_table(&rank->error);
}

static usp_status keep(usp_report *report, const usp_result *result, usp_tool_error *error) {
    if (report->count == report->capacity) {
        size_t capacity = report->capacity ? 2 * report->capacity : 64;
        usp_result *grown = realloc(report->results, capacity * sizeof *grown);
        if (!grown) return usp_tool_fail(error, USP_NO_MEMORY, "no memory for the results");
        report->results = grown;
        report->capacity = capacity;
    }
    report->results[report->count++] = *result;
    return USP_OK;
}

usp_status usp_report_add(usp_report *report, const usp_result *result, usp_tool_error *error) {
    USP_TRY(keep(report, result, error));
    if (report->csv.stream && !result->refused[0]) write_csv_row(report->csv.stream, report->options, result);
    return USP_OK;
}

usp_status usp_report_print(const usp_report *report, const usp_result *result, usp_tool_error *error) {
    print_row(report, result);
    if (!result->refused[0]) print_details(report, result);
    return flush_table(error);
}

double usp_report_wrong(const usp_report *report) {
    double wrong = 0;
    for (size_t i = 0; i < report->count; i++) wrong += report->results[i].wrong;
    return wrong;
}

size_t usp_report_rows(const usp_report *report) {
    size_t rows = 0;
    for (size_t i = 0; i < report->count; i++) rows += !report->results[i].refused[0];
    return rows;
}

/* Rows from `first` on that were skipped for the same reason as that one; 0 if one before it was too. */
static size_t count_alike(const usp_report *report, size_t first) {
    const char *reason = report->results[first].refused;
    size_t alike = 0;
    for (size_t i = 0; i < report->count; i++) {
        if (strcmp(report->results[i].refused, reason)) continue;
        if (i < first) return 0;
        alike++;
    }
    return alike;
}

void usp_report_reasons(const usp_report *report, char *text, size_t capacity) {
    size_t at = 0, left = report->count - usp_report_rows(report);
    int reasons = 0;
    for (size_t i = 0; i < report->count && reasons < MOST_REASONS && at < capacity; i++) {
        const char *reason = report->results[i].refused;
        size_t rows = reason[0] ? count_alike(report, i) : 0;
        if (!rows) continue;
        at += (size_t)snprintf(text + at, capacity - at, "%s%zu row%s: %.250s", reasons++ ? "; " : "", rows,
                               rows > 1 ? "s" : "", reason);
        left -= rows;
    }
    if (left && at < capacity) snprintf(text + at, capacity - at, "; %zu more", left);
}

static void print_footer(const usp_report *report) {
    double sum = 0;
    size_t rows = usp_report_rows(report), checked = checked_rows(report);
    for (size_t i = 0; i < report->count; i++) sum += tflops(&report->results[i]);
    double wrong = usp_report_wrong(report);
    if (checked) printf("# Out of bounds values : %.0f %s\n", wrong, wrong > 0 ? "FAILED" : "OK");
    printf("# Rows                 : %zu timed, %zu checked, %zu skipped\n", rows, checked, report->count - rows);
    printf("# Avg TFLOP/s per rank : %.4g\n#\n", rows ? sum / (double)rows : 0);
    fflush(stdout);
}

usp_status usp_report_save(usp_report *report, const char *failure, usp_tool_error *error) {
    usp_status worth = failure && !report->count ? USP_INVALID : USP_OK;
    if (report->json.stream) write_document(report->json.stream, report, failure);
    usp_status csv = usp_output_close(&report->csv, worth, error);
    usp_status json = usp_output_close(&report->json, worth, error);
    return csv != USP_OK ? csv : json;
}

void usp_report_close(usp_report *report) {
    print_footer(report);
    free(report->results);
    report->results = NULL;
}
