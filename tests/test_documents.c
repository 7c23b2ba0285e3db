/* test_documents.c - documents that make no sense: refused at create by name, whether all ranks err or one alone; ranks
 * that do not agree; layers that a sequence's documents have no meaning for; and re-plans. Judges results by what they
 * were before. */
#include "expect.h"
#include "replans.h"

#include <string.h>

enum { SECONDS = 60, TOKENS = 32, KEYS = 20 };

/* What a sequence is made of, in short. */
typedef struct packing {
    int64_t count;
    const int64_t *ends, *key_ends, *prefixes, *parents;
    int64_t keys;
    int max_documents;
    usp_layout layout;
} packing;

static usp_sequence_config config_of(const packing *p) {
    return (usp_sequence_config){.struct_size = sizeof(usp_sequence_config),
                                 .layout = p->layout,
                                 .max_documents = p->max_documents,
                                 .tokens = TOKENS,
                                 .key_tokens = p->keys,
                                 .documents = p->count,
                                 .document_ends = p->ends,
                                 .key_document_ends = p->key_ends,
                                 .prefixes = p->prefixes,
                                 .parents = p->parents};
}

/* Four documents, one of them empty, of queries and of keys. */
static const int64_t ends[] = {10, 10, 24, TOKENS}, key_ends[] = {5, 9, 9, KEYS};
static const int64_t prefixes[] = {10, 0, 3, 8}, parents[] = {-1, 0, 1, 0};

static const int64_t falling[] = {10, 9, 24, TOKENS}, negative[] = {-1, 10, 24, TOKENS}, beyond[] = {10, 10, 24, 33};
static const int64_t behind[] = {10, 10, 24, 31}, keys_fall[] = {5, 9, 8, KEYS}, keys_beyond[] = {5, 9, 9, 21};
static const int64_t keys_behind[] = {5, 9, 9, 19};
static const int64_t longer[] = {10, 1, 3, 8}, less[] = {10, 0, -1, 8};
static const int64_t itself[] = {-1, 1, 1, 0}, later[] = {1, 0, 1, 0}, nobody[] = {-1, -2, 1, 0};
static const int64_t aside[] = {-1, 0, 0, 1}; /* 1 is no ancestor of 2 */

static const struct wrong {
    const char *says; /* part of the sentence */
    usp_status status;
    packing packing;
} wrongs[] = {
    {"documents is -1", USP_INVALID, {.count = -1}},
    {"documents is 0", USP_INVALID, {.count = 0, .ends = ends}},
    {"documents is 0", USP_INVALID, {.prefixes = prefixes}},
    {"documents is 0", USP_INVALID, {.parents = parents}},
    {"documents is 0", USP_INVALID, {.key_ends = key_ends, .keys = KEYS}},
    {"document_ends is NULL", USP_INVALID, {.count = 4}},
    {"max_documents is 3", USP_INVALID, {.count = 4, .ends = ends, .max_documents = 3}},
    {"document_ends[1] is 9", USP_INVALID, {.count = 4, .ends = falling}},
    {"document_ends[1] is 9", USP_INVALID, {.count = 4, .ends = falling, .layout = USP_LAYOUT_STRIPE}},
    {"document_ends[0] is -1", USP_INVALID, {.count = 4, .ends = negative}},
    {"document_ends[3] is 33", USP_INVALID, {.count = 4, .ends = beyond}},
    {"the last end is 31", USP_INVALID, {.count = 4, .ends = behind, .layout = USP_LAYOUT_ZIGZAG_PER_DOCUMENT}},
    {"key_document_ends is given", USP_INVALID, {.count = 4, .ends = ends, .key_ends = key_ends}},
    {"key_document_ends is NULL", USP_INVALID, {.count = 4, .ends = ends, .keys = KEYS}},
    {"key_document_ends[2] is 8", USP_INVALID, {.count = 4, .ends = ends, .key_ends = keys_fall, .keys = KEYS}},
    {"key_document_ends[3] is 21", USP_INVALID, {.count = 4, .ends = ends, .key_ends = keys_beyond, .keys = KEYS}},
    {"the last end is 19",
     USP_INVALID,
     {.count = 4, .ends = ends, .key_ends = keys_behind, .keys = KEYS, .layout = USP_LAYOUT_ZIGZAG_PER_DOCUMENT}},
    {"prefixes", USP_UNSUPPORTED, {.count = 4, .ends = ends, .key_ends = key_ends, .prefixes = prefixes, .keys = KEYS}},
    {"parents", USP_UNSUPPORTED, {.count = 4, .ends = ends, .key_ends = key_ends, .parents = parents, .keys = KEYS}},
    {"prefixes[1] is 1", USP_INVALID, {.count = 4, .ends = ends, .prefixes = longer}},
    {"prefixes[2] is -1", USP_INVALID, {.count = 4, .ends = ends, .prefixes = less}},
    {"parents[1] is 1", USP_INVALID, {.count = 4, .ends = ends, .parents = itself}},
    {"parents[0] is 1", USP_INVALID, {.count = 4, .ends = ends, .parents = later}},
    {"parents[1] is -2", USP_INVALID, {.count = 4, .ends = ends, .parents = nobody}},
    {"parents[3] is 1", USP_INVALID, {.count = 4, .ends = ends, .parents = aside}},
    {"prefixes is given beside parents",
     USP_INVALID,
     {.count = 4, .ends = ends, .prefixes = prefixes, .parents = parents}}};
enum { WRONGS = sizeof wrongs / sizeof wrongs[0] };

/* Good ones, each unlike the other in one field. */
static const int64_t other_ends[] = {10, 11, 24, TOKENS}, other_keys[] = {5, 9, 10, KEYS};
static const int64_t other_prefixes[] = {10, 0, 2, 8}, other_parents[] = {-1, 0, 1, 1};
static const struct pair {
    const char *field;
    packing one, other;
} pairs[] = {
    {"documents", {.count = 4, .ends = ends}, {.count = 3, .ends = ends}},
    {"document_ends", {.count = 4, .ends = ends}, {.count = 4, .ends = other_ends}},
    {"max_documents", {.count = 4, .ends = ends, .max_documents = 8}, {.count = 4, .ends = ends}},
    {"key_document_ends",
     {.count = 4, .ends = ends, .key_ends = key_ends, .keys = KEYS},
     {.count = 4, .ends = ends, .key_ends = other_keys, .keys = KEYS}},
    {"prefixes",
     {.count = 4, .ends = ends, .prefixes = prefixes},
     {.count = 4, .ends = ends, .prefixes = other_prefixes}},
    {"prefixes", {.count = 4, .ends = ends, .prefixes = prefixes}, {.count = 4, .ends = ends}},
    {"parents", {.count = 4, .ends = ends, .parents = parents}, {.count = 4, .ends = ends, .parents = other_parents}},
    {"parents", {.count = 4, .ends = ends, .parents = parents}, {.count = 4, .ends = ends}}};
enum { PAIRS = sizeof pairs / sizeof pairs[0] };

/* ---- sequences --------------------------------------------------------------------------------------------------- */

/* A mesh, and what the library holds besides. */
typedef struct scene {
    usp_rank *rank;
    usp_mesh *mesh;
    int live;
} scene;

static int open_scene(usp_rank *rank, scene *s) {
    *s = (scene){.rank = rank};
    usp_status status = usp_mesh_create(rank->world, 1, rank->size, &s->mesh);
    s->live = atomic_load(&rank->heap->live);
    return status == USP_OK ? 0 : usp_say(rank, "mesh: %s", usp_last_error());
}

/* A refusal has the status, says what it should, and leaves nothing allocated. */
static void expect_refusal(scene *s, const char *says, usp_status wanted, usp_status status, const void *made) {
    if (status != wanted || !strstr(usp_last_error(), says) || made)
        usp_say(s->rank, "%s: %s, \"%s\"", says, usp_status_string(status), usp_last_error());
    if (atomic_load(&s->rank->heap->live) != s->live) usp_say(s->rank, "%s: leaves memory behind", says);
    usp_count(s->rank);
}

static void try_sequence(scene *s, const packing *p, const char *says, usp_status wanted) {
    usp_sequence *sequence = NULL;
    usp_sequence_config config = config_of(p);
    usp_status status = usp_sequence_create(s->mesh, &config, &sequence);
    expect_refusal(s, says, wanted, status, sequence);
    usp_sequence_destroy(sequence);
}

static int wrong_everywhere(usp_rank *rank, void *argument) {
    scene s;
    (void)argument;
    if (open_scene(rank, &s)) return 1;
    for (int i = 0; i < WRONGS; i++) try_sequence(&s, &wrongs[i].packing, wrongs[i].says, wrongs[i].status);
    usp_mesh_destroy(s.mesh);
    return 0;
}

/* The others are told which rank it was. */
static int wrong_alone(usp_rank *rank, void *argument) {
    static const packing good = {.count = 4, .ends = ends};
    int odd = rank->rank == rank->size - 1;
    char name[32] = "rank 2";
    scene s;
    (void)argument;
    if (open_scene(rank, &s)) return 1;
    for (int i = 0; i < WRONGS; i++)
        try_sequence(&s, odd ? &wrongs[i].packing : &good, odd ? wrongs[i].says : name,
                     odd ? wrongs[i].status : USP_PEER_FAILED);
    usp_mesh_destroy(s.mesh);
    return 0;
}

static int disagree(usp_rank *rank, void *argument) {
    char says[64] = "sequence.";
    scene s;
    (void)argument;
    if (open_scene(rank, &s)) return 1;
    for (int i = 0; i < 2 * PAIRS; i++) {
        const struct pair *p = &pairs[i / 2];
        int odd = rank->rank == (i % 2 ? 0 : rank->size - 1);
        strcpy(says + strlen("sequence."), p->field);
        try_sequence(&s, odd ? &p->other : &p->one, says, USP_MISMATCH);
    }
    usp_mesh_destroy(s.mesh);
    return 0;
}

Test(documents, wrong_everywhere) {
    usp_expect_ranks(1, SECONDS, wrong_everywhere, NULL);
    usp_expect_ranks(3, SECONDS, wrong_everywhere, NULL);
}

Test(documents, wrong_on_one_rank) {
    usp_expect_ranks(3, SECONDS, wrong_alone, NULL);
}

Test(documents, ranks_disagree) {
    usp_expect_ranks(3, SECONDS, disagree, NULL);
}

/* ---- layers ------------------------------------------------------------------------------------------------------ */

static usp_layer_config good_layer(void) {
    return (usp_layer_config){.struct_size = sizeof(usp_layer_config),
                              .attention = USP_SOFTMAX,
                              .mask = USP_MASK_CAUSAL,
                              .batch = 1,
                              .heads = 4,
                              .head_dim = 8};
}

static void try_layer(scene *s, const usp_sequence *sequence, const usp_layer_config *config, const char *says) {
    usp_layer *layer = NULL;
    usp_status status = usp_layer_create(s->mesh, (usp_sequence *)(uintptr_t)sequence, config, &layer);
    expect_refusal(s, says, USP_UNSUPPORTED, status, layer);
    usp_layer_destroy(layer);
}

/* Full masks and linear attention know no families; trees no distances. What is left works. */
static void try_layers(scene *s, usp_sequence *sequence, int trees) {
    static const float slopes[] = {1, 1, 1, 1};
    const char *field = trees ? "parents" : "prefixes";
    usp_layer_config config = good_layer();
    usp_layer *layer = NULL;
    config.mask = USP_MASK_FULL;
    try_layer(s, sequence, &config, field);
    config = good_layer();
    config.attention = USP_LINEAR;
    try_layer(s, sequence, &config, field);
    config = good_layer();
    config.window_left = 4;
    if (trees) try_layer(s, sequence, &config, "window_left");
    config = good_layer();
    config.slopes = slopes;
    if (trees) try_layer(s, sequence, &config, "slopes");
    config = good_layer();
    if (usp_layer_create(s->mesh, sequence, &config, &layer) != USP_OK) usp_say(s->rank, "%s", usp_last_error());
    usp_layer_destroy(layer);
}

static int families(usp_rank *rank, void *argument) {
    static const packing of_prefixes = {.count = 4, .ends = ends, .prefixes = prefixes},
                         of_parents = {.count = 4, .ends = ends, .parents = parents};
    scene s;
    (void)argument;
    if (open_scene(rank, &s)) return 1;
    for (int trees = 0; trees < 2; trees++) {
        usp_sequence *sequence = NULL;
        usp_sequence_config config = config_of(trees ? &of_parents : &of_prefixes);
        if (usp_sequence_create(s.mesh, &config, &sequence) != USP_OK) return usp_say(rank, "%s", usp_last_error());
        int before = s.live;
        s.live = atomic_load(&rank->heap->live);
        try_layers(&s, sequence, trees);
        s.live = before;
        usp_sequence_destroy(sequence);
    }
    usp_mesh_destroy(s.mesh);
    return 0;
}

Test(documents, layers_without_a_meaning) {
    usp_expect_ranks(1, SECONDS, families, NULL);
    usp_expect_ranks(3, SECONDS, families, NULL);
}

/* ---- re-plans ---------------------------------------------------------------------------------------------------- */

Test(documents, refused_replans) {
    usp_expect_ranks(1, SECONDS, usp_body_refused_replans, NULL);
    usp_expect_ranks(4, SECONDS, usp_body_refused_replans, NULL);
}

Test(documents, a_replan_refused_on_one_rank) {
    usp_expect_ranks(2, SECONDS, usp_body_refused_alone, NULL);
}

Test(documents, a_replan_that_differs_though_lengths_do_not) {
    usp_expect_ranks(2, SECONDS, usp_body_planned_apart, NULL);
}

Test(documents, ranks_that_give_unlike_memory_are_told) {
    usp_expect_ranks(2, SECONDS, usp_body_memory_apart, NULL);
}
