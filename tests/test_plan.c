/* test_plan.c - plans are integers: for thousands of random masks, documents, layouts, meshes and routes every allowed
 * pair of query and key is met once, by queries and by keys, and what travels is what queries see. Runs no attention.
 */
#include "expect.h"
#include "layer.h"
#include "cases.h"

#include <stdlib.h>
#include <string.h>

enum { SECONDS = 240, MOST = 97, DOCUMENTS = 12 };

/* ---- a random sequence and mask ---------------------------------------------------------------------------------- */

typedef struct subject {
    usp_layout layout;
    usp_mask mask;
    int64_t left, right, tokens, keys; /* keys: 0, or of cross-attention */
    usp_alignment alignment;
    usp_route route;
    int max_documents, trees, prefixed;
    int64_t documents, ends[DOCUMENTS], key_ends[DOCUMENTS], prefixes[DOCUMENTS], parents[DOCUMENTS];
    int64_t segments, key_segments;
    usp_segment segment[MOST], key_segment[MOST];
} subject;

static int below(uint64_t *state, int64_t n) {
    return usp_random_below(state, (int)n);
}

static void draw_ends(uint64_t *state, int64_t count, int64_t tokens, int whole, int64_t *ends) {
    for (int64_t d = 0; d < count; d++) ends[d] = below(state, tokens + 1);
    for (int64_t i = 0; i < count; i++)
        for (int64_t j = i + 1; j < count; j++)
            if (ends[j] < ends[i]) {
                int64_t swap = ends[i];
                ends[i] = ends[j];
                ends[j] = swap;
            }
    if (whole && count) ends[count - 1] = tokens;
}

static void draw_documents(uint64_t *state, subject *s) {
    int per_document = s->layout == USP_LAYOUT_ZIGZAG_PER_DOCUMENT;
    s->documents = per_document || below(state, 3) ? 1 + below(state, DOCUMENTS) : 0;
    draw_ends(state, s->documents, s->tokens, per_document, s->ends);
    draw_ends(state, s->documents, s->keys, per_document, s->key_ends);
    for (int64_t d = 0; d < s->documents; d++) {
        int64_t length = s->ends[d] - (d ? s->ends[d - 1] : 0), ancestor = d - 1;
        s->prefixes[d] = below(state, length + 1);
        for (int up = below(state, 4); ancestor >= 0 && up > 0; up--) ancestor = s->parents[ancestor];
        s->parents[d] = ancestor;
    }
}

/* Writes the segments of rank p of n: runs of tokens dealt at random, in an order of its own. */
static int64_t draw_segments(uint64_t seed, int64_t tokens, int p, int n, usp_segment *segment) {
    uint64_t state = seed;
    int64_t segments = 0;
    for (int64_t begin = 0, length; begin < tokens; begin += length) {
        length = 1 + below(&state, 9);
        if (length > tokens - begin) length = tokens - begin;
        int owner = below(&state, n), back = below(&state, 2);
        if (owner != p) continue;
        int64_t at = back ? 0 : segments;
        memmove(segment + at + 1, segment + at, (size_t)(segments - at) * sizeof *segment);
        segment[at] = (usp_segment){begin, length, 1};
        segments++;
    }
    return segments;
}

static subject draw_subject(uint64_t seed, int p, int n) {
    uint64_t state = seed;
    subject s = {.layout = (usp_layout)below(&state, 5), .tokens = 1 + below(&state, MOST)};
    if (below(&state, 3) == 0) s.keys = 1 + below(&state, MOST);
    s.mask = below(&state, 3) ? USP_MASK_CAUSAL : USP_MASK_FULL;
    s.left = below(&state, 2) ? 0 : below(&state, 4) ? 1 + below(&state, 40) : USP_NO_KEYS;
    if (s.mask == USP_MASK_FULL) s.right = below(&state, 2) ? 0 : below(&state, 4) ? 1 + below(&state, 40) : -1;
    s.alignment = (usp_alignment)below(&state, 2);
    s.route = (usp_route)below(&state, 4);
    draw_documents(&state, &s);
    if (s.documents && !s.keys && s.mask == USP_MASK_CAUSAL) {
        s.trees = below(&state, 3) == 0;
        s.prefixed = !s.trees && below(&state, 3) == 0;
    }
    if (s.trees) s.left = 0;
    if (s.documents && s.keys == s.tokens) s.keys = 0;
    s.max_documents = below(&state, 2) ? DOCUMENTS : 0;
    if (s.layout != USP_LAYOUT_CUSTOM) return s;
    s.segments = draw_segments(seed, s.tokens, p, n, s.segment);
    if (s.keys) s.key_segments = draw_segments(seed + 1, s.keys, p, n, s.key_segment);
    return s;
}

static usp_sequence_config config_of(const subject *s) {
    int documents = s->documents > 0;
    return (usp_sequence_config){.struct_size = sizeof(usp_sequence_config),
                                 .layout = s->layout,
                                 .max_documents = s->max_documents,
                                 .tokens = s->tokens,
                                 .key_tokens = s->keys,
                                 .documents = s->documents,
                                 .document_ends = documents ? s->ends : NULL,
                                 .segments = s->segments,
                                 .segment = s->segments ? s->segment : NULL,
                                 .key_document_ends = documents && s->keys ? s->key_ends : NULL,
                                 .prefixes = s->prefixed ? s->prefixes : NULL,
                                 .parents = s->trees ? s->parents : NULL,
                                 .key_segments = s->key_segments,
                                 .key_segment = s->key_segments ? s->key_segment : NULL};
}

/* ---- what is allowed, by the words of the header ----------------------------------------------------------------- */

static int64_t document_of(const int64_t *ends, int64_t count, int64_t token) {
    int64_t d = 0;
    while (d < count && ends[d] <= token) d++;
    return d;
}

static int is_family(const subject *s, int64_t descendant, int64_t document) {
    while (descendant >= 0 && descendant != document) descendant = s->trees ? s->parents[descendant] : -1;
    return descendant == document;
}

static int allows(const subject *s, int64_t q, int64_t k) {
    const int64_t *key_ends = s->keys ? s->key_ends : s->ends;
    int64_t keys = s->keys ? s->keys : s->tokens, begin = 0, end = s->tokens, key_begin = 0, key_end = keys, d = 0;
    if (s->documents) {
        d = document_of(s->ends, s->documents, q);
        int64_t e = document_of(key_ends, s->documents, k);
        if (d == s->documents || e == s->documents || !is_family(s, d, e)) return 0;
        begin = d ? s->ends[d - 1] : 0, end = s->ends[d];
        key_begin = d ? key_ends[d - 1] : 0, key_end = key_ends[d];
    }
    int64_t diagonal = s->alignment == USP_ALIGN_TOP_LEFT ? key_begin + q - begin : key_end - (end - q);
    int64_t left = s->left == USP_NO_KEYS ? 0 : s->left, right = s->right == USP_NO_KEYS ? 0 : s->right;
    if (s->left && k < diagonal - left) return 0;
    if (s->mask == USP_MASK_FULL) return !s->right || k <= diagonal + right;
    return k <= diagonal || (s->prefixed && k >= key_begin && k < key_begin + s->prefixes[d]);
}

/* ---- checks ------------------------------------------------------------------------------------------------------ */

/* Every row of the own block is filled once, by the token of its position. */
static int check_landings(usp_rank *rank, const usp_sequence *s, const usp_plan *plan) {
    const usp_grid *grid = &plan->shape.grid;
    char seen[MOST] = {0};
    int64_t i = 0;
    for (int u = 0; u < grid->ulysses && grid->ulysses > 1; u++)
        for (int64_t local = 0; i < plan->query.landing_end[u]; i++, local++) {
            int64_t row = plan->host.query_landing[i];
            if (row < 0 || row >= usp_plan_queries(plan) || seen[row]++) return usp_say(rank, "a row is filled twice");
            if (plan->query.position[plan->query.first[grid->r] + row] !=
                usp_sequence_to_global(s, grid->r * grid->ulysses + u, local))
                return usp_say(rank, "row %lld of the block is another token", (long long)row);
        }
    return grid->ulysses == 1 || i == usp_plan_queries(plan) ? 0 : usp_say(rank, "some rows stay empty");
}

static int is_allowed(const usp_pairs *p, int64_t q, int64_t k) {
    return p->low[q] <= p->key[k] && p->key[k] <= p->high[q] && (!p->last || p->query[q] <= p->last[k]);
}

/* Adds 1 to pairs[query row][key position] for each pair that the tiles of a stage allow. */
static int count_pairs(usp_rank *rank, const usp_plan *plan, int t, int by_key, unsigned char *pairs) {
    usp_pairs p = usp_plan_pairs(plan, &plan->host, t);
    usp_tiles tiles = usp_plan_tiles(plan, &plan->host, t, by_key);
    int64_t rows = 0, most = -1, before = INT64_MAX;
    int works = tiles.count->works;
    if (works > tiles.capacity) return usp_say(rank, "%d items, room for %d", works, tiles.capacity);
    for (int w = 0; w < works; w++) {
        const usp_work *work = &tiles.work[w];
        int64_t columns = 0;
        rows += work->count;
        if (work->count < 1 || work->count > USP_WORK_ROWS) return usp_say(rank, "a work item of %d rows", work->count);
        for (int n = work->first_tile; n < work->first_tile + work->tiles; n++) {
            const usp_tile *tile = &tiles.tile[n];
            columns += tile->end - tile->begin;
            for (int64_t i = work->begin; i < work->begin + work->count; i++)
                for (int64_t j = tile->begin; j < tile->end; j++) {
                    int64_t q = by_key ? j : i, k = by_key ? i : j;
                    int allowed = is_allowed(&p, q, k);
                    if (!allowed && j >= tile->full_begin && j < tile->full_end)
                        return usp_say(rank, "a tile calls a forbidden pair full");
                    pairs[q * MOST + p.key[k]] = (unsigned char)(pairs[q * MOST + p.key[k]] + allowed);
                }
        }
        if (columns > before) return usp_say(rank, "item %d has more columns than the one before", w);
        before = columns;
        if (w == 0) most = columns;
    }
    if (tiles.count->even != (works > 0 && before == most)) return usp_say(rank, "even: %d", tiles.count->even);
    int64_t all = by_key ? plan->route.stage[t].rows : usp_plan_queries(plan);
    int whole = by_key || t == 0 || t == plan->route.last;
    return !whole || rows == all ? 0 : usp_say(rank, "%lld of %lld rows have work", (long long)rows, (long long)all);
}

/* Each own query and each key: once if allowed, else never; and by either list. */
static int check_pairs(usp_rank *rank, const usp_sequence *s, const usp_plan *plan, const subject *u) {
    static const size_t room = MOST * MOST;
    unsigned char *pairs = calloc(2, room);
    double count = 0;
    int failed = 0;
    for (int t = 0; t < plan->route.stages && !failed; t++)
        failed = count_pairs(rank, plan, t, 0, pairs) || count_pairs(rank, plan, t, 1, pairs + room);
    for (int64_t i = 0; i < usp_plan_queries(plan) && !failed; i++)
        for (int64_t y = 0; y < s->key.tokens && !failed; y++) {
            int64_t x = plan->host.query[i];
            size_t at = (size_t)(i * MOST + y);
            int expected = allows(u, x, y);
            count += expected;
            if (pairs[at] != expected || pairs[room + at] != expected)
                failed = usp_say(rank, "query %lld and key %lld meet %d and %d times, not %d", (long long)x,
                                 (long long)y, pairs[at], pairs[room + at], expected);
        }
    if (!failed && usp_plan_work(s, plan, plan->shape.grid.r) != count)
        failed = usp_say(rank, "the plan counts %g pairs, not %g", usp_plan_work(s, plan, plan->shape.grid.r), count);
    free(pairs);
    return failed;
}

/* What arrives by a direct or gathered route and documents that stay is what some query sees. */
static int check_arrivals(usp_rank *rank, const usp_sequence *s, const usp_plan *plan, const subject *u) {
    if (plan->route.route == USP_ROUTE_RELAY || (s->replans && !usp_sequence_moves(s))) return 0;
    for (int t = 1; t < plan->route.stages; t++) {
        usp_pairs p = usp_plan_pairs(plan, &plan->host, t);
        for (int64_t k = 0; k < plan->route.stage[t].rows; k++) {
            int seen = 0;
            for (int64_t i = 0; i < usp_plan_queries(plan) && !seen; i++)
                seen = u->trees ? p.low[i] <= p.key[k] && p.key[k] <= p.high[i] : allows(u, p.query[i], p.key[k]);
            if (!seen) return usp_say(rank, "key %d arrives and no query sees it", p.key[k]);
        }
    }
    return 0;
}

/* What a rank sends is what the other one's plan receives: plans of all ranks are made here, one after the other. */
static int check_parcels(usp_rank *rank, usp_sequence *s, const usp_plan *plan) {
    const usp_grid *grid = &plan->shape.grid;
    int failed = 0;
    for (int r = 0; r < grid->ring && !failed; r++) {
        usp_plan *other = NULL;
        usp_shape shape = plan->shape;
        shape.grid.r = r;
        if (r == grid->r) continue;
        if (usp_plan_acquire(s, &shape, &other) != USP_OK) return usp_say(rank, "%s", usp_last_error());
        for (int i = 0; i < grid->ring - 1 && !failed; i++)
            for (int j = 0; j < grid->ring - 1; j++) {
                const usp_parcel *out = &plan->route.reader[i], *in = &other->route.source[j];
                if (out->r != r || in->r != grid->r) continue;
                int same =
                    out->rows == in->rows && (out->map >= 0) == (in->map >= 0) && (!in->rows || out->row == in->row);
                for (int64_t k = 0; k < in->rows && same && in->map >= 0; k++)
                    same = plan->host.map[out->map + k] == other->host.map[in->map + k];
                if (!same) failed = usp_say(rank, "what %d sends is not what %d awaits", grid->r, r);
            }
        usp_plan_release(s, other);
    }
    return failed;
}

static int check_plan(usp_rank *rank, usp_sequence *s, const subject *u, usp_split split) {
    usp_plan *plan = NULL;
    usp_shape shape = {{split.ulysses, split.ring, rank->rank % split.ulysses, rank->rank / split.ulysses},
                       USP_SOFTMAX,
                       usp_rule_of(u->mask, u->left, u->right, u->alignment),
                       u->route};
    if (usp_plan_acquire(s, &shape, &plan) != USP_OK) return usp_say(rank, "plan: %s", usp_last_error());
    int failed = check_landings(rank, s, plan) || check_pairs(rank, s, plan, u) || check_arrivals(rank, s, plan, u) ||
                 check_parcels(rank, s, plan);
    if (!failed && s->replans) {
        usp_documents d = {.struct_size = sizeof d, .count = 1, .ends = &u->tokens};
        usp_documents again = {sizeof again,
                               u->documents,
                               u->ends,
                               u->keys ? u->key_ends : NULL,
                               u->prefixed ? u->prefixes : NULL,
                               u->trees ? u->parents : NULL};
        d.key_ends = u->keys ? &u->keys : NULL;
        if (u->documents && (usp_sequence_replan_documents(s, &d, NULL) != USP_OK ||
                             usp_sequence_replan_documents(s, &again, NULL) != USP_OK))
            failed = usp_say(rank, "replan: %s", usp_last_error());
        if (!failed && plan->tiles > plan->tile_capacity) failed = usp_say(rank, "more tiles than there is room for");
        failed = failed || check_landings(rank, s, plan) || check_pairs(rank, s, plan, u);
    }
    usp_plan_release(s, plan);
    return failed;
}

static int check_subject(usp_rank *rank, usp_mesh *mesh, uint64_t seed) {
    subject u = draw_subject(seed, rank->rank, rank->size);
    usp_sequence_config config = config_of(&u);
    usp_sequence *s = NULL;
    if (usp_sequence_create(mesh, &config, &s) != USP_OK)
        return usp_say(rank, "seed %llu: %s", (unsigned long long)seed, usp_last_error());
    int failed = 0;
    for (int i = 0; i < USP_SPLITS && !failed; i++)
        if (usp_splits[i].ulysses * usp_splits[i].ring == rank->size) {
            failed = check_plan(rank, s, &u, usp_splits[i]);
            if (failed)
                usp_say(rank, "... seed %llu: layout %d, %lld tokens, U%d R%d, route %d", (unsigned long long)seed,
                        u.layout, (long long)u.tokens, usp_splits[i].ulysses, usp_splits[i].ring, u.route);
        }
    usp_sequence_destroy(s);
    usp_count(rank);
    return failed;
}

/* argument: the number of subjects */
static int random_plans(usp_rank *rank, void *argument) {
    usp_mesh *mesh = NULL;
    int failed = usp_mesh_create(rank->world, 1, rank->size, &mesh) != USP_OK;
    for (int i = 0; i < *(int *)argument && !failed; i++)
        failed = check_subject(rank, mesh, (uint64_t)(rank->size * 100000 + i));
    usp_mesh_destroy(mesh);
    return failed;
}

Test(plan, random) {
    for (int size = 1; size <= 8; size++) {
        int subjects = size < 5 ? 700 : 300;
        usp_expect_ranks(size, SECONDS, random_plans, &subjects);
    }
}
