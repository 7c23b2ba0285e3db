/* usp_run.c - one attention layer on tensors from .npy files: read, scatter, run, gather, write.
 * How anyone compares the library with another implementation; it measures nothing. */
#include "run_files.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- one rank -------------------------------------------------------------------------------------------------- */

typedef struct usp_part {
    usp_run *run;
    usp_rank *rank;
    usp_mesh *mesh;
    usp_sequence *sequence, *keys; /* keys: the same unless keys have a length of their own */
    usp_layer *layer;
    usp_sizes sizes;
    int position;                /* on the sequence axis */
    void *memory[USP_RUN_FILES]; /* on the device */
    void *workspace, *saved, *dropout_state;
} usp_part;

static usp_status choose_mesh(const usp_part *p, int *ulysses, int *ring) {
    int size = p->rank->size;
    *ulysses = p->run->options->ulysses;
    *ring = p->run->options->ring;
    if (*ulysses && *ring && (int64_t)*ulysses * *ring != size)
        return usp_tool_fail(&p->rank->error, USP_INVALID, "--ulysses %d x --ring %d is not the number of ranks, %d",
                             *ulysses, *ring, size);
    int given = *ring ? *ring : *ulysses ? *ulysses : 1;
    if (size % given)
        return usp_tool_fail(&p->rank->error, USP_INVALID, "--%s %d does not divide the number of ranks, %d",
                             *ring ? "ring" : "ulysses", given, size);
    if (!*ulysses) *ulysses = *ring ? size / *ring : 1;
    if (!*ring) *ring = size / *ulysses;
    return USP_OK;
}

static int64_t take_segments(const usp_rank_segments *all, int p, const usp_segment **mine) {
    if (!all->lists) return 0;
    *mine = all->segment + all->first[p];
    return all->first[p + 1] - all->first[p];
}

static usp_sequence_config sequence_config(const usp_part *p) {
    const usp_run_options *o = p->run->options;
    int64_t tokens = p->run->tokens, keys = p->run->key_tokens, apart = o->key_ends.count || o->key_segments.lists;
    usp_sequence_config config = {.struct_size = sizeof config,
                                  .layout = (usp_layout)o->layout,
                                  .tokens = tokens ? tokens : USP_NO_TOKENS,
                                  .key_tokens = keys == tokens && !apart ? 0 : keys,
                                  .documents = o->ends.count,
                                  .document_ends = o->ends.item,
                                  .key_document_ends = o->key_ends.item,
                                  .prefixes = o->prefixes.item,
                                  .parents = o->parents.item};
    config.segments = take_segments(&o->segments, p->position, &config.segment);
    config.key_segments = take_segments(&o->key_segments, p->position, &config.key_segment);
    return config;
}

/* Of keys alone: says only who has which. */
static usp_sequence_config key_config(const usp_part *p, const usp_sequence_config *whole) {
    return (usp_sequence_config){.struct_size = sizeof *whole,
                                 .layout = whole->layout,
                                 .tokens = whole->key_tokens,
                                 .documents = p->run->options->key_ends.count,
                                 .document_ends = whole->key_document_ends,
                                 .segments = whole->key_segments,
                                 .segment = whole->key_segment};
}

static usp_status check_lists(usp_part *p, const char *option, const usp_rank_segments *segments) {
    int size;
    USP_TRY(usp_mesh_axis(p->mesh, USP_AXIS_SEQUENCE, &p->position, &size));
    if (!segments->lists || segments->lists == size) return USP_OK;
    return usp_tool_fail(&p->rank->error, USP_INVALID, "--%s has %lld lists for %d ranks", option,
                         (long long)segments->lists, size);
}

static usp_status make_sequences(usp_part *p) {
    USP_TRY(check_lists(p, "segments", &p->run->options->segments));
    USP_TRY(check_lists(p, "key-segments", &p->run->options->key_segments));
    usp_sequence_config whole = sequence_config(p), keys = key_config(p, &whole);
    USP_TRY(usp_sequence_create(p->mesh, &whole, &p->sequence));
    if (whole.key_tokens) return usp_sequence_create(p->mesh, &keys, &p->keys);
    p->keys = p->sequence;
    return USP_OK;
}

/* Which files the layer's calls read or write, given or not. */
static int is_needed(const usp_run *run, int file) {
    switch (file) {
    case USP_RUN_LSE:
        return run->options->path[USP_RUN_LSE] || run->options->path[USP_RUN_DLSE];
    case USP_RUN_SINKS:
    case USP_RUN_DLSE:
    case USP_RUN_MAX_LOGIT:
        return run->options->path[file] != NULL;
    case USP_RUN_DSINKS:
        return run->options->path[USP_RUN_SINKS] && run->backward;
    case USP_RUN_DOUT:
    case USP_RUN_DQ:
    case USP_RUN_DK:
    case USP_RUN_DV:
        return run->backward;
    case USP_RUN_INITIAL_STATE:
        return run->initial_state;
    case USP_RUN_FINAL_STATE:
        return run->final_state;
    case USP_RUN_DINITIAL_STATE:
        return run->initial_state && run->backward;
    case USP_RUN_DFINAL_STATE:
        return run->final_state && run->backward;
    default:
        return 1;
    }
}

static usp_status make_layer(usp_part *p) {
    const usp_run *run = p->run;
    const usp_run_options *o = run->options;
    int linear = o->kind == USP_LINEAR;
    usp_layer_config config = o->layer;
    config.struct_size = sizeof config;
    config.attention = o->kind;
    config.mask = o->mask;
    config.dtype = run->dtype;
    config.batch = run->batch;
    config.heads = run->heads;
    config.kv_heads = run->key_heads;
    config.value_heads = linear ? run->value_heads : 0;
    config.head_dim = run->dim;
    config.value_dim = run->value_dim;
    config.return_lse = is_needed(run, USP_RUN_LSE);
    config.initial_state = run->initial_state;
    config.final_state = run->final_state;
    config.decay = run->log_decay;
    config.slopes = run->slopes;
    config.sinks = o->path[USP_RUN_SINKS] != NULL;
    config.dlse = o->path[USP_RUN_DLSE] != NULL;
    config.max_logit = o->path[USP_RUN_MAX_LOGIT] != NULL;
    USP_TRY(usp_layer_create(p->mesh, p->sequence, &config, &p->layer));
    p->sizes.struct_size = sizeof p->sizes;
    return usp_layer_get_sizes(p->layer, &p->sizes);
}

static int is_key_side(int file) {
    return file == USP_RUN_K || file == USP_RUN_V || file == USP_RUN_DK || file == USP_RUN_DV;
}

/* A tensor is [rows, tokens, token_bytes] of one of the sequences; lse has a row for every head. */
typedef struct usp_extent {
    const usp_sequence *sequence;
    int64_t rows, tokens, local;
    size_t token_bytes;
} usp_extent;

static usp_extent extent_of(const usp_part *p, int file) {
    int64_t shape[4];
    usp_run_shape(p->run, file, shape);
    size_t element = usp_run_element(p->run, file);
    const usp_sequence *sequence = is_key_side(file) ? p->keys : p->sequence;
    int64_t local = usp_sequence_local_tokens(sequence, p->position);
    if (usp_run_is_rows(file)) return (usp_extent){sequence, shape[0] * shape[1], shape[2], local, element};
    return (usp_extent){sequence, shape[0], shape[1], local, (size_t)(shape[2] * shape[3]) * element};
}

static size_t local_bytes(const usp_part *p, int file) {
    int64_t shape[4];
    if (!usp_run_is_whole(file)) {
        usp_extent x = extent_of(p, file);
        return (size_t)x.rows * (size_t)x.local * x.token_bytes;
    }
    usp_run_shape(p->run, file, shape);
    return (size_t)shape[0] * (size_t)shape[1] * (size_t)shape[2] * (size_t)shape[3] * sizeof(float);
}

static usp_status copy(usp_part *p, void *to, const void *from, size_t bytes) {
    USP_TRY(usp_world_copy(p->rank->world, to, from, bytes, p->rank->stream));
    return usp_world_synchronize(p->rank->world, p->rank->stream);
}

static usp_status allocate(usp_part *p, size_t bytes, void **memory) {
    return usp_world_alloc(p->rank->world, bytes ? bytes : 1, memory);
}

/* States that are needed but not given are zero. */
static usp_status upload(usp_part *p, int file) {
    size_t bytes = local_bytes(p, file);
    usp_extent x = extent_of(p, file);
    const void *whole = p->run->file[file].data;
    USP_TRY(allocate(p, bytes, &p->memory[file]));
    void *host = usp_tool_alloc(&p->rank->error, bytes, 1);
    if (!host) return USP_NO_MEMORY;
    usp_status status = USP_OK;
    if (!usp_run_is_whole(file))
        status = usp_sequence_scatter(x.sequence, x.rows, x.token_bytes, whole, host);
    else if (whole)
        memcpy(host, whole, bytes);
    if (status == USP_OK) status = copy(p, p->memory[file], host, bytes);
    free(host);
    return status;
}

/* Forward saves if backward is run too. */
static size_t forward_bytes(const usp_part *p) {
    return p->run->backward ? p->sizes.forward_saving_workspace : p->sizes.forward_workspace;
}

static usp_status upload_dropout_state(usp_part *p) {
    const usp_run_options *o = p->run->options;
    if (!(o->layer.dropout > 0)) return USP_OK;
    USP_TRY(allocate(p, sizeof o->dropout_state, &p->dropout_state));
    return copy(p, p->dropout_state, o->dropout_state, sizeof o->dropout_state);
}

static usp_status allocate_all(usp_part *p) {
    size_t forward = forward_bytes(p), backward = p->run->backward ? p->sizes.backward_workspace : 0;
    for (int i = 0; i < USP_RUN_FILES; i++)
        if (is_needed(p->run, i))
            USP_TRY(i < USP_RUN_INPUTS ? upload(p, i) : allocate(p, local_bytes(p, i), &p->memory[i]));
    USP_TRY(allocate(p, forward > backward ? forward : backward, &p->workspace));
    USP_TRY(upload_dropout_state(p));
    return p->run->backward ? allocate(p, p->sizes.saved, &p->saved) : USP_OK;
}

/* Dense [batch, local tokens, heads, dim]. */
static usp_tensor view(const usp_part *p, int file) {
    int64_t shape[4], row;
    usp_run_shape(p->run, file, shape);
    row = shape[2] * shape[3];
    return (usp_tensor){.data = p->memory[file],
                        .stride_batch = row * extent_of(p, file).local,
                        .stride_token = row,
                        .stride_head = shape[3]};
}

static usp_forward forward_arguments(const usp_part *p) {
    return (usp_forward){.struct_size = sizeof(usp_forward),
                         .q = view(p, USP_RUN_Q),
                         .k = view(p, USP_RUN_K),
                         .v = view(p, USP_RUN_V),
                         .out = view(p, USP_RUN_OUT),
                         .lse = p->memory[USP_RUN_LSE],
                         .initial_state = p->memory[USP_RUN_INITIAL_STATE],
                         .final_state = p->memory[USP_RUN_FINAL_STATE],
                         .saved = p->saved,
                         .sinks = p->memory[USP_RUN_SINKS],
                         .max_logit = p->memory[USP_RUN_MAX_LOGIT],
                         .dropout_state = p->dropout_state};
}

static usp_backward backward_arguments(const usp_part *p) {
    return (usp_backward){.struct_size = sizeof(usp_backward),
                          .q = view(p, USP_RUN_Q),
                          .k = view(p, USP_RUN_K),
                          .v = view(p, USP_RUN_V),
                          .out = view(p, USP_RUN_OUT),
                          .dout = view(p, USP_RUN_DOUT),
                          .dq = view(p, USP_RUN_DQ),
                          .dk = view(p, USP_RUN_DK),
                          .dv = view(p, USP_RUN_DV),
                          .initial_state = p->memory[USP_RUN_INITIAL_STATE],
                          .dfinal_state = p->memory[USP_RUN_DFINAL_STATE],
                          .dinitial_state = p->memory[USP_RUN_DINITIAL_STATE],
                          .saved = p->saved,
                          .sinks = p->memory[USP_RUN_SINKS],
                          .dsinks = p->memory[USP_RUN_DSINKS],
                          .dlse = p->memory[USP_RUN_DLSE],
                          .dropout_state = p->dropout_state};
}

static usp_status run_layer(usp_part *p) {
    size_t forward = forward_bytes(p), backward = p->sizes.backward_workspace;
    usp_forward first = forward_arguments(p);
    USP_TRY(usp_layer_forward(p->layer, &first, p->workspace, forward, p->rank->stream));
    if (p->run->backward) {
        usp_backward second = backward_arguments(p);
        USP_TRY(usp_layer_backward(p->layer, &second, p->workspace, backward, p->rank->stream));
    }
    return usp_world_synchronize(p->rank->world, p->rank->stream);
}

/* Every rank takes part in the gather; rank 0 keeps what it gives. */
static usp_status gather(usp_part *p, int file, const void *host) {
    usp_extent x = extent_of(p, file);
    if (p->rank->rank == 0) return usp_sequence_gather(x.sequence, x.rows, x.token_bytes, host, p->run->result[file]);
    void *whole = usp_tool_alloc(&p->rank->error, (size_t)x.rows * (size_t)x.tokens, x.token_bytes);
    if (!whole) return USP_NO_MEMORY;
    usp_status status = usp_sequence_gather(x.sequence, x.rows, x.token_bytes, host, whole);
    free(whole);
    return status;
}

static usp_status download(usp_part *p, int file) {
    size_t bytes = local_bytes(p, file);
    void *host = usp_tool_alloc(&p->rank->error, bytes, 1);
    if (!host) return USP_NO_MEMORY;
    usp_status status = copy(p, host, p->memory[file], bytes);
    if (status == USP_OK && !usp_run_is_whole(file))
        status = gather(p, file, host);
    else if (status == USP_OK && p->rank->rank == 0)
        memcpy(p->run->result[file], host, bytes);
    free(host);
    return status;
}

static void close_part(usp_part *p) {
    usp_world_free(p->rank->world, p->saved);
    usp_world_free(p->rank->world, p->workspace);
    usp_world_free(p->rank->world, p->dropout_state);
    for (int i = 0; i < USP_RUN_FILES; i++) usp_world_free(p->rank->world, p->memory[i]);
    usp_layer_destroy(p->layer);
    if (p->keys != p->sequence) usp_sequence_destroy(p->keys);
    usp_sequence_destroy(p->sequence);
    usp_mesh_destroy(p->mesh);
}

static void describe(const usp_part *p) {
    char text[4096];
    if (p->rank->rank) return;
    if (p->run->converted[0]) fprintf(stderr, "usp_run: converted:%s\n", p->run->converted);
    if (!p->run->options->verbose) return;
    usp_layer_describe(p->layer, text, sizeof text);
    fprintf(stderr, "%s\n", text);
}

static usp_status run_part(usp_part *p) {
    int ulysses, ring;
    USP_TRY(choose_mesh(p, &ulysses, &ring));
    USP_TRY(usp_mesh_create(p->rank->world, ulysses, ring, &p->mesh));
    USP_TRY(make_sequences(p));
    USP_TRY(make_layer(p));
    describe(p);
    USP_TRY(usp_rank_agree(p->rank, allocate_all(p)));
    USP_TRY(run_layer(p));
    for (int i = USP_RUN_OUT; i < USP_RUN_FILES; i++)
        if (p->run->options->path[i]) USP_TRY(download(p, i));
    return USP_OK;
}

static usp_status run_rank(usp_rank *rank, void *user) {
    usp_run *run = user;
    usp_part part = {.run = run, .rank = rank};
    if (rank->rank == 0) run->root = 1;
    usp_status status = run_part(&part);
    if (status != USP_OK && !rank->error.text[0]) usp_tool_fail(&rank->error, status, "%s", usp_last_error());
    close_part(&part);
    return status;
}

/* ---- all ------------------------------------------------------------------------------------------------------- */

int main(int argc, char **argv) {
    usp_run_options options;
    usp_tool_error error = {""};
    usp_run run;
    usp_tool_guard_output(1);
    usp_run_options_parse(&options, argc, argv);
    usp_status status = usp_run_read(&run, &options, &error);
    if (status == USP_OK) status = usp_ranks_run(&options.ranks, run_rank, &run, &error);
    if (status == USP_OK) status = usp_run_write(&run, &error);
    if (status != USP_OK) fprintf(stderr, "usp_run: %s\n", error.text);
    usp_run_free(&run);
    usp_run_options_free(&options);
    return status == USP_OK ? 0 : 1;
}
