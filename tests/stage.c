/* stage.c - sets up, runs and gathers one rank's part of a case (see stage.h). Judges no result. */
#include "stage.h"

#include <stdlib.h>
#include <string.h>

const uint64_t usp_dropout_words[2] = {0x123456789abcdef0u, 7};

/* What other random elements come from, beside the numbers of the inputs. */
enum { OTHER_VALUES = 9 };

static int fail(usp_stage *stage, const char *what, usp_status status) {
    char name[512];
    if (status == USP_OK) return 0;
    usp_case_print(&stage->c, name, sizeof name);
    return usp_say(stage->rank, "%s: %s: %s (%s)", name, what, usp_last_error(), usp_status_string(status));
}

static int wrong(usp_stage *stage, const char *what) {
    char name[512];
    usp_case_print(&stage->c, name, sizeof name);
    return usp_say(stage->rank, "%s: %s", name, what);
}

/* ---- open and close ---------------------------------------------------------------------------------------------- */

static usp_status create_objects(usp_stage *stage, const usp_case_configs *configs) {
    usp_status status = usp_sequence_create(stage->mesh, &configs->sequence, &stage->sequence);
    stage->keys = stage->sequence;
    if (status == USP_OK && stage->c.key_tokens) {
        stage->keys = NULL;
        status = usp_sequence_create(stage->mesh, &configs->keys, &stage->keys);
    }
    if (status == USP_OK) status = usp_layer_create(stage->mesh, stage->sequence, &configs->layer, &stage->layer);
    if (status != USP_OK) return status;
    stage->sizes.struct_size = sizeof stage->sizes;
    return usp_layer_get_sizes(stage->layer, &stage->sizes);
}

usp_status usp_stage_open(usp_rank *rank, const usp_case *c, usp_stage *stage) {
    int n;
    *stage = (usp_stage){.rank = rank, .c = usp_case_complete(*c)};
    usp_case_configs *configs = malloc(sizeof *configs);
    usp_status status =
        configs ? usp_mesh_create(rank->world, stage->c.ulysses, stage->c.ring, &stage->mesh) : USP_NO_MEMORY;
    if (status == USP_OK) status = usp_mesh_axis(stage->mesh, USP_AXIS_SEQUENCE, &stage->p, &n);
    if (status == USP_OK) {
        usp_case_configure(&stage->c, stage->p, n, configs);
        status = create_objects(stage, configs);
    }
    free(configs);
    if (status == USP_OK) {
        stage->tokens = usp_sequence_local_tokens(stage->sequence, stage->p);
        stage->key_tokens = usp_sequence_local_key_tokens(stage->sequence, stage->p);
    } else {
        usp_stage_close(stage);
    }
    return status;
}

void usp_stage_close(usp_stage *stage) {
    usp_buffer *more[] = {&stage->lse,       &stage->initial_state,  &stage->final_state, &stage->dfinal_state,
                          &stage->workspace, &stage->dinitial_state, &stage->saved,       &stage->sinks,
                          &stage->dsinks,    &stage->dlse,           &stage->max_logit,   &stage->dropout_state};
    for (int i = 0; i < USP_PARTS; i++) usp_buffer_destroy(&stage->memory[i]);
    for (size_t i = 0; i < sizeof more / sizeof more[0]; i++) usp_buffer_destroy(more[i]);
    usp_layer_destroy(stage->layer);
    if (stage->keys != stage->sequence) usp_sequence_destroy(stage->keys);
    usp_sequence_destroy(stage->sequence);
    usp_mesh_destroy(stage->mesh);
    stage->layer = NULL;
    stage->keys = stage->sequence = NULL;
    stage->mesh = NULL;
}

/* ---- tensors ----------------------------------------------------------------------------------------------------- */

static int part_heads(const usp_case *c, usp_part part) {
    if (part == USP_Q || part == USP_DQ) return c->heads;
    if (part == USP_K || part == USP_DK) return c->kv_heads;
    if (part == USP_V || part == USP_DV) return c->attention == USP_LINEAR ? c->value_heads : c->kv_heads;
    return usp_case_out_heads(c);
}

static int part_dim(const usp_case *c, usp_part part) {
    int key_like = part == USP_Q || part == USP_K || part == USP_DQ || part == USP_DK;
    return key_like ? c->head_dim : c->value_dim;
}

static int part_of_keys(usp_part part) {
    return part == USP_K || part == USP_V || part == USP_DK || part == USP_DV;
}

/* Can q, k and v be rows of one tensor? */
static int can_pack(const usp_case *c) {
    return c->arrangement == USP_PACKED && c->head_dim == c->value_dim && c->key_tokens == 0;
}

static usp_status create_part(usp_stage *stage, usp_part part) {
    const usp_case *c = &stage->c;
    int heads = part_heads(c, part), dim = part_dim(c, part), packed = can_pack(c) && part != USP_O && part != USP_DOUT;
    int64_t tokens = part_of_keys(part) ? stage->key_tokens : stage->tokens;
    usp_arrangement arrangement = c->arrangement == USP_PACKED ? USP_BSHD : c->arrangement;
    stage->holder[part] = packed ? (part < USP_DQ ? USP_Q : USP_DQ) : part;
    if (packed) {
        int first = part_heads(c, USP_Q), second = part_heads(c, USP_K), third = part_heads(c, USP_V);
        int before = part == USP_Q || part == USP_DQ ? 0 : part == USP_K || part == USP_DK ? first : first + second;
        stage->view[part] = usp_view_packed(c->dtype, c->batch, tokens, heads, dim, before, first + second + third);
    } else {
        stage->view[part] = usp_view_make(arrangement, c->dtype, c->batch, tokens, heads, dim);
    }
    if (stage->holder[part] != (int)part) return USP_OK;
    size_t bytes = usp_view_bytes(&stage->view[part]);
    if (packed) bytes = 16 + (size_t)(c->batch * stage->view[part].stride_batch) * usp_dtype_size(c->dtype);
    return usp_buffer_create(stage->rank->world, stage->rank->stream, bytes, &stage->memory[part]);
}

static size_t state_count(const usp_case *c) {
    return (size_t)c->batch * (size_t)usp_case_out_heads(c) * (size_t)c->head_dim * (size_t)c->value_dim;
}

static usp_status create_memory(usp_stage *stage, size_t bytes, usp_buffer *buffer) {
    usp_world *world = stage->rank->world;
    usp_stream stream = stage->rank->stream;
    return stage->c.shared_memory ? usp_buffer_create_shared(world, stream, bytes, buffer)
                                  : usp_buffer_create(world, stream, bytes, buffer);
}

static usp_status create_extra(usp_stage *stage) {
    const usp_case *c = &stage->c;
    size_t states = state_count(c) * sizeof(float);
    size_t lse = (size_t)c->batch * (size_t)c->heads * (size_t)stage->tokens * sizeof(float);
    size_t workspace = stage->sizes.forward_workspace, heads = (size_t)c->heads * sizeof(float);
    if (workspace < stage->sizes.backward_workspace) workspace = stage->sizes.backward_workspace;
    if (workspace < stage->sizes.exchange_workspace) workspace = stage->sizes.exchange_workspace;
    const struct {
        usp_buffer *buffer;
        size_t bytes;
    } all[] = {{&stage->lse, lse + 16},          {&stage->initial_state, states},
               {&stage->final_state, states},    {&stage->dfinal_state, states},
               {&stage->dinitial_state, states}, {&stage->sinks, heads},
               {&stage->dsinks, heads},          {&stage->dlse, lse + 16},
               {&stage->max_logit, heads},       {&stage->dropout_state, sizeof usp_dropout_words}};
    usp_world *world = stage->rank->world;
    usp_stream stream = stage->rank->stream;
    usp_status status = create_memory(stage, workspace, &stage->workspace);
    if (status == USP_OK) status = create_memory(stage, stage->sizes.saved, &stage->saved);
    for (size_t i = 0; i < sizeof all / sizeof all[0] && status == USP_OK; i++)
        status = usp_buffer_create(world, stream, all[i].bytes, all[i].buffer);
    return status;
}

static uint64_t part_seed(const usp_stage *stage) {
    int copy, copies;
    usp_mesh_axis(stage->mesh, USP_AXIS_DATA, &copy, &copies);
    return (uint64_t)stage->c.seed + 4096 * (uint64_t)copy;
}

static void fill_part(usp_stage *stage, usp_part part) {
    const usp_case *c = &stage->c;
    int keys = part_of_keys(part);
    usp_tokens tokens = {keys ? stage->keys : stage->sequence, stage->p, keys ? usp_case_keys(c) : c->tokens,
                         keys && c->key_tokens ? c->first_key : c->first_token};
    usp_view_fill(&stage->view[part], &stage->memory[stage->holder[part]], &tokens, part_seed(stage), part);
}

static void fill_state(usp_stage *stage, usp_buffer *buffer, uint64_t tensor) {
    for (size_t i = 0; i < state_count(&stage->c); i++)
        usp_store(USP_F32, buffer->host + i * sizeof(float), usp_random_at(part_seed(stage), tensor, i));
}

/* dlse as [batch, head, own token], by what it is of the whole [batch, token, head]. */
static void fill_dlse(usp_stage *stage) {
    const usp_case *c = &stage->c;
    for (int b = 0; b < c->batch; b++)
        for (int h = 0; h < c->heads; h++)
            for (int64_t t = 0; t < stage->tokens; t++) {
                int64_t token = c->first_token + usp_sequence_to_global(stage->sequence, stage->p, t);
                int64_t whole = (b * c->tokens + token) * c->heads + h, own = (b * c->heads + h) * stage->tokens + t;
                usp_store(USP_F32, stage->dlse.host + (size_t)own * sizeof(float),
                          usp_random_at(part_seed(stage), USP_DLSE, (uint64_t)whole));
            }
}

static void fill_heads(usp_stage *stage) {
    for (int h = 0; h < stage->c.heads; h++)
        usp_store(USP_F32, stage->sinks.host + (size_t)h * sizeof(float),
                  usp_random_at(part_seed(stage), USP_SINKS, (uint64_t)h));
    memcpy(stage->dropout_state.host, usp_dropout_words, sizeof usp_dropout_words);
}

static uint64_t hash_inputs(const usp_stage *stage) {
    uint64_t hash = 0;
    for (int part = USP_Q; part <= USP_DOUT; part++) {
        const usp_buffer *buffer = &stage->memory[part];
        for (size_t i = 0; part != USP_O && i < buffer->bytes; i++) hash = hash * 31 + buffer->host[i] + 1;
    }
    for (size_t i = 0; i < stage->initial_state.bytes; i++)
        hash = hash * 31 + stage->initial_state.host[i] + stage->dfinal_state.host[i];
    const usp_buffer *more[] = {&stage->sinks, &stage->dlse, &stage->dropout_state};
    for (int n = 0; n < 3; n++)
        for (size_t i = 0; i < more[n]->bytes; i++) hash = hash * 31 + more[n]->host[i];
    return hash;
}

static usp_status upload_states(const usp_stage *stage) {
    usp_status status = usp_buffer_upload(&stage->initial_state);
    if (status == USP_OK) status = usp_buffer_upload(&stage->dfinal_state);
    if (status == USP_OK) status = usp_buffer_upload(&stage->sinks);
    if (status == USP_OK) status = usp_buffer_upload(&stage->dlse);
    if (status == USP_OK) status = usp_buffer_upload(&stage->dropout_state);
    return status == USP_OK ? usp_world_synchronize(stage->rank->world, stage->rank->stream) : status;
}

static usp_status upload_all(const usp_stage *stage) {
    usp_status status = USP_OK;
    for (int i = 0; i < USP_PARTS && status == USP_OK; i++)
        if (stage->holder[i] == i) status = usp_buffer_upload(&stage->memory[i]);
    return status == USP_OK ? upload_states(stage) : status;
}

int usp_stage_fill(usp_stage *stage) {
    usp_status status = USP_OK;
    if (stage->c.key_tokens && usp_sequence_local_tokens(stage->keys, stage->p) != stage->key_tokens)
        return wrong(stage, "keys are not spread as queries are");
    for (int part = 0; part < USP_PARTS && status == USP_OK; part++) status = create_part(stage, (usp_part)part);
    if (status == USP_OK) status = create_extra(stage);
    if (status != USP_OK) return fail(stage, "tensors", status);
    fill_part(stage, USP_Q);
    fill_part(stage, USP_K);
    fill_part(stage, USP_V);
    fill_part(stage, USP_DOUT);
    fill_state(stage, &stage->initial_state, USP_INITIAL_STATE);
    fill_state(stage, &stage->dfinal_state, USP_DFINAL_STATE);
    fill_dlse(stage);
    fill_heads(stage);
    stage->input_hash = hash_inputs(stage);
    return fail(stage, "upload", upload_all(stage));
}

int usp_stage_mix_values(usp_stage *stage, double first, double second) {
    const usp_view *v = &stage->view[USP_V];
    const usp_buffer *buffer = &stage->memory[stage->holder[USP_V]];
    for (int64_t t = 0; t < v->tokens; t++) {
        int64_t global = usp_sequence_to_global(stage->keys, stage->p, t);
        for (int b = 0; b < v->batch; b++)
            for (int h = 0; h < v->heads; h++)
                for (int x = 0; x < v->dim; x++) {
                    uint64_t i = (uint64_t)(((b * usp_case_keys(&stage->c) + global) * v->heads + h) * v->dim + x);
                    double value = first * usp_random_at(part_seed(stage), USP_V, i) +
                                   second * usp_random_at(part_seed(stage), OTHER_VALUES, i);
                    usp_store(v->dtype, usp_view_at(v, buffer, b, t, h, x), value);
                }
    }
    stage->input_hash = hash_inputs(stage);
    return fail(stage, "upload", upload_all(stage));
}

int usp_stage_set_states(usp_stage *stage, const float *initial, const float *dfinal) {
    if (initial) memcpy(stage->initial_state.host, initial, stage->initial_state.bytes);
    if (dfinal) memcpy(stage->dfinal_state.host, dfinal, stage->dfinal_state.bytes);
    stage->input_hash = hash_inputs(stage);
    return fail(stage, "upload", upload_states(stage));
}

int usp_stage_spoil(usp_stage *stage, usp_part part) {
    usp_view_poison(&stage->view[part], &stage->memory[stage->holder[part]]);
    stage->input_hash = hash_inputs(stage);
    return fail(stage, "upload", upload_all(stage));
}

static void set_state(const usp_stage *stage, const usp_spot *spot) {
    const usp_buffer *state = spot->input == USP_INITIAL_STATE ? &stage->initial_state : &stage->dfinal_state;
    usp_store(USP_F32, state->host + (size_t)spot->index * sizeof(float), spot->value);
}

static void set_part(const usp_stage *stage, const usp_spot *spot) {
    const usp_view *view = &stage->view[spot->input];
    int keys = part_of_keys((usp_part)spot->input), owner;
    int64_t tokens = keys ? usp_case_keys(&stage->c) : stage->c.tokens, row = spot->index / view->dim, local;
    int64_t token = row / view->heads % tokens;
    usp_sequence_to_local(keys ? stage->keys : stage->sequence, token, &owner, &local);
    if (owner == stage->p)
        usp_store(view->dtype,
                  usp_view_at(view, &stage->memory[stage->holder[spot->input]], (int)(row / view->heads / tokens),
                              local, (int)(row % view->heads), (int)(spot->index % view->dim)),
                  spot->value);
}

int usp_stage_set(usp_stage *stage, const usp_spot *spot) {
    if (spot->input < USP_PARTS)
        set_part(stage, spot);
    else
        set_state(stage, spot);
    stage->input_hash = hash_inputs(stage);
    return fail(stage, "upload", upload_all(stage));
}

int usp_stage_feed(usp_stage *stage, usp_stage *from) {
    usp_status status = usp_buffer_download(&from->memory[USP_O]);
    for (int part = USP_Q; part <= USP_V && status == USP_OK; part++) {
        memcpy(stage->memory[part].host, from->memory[USP_O].host, from->memory[USP_O].bytes);
        status = usp_buffer_upload(&stage->memory[part]);
    }
    stage->input_hash = hash_inputs(stage);
    return fail(stage, "feed", status);
}

static double element(const usp_stage *stage, usp_part part, size_t at) {
    return usp_load(stage->c.dtype, stage->memory[part].host + at);
}

int usp_stage_feed_back(usp_stage *stage, usp_stage *fed) {
    const usp_buffer *dout = &stage->memory[USP_DOUT];
    size_t size = usp_dtype_size(stage->c.dtype);
    usp_status status = USP_OK;
    for (int part = USP_DQ; part <= USP_DV && status == USP_OK; part++)
        status = usp_buffer_download(&fed->memory[part]);
    for (size_t at = 0; at + size <= dout->bytes; at += size)
        usp_store(stage->c.dtype, dout->host + at,
                  element(fed, USP_DQ, at) + element(fed, USP_DK, at) + element(fed, USP_DV, at));
    if (status == USP_OK) status = usp_buffer_upload(dout);
    stage->input_hash = hash_inputs(stage);
    return fail(stage, "feed back", status);
}

/* ---- run --------------------------------------------------------------------------------------------------------- */

static usp_tensor part_tensor(const usp_stage *stage, usp_part part) {
    return usp_view_tensor(&stage->view[part], &stage->memory[stage->holder[part]]);
}

usp_forward usp_stage_forward_arguments(const usp_stage *stage, int keep) {
    const usp_case *c = &stage->c;
    return (usp_forward){.struct_size = sizeof(usp_forward),
                         .q = part_tensor(stage, USP_Q),
                         .k = part_tensor(stage, USP_K),
                         .v = part_tensor(stage, USP_V),
                         .out = part_tensor(stage, USP_O),
                         .lse = c->return_lse ? stage->lse.device : NULL,
                         .initial_state = c->initial_state ? stage->initial_state.device : NULL,
                         .final_state = c->final_state ? stage->final_state.device : NULL,
                         .saved = keep ? stage->saved.device : NULL,
                         .sinks = c->sinks ? stage->sinks.device : NULL,
                         .max_logit = c->max_logit ? stage->max_logit.device : NULL,
                         .dropout_state = c->dropout > 0 ? stage->dropout_state.device : NULL};
}

usp_backward usp_stage_backward_arguments(const usp_stage *stage) {
    const usp_case *c = &stage->c;
    return (usp_backward){.struct_size = sizeof(usp_backward),
                          .q = part_tensor(stage, USP_Q),
                          .k = part_tensor(stage, USP_K),
                          .v = part_tensor(stage, USP_V),
                          .out = part_tensor(stage, USP_O),
                          .dout = part_tensor(stage, USP_DOUT),
                          .dq = part_tensor(stage, USP_DQ),
                          .dk = part_tensor(stage, USP_DK),
                          .dv = part_tensor(stage, USP_DV),
                          .dfinal_state = c->final_state ? stage->dfinal_state.device : NULL,
                          .dinitial_state = c->initial_state ? stage->dinitial_state.device : NULL,
                          .saved = stage->saved.device,
                          .initial_state = c->initial_state ? stage->initial_state.device : NULL,
                          .sinks = c->sinks ? stage->sinks.device : NULL,
                          .dsinks = c->sinks ? stage->dsinks.device : NULL,
                          .dlse = c->dlse ? stage->dlse.device : NULL,
                          .dropout_state = c->dropout > 0 ? stage->dropout_state.device : NULL};
}

static size_t forward_bytes(const usp_stage *stage, int keep) {
    return keep ? stage->sizes.forward_saving_workspace : stage->sizes.forward_workspace;
}

/* The last `bytes` bytes: what lies behind is not the stage's, as sanitizers know. Shared memory begins at the same
 * place on all ranks. */
static void *end_of_workspace(const usp_stage *stage, size_t bytes) {
    if (stage->c.shared_memory) return stage->workspace.device;
    return (char *)stage->workspace.device + (stage->workspace.bytes - bytes);
}

int usp_stage_forward(usp_stage *stage, int keep) {
    usp_forward arguments = usp_stage_forward_arguments(stage, keep);
    size_t bytes = forward_bytes(stage, keep);
    return fail(
        stage, "forward",
        usp_layer_forward(stage->layer, &arguments, end_of_workspace(stage, bytes), bytes, stage->rank->stream));
}

int usp_stage_backward(usp_stage *stage) {
    usp_backward arguments = usp_stage_backward_arguments(stage);
    return fail(stage, "backward",
                usp_layer_backward(stage->layer, &arguments, end_of_workspace(stage, stage->sizes.backward_workspace),
                                   stage->sizes.backward_workspace, stage->rank->stream));
}

/* ---- gather ------------------------------------------------------------------------------------------------------ */

/* [batch, own token, row] on each rank to [batch, token, row] on all. */
static float *gather_rows(usp_stage *stage, const usp_sequence *sequence, const float *own, int64_t tokens, int row,
                          int64_t *count) {
    *count = stage->c.batch * tokens * row;
    float *whole = malloc(((size_t)*count + 1) * sizeof *whole);
    usp_status status = usp_sequence_gather(sequence, stage->c.batch, (size_t)row * sizeof(float), own, whole);
    if (status == USP_OK) return whole;
    fail(stage, "gather", status);
    free(whole);
    return NULL;
}

/* Takes the result out of its memory, which is poison again afterwards. */
static float *gather_part(usp_stage *stage, usp_part part, int64_t *count) {
    const usp_view *view = &stage->view[part];
    const usp_buffer *buffer = &stage->memory[stage->holder[part]];
    float *own = malloc(((size_t)(view->batch * view->tokens * view->heads * view->dim) + 1) * sizeof *own);
    usp_view_read(view, buffer, own);
    usp_view_poison(view, buffer);
    int keys = part_of_keys(part);
    float *whole = gather_rows(stage, keys ? stage->keys : stage->sequence, own,
                               keys ? usp_case_keys(&stage->c) : stage->c.tokens, view->heads * view->dim, count);
    free(own);
    return whole;
}

static float *gather_lse(usp_stage *stage, int64_t *count) {
    const usp_case *c = &stage->c;
    float *own = malloc(((size_t)(c->batch * stage->tokens * c->heads) + 1) * sizeof *own), *to = own;
    for (int b = 0; b < c->batch; b++)
        for (int64_t t = 0; t < stage->tokens; t++)
            for (int h = 0; h < c->heads; h++)
                *to++ = (float)usp_load(USP_F32, stage->lse.host +
                                                     (size_t)((b * c->heads + h) * stage->tokens + t) * sizeof(float));
    memset(stage->lse.host, 0xff, (size_t)(to - own) * sizeof *own);
    float *whole = gather_rows(stage, stage->sequence, own, c->tokens, c->heads, count);
    free(own);
    return whole;
}

static float *take_state(const usp_stage *stage, usp_buffer *buffer, int64_t *count) {
    *count = (int64_t)state_count(&stage->c);
    float *state = malloc(buffer->bytes + 1);
    memcpy(state, buffer->host, buffer->bytes);
    return state;
}

static float *take_heads(const usp_stage *stage, const usp_buffer *buffer, int64_t *count) {
    *count = stage->c.heads;
    float *heads = malloc(buffer->bytes + 1);
    memcpy(heads, buffer->host, buffer->bytes);
    return heads;
}

static int download_all(usp_stage *stage, int backward) {
    usp_status status = USP_OK;
    for (int i = 0; i < USP_PARTS && status == USP_OK; i++)
        if (stage->holder[i] == i && (backward || i < USP_DQ)) status = usp_buffer_download(&stage->memory[i]);
    usp_buffer *more[] = {&stage->lse,    &stage->initial_state,  &stage->final_state, &stage->dfinal_state,
                          &stage->dsinks, &stage->dinitial_state, &stage->max_logit};
    for (size_t i = 0; i < sizeof more / sizeof more[0] && status == USP_OK; i++) status = usp_buffer_download(more[i]);
    return fail(stage, "download", status);
}

/* Once the results are taken out, their memory must be as it was made. */
static int check_untouched(usp_stage *stage) {
    static const usp_part results[] = {USP_O, USP_DQ, USP_DK, USP_DV};
    int failures = 0;
    for (int i = 0; i < 4; i++)
        if (stage->holder[results[i]] == (int)results[i] && !usp_buffer_is_poison(&stage->memory[results[i]]))
            failures += wrong(stage, i == 0 ? "wrote beside out" : "wrote beside a gradient");
    if (!usp_buffer_is_poison(&stage->lse)) failures += wrong(stage, "wrote beside lse");
    if (hash_inputs(stage) != stage->input_hash) failures += wrong(stage, "changed an input");
    return failures != 0;
}

static int gather_backward(usp_stage *stage, usp_whole *whole) {
    whole->dq = gather_part(stage, USP_DQ, &whole->dq_count);
    if (whole->dq) whole->dk = gather_part(stage, USP_DK, &whole->dk_count);
    if (whole->dk) whole->dv = gather_part(stage, USP_DV, &whole->dv_count);
    if (stage->c.initial_state) whole->dinitial_state = take_state(stage, &stage->dinitial_state, &whole->state_count);
    if (stage->c.sinks) whole->dsinks = take_heads(stage, &stage->dsinks, &whole->head_count);
    return whole->dv == NULL;
}

int usp_stage_gather(usp_stage *stage, int backward, usp_whole *whole) {
    *whole = (usp_whole){0};
    if (download_all(stage, backward)) return 1;
    whole->out = gather_part(stage, USP_O, &whole->out_count);
    if (whole->out && stage->c.return_lse) whole->lse = gather_lse(stage, &whole->lse_count);
    int failed = !whole->out || (stage->c.return_lse && !whole->lse);
    if (!failed && stage->c.final_state)
        whole->final_state = take_state(stage, &stage->final_state, &whole->state_count);
    if (!failed && stage->c.max_logit) whole->max_logit = take_heads(stage, &stage->max_logit, &whole->head_count);
    if (!failed && backward) failed = gather_backward(stage, whole);
    if (!failed) check_untouched(stage);
    if (failed) usp_whole_free(whole);
    return failed;
}

int usp_stage_clear(usp_stage *stage) {
    usp_buffer *const all[] = {
        &stage->memory[USP_O], &stage->memory[USP_DQ], &stage->memory[USP_DK], &stage->memory[USP_DV],
        &stage->lse,           &stage->final_state,    &stage->dinitial_state, &stage->workspace,
        &stage->saved,         &stage->dsinks,         &stage->max_logit};
    usp_status status = USP_OK;
    for (size_t i = 0; i < sizeof all / sizeof all[0] && status == USP_OK; i++) {
        if (!all[i]->host) continue; /* packed: inside another one */
        memset(all[i]->host, 0xff, all[i]->bytes);
        status = usp_buffer_upload(all[i]);
    }
    return fail(stage, "clear", status);
}

void usp_whole_free(usp_whole *whole) {
    float *all[] = {
        whole->out,    whole->lse,      whole->dq, whole->dk, whole->dv, whole->final_state, whole->dinitial_state,
        whole->dsinks, whole->max_logit};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) free(all[i]);
    *whole = (usp_whole){0};
}

int usp_stage_run_spotted(usp_rank *rank, const usp_case *c, const usp_spot *spot, usp_whole *whole) {
    usp_stage *stage = malloc(sizeof *stage);
    *whole = (usp_whole){0};
    usp_status refusal = usp_stage_open(rank, c, stage);
    int failed = refusal != USP_OK ? -1 : usp_stage_fill(stage);
    if (!failed && spot) failed = usp_stage_set(stage, spot);
    if (!failed) failed = usp_stage_forward(stage, 1);
    if (!failed) failed = usp_stage_backward(stage);
    if (!failed) failed = usp_stage_gather(stage, 1, whole);
    whole->refusal = refusal;
    usp_stage_close(stage);
    free(stage);
    return failed;
}

int usp_stage_run(usp_rank *rank, const usp_case *c, usp_whole *whole) {
    return usp_stage_run_spotted(rank, c, NULL, whole);
}

int usp_stage_share(usp_stage *stage, const void *mine, size_t bytes, void *all) {
    usp_sequence *sequence = NULL;
    int p, n;
    usp_mesh_axis(stage->mesh, USP_AXIS_SEQUENCE, &p, &n);
    usp_sequence_config config = {.struct_size = sizeof config, .layout = USP_LAYOUT_CONTIGUOUS, .tokens = n};
    usp_status status = usp_sequence_create(stage->mesh, &config, &sequence);
    if (status == USP_OK) status = usp_sequence_gather(sequence, 1, bytes, mine, all);
    usp_sequence_destroy(sequence);
    return fail(stage, "share", status);
}

/* ---- the layer in parts ------------------------------------------------------------------------------------------ */

/* One operand between own tokens of all heads and all tokens of own heads. */
typedef struct operand {
    usp_operand kind;
    usp_part part;
    usp_view view;
    usp_buffer memory;
} operand;

static usp_status make_operand(usp_stage *stage, usp_operand kind, usp_part part, operand *o) {
    usp_shard shard = {.struct_size = sizeof shard};
    usp_status status = usp_layer_get_shard(stage->layer, &shard);
    if (status != USP_OK) return status;
    const int heads[] = {shard.heads, shard.key_heads, shard.value_heads, shard.out_heads};
    int64_t tokens = part_of_keys(part) ? shard.key_tokens : shard.tokens;
    *o = (operand){.kind = kind, .part = part};
    o->view = usp_view_make(USP_BSHD, stage->c.dtype, stage->c.batch, tokens, heads[kind], part_dim(&stage->c, part));
    return usp_buffer_create(stage->rank->world, stage->rank->stream, usp_view_bytes(&o->view) + 16, &o->memory);
}

static usp_status exchange_in(usp_stage *stage, const operand *o) {
    usp_tensor tokens = part_tensor(stage, o->part), heads = usp_view_tensor(&o->view, &o->memory);
    size_t bytes = stage->sizes.exchange_workspace;
    return usp_layer_tokens_to_heads(stage->layer, o->kind, &tokens, &heads, end_of_workspace(stage, bytes), bytes,
                                     stage->rank->stream);
}

static usp_status exchange_out(usp_stage *stage, const operand *o) {
    usp_tensor tokens = part_tensor(stage, o->part), heads = usp_view_tensor(&o->view, &o->memory);
    size_t bytes = stage->sizes.exchange_workspace;
    return usp_layer_heads_to_tokens(stage->layer, o->kind, &heads, &tokens, end_of_workspace(stage, bytes), bytes,
                                     stage->rank->stream);
}

enum { OPERANDS = USP_PARTS };
static const usp_operand operand_kinds[OPERANDS] = {USP_QUERY, USP_KEY,   USP_VALUE, USP_OUT,
                                                    USP_OUT,   USP_QUERY, USP_KEY,   USP_VALUE};

static usp_status open_operands(usp_stage *stage, operand *all, int count) {
    usp_status status = USP_OK;
    for (int i = 0; i < count && status == USP_OK; i++)
        status = make_operand(stage, operand_kinds[i], (usp_part)i, &all[i]);
    return status;
}

static usp_tensor head_tensor(const operand *o) {
    return usp_view_tensor(&o->view, &o->memory);
}

static usp_status inner_forward(usp_stage *stage, const operand *all) {
    usp_forward f = usp_stage_forward_arguments(stage, 1);
    f.q = head_tensor(&all[USP_Q]);
    f.k = head_tensor(&all[USP_K]);
    f.v = head_tensor(&all[USP_V]);
    f.out = head_tensor(&all[USP_O]);
    size_t bytes = forward_bytes(stage, 1);
    return usp_layer_inner_forward(stage->layer, &f, end_of_workspace(stage, bytes), bytes, stage->rank->stream);
}

static usp_status inner_backward(usp_stage *stage, const operand *all) {
    usp_backward b = usp_stage_backward_arguments(stage);
    b.q = head_tensor(&all[USP_Q]);
    b.k = head_tensor(&all[USP_K]);
    b.v = head_tensor(&all[USP_V]);
    b.out = head_tensor(&all[USP_O]);
    b.dout = head_tensor(&all[USP_DOUT]);
    b.dq = head_tensor(&all[USP_DQ]);
    b.dk = head_tensor(&all[USP_DK]);
    b.dv = head_tensor(&all[USP_DV]);
    size_t bytes = stage->sizes.backward_workspace;
    return usp_layer_inner_backward(stage->layer, &b, end_of_workspace(stage, bytes), bytes, stage->rank->stream);
}

static int finish_operands(usp_stage *stage, operand *all, const char *what, usp_status status) {
    int failed = fail(stage, what, status);
    for (int i = 0; i < OPERANDS; i++) usp_buffer_destroy(&all[i].memory);
    return failed;
}

int usp_stage_forward_parts(usp_stage *stage) {
    operand all[OPERANDS] = {0};
    usp_status status = open_operands(stage, all, USP_O + 1);
    for (int i = USP_Q; i <= USP_V && status == USP_OK; i++) status = exchange_in(stage, &all[i]);
    if (status == USP_OK) status = inner_forward(stage, all);
    if (status == USP_OK) status = exchange_out(stage, &all[USP_O]);
    return finish_operands(stage, all, "forward in parts", status);
}

int usp_stage_backward_parts(usp_stage *stage) {
    operand all[OPERANDS] = {0};
    usp_status status = open_operands(stage, all, OPERANDS);
    for (int i = USP_Q; i <= USP_DOUT && status == USP_OK; i++) status = exchange_in(stage, &all[i]);
    if (status == USP_OK) status = inner_backward(stage, all);
    for (int i = USP_DQ; i <= USP_DV && status == USP_OK; i++) status = exchange_out(stage, &all[i]);
    return finish_operands(stage, all, "backward in parts", status);
}

int usp_stage_round_trip(usp_stage *stage) {
    static const usp_part from[] = {USP_Q, USP_K, USP_V, USP_DOUT}, to[] = {USP_DQ, USP_DK, USP_DV, USP_O};
    usp_status status = USP_OK;
    for (int i = 0; i < 4 && status == USP_OK; i++) {
        operand o = {0};
        status = make_operand(stage, operand_kinds[from[i]], from[i], &o);
        if (status == USP_OK) status = exchange_in(stage, &o);
        o.part = to[i];
        if (status == USP_OK) status = exchange_out(stage, &o);
        if (status == USP_OK) status = usp_world_synchronize(stage->rank->world, stage->rank->stream);
        usp_buffer_destroy(&o.memory);
    }
    return fail(stage, "round trip", status);
}
