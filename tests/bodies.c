/* bodies.c - tests of running layers, by the oracle and by properties (see bodies.h). Knows no test framework and no
 * device. */
#include "bodies.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* ---- against the oracle ------------------------------------------------------------------------------------------ */

/* Where a create call refused: was it allowed to? */
static int judge_refusal(usp_rank *rank, const usp_case *c, usp_status refusal) {
    char name[512];
    usp_case_print(c, name, sizeof name);
    if (usp_case_expectation(c) == USP_WORKS || refusal != USP_UNSUPPORTED)
        return usp_say(rank, "%s: create: %s (%s)", name, usp_last_error(), usp_status_string(refusal));
    if (rank->rank == 0) usp_refuse(rank, "%s: %s", name, usp_last_error());
    return 0;
}

static void judge_result(usp_rank *rank, const usp_case *c, const usp_whole *whole, usp_references *references) {
    int n = c->ulysses * c->ring, copy = rank->rank / n;
    usp_references own = {0};
    usp_case local = *c;
    if (rank->rank % n != 0) return;
    local.seed += 4096 * copy;
    usp_compare_with_reference(rank, &local, whole, usp_reference_of(copy == 0 ? references : &own, &local));
    usp_references_free(&own);
    usp_count(rank);
}

int usp_check_case(usp_rank *rank, const usp_case *given, usp_references *references) {
    usp_whole whole;
    usp_case c = usp_case_complete(*given);
    int failed = usp_stage_run(rank, &c, &whole);
    if (failed > 0) return 1;
    if (failed < 0) {
        judge_refusal(rank, &c, whole.refusal);
        return 0;
    }
    if (usp_case_expectation(&c) == USP_MUST_REFUSE) usp_say(rank, "a layer that makes no sense was not refused");
    judge_result(rank, &c, &whole, references);
    usp_whole_free(&whole);
    return 0;
}

/* On every mesh of the world's size. */
static int check_on_meshes(usp_rank *rank, const usp_table_run *run, usp_case c) {
    int failed = 0;
    c.copies = run->copies ? run->copies : 1;
    if (c.attention == 0) c.attention = run->table->attention;
    for (int s = 0; s < USP_SPLITS && !failed; s++) {
        c.ulysses = usp_splits[s].ulysses;
        c.ring = usp_splits[s].ring;
        c.shared_memory = (c.seed + s) % 2;
        if (c.ulysses * c.ring * c.copies == rank->size) failed = usp_check_case(rank, &c, run->references);
    }
    return failed;
}

int usp_body_table(usp_rank *rank, void *argument) {
    const usp_table_run *run = argument;
    int failed = 0;
    for (int i = 0; i < run->table->count && !failed; i++) {
        usp_case c = run->table->cases[i];
        c.seed = 100 + i;
        failed = check_on_meshes(rank, run, c);
    }
    return failed;
}

int usp_body_features(usp_rank *rank, void *argument) {
    const usp_table_run run = {.table = &usp_feature_table, .references = argument};
    int failed = 0;
    for (int i = 0; i < usp_feature_table.count * 15 && !failed; i++) {
        usp_case c = usp_feature_table.cases[i / 15];
        c.seed = 100 + i / 15;
        c.layout = (usp_layout)(USP_LAYOUT_ZIGZAG + i / 3 % 5);
        c.dtype = (usp_dtype)(USP_F32 + i % 3);
        if (c.layout == USP_LAYOUT_ZIGZAG_PER_DOCUMENT && c.documents == 5) c.documents = 4; /* has no padding */
        failed = check_on_meshes(rank, &run, c);
    }
    return failed;
}

/* ---- one result for every mesh and layout ------------------------------------------------------------------------ */

int usp_run_case(usp_rank *rank, const usp_case *c, usp_whole *whole) {
    usp_case complete = usp_case_complete(*c);
    int failed = usp_stage_run(rank, c, whole);
    if (failed < 0) judge_refusal(rank, &complete, whole->refusal);
    return failed != 0;
}

int usp_compare_meshes(usp_rank *rank, usp_case c, usp_whole *first) {
    for (int s = 0; s < USP_SPLITS; s++) {
        usp_whole whole;
        if (usp_splits[s].ulysses * usp_splits[s].ring != rank->size) continue;
        c.ulysses = usp_splits[s].ulysses;
        c.ring = usp_splits[s].ring;
        if (usp_run_case(rank, &c, &whole)) return 1;
        if (first->out && rank->rank == 0) usp_compare_near(rank, &c, "another mesh or layout", &whole, first);
        if (first->out)
            usp_whole_free(&whole);
        else
            *first = whole;
    }
    return 0;
}

int usp_body_independent(usp_rank *rank, void *argument) {
    static const usp_case cases[] = {
        {.tokens = 83, .mask = USP_MASK_CAUSAL, .heads = 6, .kv_heads = 2, .head_dim = 16, .return_lse = 1},
        {.tokens = 83, .heads = 4, .head_dim = 16, .return_lse = 1},
        {.attention = USP_LINEAR,
         .tokens = 83,
         .mask = USP_MASK_CAUSAL,
         .heads = 6,
         .kv_heads = 2,
         .head_dim = 16,
         .decay = 1,
         .initial_state = 1,
         .final_state = 1}};
    static const usp_layout layouts[] = {USP_LAYOUT_ZIGZAG, USP_LAYOUT_CONTIGUOUS, USP_LAYOUT_STRIPE};
    (void)argument;
    for (int i = 0; i < 3; i++) {
        usp_whole first = {0};
        int failed = 0;
        for (int l = 0; l < (cases[i].attention == USP_LINEAR ? 2 : 3) && !failed; l++) {
            usp_case c = cases[i];
            c.layout = layouts[l];
            failed = usp_compare_meshes(rank, c, &first);
        }
        usp_whole_free(&first);
        if (failed) return 1;
        usp_count(rank);
    }
    return 0;
}

/* ---- bit for bit ------------------------------------------------------------------------------------------------- */

static int across_case(usp_rank *rank, usp_case c, usp_whole *first) {
    usp_whole whole;
    if (usp_run_case(rank, &c, &whole)) return 1;
    if (rank->rank != 0) {
        usp_whole_free(&whole);
        return 0;
    }
    if (!first->out) {
        *first = whole;
        return 0;
    }
    usp_compare_bits(rank, &c, "more ulysses ranks", USP_SAME_ALL, &whole, first);
    usp_whole_free(&whole);
    usp_count(rank);
    return 0;
}

int usp_body_across_ulysses(usp_rank *rank, void *argument) {
    static const usp_case cases[USP_ACROSS_CASES] = {
        {.tokens = 131, .mask = USP_MASK_CAUSAL, .heads = 8, .kv_heads = 4, .head_dim = 16, .return_lse = 1},
        {.tokens = 300,
         .mask = USP_MASK_CAUSAL,
         .heads = 4,
         .kv_heads = 4,
         .head_dim = 16,
         .return_lse = 1,
         .layout = USP_LAYOUT_CONTIGUOUS},
        {.tokens = 97, .heads = 8, .kv_heads = 4, .dtype = USP_BF16, .head_dim = 16, .return_lse = 1},
        {.attention = USP_LINEAR,
         .tokens = 131,
         .mask = USP_MASK_CAUSAL,
         .heads = 4,
         .head_dim = 16,
         .decay = 1,
         .scale = 0.25f,
         .initial_state = 1,
         .final_state = 1},
        {.tokens = 131,
         .mask = USP_MASK_CAUSAL,
         .documents = 1,
         .window_left = 30,
         .heads = 8,
         .kv_heads = 4,
         .head_dim = 16,
         .return_lse = 1,
         .dropout = 0.3f,
         .sinks = 1,
         .max_logit = 1},
        {.tokens = 131,
         .mask = USP_MASK_CAUSAL,
         .documents = 1,
         .parents = 1,
         .heads = 4,
         .head_dim = 16,
         .soft_cap = 2,
         .return_lse = 1,
         .dlse = 1}};
    usp_across *across = argument;
    for (int i = 0; i < USP_ACROSS_CASES; i++) {
        usp_case c = cases[i];
        c.ring = across->ring;
        c.ulysses = rank->size / across->ring;
        if (across_case(rank, c, &across->first[i])) return 1;
    }
    return 0;
}

void usp_across_free(usp_across *across) {
    for (int i = 0; i < USP_ACROSS_CASES; i++) usp_whole_free(&across->first[i]);
}

void usp_choose_mesh(const usp_rank *rank, usp_case *c) {
    c->ulysses = rank->size % 2 == 0 ? 2 : 1;
    c->ring = rank->size / c->ulysses;
}

static int same_for_all_arrangements(usp_rank *rank, usp_case c) {
    usp_whole first;
    if (usp_run_case(rank, &c, &first)) return 1;
    for (int a = USP_BHSD; a < USP_ARRANGEMENTS; a++) {
        usp_whole whole;
        /* Rows that tensor cores cannot read take another kernel, and with it other bits. */
        if (a == USP_PADDED && rank->device == USP_DEVICE_CUDA && c.dtype != USP_F32) continue;
        c.arrangement = (usp_arrangement)a;
        if (usp_run_case(rank, &c, &whole)) return 1;
        if (rank->rank == 0) usp_compare_bits(rank, &c, "another arrangement", USP_SAME_ALL, &whole, &first);
        usp_whole_free(&whole);
    }
    usp_whole_free(&first);
    usp_count(rank);
    return 0;
}

int usp_body_arrangements(usp_rank *rank, void *argument) {
    static const usp_case cases[] = {
        {.tokens = 77, .mask = USP_MASK_CAUSAL, .batch = 2, .head_dim = 16, .return_lse = 1},
        {.tokens = 77, .heads = 6, .kv_heads = 2, .batch = 2, .head_dim = 16, .dtype = USP_BF16, .return_lse = 1},
        {.attention = USP_LINEAR, .tokens = 77, .mask = USP_MASK_CAUSAL, .batch = 2, .head_dim = 16, .decay = 1},
        {.tokens = 77, .documents = 1, .batch = 2, .head_dim = 16, .dropout = 0.3f, .sinks = 1, .window_left = 9}};
    (void)argument;
    for (int i = 0; i < 4; i++) {
        usp_case c = cases[i];
        usp_choose_mesh(rank, &c);
        if (same_for_all_arrangements(rank, c)) return 1;
    }
    return 0;
}

/* ---- again ------------------------------------------------------------------------------------------------------- */

static int poison(usp_rank *rank, usp_buffer *buffer) {
    memset(buffer->host, 0xff, buffer->bytes);
    return usp_buffer_upload(buffer) == USP_OK ? 0 : usp_say(rank, "upload: %s", usp_last_error());
}

/* Forward (saved kept), another layer's forward, this one's backward; with poisoned workspace each time. */
static int run_beside(usp_stage *stage, usp_stage *other, usp_whole *whole) {
    int failed = poison(stage->rank, &stage->workspace) || usp_stage_forward(stage, 1);
    if (!failed && other) failed = usp_stage_forward(other, 1);
    if (!failed) failed = poison(stage->rank, &stage->workspace) || usp_stage_backward(stage);
    if (!failed && other) failed = usp_stage_backward(other);
    return failed || usp_stage_gather(stage, 1, whole);
}

static int repeat(usp_stage *stage, usp_stage *other) {
    usp_whole first, again, unsaved;
    int bits = USP_SAME_ALL, output = USP_SAME_OUT | USP_SAME_LSE;
    if (run_beside(stage, NULL, &first) || run_beside(stage, other, &again)) return 1;
    if (usp_stage_forward(stage, 0) || usp_stage_gather(stage, 0, &unsaved)) return 1;
    if (stage->rank->rank == 0) {
        usp_compare_bits(stage->rank, &stage->c, "the second time", bits, &again, &first);
        usp_compare_bits(stage->rank, &stage->c, "without saved", output, &unsaved, &first);
    }
    usp_whole_free(&first);
    usp_whole_free(&again);
    usp_whole_free(&unsaved);
    usp_count(stage->rank);
    return 0;
}

static int open_and_fill(usp_rank *rank, const usp_case *c, usp_stage *stage) {
    usp_case complete = usp_case_complete(*c);
    usp_status status = usp_stage_open(rank, c, stage);
    if (status != USP_OK) return judge_refusal(rank, &complete, status) + 1;
    return usp_stage_fill(stage);
}

int usp_body_repeats(usp_rank *rank, void *argument) {
    static const usp_case cases[] = {
        {.tokens = 77, .mask = USP_MASK_CAUSAL, .head_dim = 16, .kv_heads = 2, .return_lse = 1, .deterministic = 1},
        {.attention = USP_LINEAR,
         .tokens = 77,
         .mask = USP_MASK_CAUSAL,
         .head_dim = 16,
         .decay = 1,
         .deterministic = 1},
        {.tokens = 77,
         .documents = 1,
         .head_dim = 16,
         .return_lse = 1,
         .soft_cap = 2,
         .dropout = 0.3f,
         .sinks = 1,
         .max_logit = 1,
         .deterministic = 1}};
    (void)argument;
    for (int i = 0; i < 3; i++) {
        usp_stage stage, other;
        usp_case c = cases[i], o = cases[(i + 1) % 3];
        usp_choose_mesh(rank, &c);
        o.ring = rank->size;
        o.seed = 5;
        int failed = open_and_fill(rank, &c, &stage) || open_and_fill(rank, &o, &other) || repeat(&stage, &other);
        if (failed) return 1; /* the world is given up with all that is on it */
        usp_stage_close(&other);
        usp_stage_close(&stage);
    }
    return 0;
}

/* ---- shared memory and data copies --------------------------------------------------------------------------------- */

/* On every mesh: what arrives where it belongs is what is copied there. */
static int shared_case(usp_rank *rank, usp_case c) {
    for (int s = 0; s < USP_SPLITS; s++) {
        usp_whole plain, shared;
        c.ulysses = usp_splits[s].ulysses;
        c.ring = usp_splits[s].ring;
        if (c.ulysses * c.ring != rank->size) continue;
        c.shared_memory = 0;
        if (usp_run_case(rank, &c, &plain)) return 1;
        c.shared_memory = 1;
        if (usp_run_case(rank, &c, &shared)) return 1;
        if (rank->rank == 0) usp_compare_bits(rank, &c, "in shared memory", USP_SAME_ALL, &shared, &plain);
        usp_whole_free(&plain);
        usp_whole_free(&shared);
        usp_count(rank);
    }
    return 0;
}

/* Ranks carve alike where tokens and heads divide evenly, and do not where they do not. */
int usp_body_shared_memory(usp_rank *rank, void *argument) {
    static const usp_case cases[] = {
        {.tokens = 96, .head_dim = 16, .heads = 8, .kv_heads = 2, .return_lse = 1},
        {.tokens = 96, .head_dim = 16, .heads = 24, .batch = 2, .sinks = 1, .max_logit = 1},
        {.tokens = 96, .head_dim = 16, .heads = 24, .mask = USP_MASK_FULL, .arrangement = USP_BHSD},
        {.tokens = 96, .head_dim = 16, .heads = 24, .window_left = 5, .route = USP_ROUTE_DIRECT},
        {.tokens = 96, .head_dim = 16, .heads = 24, .window_left = 5, .route = USP_ROUTE_GATHERED},
        {.tokens = 96, .head_dim = 16, .heads = 24, .layout = USP_LAYOUT_STRIPE, .dtype = USP_BF16},
        {.tokens = 77, .head_dim = 16, .heads = 5},
        {.attention = USP_LINEAR, .tokens = 96, .head_dim = 16, .heads = 24, .decay = 1, .final_state = 1},
        {.attention = USP_LINEAR, .tokens = 96, .head_dim = 16, .heads = 24, .state_exchange = USP_STATE_CHAIN},
        {.attention = USP_LINEAR, .tokens = 77, .head_dim = 16, .heads = 5, .recompute_state = 1}};
    (void)argument;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        usp_case c = cases[i];
        c.deterministic = 1;
        if (!c.mask) c.mask = USP_MASK_CAUSAL;
        if (shared_case(rank, c)) return 1;
    }
    return 0;
}

int usp_body_unlike_copies(usp_rank *rank, void *argument) {
    int ranks = rank->size / 2, copy = rank->rank / ranks;
    usp_case c = {.ring = ranks, .copies = 2, .tokens = 61, .mask = USP_MASK_CAUSAL, .head_dim = 16, .return_lse = 1};
    if (copy == 1) {
        c.tokens = 40;
        c.layout = USP_LAYOUT_CONTIGUOUS;
        c.heads = 2;
    }
    return usp_check_case(rank, &c, argument);
}

/* ---- parts of a layer -------------------------------------------------------------------------------------------- */

/* The shards of all ranks, to count who holds a head. */
typedef struct holders {
    usp_shard shard[64];
    int ulysses;
} holders;

static int holders_of(const holders *all, usp_operand operand, int head) {
    int count = 0;
    for (int u = 0; u < all->ulysses; u++) {
        const usp_shard *s = &all->shard[u];
        const int first[] = {s->first_head, s->first_key_head, s->first_value_head, s->first_out_head};
        const int heads[] = {s->heads, s->key_heads, s->value_heads, s->out_heads};
        count += head >= first[operand] && head < first[operand] + heads[operand];
    }
    return count;
}

/* given = the input times its number of holders, added one by one. */
static int check_sum(usp_stage *stage, const holders *all, usp_operand operand, usp_part part, const float *given,
                     int64_t count) {
    const usp_view *view = &stage->view[part];
    for (int64_t i = 0; i < count; i++) {
        float x = (float)usp_round_to(USP_F32, usp_random_at((uint64_t)stage->c.seed, part, (uint64_t)i)), sum = x;
        int many = holders_of(all, operand, (int)(i / view->dim % view->heads));
        for (int j = 1; j < many; j++) sum += x;
        if (given[i] != sum || many == 0)
            return usp_say(stage->rank, "U%d R%d: operand %d comes back as %.9g at %lld, not as %.9g from %d holders",
                           stage->c.ulysses, stage->c.ring, (int)operand, (double)given[i], (long long)i, (double)sum,
                           many);
    }
    return 0;
}

static int round_trip(usp_stage *stage) {
    usp_whole whole;
    holders *all = calloc(1, sizeof *all);
    usp_shard mine = {.struct_size = sizeof mine};
    usp_layer_get_shard(stage->layer, &mine);
    all->ulysses = stage->c.ulysses;
    int failed = usp_stage_round_trip(stage) || usp_stage_gather(stage, 1, &whole) ||
                 usp_stage_share(stage, &mine, sizeof mine, all->shard);
    if (!failed && stage->rank->rank == 0) {
        check_sum(stage, all, USP_QUERY, USP_Q, whole.dq, whole.dq_count);
        check_sum(stage, all, USP_KEY, USP_K, whole.dk, whole.dk_count);
        check_sum(stage, all, USP_VALUE, USP_V, whole.dv, whole.dv_count);
        check_sum(stage, all, USP_OUT, USP_DOUT, whole.out, whole.out_count);
        usp_count(stage->rank);
    }
    if (!failed) usp_whole_free(&whole);
    free(all);
    return failed;
}

int usp_body_round_trip(usp_rank *rank, void *argument) {
    static const usp_case cases[] = {
        {.tokens = 77, .heads = 8, .kv_heads = 2, .value_dim = 12},
        {.tokens = 77, .heads = 5, .layout = USP_LAYOUT_STRIPE, .arrangement = USP_PADDED},
        {.tokens = 7, .heads = 3, .kv_heads = 1, .layout = USP_LAYOUT_CUSTOM},
        {.tokens = 61, .heads = 4, .batch = 2, .arrangement = USP_BHSD, .layout = USP_LAYOUT_CONTIGUOUS},
        {.attention = USP_LINEAR, .tokens = 77, .heads = 2, .kv_heads = 4, .value_heads = 12}};
    (void)argument;
    for (int i = 0; i < 5; i++)
        for (int s = 0; s < USP_SPLITS; s++) {
            usp_stage stage;
            usp_case c = cases[i];
            c.ulysses = usp_splits[s].ulysses;
            c.ring = usp_splits[s].ring;
            if (c.ulysses * c.ring != rank->size) continue;
            if (open_and_fill(rank, &c, &stage) || round_trip(&stage)) return 1;
            usp_stage_close(&stage);
        }
    return 0;
}

static int in_parts(usp_stage *stage) {
    usp_whole layer, parts;
    int failed = usp_stage_forward(stage, 1) || usp_stage_backward(stage) || usp_stage_gather(stage, 1, &layer);
    if (!failed) failed = usp_stage_forward_parts(stage) || usp_stage_backward_parts(stage);
    if (failed || usp_stage_gather(stage, 1, &parts)) return 1;
    if (stage->rank->rank == 0) usp_compare_bits(stage->rank, &stage->c, "in parts", USP_SAME_ALL, &parts, &layer);
    usp_whole_free(&layer);
    usp_whole_free(&parts);
    usp_count(stage->rank);
    return 0;
}

int usp_body_parts(usp_rank *rank, void *argument) {
    static const usp_case cases[] = {
        {.tokens = 77, .mask = USP_MASK_CAUSAL, .heads = 8, .kv_heads = 2, .value_dim = 12},
        {.tokens = 61, .heads = 5, .layout = USP_LAYOUT_CONTIGUOUS},
        {.attention = USP_LINEAR, .tokens = 77, .mask = USP_MASK_CAUSAL, .heads = 4, .decay = 2},
        {.tokens = 77, .mask = USP_MASK_CAUSAL, .documents = 1, .window_left = 9, .dropout = 0.3f, .kv_heads = 2},
        {.attention = USP_LINEAR, .tokens = 77, .mask = USP_MASK_CAUSAL, .documents = 1, .decay = 1}};
    (void)argument;
    for (int i = 0; i < 5; i++)
        for (int s = 0; s < USP_SPLITS; s++) {
            usp_stage stage;
            usp_case c = cases[i];
            c.ulysses = usp_splits[s].ulysses;
            c.ring = usp_splits[s].ring;
            if (c.ulysses * c.ring != rank->size) continue;
            if (open_and_fill(rank, &c, &stage) || in_parts(&stage)) return 1;
            usp_stage_close(&stage);
        }
    return 0;
}

/* ---- linear attention -------------------------------------------------------------------------------------------- */

static int out_of_mix(usp_stage *stage, double first, double second, usp_whole *whole) {
    return usp_stage_mix_values(stage, first, second) || usp_stage_forward(stage, 0) ||
           usp_stage_gather(stage, 0, whole);
}

static void check_mix(usp_rank *rank, const usp_whole *a, const usp_whole *b, const usp_whole *mix) {
    double *truth = malloc(((size_t)mix->out_count + 1) * sizeof *truth);
    for (int64_t i = 0; i < mix->out_count; i++) truth[i] = 2 * (double)a->out[i] - 3 * (double)b->out[i];
    usp_error error = usp_error_of(mix->out, truth, mix->out_count);
    if (error.rms > 1e-5) usp_say(rank, "linear attention is not linear in v: %.3g RMS", error.rms);
    free(truth);
}

int usp_body_linearity(usp_rank *rank, void *argument) {
    usp_stage stage;
    usp_whole a, b, mix;
    usp_case c = {.attention = USP_LINEAR, .tokens = 97, .mask = USP_MASK_CAUSAL, .decay = 1, .head_dim = 16};
    (void)argument;
    usp_choose_mesh(rank, &c);
    if (open_and_fill(rank, &c, &stage) || out_of_mix(&stage, 1, 0, &a) || out_of_mix(&stage, 0, 1, &b)) return 1;
    if (out_of_mix(&stage, 2, -3, &mix)) return 1;
    if (rank->rank == 0) check_mix(rank, &a, &b, &mix);
    usp_whole_free(&a);
    usp_whole_free(&b);
    usp_whole_free(&mix);
    usp_stage_close(&stage);
    usp_count(rank);
    return 0;
}

static int compare_states(usp_rank *rank, usp_case c, const usp_whole *first) {
    static const usp_state_exchange ways[] = {USP_STATE_CHAIN, USP_STATE_GATHER, USP_STATE_AUTO};
    for (int i = 0; i < 3; i++) {
        usp_whole kept, again;
        c.state_exchange = ways[i];
        c.recompute_state = 0;
        if (usp_run_case(rank, &c, &kept)) return 1;
        c.recompute_state = 1;
        if (usp_run_case(rank, &c, &again)) return 1;
        if (rank->rank == 0) {
            usp_compare_near(rank, &c, "another exchange of states", &kept, first);
            usp_compare_near(rank, &c, "states computed again", &again, &kept);
            usp_compare_bits(rank, &c, "states computed again", USP_SAME_ALL & ~USP_SAME_DQ, &again, &kept);
        }
        usp_whole_free(&kept);
        usp_whole_free(&again);
    }
    return 0;
}

int usp_body_states(usp_rank *rank, void *argument) {
    static const usp_layout layouts[] = {USP_LAYOUT_ZIGZAG, USP_LAYOUT_CONTIGUOUS};
    (void)argument;
    for (int i = 0; i < 4; i++) {
        usp_whole first;
        usp_case c = {.attention = USP_LINEAR,
                      .tokens = 83,
                      .mask = i < 2 ? USP_MASK_CAUSAL : USP_MASK_FULL,
                      .decay = i < 2,
                      .head_dim = 16,
                      .value_dim = 12,
                      .initial_state = i < 2,
                      .final_state = 1,
                      .layout = layouts[i % 2],
                      .ring = rank->size};
        if (usp_run_case(rank, &c, &first) || compare_states(rank, c, &first)) return 1;
        usp_whole_free(&first);
        usp_count(rank);
    }
    return 0;
}

/* Row by row of tokens, one batch: a[tokens] then b[rest] is whole. */
static void check_halves(usp_rank *rank, const char *what, const float *a, int64_t a_count, const float *b,
                         int64_t b_count, const float *whole) {
    float *joined = malloc((size_t)(a_count + b_count) * sizeof *joined);
    double *truth = malloc((size_t)(a_count + b_count) * sizeof *truth);
    memcpy(joined, a, (size_t)a_count * sizeof *a);
    memcpy(joined + a_count, b, (size_t)b_count * sizeof *b);
    for (int64_t i = 0; i < a_count + b_count; i++) truth[i] = (double)whole[i];
    usp_error error = usp_error_of(joined, truth, a_count + b_count);
    if (error.rms > 2e-5) usp_say(rank, "two halves of a sequence: %s differs by %.3g RMS", what, error.rms);
    free(joined);
    free(truth);
}

static void check_continuation(usp_rank *rank, const usp_whole *a, const usp_whole *b, const usp_whole *whole) {
    check_halves(rank, "out", a->out, a->out_count, b->out, b->out_count, whole->out);
    check_halves(rank, "dq", a->dq, a->dq_count, b->dq, b->dq_count, whole->dq);
    check_halves(rank, "dk", a->dk, a->dk_count, b->dk, b->dk_count, whole->dk);
    check_halves(rank, "dv", a->dv, a->dv_count, b->dv, b->dv_count, whole->dv);
}

/* Forward through both halves, backward through both in reverse. */
static int run_halves(usp_stage *first, usp_stage *second, usp_whole *a, usp_whole *b) {
    usp_whole state;
    if (usp_stage_forward(first, 1) || usp_stage_gather(first, 0, &state)) return 1;
    if (usp_stage_set_states(second, state.final_state, NULL)) return 1;
    usp_whole_free(&state);
    if (usp_stage_forward(second, 1) || usp_stage_backward(second) || usp_stage_gather(second, 1, b)) return 1;
    if (usp_stage_set_states(first, NULL, b->dinitial_state)) return 1;
    return usp_stage_backward(first) || usp_stage_gather(first, 1, a);
}

int usp_body_continue(usp_rank *rank, void *argument) {
    usp_stage first, second;
    usp_whole a, b, whole;
    usp_case c = {
        .attention = USP_LINEAR, .tokens = 97, .mask = USP_MASK_CAUSAL, .decay = 1, .head_dim = 16, .seed = 3};
    (void)argument;
    usp_choose_mesh(rank, &c);
    if (usp_run_case(rank, &c, &whole)) return 1;
    c.tokens = 41;
    c.final_state = 1;
    if (open_and_fill(rank, &c, &first)) return 1;
    c.final_state = 0;
    c.initial_state = 1;
    c.first_token = 41;
    c.tokens = 97 - 41;
    if (open_and_fill(rank, &c, &second) || run_halves(&first, &second, &a, &b)) return 1;
    if (rank->rank == 0) check_continuation(rank, &a, &b, &whole);
    usp_whole_free(&a);
    usp_whole_free(&b);
    usp_whole_free(&whole);
    usp_stage_close(&second);
    usp_stage_close(&first);
    usp_count(rank);
    return 0;
}

/* ---- not a number ------------------------------------------------------------------------------------------------ */

static int all_nan(usp_rank *rank, const usp_case *c, const char *name, const float *numbers, int64_t count) {
    for (int64_t i = 0; i < count; i++)
        if (!isnan(numbers[i])) {
            char text[400];
            usp_case_print(c, text, sizeof text);
            return usp_say(rank, "%s: %s[%lld] is %g where keys are NaN", text, name, (long long)i, (double)numbers[i]);
        }
    return 0;
}

static int spoil_and_run(usp_rank *rank, const usp_case *c) {
    usp_stage stage;
    usp_whole whole;
    if (open_and_fill(rank, c, &stage)) return 1;
    if (stage.p == 0 && usp_stage_spoil(&stage, USP_K)) return 1;
    if (usp_stage_forward(&stage, 1) || usp_stage_backward(&stage) || usp_stage_gather(&stage, 1, &whole)) return 1;
    if (rank->rank == 0) {
        all_nan(rank, &stage.c, "out", whole.out, whole.out_count);
        all_nan(rank, &stage.c, "lse", whole.lse, whole.lse_count);
        all_nan(rank, &stage.c, "dq", whole.dq, whole.dq_count);
    }
    usp_whole_free(&whole);
    usp_stage_close(&stage);
    usp_count(rank);
    return 0;
}

/* Rank 0 meets nothing but NaN in its first step; what comes later must not make it forget. */
int usp_body_not_a_number(usp_rank *rank, void *argument) {
    static const usp_dtype dtypes[] = {USP_F32, USP_F16, USP_BF16};
    (void)argument;
    for (int i = 0; i < 6; i++) {
        usp_case c = {.tokens = 96, .layout = USP_LAYOUT_CONTIGUOUS, .head_dim = 16, .return_lse = 1};
        c.dtype = dtypes[i % 3];
        c.ulysses = i / 3 && rank->size % 2 == 0 ? 2 : 1;
        c.ring = rank->size / c.ulysses;
        if (spoil_and_run(rank, &c)) return 1;
    }
    return 0;
}

/* ---- a model of mixed layers ------------------------------------------------------------------------------------- */

enum { MODEL_LAYERS = 3 };

/* Each layer's q, k and v are the layer before's out. */
static int model_forward(usp_rank *rank, const usp_split *splits, usp_stage *stage) {
    static const usp_case layers[MODEL_LAYERS] = {
        {.tokens = 83, .mask = USP_MASK_CAUSAL, .heads = 4, .head_dim = 16},
        {.attention = USP_LINEAR,
         .tokens = 83,
         .mask = USP_MASK_CAUSAL,
         .heads = 4,
         .head_dim = 16,
         .decay = 1,
         .scale = 0.05f},
        {.tokens = 83, .mask = USP_MASK_CAUSAL, .heads = 4, .head_dim = 16, .scale = 0.1f}};
    for (int i = 0; i < MODEL_LAYERS; i++) {
        usp_case c = layers[i];
        c.ulysses = splits[i].ulysses;
        c.ring = splits[i].ring;
        if (open_and_fill(rank, &c, &stage[i])) return 1;
        if (i > 0 && usp_stage_feed(&stage[i], &stage[i - 1])) return 1;
        if (usp_stage_forward(&stage[i], 1)) return 1;
    }
    return 0;
}

/* Each layer's dout is the sum of dq, dk and dv of the layer behind. */
static int model_backward(usp_stage *stage) {
    for (int i = MODEL_LAYERS - 1; i >= 0; i--) {
        if (i + 1 < MODEL_LAYERS && usp_stage_feed_back(&stage[i], &stage[i + 1])) return 1;
        if (usp_stage_backward(&stage[i])) return 1;
    }
    return 0;
}

static int run_model(usp_rank *rank, const usp_split *splits, usp_whole *wholes) {
    usp_stage stage[MODEL_LAYERS];
    if (model_forward(rank, splits, stage) || model_backward(stage)) return 1;
    for (int i = MODEL_LAYERS - 1; i >= 0; i--) {
        if (usp_stage_gather(&stage[i], 1, &wholes[i])) return 1;
        usp_stage_close(&stage[i]);
    }
    return 0;
}

int usp_body_switch(usp_rank *rank, void *argument) {
    int n = rank->size, half = n % 2 == 0 ? 2 : 1;
    const usp_split plans[][MODEL_LAYERS] = {
        {{1, n}, {1, n}, {1, n}}, {{n, 1}, {1, n}, {half, n / half}}, {{half, n / half}, {n, 1}, {1, n}}};
    const usp_case c = usp_case_complete((usp_case){.tokens = 83});
    usp_whole constant[MODEL_LAYERS], mixed[MODEL_LAYERS];
    (void)argument;
    if (run_model(rank, plans[0], constant)) return 1;
    for (int i = 1; i < 3; i++) {
        if (run_model(rank, plans[i], mixed)) return 1;
        for (int l = 0; l < MODEL_LAYERS; l++) {
            if (rank->rank == 0)
                usp_compare_near(rank, &c, "meshes that change from layer to layer", &mixed[l], &constant[l]);
            usp_whole_free(&mixed[l]);
        }
    }
    for (int l = 0; l < MODEL_LAYERS; l++) usp_whole_free(&constant[l]);
    usp_count(rank);
    return 0;
}

/* ---- growth of errors -------------------------------------------------------------------------------------------- */

static int measure(usp_rank *rank, usp_case c, usp_references *references, double *rms) {
    usp_whole whole;
    c.ring = rank->size;
    c = usp_case_complete(c);
    if (usp_run_case(rank, &c, &whole)) return 1;
    if (rank->rank == 0) usp_rms_of(&whole, usp_reference_of(references, &c), rms);
    usp_whole_free(&whole);
    usp_count(rank);
    return 0;
}

int usp_body_growth(usp_rank *rank, void *argument) {
    const usp_case softmax = {.tokens = 512, .mask = USP_MASK_CAUSAL, .heads = 2, .head_dim = 16, .return_lse = 1};
    const usp_case linear = {.attention = USP_LINEAR,
                             .tokens = 512,
                             .mask = USP_MASK_CAUSAL,
                             .heads = 3,
                             .head_dim = 16,
                             .decay = 1,
                             .final_state = 1};
    usp_growth *growth = argument;
    return measure(rank, softmax, growth->references, growth->softmax) ||
           measure(rank, linear, growth->references, growth->linear);
}
