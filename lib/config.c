/* config.c - checks a layer's configuration, fills in its defaults and compares it between ranks. What holds for one
 * field alone is a row of the table in fields.c; here is what fields say about each other. Plans nothing. */
#include "config.h"
#include "abi.h"
#include "error.h"
#include "fields.h"
#include <math.h>
#include <string.h>

/* ---- one field alone --------------------------------------------------------------------------------------------- */

static int is_within(const usp_layer_field *field, double value) {
    return value >= field->least && value <= field->most; /* NaN is not */
}

static usp_status check_range(const usp_layer_field *field, const usp_layer_config *c) {
    double value = usp_layer_field_value(field, c);
    int named = field->form == USP_FIELD_ENUM;
    USP_REQUIRE(is_within(field, value), "usp_layer_config.%s is %.10g: must be in %.10g .. %.10g%s%s", field->name,
                value, field->least, field->most, named ? ": " : "", named ? field->values : "");
    return USP_OK;
}

/* Keys behind the diagonal of a causal mask are a contradiction. What a recurrence that knows both directions would do
 * with a decay or a first state could be said, but is not. */
static usp_status check_kind(const usp_layer_field *field, const usp_layer_config *c) {
    if (usp_layer_field_value(field, c) == 0) return USP_OK;
    USP_REQUIRE(!field->only || field->only == c->attention, "usp_layer_config.%s is set: only %s attention has it",
                field->name, field->only == USP_SOFTMAX ? "softmax" : "linear");
    if (field->mask && field->mask != c->mask)
        return usp_fail(field->only == USP_LINEAR ? USP_UNSUPPORTED : USP_INVALID,
                        "usp_layer_config.%s is set: only a %s mask has it", field->name,
                        field->mask == USP_MASK_CAUSAL ? "causal" : "full");
    return USP_OK;
}

static usp_status check_array(const usp_layer_field *field, const usp_layer_config *c) {
    const float *array;
    memcpy(&array, (const char *)c + field->offset, sizeof array);
    for (int h = 0; array && h < usp_layer_config_heads(c); h++)
        USP_REQUIRE(is_within(field, array[h]), "usp_layer_config.%s[%d] is %.10g: must be in %.10g .. %.10g",
                    field->name, h, (double)array[h], field->least, field->most);
    return USP_OK;
}

static usp_status check_fields(const usp_layer_config *c) {
    for (const usp_layer_field *field = usp_layer_fields; field->name; field++)
        if (field->form != USP_FIELD_HEADS) USP_TRY(check_range(field, c));
    for (const usp_layer_field *field = usp_layer_fields; field->name; field++) USP_TRY(check_kind(field, c));
    return USP_OK;
}

static usp_status check_arrays(const usp_layer_config *c) {
    for (const usp_layer_field *field = usp_layer_fields; field->name; field++)
        if (field->form == USP_FIELD_HEADS) USP_TRY(check_array(field, c));
    return USP_OK;
}

/* ---- fields together --------------------------------------------------------------------------------------------- */

static usp_status check_softmax(const usp_layer_config *c) {
    USP_REQUIRE(c->kv_heads <= c->heads && c->heads % c->kv_heads == 0,
                "usp_layer_config.kv_heads is %d: must divide heads, which is %d", c->kv_heads, c->heads);
    USP_REQUIRE(c->value_heads == c->kv_heads,
                "usp_layer_config.value_heads is %d: softmax attention has as many as kv_heads, %d", c->value_heads,
                c->kv_heads);
    USP_REQUIRE(!c->dlse || c->return_lse, "usp_layer_config.dlse is set: it needs return_lse");
    return USP_OK;
}

static usp_status check_linear(const usp_layer_config *c) {
    int most = usp_layer_config_heads(c);
    USP_REQUIRE(most % c->heads == 0, "usp_layer_config.heads is %d: must divide the most of the three, %d", c->heads,
                most);
    USP_REQUIRE(most % c->kv_heads == 0, "usp_layer_config.kv_heads is %d: must divide the most of the three, %d",
                c->kv_heads, most);
    USP_REQUIRE(most % c->value_heads == 0, "usp_layer_config.value_heads is %d: must divide the most of the three, %d",
                c->value_heads, most);
    USP_REQUIRE(!c->final_state || (c->scale >= 0x1p-64f && c->scale <= 0x1p64f),
                "usp_layer_config.scale is %g: with final_state it must be in 2^-64 .. 2^64, since backward divides "
                "dfinal_state by it",
                (double)c->scale);
    return USP_OK;
}

int usp_layer_config_operand_heads(const usp_layer_config *c, usp_operand operand) {
    const int heads[] = {c->heads, c->kv_heads, c->value_heads, usp_layer_config_heads(c)};
    return heads[operand];
}

int usp_layer_config_heads(const usp_layer_config *c) {
    int most = c->heads > c->kv_heads ? c->heads : c->kv_heads;
    return most > c->value_heads ? most : c->value_heads;
}

usp_status usp_layer_config_resolve(const usp_layer_config *given, usp_layer_config *c) {
    USP_TRY(usp_abi_read(c, sizeof *c, given, "usp_layer_config"));
    USP_TRY(check_fields(c));
    if (!c->kv_heads) c->kv_heads = c->heads;
    if (!c->value_heads) c->value_heads = c->kv_heads;
    if (!c->value_dim) c->value_dim = c->head_dim;
    if (c->scale == 0) c->scale = c->attention == USP_SOFTMAX ? 1 / sqrtf((float)c->head_dim) : 1;
    USP_TRY(c->attention == USP_SOFTMAX ? check_softmax(c) : check_linear(c));
    return check_arrays(c);
}

/* ---- all ranks together ------------------------------------------------------------------------------------------ */

/* What ranks compare: the fields as they are, an array by its hash. */
typedef struct record {
    int32_t ranks, ulysses, ring, padding;
    usp_layer_config config;
    uint64_t sequence;
} record;
_Static_assert(sizeof(record) <= USP_AGREE_BYTES, "a ballot holds the record");

static void hash_array(const usp_layer_field *field, usp_layer_config *c) {
    const float *array;
    memcpy(&array, (char *)c + field->offset, sizeof array);
    uint64_t hash = array ? usp_hash(1, array, (size_t)usp_layer_config_heads(c) * sizeof(float)) : 0;
    memcpy((char *)c + field->offset, &hash, sizeof array);
}

static record make_record(const usp_mesh *mesh, const usp_layer_config *config, const usp_sequence *sequence) {
    record r = {mesh->ranks, mesh->ulysses, mesh->ring, 0, *config, usp_sequence_identity(sequence)};
    for (const usp_layer_field *field = usp_layer_fields; field->name; field++)
        if (field->form == USP_FIELD_HEADS) hash_array(field, &r.config);
    return r;
}

usp_status usp_layer_config_agree(const usp_mesh *mesh, usp_status mine, const usp_layer_config *config,
                                  const usp_sequence *sequence) {
    enum { ROOM = 2 + sizeof(usp_layer_config) / sizeof(int) };
    usp_field fields[ROOM] = {{"mesh", 0, offsetof(record, padding)}};
    int count = 1;
    for (const usp_layer_field *field = usp_layer_fields; field->name; field++)
        fields[count++] =
            (usp_field){field->name, offsetof(record, config) + field->offset, usp_layer_field_size(field)};
    fields[count++] = (usp_field){"sequence", offsetof(record, sequence), sizeof(uint64_t)};
    record r = {.ranks = mesh->ranks};
    if (mine == USP_OK) r = make_record(mesh, config, sequence);
    return usp_world_agree(mesh->world, mine,
                           &(usp_agreement){.what = "layer",
                                            .group = mesh->copy,
                                            .record = &r,
                                            .size = sizeof r,
                                            .fields = fields,
                                            .field_count = count,
                                            .common = sizeof(int32_t)});
}
