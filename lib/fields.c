/* fields.c - the table of a layer's fields, in the order of the struct, and how a row is read. */
#include "fields.h"
#include "dropout.h"
#include <float.h>
#include <stdio.h>
#include <string.h>

enum { MOST = 65536 };

const usp_layer_field usp_layer_fields[] = {
    {"attention", offsetof(usp_layer_config, attention), USP_FIELD_ENUM, 0, 0, 1, 2, "softmax|linear", NULL},
    {"mask", offsetof(usp_layer_config, mask), USP_FIELD_ENUM, 0, 0, 1, 2, "causal|full", NULL},
    {"dtype", offsetof(usp_layer_config, dtype), USP_FIELD_ENUM, 0, 0, 0, 2, "f32|f16|bf16", NULL},
    {"batch", offsetof(usp_layer_config, batch), USP_FIELD_INT, 0, 0, 1, MOST, NULL, NULL},
    {"heads", offsetof(usp_layer_config, heads), USP_FIELD_INT, 0, 0, 1, MOST, NULL, NULL},
    {"kv_heads", offsetof(usp_layer_config, kv_heads), USP_FIELD_INT, 0, 0, 0, MOST, NULL, NULL},
    {"value_heads", offsetof(usp_layer_config, value_heads), USP_FIELD_INT, 0, 0, 0, MOST, NULL, NULL},
    {"head_dim", offsetof(usp_layer_config, head_dim), USP_FIELD_INT, 0, 0, 1, MOST, NULL, NULL},
    {"value_dim", offsetof(usp_layer_config, value_dim), USP_FIELD_INT, 0, 0, 0, MOST, NULL, NULL},
    {"scale", offsetof(usp_layer_config, scale), USP_FIELD_FLOAT, 0, 0, 0, FLT_MAX, NULL,
     "Factor of q.k; 0: 1 / sqrt(head dim) for softmax, 1 for linear (0)"},
    {"return_lse", offsetof(usp_layer_config, return_lse), USP_FIELD_FLAG, USP_SOFTMAX, 0, 0, 1, NULL, NULL},
    {"deterministic", offsetof(usp_layer_config, deterministic), USP_FIELD_FLAG, 0, 0, 0, 1, NULL,
     "No kernel whose results depend on timing"},
    {"state_exchange", offsetof(usp_layer_config, state_exchange), USP_FIELD_ENUM, USP_LINEAR, 0, 0, 2,
     "auto|chain|gather", "How states travel the ring (auto)"},
    {"recompute_state", offsetof(usp_layer_config, recompute_state), USP_FIELD_FLAG, USP_LINEAR, 0, 0, 1, NULL,
     "Backward exchanges the states again instead of keeping them"},
    {"initial_state", offsetof(usp_layer_config, initial_state), USP_FIELD_FLAG, USP_LINEAR, USP_MASK_CAUSAL, 0, 1,
     NULL, NULL},
    {"final_state", offsetof(usp_layer_config, final_state), USP_FIELD_FLAG, USP_LINEAR, 0, 0, 1, NULL, NULL},
    {"decay", offsetof(usp_layer_config, decay), USP_FIELD_HEADS, USP_LINEAR, USP_MASK_CAUSAL, -FLT_MAX, 0, NULL, NULL},
    {"window_left", offsetof(usp_layer_config, window_left), USP_FIELD_INT64, USP_SOFTMAX, 0, USP_NO_KEYS, INT32_MAX,
     "none|all", "Keys before the diagonal that a query sees (all)"},
    {"window_right", offsetof(usp_layer_config, window_right), USP_FIELD_INT64, USP_SOFTMAX, USP_MASK_FULL, USP_NO_KEYS,
     INT32_MAX, "none|all", "Keys behind the diagonal that a query sees (all)"},
    {"alignment", offsetof(usp_layer_config, alignment), USP_FIELD_ENUM, USP_SOFTMAX, 0, 0, 1, "top-left|bottom-right",
     "Corner where the diagonal lies if there are more keys than queries, or fewer (top-left)"},
    {"route", offsetof(usp_layer_config, route), USP_FIELD_ENUM, USP_SOFTMAX, 0, 0, 3, "auto|relay|direct|gathered",
     "How keys travel the ring (auto)"},
    {"soft_cap", offsetof(usp_layer_config, soft_cap), USP_FIELD_FLOAT, USP_SOFTMAX, 0, 0, FLT_MAX, NULL,
     "Scores s become X tanh(s / X); 0: they stay (0)"},
    {"dropout", offsetof(usp_layer_config, dropout), USP_FIELD_FLOAT, USP_SOFTMAX, 0, 0, USP_DROPOUT_MOST, NULL,
     "Part of the probabilities that is dropped, 0.95 at most (0)"},
    {"sinks", offsetof(usp_layer_config, sinks), USP_FIELD_FLAG, USP_SOFTMAX, 0, 0, 1, NULL, NULL},
    {"dlse", offsetof(usp_layer_config, dlse), USP_FIELD_FLAG, USP_SOFTMAX, 0, 0, 1, NULL, NULL},
    {"max_logit", offsetof(usp_layer_config, max_logit), USP_FIELD_FLAG, USP_SOFTMAX, 0, 0, 1, NULL, NULL},
    {"shared_memory", offsetof(usp_layer_config, shared_memory), USP_FIELD_FLAG, 0, 0, 0, 1, NULL, NULL},
    {"slopes", offsetof(usp_layer_config, slopes), USP_FIELD_HEADS, USP_SOFTMAX, 0, -FLT_MAX, FLT_MAX, NULL, NULL},
    {"head_groups", offsetof(usp_layer_config, head_groups), USP_FIELD_INT, USP_SOFTMAX, 0, 0, 64, NULL,
     "Groups of heads, one of which is exchanged while another is worked on, at most; 0: one (0)"},
    {"reserved", offsetof(usp_layer_config, reserved), USP_FIELD_INT, 0, 0, 0, 0, NULL, NULL},
    {0}};

/* A field behind the table's last one would be neither checked nor compared. */
_Static_assert(offsetof(usp_layer_config, reserved) + sizeof(int) == sizeof(usp_layer_config), "the table is whole");

size_t usp_layer_field_size(const usp_layer_field *field) {
    if (field->form == USP_FIELD_HEADS) return sizeof(const float *);
    return field->form == USP_FIELD_INT64 ? sizeof(int64_t) : sizeof(int);
}

double usp_layer_field_value(const usp_layer_field *field, const usp_layer_config *config) {
    const char *from = (const char *)config + field->offset;
    union {
        int number;
        int64_t wide;
        float real;
        const float *array;
    } value = {0};
    memcpy(&value, from, usp_layer_field_size(field));
    if (field->form == USP_FIELD_HEADS) return value.array != NULL;
    if (field->form == USP_FIELD_INT64) return (double)value.wide;
    return field->form == USP_FIELD_FLOAT ? value.real : value.number;
}

/* The name of a value; NULL if it has none. *length: its own, without what follows. */
static const char *name_of(const usp_layer_field *field, double value, int *length) {
    const char *name = field->values;
    for (double i = field->least; name && i < value; i++) name = (name = strchr(name, '|')) ? name + 1 : NULL;
    *length = name && value >= field->least ? (int)strcspn(name, "|") : 0;
    return *length ? name : NULL;
}

const char *usp_layer_field_text(const usp_layer_field *field, double value, char text[USP_FIELD_TEXT]) {
    int length;
    const char *name = name_of(field, value, &length);
    if (name)
        snprintf(text, USP_FIELD_TEXT, "%.*s", length, name);
    else
        snprintf(text, USP_FIELD_TEXT, "%.*g", field->form == USP_FIELD_FLOAT ? 8 : 18, value);
    return text;
}
