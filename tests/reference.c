/* reference.c - answers of the oracle for cases, and comparisons with them (see reference.h). Runs no layer. */
#include "reference.h"
#include "oracle.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* ---- answers ----------------------------------------------------------------------------------------------------- */

static double *numbers(int64_t count) {
    double *all = malloc(((size_t)count + 1) * sizeof *all);
    if (!all) abort();
    return all;
}

static double *random_numbers(const usp_case *c, usp_dtype dtype, int64_t count, uint64_t tensor) {
    double *all = numbers(count);
    usp_whole_fill(dtype, all, count, (uint64_t)c->seed, tensor);
    return all;
}

typedef struct extents {
    int64_t q, k, v, out, lse, state, heads;
} extents;

static extents extents_of(const usp_case *c) {
    int heads = usp_case_out_heads(c), value_heads = c->attention == USP_LINEAR ? c->value_heads : c->kv_heads;
    int64_t tokens = c->batch * c->tokens, keys = c->batch * usp_case_keys(c);
    return (extents){.q = tokens * c->heads * c->head_dim,
                     .k = keys * c->kv_heads * c->head_dim,
                     .v = keys * value_heads * c->value_dim,
                     .out = tokens * heads * c->value_dim,
                     .lse = tokens * c->heads,
                     .state = (int64_t)c->batch * heads * c->head_dim * c->value_dim,
                     .heads = heads};
}

static usp_answer answer_create(const extents *e) {
    return (usp_answer){numbers(e->out),   numbers(e->lse),   numbers(e->q),     numbers(e->k),    numbers(e->v),
                        numbers(e->state), numbers(e->state), numbers(e->heads), numbers(e->heads)};
}

void usp_answer_free(usp_answer *a) {
    double *all[] = {a->out, a->lse, a->dq, a->dk, a->dv, a->final_state, a->dinitial_state, a->dsinks, a->max_logit};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) free(all[i]);
}

static double default_scale(const usp_case *c) {
    if (c->scale != 0) return (double)c->scale;
    return c->attention == USP_LINEAR ? 1 : 1 / sqrt((double)c->head_dim);
}

static usp_oracle describe(const usp_case *c) {
    return (usp_oracle){.linear = c->attention == USP_LINEAR,
                        .causal = c->mask == USP_MASK_CAUSAL,
                        .batch = c->batch,
                        .heads = c->heads,
                        .key_heads = c->kv_heads,
                        .value_heads = c->attention == USP_LINEAR ? c->value_heads : c->kv_heads,
                        .dim = c->head_dim,
                        .value_dim = c->value_dim,
                        .tokens = c->tokens,
                        .keys = usp_case_keys(c),
                        .scale = default_scale(c),
                        .left = c->window_left,
                        .right = c->window_right,
                        .bottom_right = c->alignment == USP_ALIGN_BOTTOM_RIGHT,
                        .soft_cap = (double)c->soft_cap,
                        .dropout = c->dropout,
                        .dropout_state = usp_dropout_words};
}

static void ask(usp_oracle *o, const usp_answer *answer) {
    o->out = answer->out;
    o->lse = answer->lse;
    o->dq = answer->dq;
    o->dk = answer->dk;
    o->dv = answer->dv;
    o->final_state = answer->final_state;
    o->dinitial_state = answer->dinitial_state;
    o->dsinks = answer->dsinks;
    o->max_logit = answer->max_logit;
    usp_oracle_run(o);
}

/* The farther one of two answers from the truth, number by number. */
static void keep_farther(const double *truth, double *plain, const double *other, int64_t count) {
    for (int64_t i = 0; i < count; i++)
        if (fabs(other[i] - truth[i]) > fabs(plain[i] - truth[i])) plain[i] = other[i];
}

/* Two plain computations, with rounded and with exact operands: the errors of one alone are dominated by few rows,
 * where they may be small by luck. */
static void answer_plainly(const usp_case *c, usp_oracle *o, const extents *e, usp_reference *reference) {
    usp_answer other = answer_create(e), *plain = &reference->plain, *truth = &reference->truth;
    *plain = answer_create(e);
    o->round = c->dtype == USP_F16 ? usp_round_f16 : usp_round_bf16;
    ask(o, plain);
    o->exact_operands = 1;
    ask(o, &other);
    keep_farther(truth->out, plain->out, other.out, e->out);
    keep_farther(truth->dq, plain->dq, other.dq, e->q);
    keep_farther(truth->dk, plain->dk, other.dk, e->k);
    keep_farther(truth->dv, plain->dv, other.dv, e->v);
    keep_farther(truth->dsinks, plain->dsinks, other.dsinks, e->heads);
    usp_answer_free(&other);
}

/* A case's whole inputs. */
typedef struct inputs {
    double *q, *k, *v, *dout, *initial_state, *dfinal_state, *dlse;
    float decay[USP_CASE_HEADS], slopes[USP_CASE_HEADS], sinks[USP_CASE_HEADS];
    usp_case_document_list documents;
} inputs;

static inputs inputs_create(const usp_case *c, const extents *e) {
    inputs i = {.q = random_numbers(c, c->dtype, e->q, USP_Q),
                .k = random_numbers(c, c->dtype, e->k, USP_K),
                .v = random_numbers(c, c->dtype, e->v, USP_V),
                .dout = random_numbers(c, c->dtype, e->out, USP_DOUT),
                .initial_state = random_numbers(c, USP_F32, e->state, USP_INITIAL_STATE),
                .dfinal_state = random_numbers(c, USP_F32, e->state, USP_DFINAL_STATE),
                .dlse = random_numbers(c, USP_F32, e->lse, USP_DLSE)};
    usp_case_decay(c, i.decay);
    usp_case_slopes(c, i.slopes);
    usp_case_documents(c, &i.documents);
    for (int h = 0; h < c->heads; h++) i.sinks[h] = (float)usp_random_at((uint64_t)c->seed, USP_SINKS, (uint64_t)h);
    return i;
}

static void inputs_free(inputs *i) {
    double *all[] = {i->q, i->k, i->v, i->dout, i->initial_state, i->dfinal_state, i->dlse};
    for (size_t n = 0; n < sizeof all / sizeof all[0]; n++) free(all[n]);
}

static usp_oracle oracle_of(const usp_case *c, const inputs *i) {
    usp_oracle o = describe(c);
    o.decay = c->decay ? i->decay : NULL;
    o.q = i->q;
    o.k = i->k;
    o.v = i->v;
    o.dout = i->dout;
    o.initial_state = c->initial_state ? i->initial_state : NULL;
    o.dfinal_state = c->final_state ? i->dfinal_state : NULL;
    o.documents = i->documents.count;
    o.ends = i->documents.ends;
    o.key_ends = c->key_tokens ? i->documents.key_ends : NULL;
    o.prefixes = c->prefixes ? i->documents.prefixes : NULL;
    o.parents = c->parents ? i->documents.parents : NULL;
    o.slopes = c->slopes ? i->slopes : NULL;
    o.sinks = c->sinks ? i->sinks : NULL;
    o.dlse = c->dlse ? i->dlse : NULL;
    return o;
}

static void answer_case(const usp_case *c, usp_reference *reference) {
    extents e = extents_of(c);
    inputs i = inputs_create(c, &e);
    usp_oracle o = oracle_of(c, &i);
    reference->truth = answer_create(&e);
    ask(&o, &reference->truth);
    if (c->dtype != USP_F32) answer_plainly(c, &o, &e, reference);
    inputs_free(&i);
}

int64_t usp_reference_elements(const usp_case *c, int input) {
    extents e = extents_of(c);
    return input == USP_Q ? e.q : input == USP_K ? e.k : input == USP_V ? e.v : input == USP_DOUT ? e.out : e.state;
}

usp_answer usp_answer_spotted(const usp_case *c, const usp_spot *spot) {
    extents e = extents_of(c);
    inputs i = inputs_create(c, &e);
    usp_oracle o = oracle_of(c, &i);
    usp_answer answer = answer_create(&e);
    double *const parts[] = {[USP_Q] = i.q, [USP_K] = i.k, [USP_V] = i.v, [USP_DOUT] = i.dout};
    double *whole = spot->input < USP_PARTS            ? parts[spot->input]
                    : spot->input == USP_INITIAL_STATE ? i.initial_state
                                                       : i.dfinal_state;
    whole[spot->index] = spot->value;
    ask(&o, &answer);
    inputs_free(&i);
    return answer;
}

/* Two cases with equal keys have equal results. */
static usp_case key_of(const usp_case *c) {
    usp_case key = usp_case_complete(*c);
    key.ulysses = key.ring = key.copies = 1;
    key.layout = USP_LAYOUT_ZIGZAG;
    key.arrangement = USP_BSHD;
    key.deterministic = key.recompute_state = key.return_lse = 0;
    key.state_exchange = USP_STATE_AUTO;
    key.route = USP_ROUTE_AUTO;
    key.max_documents = 0;
    return key;
}

static int same_key(const usp_case *a, const usp_case *b) {
    char x[512], y[512];
    usp_case_print(a, x, sizeof x);
    usp_case_print(b, y, sizeof y);
    return strcmp(x, y) == 0 && a->scale == b->scale && a->key_tokens == b->key_tokens;
}

const usp_reference *usp_reference_of(usp_references *references, const usp_case *c) {
    usp_case key = key_of(c);
    for (usp_reference *r = references->first; r; r = r->next)
        if (same_key(&r->key, &key)) return r;
    usp_reference *fresh = calloc(1, sizeof *fresh);
    if (!fresh) abort();
    *fresh = (usp_reference){.next = references->first, .key = key};
    answer_case(&key, fresh);
    references->first = fresh;
    return fresh;
}

void usp_references_free(usp_references *references) {
    while (references->first) {
        usp_reference *r = references->first;
        references->first = r->next;
        usp_answer_free(&r->truth);
        usp_answer_free(&r->plain);
        free(r);
    }
}

/* ---- comparisons ------------------------------------------------------------------------------------------------- */

typedef struct item {
    const char *name;
    usp_dtype dtype;
    int part;
    int64_t count;
    const float *given;
    const double *truth, *plain;
} item;

static void list_items(usp_dtype dtype, const usp_whole *w, const usp_answer *truth, const usp_answer *plain,
                       item *items) {
    const item all[USP_ITEMS] = {
        {"out", dtype, USP_SAME_OUT, w->out_count, w->out, truth->out, plain->out},
        {"lse", USP_F32, USP_SAME_LSE, w->lse_count, w->lse, truth->lse, plain->lse},
        {"dq", dtype, USP_SAME_DQ, w->dq_count, w->dq, truth->dq, plain->dq},
        {"dk", dtype, USP_SAME_DKV, w->dk_count, w->dk, truth->dk, plain->dk},
        {"dv", dtype, USP_SAME_DKV, w->dv_count, w->dv, truth->dv, plain->dv},
        {"final_state", dtype, USP_SAME_STATES, w->state_count, w->final_state, truth->final_state, plain->final_state},
        {"dinitial_state", dtype, USP_SAME_STATES, w->state_count, w->dinitial_state, truth->dinitial_state,
         plain->dinitial_state},
        {"dsinks", dtype, USP_SAME_HEADS, w->head_count, w->dsinks, truth->dsinks, plain->dsinks},
        {"max_logit", USP_F32, USP_SAME_HEADS, w->head_count, w->max_logit, truth->max_logit, plain->max_logit}};
    memcpy(items, all, sizeof all);
}

static void print_case(const usp_case *c, char *text, size_t capacity) {
    usp_case complete = usp_case_complete(*c);
    usp_case_print(&complete, text, capacity);
}

/* On GPUs a tensor far below N(0,1) is measured as if it were a tenth of that; on the CPU nothing is forgiven. */
static double floor_of(const usp_rank *rank) {
    return rank->device == USP_DEVICE_CUDA ? 0.1 : 0;
}

int usp_compare_with_reference(usp_rank *rank, const usp_case *c, const usp_whole *whole,
                               const usp_reference *reference) {
    char name[512], why[256];
    item items[USP_ITEMS];
    int failures = 0;
    list_items(c->dtype, whole, &reference->truth, &reference->plain, items);
    for (int i = 0; i < USP_ITEMS; i++) {
        const item *t = &items[i];
        if (!t->given || !usp_within_budget_over(t->name, t->dtype, t->given, t->truth, t->plain, t->count,
                                                 floor_of(rank), why, sizeof why))
            continue;
        print_case(c, name, sizeof name);
        failures += usp_say(rank, "%s: %s", name, why);
    }
    return failures;
}

void usp_rms_of(const usp_whole *whole, const usp_reference *reference, double *rms) {
    item items[USP_ITEMS];
    list_items(USP_F32, whole, &reference->truth, &reference->plain, items);
    for (int i = 0; i < USP_ITEMS; i++)
        rms[i] = items[i].given ? usp_error_of(items[i].given, items[i].truth, items[i].count).rms : 0;
}

static const float *tensor_of(const usp_whole *w, int i) {
    const float *const all[USP_ITEMS] = {w->out,    w->lse,      w->dq, w->dk, w->dv, w->final_state, w->dinitial_state,
                                         w->dsinks, w->max_logit};
    return all[i];
}

int usp_compare_near(usp_rank *rank, const usp_case *c, const char *what, const usp_whole *a, const usp_whole *b) {
    static const usp_answer none = {0};
    char name[512];
    item items[USP_ITEMS];
    int failures = 0;
    list_items(USP_F32, a, &none, &none, items);
    for (int i = 0; i < USP_ITEMS; i++) {
        if (!items[i].given) continue;
        double *truth = numbers(items[i].count);
        for (int64_t j = 0; j < items[i].count; j++) truth[j] = (double)tensor_of(b, i)[j];
        usp_error error = usp_error_over(items[i].given, truth, items[i].count, floor_of(rank));
        free(truth);
        if (error.rms <= 2e-5) continue;
        print_case(c, name, sizeof name);
        failures += usp_say(rank, "%s: %s: %s differs by %.3g RMS", name, what, items[i].name, error.rms);
    }
    return failures;
}

int usp_compare_bits(usp_rank *rank, const usp_case *c, const char *what, int parts, const usp_whole *a,
                     const usp_whole *b) {
    static const usp_answer none = {0};
    char name[512];
    item items[USP_ITEMS];
    int failures = 0;
    list_items(USP_F32, a, &none, &none, items);
    for (int i = 0; i < USP_ITEMS; i++) {
        if (!items[i].given || !(items[i].part & parts)) continue;
        if (memcmp(items[i].given, tensor_of(b, i), (size_t)items[i].count * sizeof(float)) == 0) continue;
        print_case(c, name, sizeof name);
        failures += usp_say(rank, "%s: %s: %s is not the same bit for bit", name, what, items[i].name);
    }
    return failures;
}
