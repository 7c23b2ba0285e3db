/* run_files.c - what the files say and whether it fits together.
 * Sentences speak of files as they are, shapes of what a layer takes. */
#include "run_files.h"
#include <limits.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { MOST_DIM = 1 << 16 }; /* of a head: keeps the size of a state far from overflow */

static int is_state(int file) {
    return file == USP_RUN_INITIAL_STATE || file == USP_RUN_DFINAL_STATE || file == USP_RUN_FINAL_STATE ||
           file == USP_RUN_DINITIAL_STATE;
}

static int is_heads(int file) {
    return file == USP_RUN_SINKS || file == USP_RUN_DSINKS || file == USP_RUN_MAX_LOGIT;
}

int usp_run_is_whole(int file) {
    return is_state(file) || is_heads(file);
}

int usp_run_is_rows(int file) {
    return file == USP_RUN_LSE || file == USP_RUN_DLSE;
}

/* Those that are not of the layer's dtype and not in the order of --order. */
static int is_float(int file) {
    return usp_run_is_whole(file) || usp_run_is_rows(file);
}

static int dims_of(int file) {
    return is_heads(file) ? 1 : usp_run_is_rows(file) ? 3 : 4;
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
    usp_dtype dtype = is_float(file) ? USP_F32 : run->dtype;
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
    return is_float(file) ? USP_ORDER_BSHD : run->options->order;
}

static usp_status read_file(usp_run *run, int file, usp_tool_error *error) {
    const char *path = run->options->path[file];
    usp_npy *array = &run->file[file];
    usp_tool_error why = {""};
    USP_TRY(usp_npy_read(path, array, error));
    if (file == USP_RUN_Q) USP_TRY(choose_dtype(run, error));
    USP_TRY(check_type(run, file, error));
    if (array->dims != dims_of(file))
        return usp_tool_fail(error, USP_INVALID, "%s: has %d dimensions, not %d", path, array->dims, dims_of(file));
    for (; array->dims < 4; array->dims++) array->shape[array->dims] = 1;
    note_conversion(run, file);
    usp_status status = usp_tensor_arrange(array, order_of(run, file), &why);
    return status == USP_OK ? status : usp_tool_fail(error, status, "%s: %.900s", path, why.text);
}

/* ---- shapes ---------------------------------------------------------------------------------------------------- */

/* All extents of heads, batch and dims must fit an int, and be there at all; there may be no tokens. */
static usp_status check_extents(const usp_run *run, int file, usp_tool_error *error) {
    static const char *const names[2][4] = {{"batch", "number of tokens", "number of heads", "head dim"},
                                            {"batch", "number of heads", "head dim", "value dim"}};
    int state = is_state(file);
    for (int i = 0; i < 4 && dims_of(file) == 4; i++) {
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
                  rows[4] = {b, run->heads, s, 1}, heads[4] = {run->heads, 1, 1, 1};
    const int64_t *chosen = is_state(file)                            ? state
                            : is_heads(file)                          ? heads
                            : file == USP_RUN_Q || file == USP_RUN_DQ ? q
                            : file == USP_RUN_K || file == USP_RUN_DK ? k
                            : file == USP_RUN_V || file == USP_RUN_DV ? v
                            : usp_run_is_rows(file)                   ? rows
                                                                      : out;
    memcpy(shape, chosen, 4 * sizeof *shape);
}

/* "[2, 53, 4, 8]" */
static const char *shape_text(const int64_t *shape, int dims, char text[96]) {
    int at = 0;
    for (int i = 0; i < dims; i++)
        at += snprintf(text + at, (size_t)(96 - at), "%s%lld", i ? ", " : "[", (long long)shape[i]);
    snprintf(text + at, (size_t)(96 - at), "]");
    return text;
}

static usp_status check_shape(const usp_run *run, int file, usp_tool_error *error) {
    int64_t shape[4], wanted[4], needed[4];
    char found[96], good[96];
    usp_run_shape(run, file, needed);
    usp_order_shape(order_of(run, file), run->file[file].shape, shape); /* as they are in files */
    usp_order_shape(order_of(run, file), needed, wanted);
    if (!memcmp(shape, wanted, sizeof shape)) return USP_OK;
    return usp_tool_fail(error, USP_INVALID, "%s: has shape %s, but %s is needed for --%s", run->options->path[file],
                         shape_text(shape, dims_of(file), found), shape_text(wanted, dims_of(file), good),
                         usp_run_file_name(file));
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

/* On other layouts tokens behind the last document see nothing. */
static usp_status check_documents(const usp_run *run, usp_tool_error *error) {
    const usp_run_options *o = run->options;
    int64_t end = o->ends.count ? o->ends.item[o->ends.count - 1] : run->tokens;
    if (end == run->tokens || (end < run->tokens && o->layout != USP_LAYOUT_ZIGZAG_PER_DOCUMENT)) return USP_OK;
    return usp_tool_fail(error, USP_INVALID, "--documents ends at %lld, but there are %lld tokens", (long long)end,
                         (long long)run->tokens);
}

static usp_status make_heads(const usp_run *run, const char *option, const usp_head_numbers *numbers,
                             usp_tool_error *error, float **made) {
    if (!numbers->alibi && !numbers->count) return USP_OK;
    if (numbers->count > 1 && numbers->count != run->out_heads)
        return usp_tool_fail(error, USP_INVALID, "--%s has %d numbers for %d heads", option, numbers->count,
                             run->out_heads);
    *made = usp_tool_alloc(error, (size_t)run->out_heads, sizeof **made);
    if (!*made) return USP_NO_MEMORY;
    if (numbers->alibi) usp_decay_slopes(run->out_heads, *made);
    for (int h = 0; h < run->out_heads && !numbers->alibi; h++) (*made)[h] = numbers->item[numbers->count > 1 ? h : 0];
    return USP_OK;
}

/* Of decay the logarithms; ALiBi's are those of its slopes, which are positive. */
static usp_status make_arrays(usp_run *run, usp_tool_error *error) {
    const usp_run_options *o = run->options;
    USP_TRY(make_heads(run, "decay", &o->decay, error, &run->log_decay));
    USP_TRY(make_heads(run, "slopes", &o->slopes, error, &run->slopes));
    for (int h = 0; h < run->out_heads; h++) {
        if (run->log_decay && !o->decay.alibi) run->log_decay[h] = logf(run->log_decay[h]);
        if (run->slopes && o->slopes.alibi) run->slopes[h] = -run->slopes[h];
    }
    return USP_OK;
}

/* ---- results --------------------------------------------------------------------------------------------------- */

/* While it is worked on. */
static usp_npy_type work_type(const usp_run *run, int file) {
    static const usp_npy_type types[] = {[USP_F32] = USP_NPY_F32, [USP_F16] = USP_NPY_F16, [USP_BF16] = USP_NPY_V2};
    return is_float(file) ? USP_NPY_F32 : types[run->dtype];
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
    usp_npy tensor = {.type = work_type(run, file), .data = run->result[file]};
    usp_run_shape(run, file, tensor.shape);
    tensor.bytes = usp_run_element(run, file);
    for (int i = 0; i < 4; i++) tensor.bytes *= (size_t)tensor.shape[i];
    tensor.dims = dims_of(file);
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
    USP_TRY(make_arrays(run, error));
    run->backward = o->path[USP_RUN_DOUT] != NULL;
    run->initial_state = o->path[USP_RUN_INITIAL_STATE] || o->path[USP_RUN_DINITIAL_STATE];
    run->final_state = o->path[USP_RUN_FINAL_STATE] || o->path[USP_RUN_DFINAL_STATE];
    return allocate_results(run, error);
}

void usp_run_free(usp_run *run) {
    for (int i = 0; i < USP_RUN_INPUTS; i++) usp_npy_free(&run->file[i]);
    for (int i = 0; i < USP_RUN_FILES; i++) free(run->result[i]);
    free(run->log_decay);
    free(run->slopes);
}
