/* config.c - checks a layer's configuration, fills in its defaults and compares it between ranks. Plans nothing. */
#include "abi.h"
#include "error.h"
#include "layer.h"
#include <math.h>
#include <string.h>

static usp_status check_enums(const usp_layer_config *c) {
    USP_REQUIRE(c->attention == USP_SOFTMAX || c->attention == USP_LINEAR,
                "usp_layer_config.attention is %d: no such kind", (int)c->attention);
    USP_REQUIRE(c->mask != 0, "usp_layer_config.mask is not set: USP_MASK_FULL or USP_MASK_CAUSAL");
    USP_REQUIRE(c->mask == USP_MASK_FULL || c->mask == USP_MASK_CAUSAL, "usp_layer_config.mask is %d: no such mask",
                (int)c->mask);
    USP_REQUIRE(usp_dtype_size(c->dtype) > 0, "usp_layer_config.dtype is %d: no such dtype", (int)c->dtype);
    USP_REQUIRE(c->state_exchange >= USP_STATE_AUTO && c->state_exchange <= USP_STATE_GATHER,
                "usp_layer_config.state_exchange is %d: no such exchange", (int)c->state_exchange);
    return USP_OK;
}

static usp_status check_flag(int value, const char *name) {
    USP_REQUIRE(value == 0 || value == 1, "usp_layer_config.%s is %d: must be 0 or 1", name, value);
    return USP_OK;
}

static usp_status check_flags(const usp_layer_config *c) {
    USP_TRY(check_flag(c->return_lse, "return_lse"));
    USP_TRY(check_flag(c->deterministic, "deterministic"));
    USP_TRY(check_flag(c->recompute_state, "recompute_state"));
    USP_TRY(check_flag(c->initial_state, "initial_state"));
    return check_flag(c->final_state, "final_state");
}

static usp_status check_extent(int value, int least, const char *name) {
    USP_REQUIRE(value >= least && value <= 65536, "usp_layer_config.%s is %d: must be in %d .. 65536", name, value,
                least);
    return USP_OK;
}

static usp_status check_extents(const usp_layer_config *c) {
    USP_TRY(check_extent(c->batch, 1, "batch"));
    USP_TRY(check_extent(c->heads, 1, "heads"));
    USP_TRY(check_extent(c->kv_heads, 0, "kv_heads"));
    USP_TRY(check_extent(c->value_heads, 0, "value_heads"));
    USP_TRY(check_extent(c->head_dim, 1, "head_dim"));
    USP_TRY(check_extent(c->value_dim, 0, "value_dim"));
    USP_REQUIRE(isfinite(c->scale) && c->scale >= 0, "usp_layer_config.scale is %g: must be finite and not negative",
                (double)c->scale);
    return USP_OK;
}

static usp_status check_softmax(const usp_layer_config *c) {
    USP_REQUIRE(c->kv_heads <= c->heads && c->heads % c->kv_heads == 0,
                "usp_layer_config.kv_heads is %d: must divide heads, which is %d", c->kv_heads, c->heads);
    USP_REQUIRE(c->value_heads == c->kv_heads,
                "usp_layer_config.value_heads is %d: softmax attention has as many as kv_heads, %d", c->value_heads,
                c->kv_heads);
    USP_REQUIRE(c->state_exchange == USP_STATE_AUTO,
                "usp_layer_config.state_exchange is set: only linear attention has a state");
    USP_REQUIRE(!c->recompute_state, "usp_layer_config.recompute_state is set: only linear attention has a state");
    USP_REQUIRE(!c->initial_state, "usp_layer_config.initial_state is set: only linear attention has a state");
    USP_REQUIRE(!c->final_state, "usp_layer_config.final_state is set: only linear attention has a state");
    USP_REQUIRE(!c->decay, "usp_layer_config.decay is set: only linear attention decays");
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
    USP_REQUIRE(!c->return_lse, "usp_layer_config.return_lse is set: linear attention has no log-sum-exp");
    if (c->mask != USP_MASK_CAUSAL && c->decay)
        return usp_fail(USP_UNSUPPORTED,
                        "usp_layer_config.decay is set: bidirectional linear attention has lambda = 1");
    if (c->mask != USP_MASK_CAUSAL && c->initial_state)
        return usp_fail(USP_UNSUPPORTED,
                        "usp_layer_config.initial_state is set: bidirectional linear attention has no first token");
    USP_REQUIRE(!c->final_state || (c->scale >= 0x1p-64f && c->scale <= 0x1p64f),
                "usp_layer_config.scale is %g: with final_state it must be in 2^-64 .. 2^64, since backward divides "
                "dfinal_state by it",
                (double)c->scale);
    for (int h = 0; c->decay && h < most; h++)
        USP_REQUIRE(isfinite(c->decay[h]) && c->decay[h] <= 0,
                    "usp_layer_config.decay[%d] is %g: must be a logarithm <= 0", h, (double)c->decay[h]);
    return USP_OK;
}

int usp_layer_config_operand_heads(const usp_layer_config *c, usp_operand operand) {
    const int heads[USP_OPERANDS] = {c->heads, c->kv_heads, c->value_heads, usp_layer_config_heads(c)};
    return heads[operand];
}

int usp_layer_config_heads(const usp_layer_config *c) {
    int most = c->heads > c->kv_heads ? c->heads : c->kv_heads;
    return most > c->value_heads ? most : c->value_heads;
}

usp_status usp_layer_config_resolve(const usp_layer_config *given, usp_layer_config *c) {
    USP_TRY(usp_abi_read(c, sizeof *c, given, "usp_layer_config"));
    USP_TRY(check_enums(c));
    USP_TRY(check_flags(c));
    USP_TRY(check_extents(c));
    if (!c->kv_heads) c->kv_heads = c->heads;
    if (!c->value_heads) c->value_heads = c->kv_heads;
    if (!c->value_dim) c->value_dim = c->head_dim;
    if (c->scale == 0) c->scale = c->attention == USP_SOFTMAX ? 1 / sqrtf((float)c->head_dim) : 1;
    return c->attention == USP_SOFTMAX ? check_softmax(c) : check_linear(c);
}

usp_status usp_layer_config_agree(const usp_mesh *mesh, usp_status mine, const usp_layer_config *config,
                                  const usp_sequence *sequence) {
    struct record {
        int32_t ranks, ulysses, ring, padding;
        unsigned char config[offsetof(usp_layer_config, decay)];
        uint64_t decay_hash, sequence;
    } record = {mesh->ranks, mesh->ulysses, mesh->ring, 0, {0}, 0, 0};
    _Static_assert(sizeof record <= USP_AGREE_BYTES, "a ballot holds the record");
    static const struct {
        const char *name;
        size_t offset;
    } names[] = {{"attention", offsetof(usp_layer_config, attention)},
                 {"mask", offsetof(usp_layer_config, mask)},
                 {"dtype", offsetof(usp_layer_config, dtype)},
                 {"batch", offsetof(usp_layer_config, batch)},
                 {"heads", offsetof(usp_layer_config, heads)},
                 {"kv_heads", offsetof(usp_layer_config, kv_heads)},
                 {"value_heads", offsetof(usp_layer_config, value_heads)},
                 {"head_dim", offsetof(usp_layer_config, head_dim)},
                 {"value_dim", offsetof(usp_layer_config, value_dim)},
                 {"scale", offsetof(usp_layer_config, scale)},
                 {"return_lse", offsetof(usp_layer_config, return_lse)},
                 {"deterministic", offsetof(usp_layer_config, deterministic)},
                 {"state_exchange", offsetof(usp_layer_config, state_exchange)},
                 {"recompute_state", offsetof(usp_layer_config, recompute_state)},
                 {"initial_state", offsetof(usp_layer_config, initial_state)},
                 {"final_state", offsetof(usp_layer_config, final_state)}};
    enum { NAMES = sizeof names / sizeof names[0] };
    usp_field fields[NAMES + 3];
    fields[0] = (usp_field){"mesh", 0, 3 * sizeof(int32_t)};
    for (int i = 0; i < NAMES; i++)
        fields[1 + i] = (usp_field){names[i].name, offsetof(struct record, config) + names[i].offset, sizeof(int)};
    fields[NAMES + 1] = (usp_field){"decay", offsetof(struct record, decay_hash), sizeof(uint64_t)};
    fields[NAMES + 2] = (usp_field){"sequence", offsetof(struct record, sequence), sizeof(uint64_t)};
    memcpy(record.config, config, sizeof record.config);
    if (mine == USP_OK && config->decay)
        record.decay_hash = usp_hash(1, config->decay, (size_t)usp_layer_config_heads(config) * sizeof(float));
    if (mine == USP_OK) record.sequence = usp_sequence_identity(sequence);
    return usp_world_agree(mesh->world, mine,
                           &(usp_agreement){.what = "layer",
                                            .group = mesh->copy,
                                            .record = &record,
                                            .size = sizeof record,
                                            .fields = fields,
                                            .field_count = NAMES + 3,
                                            .common = sizeof(int32_t)});
}
