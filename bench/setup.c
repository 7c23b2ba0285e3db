/* setup.c - creates what a case needs, and fills in the arguments of its calls. */
#include "setup.h"
#include "inputs.h"
#include "layer_options.h"
#include "number.h"
#include <stdlib.h>
#include <string.h>

const uint64_t usp_setup_dropout_state[2] = {20240229, 3};

/* ---- the layer ------------------------------------------------------------------------------------------------- */

static usp_status make_slopes(usp_setup *s, float sign, float **slopes) {
    int heads = usp_inputs_out_heads(s->config);
    *slopes = usp_tool_alloc(&s->rank->error, (size_t)heads, sizeof **slopes);
    if (!*slopes) return USP_NO_MEMORY;
    usp_decay_slopes(heads, *slopes);
    for (int h = 0; h < heads; h++) (*slopes)[h] *= sign;
    return USP_OK;
}

/* The layout by documents has some in any case. */
static usp_status make_documents(usp_setup *s) {
    const int64_t seq = s->config->seq, tenths[] = {seq / 10, 3 * seq / 10, 6 * seq / 10, seq};
    USP_TRY(usp_documents_make(&s->options->documents, seq, &s->rank->error, &s->document_end, &s->documents));
    if (s->documents || s->config->layout != USP_LAYOUT_ZIGZAG_PER_DOCUMENT) return USP_OK;
    s->document_end = usp_tool_alloc(&s->rank->error, 1, sizeof tenths);
    if (!s->document_end) return USP_NO_MEMORY;
    memcpy(s->document_end, tenths, sizeof tenths);
    s->documents = sizeof tenths / sizeof *tenths;
    return USP_OK;
}

static usp_status make_arrays(usp_setup *s) {
    const usp_case *c = s->config;
    if (c->kind == USP_LINEAR && c->mask == USP_MASK_CAUSAL && s->options->decay) USP_TRY(make_slopes(s, 1, &s->decay));
    if (c->kind == USP_SOFTMAX && s->options->slopes) USP_TRY(make_slopes(s, -1, &s->slopes));
    if (c->kind == USP_SOFTMAX && s->options->layer.sinks) {
        s->sinks = usp_tool_alloc(&s->rank->error, (size_t)c->heads, sizeof *s->sinks);
        if (!s->sinks) return USP_NO_MEMORY;
        usp_inputs_sinks(c, s->sinks);
    }
    return make_documents(s);
}

static usp_layer_config layer_config(const usp_setup *s) {
    const usp_case *c = s->config;
    int linear = c->kind == USP_LINEAR;
    usp_layer_config config = s->options->layer;
    config.struct_size = sizeof config;
    config.attention = c->kind;
    config.mask = c->mask;
    config.dtype = c->dtype;
    config.batch = c->batch;
    config.heads = c->heads;
    config.kv_heads = c->kv_heads;
    config.value_heads = linear ? c->kv_heads : 0;
    config.head_dim = c->dim;
    config.value_dim = c->value_dim;
    config.return_lse = !linear;
    config.decay = s->decay;
    config.slopes = s->slopes;
    usp_layer_options_fit(&config);
    return config;
}

static usp_status make_sequence(usp_setup *s) {
    usp_sequence_config config = {.struct_size = sizeof config,
                                  .layout = s->config->layout,
                                  .max_documents = s->options->max_documents,
                                  .tokens = s->config->seq,
                                  .documents = s->documents,
                                  .document_ends = s->document_end};
    return usp_sequence_create(s->mesh, &config, &s->sequence);
}

static usp_status make_layer(usp_setup *s) {
    USP_TRY(usp_mesh_create(s->rank->world, s->config->ulysses, s->config->ring, &s->mesh));
    USP_TRY(make_sequence(s));
    s->layer_config = layer_config(s);
    s->layer_config.shared_memory = s->options->shared_memory;
    USP_TRY(usp_layer_create(s->mesh, s->sequence, &s->layer_config, &s->layer));
    s->sizes.struct_size = sizeof s->sizes;
    s->tokens = usp_sequence_local_tokens(s->sequence, s->rank->rank);
    return usp_layer_get_sizes(s->layer, &s->sizes);
}

/* ---- memory ---------------------------------------------------------------------------------------------------- */

static usp_status allocate(usp_setup *s, size_t bytes, void **memory) {
    return usp_world_alloc(s->rank->world, bytes ? bytes : 1, memory);
}

/* Input whose shape a tensor has. */
static usp_input shape_of(int tensor) {
    static const usp_input like[USP_TENSORS] = {USP_INPUT_Q,    USP_INPUT_K, USP_INPUT_V, USP_INPUT_DOUT,
                                                USP_INPUT_DOUT, USP_INPUT_Q, USP_INPUT_K, USP_INPUT_V};
    return like[tensor];
}

size_t usp_setup_lse_bytes(const usp_setup *s) {
    const usp_case *c = s->config;
    return sizeof(float) * (size_t)c->batch * (size_t)c->heads * (size_t)s->tokens;
}

static size_t sink_bytes(const usp_setup *s) {
    return sizeof(float) * (size_t)s->config->heads;
}

static usp_status allocate_tensors(usp_setup *s) {
    const usp_case *c = s->config;
    int backward = s->options->passes[USP_PASS_BACKWARD], last = backward ? USP_TENSORS : USP_DOUT;
    for (int i = 0; i < last; i++) {
        size_t heads = (size_t)usp_inputs_heads(c, shape_of(i)), dim = (size_t)usp_inputs_dim(c, shape_of(i));
        s->bytes[i] = (size_t)c->batch * (size_t)s->tokens * heads * dim * usp_dtype_size(c->dtype);
        USP_TRY(allocate(s, s->bytes[i], &s->tensor[i]));
    }
    if (c->kind == USP_SOFTMAX) USP_TRY(allocate(s, usp_setup_lse_bytes(s), &s->lse));
    if (s->sinks) USP_TRY(allocate(s, sink_bytes(s), &s->sinks_there));
    if (s->sinks && backward) USP_TRY(allocate(s, sink_bytes(s), &s->dsinks));
    return s->layer_config.dropout > 0 ? allocate(s, sizeof usp_setup_dropout_state, &s->dropout_state) : USP_OK;
}

/* Forward saves if backward is run too. */
size_t usp_setup_workspace(const usp_setup *s, usp_pass pass) {
    if (pass == USP_PASS_BACKWARD) return s->sizes.backward_workspace;
    int saves = s->options->passes[USP_PASS_BACKWARD];
    return saves ? s->sizes.forward_saving_workspace : s->sizes.forward_workspace;
}

static usp_status allocate_memory(usp_setup *s) {
    int backward = s->options->passes[USP_PASS_BACKWARD];
    size_t forward = usp_setup_workspace(s, USP_PASS_FORWARD), other = backward ? s->sizes.backward_workspace : 0;
    s->workspace_bytes = forward > other ? forward : other;
    s->saved_bytes = backward ? s->sizes.saved : 0;
    USP_TRY(allocate_tensors(s));
    if (s->options->shared_memory) return USP_OK;
    USP_TRY(allocate(s, s->workspace_bytes, &s->workspace));
    return allocate(s, s->saved_bytes, &s->saved);
}

/* Collective. */
static usp_status allocate_shared(usp_setup *s) {
    if (!s->options->shared_memory) return USP_OK;
    s->shared = 1;
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
    const int inputs[] = {USP_Q, USP_K, USP_V, USP_DOUT};
    for (size_t i = 0; i < sizeof inputs / sizeof *inputs; i++)
        if (s->tensor[inputs[i]]) USP_TRY(fill_input(s, inputs[i]));
    if (s->sinks) USP_TRY(copy(s, s->sinks_there, s->sinks, sink_bytes(s)));
    if (!s->dropout_state) return USP_OK;
    return copy(s, s->dropout_state, usp_setup_dropout_state, sizeof usp_setup_dropout_state);
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

usp_status usp_setup_poison(usp_setup *s, usp_pass pass) {
    if (pass == USP_PASS_FORWARD && s->lse) USP_TRY(poison_bytes(s, s->lse, usp_setup_lse_bytes(s)));
    if (pass == USP_PASS_FORWARD) return poison_bytes(s, s->tensor[USP_O], s->bytes[USP_O]);
    if (s->dsinks) USP_TRY(poison_bytes(s, s->dsinks, sink_bytes(s)));
    for (int i = USP_DQ; i <= USP_DV; i++) USP_TRY(poison_bytes(s, s->tensor[i], s->bytes[i]));
    return USP_OK;
}

usp_status usp_setup_fetch(usp_setup *s, const void *memory, size_t bytes, void **host) {
    *host = NULL;
    if (!memory) return USP_OK;
    *host = usp_tool_alloc(&s->rank->error, bytes, 1);
    return *host ? copy(s, *host, memory, bytes) : USP_NO_MEMORY;
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
                        .q = view(s, USP_Q),
                        .k = view(s, USP_K),
                        .v = view(s, USP_V),
                        .out = view(s, USP_O),
                        .lse = s->lse,
                        .saved = s->options->passes[USP_PASS_BACKWARD] ? s->saved : NULL,
                        .sinks = s->sinks_there,
                        .dropout_state = s->dropout_state};
    return usp_layer_forward(s->layer, &args, s->workspace, s->workspace_bytes, s->rank->stream);
}

static usp_status backward(usp_setup *s) {
    usp_backward args = {.struct_size = sizeof args,
                         .q = view(s, USP_Q),
                         .k = view(s, USP_K),
                         .v = view(s, USP_V),
                         .out = view(s, USP_O),
                         .dout = view(s, USP_DOUT),
                         .dq = view(s, USP_DQ),
                         .dk = view(s, USP_DK),
                         .dv = view(s, USP_DV),
                         .saved = s->saved,
                         .sinks = s->sinks_there,
                         .dsinks = s->dsinks,
                         .dropout_state = s->dropout_state};
    return usp_layer_backward(s->layer, &args, s->workspace, s->workspace_bytes, s->rank->stream);
}

usp_status usp_setup_pass(usp_setup *s, usp_pass pass) {
    return pass == USP_PASS_FORWARD ? forward(s) : backward(s);
}

/* ---- all ------------------------------------------------------------------------------------------------------- */

/* The same on all ranks. */
static usp_status check_graphs(const usp_setup *s) {
    int alone = s->rank->device == USP_DEVICE_CUDA && (s->rank->size == 1 || strcmp(s->rank->transport, "threads"));
    if (s->options->graphs == 0 || alone) return USP_OK;
    return usp_tool_fail(&s->rank->error, USP_UNSUPPORTED, "a graph needs a GPU for every rank");
}

/* Create is collective, and own memory is agreed on. */
usp_status usp_setup_open(usp_setup *s) {
    USP_TRY(check_graphs(s));
    USP_TRY(usp_rank_agree(s->rank, make_arrays(s)));
    USP_TRY(make_layer(s));
    USP_TRY(usp_rank_agree(s->rank, allocate_memory(s)));
    USP_TRY(allocate_shared(s));
    return usp_rank_agree(s->rank, fill_inputs(s));
}

static usp_status close_shared(usp_setup *s) {
    usp_status saved = s->saved ? usp_world_free_shared(s->rank->world, s->saved) : USP_OK;
    usp_status workspace = s->workspace ? usp_world_free_shared(s->rank->world, s->workspace) : USP_OK;
    return saved != USP_OK ? saved : workspace;
}

static void free_memory(usp_setup *s) {
    void *const single[] = {s->lse, s->sinks_there, s->dsinks, s->dropout_state};
    for (size_t i = 0; i < sizeof single / sizeof *single; i++) usp_world_free(s->rank->world, single[i]);
    for (int i = 0; i < USP_TENSORS; i++) usp_world_free(s->rank->world, s->tensor[i]);
    free(s->decay);
    free(s->slopes);
    free(s->sinks);
    free(s->document_end);
}

usp_status usp_setup_close(usp_setup *s) {
    usp_status status = USP_OK;
    if (s->shared)
        status = close_shared(s);
    else {
        usp_world_free(s->rank->world, s->saved);
        usp_world_free(s->rank->world, s->workspace);
    }
    usp_layer_destroy(s->layer);
    usp_sequence_destroy(s->sequence);
    usp_mesh_destroy(s->mesh);
    free_memory(s);
    return status;
}
