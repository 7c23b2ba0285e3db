/* cases.c - the tables of tested configurations, and how a case becomes the library's config structs. Runs nothing. */
#include "cases.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

const usp_split usp_splits[USP_SPLITS] = {{1, 1}, {1, 2}, {2, 1}, {1, 3}, {3, 1}, {1, 4}, {2, 2}, {4, 1}, {1, 6},
                                          {2, 3}, {3, 2}, {6, 1}, {1, 8}, {2, 4}, {4, 2}, {8, 1}, {1, 5}, {5, 1}};

/* ---- one case ---------------------------------------------------------------------------------------------------- */

static void set_default(int *field, int value) {
    if (*field == 0) *field = value;
}

usp_case usp_case_states_alone(int ulysses) {
    return (usp_case){.attention = USP_LINEAR,
                      .layout = USP_LAYOUT_CUSTOM,
                      .ulysses = ulysses,
                      .heads = ulysses,
                      .initial_state = 1,
                      .final_state = 1,
                      .mask = USP_MASK_CAUSAL};
}

usp_case usp_case_complete(usp_case c) {
    set_default(&c.ulysses, 1);
    set_default(&c.ring, 1);
    set_default(&c.copies, 1);
    if (c.attention == 0) c.attention = USP_SOFTMAX;
    if (c.mask == 0) c.mask = USP_MASK_FULL;
    set_default(&c.batch, 1);
    set_default(&c.heads, 4);
    set_default(&c.kv_heads, c.heads);
    set_default(&c.value_heads, c.kv_heads);
    set_default(&c.head_dim, 8);
    set_default(&c.value_dim, c.head_dim);
    return c;
}

/* Only equal lengths have common positions. A linear layer follows the order of the tokens from rank to rank: where no
 * rank holds runs of them it refuses. */
usp_expectation usp_case_expectation(const usp_case *c) {
    int linear = c->attention == USP_LINEAR;
    int scattered = c->layout == USP_LAYOUT_STRIPE || c->layout == USP_LAYOUT_CUSTOM;
    if (c->key_tokens && c->key_tokens != c->tokens && (linear || c->mask == USP_MASK_CAUSAL)) return USP_MUST_REFUSE;
    if (linear && c->ring > 1 && c->layout == USP_LAYOUT_STRIPE && c->mask == USP_MASK_CAUSAL &&
        c->tokens > (int64_t)c->ulysses * c->ring)
        return USP_MUST_REFUSE;
    if (linear && scattered) return USP_MAY_REFUSE;
    return USP_WORKS;
}

int usp_case_out_heads(const usp_case *c) {
    int most = c->heads > c->kv_heads ? c->heads : c->kv_heads;
    return most > c->value_heads ? most : c->value_heads;
}

int64_t usp_case_keys(const usp_case *c) {
    return c->key_tokens ? c->key_tokens : c->tokens;
}

void usp_case_decay(const usp_case *c, float *decay) {
    static const float rates[] = {-0.01f, 0.0f, -0.1f, -3.0f, -0.5f};
    for (int h = 0; h < usp_case_out_heads(c); h++) decay[h] = c->decay == 2 ? -0.05f : rates[h % 5];
}

size_t usp_case_print(const usp_case *c, char *text, size_t capacity) {
    static const char *const layouts[] = {"zigzag", "contiguous", "stripe", "per-document", "custom"};
    static const char *const dtypes[] = {"f32", "f16", "bf16"};
    static const char *const arrangements[] = {"bshd", "bhsd", "sbhd", "packed", "padded"};
    int n = snprintf(text, capacity,
                     "U%d R%d x%d %s %s %s %s %s b%d s%lld/%lld h%d/%d/%d d%d/%d%s%s%s%s%s%s decay%d exchange%d seed%d",
                     c->ulysses, c->ring, c->copies, c->attention == USP_LINEAR ? "linear" : "softmax",
                     c->mask == USP_MASK_CAUSAL ? "causal" : "full", dtypes[c->dtype], layouts[c->layout],
                     arrangements[c->arrangement], c->batch, (long long)c->tokens, (long long)usp_case_keys(c),
                     c->heads, c->kv_heads, c->value_heads, c->head_dim, c->value_dim, c->scale != 0 ? " scale" : "",
                     c->return_lse ? " lse" : "", c->deterministic ? " deterministic" : "",
                     c->recompute_state ? " recompute" : "", c->initial_state ? " initial" : "",
                     c->final_state ? " final" : "", c->decay, (int)c->state_exchange, c->seed);
    return n < 0 ? 0 : (size_t)n;
}

/* ---- configs ----------------------------------------------------------------------------------------------------- */

/* Stripes, dealt from the last rank, over the first third of the tokens; then runs of 7, the last ones first. Some
 * ranks have no run. */
static int64_t custom_segments(int64_t tokens, int p, int n, usp_segment *segment) {
    int64_t striped = tokens / 3, count = 0;
    int64_t run = tokens / 7 + 1 > USP_CASE_SEGMENTS - 8 ? tokens / 100 : 7;
    for (int64_t b = (tokens - striped + run - 1) / run - 1; b >= 0; b--) {
        int64_t start = striped + b * run, length = tokens - start < run ? tokens - start : run;
        if ((3 * b + 1) % n == p) segment[count++] = (usp_segment){start, length, 1};
    }
    int64_t first = n - 1 - p;
    if (first < striped) segment[count++] = (usp_segment){first, (striped - first + n - 1) / n, n};
    return count;
}

static int64_t document_ends(int64_t tokens, int64_t *end) {
    static const int lengths[] = {1, 17, 40, 5, 64, 3};
    int64_t count = 0, at = 0;
    while (at < tokens) {
        int64_t length = lengths[count % 6];
        at = tokens - at > length && count < USP_CASE_SEGMENTS - 2 ? at + length : tokens;
        end[count++] = at;
    }
    if (count == 0) end[count++] = 0;
    return count;
}

static void configure_sequence(const usp_case *c, int p, int n, usp_case_configs *configs) {
    usp_sequence_config *s = &configs->sequence;
    *s = (usp_sequence_config){.struct_size = sizeof *s, .layout = c->layout, .tokens = usp_named_tokens(c->tokens)};
    s->key_tokens = c->key_tokens;
    if (c->layout == USP_LAYOUT_CUSTOM) {
        s->segments = custom_segments(c->tokens, p, n, configs->segment);
        s->segment = configs->segment;
    }
    if (c->layout == USP_LAYOUT_ZIGZAG_PER_DOCUMENT) {
        s->documents = document_ends(c->tokens, configs->document_ends);
        s->document_ends = configs->document_ends;
    }
    configs->keys = *s;
    configs->keys.tokens = usp_named_tokens(usp_case_keys(c));
    configs->keys.key_tokens = 0;
}

void usp_case_configure(const usp_case *c, int p, int n, usp_case_configs *configs) {
    int linear = c->attention == USP_LINEAR;
    configure_sequence(c, p, n, configs);
    usp_case_decay(c, configs->decay);
    configs->layer = (usp_layer_config){.struct_size = sizeof configs->layer,
                                        .attention = c->attention,
                                        .mask = c->mask,
                                        .dtype = c->dtype,
                                        .batch = c->batch,
                                        .heads = c->heads,
                                        .kv_heads = c->kv_heads,
                                        .value_heads = linear ? c->value_heads : 0,
                                        .head_dim = c->head_dim,
                                        .value_dim = c->value_dim,
                                        .scale = c->scale,
                                        .return_lse = c->return_lse,
                                        .deterministic = c->deterministic,
                                        .state_exchange = c->state_exchange,
                                        .recompute_state = c->recompute_state,
                                        .initial_state = c->initial_state,
                                        .final_state = c->final_state,
                                        .decay = c->decay ? configs->decay : NULL};
}

/* ---- tables ------------------------------------------------------------------------------------------------------ */

/* Lengths that nothing divides, empty ranks, and more rows than one work item holds. */
static const usp_case softmax_cases[] = {
    /* every layout, causal and full */
    {.tokens = 96, .mask = USP_MASK_CAUSAL, .return_lse = 1},
    {.tokens = 97, .mask = USP_MASK_CAUSAL, .layout = USP_LAYOUT_CONTIGUOUS, .return_lse = 1},
    {.tokens = 97, .mask = USP_MASK_CAUSAL, .layout = USP_LAYOUT_STRIPE, .return_lse = 1},
    {.tokens = 97, .mask = USP_MASK_CAUSAL, .layout = USP_LAYOUT_ZIGZAG_PER_DOCUMENT, .return_lse = 1},
    {.tokens = 97, .mask = USP_MASK_CAUSAL, .layout = USP_LAYOUT_CUSTOM, .return_lse = 1},
    {.tokens = 96, .return_lse = 1},
    {.tokens = 61, .layout = USP_LAYOUT_CONTIGUOUS, .return_lse = 1},
    {.tokens = 61, .layout = USP_LAYOUT_STRIPE, .return_lse = 1},
    {.tokens = 61, .layout = USP_LAYOUT_ZIGZAG_PER_DOCUMENT, .return_lse = 1},
    {.tokens = 61, .layout = USP_LAYOUT_CUSTOM, .return_lse = 1},
    /* few tokens: ranks without any */
    {.tokens = 0, .mask = USP_MASK_CAUSAL, .return_lse = 1},
    {.tokens = 1, .mask = USP_MASK_CAUSAL, .return_lse = 1},
    {.tokens = 7, .mask = USP_MASK_CAUSAL, .return_lse = 1},
    {.tokens = 0, .layout = USP_LAYOUT_CONTIGUOUS},
    {.tokens = 1, .layout = USP_LAYOUT_CONTIGUOUS},
    {.tokens = 7, .layout = USP_LAYOUT_CONTIGUOUS, .mask = USP_MASK_CAUSAL},
    {.tokens = 7, .layout = USP_LAYOUT_STRIPE, .mask = USP_MASK_CAUSAL},
    {.tokens = 1, .layout = USP_LAYOUT_STRIPE, .mask = USP_MASK_CAUSAL},
    {.tokens = 7, .layout = USP_LAYOUT_CUSTOM, .mask = USP_MASK_CAUSAL},
    {.tokens = 7, .layout = USP_LAYOUT_ZIGZAG_PER_DOCUMENT, .mask = USP_MASK_CAUSAL},
    /* keys of another length */
    {.tokens = 61, .key_tokens = 97, .return_lse = 1},
    {.tokens = 97, .key_tokens = 7, .layout = USP_LAYOUT_CONTIGUOUS, .return_lse = 1},
    {.tokens = 1, .key_tokens = 61, .layout = USP_LAYOUT_STRIPE},
    {.tokens = 61, .key_tokens = 1, .heads = 6, .kv_heads = 2, .head_dim = 8, .value_dim = 12},
    {.tokens = 61, .key_tokens = 33, .mask = USP_MASK_CAUSAL, .return_lse = 1},
    {.tokens = 33, .key_tokens = 61, .mask = USP_MASK_CAUSAL, .return_lse = 1},
    {.tokens = 0, .key_tokens = 13},
    /* heads: GQA, MQA, not divisible by ulysses, fewer than ulysses, both, more dims of one kind than of the other */
    {.tokens = 61, .mask = USP_MASK_CAUSAL, .heads = 8, .kv_heads = 2, .return_lse = 1},
    {.tokens = 61, .mask = USP_MASK_CAUSAL, .heads = 8, .kv_heads = 1, .return_lse = 1},
    {.tokens = 61, .mask = USP_MASK_CAUSAL, .heads = 8, .kv_heads = 8},
    {.tokens = 61, .mask = USP_MASK_CAUSAL, .heads = 6, .kv_heads = 3},
    {.tokens = 61, .mask = USP_MASK_CAUSAL, .heads = 5, .kv_heads = 5, .return_lse = 1},
    {.tokens = 61, .mask = USP_MASK_CAUSAL, .heads = 10, .kv_heads = 2, .head_dim = 12, .value_dim = 20},
    {.tokens = 61, .mask = USP_MASK_CAUSAL, .heads = 12, .kv_heads = 4, .head_dim = 20, .value_dim = 12},
    {.tokens = 61, .mask = USP_MASK_CAUSAL, .heads = 1, .return_lse = 1},
    {.tokens = 61, .mask = USP_MASK_CAUSAL, .heads = 3, .kv_heads = 1},
    {.tokens = 61, .heads = 7, .kv_heads = 1, .layout = USP_LAYOUT_STRIPE, .return_lse = 1},
    /* shapes */
    {.tokens = 33, .mask = USP_MASK_CAUSAL, .batch = 3, .heads = 4, .kv_heads = 2, .return_lse = 1},
    {.tokens = 61, .mask = USP_MASK_CAUSAL, .head_dim = 1, .value_dim = 3},
    {.tokens = 61, .mask = USP_MASK_CAUSAL, .head_dim = 64, .heads = 2},
    {.tokens = 61, .mask = USP_MASK_CAUSAL, .scale = 0.5f, .deterministic = 1},
    /* arrangements */
    {.tokens = 61, .mask = USP_MASK_CAUSAL, .batch = 2, .arrangement = USP_BHSD, .return_lse = 1},
    {.tokens = 61, .mask = USP_MASK_CAUSAL, .batch = 2, .arrangement = USP_SBHD, .kv_heads = 2},
    {.tokens = 61, .mask = USP_MASK_CAUSAL, .batch = 2, .arrangement = USP_PACKED, .return_lse = 1},
    {.tokens = 61, .mask = USP_MASK_CAUSAL, .batch = 2, .arrangement = USP_PACKED, .heads = 6, .kv_heads = 2},
    {.tokens = 61, .mask = USP_MASK_CAUSAL, .batch = 2, .arrangement = USP_PADDED, .value_dim = 5, .return_lse = 1},
};

static const usp_case linear_cases[] = {
    /* every layout, causal and full, with and without decay */
    {.tokens = 96, .mask = USP_MASK_CAUSAL, .decay = 1},
    {.tokens = 97, .mask = USP_MASK_CAUSAL, .decay = 1, .layout = USP_LAYOUT_CONTIGUOUS},
    {.tokens = 97, .mask = USP_MASK_CAUSAL},
    {.tokens = 61, .mask = USP_MASK_CAUSAL, .layout = USP_LAYOUT_CONTIGUOUS},
    {.tokens = 97, .mask = USP_MASK_CAUSAL, .decay = 1, .layout = USP_LAYOUT_STRIPE},
    {.tokens = 97, .mask = USP_MASK_CAUSAL, .decay = 1, .layout = USP_LAYOUT_ZIGZAG_PER_DOCUMENT},
    {.tokens = 97, .mask = USP_MASK_CAUSAL, .decay = 1, .layout = USP_LAYOUT_CUSTOM},
    {.tokens = 97},
    {.tokens = 61, .layout = USP_LAYOUT_CONTIGUOUS},
    {.tokens = 61, .layout = USP_LAYOUT_STRIPE},
    {.tokens = 61, .layout = USP_LAYOUT_ZIGZAG_PER_DOCUMENT},
    {.tokens = 61, .layout = USP_LAYOUT_CUSTOM},
    /* few tokens */
    {.tokens = 0, .mask = USP_MASK_CAUSAL, .decay = 1, .initial_state = 1, .final_state = 1},
    {.tokens = 1, .mask = USP_MASK_CAUSAL, .decay = 1, .initial_state = 1, .final_state = 1},
    {.tokens = 7, .mask = USP_MASK_CAUSAL, .decay = 1, .initial_state = 1, .final_state = 1},
    {.tokens = 7, .mask = USP_MASK_CAUSAL, .decay = 1, .layout = USP_LAYOUT_CONTIGUOUS},
    {.tokens = 0, .final_state = 1},
    {.tokens = 1, .layout = USP_LAYOUT_CONTIGUOUS},
    {.tokens = 7},
    /* states in and out, both ways of exchanging them, kept or computed again */
    {.tokens = 61, .mask = USP_MASK_CAUSAL, .decay = 1, .initial_state = 1},
    {.tokens = 61, .mask = USP_MASK_CAUSAL, .decay = 1, .final_state = 1},
    {.tokens = 61, .mask = USP_MASK_CAUSAL, .initial_state = 1, .final_state = 1, .layout = USP_LAYOUT_CONTIGUOUS},
    {.tokens = 61, .mask = USP_MASK_CAUSAL, .decay = 1, .initial_state = 1, .final_state = 1, .recompute_state = 1},
    {.tokens = 61,
     .mask = USP_MASK_CAUSAL,
     .decay = 1,
     .initial_state = 1,
     .final_state = 1,
     .recompute_state = 1,
     .state_exchange = USP_STATE_CHAIN},
    {.tokens = 61,
     .mask = USP_MASK_CAUSAL,
     .decay = 1,
     .initial_state = 1,
     .final_state = 1,
     .recompute_state = 1,
     .state_exchange = USP_STATE_GATHER},
    {.tokens = 61,
     .mask = USP_MASK_CAUSAL,
     .decay = 1,
     .initial_state = 1,
     .final_state = 1,
     .state_exchange = USP_STATE_CHAIN},
    {.tokens = 61,
     .mask = USP_MASK_CAUSAL,
     .decay = 1,
     .initial_state = 1,
     .final_state = 1,
     .state_exchange = USP_STATE_GATHER},
    {.tokens = 61,
     .mask = USP_MASK_CAUSAL,
     .decay = 1,
     .state_exchange = USP_STATE_CHAIN,
     .layout = USP_LAYOUT_CONTIGUOUS},
    {.tokens = 61, .final_state = 1, .state_exchange = USP_STATE_CHAIN},
    {.tokens = 61, .final_state = 1, .state_exchange = USP_STATE_GATHER, .recompute_state = 1},
    /* heads and dims */
    {.tokens = 61, .mask = USP_MASK_CAUSAL, .decay = 1, .heads = 8, .head_dim = 8, .value_dim = 20, .scale = 0.3f},
    {.tokens = 61, .mask = USP_MASK_CAUSAL, .decay = 1, .initial_state = 1, .final_state = 1, .scale = 0x1p-64f},
    {.tokens = 61, .mask = USP_MASK_CAUSAL, .decay = 1, .heads = 5, .head_dim = 12, .value_dim = 4, .final_state = 1},
    {.tokens = 61, .mask = USP_MASK_CAUSAL, .decay = 1, .heads = 8, .kv_heads = 2, .initial_state = 1},
    {.tokens = 61, .mask = USP_MASK_CAUSAL, .decay = 1, .heads = 2, .kv_heads = 2, .value_heads = 8, .final_state = 1},
    {.tokens = 61, .mask = USP_MASK_CAUSAL, .decay = 1, .heads = 2, .kv_heads = 4, .value_heads = 12},
    {.tokens = 61, .mask = USP_MASK_CAUSAL, .decay = 1, .heads = 6, .kv_heads = 1, .value_heads = 3},
    {.tokens = 61, .mask = USP_MASK_CAUSAL, .decay = 1, .heads = 1},
    {.tokens = 61, .heads = 2, .kv_heads = 2, .value_heads = 6, .final_state = 1},
    {.tokens = 33, .mask = USP_MASK_CAUSAL, .decay = 2, .batch = 3, .heads = 4, .initial_state = 1, .final_state = 1},
    {.tokens = 61, .mask = USP_MASK_CAUSAL, .decay = 1, .head_dim = 1, .value_dim = 3},
    {.tokens = 61, .mask = USP_MASK_CAUSAL, .decay = 2, .head_dim = 64, .value_dim = 32, .heads = 2},
    /* arrangements */
    {.tokens = 61, .mask = USP_MASK_CAUSAL, .decay = 1, .batch = 2, .arrangement = USP_BHSD},
    {.tokens = 61, .mask = USP_MASK_CAUSAL, .decay = 1, .batch = 2, .arrangement = USP_SBHD},
    {.tokens = 61, .mask = USP_MASK_CAUSAL, .decay = 1, .batch = 2, .arrangement = USP_PACKED},
    {.tokens = 61, .mask = USP_MASK_CAUSAL, .decay = 1, .batch = 2, .arrangement = USP_PADDED, .value_dim = 5},
};

/* Dims that a tensor core can take, so that GPUs run these too. */
static const usp_case half_cases[] = {
    {.tokens = 97, .mask = USP_MASK_CAUSAL, .dtype = USP_BF16, .heads = 4, .head_dim = 64, .return_lse = 1},
    {.tokens = 97, .mask = USP_MASK_CAUSAL, .dtype = USP_F16, .heads = 4, .head_dim = 64, .return_lse = 1},
    {.tokens = 130, .dtype = USP_BF16, .heads = 4, .kv_heads = 2, .head_dim = 32, .return_lse = 1},
    {.tokens = 130, .dtype = USP_F16, .heads = 6, .kv_heads = 1, .head_dim = 32, .layout = USP_LAYOUT_STRIPE},
    {.tokens = 130,
     .mask = USP_MASK_CAUSAL,
     .dtype = USP_BF16,
     .heads = 6,
     .kv_heads = 3,
     .head_dim = 64,
     .value_dim = 32,
     .layout = USP_LAYOUT_CONTIGUOUS,
     .return_lse = 1},
    {.tokens = 61, .mask = USP_MASK_CAUSAL, .dtype = USP_BF16, .heads = 5, .head_dim = 16, .arrangement = USP_PACKED},
    {.tokens = 61, .mask = USP_MASK_CAUSAL, .dtype = USP_F16, .heads = 4, .head_dim = 16, .arrangement = USP_PADDED},
    {.tokens = 61, .mask = USP_MASK_CAUSAL, .dtype = USP_F16, .batch = 2, .head_dim = 16, .layout = USP_LAYOUT_CUSTOM},
    {.tokens = 61, .key_tokens = 97, .dtype = USP_BF16, .head_dim = 16, .return_lse = 1},
    {.tokens = 7, .mask = USP_MASK_CAUSAL, .dtype = USP_BF16, .head_dim = 16, .return_lse = 1},
    {.attention = USP_LINEAR,
     .tokens = 97,
     .mask = USP_MASK_CAUSAL,
     .dtype = USP_BF16,
     .decay = 1,
     .head_dim = 32,
     .scale = 0.2f,
     .initial_state = 1,
     .final_state = 1},
    {.attention = USP_LINEAR,
     .tokens = 97,
     .mask = USP_MASK_CAUSAL,
     .dtype = USP_F16,
     .decay = 1,
     .head_dim = 16,
     .value_dim = 32,
     .scale = 0.2f,
     .layout = USP_LAYOUT_CONTIGUOUS},
    {.attention = USP_LINEAR,
     .tokens = 97,
     .mask = USP_MASK_CAUSAL,
     .dtype = USP_BF16,
     .decay = 2,
     .heads = 2,
     .kv_heads = 2,
     .value_heads = 6,
     .head_dim = 32,
     .scale = 0.2f,
     .recompute_state = 1,
     .final_state = 1,
     .state_exchange = USP_STATE_CHAIN},
    {.attention = USP_LINEAR, .tokens = 97, .dtype = USP_F16, .head_dim = 16, .scale = 0.1f},
    {.attention = USP_LINEAR,
     .tokens = 97,
     .dtype = USP_BF16,
     .head_dim = 16,
     .scale = 0.1f,
     .arrangement = USP_PADDED},
};

/* More than one work item and block a segment. */
static const usp_case large_cases[] = {
    {.tokens = 700, .mask = USP_MASK_CAUSAL, .heads = 2, .head_dim = 16, .return_lse = 1},
    {.tokens = 701, .mask = USP_MASK_CAUSAL, .heads = 2, .kv_heads = 1, .layout = USP_LAYOUT_STRIPE, .return_lse = 1},
    {.tokens = 523, .mask = USP_MASK_CAUSAL, .heads = 2, .layout = USP_LAYOUT_CUSTOM},
    {.tokens = 300, .key_tokens = 701, .heads = 2, .layout = USP_LAYOUT_CONTIGUOUS, .return_lse = 1},
    {.attention = USP_LINEAR,
     .tokens = 1021,
     .mask = USP_MASK_CAUSAL,
     .decay = 1,
     .heads = 5,
     .head_dim = 16,
     .initial_state = 1,
     .final_state = 1},
    {.attention = USP_LINEAR,
     .tokens = 1021,
     .mask = USP_MASK_CAUSAL,
     .decay = 2,
     .heads = 2,
     .head_dim = 24,
     .layout = USP_LAYOUT_CONTIGUOUS,
     .state_exchange = USP_STATE_CHAIN,
     .final_state = 1},
    {.attention = USP_LINEAR, .tokens = 1021, .heads = 2, .head_dim = 16, .final_state = 1},
};

/* Heads as wide as models have them, more rows than one GPU tile. */
static const usp_case wide_cases[] = {
    {.tokens = 517,
     .mask = USP_MASK_CAUSAL,
     .dtype = USP_BF16,
     .heads = 4,
     .kv_heads = 2,
     .head_dim = 128,
     .return_lse = 1},
    {.tokens = 517,
     .mask = USP_MASK_CAUSAL,
     .dtype = USP_F16,
     .heads = 2,
     .head_dim = 64,
     .return_lse = 1,
     .layout = USP_LAYOUT_CONTIGUOUS},
    {.tokens = 517, .dtype = USP_BF16, .heads = 2, .head_dim = 128, .value_dim = 64, .layout = USP_LAYOUT_STRIPE},
    {.tokens = 400, .mask = USP_MASK_CAUSAL, .heads = 2, .head_dim = 64, .return_lse = 1},
    {.tokens = 300, .key_tokens = 517, .dtype = USP_BF16, .heads = 2, .kv_heads = 1, .head_dim = 64, .return_lse = 1},
    {.tokens = 300, .mask = USP_MASK_CAUSAL, .dtype = USP_BF16, .heads = 2, .head_dim = 192, .value_dim = 128},
    {.attention = USP_LINEAR,
     .tokens = 1021,
     .mask = USP_MASK_CAUSAL,
     .dtype = USP_BF16,
     .heads = 2,
     .head_dim = 128,
     .scale = 0.1f,
     .decay = 1,
     .initial_state = 1,
     .final_state = 1},
    {.attention = USP_LINEAR,
     .tokens = 1021,
     .mask = USP_MASK_CAUSAL,
     .dtype = USP_F16,
     .heads = 2,
     .head_dim = 64,
     .value_dim = 128,
     .scale = 0.1f,
     .decay = 2,
     .layout = USP_LAYOUT_CONTIGUOUS},
    {.attention = USP_LINEAR, .tokens = 1021, .dtype = USP_BF16, .heads = 2, .head_dim = 64, .scale = 0.05f},
};

enum {
    WIDE_CASES = sizeof wide_cases / sizeof wide_cases[0],
    SOFTMAX_CASES = sizeof softmax_cases / sizeof softmax_cases[0],
    LINEAR_CASES = sizeof linear_cases / sizeof linear_cases[0],
    HALF_CASES = sizeof half_cases / sizeof half_cases[0],
    LARGE_CASES = sizeof large_cases / sizeof large_cases[0]
};
const usp_table usp_softmax_table = {"softmax", USP_SOFTMAX, softmax_cases, SOFTMAX_CASES};
const usp_table usp_linear_table = {"linear", USP_LINEAR, linear_cases, LINEAR_CASES};
const usp_table usp_half_table = {"half", USP_SOFTMAX, half_cases, HALF_CASES};
const usp_table usp_wide_table = {"wide", USP_SOFTMAX, wide_cases, WIDE_CASES};
const usp_table usp_large_table = {"large", USP_SOFTMAX, large_cases, LARGE_CASES};

/* ---- random cases ------------------------------------------------------------------------------------------------ */

static void random_heads(uint64_t *state, usp_case *c) {
    static const int groups[] = {1, 1, 2, 3, 4};
    int heads = 1 + usp_random_below(state, 6), group = groups[usp_random_below(state, 5)];
    c->heads = heads * group;
    c->kv_heads = heads;
    if (c->attention != USP_LINEAR) return;
    int kind = usp_random_below(state, 3);
    if (kind == 1) {
        c->value_heads = c->heads;
        c->heads = c->kv_heads;
    }
    if (kind == 2) c->value_heads = c->heads;
}

usp_case usp_case_random(uint64_t *state, usp_split split, int64_t most) {
    usp_case c = {.ulysses = split.ulysses, .ring = split.ring, .seed = usp_random_below(state, 1000)};
    c.attention = usp_random_below(state, 2) ? USP_LINEAR : USP_SOFTMAX;
    c.mask = usp_random_below(state, 3) ? USP_MASK_CAUSAL : USP_MASK_FULL;
    c.dtype = (usp_dtype)(usp_random_below(state, 5) % 3);
    c.layout = (usp_layout)(usp_random_below(state, 8) % 5);
    c.arrangement = (usp_arrangement)usp_random_below(state, USP_ARRANGEMENTS);
    c.batch = 1 + usp_random_below(state, 2);
    random_heads(state, &c);
    c.head_dim = 1 + usp_random_below(state, 24);
    c.value_dim = usp_random_below(state, 2) ? 1 + usp_random_below(state, 24) : c.head_dim;
    c.tokens = usp_random_below(state, (int)most + 1);
    if (c.attention == USP_SOFTMAX) {
        c.return_lse = usp_random_below(state, 2);
        if (c.mask == USP_MASK_FULL && c.layout < USP_LAYOUT_ZIGZAG_PER_DOCUMENT && usp_random_below(state, 3) == 0)
            c.key_tokens = 1 + usp_random_below(state, (int)most);
    } else {
        int causal = c.mask == USP_MASK_CAUSAL;
        c.scale = 0.25f;
        c.decay = causal ? usp_random_below(state, 3) : 0;
        c.initial_state = causal && usp_random_below(state, 2);
        c.final_state = usp_random_below(state, 2);
        c.recompute_state = usp_random_below(state, 2);
        c.state_exchange = (usp_state_exchange)usp_random_below(state, 3);
    }
    return usp_case_complete(c);
}
