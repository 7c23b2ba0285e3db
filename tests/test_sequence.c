/* test_sequence.c - who owns which token: for every layout, length 0 .. 97 and up to 8 ranks, every token once, and all
 * ways of asking agree. Runs no attention. */
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

static int part_of(int64_t token, int64_t tokens, int parts) {
    int part = 0;
    while (token >= (part + 1) * tokens / parts) part++;
    return part;
}

static int zigzag_owner(int64_t token, int64_t tokens, int n) {
    int part = part_of(token, tokens, 2 * n);
    return part < n ? part : 2 * n - 1 - part;
}

/* The layouts' formulas, as the header gives them. -1: no formula here. */
static int owner_by_formula(usp_layout layout, int64_t token, int64_t tokens, int n) {
    if (layout == USP_LAYOUT_STRIPE) return (int)(token % n);
    if (layout == USP_LAYOUT_CONTIGUOUS) return part_of(token, tokens, n);
    return layout == USP_LAYOUT_ZIGZAG ? zigzag_owner(token, tokens, n) : -1;
}

/* The end of the zigzag that begins with document *d: of at least a rank's share alone, shorter ones together until
 * they are as many tokens. */
static int64_t zigzag_end(const usp_case_configs *configs, int64_t begin, int64_t share, int64_t *d) {
    const int64_t *ends = configs->documents.ends;
    int64_t end;
    do end = ends[(*d)++];
    while (*d < configs->documents.count && end - begin < share && ends[*d] - end < share);
    return end;
}

/* Per document: owners change at whole units alone, ascend and then descend in each zigzag. */
static int check_zigzags(usp_rank *rank, const usp_case_configs *configs, int64_t tokens, const int *owners) {
    int64_t unit = 1, share = (tokens + rank->size - 1) / rank->size, d = 0, begin = 0;
    while (16 * unit * rank->size <= tokens && unit < 128) unit *= 2;
    int64_t whole = (tokens + unit / 2) / unit * unit;
    for (int64_t i = 1; i < tokens; i++)
        if ((i % unit && owners[i] != owners[i - 1]) || (i >= whole && owners[i] != 0))
            return usp_say(rank, "%lld: rank %d has %lld", (long long)tokens, owners[i], (long long)i);
    while (tokens && d < configs->documents.count) {
        int64_t end = zigzag_end(configs, begin, share, &d), low = (begin + unit / 2) / unit * unit;
        int falls = 0;
        for (int64_t i = low + 1; i < (end + unit / 2) / unit * unit && i < tokens; i++) {
            falls |= owners[i] < owners[i - 1];
            if (falls && owners[i] > owners[i - 1])
                return usp_say(rank, "%lld: rank %d has %lld behind rank %d's", (long long)tokens, owners[i],
                               (long long)i, owners[i - 1]);
        }
        begin = end;
    }
    return 0;
}

static int document_of(const usp_case_configs *configs, int64_t token, int64_t *begin, int64_t *end) {
    int64_t d = 0, count = configs->sequence.documents;
    const int64_t *ends = configs->documents.ends;
    while (d < count - 1 && ends[d] <= token) d++;
    *begin = d > 0 ? ends[d - 1] : 0;
    *end = count > 0 ? ends[d] : configs->sequence.tokens;
    return (int)d;
}

/* Every token has one owner, and all ways of asking agree. owners and locals are [tokens]. */
static int check_partition(usp_rank *rank, const usp_sequence *s, usp_layout layout, int64_t tokens,
                           const usp_case_configs *configs, int *owners) {
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
    if (owned != tokens) return usp_say(rank, "%lld of %lld tokens are owned", (long long)owned, (long long)tokens);
    return layout == USP_LAYOUT_ZIGZAG_PER_DOCUMENT ? check_zigzags(rank, configs, tokens, owners) : 0;
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

/* ---- plans ------------------------------------------------------------------------------------------------------- */

/* Pairs that this rank computes under a causal mask. */
static int plan_work(usp_rank *rank, usp_sequence *s, usp_split split, double *work) {
    usp_plan *plan = NULL;
    usp_shape shape = {{split.ulysses, split.ring, rank->rank % split.ulysses, rank->rank / split.ulysses},
                       USP_SOFTMAX,
                       usp_rule_of(USP_MASK_CAUSAL, 0, 0, USP_ALIGN_TOP_LEFT),
                       USP_ROUTE_AUTO};
    if (usp_plan_acquire(s, &shape, &plan) != USP_OK) return usp_say(rank, "plan: %s", usp_last_error());
    *work = usp_plan_work(s, plan, shape.grid.r);
    usp_plan_release(s, plan);
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
    int failed = check_partition(rank, column, layout, tokens, configs, owners) ||
                 check_helpers(rank, column, layout, tokens, configs);
    for (int p = 0; p < rank->size && !failed; p++) failed = check_segments(rank, column, p);
    if (!failed) failed = same_owners(rank, column, row);
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
    for (int i = 0; i < LAYOUTS * 6 * 6 && !failed; i++) {
        int64_t tokens = lengths[i / 6 % 6], keys = lengths[i % 6], sum = 0;
        if (keys == 0 || keys == tokens) continue;
        usp_sequence *s = open_sequence(rank, mesh, (usp_layout)(i / 36), tokens, keys, configs);
        failed = !s;
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

static int by_number(const void *a, const void *b) {
    const int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return x < y ? -1 : x > y;
}

/* Whatever the documents become there is room for the tokens of every part of the ranks. */
static int check_room(usp_rank *rank, const usp_sequence *s) {
    for (int parts = 1; parts <= rank->size; parts++) {
        int64_t tokens = 0, each = rank->size / parts;
        for (int p = 0; p < rank->size && rank->size % parts == 0; p++) {
            tokens = p % each ? tokens + s->query.local[p] : s->query.local[p];
            if (tokens > usp_sequence_limit(s, &s->query, parts))
                return usp_say(rank, "no room for %lld of %lld tokens in a part of %lld ranks", (long long)tokens,
                               (long long)s->query.tokens, (long long)each);
        }
    }
    return 0;
}

/* A sequence of any length that is re-planned, first to all of its tokens, then to fewer, then to none. */
static int replan_zigzags(usp_rank *rank, const usp_mesh *mesh, uint64_t *state, usp_case_configs *configs) {
    enum { LONGEST = 4000, MANY = 40 };
    int owners[LONGEST];
    int64_t *ends = configs->documents.ends, tokens = 1 + usp_random_below(state, LONGEST);
    usp_sequence *s = NULL;
    const usp_sequence_config config = {.struct_size = sizeof config,
                                        .layout = USP_LAYOUT_ZIGZAG_PER_DOCUMENT,
                                        .max_documents = MANY,
                                        .tokens = tokens};
    int failed = usp_sequence_create(mesh, &config, &s) != USP_OK;
    for (int time = 0; time < 3 && !failed; time++, tokens = time < 2 ? usp_random_below(state, (int)tokens) : 0) {
        int64_t count = configs->documents.count = time < 2 ? 1 + usp_random_below(state, MANY) : MANY;
        for (int64_t d = 0; d < count; d++) ends[d] = usp_random_below(state, (int)tokens + 1);
        ends[0] = tokens;
        usp_sort(ends, (size_t)count, sizeof *ends, by_number);
        failed = usp_sequence_replan(s, count, ends, NULL) != USP_OK ||
                 check_partition(rank, s, USP_LAYOUT_ZIGZAG_PER_DOCUMENT, tokens, configs, owners) ||
                 check_room(rank, s);
    }
    usp_sequence_destroy(s);
    return failed ? usp_say(rank, "%s", usp_last_error()) : 0;
}

static int many_zigzags(usp_rank *rank, void *argument) {
    usp_mesh *mesh = NULL;
    usp_case_configs *configs = calloc(1, sizeof *configs);
    uint64_t state = 5;
    int failed = usp_mesh_create(rank->world, 1, rank->size, &mesh) != USP_OK;
    (void)argument;
    for (int time = 0; time < 40 && !failed; time++) failed = replan_zigzags(rank, mesh, &state, configs);
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
        failed = !s || plan_work(rank, s, (usp_split){1, rank->size}, &own) ||
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

/* ---- tests ------------------------------------------------------------------------------------------------------- */

Test(sequence, partition_and_coverage) {
    for (int size = 1; size <= 8; size++) usp_expect_ranks(size, SECONDS, all_lengths, NULL);
}

Test(sequence, zigzags_of_any_documents) {
    const int sizes[] = {1, 2, 3, 4, 6, 8};
    for (int i = 0; i < 6; i++) usp_expect_ranks(sizes[i], SECONDS, many_zigzags, NULL);
}

Test(sequence, cross_coverage) {
    for (int size = 1; size <= 8; size += size < 4 ? 1 : 2) usp_expect_ranks(size, SECONDS, cross_lengths, NULL);
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
