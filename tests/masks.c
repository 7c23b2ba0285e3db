/* masks.c - properties of masks and of what changes scores (see masks.h). Judges by the layer itself; needs the
 * public API only. */
#include "masks.h"
#include "bodies.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { LAYOUTS = USP_LAYOUT_CUSTOM + 1, TOKENS = 83 };

/* ---- one result for every mesh, layout and route ----------------------------------------------------------------- */

static const usp_case masked[] = {
    {.window_left = 9, .mask = USP_MASK_CAUSAL, .heads = 6, .kv_heads = 2, .sinks = 1, .return_lse = 1},
    {.window_left = 20, .window_right = 5, .documents = 1, .slopes = 1, .return_lse = 1},
    {.window_left = USP_NO_KEYS,
     .window_right = 30,
     .key_tokens = 61,
     .alignment = USP_ALIGN_BOTTOM_RIGHT,
     .dlse = 1,
     .return_lse = 1},
    {.documents = 3, .mask = USP_MASK_CAUSAL, .return_lse = 1, .dropout = 0.3f, .max_logit = 1},
    {.documents = 2, .key_tokens = 61, .mask = USP_MASK_CAUSAL, .soft_cap = 2},
    {.documents = 1, .prefixes = 1, .mask = USP_MASK_CAUSAL, .slopes = 1, .window_left = 12, .sinks = 1},
    {.documents = 1, .parents = 1, .mask = USP_MASK_CAUSAL, .soft_cap = 2, .dropout = 0.2f, .return_lse = 1},
    {.documents = 4, .parents = 1, .mask = USP_MASK_CAUSAL, .sinks = 1, .dlse = 1, .return_lse = 1, .max_logit = 1},
    {.attention = USP_LINEAR,
     .documents = 1,
     .mask = USP_MASK_CAUSAL,
     .decay = 1,
     .initial_state = 1,
     .final_state = 1}};
enum { MASKED = sizeof masked / sizeof masked[0] };

/* Linear attention needs runs of tokens. */
static int has_layout(const usp_case *c, usp_layout layout) {
    if (layout == USP_LAYOUT_ZIGZAG_PER_DOCUMENT && !c->documents) return 0;
    if (c->attention == USP_LINEAR) return layout != USP_LAYOUT_STRIPE && layout != USP_LAYOUT_CUSTOM;
    return 1;
}

static int routes_of(const usp_case *c) {
    return c->attention == USP_LINEAR ? 1 : USP_ROUTE_GATHERED + 1;
}

static int compare_everywhere(usp_rank *rank, usp_case c, usp_whole *first) {
    for (int layout = 0; layout < LAYOUTS; layout++)
        for (int route = 0; route < routes_of(&c); route++) {
            if (!has_layout(&c, (usp_layout)layout)) continue;
            c.layout = (usp_layout)layout;
            c.route = (usp_route)route;
            if (usp_compare_meshes(rank, c, first)) return 1;
        }
    return 0;
}

int usp_body_masks(usp_rank *rank, void *argument) {
    (void)argument;
    for (int i = 0; i < MASKED; i++) {
        usp_whole first = {0};
        usp_case c = masked[i];
        c.tokens = TOKENS;
        c.seed = i;
        int failed = compare_everywhere(rank, c, &first);
        usp_whole_free(&first);
        if (failed) return 1;
        usp_count(rank);
    }
    return 0;
}

/* ---- documents alone --------------------------------------------------------------------------------------------- */

static void append(float **to, int64_t *count, const float *from, int64_t more) {
    if (!from) return;
    *to = realloc(*to, (size_t)(*count + more + 1) * sizeof **to);
    memcpy(*to + *count, from, (size_t)more * sizeof **to);
    *count += more;
}

static void add_heads(usp_whole *to, const usp_whole *from) {
    for (int64_t h = 0; to->dsinks && h < from->head_count; h++) to->dsinks[h] += from->dsinks[h];
    if (!to->dsinks) append(&to->dsinks, &to->head_count, from->dsinks, from->head_count);
}

/* Of one batch: the rows of the next document behind those of the ones before; of heads the sum. */
static void append_whole(usp_whole *to, const usp_whole *from) {
    append(&to->out, &to->out_count, from->out, from->out_count);
    append(&to->lse, &to->lse_count, from->lse, from->lse_count);
    append(&to->dq, &to->dq_count, from->dq, from->dq_count);
    append(&to->dk, &to->dk_count, from->dk, from->dk_count);
    append(&to->dv, &to->dv_count, from->dv, from->dv_count);
    add_heads(to, from);
}

/* Documents that have keys at all: 0 keys would be the queries. */
static int run_alone(usp_rank *rank, usp_case c, usp_whole *joined) {
    usp_case_document_list *list = malloc(sizeof *list);
    int failed = 0;
    usp_case_documents(&c, list);
    int cross = c.key_tokens != 0;
    c.documents = 0;
    c.layout = USP_LAYOUT_ZIGZAG;
    for (int64_t d = 0; d < list->count && !failed; d++) {
        usp_whole alone;
        c.first_token = d ? list->ends[d - 1] : 0;
        c.tokens = list->ends[d] - c.first_token;
        c.first_key = d ? list->key_ends[d - 1] : 0;
        c.key_tokens = cross ? list->key_ends[d] - c.first_key : 0;
        failed = usp_run_case(rank, &c, &alone);
        if (!failed) append_whole(joined, &alone);
        if (!failed) usp_whole_free(&alone);
    }
    free(list);
    return failed;
}

static int compare_packed(usp_rank *rank, usp_case c) {
    usp_whole joined = {0};
    usp_choose_mesh(rank, &c);
    int failed = run_alone(rank, c, &joined);
    for (int layout = 0; layout < LAYOUTS && !failed; layout++) {
        usp_whole packed;
        if (!has_layout(&c, (usp_layout)layout)) continue;
        c.layout = (usp_layout)layout;
        failed = usp_run_case(rank, &c, &packed);
        if (failed) break;
        if (rank->rank == 0) usp_compare_near(rank, &c, "documents alone", &packed, &joined);
        usp_whole_free(&packed);
        usp_count(rank);
    }
    usp_whole_free(&joined);
    return failed;
}

int usp_body_packed(usp_rank *rank, void *argument) {
    static const usp_case cases[] = {
        {.documents = 1, .mask = USP_MASK_CAUSAL, .heads = 6, .kv_heads = 2, .return_lse = 1, .sinks = 1},
        {.documents = 3, .return_lse = 1, .soft_cap = 2},
        {.documents = 2, .mask = USP_MASK_CAUSAL, .window_left = 11, .slopes = 1, .return_lse = 1},
        {.documents = 4, .window_left = 1, .return_lse = 1, .dlse = 1},
        {.documents = 1, .key_tokens = 120, .return_lse = 1, .dlse = 1, .sinks = 1},
        {.documents = 1,
         .key_tokens = 97,
         .mask = USP_MASK_CAUSAL,
         .alignment = USP_ALIGN_BOTTOM_RIGHT,
         .slopes = 1,
         .return_lse = 1},
        {.documents = 1, .mask = USP_MASK_CAUSAL, .attention = USP_LINEAR, .decay = 1},
        {.documents = 3, .mask = USP_MASK_CAUSAL, .attention = USP_LINEAR, .state_exchange = USP_STATE_CHAIN}};
    (void)argument;
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        usp_case c = cases[i];
        c.tokens = TOKENS;
        c.head_dim = 16;
        if (compare_packed(rank, c)) return 1;
    }
    return 0;
}

/* ---- the same in other words ------------------------------------------------------------------------------------- */

typedef struct twins {
    const char *what;
    usp_case one, other;
} twins;

static const twins alike[] = {
    {"a full mask without keys behind", {.mask = USP_MASK_CAUSAL}, {.window_right = USP_NO_KEYS}},
    {"a full window without keys behind",
     {.mask = USP_MASK_CAUSAL, .window_left = 9, .documents = 1},
     {.window_left = 9, .window_right = USP_NO_KEYS, .documents = 1}},
    {"one document", {.mask = USP_MASK_CAUSAL}, {.mask = USP_MASK_CAUSAL, .documents = 6}},
    {"prefixes of whole documents", {.documents = 1}, {.mask = USP_MASK_CAUSAL, .documents = 1, .prefixes = 2}},
    {"the diagonal at the other end",
     {.mask = USP_MASK_CAUSAL, .documents = 1, .window_left = 9, .slopes = 1},
     {.mask = USP_MASK_CAUSAL, .documents = 1, .window_left = 9, .slopes = 1, .alignment = USP_ALIGN_BOTTOM_RIGHT}},
    {"as many keys of another tensor",
     {.mask = USP_MASK_CAUSAL, .window_left = 30},
     {.mask = USP_MASK_CAUSAL, .window_left = 30, .key_tokens = TOKENS}}};

static int compare_twins(usp_rank *rank, const twins *t, usp_layout layout) {
    usp_case one = t->one, other = t->other;
    usp_whole first = {0};
    one.tokens = other.tokens = TOKENS;
    one.return_lse = other.return_lse = 1;
    one.layout = other.layout = layout;
    int failed = usp_compare_meshes(rank, one, &first) || usp_compare_meshes(rank, other, &first);
    usp_whole_free(&first);
    if (failed) return usp_say(rank, "... in twins: %s", t->what);
    usp_count(rank);
    return 0;
}

int usp_body_twins(usp_rank *rank, void *argument) {
    (void)argument;
    for (size_t i = 0; i < sizeof alike / sizeof alike[0]; i++)
        for (int layout = USP_LAYOUT_ZIGZAG; layout <= USP_LAYOUT_STRIPE; layout++)
            if (compare_twins(rank, &alike[i], (usp_layout)layout)) return 1;
    return 0;
}

int usp_body_whole_window(usp_rank *rank, void *argument) {
    (void)argument;
    for (int i = 0; i < LAYOUTS; i++) {
        usp_whole plain, window;
        usp_case c = {
            .tokens = TOKENS, .return_lse = 1, .deterministic = 1, .layout = (usp_layout)i, .documents = i % 2};
        c.mask = i == USP_LAYOUT_STRIPE ? USP_MASK_FULL : USP_MASK_CAUSAL;
        usp_choose_mesh(rank, &c);
        if (usp_run_case(rank, &c, &plain)) return 1;
        c.window_left = TOKENS;
        if (c.mask == USP_MASK_FULL) c.window_right = TOKENS;
        if (usp_run_case(rank, &c, &window)) return 1;
        if (rank->rank == 0) usp_compare_bits(rank, &c, "a window of all tokens", USP_SAME_ALL, &window, &plain);
        usp_whole_free(&plain);
        usp_whole_free(&window);
        usp_count(rank);
    }
    return 0;
}

static int open_and_fill(usp_rank *rank, const usp_case *c, usp_stage *stage) {
    if (usp_stage_open(rank, c, stage) != USP_OK) return usp_say(rank, "create: %s", usp_last_error());
    return usp_stage_fill(stage);
}

static int run_stage(usp_stage *stage, usp_whole *whole) {
    return usp_stage_forward(stage, 1) || usp_stage_backward(stage) || usp_stage_gather(stage, 1, whole);
}

/* Each document continues the one before. */
static int link_documents(usp_stage *stage) {
    usp_case_document_list *list = malloc(sizeof *list);
    usp_case_documents(&stage->c, list);
    for (int64_t d = 0; d < list->count; d++) list->parents[d] = d - 1;
    usp_documents chain = {
        .struct_size = sizeof chain, .count = list->count, .ends = list->ends, .parents = list->parents};
    usp_status status = usp_sequence_replan_documents(stage->sequence, &chain, stage->rank->stream);
    free(list);
    return status == USP_OK ? 0 : usp_say(stage->rank, "re-plan: %s", usp_last_error());
}

static int compare_chain(usp_rank *rank, usp_case c) {
    usp_stage stage;
    usp_whole causal, chain;
    usp_choose_mesh(rank, &c);
    if (usp_run_case(rank, &c, &causal)) return 1;
    c.parents = 1;
    c.documents = 1;
    c.max_documents = USP_CASE_DOCUMENTS;
    if (open_and_fill(rank, &c, &stage) || link_documents(&stage) || run_stage(&stage, &chain)) return 1;
    if (rank->rank == 0) usp_compare_near(rank, &c, "a chain of documents", &chain, &causal);
    usp_whole_free(&causal);
    usp_whole_free(&chain);
    usp_stage_close(&stage);
    usp_count(rank);
    return 0;
}

/* Not on the per-document layout: there tokens move, and with them what the stage has filled in. */
int usp_body_chain(usp_rank *rank, void *argument) {
    static const usp_layout layouts[] = {USP_LAYOUT_ZIGZAG, USP_LAYOUT_CONTIGUOUS, USP_LAYOUT_STRIPE,
                                         USP_LAYOUT_CUSTOM};
    (void)argument;
    for (int i = 0; i < 4; i++) {
        usp_case c = {.tokens = TOKENS, .mask = USP_MASK_CAUSAL, .layout = layouts[i], .return_lse = 1};
        c.soft_cap = i % 2 ? 2 : 0;
        c.dropout = i > 1 ? 0.2f : 0;
        c.sinks = i == 3;
        if (compare_chain(rank, c)) return 1;
    }
    return 0;
}

/* ---- next to nothing --------------------------------------------------------------------------------------------- */

static int take_sinks(usp_stage *stage) {
    for (int h = 0; h < stage->c.heads; h++)
        usp_store(USP_F32, stage->sinks.host + (size_t)h * sizeof(float), -INFINITY);
    return usp_stage_set_states(stage, NULL, NULL); /* uploads all that is small */
}

static void expect_no_gradient(usp_rank *rank, const usp_whole *whole) {
    for (int64_t h = 0; h < whole->head_count; h++)
        if (whole->dsinks[h] != 0) usp_say(rank, "dsinks[%d] of -inf is %g", (int)h, (double)whole->dsinks[h]);
}

static int compare_no_sinks(usp_rank *rank, usp_case c) {
    usp_stage stage;
    usp_whole none, sunk;
    if (usp_run_case(rank, &c, &none)) return 1;
    c.sinks = 1;
    if (open_and_fill(rank, &c, &stage) || take_sinks(&stage) || run_stage(&stage, &sunk)) return 1;
    if (rank->rank == 0) usp_compare_bits(rank, &c, "sinks of -inf", USP_SAME_ALL & ~USP_SAME_HEADS, &sunk, &none);
    expect_no_gradient(rank, &sunk);
    usp_whole_free(&none);
    usp_whole_free(&sunk);
    usp_stage_close(&stage);
    usp_count(rank);
    return 0;
}

/* Among the cases are queries that see no key: there too nothing is left. */
int usp_body_no_sinks(usp_rank *rank, void *argument) {
    static const usp_case cases[] = {{.tokens = TOKENS, .mask = USP_MASK_CAUSAL, .return_lse = 1},
                                     {.tokens = TOKENS, .documents = 5, .return_lse = 1, .layout = USP_LAYOUT_STRIPE},
                                     {.tokens = TOKENS, .dtype = USP_BF16, .head_dim = 16, .window_left = 7}};
    (void)argument;
    for (int i = 0; i < 3; i++) {
        usp_case c = cases[i];
        c.deterministic = 1;
        usp_choose_mesh(rank, &c);
        if (compare_no_sinks(rank, c)) return 1;
    }
    return 0;
}

int usp_body_little_dropout(usp_rank *rank, void *argument) {
    usp_whole none, little;
    usp_case c = {.tokens = TOKENS, .mask = USP_MASK_CAUSAL, .documents = 2, .return_lse = 1};
    (void)argument;
    usp_choose_mesh(rank, &c);
    if (usp_run_case(rank, &c, &none)) return 1;
    c.dropout = 1e-6f;
    if (usp_run_case(rank, &c, &little)) return 1;
    if (rank->rank == 0) usp_compare_bits(rank, &c, "dropout below 2^-16", USP_SAME_ALL, &little, &none);
    usp_whole_free(&none);
    usp_whole_free(&little);
    usp_count(rank);
    return 0;
}
