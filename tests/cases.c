/* cases.c - what a case is: its defaults, expectation, name and documents, the library's config structs made from it,
 * and random ones. Runs nothing. */
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
    if (c.layout == USP_LAYOUT_ZIGZAG_PER_DOCUMENT) set_default(&c.documents, 1);
    return c;
}

static int64_t count_documents(const usp_case *c) {
    usp_case_document_list list;
    usp_case_documents(c, &list);
    return list.count;
}

/* Do tokens lie behind the last document? */
static int pads(const usp_case *c) {
    return c->documents == 5 || c->documents == 7;
}

/* As many keys as queries, and no ends or segments of their own, are the queries' tokens. */
static int crosses(const usp_case *c) {
    return c->key_tokens && (c->key_tokens != c->tokens || c->documents || c->layout == USP_LAYOUT_CUSTOM);
}

/* A linear layer follows the order of the tokens from rank to rank: where no rank holds runs of them it refuses. */
static usp_expectation linear_expectation(const usp_case *c) {
    if (crosses(c)) return USP_MUST_REFUSE;
    if (c->prefixes || c->parents) return USP_MUST_REFUSE;
    int may_pad = pads(c) || (c->max_documents && c->layout != USP_LAYOUT_ZIGZAG_PER_DOCUMENT);
    int several = c->max_documents > 1 || count_documents(c) > 1;
    if (c->mask != USP_MASK_CAUSAL && (several || may_pad)) return USP_MUST_REFUSE;
    if (c->ring > 1 && c->layout == USP_LAYOUT_STRIPE && c->mask == USP_MASK_CAUSAL &&
        c->tokens > (int64_t)c->ulysses * c->ring)
        return USP_MUST_REFUSE;
    return c->layout == USP_LAYOUT_STRIPE || c->layout == USP_LAYOUT_CUSTOM ? USP_MAY_REFUSE : USP_WORKS;
}

/* Families of documents say how much more than a causal mask is seen; in trees no distance has a meaning. */
usp_expectation usp_case_expectation(const usp_case *c) {
    int cross = crosses(c), family = c->prefixes || c->parents;
    if (c->attention == USP_LINEAR) return linear_expectation(c);
    if (family && (cross || c->mask != USP_MASK_CAUSAL || (c->prefixes && c->parents))) return USP_MUST_REFUSE;
    if (c->parents && (c->window_left || c->slopes)) return USP_MUST_REFUSE;
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

void usp_case_slopes(const usp_case *c, float *slopes) {
    for (int h = 0; h < c->heads; h++) slopes[h] = 0.25f / (float)(1 + h % 4);
}

/* What few cases ask for. */
static size_t print_mask(const usp_case *c, char *text, size_t capacity) {
    int n = snprintf(text, capacity, "%s", "");
    if (c->documents)
        n = snprintf(text, capacity, " documents%d/%d prefixes%d%s", c->documents, c->max_documents, c->prefixes,
                     c->parents ? " parents" : "");
    if (c->window_left || c->window_right || c->alignment || c->route)
        n += snprintf(text + n, capacity - (size_t)n, " window%lld/%lld align%d route%d", (long long)c->window_left,
                      (long long)c->window_right, (int)c->alignment, (int)c->route);
    if (c->head_groups) n += snprintf(text + n, capacity - (size_t)n, " groups%d", c->head_groups);
    if (c->soft_cap > 0 || c->dropout > 0 || c->slopes || c->sinks || c->dlse || c->max_logit)
        n += snprintf(text + n, capacity - (size_t)n, " cap%g drop%g%s%s%s%s", (double)c->soft_cap, (double)c->dropout,
                      c->slopes ? " slopes" : "", c->sinks ? " sinks" : "", c->dlse ? " dlse" : "",
                      c->max_logit ? " max_logit" : "");
    return n < 0 ? 0 : (size_t)n;
}

size_t usp_case_print(const usp_case *c, char *text, size_t capacity) {
    static const char *const layouts[] = {"zigzag", "contiguous", "stripe", "per-document", "custom"};
    static const char *const dtypes[] = {"f32", "f16", "bf16"};
    static const char *const arrangements[] = {"bshd", "bhsd", "sbhd", "packed", "padded"};
    int n = snprintf(
        text, capacity,
        "U%d R%d x%d %s %s %s %s %s b%d s%lld/%lld h%d/%d/%d d%d/%d%s%s%s%s%s%s%s decay%d exchange%d seed%d",
        c->ulysses, c->ring, c->copies, c->attention == USP_LINEAR ? "linear" : "softmax",
        c->mask == USP_MASK_CAUSAL ? "causal" : "full", dtypes[c->dtype], layouts[c->layout],
        arrangements[c->arrangement], c->batch, (long long)c->tokens, (long long)usp_case_keys(c), c->heads,
        c->kv_heads, c->value_heads, c->head_dim, c->value_dim, c->scale != 0 ? " scale" : "",
        c->return_lse ? " lse" : "", c->deterministic ? " deterministic" : "", c->recompute_state ? " recompute" : "",
        c->initial_state ? " initial" : "", c->final_state ? " final" : "", c->shared_memory ? " shared" : "", c->decay,
        (int)c->state_exchange, c->seed);
    if (n < 0 || (size_t)n >= capacity) return n < 0 ? 0 : (size_t)n;
    return (size_t)n + print_mask(c, text + n, capacity - (size_t)n);
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

/* Lengths by pattern; the last document takes what is left, but in patterns 5 and 7. */
static int64_t document_length(int pattern, int64_t d, int64_t tokens) {
    static const int many[] = {1, 17, 40, 5, 64, 3}, empty[] = {0, 9, 0, 0, 30, 1}, few[] = {5, 2, 3};
    if (pattern >= 6) return tokens;
    if (pattern == 2) return d < 3 ? few[d] * tokens / 10 : tokens;
    if (pattern == 3) return empty[d % 6];
    if (pattern == 4) return 1 + d % 4;
    return many[d % 6];
}

static void cut_documents(const usp_case *c, usp_case_document_list *list) {
    int64_t end = pads(c) ? c->tokens - c->tokens / 4 : c->tokens, at = 0;
    while (at < end || list->count == 0) {
        int64_t length = document_length(c->documents, list->count, end);
        at = end - at > length && list->count < USP_CASE_DOCUMENTS - 2 ? at + length : end;
        list->ends[list->count++] = at;
    }
    if (c->documents == 3) list->ends[list->count++] = at;
}

/* 0 continues nothing; 1 continues 0; 2 continues 1; 3 continues 0; and again. */
static int64_t parent_of(int64_t d) {
    static const int64_t back[] = {0, 1, 1, 3};
    return d % 4 ? d - back[d % 4] : -1;
}

void usp_case_documents(const usp_case *c, usp_case_document_list *list) {
    int64_t keys = usp_case_keys(c);
    list->count = 0;
    if (!c->documents) return;
    cut_documents(c, list);
    for (int64_t d = 0; d < list->count; d++) {
        int64_t length = list->ends[d] - (d ? list->ends[d - 1] : 0);
        list->key_ends[d] = c->tokens ? list->ends[d] * keys / c->tokens : keys;
        if (d % 2 && list->key_ends[d] > list->key_ends[d - 1]) list->key_ends[d]--;
        if (d == list->count - 1 && !pads(c)) list->key_ends[d] = keys;
        list->prefixes[d] = c->prefixes == 2 ? length : length * (d % 3) / 3;
        list->parents[d] = parent_of(d);
    }
}

static void configure_sequence(const usp_case *c, int p, int n, usp_case_configs *configs) {
    usp_sequence_config *s = &configs->sequence;
    *s = (usp_sequence_config){.struct_size = sizeof *s, .layout = c->layout, .tokens = usp_named_tokens(c->tokens)};
    s->key_tokens = c->key_tokens;
    if (c->layout == USP_LAYOUT_CUSTOM) {
        s->segments = custom_segments(c->tokens, p, n, configs->segment);
        s->segment = configs->segment;
    }
    if (c->layout == USP_LAYOUT_CUSTOM && crosses(c)) {
        s->key_segments = custom_segments(c->key_tokens, (p + 1) % n, n, configs->key_segment);
        s->key_segment = configs->key_segment;
    }
    usp_case_documents(c, &configs->documents);
    s->max_documents = c->max_documents;
    s->documents = configs->documents.count;
    if (s->documents) s->document_ends = configs->documents.ends;
    if (s->documents && c->key_tokens) s->key_document_ends = configs->documents.key_ends;
    if (c->prefixes) s->prefixes = configs->documents.prefixes;
    if (c->parents) s->parents = configs->documents.parents;
    configs->keys = *s;
    configs->keys.tokens = usp_named_tokens(usp_case_keys(c));
    configs->keys.key_tokens = 0;
    configs->keys.documents = configs->keys.max_documents = 0;
    configs->keys.document_ends = configs->keys.key_document_ends = configs->keys.prefixes = configs->keys.parents =
        NULL;
    if (crosses(c)) {
        configs->keys.segments = s->key_segments;
        configs->keys.segment = s->key_segment;
        configs->keys.key_segments = 0;
        configs->keys.key_segment = NULL;
    }
    if (c->layout != USP_LAYOUT_ZIGZAG_PER_DOCUMENT) return;
    configs->keys.max_documents = c->max_documents;
    configs->keys.documents = configs->documents.count;
    configs->keys.document_ends = crosses(c) ? configs->documents.key_ends : configs->documents.ends;
}

void usp_case_configure(const usp_case *c, int p, int n, usp_case_configs *configs) {
    int linear = c->attention == USP_LINEAR;
    configure_sequence(c, p, n, configs);
    usp_case_decay(c, configs->decay);
    usp_case_slopes(c, configs->slopes);
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
                                        .decay = c->decay ? configs->decay : NULL,
                                        .window_left = c->window_left,
                                        .window_right = c->window_right,
                                        .alignment = c->alignment,
                                        .route = c->route,
                                        .soft_cap = c->soft_cap,
                                        .dropout = c->dropout,
                                        .sinks = c->sinks,
                                        .dlse = c->dlse,
                                        .max_logit = c->max_logit,
                                        .shared_memory = c->shared_memory,
                                        .head_groups = c->head_groups,
                                        .slopes = c->slopes ? configs->slopes : NULL};
}

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

static int one_in(uint64_t *state, int n) {
    return usp_random_below(state, n) == 0;
}

static void random_documents(uint64_t *state, usp_case *c) {
    if (one_in(state, 2)) c->documents = 1 + usp_random_below(state, 4 + (c->layout != USP_LAYOUT_ZIGZAG_PER_DOCUMENT));
    if (c->documents && one_in(state, 3)) c->max_documents = USP_CASE_DOCUMENTS;
}

static void random_mask(uint64_t *state, usp_case *c, int most) {
    int causal = c->mask == USP_MASK_CAUSAL;
    if (one_in(state, 3)) c->window_left = one_in(state, 4) ? USP_NO_KEYS : 1 + usp_random_below(state, most);
    if (!causal && one_in(state, 3))
        c->window_right = one_in(state, 4) ? USP_NO_KEYS : 1 + usp_random_below(state, most);
    c->alignment = (usp_alignment)usp_random_below(state, 2);
    c->route = (usp_route)usp_random_below(state, 4);
    if (c->documents && one_in(state, 4)) *(one_in(state, 2) ? &c->prefixes : &c->parents) = 1;
    if (one_in(state, 4)) c->soft_cap = 2;
    if (one_in(state, 4)) c->slopes = 1;
    if (one_in(state, 4)) c->sinks = 1;
    if (one_in(state, 4)) c->dropout = 0.25f;
    if (one_in(state, 4)) c->max_logit = 1;
    c->dlse = c->return_lse && one_in(state, 2);
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
        if (usp_random_below(state, 3) == 0) c.key_tokens = 1 + usp_random_below(state, (int)most);
        random_documents(state, &c);
        random_mask(state, &c, (int)most);
    } else {
        int causal = c.mask == USP_MASK_CAUSAL;
        c.scale = 0.25f;
        c.decay = causal ? usp_random_below(state, 3) : 0;
        c.initial_state = causal && usp_random_below(state, 2);
        c.final_state = usp_random_below(state, 2);
        c.recompute_state = usp_random_below(state, 2);
        random_documents(state, &c);
        c.state_exchange = (usp_state_exchange)usp_random_below(state, 3);
    }
    c.shared_memory = one_in(state, 3);
    if (c.attention == USP_SOFTMAX && one_in(state, 2)) c.head_groups = 1 + usp_random_below(state, 4);
    return usp_case_complete(c);
}
