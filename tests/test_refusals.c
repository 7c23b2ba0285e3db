/* test_refusals.c - values that no call may take: tensors that are not aligned, numbers that are no pass, no operand or
 * no scale; and every field of a layer, by the library's table of them. Each is refused by name, before anything moves.
 * Runs nothing to its end. */
#include "expect.h"
#include "fields.h"
#include "stage.h"

#include <math.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

enum { SECONDS = 60 };

static void expect_refusal(usp_rank *rank, const char *what, const char *name, usp_status status) {
    if (status != USP_INVALID || !strstr(usp_last_error(), name))
        usp_say(rank, "%s: %s: %s, \"%s\"", what, name, usp_status_string(status), usp_last_error());
    usp_count(rank);
}

/* ---- tensors ----------------------------------------------------------------------------------------------------- */

typedef struct place {
    const char *name;
    size_t offset; /* of the tensor's address */
} place;

static const place forward_places[] = {{"usp_forward.q.data", offsetof(usp_forward, q.data)},
                                       {"usp_forward.k.data", offsetof(usp_forward, k.data)},
                                       {"usp_forward.v.data", offsetof(usp_forward, v.data)},
                                       {"usp_forward.out.data", offsetof(usp_forward, out.data)}};

static const place backward_places[] = {{"usp_backward.q.data", offsetof(usp_backward, q.data)},
                                        {"usp_backward.k.data", offsetof(usp_backward, k.data)},
                                        {"usp_backward.v.data", offsetof(usp_backward, v.data)},
                                        {"usp_backward.out.data", offsetof(usp_backward, out.data)},
                                        {"usp_backward.dout.data", offsetof(usp_backward, dout.data)},
                                        {"usp_backward.dq.data", offsetof(usp_backward, dq.data)},
                                        {"usp_backward.dk.data", offsetof(usp_backward, dk.data)},
                                        {"usp_backward.dv.data", offsetof(usp_backward, dv.data)}};

/* Moves the address by less than one element. */
static void misalign(void *arguments, size_t offset) {
    char *address;
    memcpy(&address, (char *)arguments + offset, sizeof address);
    address++;
    memcpy((char *)arguments + offset, &address, sizeof address);
}

static void try_alignment(usp_stage *s) {
    void *workspace = s->workspace.device;
    for (int i = 0; i < (int)(sizeof forward_places / sizeof forward_places[0]); i++) {
        usp_forward f = usp_stage_forward_arguments(s, 1);
        misalign(&f, forward_places[i].offset);
        expect_refusal(s->rank, "forward", forward_places[i].name,
                       usp_layer_forward(s->layer, &f, workspace, s->workspace.bytes, NULL));
        expect_refusal(s->rank, "inner forward", forward_places[i].name,
                       usp_layer_inner_forward(s->layer, &f, workspace, s->workspace.bytes, NULL));
    }
    for (int i = 0; i < (int)(sizeof backward_places / sizeof backward_places[0]); i++) {
        usp_backward b = usp_stage_backward_arguments(s);
        misalign(&b, backward_places[i].offset);
        expect_refusal(s->rank, "backward", backward_places[i].name,
                       usp_layer_backward(s->layer, &b, workspace, s->workspace.bytes, NULL));
        expect_refusal(s->rank, "inner backward", backward_places[i].name,
                       usp_layer_inner_backward(s->layer, &b, workspace, s->workspace.bytes, NULL));
    }
}

/* ---- the head exchange and the cost ------------------------------------------------------------------------------ */

static void try_operands(usp_stage *s) {
    static const int wrong[] = {-1, USP_OUT + 1, 1000};
    usp_forward f = usp_stage_forward_arguments(s, 1);
    usp_tensor odd = f.q;
    void *workspace = s->workspace.device;
    size_t bytes = s->workspace.bytes;
    odd.data = (char *)odd.data + 1;
    for (int i = 0; i < 3; i++) {
        usp_operand operand = (usp_operand)wrong[i];
        expect_refusal(s->rank, "to heads", "operand",
                       usp_layer_tokens_to_heads(s->layer, operand, &f.q, &f.out, workspace, bytes, NULL));
        expect_refusal(s->rank, "to tokens", "operand",
                       usp_layer_heads_to_tokens(s->layer, operand, &f.q, &f.out, workspace, bytes, NULL));
    }
    expect_refusal(s->rank, "to heads", "tokens.data",
                   usp_layer_tokens_to_heads(s->layer, USP_QUERY, &odd, &f.out, workspace, bytes, NULL));
    expect_refusal(s->rank, "to tokens", "heads.data",
                   usp_layer_heads_to_tokens(s->layer, USP_QUERY, &odd, &f.out, workspace, bytes, NULL));
}

static void try_passes(usp_stage *s) {
    static const int wrong[] = {-1, 2};
    for (int i = 0; i < 2; i++) {
        usp_cost cost = {.struct_size = sizeof cost};
        expect_refusal(s->rank, "cost", "pass", usp_layer_get_cost(s->layer, (usp_pass)wrong[i], &cost));
        if (cost.flops != 0) usp_say(s->rank, "a refused call writes");
    }
}

/* The last four only where backward divides by the scale. */
static void try_scales(usp_stage *s) {
    static const float wrong[] = {-1, -1e-30f, INFINITY, -INFINITY, NAN, 1e-39f, 1e-38f, 0x1.fffffep-65f, 1e20f};
    int linear = s->c.attention == USP_LINEAR;
    for (int i = 0; i < (linear ? 9 : 5); i++) {
        usp_layer *layer = NULL;
        usp_layer_config config = {.struct_size = sizeof config,
                                   .attention = s->c.attention,
                                   .mask = USP_MASK_CAUSAL,
                                   .batch = 1,
                                   .heads = 2,
                                   .head_dim = 8,
                                   .scale = wrong[i],
                                   .final_state = linear};
        expect_refusal(s->rank, "create", "usp_layer_config.scale",
                       usp_layer_create(s->mesh, s->sequence, &config, &layer));
        usp_layer_destroy(layer);
    }
}

/* All ranks err alike, so nobody waits; then the layer must still run. */
static int refusals(usp_rank *rank, void *argument) {
    static const usp_case cases[] = {{.tokens = 40, .mask = USP_MASK_CAUSAL},
                                     {.tokens = 40, .dtype = USP_BF16},
                                     {.attention = USP_LINEAR, .tokens = 40, .mask = USP_MASK_CAUSAL}};
    (void)argument;
    for (int i = 0; i < 3; i++) {
        usp_stage stage;
        usp_case c = cases[i];
        c.ulysses = rank->size;
        if (usp_stage_open(rank, &c, &stage) != USP_OK) return usp_say(rank, "%s", usp_last_error());
        if (usp_stage_fill(&stage)) return 1;
        try_alignment(&stage);
        try_operands(&stage);
        try_passes(&stage);
        try_scales(&stage);
        if (usp_stage_forward(&stage, 1) || usp_stage_backward(&stage)) return 1;
        usp_stage_close(&stage);
    }
    return 0;
}

Test(refusals, by_name) {
    usp_expect_ranks(1, SECONDS, refusals, NULL);
    usp_expect_ranks(2, SECONDS, refusals, NULL);
}

/* ---- every field of a layer, one at a time ------------------------------------------------------------------------- */

enum { HEADS = 8 }; /* of any layer here, at most */

/* What all tries need. */
typedef struct scene {
    usp_rank *rank;
    usp_mesh *mesh;
    usp_sequence *sequence;
    int odd; /* the one rank that is given another value; -1: all are */
} scene;

/* A layer that may have the field: nothing else is set that could stand in its way. */
static usp_layer_config good_config(const usp_layer_field *field) {
    int softmax = field->only == USP_SOFTMAX;
    return (usp_layer_config){.struct_size = sizeof(usp_layer_config),
                              .attention = softmax ? USP_SOFTMAX : USP_LINEAR,
                              .mask = softmax ? USP_MASK_FULL : USP_MASK_CAUSAL,
                              .batch = 1,
                              .heads = 4,
                              .head_dim = 8,
                              .value_dim = 8,
                              .return_lse = softmax};
}

static void set_number(const usp_layer_field *field, double value, usp_layer_config *config) {
    char *to = (char *)config + field->offset;
    if (field->form == USP_FIELD_INT64)
        memcpy(to, &(int64_t){(int64_t)value}, sizeof(int64_t));
    else if (field->form == USP_FIELD_FLOAT)
        memcpy(to, &(float){(float)value}, sizeof(float));
    else
        memcpy(to, &(int){(int)value}, sizeof(int));
}

static void set_array(const usp_layer_field *field, const float *value, usp_layer_config *config) {
    memcpy((char *)config + field->offset, &value, sizeof value);
}

/* Another good value than good_config's. */
static void set_other(const usp_layer_field *field, usp_layer_config *config) {
    static const float array[HEADS] = {-1, 0, -2};
    double now = usp_layer_field_value(field, config);
    int counts = field->form == USP_FIELD_INT && now > 0;
    if (field->form == USP_FIELD_HEADS)
        set_array(field, array, config);
    else if (counts || now == field->most)
        set_number(field, counts ? 2 * now : field->least, config);
    else
        set_number(field, field->form == USP_FIELD_FLOAT ? 0.5 : field->form == USP_FIELD_INT ? 2 : now + 1, config);
}

/* Creates a layer; the odd rank, or all, must get `status` and the field's name, others PEER_FAILED. */
static void expect_create(const scene *s, const usp_layer_field *field, const char *what,
                          const usp_layer_config *config, usp_status status) {
    char name[64];
    usp_layer *layer = NULL;
    int alone = s->odd >= 0 && s->odd != s->rank->rank;
    usp_layer_config good = good_config(field);
    usp_status found = usp_layer_create(s->mesh, s->sequence, alone ? &good : config, &layer);
    snprintf(name, sizeof name, "usp_layer_config.%s", field->name);
    if (status == USP_MISMATCH) snprintf(name, sizeof name, "layer.%s differs", field->name);
    int told = alone && status != USP_MISMATCH;
    if (found != (told ? USP_PEER_FAILED : status) || (!told && !strstr(usp_last_error(), name)) || layer)
        usp_say(s->rank, "%s %s: %s, \"%s\"", field->name, what, usp_status_string(found), usp_last_error());
    usp_count(s->rank);
}

static void try_number(const scene *s, const usp_layer_field *field, double value) {
    char what[64];
    usp_layer_config config = good_config(field);
    set_number(field, value, &config);
    snprintf(what, sizeof what, "= %g", value);
    expect_create(s, field, what, &config, USP_INVALID);
}

static void try_array(const scene *s, const usp_layer_field *field, float value) {
    float array[HEADS] = {0, 0, 0, value};
    usp_layer_config config = good_config(field);
    set_array(field, array, &config);
    expect_create(s, field, "with a wrong number", &config, USP_INVALID);
}

/* Values outside of its range, and what is no number. */
static void try_range(const scene *s, const usp_layer_field *field) {
    static const float wrong[] = {NAN, INFINITY, -INFINITY};
    for (int i = 0; i < 3; i++) {
        if (field->form == USP_FIELD_FLOAT) try_number(s, field, wrong[i]);
        if (field->form == USP_FIELD_HEADS) try_array(s, field, wrong[i]);
    }
    if (field->form == USP_FIELD_HEADS) {
        if (field->most < 1) try_array(s, field, 1);
        return;
    }
    try_number(s, field, field->least - 1);
    try_number(s, field, field->form == USP_FIELD_ENUM ? INT32_MIN : field->least - 2);
    if (field->most < 1e30 && (field->most < INT32_MAX || field->form == USP_FIELD_INT64))
        try_number(s, field,
                   field->form == USP_FIELD_FLOAT ? nextafterf((float)field->most, INFINITY) : field->most + 1);
}

/* In a layer of the other kind, or of its kind with the other mask. */
static void try_kind(const scene *s, const usp_layer_field *field) {
    usp_layer_config config = good_config(field);
    set_other(field, &config);
    if (field->only) {
        usp_layer_config other = config;
        other.attention = field->only == USP_SOFTMAX ? USP_LINEAR : USP_SOFTMAX;
        other.return_lse = field->offset == offsetof(usp_layer_config, return_lse);
        other.mask = field->mask ? field->mask : USP_MASK_FULL;
        expect_create(s, field, "in another kind", &other, USP_INVALID);
    }
    if (field->mask) {
        config.mask = field->mask == USP_MASK_FULL ? USP_MASK_CAUSAL : USP_MASK_FULL;
        expect_create(s, field, "under another mask", &config,
                      field->only == USP_LINEAR ? USP_UNSUPPORTED : USP_INVALID);
    }
}

/* What fields say about each other. */
static void try_together(const scene *s, const usp_layer_field *field) {
    usp_layer_config config = good_config(field);
    if (field->offset == offsetof(usp_layer_config, dlse)) {
        config.return_lse = 0;
        config.dlse = 1;
        expect_create(s, field, "without return_lse", &config, USP_INVALID);
    }
    if (field->offset == offsetof(usp_layer_config, kv_heads)) {
        config.kv_heads = 3;
        expect_create(s, field, "that divides nothing", &config, USP_INVALID);
    }
}

static void try_disagreement(const scene *s, const usp_layer_field *field) {
    usp_layer_config config = good_config(field);
    set_other(field, &config);
    if (s->odd >= 0 && s->rank->size > 1 && field->least < field->most)
        expect_create(s, field, "differs", &config, USP_MISMATCH);
}

/* The rows lie side by side: no byte of the struct but its size is in none of them. */
static void check_table(usp_rank *rank) {
    size_t end = offsetof(usp_layer_config, attention);
    for (const usp_layer_field *field = usp_layer_fields; field->name; field++) {
        if (field->offset != end) usp_say(rank, "%s does not begin where the row before ends", field->name);
        end = field->offset + usp_layer_field_size(field);
    }
    if (end != sizeof(usp_layer_config)) usp_say(rank, "the table ends at byte %zu", end);
    usp_count(rank);
}

static int layer_fields(usp_rank *rank, void *argument) {
    usp_sequence_config config = {.struct_size = sizeof config, .tokens = 40};
    scene s = {.rank = rank, .odd = *(int *)argument};
    if (usp_mesh_create(rank->world, rank->size, 1, &s.mesh) != USP_OK ||
        usp_sequence_create(s.mesh, &config, &s.sequence) != USP_OK)
        return usp_say(rank, "%s", usp_last_error());
    check_table(rank);
    for (const usp_layer_field *field = usp_layer_fields; field->name; field++) {
        try_range(&s, field);
        try_kind(&s, field);
        try_together(&s, field);
        try_disagreement(&s, field);
    }
    usp_sequence_destroy(s.sequence);
    usp_mesh_destroy(s.mesh);
    return 0;
}

Test(refusals, of_every_field) {
    static int all = -1, first = 0, last = 2;
    usp_expect_ranks(1, SECONDS, layer_fields, &all);
    usp_expect_ranks(2, SECONDS, layer_fields, &all);
    usp_expect_ranks(3, SECONDS, layer_fields, &first);
    usp_expect_ranks(3, SECONDS, layer_fields, &last);
}
