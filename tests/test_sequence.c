/* test_sequence.c - who owns which token, and the work planned from it: for every layout, length 0 .. 97 and up to 8
 * ranks, every token once, every allowed pair of query and key once. Runs no attention but after a replan. */
#include "bodies.h"
#include "error.h"
#include "expect.h"
#include "layer.h"
#include "sort.h"

#include <stdlib.h>
#include <string.h>

enum { SECONDS = 240, MOST = 97, LAYOUTS = 5 };

static const char *const layout_names[LAYOUTS] = {"zigzag", "contiguous", "stripe", "per-document", "custom"};

/* A sequence of the case tables' shape, on a mesh of one column or one row. */
static usp_sequence *open_sequence(usp_rank *rank, const usp_mesh *mesh, usp_layout layout, int64_t tokens,
                                   int64_t key_tokens, usp_case_configs *configs) {
    usp_sequence *sequence = NULL;
    usp_case c = usp_case_complete((usp_case){.layout = layout, .tokens = tokens, .key_tokens = key_tokens});
    usp_case_configure(&c, rank->rank, rank->size, configs);
    if (usp_sequence_create(mesh, &configs->sequence, &sequence) != USP_OK)
        usp_say(rank, "%s of %lld tokens: %s", layout_names[layout], (long long)tokens, usp_last_error());
    return sequence;
}

/* ---- ownership --------------------------------------------------------------------------------------------------- */

/* The layouts' formulas, as the header gives them. -1: no formula here. */
static int owner_by_formula(usp_layout layout, int64_t token, int64_t tokens, int n) {
    if (layout == USP_LAYOUT_STRIPE) return (int)(token % n);
    if (layout != USP_LAYOUT_ZIGZAG && layout != USP_LAYOUT_CONTIGUOUS) return -1;
    int parts = layout == USP_LAYOUT_ZIGZAG ? 2 * n : n, part = 0;
    while (token >= (part + 1) * tokens / parts) part++;
    return layout == USP_LAYOUT_ZIGZAG && part >= n ? 2 * n - 1 - part : part;
}

static int document_of(const usp_case_configs *configs, int64_t token, int64_t *begin, int64_t *end) {
    int64_t d = 0, count = configs->sequence.documents;
    while (d < count - 1 && configs->document_ends[d] <= token) d++;
    *begin = d > 0 ? configs->document_ends[d - 1] : 0;
    *end = count > 0 ? configs->document_ends[d] : configs->sequence.tokens;
    return (int)d;
}

/* Every token has one owner, and all ways of asking agree. owners and locals are [tokens]. */
static int check_partition(usp_rank *rank, const usp_sequence *s, usp_layout layout, int64_t tokens, int *owners) {
    int64_t owned = 0;
    for (int64_t i = 0; i < tokens; i++) owners[i] = -1;
    for (int p = 0; p < rank->size; p++) {
        int64_t local = usp_sequence_local_tokens(s, p);
        owned += local;
        for (int64_t i = 0; i < local; i++) {
            int64_t token = usp_sequence_to_global(s, p, i), back = -1;
            int owner = -1;
            if (token < 0 || token >= tokens || owners[token] >= 0)
                return usp_say(rank, "%s %lld: rank %d has token %lld at %lld", layout_names[layout], (long long)tokens,
                               p, (long long)token, (long long)i);
            owners[token] = p;
            usp_status status = usp_sequence_to_local(s, token, &owner, &back);
            if (status != USP_OK || owner != p || back != i)
                return usp_say(rank, "%s %lld: token %lld is not found again", layout_names[layout], (long long)tokens,
                               (long long)token);
            int expected = owner_by_formula(layout, token, tokens, rank->size);
            if (expected >= 0 && expected != p)
                return usp_say(rank, "%s %lld: token %lld is on rank %d, not %d", layout_names[layout],
                               (long long)tokens, (long long)token, p, expected);
        }
        if (usp_sequence_to_global(s, p, local) != -1)
            return usp_say(rank, "a token beyond the last has a global index");
    }
    return owned == tokens ? 0 : usp_say(rank, "%lld of %lld tokens are owned", (long long)owned, (long long)tokens);
}

/* The segments of a rank are its tokens in local order. */
static int check_segments(usp_rank *rank, const usp_sequence *s, int p) {
    usp_segment segments[256];
    int64_t count = 0, local = 0;
    if (usp_sequence_segments(s, p, 256, segments, &count) != USP_OK) return usp_say(rank, "%s", usp_last_error());
    for (int64_t i = 0; i < count; i++)
        for (int64_t j = 0; j < segments[i].length; j++, local++)
            if (usp_sequence_to_global(s, p, local) != segments[i].start + j * segments[i].stride)
                return usp_say(rank, "segment %lld of rank %d is not its tokens", (long long)i, p);
    return local == usp_sequence_local_tokens(s, p) ? 0 : usp_say(rank, "segments of rank %d miss tokens", p);
}

/* ---- helpers ----------------------------------------------------------------------------------------------------- */

enum { TOKEN_BYTES = 3, BATCH = 2 };

static int check_helpers(usp_rank *rank, const usp_sequence *s, usp_layout layout, int64_t tokens,
                         const usp_case_configs *configs) {
    int32_t positions[MOST + 1], labels[MOST + 1], row[MOST + 1];
    int64_t local = usp_sequence_local_tokens(s, rank->rank);
    for (int i = 0; i < MOST + 1; i++) row[i] = 1000 + 7 * i;
    if (usp_sequence_positions(s, positions) != USP_OK || usp_sequence_labels(s, row, -5, labels) != USP_OK)
        return usp_say(rank, "%s", usp_last_error());
    for (int64_t i = 0; i < local; i++) {
        int64_t token = usp_sequence_to_global(s, rank->rank, i), begin, end;
        document_of(configs, token, &begin, &end);
        int32_t label = token + 1 < end ? row[token + 1] : -5;
        if (positions[i] != token - begin || labels[i] != label)
            return usp_say(rank, "%s %lld: token %lld has position %d and label %d", layout_names[layout],
                           (long long)tokens, (long long)token, positions[i], labels[i]);
    }
    return 0;
}

static int check_scatter(usp_rank *rank, const usp_sequence *s, int64_t tokens) {
    unsigned char whole[BATCH * (MOST + 1) * TOKEN_BYTES], local[sizeof whole], again[sizeof whole] = {0};
    size_t bytes = (size_t)(BATCH * tokens * TOKEN_BYTES);
    int64_t own = usp_sequence_local_tokens(s, rank->rank);
    for (size_t i = 0; i < sizeof whole; i++) whole[i] = (unsigned char)(i * 37 + i / 256);
    if (usp_sequence_scatter(s, BATCH, TOKEN_BYTES, whole, local) != USP_OK ||
        usp_sequence_gather(s, BATCH, TOKEN_BYTES, local, again) != USP_OK)
        return usp_say(rank, "%s", usp_last_error());
    for (int64_t b = 0; b < BATCH; b++)
        for (int64_t i = 0; i < own; i++) {
            int64_t token = usp_sequence_to_global(s, rank->rank, i);
            if (memcmp(local + (b * own + i) * TOKEN_BYTES, whole + (b * tokens + token) * TOKEN_BYTES, TOKEN_BYTES) !=
                0)
                return usp_say(rank, "scatter brings another token than %lld", (long long)token);
        }
    return memcmp(whole, again, bytes) == 0 ? 0 : usp_say(rank, "gather is not the inverse of scatter");
}

/* ---- the schedule ------------------------------------------------------------------------------------------------ */

/* Position of a row of a ring rank's block, by its segments. */
static int64_t position_of(const usp_ring_side *side, int r, int64_t row) {
    const usp_ring_block *block = &side->block[r];
    for (int64_t i = 0; i < block->segments; i++) {
        const usp_ring_segment *s = &side->segment[block->first_segment + i];
        if (row < s->length) return s->start + row * s->stride;
        row -= s->length;
    }
    return -1;
}

/* Where the exchange puts the tokens of each ulysses rank: every row once, and at its position. */
static int check_landings(usp_rank *rank, const usp_sequence *s, const usp_schedule *plan) {
    char seen[MOST + 1] = {0};
    int64_t landed = 0;
    for (int64_t i = 0; i < plan->query.landings; i++) {
        const usp_landing *at = &plan->query.landing[i];
        int p = plan->shape.r * plan->shape.ulysses + at->u;
        for (int64_t j = 0; j < at->count; j++, landed++) {
            int64_t row = at->row + j * at->step;
            if (row < 0 || row >= plan->query.block[plan->shape.r].rows || seen[row]++)
                return usp_say(rank, "row %lld of the block is filled twice", (long long)row);
            if (position_of(&plan->query, plan->shape.r, row) != usp_sequence_to_global(s, p, at->source + j))
                return usp_say(rank, "row %lld of the block is another token", (long long)row);
        }
    }
    return landed == plan->query.block[plan->shape.r].rows ? 0 : usp_say(rank, "some rows of the block stay empty");
}

/* Adds 1 to pairs[query row][key position] for each pair that the tiles of a step allow. */
static int count_pairs(usp_rank *rank, const usp_schedule *plan, int step, int by_keys, unsigned char *pairs) {
    int r = plan->shape.r, source = (r - step + plan->shape.ring) % plan->shape.ring;
    const usp_ring_side *row_side = by_keys ? &plan->key : &plan->query,
                        *column_side = by_keys ? &plan->query : &plan->key;
    int row_block = by_keys ? source : r, column_block = by_keys ? r : source;
    usp_tiles tiles = by_keys ? usp_schedule_key_tiles(plan, step) : usp_schedule_query_tiles(plan, step);
    int64_t rows = 0;
    for (int w = 0; w < tiles.works; w++) {
        const usp_work *work = &tiles.work[w];
        rows += work->count;
        if (work->count < 1 || work->count > USP_WORK_ROWS) return usp_say(rank, "a work item of %d rows", work->count);
        for (int32_t i = work->begin; i < work->begin + work->count; i++) {
            int64_t x = work->origin + (int64_t)i * work->stride;
            if (x != position_of(row_side, row_block, i))
                return usp_say(rank, "work row %d has position %lld", i, (long long)x);
            for (int t = 0; t < work->tiles; t++) {
                const usp_tile *tile = &tiles.tile[work->first_tile + t];
                for (int32_t j = tile->begin; j < tile->end; j++) {
                    int64_t y = position_of(column_side, column_block, j), offset = by_keys ? x - y : y - x;
                    int allowed = offset >= tile->low && offset <= tile->high;
                    int any = tile->low == INT32_MIN && tile->high == INT32_MAX; /* maybe of several segments */
                    if (!any && tile->origin + (int64_t)j * tile->stride != y)
                        return usp_say(rank, "tile column %d does not have position %lld", j, (long long)y);
                    if (!allowed && j >= tile->full_begin && j < tile->full_end)
                        return usp_say(rank, "a tile calls a forbidden pair full");
                    if (allowed) pairs[by_keys ? j * (MOST + 1) + x : i * (MOST + 1) + y]++;
                }
            }
        }
    }
    return rows == row_side->block[row_block].rows ? 0 : usp_say(rank, "%lld rows have work", (long long)rows);
}

/* Each own query and each key: once if allowed, else never; and by either list. */
static int check_pairs(usp_rank *rank, const usp_sequence *s, const usp_schedule *plan, double *work) {
    static const size_t room = (MOST + 1) * (MOST + 1);
    unsigned char *pairs = calloc(2, room);
    int64_t rows = plan->query.block[plan->shape.r].rows, count = 0;
    int failed = 0;
    for (int step = 0; step < plan->shape.ring && !failed; step++)
        failed = count_pairs(rank, plan, step, 0, pairs) || count_pairs(rank, plan, step, 1, pairs + room);
    for (int64_t i = 0; i < rows && !failed; i++)
        for (int64_t y = 0; y < s->key.tokens && !failed; y++) {
            int64_t x = position_of(&plan->query, plan->shape.r, i), at = i * (MOST + 1) + y;
            int expected = plan->shape.mask == USP_MASK_FULL || y <= x;
            count += expected;
            if (pairs[at] != expected || pairs[room + (size_t)at] != expected)
                failed = usp_say(rank, "query %lld and key %lld meet %d and %d times", (long long)x, (long long)y,
                                 pairs[at], pairs[room + (size_t)at]);
        }
    if (!failed && usp_schedule_pairs(s, plan, plan->shape.r) != (double)count)
        failed = usp_say(rank, "the schedule counts %g pairs, not %lld", usp_schedule_pairs(s, plan, plan->shape.r),
                         (long long)count);
    *work = (double)count;
    free(pairs);
    return failed;
}

/* Columns of a work item: what a device walks for it. */
static int64_t columns_of(const usp_tiles *tiles, const usp_work *work) {
    int64_t columns = 0;
    for (int t = 0; t < work->tiles; t++) {
        const usp_tile *tile = &tiles->tile[work->first_tile + t];
        columns += tile->end - tile->begin;
    }
    return columns;
}

/* The lists of every step, by queries and by keys, begin with their heaviest items: devices follow them. */
static int check_order(usp_rank *rank, const usp_schedule *plan) {
    for (int i = 0; i < 2 * plan->shape.ring; i++) {
        usp_tiles tiles = i % 2 ? usp_schedule_key_tiles(plan, i / 2) : usp_schedule_query_tiles(plan, i / 2);
        for (int w = 1; w < tiles.works; w++) {
            int64_t before = columns_of(&tiles, &tiles.work[w - 1]), columns = columns_of(&tiles, &tiles.work[w]);
            if (columns > before)
                return usp_say(rank, "step %d, list of %s: item %d has %lld columns, the one before %lld", i / 2,
                               i % 2 ? "keys" : "queries", w, (long long)columns, (long long)before);
        }
    }
    return 0;
}

static int check_schedule(usp_rank *rank, usp_sequence *s, usp_split split, usp_mask mask, double *work) {
    usp_schedule *plan = NULL;
    usp_shape shape = {split.ulysses, split.ring, rank->rank % split.ulysses, rank->rank / split.ulysses,
                       USP_SOFTMAX,   mask};
    if (usp_schedule_acquire(s, &shape, &plan) != USP_OK) return usp_say(rank, "schedule: %s", usp_last_error());
    int failed = check_order(rank, plan) ||
                 (s->query.tokens <= MOST && (check_landings(rank, s, plan) || check_pairs(rank, s, plan, work)));
    usp_schedule_release(s, plan);
    if (failed)
        usp_say(rank, "... for %s, %lld tokens, U%d R%d, %s", layout_names[s->layout], (long long)s->query.tokens,
                split.ulysses, split.ring, mask == USP_MASK_CAUSAL ? "causal" : "full");
    return failed;
}

static int check_schedules(usp_rank *rank, usp_sequence *s) {
    double work;
    for (int i = 0; i < USP_SPLITS; i++) {
        if (usp_splits[i].ulysses * usp_splits[i].ring != rank->size) continue;
        if (check_schedule(rank, s, usp_splits[i], USP_MASK_FULL, &work)) return 1;
        if (!s->cross && check_schedule(rank, s, usp_splits[i], USP_MASK_CAUSAL, &work)) return 1;
    }
    return 0;
}

/* ---- bodies ------------------------------------------------------------------------------------------------------ */

static int same_owners(usp_rank *rank, const usp_sequence *a, const usp_sequence *b) {
    for (int p = 0; p < rank->size; p++)
        for (int64_t i = 0; i < usp_sequence_local_tokens(a, p); i++)
            if (usp_sequence_to_global(a, p, i) != usp_sequence_to_global(b, p, i))
                return usp_say(rank, "another mesh has other tokens");
    return 0;
}

static int check_length(usp_rank *rank, usp_mesh *const *meshes, usp_layout layout, int64_t tokens,
                        usp_case_configs *configs) {
    int owners[MOST + 1];
    usp_sequence *column = open_sequence(rank, meshes[0], layout, tokens, 0, configs);
    usp_sequence *row = column ? open_sequence(rank, meshes[1], layout, tokens, 0, configs) : NULL;
    if (!row) return 1;
    int failed =
        check_partition(rank, column, layout, tokens, owners) || check_helpers(rank, column, layout, tokens, configs);
    for (int p = 0; p < rank->size && !failed; p++) failed = check_segments(rank, column, p);
    if (!failed) failed = same_owners(rank, column, row) || check_schedules(rank, column);
    if (!failed && tokens % 16 == 1) failed = check_scatter(rank, column, tokens);
    usp_sequence_destroy(row);
    usp_sequence_destroy(column);
    return failed;
}

static int all_lengths(usp_rank *rank, void *argument) {
    usp_mesh *meshes[2] = {NULL, NULL};
    usp_case_configs *configs = malloc(sizeof *configs);
    int failed = 0;
    (void)argument;
    usp_mesh_create(rank->world, 1, rank->size, &meshes[0]);
    usp_mesh_create(rank->world, rank->size, 1, &meshes[1]);
    for (int layout = 0; layout < LAYOUTS && !failed; layout++)
        for (int64_t tokens = 0; tokens <= MOST && !failed; tokens++)
            failed = check_length(rank, meshes, (usp_layout)layout, tokens, configs);
    usp_mesh_destroy(meshes[1]);
    usp_mesh_destroy(meshes[0]);
    free(configs);
    usp_count(rank);
    return failed;
}

/* Queries and keys of different lengths. */
static int cross_lengths(usp_rank *rank, void *argument) {
    static const int64_t lengths[] = {0, 1, 7, 61, 96, 97};
    usp_mesh *mesh = NULL;
    usp_case_configs *configs = malloc(sizeof *configs);
    int failed = usp_mesh_create(rank->world, 1, rank->size, &mesh) != USP_OK;
    (void)argument;
    for (int i = 0; i < 3 * 6 * 6 && !failed; i++) {
        int64_t tokens = lengths[i / 6 % 6], keys = lengths[i % 6], sum = 0;
        if (keys == 0 || keys == tokens) continue;
        usp_sequence *s = open_sequence(rank, mesh, (usp_layout)(i / 36), tokens, keys, configs);
        failed = !s || check_schedules(rank, s);
        for (int p = 0; p < rank->size && s; p++) sum += usp_sequence_local_key_tokens(s, p);
        if (!failed && sum != keys)
            failed = usp_say(rank, "%lld of %lld keys are owned", (long long)sum, (long long)keys);
        usp_sequence_destroy(s);
    }
    usp_mesh_destroy(mesh);
    free(configs);
    usp_count(rank);
    return failed;
}

/* Lists of several work items a segment. Coverage does not count pairs at this length. */
static int long_lists(usp_rank *rank, void *argument) {
    usp_mesh *mesh = NULL;
    usp_case_configs *configs = malloc(sizeof *configs);
    int failed = usp_mesh_create(rank->world, 1, rank->size, &mesh) != USP_OK;
    (void)argument;
    for (int layout = 0; layout < LAYOUTS && !failed; layout++) {
        usp_sequence *s = open_sequence(rank, mesh, (usp_layout)layout, 5000, 0, configs);
        failed = !s || check_schedules(rank, s);
        usp_sequence_destroy(s);
    }
    usp_mesh_destroy(mesh);
    free(configs);
    usp_count(rank);
    return failed;
}

/* Causal work of the busiest rank over the mean, for each layout; argument: double[LAYOUTS]. */
static int measure_balance(usp_rank *rank, void *argument) {
    double *balance = argument, *all = calloc((size_t)rank->size, sizeof *all);
    usp_case_configs *configs = malloc(sizeof *configs);
    usp_stage stage = {.rank = rank};
    int failed = usp_mesh_create(rank->world, 1, rank->size, &stage.mesh) != USP_OK;
    for (int layout = 0; layout < LAYOUTS && !failed; layout++) {
        double own = 0, most = 0, sum = 0;
        usp_sequence *s = open_sequence(rank, stage.mesh, (usp_layout)layout, 96, 0, configs);
        failed = !s || check_schedule(rank, s, (usp_split){1, rank->size}, USP_MASK_CAUSAL, &own) ||
                 usp_stage_share(&stage, &own, sizeof own, all);
        for (int p = 0; p < rank->size; p++) {
            most = all[p] > most ? all[p] : most;
            sum += all[p];
        }
        if (rank->rank == 0) balance[layout] = most * rank->size / sum;
        usp_sequence_destroy(s);
    }
    usp_mesh_destroy(stage.mesh);
    free(configs);
    free(all);
    usp_count(rank);
    return failed;
}

/* ---- sorting ----------------------------------------------------------------------------------------------------- */

static int by_number(const void *a, const void *b) {
    const int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return x < y ? -1 : x > y;
}

Test(sequence, sorting_in_place) {
    enum { ITEMS = 200 };
    int64_t ours[ITEMS][2], theirs[ITEMS][2];
    srand(7);
    for (size_t count = 0; count <= ITEMS; count++) {
        for (size_t i = 0; i < count; i++) ours[i][0] = ours[i][1] = rand() % (1 + (int)count / 2);
        memcpy(theirs, ours, sizeof ours);
        usp_sort(ours, count, sizeof *ours, by_number);
        qsort(theirs, count, sizeof *theirs, by_number);
        cr_assert(count == 0 || memcmp(ours, theirs, count * sizeof *ours) == 0, "%zu items", count);
    }
}

/* ---- replan ------------------------------------------------------------------------------------------------------ */

typedef struct documents {
    int64_t count, ends[8];
} documents;

/* The same tokens as a sequence that was made with these documents. */
static int compare_with_fresh(usp_rank *rank, usp_stage *stage, const documents *d) {
    usp_sequence *fresh = NULL;
    usp_sequence_config config = {.struct_size = sizeof config,
                                  .layout = USP_LAYOUT_ZIGZAG_PER_DOCUMENT,
                                  .tokens = usp_named_tokens(d->ends[d->count - 1]),
                                  .documents = d->count,
                                  .document_ends = d->ends};
    if (usp_sequence_create(stage->mesh, &config, &fresh) != USP_OK) return usp_say(rank, "%s", usp_last_error());
    int failed = same_owners(rank, fresh, stage->sequence);
    for (int p = 0; p < rank->size; p++)
        if (usp_sequence_local_tokens(fresh, p) != usp_sequence_local_tokens(stage->sequence, p))
            failed = usp_say(rank, "a re-planned sequence has other lengths");
    usp_sequence_destroy(fresh);
    return failed;
}

/* Gives the layer's sequence other documents, then runs the layer. */
static int replan_and_run(usp_rank *rank, const usp_case *c, const documents *d, usp_references *references) {
    usp_stage stage;
    usp_whole whole;
    if (usp_stage_open(rank, c, &stage) != USP_OK) return usp_say(rank, "%s", usp_last_error());
    if (usp_sequence_replan(stage.sequence, d->count, d->ends, rank->stream) != USP_OK)
        return usp_say(rank, "replan: %s", usp_last_error());
    if (compare_with_fresh(rank, &stage, d)) return 1;
    stage.c.tokens = d->ends[d->count - 1];
    stage.tokens = stage.key_tokens = usp_sequence_local_tokens(stage.sequence, stage.p);
    if (usp_stage_fill(&stage) || usp_stage_forward(&stage, 1) || usp_stage_backward(&stage)) return 1;
    if (usp_stage_gather(&stage, 1, &whole)) return 1;
    if (rank->rank == 0) usp_compare_with_reference(rank, &stage.c, &whole, usp_reference_of(references, &stage.c));
    usp_whole_free(&whole);
    usp_stage_close(&stage);
    usp_count(rank);
    return 0;
}

static int replan(usp_rank *rank, void *argument) {
    static const documents changes[] = {{1, {97}}, {3, {1, 50, 97}}, {4, {40, 41, 43, 61}}, {1, {0}}, {2, {0, 96}}};
    static const usp_case cases[] = {
        {.layout = USP_LAYOUT_ZIGZAG_PER_DOCUMENT, .tokens = 97, .mask = USP_MASK_CAUSAL, .return_lse = 1},
        {.layout = USP_LAYOUT_ZIGZAG_PER_DOCUMENT,
         .tokens = 97,
         .attention = USP_LINEAR,
         .mask = USP_MASK_CAUSAL,
         .decay = 1,
         .final_state = 1}};
    for (int i = 0; i < 10; i++) {
        usp_case c = cases[i % 2];
        c.ulysses = rank->size % 2 == 0 ? 2 : 1;
        c.ring = rank->size / c.ulysses;
        if (replan_and_run(rank, &c, &changes[i / 2], argument)) return 1;
    }
    return 0;
}

/* Ranks of one data copy re-plan to other documents, each owning as many tokens as before: all are told. Another copy's
 * documents are its own affair. */
static int replan_apart(usp_rank *rank, void *argument) {
    const int *apart = argument;
    usp_case c = {.layout = USP_LAYOUT_ZIGZAG_PER_DOCUMENT, .tokens = 96, .mask = USP_MASK_CAUSAL, .ring = 2};
    usp_stage stage;
    if (usp_stage_open(rank, &c, &stage) != USP_OK) return usp_say(rank, "%s", usp_last_error());
    int copy = rank->rank / 2, odd = *apart && rank->rank == 1;
    const int64_t ends[] = {copy ? 40 : 48, 96}, other[] = {44, 96};
    usp_status status = usp_sequence_replan(stage.sequence, 1, &ends[1], rank->stream);
    stage.tokens = stage.key_tokens = usp_sequence_local_tokens(stage.sequence, stage.p);
    if (status != USP_OK || usp_stage_fill(&stage)) return usp_say(rank, "%s", usp_last_error());
    status = usp_sequence_replan(stage.sequence, 2, odd ? other : ends, rank->stream);
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

/* What was planned fits into what was found at create, and no list is longer than a few items a segment. */
static int check_room(usp_rank *rank, const usp_schedule *plan, int64_t tokens, int64_t most) {
    int64_t items = 2 * (tokens / USP_WORK_ROWS + 2 * (plan->shape.ring + 1) * most);
    if (plan->works > plan->work_capacity || plan->tiles > plan->tile_capacity || plan->chunks > plan->chunk_capacity ||
        plan->own_chunks > plan->own_chunk_limit || plan->blocks > plan->block_capacity)
        return usp_say(rank, "more was planned than there is room for");
    for (int r = 0; r < plan->shape.ring; r++)
        if (plan->query.block[r].rows > plan->query.limit || plan->query.block[r].segments > plan->query.segment_limit)
            return usp_say(rank, "ring rank %d holds more than its limit", r);
    if (plan->work_capacity > items || plan->tile_capacity > 2 * items)
        return usp_say(rank, "room for %lld work items and %lld tiles", (long long)plan->work_capacity,
                       (long long)plan->tile_capacity);
    return 0;
}

/* Schedules of every kind on one sequence. */
enum { PLANS = 3 };

static int acquire_plans(usp_rank *rank, usp_sequence *s, usp_split split, usp_schedule **plans) {
    for (int i = 0; i < PLANS; i++) {
        usp_shape shape = {split.ulysses,
                           split.ring,
                           rank->rank % split.ulysses,
                           rank->rank / split.ulysses,
                           i < 2 ? USP_SOFTMAX : USP_LINEAR,
                           i == 1 ? USP_MASK_FULL : USP_MASK_CAUSAL};
        if (usp_schedule_acquire(s, &shape, &plans[i]) != USP_OK) return usp_say(rank, "%s", usp_last_error());
    }
    return 0;
}

/* Re-plans `rounds` times with documents cut anywhere, the same on all ranks: many, few, empty ones. */
static int replan_often(usp_rank *rank, usp_sequence *s, usp_schedule *const *plans, int most, int rounds) {
    uint64_t state = 7;
    int64_t *ends = malloc((size_t)most * sizeof *ends);
    int failed = 0;
    for (int round = 0; round < rounds && !failed; round++) {
        int count = round == 0 ? most : 1 + usp_random_below(&state, most);
        for (int64_t d = 0, left = s->max_tokens, end = 0; d < count; d++) {
            int64_t even = left / (count - d),
                    length = round == 0 ? even : usp_random_below(&state, (int)(2 * even + 2));
            length = length < left ? length : left;
            left -= length;
            ends[d] = end += length;
        }
        if (usp_sequence_replan(s, count, ends, NULL) != USP_OK) failed = usp_say(rank, "%s", usp_last_error());
        for (int i = 0; i < PLANS && !failed; i++) failed = check_room(rank, plans[i], s->max_tokens, most);
        double work;
        for (int i = 0; i < 2 && !failed && s->max_tokens <= MOST; i++)
            failed = check_landings(rank, s, plans[i]) || check_pairs(rank, s, plans[i], &work);
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
    usp_schedule *plans[PLANS];
    usp_sequence_config config = {.struct_size = sizeof config,
                                  .layout = USP_LAYOUT_ZIGZAG_PER_DOCUMENT,
                                  .tokens = c->tokens,
                                  .max_documents = c->documents};
    int failed = usp_mesh_create(rank->world, 1, rank->size, &mesh) != USP_OK;
    for (int i = 0; i < USP_SPLITS && !failed; i++) {
        if (usp_splits[i].ulysses * usp_splits[i].ring != rank->size) continue;
        if (usp_sequence_create(mesh, &config, &s) != USP_OK) return usp_say(rank, "%s", usp_last_error());
        failed = acquire_plans(rank, s, usp_splits[i], plans) || replan_often(rank, s, plans, c->documents, c->rounds);
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
    usp_schedule *plans[PLANS];
    usp_case_configs *configs = malloc(sizeof *configs);
    int failed = usp_mesh_create(rank->world, 1, rank->size, &mesh) != USP_OK;
    usp_sequence *s = open_sequence(rank, mesh, USP_LAYOUT_ZIGZAG_PER_DOCUMENT, MOST, 0, configs);
    failed = failed || !s || acquire_plans(rank, s, (usp_split){1, rank->size}, plans) || test(rank, s);
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
    if (!failed && (usp_sequence_replan(s, 2, two_ends, NULL) != USP_INVALID || s->documents != 3 || late->count))
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

Test(sequence, partition_and_coverage) {
    for (int size = 1; size <= 8; size++) usp_expect_ranks(size, SECONDS, all_lengths, NULL);
}

Test(sequence, failed_upload) {
    usp_expect_ranks(1, SECONDS, failed_upload, NULL);
}

Test(sequence, cross_coverage) {
    for (int size = 1; size <= 8; size += size < 4 ? 1 : 2) usp_expect_ranks(size, SECONDS, cross_lengths, NULL);
}

Test(sequence, heaviest_first) {
    for (int size = 1; size <= 8; size += size < 4 ? 1 : 2) usp_expect_ranks(size, SECONDS, long_lists, NULL);
}

Test(sequence, balance) {
    double balance[LAYOUTS];
    for (int size = 2; size <= 8; size *= 2) {
        usp_expect_ranks(size, SECONDS, measure_balance, balance);
        for (int i = 0; i < LAYOUTS; i++)
            cr_log_info("%d ranks, %s: busiest / mean = %.3f", size, layout_names[i], balance[i]);
        cr_expect(balance[USP_LAYOUT_ZIGZAG] == 1, "zigzag of %d ranks: %g", size, balance[USP_LAYOUT_ZIGZAG]);
        cr_expect(balance[USP_LAYOUT_STRIPE] < 1.1, "stripe of %d ranks: %g", size, balance[USP_LAYOUT_STRIPE]);
        cr_expect(balance[USP_LAYOUT_CONTIGUOUS] > 1.4, "contiguous of %d ranks: %g", size,
                  balance[USP_LAYOUT_CONTIGUOUS]);
    }
}

Test(sequence, replan) {
    usp_references references = {0};
    for (int size = 1; size <= 4; size++) usp_expect_ranks(size, SECONDS, replan, &references);
    usp_references_free(&references);
}

Test(sequence, replan_apart) {
    int apart[] = {0, 1};
    usp_expect_ranks(4, SECONDS, replan_apart, &apart[0]);
    usp_expect_ranks(2, SECONDS, replan_apart, &apart[1]);
}

Test(sequence, many_documents) {
    crowd small = {MOST, 40, 20}, large = {65536, 2048, 2}, larger = {1000000, 10000, 1};
    for (int size = 1; size <= 8; size += size < 4 ? 1 : 2) usp_expect_ranks(size, SECONDS, many_documents, &small);
    usp_expect_ranks(2, SECONDS, many_documents, &large);
    usp_expect_ranks(4, SECONDS, many_documents, &larger);
}

Test(sequence, late_uploads) {
    usp_expect_ranks(2, SECONDS, late_uploads, NULL);
}
