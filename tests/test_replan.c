/* test_replan.c - a sequence is given other documents: results and owners are those of a fresh one, plans fit the room
 * that create found, uploads read what was planned for them, and ranks that differ are told. */
#include "bodies.h"
#include "error.h"
#include "expect.h"
#include "layer.h"
#include "replans.h"

#include <stdlib.h>
#include <string.h>

enum { SECONDS = 240, MOST = 97 };

static int same_owners(usp_rank *rank, const usp_sequence *a, const usp_sequence *b) {
    for (int p = 0; p < rank->size; p++)
        for (int64_t i = 0; i < usp_sequence_local_tokens(a, p); i++)
            if (usp_sequence_to_global(a, p, i) != usp_sequence_to_global(b, p, i))
                return usp_say(rank, "another mesh has other tokens");
    return 0;
}

/* ---- replan ------------------------------------------------------------------------------------------------------ */

/* Documents that a sequence is given: a pattern of a case, over so many tokens. */
typedef struct change {
    int64_t tokens;
    int pattern;
} change;

/* The same tokens as a sequence that was made with these documents. */
static int compare_with_fresh(usp_rank *rank, usp_stage *stage, const usp_case *changed) {
    usp_sequence *fresh = NULL;
    usp_case_configs *configs = malloc(sizeof *configs);
    usp_case_configure(changed, stage->p, changed->ulysses * changed->ring, configs);
    usp_status status = usp_sequence_create(stage->mesh, &configs->sequence, &fresh);
    free(configs);
    if (status != USP_OK) return usp_say(rank, "%s", usp_last_error());
    int failed = same_owners(rank, fresh, stage->sequence);
    for (int p = 0; p < rank->size; p++)
        if (usp_sequence_local_tokens(fresh, p) != usp_sequence_local_tokens(stage->sequence, p))
            failed = usp_say(rank, "a re-planned sequence has other lengths");
    usp_sequence_destroy(fresh);
    return failed;
}

/* Gives the layer's sequence other documents, then runs the layer. */
static int replan_and_run(usp_rank *rank, const usp_case *c, const change *to, usp_references *references) {
    usp_stage stage;
    usp_whole whole;
    usp_case changed = usp_case_complete(*c);
    usp_case_document_list list;
    changed.tokens = to->tokens;
    changed.documents = to->pattern;
    usp_documents documents = usp_documents_of(&changed, &list);
    if (usp_stage_open(rank, c, &stage) != USP_OK) return usp_say(rank, "%s", usp_last_error());
    if (usp_replan_stage(&stage, &documents) != USP_OK) return usp_say(rank, "replan: %s", usp_last_error());
    if (compare_with_fresh(rank, &stage, &changed)) return 1;
    stage.c = changed;
    stage.tokens = usp_sequence_local_tokens(stage.sequence, stage.p);
    stage.key_tokens = usp_sequence_local_key_tokens(stage.sequence, stage.p);
    if (usp_stage_fill(&stage) || usp_stage_forward(&stage, 1) || usp_stage_backward(&stage)) return 1;
    if (usp_stage_gather(&stage, 1, &whole)) return 1;
    if (rank->rank == 0) usp_compare_with_reference(rank, &stage.c, &whole, usp_reference_of(references, &stage.c));
    usp_whole_free(&whole);
    usp_stage_close(&stage);
    usp_count(rank);
    return 0;
}

/* Where owners follow the documents their tokens may become fewer. */
static int replan(usp_rank *rank, void *argument) {
    static const change moving[] = {{97, 2}, {97, 1}, {61, 3}, {0, 1}, {96, 4}};
    static const change staying[] = {{97, 2}, {97, 1}, {97, 5}, {97, 3}, {97, 4}};
    static const usp_case cases[] = {
        {.layout = USP_LAYOUT_ZIGZAG_PER_DOCUMENT, .mask = USP_MASK_CAUSAL, .return_lse = 1},
        {.layout = USP_LAYOUT_ZIGZAG_PER_DOCUMENT, .mask = USP_MASK_CAUSAL, .parents = 1, .route = USP_ROUTE_DIRECT},
        {.layout = USP_LAYOUT_ZIGZAG_PER_DOCUMENT,
         .attention = USP_LINEAR,
         .mask = USP_MASK_CAUSAL,
         .decay = 1,
         .final_state = 1},
        {.mask = USP_MASK_CAUSAL, .prefixes = 1, .route = USP_ROUTE_GATHERED},
        {.mask = USP_MASK_CAUSAL, .window_left = 20, .return_lse = 1},
        {.mask = USP_MASK_CAUSAL, .key_tokens = 61, .alignment = USP_ALIGN_BOTTOM_RIGHT},
        {.layout = USP_LAYOUT_ZIGZAG_PER_DOCUMENT, .mask = USP_MASK_CAUSAL, .key_tokens = 61, .return_lse = 1},
        {.attention = USP_LINEAR, .mask = USP_MASK_CAUSAL, .decay = 1, .final_state = 1, .initial_state = 1}};
    for (int i = 0; i < 40; i++) {
        usp_case c = cases[i % 8];
        c.tokens = 97;
        c.documents = 2;
        c.max_documents = USP_CASE_DOCUMENTS;
        c.ulysses = rank->size % 2 == 0 ? 2 : 1;
        c.ring = rank->size / c.ulysses;
        const change *changes = c.layout == USP_LAYOUT_ZIGZAG_PER_DOCUMENT ? moving : staying;
        if (replan_and_run(rank, &c, &changes[i / 8], argument)) return 1;
    }
    return 0;
}

/* Ranks of one data copy re-plan to other documents, each owning as many tokens as before, or one of them is refused:
 * all are told. Another copy's
 * documents are its own affair. */
static int replan_apart(usp_rank *rank, void *argument) {
    const int *apart = argument;
    usp_case c = {.layout = USP_LAYOUT_ZIGZAG_PER_DOCUMENT,
                  .tokens = 96,
                  .max_documents = USP_CASE_DOCUMENTS,
                  .mask = USP_MASK_CAUSAL,
                  .ring = 2};
    usp_stage stage;
    if (usp_stage_open(rank, &c, &stage) != USP_OK) return usp_say(rank, "%s", usp_last_error());
    int copy = rank->rank / 2, odd = *apart && rank->rank == 1;
    const int64_t ends[] = {copy ? 40 : 48, 96}, other[] = {44, 96};
    usp_status status = usp_sequence_replan(stage.sequence, 1, &ends[1], rank->stream);
    stage.tokens = stage.key_tokens = usp_sequence_local_tokens(stage.sequence, stage.p);
    if (status != USP_OK || usp_stage_fill(&stage)) return usp_say(rank, "%s", usp_last_error());
    if (odd && *apart == 2) {
        status = usp_sequence_replan_documents(stage.sequence, &(usp_documents){0}, rank->stream);
        if (status != USP_INVALID) return usp_say(rank, "documents without a size are taken");
        status = USP_OK;
    } else {
        status = usp_sequence_replan(stage.sequence, 2, odd ? other : ends, rank->stream);
    }
    usp_forward f = usp_stage_forward_arguments(&stage, 1);
    if (status == USP_OK)
        status = usp_layer_forward(stage.layer, &f, stage.workspace.device, stage.sizes.forward_workspace, NULL);
    const char *said = usp_last_error();
    if (*apart && (status != USP_MISMATCH || !strstr(said, "rank 0") || !strstr(said, "rank 1")))
        usp_say(rank, "%s: \"%s\"", usp_status_string(status), said);
    if (!*apart && status != USP_OK) usp_say(rank, "copies may differ: %s", said);
    usp_stage_close(&stage);
    usp_count(rank);
    return 0;
}

/* ---- many documents ---------------------------------------------------------------------------------------------- */

/* What was planned fits into what was found at create. */
static int check_room(usp_rank *rank, const usp_plan *plan) {
    const usp_chunk_list *chunks = &plan->chunks;
    const usp_route_plan *route = &plan->route;
    int linear = plan->shape.attention == USP_LINEAR;
    if (linear && (chunks->chunks > chunks->chunk_capacity || chunks->own_chunks > chunks->own_chunk_limit ||
                   chunks->blocks > chunks->block_capacity))
        return usp_say(rank, "more chunks or blocks were planned than there is room for");
    if (!linear && (plan->tiles > plan->tile_capacity || route->maps > route->map_capacity))
        return usp_say(rank, "more tiles or rows of maps were planned than there is room for");
    for (int t = 1; t < route->stages; t++)
        if (route->stage[t].rows > route->limit) return usp_say(rank, "a stage has more rows than its limit");
    for (int r = 0; r < plan->shape.grid.ring; r++)
        if (usp_ring_rows(&plan->query, r) > plan->query_limit || usp_ring_rows(&plan->key, r) > plan->key_limit)
            return usp_say(rank, "ring rank %d holds more than its limit", r);
    return 0;
}

/* Plans of every kind and route on one sequence. */
enum { PLANS = 5 };

static int acquire_plans(usp_rank *rank, usp_sequence *s, usp_split split, usp_plan **plans) {
    for (int i = 0; i < PLANS; i++) {
        usp_shape shape = {
            {split.ulysses, split.ring, rank->rank % split.ulysses, rank->rank / split.ulysses},
            i < PLANS - 1 ? USP_SOFTMAX : USP_LINEAR,
            usp_rule_of(i == 1 ? USP_MASK_FULL : USP_MASK_CAUSAL, i == 2 ? 20 : 0, 0, USP_ALIGN_TOP_LEFT),
            i < PLANS - 1 ? (usp_route)i : USP_ROUTE_AUTO};
        if (usp_plan_acquire(s, &shape, &plans[i]) != USP_OK) return usp_say(rank, "%s", usp_last_error());
    }
    return 0;
}

static void release_plans(usp_sequence *s, usp_plan *const *plans) {
    for (int i = 0; i < PLANS; i++) usp_plan_release(s, plans[i]);
}

/* The length of document d of `count`, of which `left` tokens are left: in the first round all alike, in the second one
 * long ones that are a zigzag each between short ones that would share it, else any. */
static int64_t draw_length(uint64_t *state, const usp_sequence *s, int round, int64_t d, int64_t count, int64_t left) {
    int64_t even = left / (count - d), share = (s->query.max_tokens + s->ranks - 1) / s->ranks;
    int64_t length = usp_random_below(state, (int)(2 * even + 2));
    if (round == 0) length = even;
    if (round == 1) length = d % 2 ? share : 2 * s->ranks;
    return length < left ? length : left;
}

/* Re-plans `rounds` times with documents cut anywhere, the same on all ranks: many, few, empty ones. */
static int replan_often(usp_rank *rank, usp_sequence *s, usp_plan *const *plans, int most, int rounds) {
    uint64_t state = 7;
    int64_t *ends = malloc((size_t)most * sizeof *ends);
    int failed = 0;
    for (int round = 0; round < rounds && !failed; round++) {
        int count = round < 2 ? most : 1 + usp_random_below(&state, most);
        for (int64_t d = 0, left = s->query.max_tokens, end = 0; d < count; d++) {
            int64_t length = draw_length(&state, s, round, d, count, left);
            left -= length;
            ends[d] = end += length;
        }
        if (usp_sequence_replan(s, count, ends, NULL) != USP_OK) failed = usp_say(rank, "%s", usp_last_error());
        if (s->query.first[s->ranks] > s->query.capacity)
            failed = usp_say(rank, "more segments than there is room for");
        for (int i = 0; i < PLANS && !failed; i++) failed = check_room(rank, plans[i]);
    }
    free(ends);
    return failed;
}

typedef struct crowd {
    int64_t tokens;
    int documents, rounds;
} crowd;

/* Plans of all meshes stay true and within their room, whatever documents come. argument: crowd */
static int many_documents(usp_rank *rank, void *argument) {
    const crowd *c = argument;
    usp_mesh *mesh = NULL;
    usp_sequence *s = NULL;
    usp_plan *plans[PLANS] = {0};
    usp_sequence_config config = {.struct_size = sizeof config,
                                  .layout = USP_LAYOUT_ZIGZAG_PER_DOCUMENT,
                                  .tokens = c->tokens,
                                  .max_documents = c->documents};
    int failed = usp_mesh_create(rank->world, 1, rank->size, &mesh) != USP_OK;
    for (int i = 0; i < USP_SPLITS && !failed; i++) {
        if (usp_splits[i].ulysses * usp_splits[i].ring != rank->size) continue;
        if (usp_sequence_create(mesh, &config, &s) != USP_OK) return usp_say(rank, "%s", usp_last_error());
        const int64_t few = 1; /* plans made while most ranks have nothing have room for what comes */
        if (usp_sequence_replan(s, 1, &few, NULL) != USP_OK) return usp_say(rank, "%s", usp_last_error());
        failed = acquire_plans(rank, s, usp_splits[i], plans) || replan_often(rank, s, plans, c->documents, c->rounds);
        release_plans(s, plans);
        usp_sequence_destroy(s);
        usp_count(rank);
    }
    usp_mesh_destroy(mesh);
    return failed;
}

/* ---- uploads ----------------------------------------------------------------------------------------------------- */

/* A device whose copies run only when a stream is asked whether it is done, as those of pinned memory may. */
typedef struct late_device {
    usp_device_ops ops; /* first: what the device points to */
    struct {
        void *to;
        const void *from;
        size_t bytes;
        uint64_t hash; /* of what was to be copied */
    } copies[64];
    int count, run, changed;
} late_device;

static usp_status late_copy(usp_device *device, void *to, const void *from, size_t bytes, usp_stream stream) {
    late_device *late = (late_device *)(uintptr_t)device->ops;
    (void)stream;
    late->copies[late->count].to = to;
    late->copies[late->count].from = from;
    late->copies[late->count].bytes = bytes;
    late->copies[late->count++].hash = usp_hash(0, from, bytes);
    return USP_OK;
}

static usp_status late_query(usp_device *device, usp_stream stream, int *busy) {
    late_device *late = (late_device *)(uintptr_t)device->ops;
    (void)stream;
    for (int i = 0; i < late->count; i++) {
        late->changed += usp_hash(0, late->copies[i].from, late->copies[i].bytes) != late->copies[i].hash;
        memcpy(late->copies[i].to, late->copies[i].from, late->copies[i].bytes);
    }
    late->run += late->count;
    late->count = *busy = 0;
    return USP_OK;
}

static usp_status always_capturing(usp_device *device, usp_stream stream, int *yes) {
    (void)device, (void)stream;
    *yes = 1;
    return USP_OK;
}

typedef int (*upload_test)(usp_rank *rank, usp_sequence *s);

/* Runs the test on a sequence with documents, planned for every kind and mask. */
static int with_plans(usp_rank *rank, upload_test test) {
    usp_mesh *mesh = NULL;
    usp_plan *plans[PLANS] = {0};
    usp_case_configs *configs = malloc(sizeof *configs);
    int failed = usp_mesh_create(rank->world, 1, rank->size, &mesh) != USP_OK;
    usp_case c = usp_case_complete(
        (usp_case){.layout = USP_LAYOUT_ZIGZAG_PER_DOCUMENT, .tokens = MOST, .max_documents = USP_CASE_DOCUMENTS});
    usp_sequence *s = NULL;
    usp_case_configure(&c, rank->rank, rank->size, configs);
    failed = failed || usp_sequence_create(mesh, &configs->sequence, &s) != USP_OK;
    failed = failed || !s || acquire_plans(rank, s, (usp_split){1, rank->size}, plans) || test(rank, s);
    if (s) release_plans(s, plans);
    usp_sequence_destroy(s);
    usp_mesh_destroy(mesh);
    free(configs);
    usp_count(rank);
    return failed;
}

static const int64_t two_ends[] = {40, 97}, three_ends[] = {10, 50, 97};

/* What an upload still reads is not planned again; and no graph shall hold an upload. */
static int upload_late(usp_rank *rank, usp_sequence *s) {
    usp_device *device = rank->world->device;
    const usp_device_ops *ops = device->ops;
    late_device *late = calloc(1, sizeof *late);
    int failed = 0;
    late->ops = *ops;
    late->ops.copy = late_copy;
    late->ops.query = late_query;
    device->ops = &late->ops;
    if (usp_sequence_replan(s, 2, two_ends, NULL) != USP_OK || usp_sequence_replan(s, 3, three_ends, NULL) != USP_OK ||
        usp_world_synchronize(rank->world, NULL) != USP_OK)
        failed = usp_say(rank, "replan: %s", usp_last_error());
    late->ops.capturing = always_capturing;
    if (!failed && (usp_sequence_replan(s, 2, two_ends, NULL) != USP_INVALID || s->documents.count != 3 || late->count))
        failed = usp_say(rank, "a replan is captured");
    device->ops = ops;
    if (!failed && (late->run == 0 || late->changed))
        failed = usp_say(rank, "%d of %d uploads read what was planned later", late->changed, late->run);
    free(late);
    return failed;
}

static int late_uploads(usp_rank *rank, void *argument) {
    (void)argument;
    return with_plans(rank, upload_late);
}

static usp_status failing_copy(usp_device *device, void *to, const void *from, size_t bytes, usp_stream stream) {
    (void)device, (void)to, (void)from, (void)bytes, (void)stream;
    return usp_fail(USP_DEVICE, "no copy");
}

/* Where the device has not got what the host has planned, no layer may run on it. */
static int upload_nothing(usp_rank *rank, usp_sequence *s) {
    usp_device *device = rank->world->device;
    const usp_device_ops *ops = device->ops;
    usp_device_ops broken = *ops;
    int failed = 0;
    broken.copy = failing_copy;
    device->ops = &broken;
    if (usp_sequence_replan(s, 2, two_ends, NULL) != USP_DEVICE || usp_world_poll(rank->world) != USP_DEVICE)
        failed = usp_say(rank, "a re-plan that failed: %s", usp_last_error());
    device->ops = ops;
    return failed;
}

static int failed_upload(usp_rank *rank, void *argument) {
    (void)argument;
    return with_plans(rank, upload_nothing);
}

/* ---- tests ------------------------------------------------------------------------------------------------------- */

Test(replan, failed_upload) {
    usp_expect_ranks(1, SECONDS, failed_upload, NULL);
}

Test(replan, replan) {
    usp_references references = {0};
    for (int size = 1; size <= 4; size++) usp_expect_ranks(size, SECONDS, replan, &references);
    usp_references_free(&references);
}

Test(replan, replan_apart) {
    int apart[] = {0, 1, 2};
    usp_expect_ranks(4, SECONDS, replan_apart, &apart[0]);
    for (int i = 1; i <= 2; i++) usp_expect_ranks(2, SECONDS, replan_apart, &apart[i]);
}

Test(replan, many_documents) {
    crowd tiny = {53, 20, 20}, small = {MOST, 40, 20}, large = {65536, 2048, 2}, larger = {1000000, 10000, 1};
    for (int size = 1; size <= 8; size += size < 4 ? 1 : 2) {
        usp_expect_ranks(size, SECONDS, many_documents, &tiny);
        usp_expect_ranks(size, SECONDS, many_documents, &small);
    }
    usp_expect_ranks(2, SECONDS, many_documents, &large);
    usp_expect_ranks(4, SECONDS, many_documents, &larger);
}

Test(replan, late_uploads) {
    usp_expect_ranks(2, SECONDS, late_uploads, NULL);
}
