/* spread.c - how far one NaN or infinity in an input may reach (see spread.h). The oracle is asked with a NaN there, so
 * that its answer is NaN in just what depends on the element; it is asked nothing else. */
#include "spread.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { SPOTS = 3 }; /* of each input: its first and last element, and one between */

/* Blocks of several sizes, so that NaNs lie in tiles of every kind; fewer than all tokens to a rank. */
static const usp_case cases[] = {
    {.tokens = 150, .mask = USP_MASK_CAUSAL, .heads = 4, .kv_heads = 2, .return_lse = 1},
    {.tokens = 150, .mask = USP_MASK_CAUSAL, .layout = USP_LAYOUT_CONTIGUOUS, .batch = 2, .dtype = USP_BF16},
    {.tokens = 150, .mask = USP_MASK_CAUSAL, .layout = USP_LAYOUT_STRIPE, .dtype = USP_F16, .return_lse = 1},
    {.tokens = 150, .mask = USP_MASK_CAUSAL, .layout = USP_LAYOUT_ZIGZAG_PER_DOCUMENT, .return_lse = 1},
    {.tokens = 97, .mask = USP_MASK_CAUSAL, .layout = USP_LAYOUT_CUSTOM, .heads = 3, .kv_heads = 1},
    {.tokens = 61, .mask = USP_MASK_CAUSAL, .head_dim = 150, .value_dim = 5, .return_lse = 1},
    {.tokens = 61, .batch = 2, .return_lse = 1},
    {.tokens = 61, .key_tokens = 83, .return_lse = 1},
    {.tokens = 61, .mask = USP_MASK_CAUSAL, .documents = 1, .window_left = 9, .sinks = 1, .return_lse = 1},
    {.tokens = 61, .window_left = 3, .window_right = 5, .layout = USP_LAYOUT_STRIPE, .soft_cap = 2, .dtype = USP_BF16},
    {.tokens = 61, .mask = USP_MASK_CAUSAL, .documents = 1, .prefixes = 1, .layout = USP_LAYOUT_CONTIGUOUS},
    {.tokens = 61, .mask = USP_MASK_CAUSAL, .documents = 4, .parents = 1, .return_lse = 1, .dtype = USP_F16},
    {.tokens = 61, .key_tokens = 83, .mask = USP_MASK_CAUSAL, .documents = 1, .alignment = USP_ALIGN_BOTTOM_RIGHT},
    {.tokens = 61, .documents = 5, .layout = USP_LAYOUT_CUSTOM, .slopes = 1, .return_lse = 1},
    {.attention = USP_LINEAR,
     .tokens = 150,
     .mask = USP_MASK_CAUSAL,
     .heads = 2,
     .kv_heads = 4,
     .value_heads = 1,
     .decay = 1,
     .initial_state = 1,
     .final_state = 1},
    {.attention = USP_LINEAR,
     .tokens = 150,
     .mask = USP_MASK_CAUSAL,
     .layout = USP_LAYOUT_CONTIGUOUS,
     .dtype = USP_BF16,
     .batch = 2,
     .recompute_state = 1,
     .initial_state = 1,
     .state_exchange = USP_STATE_CHAIN},
    {.attention = USP_LINEAR,
     .tokens = 150,
     .mask = USP_MASK_CAUSAL,
     .layout = USP_LAYOUT_ZIGZAG_PER_DOCUMENT,
     .final_state = 1},
    {.attention = USP_LINEAR, .tokens = 61, .mask = USP_MASK_CAUSAL, .head_dim = 150, .value_dim = 20},
    {.attention = USP_LINEAR,
     .tokens = 61,
     .mask = USP_MASK_CAUSAL,
     .documents = 1,
     .decay = 1,
     .initial_state = 1,
     .final_state = 1},
    {.attention = USP_LINEAR, .tokens = 61, .final_state = 1}};

typedef struct result {
    const char *name;
    int64_t count;
    const float *given, *clean; /* with the spot, and without */
    const double *truth;        /* NaN in what depends on it */
} result;

/* A NaN must be seen in all that depends on it; of an infinity a weight of 0 may be all that is left. */
static int is_wrong(const result *r, int64_t i, double value) {
    if (isnan(r->truth[i])) return isnan(value) && isfinite(r->given[i]);
    return memcmp(&r->given[i], &r->clean[i], sizeof(float)) != 0;
}

static void judge(usp_rank *rank, const usp_case *c, const usp_spot *spot, const result *r) {
    char name[512];
    int64_t wrong = 0, first = 0;
    for (int64_t i = 0; r->given && i < r->count; i++)
        if (is_wrong(r, i, spot->value) && wrong++ == 0) first = i;
    if (!wrong) return;
    usp_case_print(c, name, sizeof name);
    usp_say(rank, "%s: %g in element %lld of input %d: %lld elements of %s are wrong, first %lld: %g, %g without, %s",
            name, spot->value, (long long)spot->index, spot->input, (long long)wrong, r->name, (long long)first,
            (double)r->given[first], (double)r->clean[first],
            isnan(r->truth[first]) ? "and it depends" : "which does not depend");
}

static void judge_all(usp_rank *rank, const usp_case *c, const usp_spot *spot, const usp_whole *given,
                      const usp_whole *clean) {
    usp_spot nan = {spot->input, spot->index, NAN};
    usp_answer truth = usp_answer_spotted(c, &nan);
    const result all[USP_ITEMS] = {
        {"out", given->out_count, given->out, clean->out, truth.out},
        {"lse", given->lse_count, given->lse, clean->lse, truth.lse},
        {"dq", given->dq_count, given->dq, clean->dq, truth.dq},
        {"dk", given->dk_count, given->dk, clean->dk, truth.dk},
        {"dv", given->dv_count, given->dv, clean->dv, truth.dv},
        {"final_state", given->state_count, given->final_state, clean->final_state, truth.final_state},
        {"dinitial_state", given->state_count, given->dinitial_state, clean->dinitial_state, truth.dinitial_state},
        {"dsinks", given->head_count, given->dsinks, clean->dsinks, truth.dsinks}};
    for (int i = 0; i < USP_ITEMS; i++) judge(rank, c, spot, &all[i]);
    usp_answer_free(&truth);
    usp_count(rank);
}

static int check_spot(usp_rank *rank, const usp_case *c, const usp_spot *spot, const usp_whole *clean) {
    usp_whole whole;
    if (usp_stage_run_spotted(rank, c, spot, &whole)) return 1;
    if (rank->rank == 0) judge_all(rank, c, spot, &whole, clean);
    usp_whole_free(&whole);
    return 0;
}

static int check_input(usp_rank *rank, const usp_case *c, int input, const usp_whole *clean) {
    uint64_t random = (uint64_t)(input + 1) * 77777 + (uint64_t)c->tokens;
    int64_t count = usp_reference_elements(c, input);
    for (int i = 0; i < SPOTS; i++) {
        int64_t index = i == 0 ? 0 : i == 1 ? count - 1 : (int64_t)(usp_random_next(&random) % (uint64_t)count);
        const usp_spot nan = {input, index, NAN}, infinity = {input, index, i % 2 ? -INFINITY : INFINITY};
        if (check_spot(rank, c, &nan, clean) || check_spot(rank, c, &infinity, clean)) return 1;
    }
    return 0;
}

static int check_case(usp_rank *rank, const usp_case *c) {
    static const int inputs[] = {USP_Q, USP_K, USP_V, USP_DOUT, USP_INITIAL_STATE, USP_DFINAL_STATE};
    usp_whole clean;
    if (usp_stage_run(rank, c, &clean)) return usp_say(rank, "a case without a NaN did not run: %s", usp_last_error());
    int failed = 0;
    for (int i = 0; i < 6 && !failed; i++) {
        if (inputs[i] == USP_INITIAL_STATE && !c->initial_state) continue;
        if (inputs[i] == USP_DFINAL_STATE && !c->final_state) continue;
        failed = check_input(rank, c, inputs[i], &clean);
    }
    usp_whole_free(&clean);
    return failed;
}

int usp_body_spread(usp_rank *rank, void *argument) {
    (void)argument;
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++)
        for (int s = 0; s < USP_SPLITS; s++) {
            if (usp_splits[s].ulysses * usp_splits[s].ring != rank->size) continue;
            usp_case c = cases[i];
            c.ulysses = usp_splits[s].ulysses;
            c.ring = usp_splits[s].ring;
            c.seed = (int)i;
            c = usp_case_complete(c);
            if (check_case(rank, &c)) return 1;
        }
    return 0;
}
