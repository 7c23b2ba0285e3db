/* usp_run.c - one attention layer on tensors from .npy files: read, scatter, run, gather, write.
 * How anyone compares the library with another implementation; it measures nothing. */
#include "npy.h"
#include "run_options.h"
#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MOST_DIM = 1 << 16 }; /* of a head: keeps the size of a state far from overflow */

/* The whole problem, the same for all ranks of this process. */
typedef struct usp_run {
    const usp_run_options *options;
    usp_npy file[USP_RUN_INPUTS];
    void *result[USP_RUN_FILES]; /* whole tensors, written by rank 0 */
    usp_dtype dtype;
    int batch, heads, key_heads, value_heads, out_heads, dim, value_dim;
    int64_t tokens, key_tokens;
    float *log_decay; /* [out_heads] or NULL */
    int backward, initial_state, final_state;
    int root; /* rank 0 is in this process */
} usp_run;

/* ---- files to shapes ------------------------------------------------------------------------------------------- */

static usp_status read_files(usp_run *run, usp_tool_error *error) {
    for (int i = 0; i < USP_RUN_INPUTS; i++)
        if (run->options->path[i]) USP_TRY(usp_npy_read(run->options->path[i], &run->file[i], error));
    return USP_OK;
}

static int is_state(int file) {
    return file == USP_RUN_INITIAL_STATE || file == USP_RUN_DFINAL_STATE || file == USP_RUN_FINAL_STATE ||
           file == USP_RUN_DINITIAL_STATE;
}

static usp_npy_type file_type(const usp_run *run, int file) {
    static const usp_npy_type types[] = {[USP_F32] = USP_NPY_F32, [USP_F16] = USP_NPY_F16, [USP_BF16] = USP_NPY_U16};
    return is_state(file) || file == USP_RUN_LSE ? USP_NPY_F32 : types[run->dtype];
}

static usp_status choose_dtype(usp_run *run, usp_tool_error *error) {
    const usp_npy *q = &run->file[USP_RUN_Q];
    run->dtype = q->type == USP_NPY_F16 ? USP_F16 : USP_F32;
    if (run->options->dtype >= 0)
        run->dtype = (usp_dtype)run->options->dtype;
    else if (q->type == USP_NPY_U16)
        return usp_tool_fail(error, USP_INVALID, "%s: holds uint16; say --dtype bf16 if that is what it means",
                             run->options->path[USP_RUN_Q]);
    return USP_OK;
}

/* All extents of heads, batch and dims must fit an int, and be there at all. */
static usp_status check_extents(const usp_run *run, int file, usp_tool_error *error) {
    const usp_npy *array = &run->file[file];
    usp_npy_type type = file_type(run, file);
    const char *path = run->options->path[file];
    if (array->type != type)
        return usp_tool_fail(error, USP_INVALID, "%s: holds %s, but %s is needed", path, usp_npy_type_name(array->type),
                             usp_npy_type_name(type));
    if (array->dims != 4) return usp_tool_fail(error, USP_INVALID, "%s: has %d dimensions, not 4", path, array->dims);
    for (int i = 0; i < 4; i++)
        if (array->shape[i] < 1 || array->shape[i] > INT_MAX)
            return usp_tool_fail(error, USP_INVALID, "%s: extent %d is %lld, not from 1 to 2^31 - 1", path, i,
                                 (long long)array->shape[i]);
    if (array->shape[3] > MOST_DIM)
        return usp_tool_fail(error, USP_INVALID, "%s: its last extent is %lld, more than %d", path,
                             (long long)array->shape[3], MOST_DIM);
    return USP_OK;
}

static usp_status check_shape(const usp_run *run, int file, const int64_t wanted[4], usp_tool_error *error) {
    const int64_t *shape = run->file[file].shape;
    if (!run->options->path[file] || !memcmp(shape, wanted, 4 * sizeof *shape)) return USP_OK;
    return usp_tool_fail(error, USP_INVALID,
                         "%s: has shape [%lld, %lld, %lld, %lld], but [%lld, %lld, %lld, %lld] is needed for --%s",
                         run->options->path[file], (long long)shape[0], (long long)shape[1], (long long)shape[2],
                         (long long)shape[3], (long long)wanted[0], (long long)wanted[1], (long long)wanted[2],
                         (long long)wanted[3], usp_run_file_name(file));
}

static int larger(int a, int b) {
    return a > b ? a : b;
}

static void take_extents(usp_run *run) {
    const int64_t *q = run->file[USP_RUN_Q].shape, *k = run->file[USP_RUN_K].shape, *v = run->file[USP_RUN_V].shape;
    run->batch = (int)q[0];
    run->tokens = q[1];
    run->heads = (int)q[2];
    run->dim = (int)q[3];
    run->key_tokens = k[1];
    run->key_heads = (int)k[2];
    run->value_heads = (int)v[2];
    run->value_dim = (int)v[3];
    run->out_heads = run->heads;
    if (run->options->kind == USP_LINEAR) run->out_heads = larger(run->heads, larger(run->key_heads, run->value_heads));
}

static void shape_of(const usp_run *run, int file, int64_t shape[4]) {
    const int64_t b = run->batch, s = run->tokens, t = run->key_tokens, d = run->dim, e = run->value_dim;
    const int64_t state[4] = {b, run->out_heads, d, e}, q[4] = {b, s, run->heads, d}, k[4] = {b, t, run->key_heads, d},
                  v[4] = {b, t, run->value_heads, e}, out[4] = {b, s, run->out_heads, e},
                  lse[4] = {b, run->heads, s, 1};
    const int64_t *chosen = is_state(file)                            ? state
                            : file == USP_RUN_Q || file == USP_RUN_DQ ? q
                            : file == USP_RUN_K || file == USP_RUN_DK ? k
                            : file == USP_RUN_V || file == USP_RUN_DV ? v
                            : file == USP_RUN_LSE                     ? lse
                                                                      : out;
    memcpy(shape, chosen, 4 * sizeof *shape);
}

static usp_status check_files(usp_run *run, usp_tool_error *error) {
    USP_TRY(choose_dtype(run, error));
    for (int i = 0; i < USP_RUN_INPUTS; i++)
        if (run->options->path[i]) USP_TRY(check_extents(run, i, error));
    take_extents(run);
    for (int i = 0; i < USP_RUN_INPUTS; i++) {
        int64_t wanted[4];
        shape_of(run, i, wanted);
        USP_TRY(check_shape(run, i, wanted, error));
    }
    if (run->options->kind == USP_SOFTMAX && run->value_heads != run->key_heads)
        return usp_tool_fail(error, USP_INVALID, "%s: has %d heads, but the keys have %d",
                             run->options->path[USP_RUN_V], run->value_heads, run->key_heads);
    return USP_OK;
}

static usp_status check_documents(const usp_run *run, usp_tool_error *error) {
    const usp_run_options *o = run->options;
    int64_t end = o->documents ? o->document_end[o->documents - 1] : run->tokens;
    if (end == run->tokens) return USP_OK;
    return usp_tool_fail(error, USP_INVALID, "--documents ends at %lld, but there are %lld tokens", (long long)end,
                         (long long)run->tokens);
}

static usp_status make_decay(usp_run *run, usp_tool_error *error) {
    const usp_run_options *o = run->options;
    if (!o->alibi && !o->decays) return USP_OK;
    if (o->decays > 1 && o->decays != run->out_heads)
        return usp_tool_fail(error, USP_INVALID, "--decay has %d numbers for %d heads", o->decays, run->out_heads);
    run->log_decay = usp_tool_alloc(error, (size_t)run->out_heads, sizeof *run->log_decay);
    if (!run->log_decay) return USP_NO_MEMORY;
    if (o->alibi)
        usp_decay_slopes(run->out_heads, run->log_decay);
    else
        for (int h = 0; h < run->out_heads; h++) run->log_decay[h] = logf(o->decay[o->decays > 1 ? h : 0]);
    return USP_OK;
}

/* Results of this process; their shapes are within the inputs' memory, so products cannot overflow but for states. */
static usp_status allocate_results(usp_run *run, usp_tool_error *error) {
    for (int i = USP_RUN_OUT; i < USP_RUN_FILES; i++) {
        int64_t shape[4];
        shape_of(run, i, shape);
        size_t row = (size_t)(shape[2] * shape[3]) * usp_npy_type_size(file_type(run, i));
        run->result[i] = run->options->path[i] ? usp_tool_alloc(error, (size_t)(shape[0] * shape[1]), row) : NULL;
        if (run->options->path[i] && !run->result[i]) return USP_NO_MEMORY;
    }
    return USP_OK;
}

static usp_status prepare(usp_run *run, usp_tool_error *error) {
    const usp_run_options *o = run->options;
    USP_TRY(read_files(run, error));
    USP_TRY(check_files(run, error));
    USP_TRY(check_documents(run, error));
    USP_TRY(make_decay(run, error));
    run->backward = o->path[USP_RUN_DOUT] != NULL;
    run->initial_state = o->path[USP_RUN_INITIAL_STATE] || o->path[USP_RUN_DINITIAL_STATE];
    run->final_state = o->path[USP_RUN_FINAL_STATE] || o->path[USP_RUN_DFINAL_STATE];
    return allocate_results(run, error);
}

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
    void *workspace, *saved;
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

static usp_status make_sequence(usp_part *p, int64_t tokens, int64_t key_tokens, usp_sequence **sequence) {
    const usp_run_options *o = p->run->options;
    usp_sequence_config config = {.struct_size = sizeof config,
                                  .layout = (usp_layout)o->layout,
                                  .tokens = tokens,
                                  .key_tokens = key_tokens,
                                  .documents = o->documents,
                                  .document_ends = o->document_end};
    if (o->lists) {
        config.segments = o->first[p->position + 1] - o->first[p->position];
        config.segment = o->segment + o->first[p->position];
    }
    return usp_sequence_create(p->mesh, &config, sequence);
}

static usp_status make_sequences(usp_part *p) {
    int same = p->run->key_tokens == p->run->tokens;
    int64_t lists = p->run->options->lists;
    int size;
    USP_TRY(usp_mesh_axis(p->mesh, USP_AXIS_SEQUENCE, &p->position, &size));
    if (lists && lists != size)
        return usp_tool_fail(&p->rank->error, USP_INVALID, "--segments has %lld lists for %d ranks", (long long)lists,
                             size);
    USP_TRY(make_sequence(p, p->run->tokens, same ? 0 : p->run->key_tokens, &p->sequence));
    if (!same) return make_sequence(p, p->run->key_tokens, 0, &p->keys);
    p->keys = p->sequence;
    return USP_OK;
}

static usp_status make_layer(usp_part *p) {
    const usp_run *run = p->run;
    const usp_run_options *o = run->options;
    int linear = o->kind == USP_LINEAR;
    usp_layer_config config = {.struct_size = sizeof config,
                               .attention = o->kind,
                               .mask = o->mask,
                               .dtype = run->dtype,
                               .batch = run->batch,
                               .heads = run->heads,
                               .kv_heads = run->key_heads,
                               .value_heads = linear ? run->value_heads : 0,
                               .head_dim = run->dim,
                               .value_dim = run->value_dim,
                               .scale = (float)o->scale,
                               .return_lse = o->path[USP_RUN_LSE] != NULL,
                               .deterministic = o->deterministic,
                               .state_exchange = o->state_exchange,
                               .recompute_state = o->recompute_state,
                               .initial_state = run->initial_state,
                               .final_state = run->final_state,
                               .decay = run->log_decay};
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
    shape_of(p->run, file, shape);
    size_t element = usp_npy_type_size(file_type(p->run, file));
    const usp_sequence *sequence = is_key_side(file) ? p->keys : p->sequence;
    int64_t local = usp_sequence_local_tokens(sequence, p->position);
    if (file == USP_RUN_LSE) return (usp_extent){sequence, shape[0] * shape[1], shape[2], local, element};
    return (usp_extent){sequence, shape[0], shape[1], local, (size_t)(shape[2] * shape[3]) * element};
}

static size_t state_bytes(const usp_run *run) {
    return (size_t)run->batch * (size_t)run->out_heads * (size_t)run->dim * (size_t)run->value_dim * sizeof(float);
}

static size_t local_bytes(const usp_part *p, int file) {
    usp_extent x = extent_of(p, file);
    return is_state(file) ? state_bytes(p->run) : (size_t)x.rows * (size_t)x.local * x.token_bytes;
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
    if (!is_state(file))
        status = usp_sequence_scatter(x.sequence, x.rows, x.token_bytes, whole, host);
    else if (whole)
        memcpy(host, whole, bytes);
    if (status == USP_OK) status = copy(p, p->memory[file], host, bytes);
    free(host);
    return status;
}

/* Which files the layer's calls read or write, given or not. */
static int is_needed(const usp_run *run, int file) {
    switch (file) {
    case USP_RUN_LSE:
        return run->options->path[USP_RUN_LSE] != NULL;
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

/* Forward saves if backward is run too. */
static size_t forward_bytes(const usp_part *p) {
    return p->run->backward ? p->sizes.forward_saving_workspace : p->sizes.forward_workspace;
}

static usp_status allocate_all(usp_part *p) {
    size_t forward = forward_bytes(p), backward = p->run->backward ? p->sizes.backward_workspace : 0;
    for (int i = 0; i < USP_RUN_FILES; i++)
        if (is_needed(p->run, i))
            USP_TRY(i < USP_RUN_INPUTS ? upload(p, i) : allocate(p, local_bytes(p, i), &p->memory[i]));
    USP_TRY(allocate(p, forward > backward ? forward : backward, &p->workspace));
    return p->run->backward ? allocate(p, p->sizes.saved, &p->saved) : USP_OK;
}

/* Dense [batch, local tokens, heads, dim]. */
static usp_tensor view(const usp_part *p, int file) {
    int64_t shape[4], row;
    shape_of(p->run, file, shape);
    row = shape[2] * shape[3];
    return (usp_tensor){.data = p->memory[file],
                        .stride_batch = row * extent_of(p, file).local,
                        .stride_token = row,
                        .stride_head = shape[3]};
}

static usp_status run_layer(usp_part *p) {
    size_t forward = forward_bytes(p), backward = p->sizes.backward_workspace;
    usp_forward first = {.struct_size = sizeof first,
                         .q = view(p, USP_RUN_Q),
                         .k = view(p, USP_RUN_K),
                         .v = view(p, USP_RUN_V),
                         .out = view(p, USP_RUN_OUT),
                         .lse = p->memory[USP_RUN_LSE],
                         .initial_state = p->memory[USP_RUN_INITIAL_STATE],
                         .final_state = p->memory[USP_RUN_FINAL_STATE],
                         .saved = p->saved};
    usp_backward second = {.struct_size = sizeof second,
                           .q = first.q,
                           .k = first.k,
                           .v = first.v,
                           .out = first.out,
                           .dout = view(p, USP_RUN_DOUT),
                           .dq = view(p, USP_RUN_DQ),
                           .dk = view(p, USP_RUN_DK),
                           .dv = view(p, USP_RUN_DV),
                           .initial_state = p->memory[USP_RUN_INITIAL_STATE],
                           .dfinal_state = p->memory[USP_RUN_DFINAL_STATE],
                           .dinitial_state = p->memory[USP_RUN_DINITIAL_STATE],
                           .saved = p->saved};
    USP_TRY(usp_layer_forward(p->layer, &first, p->workspace, forward, p->rank->stream));
    if (p->run->backward) USP_TRY(usp_layer_backward(p->layer, &second, p->workspace, backward, p->rank->stream));
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
    if (status == USP_OK && !is_state(file))
        status = gather(p, file, host);
    else if (status == USP_OK && p->rank->rank == 0)
        memcpy(p->run->result[file], host, bytes);
    free(host);
    return status;
}

static void close_part(usp_part *p) {
    usp_world_free(p->rank->world, p->saved);
    usp_world_free(p->rank->world, p->workspace);
    for (int i = 0; i < USP_RUN_FILES; i++) usp_world_free(p->rank->world, p->memory[i]);
    usp_layer_destroy(p->layer);
    if (p->keys != p->sequence) usp_sequence_destroy(p->keys);
    usp_sequence_destroy(p->sequence);
    usp_mesh_destroy(p->mesh);
}

static void describe(const usp_part *p) {
    char text[4096];
    if (!p->run->options->verbose || p->rank->rank) return;
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

static usp_status write_files(const usp_run *run, usp_tool_error *error) {
    for (int i = USP_RUN_OUT; i < USP_RUN_FILES && run->root; i++) {
        int64_t shape[4];
        shape_of(run, i, shape);
        if (run->options->path[i])
            USP_TRY(usp_npy_write(run->options->path[i], file_type(run, i), i == USP_RUN_LSE ? 3 : 4, shape,
                                  run->result[i], error));
    }
    return USP_OK;
}

static void free_run(usp_run *run) {
    for (int i = 0; i < USP_RUN_INPUTS; i++) usp_npy_free(&run->file[i]);
    for (int i = 0; i < USP_RUN_FILES; i++) free(run->result[i]);
    free(run->log_decay);
}

int main(int argc, char **argv) {
    usp_run_options options;
    usp_tool_error error = {""};
    usp_tool_guard_output(1);
    usp_run_options_parse(&options, argc, argv);
    usp_run run = {.options = &options};
    usp_status status = prepare(&run, &error);
    if (status == USP_OK) status = usp_ranks_run(&options.ranks, run_rank, &run, &error);
    if (status == USP_OK) status = write_files(&run, &error);
    if (status != USP_OK) fprintf(stderr, "usp_run: %s\n", error.text);
    free_run(&run);
    usp_run_options_free(&options);
    return status == USP_OK ? 0 : 1;
}
