/* arguments.c - the checks of arguments.h: addresses, strides, and what is given without being asked for. */
#include "arguments.h"
#include "error.h"
#include "frame.h"
#include "size.h"
#include <string.h>

/* ---- memory ------------------------------------------------------------------------------------------------------ */

static usp_status check_shared(usp_layer *layer, usp_memory kind, const void *memory, size_t bytes, const char *name) {
    usp_control *control = layer->world->transport->control;
    if (!layer->config.shared_memory || bytes == 0) return USP_OK;
    usp_place place = memory ? usp_world_find_place(layer->world, memory, bytes) : (usp_place){0, 0};
    USP_REQUIRE(!memory || place.piece, "%s is not in shared memory, which usp_layer_config.shared_memory promises",
                name);
    if (layer->alike) control->ops->note_plan(control, layer->mesh.ranks, usp_hash(kind + 1, &place, sizeof place));
    return USP_OK;
}

usp_status usp_check_workspace(usp_layer *layer, usp_memory kind, const void *workspace, size_t bytes, size_t needed) {
    if (bytes < needed) return usp_fail(USP_WORKSPACE, "workspace has %zu bytes, this call needs %zu", bytes, needed);
    if (needed && !workspace) return usp_fail(USP_WORKSPACE, "workspace is NULL, this call needs %zu bytes", needed);
    if ((uintptr_t)workspace % USP_ALIGNMENT)
        return usp_fail(USP_WORKSPACE, "workspace is not aligned to %d bytes", USP_ALIGNMENT);
    return check_shared(layer, kind, workspace, needed, "workspace");
}

usp_status usp_check_saved(usp_layer *layer, const void *saved, const char *name) {
    if ((uintptr_t)saved % USP_ALIGNMENT)
        return usp_fail(USP_WORKSPACE, "%s is not aligned to %d bytes", name, USP_ALIGNMENT);
    return check_shared(layer, USP_SAVED, saved, layer->sizes.saved, name);
}

/* ---- tensors ----------------------------------------------------------------------------------------------------- */

/* A tensor of a call. */
typedef struct argument {
    const char *name;
    const usp_tensor *tensor;
    int64_t tokens;
    int heads, dim, written;
} argument;

static int is_empty(const argument *a) {
    return a->tokens == 0 || a->heads == 0;
}

static uint64_t size_of(int64_t stride) {
    return stride < 0 ? 0 - (uint64_t)stride : (uint64_t)stride;
}

/* From any element of a tensor to any other there is a number of bytes. */
static usp_status check_span(const usp_layer *layer, const argument *a, size_t element) {
    const usp_tensor *tensor = a->tensor;
    const int64_t extent[] = {layer->config.batch, a->tokens, a->heads};
    const usp_factor row[] = {{"dim", (uint64_t)a->dim}, {"bytes", element}};
    const uint64_t stride[] = {size_of(tensor->stride_batch), size_of(tensor->stride_token),
                               size_of(tensor->stride_head)};
    int64_t span = 0;
    usp_status status = usp_size_add(&span, row, 2);
    for (int i = 0; i < 3 && status == USP_OK; i++)
        status = usp_size_add(
            &span, (const usp_factor[]){{"steps", (uint64_t)extent[i] - 1}, {"stride", stride[i]}, row[1]}, 3);
    if (status == USP_OK) return USP_OK;
    return usp_fail(status, "%s has strides %lld, %lld, %lld of batch, token and head: more bytes than 64 bits count",
                    a->name, (long long)tensor->stride_batch, (long long)tensor->stride_token,
                    (long long)tensor->stride_head);
}

/* A tensor that holds elements must have an address that fits its dtype. */
static usp_status check_tensor(const usp_layer *layer, const argument *a) {
    size_t element = usp_dtype_size(layer->config.dtype);
    if (is_empty(a)) return USP_OK;
    USP_REQUIRE(a->tensor->data, "%s.data is NULL", a->name);
    USP_REQUIRE((uintptr_t)a->tensor->data % element == 0, "%s.data is not aligned to its elements", a->name);
    return check_span(layer, a, element);
}

/* Whether no two elements share a place: strides by size, each at least as long as all that lies within it. Their span
 * has been checked. */
static int strides_nest(const argument *a, int64_t batch) {
    const usp_tensor *tensor = a->tensor;
    int64_t extent[] = {batch, a->tokens, a->heads};
    uint64_t stride[] = {size_of(tensor->stride_batch), size_of(tensor->stride_token), size_of(tensor->stride_head)};
    uint64_t span = (uint64_t)a->dim;
    for (int left = 3; left > 0; left--) {
        int next = 0;
        for (int i = 1; i < left; i++)
            if (extent[next] == 1 || (extent[i] > 1 && stride[i] < stride[next])) next = i;
        uint64_t steps = (uint64_t)extent[next] - 1;
        if (steps && stride[next] < span) return 0;
        span += steps * stride[next];
        extent[next] = extent[left - 1];
        stride[next] = stride[left - 1];
    }
    return 1;
}

/* Elements of what is written have places of their own, and it is none of the tensors before it. */
static usp_status check_written(const usp_layer *layer, const argument *list, int before) {
    const argument *a = &list[before];
    const usp_tensor *t = a->tensor;
    USP_REQUIRE(strides_nest(a, layer->config.batch),
                "%s has strides %lld, %lld, %lld of batch, token and head: elements share a place", a->name,
                (long long)t->stride_batch, (long long)t->stride_token, (long long)t->stride_head);
    for (int i = 0; i < before; i++)
        USP_REQUIRE(is_empty(&list[i]) || list[i].tensor->data != t->data, "%s.data is that of %s", a->name,
                    list[i].name);
    return USP_OK;
}

static usp_status check_tensors(const usp_layer *layer, const argument *list, int count) {
    for (int i = 0; i < count; i++) {
        USP_TRY(check_tensor(layer, &list[i]));
        if (list[i].written && !is_empty(&list[i])) USP_TRY(check_written(layer, list, i));
    }
    return USP_OK;
}

/* ---- operands ---------------------------------------------------------------------------------------------------- */

/* As the caller's tensors have them, or the inner stage's. */
static argument argument_of(const usp_layer *layer, usp_operand operand, int inner) {
    int keys = usp_is_key(operand);
    const usp_sharding *own = keys ? &layer->sequence->key : &layer->sequence->query;
    int64_t rows = keys ? usp_plan_keys(layer->plan) : usp_plan_queries(layer->plan);
    return (argument){.tokens = inner ? rows : own->local[layer->mesh.p],
                      .heads = inner ? usp_layer_heads(layer, operand, layer->mesh.u).count : layer->total[operand],
                      .dim = layer->dim[operand]};
}

/* Numbers: given where the configuration asks for them and nowhere else. */
static usp_status check_pointer(const usp_layer *layer, const usp_operand_row *row, const void *args, int inner) {
    const void *pointer;
    size_t alignment = row->form == USP_FORM_SHARED ? sizeof(uint64_t) : sizeof(float);
    const argument like = argument_of(layer, row->like, inner);
    int asked = usp_row_asked(layer, row), empty = row->form == USP_FORM_ROWS && is_empty(&like);
    memcpy(&pointer, (const char *)args + row->given, sizeof pointer);
    USP_REQUIRE(!asked || empty || pointer, "%s is NULL while the layer's configuration asks for it", row->name);
    USP_REQUIRE(asked || !pointer, "%s is given while the layer's configuration does not ask for it", row->name);
    USP_REQUIRE(!asked || empty || (uintptr_t)pointer % alignment == 0, "%s is not aligned to its elements", row->name);
    return USP_OK;
}

static int has_row(const usp_attn_ops *attn, usp_pass pass, size_t given) {
    for (int i = 0; i < attn->row_count[pass]; i++)
        if (attn->rows[pass][i].use != USP_USE_DERIVED && attn->rows[pass][i].given == given) return 1;
    return 0;
}

/* Numbers that only other kinds know. */
static usp_status check_strangers(const usp_layer *layer, usp_pass pass, const void *args) {
    for (int kind = 0; kind < USP_ATTN_KINDS; kind++)
        for (int i = 0; i < usp_attn_kinds[kind]->row_count[pass]; i++) {
            const usp_operand_row *row = &usp_attn_kinds[kind]->rows[pass][i];
            const void *pointer;
            if (row->use == USP_USE_DERIVED || has_row(layer->attn, pass, row->given)) continue;
            memcpy(&pointer, (const char *)args + row->given, sizeof pointer);
            USP_REQUIRE(!pointer, "%s is given while the layer's configuration does not ask for it", row->name);
        }
    return USP_OK;
}

usp_status usp_check_operands(const usp_layer *layer, usp_pass pass, const void *args, int inner) {
    argument list[USP_MOST_TENSORS];
    int count = 0;
    for (int i = 0; i < layer->attn->row_count[pass]; i++) {
        const usp_operand_row *row = &layer->attn->rows[pass][i];
        if (row->form != USP_FORM_TENSOR) continue;
        argument a = argument_of(layer, row->like, inner);
        a.name = row->name;
        a.tensor = (const usp_tensor *)(const void *)((const char *)args + row->given);
        a.written = row->use == USP_USE_OUT;
        list[count++] = a;
    }
    USP_TRY(check_tensors(layer, list, count));
    for (int i = 0; i < layer->attn->row_count[pass]; i++) {
        const usp_operand_row *row = &layer->attn->rows[pass][i];
        if (row->form != USP_FORM_TENSOR && row->use != USP_USE_DERIVED)
            USP_TRY(check_pointer(layer, row, args, inner));
    }
    return check_strangers(layer, pass, args);
}

usp_status usp_check_ends(const usp_layer *layer, usp_operand operand, const usp_tensor *tokens,
                          const usp_tensor *heads, int to_heads) {
    argument here = argument_of(layer, operand, 0), there = argument_of(layer, operand, 1);
    here.name = "tokens", here.tensor = tokens, here.written = !to_heads;
    there.name = "heads", there.tensor = heads, there.written = to_heads;
    USP_TRY(check_tensors(layer, &here, 1));
    return check_tensors(layer, &there, 1);
}
