/* measure.c - set up, warm up, time, check, tear down.
 * All device work goes through usp.h; clocks are the host's, around work that has been waited for. */
#include "measure.h"
#include "graph.h"
#include "reference.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { Q, K, V, OUT, DOUT, DQ, DK, DV, TENSORS };

typedef struct usp_setup {
    const usp_options *options;
    const usp_case *config;
    usp_rank *rank;
    usp_mesh *mesh;
    usp_sequence *sequence;
    usp_layer *layer;
    usp_sizes sizes;
    int64_t tokens; /* local */
    float *log_decay;
    void *tensor[TENSORS];
    size_t bytes[TENSORS];
    float *lse; /* on the device */
    void *workspace, *saved;
    size_t workspace_bytes, saved_bytes; /* as allocated */
    int shared;
    usp_graph *graph; /* of `recorded` passes, while they are timed; NULL: they are called */
    int recorded;
} usp_setup;

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

/* ---- set up ---------------------------------------------------------------------------------------------------- */

static usp_layer_config layer_config(const usp_setup *s) {
    const usp_case *c = s->config;
    int linear = c->kind == USP_LINEAR;
    return (usp_layer_config){.struct_size = sizeof(usp_layer_config),
                              .attention = c->kind,
                              .mask = c->mask,
                              .dtype = c->dtype,
                              .batch = c->batch,
                              .heads = c->heads,
                              .kv_heads = c->kv_heads,
                              .value_heads = linear ? c->kv_heads : 0,
                              .head_dim = c->dim,
                              .value_dim = c->value_dim,
                              .return_lse = !linear,
                              .deterministic = s->options->deterministic,
                              .state_exchange = linear ? s->options->state_exchange : USP_STATE_AUTO,
                              .decay = s->log_decay};
}

static usp_status make_decay(usp_setup *s) {
    const usp_case *c = s->config;
    int heads = usp_inputs_out_heads(c);
    if (c->kind != USP_LINEAR || c->mask != USP_MASK_CAUSAL || !s->options->decay) return USP_OK;
    s->log_decay = usp_tool_alloc(&s->rank->error, (size_t)heads, sizeof *s->log_decay);
    if (!s->log_decay) return USP_NO_MEMORY;
    usp_decay_slopes(heads, s->log_decay);
    return USP_OK;
}

static usp_status make_layer(usp_setup *s) {
    const usp_case *c = s->config;
    const int64_t ends[] = {c->seq / 10, 3 * c->seq / 10, 6 * c->seq / 10, c->seq};
    usp_sequence_config sequence = {.struct_size = sizeof sequence, .layout = c->layout, .tokens = c->seq};
    if (c->layout == USP_LAYOUT_ZIGZAG_PER_DOCUMENT) {
        sequence.documents = sizeof ends / sizeof *ends;
        sequence.document_ends = ends;
    }
    USP_TRY(usp_mesh_create(s->rank->world, c->ulysses, c->ring, &s->mesh));
    USP_TRY(usp_sequence_create(s->mesh, &sequence, &s->sequence));
    usp_layer_config layer = layer_config(s);
    USP_TRY(usp_layer_create(s->mesh, s->sequence, &layer, &s->layer));
    s->sizes.struct_size = sizeof s->sizes;
    s->tokens = usp_sequence_local_tokens(s->sequence, s->rank->rank);
    return usp_layer_get_sizes(s->layer, &s->sizes);
}

static usp_status allocate(usp_setup *s, size_t bytes, void **memory) {
    return usp_world_alloc(s->rank->world, bytes ? bytes : 1, memory);
}

/* Input whose shape a tensor has. */
static usp_input shape_of(int tensor) {
    static const usp_input like[TENSORS] = {USP_INPUT_Q,    USP_INPUT_K, USP_INPUT_V, USP_INPUT_DOUT,
                                            USP_INPUT_DOUT, USP_INPUT_Q, USP_INPUT_K, USP_INPUT_V};
    return like[tensor];
}

static usp_status allocate_tensors(usp_setup *s) {
    const usp_case *c = s->config;
    int last = s->options->passes[USP_PASS_BACKWARD] ? TENSORS : DOUT;
    for (int i = 0; i < last; i++) {
        size_t heads = (size_t)usp_inputs_heads(c, shape_of(i)), dim = (size_t)usp_inputs_dim(c, shape_of(i));
        s->bytes[i] = (size_t)c->batch * (size_t)s->tokens * heads * dim * usp_dtype_size(c->dtype);
        USP_TRY(allocate(s, s->bytes[i], &s->tensor[i]));
    }
    void *lse = NULL;
    if (c->kind == USP_SOFTMAX)
        USP_TRY(allocate(s, sizeof(float) * (size_t)c->batch * (size_t)c->heads * (size_t)s->tokens, &lse));
    s->lse = lse;
    return USP_OK;
}

/* Forward saves if backward is run too. */
static size_t forward_bytes(const usp_setup *s) {
    int saves = s->options->passes[USP_PASS_BACKWARD];
    return saves ? s->sizes.forward_saving_workspace : s->sizes.forward_workspace;
}

static usp_status allocate_memory(usp_setup *s) {
    int backward = s->options->passes[USP_PASS_BACKWARD];
    size_t forward = forward_bytes(s), other = backward ? s->sizes.backward_workspace : 0;
    s->workspace_bytes = forward > other ? forward : other;
    s->saved_bytes = backward ? s->sizes.saved : 0;
    USP_TRY(allocate_tensors(s));
    if (s->options->shared_memory) return USP_OK;
    USP_TRY(allocate(s, s->workspace_bytes, &s->workspace));
    return allocate(s, s->saved_bytes, &s->saved);
}

/* Collective: registered memory has the same size on all ranks. */
static usp_status allocate_shared(usp_setup *s) {
    double workspace, saved;
    if (!s->options->shared_memory) return USP_OK;
    s->shared = 1;
    USP_TRY(usp_rank_max(s->rank, (double)s->workspace_bytes, &workspace));
    USP_TRY(usp_rank_max(s->rank, (double)s->saved_bytes, &saved));
    s->workspace_bytes = (size_t)workspace;
    s->saved_bytes = (size_t)saved;
    USP_TRY(usp_world_alloc_shared(s->rank->world, s->workspace_bytes ? s->workspace_bytes : 1, &s->workspace));
    return usp_world_alloc_shared(s->rank->world, s->saved_bytes ? s->saved_bytes : 1, &s->saved);
}

static usp_status copy(usp_setup *s, void *to, const void *from, size_t bytes) {
    USP_TRY(usp_world_copy(s->rank->world, to, from, bytes, s->rank->stream));
    return usp_world_synchronize(s->rank->world, s->rank->stream);
}

static usp_status fill_input(usp_setup *s, int tensor) {
    void *host = usp_tool_alloc(&s->rank->error, s->bytes[tensor], 1);
    if (!host) return USP_NO_MEMORY;
    usp_inputs_fill(s->config, shape_of(tensor), s->sequence, s->rank->rank, host);
    usp_status status = copy(s, s->tensor[tensor], host, s->bytes[tensor]);
    free(host);
    return status;
}

static usp_status fill_inputs(usp_setup *s) {
    const int inputs[] = {Q, K, V, DOUT};
    for (size_t i = 0; i < sizeof inputs / sizeof *inputs; i++)
        if (s->tensor[inputs[i]]) USP_TRY(fill_input(s, inputs[i]));
    return USP_OK;
}

static usp_status close_shared(usp_setup *s) {
    usp_status saved = s->saved ? usp_world_free_shared(s->rank->world, s->saved) : USP_OK;
    usp_status workspace = s->workspace ? usp_world_free_shared(s->rank->world, s->workspace) : USP_OK;
    return saved != USP_OK ? saved : workspace;
}

static usp_status close_setup(usp_setup *s) {
    usp_status status = USP_OK;
    if (s->shared)
        status = close_shared(s);
    else {
        usp_world_free(s->rank->world, s->saved);
        usp_world_free(s->rank->world, s->workspace);
    }
    usp_world_free(s->rank->world, s->lse);
    for (int i = 0; i < TENSORS; i++) usp_world_free(s->rank->world, s->tensor[i]);
    usp_layer_destroy(s->layer);
    usp_sequence_destroy(s->sequence);
    usp_mesh_destroy(s->mesh);
    free(s->log_decay);
    return status;
}

/* ---- passes ---------------------------------------------------------------------------------------------------- */

/* Dense [batch, local_tokens, heads, dim]. */
static usp_tensor view(const usp_setup *s, int tensor) {
    int64_t dim = usp_inputs_dim(s->config, shape_of(tensor)),
            row = dim * usp_inputs_heads(s->config, shape_of(tensor));
    return (usp_tensor){
        .data = s->tensor[tensor], .stride_batch = row * s->tokens, .stride_token = row, .stride_head = dim};
}

static usp_status forward(usp_setup *s) {
    usp_forward args = {.struct_size = sizeof args,
                        .q = view(s, Q),
                        .k = view(s, K),
                        .v = view(s, V),
                        .out = view(s, OUT),
                        .lse = s->lse,
                        .saved = s->options->passes[USP_PASS_BACKWARD] ? s->saved : NULL};
    return usp_layer_forward(s->layer, &args, s->workspace, s->workspace_bytes, s->rank->stream);
}

static usp_status backward(usp_setup *s) {
    usp_backward args = {.struct_size = sizeof args,
                         .q = view(s, Q),
                         .k = view(s, K),
                         .v = view(s, V),
                         .out = view(s, OUT),
                         .dout = view(s, DOUT),
                         .dq = view(s, DQ),
                         .dk = view(s, DK),
                         .dv = view(s, DV),
                         .saved = s->saved};
    return usp_layer_backward(s->layer, &args, s->workspace, s->workspace_bytes, s->rank->stream);
}

/* By calls, or by launches of their graph. */
static usp_status enqueue(usp_setup *s, usp_pass pass, int times) {
    if (s->graph) {
        for (int i = 0; i < times; i += s->recorded)
            USP_TRY(usp_graph_launch(s->graph, s->rank->stream, &s->rank->error));
        return USP_OK;
    }
    for (int i = 0; i < times; i++) USP_TRY(pass == USP_PASS_FORWARD ? forward(s) : backward(s));
    return USP_OK;
}

/* Enqueues `times` passes and waits for them. */
static usp_status run_passes(usp_setup *s, usp_pass pass, int times, double *seconds) {
    double begin = now();
    USP_TRY(enqueue(s, pass, times));
    USP_TRY(usp_world_synchronize(s->rank->world, s->rank->stream));
    *seconds = now() - begin;
    return USP_OK;
}

/* Bytes of all ones are not a number in every dtype: what a pass does not write cannot look right. */
static usp_status poison_bytes(usp_setup *s, void *memory, size_t bytes) {
    void *host = usp_tool_alloc(&s->rank->error, bytes, 1);
    if (!host) return USP_NO_MEMORY;
    memset(host, 0xff, bytes);
    usp_status status = copy(s, memory, host, bytes);
    free(host);
    return status;
}

static usp_status poison(usp_setup *s, usp_pass pass) {
    if (pass == USP_PASS_FORWARD && s->lse)
        USP_TRY(poison_bytes(s, s->lse,
                             sizeof(float) * (size_t)s->config->batch * (size_t)s->config->heads * (size_t)s->tokens));
    if (pass == USP_PASS_FORWARD) return poison_bytes(s, s->tensor[OUT], s->bytes[OUT]);
    for (int i = DQ; i <= DV; i++) USP_TRY(poison_bytes(s, s->tensor[i], s->bytes[i]));
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

static void summarise(double *seconds, int count, usp_timing *time) {
    double sum = 0, squares = 0;
    qsort(seconds, (size_t)count, sizeof *seconds, ascending);
    for (int i = 0; i < count; i++) sum += seconds[i];
    time->mean = sum / count;
    for (int i = 0; i < count; i++) squares += (seconds[i] - time->mean) * (seconds[i] - time->mean);
    time->deviation = sqrt(squares / count);
    time->min = seconds[0];
    time->max = seconds[count - 1];
    time->median = 0.5 * (seconds[(count - 1) / 2] + seconds[count / 2]);
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
    double mine = 0;
    *pass_time = 0;
    for (int i = 0; i < s->options->warmup; i++) {
        USP_TRY(run_passes(s, pass, 1, &mine));
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

/* The gather of an iteration's times is the next one's barrier, and lets all ranks end together. */
static usp_status time_iterations(usp_setup *s, usp_pass pass, usp_sweep_state *state, double *seconds,
                                  usp_timing *time) {
    const usp_options *o = s->options;
    double spent = 0, mine = 0;
    int count = 0;
    for (; count < o->iterations && (count < 3 || o->budget <= 0 || spent < o->budget); count++) {
        show(s, state, pass, (double)count / o->iterations);
        USP_TRY(run_passes(s, pass, time->aggregate, &mine));
        USP_TRY(usp_rank_max(s->rank, mine, &mine));
        seconds[count] = mine / time->aggregate;
        spent += mine;
    }
    summarise(seconds, count, time);
    return USP_OK;
}

/* Poisons the results, and then runs `aggregate` passes an iteration, or the graph of so many some times. */
static usp_status time_prepared(usp_setup *s, usp_pass pass, int aggregate, usp_sweep_state *state, double *seconds,
                                usp_timing *time) {
    time->aggregate = aggregate;
    USP_TRY(usp_rank_agree(s->rank, poison(s, pass)));
    if (s->options->graphs > 0) {
        USP_TRY(usp_rank_agree(s->rank, record(s, pass, aggregate)));
        time->aggregate *= s->options->graphs;
    }
    return time_iterations(s, pass, state, seconds, time);
}

static usp_status time_pass(usp_setup *s, usp_pass pass, usp_sweep_state *state, usp_timing *time) {
    double pass_time;
    double *seconds = usp_tool_alloc(&s->rank->error, (size_t)s->options->iterations, sizeof *seconds);
    if (!seconds) return USP_NO_MEMORY;
    usp_status status = warm_up(s, pass, &pass_time);
    if (status == USP_OK) status = time_prepared(s, pass, aggregate_of(s->options, pass_time), state, seconds, time);
    usp_graph_destroy(s->graph);
    s->graph = NULL;
    free(seconds);
    return status;
}

/* ---- check ----------------------------------------------------------------------------------------------------- */

static usp_status fetch(usp_setup *s, const void *memory, size_t bytes, void **host) {
    *host = usp_tool_alloc(&s->rank->error, bytes, 1);
    return *host ? copy(s, *host, memory, bytes) : USP_NO_MEMORY;
}

static usp_status fetch_results(usp_setup *s, usp_pass pass, void *host[TENSORS], void **lse) {
    size_t lse_bytes = sizeof(float) * (size_t)s->config->batch * (size_t)s->config->heads * (size_t)s->tokens;
    if (s->lse) USP_TRY(fetch(s, s->lse, lse_bytes, lse));
    USP_TRY(fetch(s, s->tensor[OUT], s->bytes[OUT], &host[OUT]));
    for (int i = DQ; i <= DV && pass == USP_PASS_BACKWARD; i++) USP_TRY(fetch(s, s->tensor[i], s->bytes[i], &host[i]));
    return USP_OK;
}

static usp_status check_tensors(usp_setup *s, usp_pass pass, void *host[TENSORS], const float *lse,
                                usp_verdict *verdict) {
    usp_reference reference = {.config = s->config,
                               .sequence = s->sequence,
                               .rank = s->rank->rank,
                               .log_decay = s->log_decay,
                               .out = host[OUT],
                               .lse = lse,
                               .dq = host[DQ],
                               .dk = host[DK],
                               .dv = host[DV]};
    usp_tool_error *error = &s->rank->error;
    if (pass == USP_PASS_FORWARD) return usp_reference_check(&reference, USP_CHECK_OUT, error, verdict);
    USP_TRY(usp_reference_check(&reference, USP_CHECK_DQ, error, verdict));
    USP_TRY(usp_reference_check(&reference, USP_CHECK_DK, error, verdict));
    return usp_reference_check(&reference, USP_CHECK_DV, error, verdict);
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
    void *host[TENSORS] = {NULL}, *lse = NULL;
    usp_verdict verdict = {0};
    usp_status status = fetch_results(s, pass, host, &lse);
    if (status == USP_OK) status = check_tensors(s, pass, host, lse, &verdict);
    for (int i = 0; i < TENSORS; i++) free(host[i]);
    free(lse);
    return status == USP_OK ? add_verdicts(s->rank, &verdict, result) : status;
}

/* ---- one row --------------------------------------------------------------------------------------------------- */

static usp_status fill_cost(usp_setup *s, usp_pass pass, usp_result *result) {
    usp_cost cost = {.struct_size = sizeof cost};
    size_t workspace = pass == USP_PASS_FORWARD ? forward_bytes(s) : s->sizes.backward_workspace;
    size_t tensors = 0;
    for (int i = 0; i < TENSORS; i++) tensors += s->bytes[i];
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
    if (pass == USP_PASS_BACKWARD) USP_TRY(run_passes(s, USP_PASS_FORWARD, 1, &ignored));
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

/* The same on all ranks. */
static usp_status check_graphs(const usp_setup *s) {
    int alone = s->rank->device == USP_DEVICE_CUDA && (s->rank->size == 1 || !strcmp(s->rank->transport, "nccl"));
    if (s->options->graphs == 0 || alone) return USP_OK;
    return usp_tool_fail(&s->rank->error, USP_UNSUPPORTED, "a graph needs a GPU for every rank");
}

/* All ranks leave with the same verdict: create is collective, and own memory is agreed on. */
static usp_status open_setup(usp_setup *s) {
    USP_TRY(check_graphs(s));
    USP_TRY(usp_rank_agree(s->rank, make_decay(s)));
    USP_TRY(make_layer(s));
    USP_TRY(usp_rank_agree(s->rank, allocate_memory(s)));
    USP_TRY(allocate_shared(s));
    return usp_rank_agree(s->rank, fill_inputs(s));
}

static usp_status measure(usp_rank *rank, const usp_options *options, const usp_case *config, usp_sweep_state *state,
                          usp_result results[2], int *count) {
    usp_setup s = {.options = options, .config = config, .rank = rank};
    usp_status status = open_setup(&s);
    if (is_refusal(status)) {
        refuse(&s, state, results, count);
        status = USP_OK;
    } else if (status == USP_OK)
        status = measure_passes(&s, state, results, count);
    usp_status closed = close_setup(&s);
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
