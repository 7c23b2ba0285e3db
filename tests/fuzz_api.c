/* fuzz_api.c - random use of the whole API: fuzz_api [seed [count]]. Nothing may crash, hang or leak; what is valid
 * must give the oracle's results; what is not must be refused alike on all ranks. A failure prints the seed that
 * repeats it. */
#include "bodies.h"
#include "fields.h"
#include "replans.h"

#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { DEFAULT_COUNT = 60, SECONDS = 120, MOST_TOKENS = 120, ACTIONS = 6 };

/* What one world of the fuzzer does; every rank draws the same numbers. */
typedef struct plan {
    uint64_t seed;
    usp_references *references;
} plan;

/* ---- damaged configs --------------------------------------------------------------------------------------------- */

static const int nasty[] = {-1, 0, 1, 2, 3, 5, 7, 4096, 65535, 65536, 65537, INT_MAX, INT_MIN, 0x7fc00000};

/* A number that the field may not have, of its own type; arrays may be shorter than the heads are now. */
static void damage_layer(uint64_t *state, usp_layer_config *config) {
    int hits = 1 + usp_random_below(state, 3), count = 0;
    while (usp_layer_fields[count].name) count++;
    for (int i = 0; i < hits; i++) {
        const usp_layer_field *field = &usp_layer_fields[usp_random_below(state, count)];
        int value = nasty[usp_random_below(state, (int)(sizeof nasty / sizeof nasty[0]))];
        void *to = (char *)config + field->offset;
        if (field->form == USP_FIELD_INT64)
            memcpy(to, &(int64_t){value}, sizeof(int64_t));
        else if (field->form != USP_FIELD_HEADS)
            memcpy(to, &value, sizeof value);
    }
    config->decay = config->slopes = NULL;
}

/* One number of one list, which need not have been given. */
static void damage_documents(uint64_t *state, usp_case_document_list *list, usp_sequence_config *config) {
    static const int64_t numbers[] = {-2, -1, 0, 1, 60, 1000, INT64_MAX, INT64_MIN};
    int64_t *const lists[] = {list->ends, list->key_ends, list->prefixes, list->parents};
    const int64_t **const given[] = {&config->document_ends, &config->key_document_ends, &config->prefixes,
                                     &config->parents};
    int which = usp_random_below(state, 4);
    int64_t number = numbers[usp_random_below(state, 8)];
    if (list->count == 0) return;
    lists[which][usp_random_below(state, (int)list->count)] = number;
    *given[which] = lists[which];
}

static void damage_sequence(uint64_t *state, usp_case_configs *configs) {
    usp_sequence_config *config = &configs->sequence;
    static const int64_t lengths[] = {-1, 0, 1, 17, 300, (int64_t)INT_MAX, INT64_MAX, INT64_MIN};
    int64_t length = lengths[usp_random_below(state, 8)];
    int field = usp_random_below(state, 10);
    if (field == 0) config->tokens = length;
    if (field == 1) config->key_tokens = length;
    if (field == 2) config->layout = (usp_layout)usp_random_below(state, 7);
    if (field == 3) config->max_documents = nasty[usp_random_below(state, 8)];
    if (field == 4) config->documents = length < config->documents ? length : config->documents;
    if (field == 5) config->segments = length < config->segments ? length : config->segments;
    if (field == 6) config->struct_size = (size_t)usp_random_below(state, 200);
    if (field > 6) damage_documents(state, &configs->documents, config);
}

/* What is wrong in a rank's own part of a config is told by name there, as another rank's failure elsewhere. */
static int is_same(int a, int b, int own) {
    return a == b || (own && a != USP_OK && b != USP_OK && (a == USP_PEER_FAILED || b == USP_PEER_FAILED));
}

/* All ranks must have got the same status; only those of a world that lives can be asked. */
static int same_status(usp_rank *rank, const usp_stage *stage, usp_status status, int own) {
    int mine = (int)status, all[64];
    usp_stage asking = *stage;
    if (usp_stage_share(&asking, &mine, sizeof mine, all)) return 1;
    for (int i = 0; i < rank->size; i++)
        if (!is_same(mine, all[i], own))
            return usp_say(rank, "%s here and %s on rank %d", usp_status_string(status),
                           usp_status_string((usp_status)all[i]), i);
    if (status != USP_OK && usp_last_error()[0] == 0) return usp_say(rank, "refused without a sentence");
    return 0;
}

static void query(const usp_layer *layer) {
    char text[64];
    usp_sizes sizes = {.struct_size = sizeof sizes};
    usp_cost cost = {.struct_size = sizeof cost};
    usp_shard shard = {.struct_size = sizeof shard};
    usp_layer_get_sizes(layer, &sizes);
    usp_layer_get_cost(layer, USP_PASS_FORWARD, &cost);
    usp_layer_get_cost(layer, USP_PASS_BACKWARD, &cost);
    usp_layer_get_shard(layer, &shard);
    usp_layer_describe(layer, text, sizeof text);
}

/* A sequence or a layer from a damaged config. */
static int try_damaged(usp_rank *rank, uint64_t *state, usp_split split) {
    usp_stage stage = {.rank = rank};
    usp_layer *layer = NULL;
    usp_case_configs *configs = malloc(sizeof *configs);
    usp_case c = usp_case_random(state, split, MOST_TOKENS);
    int damaged = usp_random_below(state, 2);
    if (usp_mesh_create(rank->world, split.ulysses, split.ring, &stage.mesh) != USP_OK)
        return usp_say(rank, "mesh: %s", usp_last_error());
    usp_case_configure(&c, rank->rank, rank->size, configs);
    if (damaged)
        damage_sequence(state, configs);
    else
        damage_layer(state, &configs->layer);
    usp_status status = usp_sequence_create(stage.mesh, &configs->sequence, &stage.sequence);
    int failed = same_status(rank, &stage, status, c.layout == USP_LAYOUT_CUSTOM);
    if (!failed && status == USP_OK) {
        status = usp_layer_create(stage.mesh, stage.sequence, &configs->layer, &layer);
        if (status == USP_OK) query(layer);
        failed = same_status(rank, &stage, status, 0);
    }
    usp_layer_destroy(layer);
    usp_sequence_destroy(stage.sequence);
    usp_mesh_destroy(stage.mesh);
    free(configs);
    return failed;
}

/* ---- calls ------------------------------------------------------------------------------------------------------- */

/* Errors that all ranks make alike, then a good run of the same layer. */
static int try_misuse(usp_rank *rank, uint64_t *state, usp_split split) {
    usp_stage stage;
    usp_whole whole;
    usp_case c = usp_case_random(state, split, MOST_TOKENS);
    int kind = usp_random_below(state, 4);
    if (usp_stage_open(rank, &c, &stage) != USP_OK) return 0;
    if (usp_stage_fill(&stage)) return 1;
    usp_forward f = usp_stage_forward_arguments(&stage, 1);
    usp_backward b = usp_stage_backward_arguments(&stage);
    size_t room = stage.sizes.forward_workspace, odd = kind == 0 ? room / 2 : room;
    if (kind == 1) f.struct_size = 5;
    if (kind == 2) b.struct_size = 0;
    if (kind < 2 && (kind == 1 || room > 0) &&
        usp_layer_forward(stage.layer, &f, stage.workspace.device, odd, rank->stream) == USP_OK)
        usp_say(rank, "a wrong forward is right");
    if (kind == 2 && usp_layer_backward(stage.layer, &b, stage.workspace.device, stage.sizes.backward_workspace,
                                        rank->stream) == USP_OK)
        usp_say(rank, "a wrong backward is right");
    if (usp_stage_forward(&stage, 1) || usp_stage_backward(&stage) || usp_stage_gather(&stage, 1, &whole)) return 1;
    usp_whole_free(&whole);
    usp_stage_close(&stage);
    usp_count(rank);
    return 0;
}

/* ---- re-plans ---------------------------------------------------------------------------------------------------- */

/* Now and then they make sense. */
static void random_documents(uint64_t *state, const usp_case *c, usp_case_document_list *list) {
    int64_t end = 0, key_end = 0;
    list->count = 1 + usp_random_below(state, 6);
    for (int64_t d = 0; d < list->count; d++) {
        int length = usp_random_below(state, (int)c->tokens / 3 + 2), back = usp_random_below(state, 16);
        end += back == 0 ? -length : length;
        key_end += back == 1 ? -length : length;
        list->ends[d] = end;
        list->key_ends[d] = key_end;
        list->prefixes[d] = usp_random_below(state, length + 1) - (back == 2);
        list->parents[d] = d - 1 - usp_random_below(state, 2);
    }
    if (c->layout == USP_LAYOUT_ZIGZAG_PER_DOCUMENT || usp_random_below(state, 2))
        list->ends[list->count - 1] = c->tokens;
}

/* Whatever comes of it, it is the same for all ranks and the layer runs. */
static int replan_anyhow(usp_stage *stage, uint64_t *state, usp_case_document_list *list) {
    usp_whole whole;
    usp_documents given = usp_documents_of(&stage->c, list);
    random_documents(state, &stage->c, list);
    given.count = list->count;
    usp_status status = usp_replan_stage(stage, &given);
    if (same_status(stage->rank, stage, status, 0) || usp_run_planned(stage, &whole)) return 1;
    usp_whole_free(&whole);
    return 0;
}

/* Documents that are anything, and at last a case's: its results are the oracle's. */
static int try_replans(usp_rank *rank, uint64_t *state, usp_split split, usp_references *references) {
    usp_stage stage;
    usp_whole whole;
    usp_case c = usp_case_random(state, split, MOST_TOKENS);
    int pattern = 1 + usp_random_below(state, 4), failed = 0;
    if (c.documents == 0) c.documents = 1;
    c.max_documents = USP_CASE_DOCUMENTS;
    if (usp_stage_open(rank, &c, &stage) != USP_OK) return 0;
    usp_case_document_list *list = malloc(sizeof *list);
    for (int i = 0; i < 3 && !failed; i++) failed = replan_anyhow(&stage, state, list);
    stage.c.documents = pattern;
    usp_documents given = usp_documents_of(&stage.c, list);
    if (!failed && usp_replan_stage(&stage, &given) != USP_OK) failed = usp_say(rank, "re-plan: %s", usp_last_error());
    free(list);
    if (failed || usp_run_planned(&stage, &whole)) return 1;
    if (rank->rank == 0) usp_compare_with_reference(rank, &stage.c, &whole, usp_reference_of(references, &stage.c));
    usp_whole_free(&whole);
    usp_stage_close(&stage);
    usp_count(rank);
    return 0;
}

/* ---- worlds ------------------------------------------------------------------------------------------------------ */

static usp_split draw_split(uint64_t *state, int size) {
    usp_split split;
    do split = usp_splits[usp_random_below(state, USP_SPLITS)];
    while (split.ulysses * split.ring != size);
    return split;
}

static int wander(usp_rank *rank, void *argument) {
    const plan *p = argument;
    uint64_t state = p->seed;
    int failed = 0;
    for (int i = 0; i < ACTIONS && !failed; i++) {
        usp_split split = draw_split(&state, rank->size);
        int action = usp_random_below(&state, 5);
        usp_case c = usp_case_random(&state, split, MOST_TOKENS);
        if (action < 2) failed = usp_check_case(rank, &c, p->references);
        if (action == 2) failed = try_damaged(rank, &state, split);
        if (action == 3) failed = try_misuse(rank, &state, split);
        if (action == 4) failed = try_replans(rank, &state, split, p->references);
    }
    usp_count(rank);
    return failed;
}

/* One rank aborts at a random moment: the others must end too, with an error that names it. */
static int wander_and_abort(usp_rank *rank, void *argument) {
    const plan *p = argument;
    uint64_t state = p->seed;
    int victim = usp_random_below(&state, rank->size), moment = usp_random_below(&state, 3);
    char name[64];
    snprintf(name, sizeof name, "rank %d", victim);
    for (int i = 0; i < 1000; i++) {
        usp_whole whole;
        usp_case c = usp_case_random(&state, draw_split(&state, rank->size), MOST_TOKENS / 2);
        if (rank->rank == victim && i == moment) usp_world_abort(rank->world);
        usp_stage_run(rank, &c, &whole);
        usp_whole_free(&whole);
        usp_status status = usp_world_poll(rank->world);
        if (status == USP_OK) continue;
        if (strstr(usp_last_error(), name)) usp_count(rank);
        return 1;
    }
    return 0;
}

/* ---- main -------------------------------------------------------------------------------------------------------- */

static int one_world(uint64_t seed) {
    uint64_t state = seed;
    usp_references references = {0};
    usp_report report;
    plan p = {.seed = usp_random_next(&state), .references = &references};
    int size = 1 + usp_random_below(&state, 6), aborting = size > 1 && usp_random_below(&state, 8) == 0;
    const usp_ranks ranks = {.size = size, .seconds = SECONDS, .watchdog = usp_random_below(&state, 2)};
    int failed = usp_ranks_run(&ranks, aborting ? wander_and_abort : wander, &p, &report);
    if (aborting) failed = report.done < size - 1;
    if (failed)
        fprintf(stderr, "fuzz_api %llu 1: %d ranks%s\n%s", (unsigned long long)seed, size,
                aborting ? ", one aborts" : "", report.text);
    usp_references_free(&references);
    return failed;
}

int main(int argc, char **argv) {
    uint64_t seed = argc > 1 ? strtoull(argv[1], NULL, 10) : 1;
    int count = argc > 2 ? atoi(argv[2]) : DEFAULT_COUNT, failed = 0;
    for (int i = 0; i < count; i++) failed += one_world(seed + (uint64_t)i);
    printf("fuzz_api: %d worlds from seed %llu, %d failed\n", count, (unsigned long long)seed, failed);
    return failed != 0;
}
