/* replans.c - sequences that are given other documents (see replans.h). Needs the public API only. */
#include "replans.h"
#include "bodies.h"

#include <stdlib.h>
#include <string.h>

/* ---- as if made anew --------------------------------------------------------------------------------------------- */

usp_documents usp_documents_of(const usp_case *c, usp_case_document_list *list) {
    usp_case_documents(c, list);
    return (usp_documents){.struct_size = sizeof(usp_documents),
                           .count = list->count,
                           .ends = list->ends,
                           .key_ends = c->key_tokens ? list->key_ends : NULL,
                           .prefixes = c->prefixes ? list->prefixes : NULL,
                           .parents = c->parents ? list->parents : NULL};
}

int usp_run_planned(const usp_stage *planned, usp_whole *whole) {
    usp_stage run = *planned;
    run.tokens = usp_sequence_local_tokens(run.sequence, run.p);
    run.key_tokens = usp_sequence_local_key_tokens(run.sequence, run.p);
    int failed = usp_stage_fill(&run) || usp_stage_forward(&run, 1) || usp_stage_backward(&run) ||
                 usp_stage_gather(&run, 1, whole);
    run.layer = NULL; /* what stays open */
    run.sequence = run.keys = NULL;
    run.mesh = NULL;
    usp_stage_close(&run);
    return failed;
}

usp_status usp_replan_stage(usp_stage *stage, const usp_documents *documents) {
    usp_stream stream = stage->rank->stream;
    usp_status status = usp_sequence_replan_documents(stage->sequence, documents, stream);
    int moves = stage->c.layout == USP_LAYOUT_ZIGZAG_PER_DOCUMENT && stage->keys != stage->sequence;
    return status == USP_OK && moves ? usp_sequence_replan(stage->keys, documents->count, documents->key_ends, stream)
                                     : status;
}

/* From pattern to pattern on one sequence, each result beside that of a sequence made for it, with the same room: by
 * that the route is chosen. */
static int compare_replanned(usp_rank *rank, usp_case c, const int *patterns, int count) {
    usp_stage stage;
    usp_case_document_list *list = malloc(sizeof *list);
    int failed = usp_stage_open(rank, &c, &stage) != USP_OK;
    if (failed) usp_say(rank, "create: %s", usp_last_error());
    for (int i = 0; i < count && !failed; i++) {
        usp_whole again, anew;
        stage.c.documents = c.documents = patterns[i];
        usp_documents other = usp_documents_of(&stage.c, list);
        if (usp_replan_stage(&stage, &other) != USP_OK) failed = usp_say(rank, "re-plan: %s", usp_last_error());
        failed = failed || usp_run_planned(&stage, &again) || usp_run_case(rank, &c, &anew);
        if (failed) break;
        if (rank->rank == 0) usp_compare_bits(rank, &c, "planned again", USP_SAME_ALL, &again, &anew);
        usp_whole_free(&again);
        usp_whole_free(&anew);
        usp_count(rank);
    }
    if (!failed) usp_stage_close(&stage);
    free(list);
    return failed;
}

int usp_body_replanned(usp_rank *rank, void *argument) {
    static const int patterns[] = {4, 2, 1, 3, 1};
    static const usp_case cases[] = {
        {.mask = USP_MASK_CAUSAL, .return_lse = 1, .sinks = 1, .dropout = 0.2f},
        {.mask = USP_MASK_CAUSAL, .layout = USP_LAYOUT_ZIGZAG_PER_DOCUMENT, .return_lse = 1, .slopes = 1},
        {.layout = USP_LAYOUT_ZIGZAG_PER_DOCUMENT, .window_left = 9, .max_logit = 1},
        {.mask = USP_MASK_CAUSAL, .prefixes = 1, .return_lse = 1},
        {.mask = USP_MASK_CAUSAL, .prefixes = 1, .layout = USP_LAYOUT_ZIGZAG_PER_DOCUMENT},
        {.mask = USP_MASK_CAUSAL, .parents = 1, .return_lse = 1},
        {.mask = USP_MASK_CAUSAL, .parents = 1, .layout = USP_LAYOUT_ZIGZAG_PER_DOCUMENT},
        {.mask = USP_MASK_CAUSAL, .parents = 1, .layout = USP_LAYOUT_STRIPE, .route = USP_ROUTE_DIRECT},
        {.key_tokens = 61, .return_lse = 1},
        {.key_tokens = 61, .mask = USP_MASK_CAUSAL, .layout = USP_LAYOUT_CONTIGUOUS, .route = USP_ROUTE_GATHERED},
        {.key_tokens = 61, .mask = USP_MASK_CAUSAL, .layout = USP_LAYOUT_ZIGZAG_PER_DOCUMENT, .return_lse = 1},
        {.key_tokens = 131, .layout = USP_LAYOUT_CUSTOM, .window_left = 20, .route = USP_ROUTE_DIRECT},
        {.attention = USP_LINEAR, .mask = USP_MASK_CAUSAL, .decay = 1, .initial_state = 1, .final_state = 1},
        {.attention = USP_LINEAR, .mask = USP_MASK_CAUSAL, .layout = USP_LAYOUT_ZIGZAG_PER_DOCUMENT, .decay = 1}};
    (void)argument;
    for (int i = 0; i < (int)(sizeof cases / sizeof cases[0]); i++) {
        usp_case c = cases[i];
        c.tokens = 97;
        c.documents = 1;
        c.max_documents = USP_CASE_DOCUMENTS;
        c.deterministic = 1;
        usp_choose_mesh(rank, &c);
        if (compare_replanned(rank, c, patterns, 5)) return 1;
    }
    return 0;
}

/* ---- refused re-plans -------------------------------------------------------------------------------------------- */

enum { TOKENS = 97, KEYS = 61, ROOM = 8 };

/* Of three documents, or fewer. */
static const int64_t ends[] = {40, 40, TOKENS}, falling[] = {40, 39, TOKENS}, beyond[] = {40, 40, TOKENS + 1};
static const int64_t negative[] = {-1, 40, TOKENS}, key_ends[] = {20, 30, KEYS}, keys_fall[] = {20, 19, KEYS};
static const int64_t keys_beyond[] = {20, 30, KEYS + 1}, prefixes[] = {40, 0, 7}, longer[] = {40, 1, 7};
static const int64_t less[] = {-1, 0, 7}, parents[] = {-1, 0, 0}, itself[] = {-1, 1, 0}, aside[] = {-1, -1, 0};

typedef struct refusal {
    const char *says; /* part of the sentence */
    int64_t count;
    const int64_t *ends, *key_ends, *prefixes, *parents;
} refusal;

static const refusal of_all[] = {{"documents is 0", 0, NULL, NULL, NULL, NULL},
                                 {"documents is -1", -1, ends, NULL, NULL, NULL},
                                 {"documents is 9", ROOM + 1, ends, NULL, NULL, NULL},
                                 {"document_ends is NULL", 3, NULL, key_ends, NULL, NULL}};
static const refusal of_self[] = {{"document_ends[1] is 39", 3, falling, NULL, NULL, NULL},
                                  {"document_ends[2] is 98", 3, beyond, NULL, NULL, NULL},
                                  {"document_ends[0] is -1", 3, negative, NULL, NULL, NULL},
                                  {"key_document_ends is given", 3, ends, key_ends, NULL, NULL},
                                  {"prefixes is given", 3, ends, NULL, prefixes, NULL},
                                  {"parents is given", 3, ends, NULL, NULL, parents}};
static const refusal of_prefixes[] = {{"prefixes[1] is 1", 3, ends, NULL, longer, NULL},
                                      {"prefixes[0] is -1", 3, ends, NULL, less, NULL},
                                      {"parents is given", 3, ends, NULL, prefixes, parents}};
static const refusal of_trees[] = {{"parents[1] is 1", 3, ends, NULL, NULL, itself},
                                   {"parents[2] is 0", 3, ends, NULL, NULL, aside},
                                   {"prefixes is given", 3, ends, NULL, prefixes, parents}};
static const refusal of_cross[] = {{"key_document_ends is NULL", 3, ends, NULL, NULL, NULL},
                                   {"key_document_ends[1] is 19", 3, ends, keys_fall, NULL, NULL},
                                   {"key_document_ends[2] is 62", 3, ends, keys_beyond, NULL, NULL},
                                   {"document_ends[1] is 39", 3, falling, key_ends, NULL, NULL},
                                   {"prefixes is given", 3, ends, key_ends, prefixes, NULL}};

static int run_again(usp_stage *stage, usp_whole *whole) {
    return usp_stage_clear(stage) || usp_stage_forward(stage, 1) || usp_stage_backward(stage) ||
           usp_stage_gather(stage, 1, whole);
}

/* Refused by name, and the stage gives what it gave. */
static int try_refusal(usp_stage *stage, const refusal *r, const usp_whole *before) {
    usp_whole after;
    usp_rank *rank = stage->rank;
    const usp_documents given = {sizeof given, r->count, r->ends, r->key_ends, r->prefixes, r->parents};
    usp_status status = usp_sequence_replan_documents(stage->sequence, &given, rank->stream);
    if (status != USP_INVALID || !strstr(usp_last_error(), r->says))
        usp_say(rank, "re-plan, %s: %s, \"%s\"", r->says, usp_status_string(status), usp_last_error());
    if (run_again(stage, &after)) return 1;
    if (rank->rank == 0) usp_compare_bits(rank, &stage->c, "after a refusal", USP_SAME_ALL, &after, before);
    usp_whole_free(&after);
    usp_count(rank);
    return 0;
}

static int refuse_all(usp_rank *rank, usp_case c, const refusal *refusals, int count) {
    usp_stage stage;
    usp_whole before;
    int failed = 0;
    c.tokens = TOKENS;
    c.documents = 2;
    c.deterministic = 1;
    usp_choose_mesh(rank, &c);
    if (usp_stage_open(rank, &c, &stage) != USP_OK) return usp_say(rank, "create: %s", usp_last_error());
    if (usp_stage_fill(&stage) || run_again(&stage, &before)) return 1;
    for (int i = 0; i < count && !failed; i++) failed = try_refusal(&stage, &refusals[i], &before);
    if (failed) return 1;
    usp_whole_free(&before);
    usp_stage_close(&stage);
    return 0;
}

int usp_body_refused_replans(usp_rank *rank, void *argument) {
    static const refusal never = {"without max_documents", 3, ends, NULL, NULL, NULL};
    static const usp_case fixed = {.mask = USP_MASK_CAUSAL};
    static const struct {
        usp_case c;
        const refusal *refusals;
        int count;
    } all[] = {
        {{.mask = USP_MASK_CAUSAL}, of_self, sizeof of_self / sizeof *of_self},
        {{.layout = USP_LAYOUT_ZIGZAG_PER_DOCUMENT}, of_self, sizeof of_self / sizeof *of_self},
        {{.mask = USP_MASK_CAUSAL, .attention = USP_LINEAR, .final_state = 1}, of_self, 3},
        {{.mask = USP_MASK_CAUSAL, .prefixes = 1}, of_prefixes, sizeof of_prefixes / sizeof *of_prefixes},
        {{.mask = USP_MASK_CAUSAL, .parents = 1}, of_trees, sizeof of_trees / sizeof *of_trees},
        {{.key_tokens = KEYS, .return_lse = 1}, of_cross, sizeof of_cross / sizeof *of_cross},
        {{.key_tokens = KEYS, .layout = USP_LAYOUT_ZIGZAG_PER_DOCUMENT}, of_cross, sizeof of_cross / sizeof *of_cross}};
    (void)argument;
    for (int i = 0; i < (int)(sizeof all / sizeof *all); i++) {
        usp_case c = all[i].c;
        c.max_documents = ROOM;
        if (refuse_all(rank, c, of_all, sizeof of_all / sizeof *of_all)) return 1;
        if (refuse_all(rank, c, all[i].refusals, all[i].count)) return 1;
    }
    return refuse_all(rank, fixed, &never, 1);
}

/* Re-plans to `own`, which only this rank may hear of; no rank computes with what the others have. */
static int run_apart(usp_rank *rank, const usp_case *c, const int64_t *own, int count, usp_status wanted) {
    usp_stage stage;
    if (usp_stage_open(rank, c, &stage) != USP_OK) return usp_say(rank, "create: %s", usp_last_error());
    if (usp_stage_fill(&stage)) return 1;
    usp_status status = usp_sequence_replan(stage.sequence, count, own, rank->stream);
    if (status != wanted) usp_say(rank, "re-plan: %s", usp_last_error());
    usp_forward f = usp_stage_forward_arguments(&stage, 1);
    status = usp_layer_forward(stage.layer, &f, stage.workspace.device, stage.workspace.bytes, rank->stream);
    if (status != USP_MISMATCH) usp_say(rank, "forward: %s, \"%s\"", usp_status_string(status), usp_last_error());
    usp_stage_close(&stage);
    usp_count(rank);
    return 0;
}

int usp_body_refused_alone(usp_rank *rank, void *argument) {
    usp_case c = {.tokens = TOKENS, .documents = 2, .max_documents = ROOM, .mask = USP_MASK_CAUSAL};
    int odd = rank->rank == rank->size - 1;
    (void)argument;
    c.ring = rank->size;
    return run_apart(rank, &c, odd ? falling : ends, 3, odd ? USP_INVALID : USP_OK);
}

int usp_body_planned_apart(usp_rank *rank, void *argument) {
    static const int64_t halves[] = {32, 64}, others[] = {48, 64};
    const usp_case c = {.tokens = 64,
                        .documents = 2,
                        .max_documents = ROOM,
                        .layout = USP_LAYOUT_ZIGZAG_PER_DOCUMENT,
                        .mask = USP_MASK_CAUSAL,
                        .ulysses = 2};
    (void)argument;
    return run_apart(rank, &c, rank->rank ? others : halves, 2, USP_OK);
}

static usp_status run_forward(const usp_stage *stage, int keep) {
    usp_forward f = usp_stage_forward_arguments(stage, keep);
    return usp_layer_forward(stage->layer, &f, stage->workspace.device, stage->workspace.bytes, stage->rank->stream);
}

int usp_body_memory_apart(usp_rank *rank, void *argument) {
    const usp_case c = {.tokens = 64, .mask = USP_MASK_CAUSAL, .ring = 2, .shared_memory = 1};
    usp_stage stage;
    (void)argument;
    if (usp_stage_open(rank, &c, &stage) != USP_OK) return usp_say(rank, "create: %s", usp_last_error());
    if (usp_stage_fill(&stage)) return 1;
    usp_status status = run_forward(&stage, 1);
    if (status != USP_OK) usp_say(rank, "forward: %s", usp_last_error());
    status = run_forward(&stage, rank->rank == 0);
    if (status != USP_MISMATCH) usp_say(rank, "unlike: %s, \"%s\"", usp_status_string(status), usp_last_error());
    usp_stage_close(&stage);
    usp_count(rank);
    return 0;
}
