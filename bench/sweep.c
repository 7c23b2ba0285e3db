/* sweep.c - the nested loops of the sweep: every combination that the options name, by meshes and lengths.
 * Only meshes that the ranks cannot make are left out. */
#include "sweep.h"
#include <stdlib.h>

typedef struct usp_case_list {
    usp_case *items;
    size_t count, capacity;
    int failed;
} usp_case_list;

static void push_case(usp_case_list *list, const usp_case *item) {
    if (list->count == list->capacity) {
        size_t capacity = list->capacity ? 2 * list->capacity : 64;
        usp_case *grown = realloc(list->items, capacity * sizeof *grown);
        if (!grown) {
            list->failed = 1;
            return;
        }
        list->items = grown;
        list->capacity = capacity;
    }
    list->items[list->count++] = *item;
}

static int wanted(const usp_list *list, int64_t value) {
    for (int i = 0; i < list->count; i++)
        if (list->item[i] == value) return 1;
    return list->count == 0;
}

static void push_meshes(usp_case_list *list, const usp_options *o, int size, usp_case c) {
    for (c.ulysses = size; c.ulysses > 0; c.ulysses--) {
        c.ring = size / c.ulysses;
        if (size % c.ulysses == 0 && wanted(&o->ulysses, c.ulysses) && wanted(&o->ring, c.ring)) push_case(list, &c);
    }
}

static void push_lengths(usp_case_list *list, const usp_options *o, int size, usp_case c) {
    for (c.seq = o->begin; c.seq <= o->end; c.seq = o->step ? c.seq + o->step : c.seq * o->factor)
        push_meshes(list, o, size, c);
}

/* The number of combinations of the lists; index i names one of them, the first list turning slowest. */
static void push_combination(usp_case_list *list, const usp_options *o, const usp_list *dtypes, int size, int64_t i) {
    const usp_list *lists[] = {&o->batches, &o->value_dims, &o->dims, &o->kv_heads,
                               &o->heads,   &o->layouts,    dtypes,   &o->kinds};
    int64_t value[8];
    for (int k = 0; k < 8; k++) {
        value[k] = lists[k]->item[i % lists[k]->count];
        i /= lists[k]->count;
    }
    usp_case c = {.batch = (int)value[0],
                  .value_dim = (int)(value[1] ? value[1] : value[2]),
                  .dim = (int)value[2],
                  .kv_heads = (int)(value[3] ? value[3] : value[4]),
                  .heads = (int)value[4],
                  .layout = (usp_layout)value[5],
                  .dtype = (usp_dtype)value[6],
                  .kind = (usp_attention)value[7],
                  .mask = o->mask};
    push_lengths(list, o, size, c);
}

usp_case *usp_sweep_cases(const usp_options *o, int size, usp_device_kind device, size_t *count,
                          usp_tool_error *error) {
    usp_case_list list = {.items = NULL};
    usp_list dtypes = {.count = 1, .item = {device == USP_DEVICE_CUDA ? USP_BF16 : USP_F32}};
    if (o->dtypes.count) dtypes = o->dtypes;
    int64_t combinations = (int64_t)o->batches.count * o->value_dims.count * o->dims.count * o->kv_heads.count *
                           o->heads.count * o->layouts.count * dtypes.count * o->kinds.count;
    for (int64_t i = 0; i < combinations; i++) push_combination(&list, o, &dtypes, size, i);
    *count = list.count;
    if (list.failed)
        usp_tool_fail(error, USP_NO_MEMORY, "no memory for the list of cases");
    else if (!list.count)
        usp_tool_fail(error, USP_INVALID, "no pair of --ulysses and --ring makes %d rank%s; -t or -g sets their number",
                      size, size > 1 ? "s" : "");
    if (!list.failed && list.count) return list.items;
    free(list.items);
    return NULL;
}
