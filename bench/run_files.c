/* run_files.c - what the files say and whether it fits together.
 * Sentences speak of files as they are, shapes of what a layer takes. */
#include "run_files.h"
#include <limits.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { MOST_DIM = 1 << 16 }; /* of a head: keeps the size of a state far from overflow */

int usp_run_is_state(int file) {
    return file == USP_RUN_INITIAL_STATE || file == USP_RUN_DFINAL_STATE || file == USP_RUN_FINAL_STATE ||
           file == USP_RUN_DINITIAL_STATE;
}

/* ---- read ------------------------------------------------------------------------------------------------------ */

static usp_status choose_dtype(usp_run *run, usp_tool_error *error) {
    static const usp_dtype dtypes[USP_NPY_TYPES] = {[USP_NPY_F32] = USP_F32,
                                                    [USP_NPY_F16] = USP_F16,
                                                    [USP_NPY_U16] = USP_BF16,
                                                    [USP_NPY_F64] = USP_F32,
                                                    [USP_NPY_V2] = USP_BF16};
    run->type = run->file[USP_RUN_Q].type;
    run->dtype = run->options->dtype >= 0 ? (usp_dtype)run->options->dtype : dtypes[run->type];
    if (run->options->dtype >= 0 || run->type != USP_NPY_U16) return USP_OK;
    return usp_tool_fail(error, USP_INVALID, "%s: holds uint16; say --dtype bf16 if that is what it means",
                         run->options->path[USP_RUN_Q]);
}

/* The types that hold a dtype's numbers. */
static usp_status check_type(const usp_run *run, int file, usp_tool_error *error) {
    static const char *const needed[] = {
        [USP_F32] = "float32 or float64", [USP_F16] = "float16", [USP_BF16] = "bf16 (V2 or uint16)"};
    usp_npy_type type = run->file[file].type;
    usp_dtype dtype = usp_run_is_state(file) ? USP_F32 : run->dtype;
    int good = dtype == USP_F32   ? type == USP_NPY_F32 || type == USP_NPY_F64
               : dtype == USP_F16 ? type == USP_NPY_F16
                                  : type == USP_NPY_U16 || type == USP_NPY_V2;
    if (good) return USP_OK;
    return usp_tool_fail(error, USP_INVALID, "%s: holds %s, but %s is needed", run->options->path[file],
                         usp_npy_type_name(type), needed[dtype]);
}

/* "--q big-endian float64 in Fortran order", after what is noted already. */
static void note_conversion(usp_run *run, int file) {
    const usp_npy *array = &run->file[file];
    size_t used = strlen(run->converted);
    if (!array->swapped && !array->fortran && array->type != USP_NPY_F64) return;
    snprintf(run->converted + used, sizeof run->converted - used, "%s --%s %s%s%s", used ? "," : "",
             usp_run_file_name(file), array->swapped ? "big-endian " : "", usp_npy_type_name(array->type),
             array->fortran ? " in Fortran order" : "");
}

static usp_order order_of(const usp_run *run, int file) {
    return usp_run_is_state(file) || file == USP_RUN_LSE ? USP_ORDER_BSHD : run->options->order;
}

static usp_status read_file(usp_run *run, int file, usp_tool_error *error) {
    const char *path = run->options->path[file];
    usp_npy *array = &run->file[file];
    usp_tool_error why = {""};
    USP_TRY(usp_npy_read(path, array, error));
    if (file == USP_RUN_Q) USP_TRY(choose_dtype(run, error));
    USP_TRY(check_type(run, file, error));
    if (array->dims != 4) return usp_tool_fail(error, USP_INVALID, "%s: has %d dimensions, not 4", path, array->dims);
    note_conversion(run, file);
    usp_status status = usp_tensor_arrange(array, order_of(run, file), &why);
    return status == USP_OK ? status : usp_tool_fail(error, status, "%s: %.900s", path, why.text);
}

/* ---- shapes ---------------------------------------------------------------------------------------------------- */

/* All extents of heads, batch and dims must fit an int, and be there at all; there may be no tokens. */
static usp_status check_extents(const usp_run *run, int file, usp_tool_error *error) {
    static const char *const names[2][4] = {{"batch", "number of tokens", "number of heads", "head dim"},
                                            {"batch", "number of heads", "head dim", "value dim"}};
    int state = usp_run_is_state(file);
    for (int i = 0; i < 4; i++) {
        int tokens = !state && i == 1, low = tokens ? 0 : 1, high = i == 3 ? MOST_DIM : INT_MAX;
        int64_t extent = run->file[file].shape[i];
        if (extent < low || extent > high)
            return usp_tool_fail(error, USP_INVALID, "%s: its %s is %lld, not from %d to %d", run->options->path[file],
                                 names[state][i], (long long)extent, low, high);
    }
    return USP_OK;
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

void usp_run_shape(const usp_run *run, int file, int64_t shape[4]) {
    const int64_t b = run->batch, s = run->tokens, t = run->key_tokens, d = run->dim, e = run->value_dim;
    const int64_t state[4] = {b, run->out_heads, d, e}, q[4] = {b, s, run->heads, d}, k[4] = {b, t, run->key_heads, d},
                  v[4] = {b, t, run->value_heads, e}, out[4] = {b, s, run->out_heads, e},
                  lse[4] = {b, run->heads, s, 1};
    const int64_t *chosen = usp_run_is_state(file)                    ? state
                            : file == USP_RUN_Q || file == USP_RUN_DQ ? q
                            : file == USP_RUN_K || file == USP_RUN_DK ? k
                            : file == USP_RUN_V || file == USP_RUN_DV ? v
                            : file == USP_RUN_LSE                     ? lse
                                                                      : out;
    memcpy(shape, chosen, 4 * sizeof *shape);
}

static usp_status check_shape(const usp_run *run, int file, usp_tool_error *error) {
    int64_t shape[4], wanted[4], needed[4];
    usp_run_shape(run, file, needed);
    usp_order_shape(order_of(run, file), run->file[file].shape, shape); /* as they are in files */
    usp_order_shape(order_of(run, file), needed, wanted);
    if (!memcmp(shape, wanted, sizeof shape)) return USP_OK;
    return usp_tool_fail(error, USP_INVALID,
                         "%s: has shape [%lld, %lld, %lld, %lld], but [%lld, %lld, %lld, %lld] is needed for --%s",
                         run->options->path[file], (long long)shape[0], (long long)shape[1], (long long)shape[2],
                         (long long)shape[3], (long long)wanted[0], (long long)wanted[1], (long long)wanted[2],
                         (long long)wanted[3], usp_run_file_name(file));
}

static usp_status check_shapes(usp_run *run, usp_tool_error *error) {
    const usp_run_options *o = run->options;
    for (int i = 0; i < USP_RUN_INPUTS; i++)
        if (o->path[i]) USP_TRY(check_extents(run, i, error));
    take_extents(run);
    for (int i = 0; i < USP_RUN_INPUTS; i++)
        if (o->path[i]) USP_TRY(check_shape(run, i, error));
    if (o->kind == USP_SOFTMAX && run->value_heads != run->key_heads)
        return usp_tool_fail(error, USP_INVALID, "%s: has %d heads, but the keys have %d", o->path[USP_RUN_V],
                             run->value_heads, run->key_heads);
    if (run->tokens && !run->key_tokens)
        return usp_tool_fail(error, USP_INVALID, "%s: has no tokens, but the queries have %lld", o->path[USP_RUN_K],
                             (long long)run->tokens);
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

/* ---- results --------------------------------------------------------------------------------------------------- */

/* While it is worked on. */
static usp_npy_type work_type(const usp_run *run, int file) {
    static const usp_npy_type types[] = {[USP_F32] = USP_NPY_F32, [USP_F16] = USP_NPY_F16, [USP_BF16] = USP_NPY_V2};
    return usp_run_is_state(file) || file == USP_RUN_LSE ? USP_NPY_F32 : types[run->dtype];
}

/* In the result's file: what was given; float32 beside types that have no room for it. */
static usp_npy_type result_type(const usp_run *run, int file) {
    return work_type(run, file) == USP_NPY_F32 && run->type != USP_NPY_F64 ? USP_NPY_F32 : run->type;
}

size_t usp_run_element(const usp_run *run, int file) {
    return usp_npy_type_size(work_type(run, file));
}

/* Their shapes are within the inputs' memory, so products cannot overflow but for states. */
static usp_status allocate_results(usp_run *run, usp_tool_error *error) {
    for (int i = USP_RUN_OUT; i < USP_RUN_FILES; i++) {
        int64_t shape[4];
        usp_run_shape(run, i, shape);
        size_t row = (size_t)(shape[2] * shape[3]) * usp_run_element(run, i);
        run->result[i] = run->options->path[i] ? usp_tool_alloc(error, (size_t)(shape[0] * shape[1]), row) : NULL;
        if (run->options->path[i] && !run->result[i]) return USP_NO_MEMORY;
    }
    return USP_OK;
}

static usp_status write_result(const usp_run *run, int file, usp_tool_error *error) {
    usp_npy tensor = {.type = work_type(run, file), .dims = 4, .data = run->result[file]};
    usp_run_shape(run, file, tensor.shape);
    tensor.bytes = usp_run_element(run, file);
    for (int i = 0; i < 4; i++) tensor.bytes *= (size_t)tensor.shape[i];
    if (file == USP_RUN_LSE) tensor.dims = 3;
    return usp_tensor_write(run->options->path[file], order_of(run, file), result_type(run, file), &tensor, error);
}

usp_status usp_run_write(const usp_run *run, usp_tool_error *error) {
    for (int i = USP_RUN_OUT; i < USP_RUN_FILES && run->root; i++)
        if (run->options->path[i]) USP_TRY(write_result(run, i, error));
    return USP_OK;
}

/* ---- all ------------------------------------------------------------------------------------------------------- */

usp_status usp_run_read(usp_run *run, const usp_run_options *o, usp_tool_error *error) {
    *run = (usp_run){.options = o};
    for (int i = 0; i < USP_RUN_INPUTS; i++)
        if (o->path[i]) USP_TRY(read_file(run, i, error));
    USP_TRY(check_shapes(run, error));
    USP_TRY(check_documents(run, error));
    USP_TRY(make_decay(run, error));
    run->backward = o->path[USP_RUN_DOUT] != NULL;
    run->initial_state = o->path[USP_RUN_INITIAL_STATE] || o->path[USP_RUN_DINITIAL_STATE];
    run->final_state = o->path[USP_RUN_FINAL_STATE] || o->path[USP_RUN_DFINAL_STATE];
    return allocate_results(run, error);
}

void usp_run_free(usp_run *run) {
    for (int i = 0; i < USP_RUN_INPUTS; i++) usp_npy_free(&run->file[i]);
    for (int i = 0; i < USP_RUN_FILES; i++) free(run->result[i]);
    free(run->log_decay);
}
