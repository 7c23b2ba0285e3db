/* costs.c - bytes stated and bytes seen, and in which order (see costs.h). Looks at no result. */
#include "costs.h"
#include "trace.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* The traffic of one rank by axis; `stray` went to a rank that shares neither axis. */
typedef struct by_axis {
    int64_t ulysses_send, ulysses_recv, ring_send, ring_recv, stray;
} by_axis;

static by_axis sort_traffic(const usp_stage *stage, const usp_traffic *traffic) {
    int n = stage->c.ulysses * stage->c.ring, base = stage->rank->rank / n * n;
    by_axis sum = {0};
    for (int rank = 0; rank < stage->rank->size; rank++) {
        int p = rank - base, inside = p >= 0 && p < n;
        int same_ring = inside && p / stage->c.ulysses == stage->p / stage->c.ulysses;
        int same_ulysses = inside && p % stage->c.ulysses == stage->p % stage->c.ulysses;
        if (same_ring) {
            sum.ulysses_send += traffic->sent[rank];
            sum.ulysses_recv += traffic->received[rank];
        } else if (same_ulysses) {
            sum.ring_send += traffic->sent[rank];
            sum.ring_recv += traffic->received[rank];
        } else {
            sum.stray += traffic->sent[rank] + traffic->received[rank];
        }
    }
    sum.stray += traffic->sent[stage->rank->rank];
    return sum;
}

static int check_bytes(usp_stage *stage, usp_pass pass, const usp_traffic *traffic) {
    char name[512];
    usp_cost cost = {.struct_size = sizeof cost};
    by_axis seen = sort_traffic(stage, traffic);
    if (usp_layer_get_cost(stage->layer, pass, &cost) != USP_OK) return usp_say(stage->rank, "%s", usp_last_error());
    usp_case_print(&stage->c, name, sizeof name);
    if (traffic->unprepared)
        return usp_say(stage->rank, "%s: %d exchanges move more than announced", name, traffic->unprepared);
    if (seen.ulysses_send == cost.ulysses_send && seen.ulysses_recv == cost.ulysses_recv &&
        seen.ring_send == cost.ring_send && seen.ring_recv == cost.ring_recv && seen.stray == 0)
        return 0;
    return usp_say(stage->rank, "%s: %s: seen ulysses %lld/%lld ring %lld/%lld stray %lld, stated %lld/%lld %lld/%lld",
                   name, pass == USP_PASS_FORWARD ? "forward" : "backward", (long long)seen.ulysses_send,
                   (long long)seen.ulysses_recv, (long long)seen.ring_send, (long long)seen.ring_recv,
                   (long long)seen.stray, (long long)cost.ulysses_send, (long long)cost.ulysses_recv,
                   (long long)cost.ring_send, (long long)cost.ring_recv);
}

/* Runs both passes and takes what they moved. */
static int run_traced(usp_stage *stage, usp_trace *trace, usp_traffic *forward, usp_traffic *backward) {
    if (usp_stage_fill(stage)) return 1;
    usp_trace_take(trace);
    if (usp_stage_forward(stage, 1)) return 1;
    *forward = usp_trace_take(trace);
    if (usp_stage_backward(stage)) return 1;
    *backward = usp_trace_take(trace);
    if (usp_world_synchronize(stage->rank->world, stage->rank->stream) != USP_OK)
        return usp_say(stage->rank, "%s", usp_last_error());
    return 0;
}

static int check_case(usp_rank *rank, const usp_case *c, usp_trace *trace) {
    usp_stage stage;
    usp_traffic forward, backward;
    if (usp_stage_open(rank, c, &stage) != USP_OK) return 0; /* refusals are judged elsewhere */
    if (run_traced(&stage, trace, &forward, &backward)) return 1;
    check_bytes(&stage, USP_PASS_FORWARD, &forward);
    check_bytes(&stage, USP_PASS_BACKWARD, &backward);
    usp_stage_close(&stage);
    usp_count(rank);
    return 0;
}

int usp_body_costs(usp_rank *rank, void *argument) {
    const usp_table *table = argument;
    usp_trace *trace = usp_trace_insert(rank->world);
    for (int i = 0; i < table->count; i++)
        for (int s = 0; s < USP_SPLITS; s++) {
            usp_case c = table->cases[i];
            int n = usp_splits[s].ulysses * usp_splits[s].ring;
            if (rank->size % n != 0 || (n == 1 && rank->size > 1)) continue;
            if (c.attention == 0) c.attention = table->attention;
            c.ulysses = usp_splits[s].ulysses;
            c.ring = usp_splits[s].ring;
            c.copies = rank->size / n;
            if (check_case(rank, &c, trace)) return 1;
        }
    return 0;
}

int usp_body_states_alone(usp_rank *rank, void *argument) {
    const usp_case c = usp_case_states_alone(rank->size);
    (void)argument;
    return check_case(rank, &c, usp_trace_insert(rank->world));
}

/* ---- linear attention -------------------------------------------------------------------------------------------- */

static int ring_bytes(usp_rank *rank, usp_case c, int64_t tokens, usp_trace *trace, int64_t *bytes) {
    usp_stage stage;
    usp_traffic forward, backward;
    c.tokens = tokens;
    if (usp_stage_open(rank, &c, &stage) != USP_OK) return usp_say(rank, "%s", usp_last_error());
    if (run_traced(&stage, trace, &forward, &backward)) return 1;
    bytes[0] = sort_traffic(&stage, &forward).ring_send;
    bytes[1] = sort_traffic(&stage, &backward).ring_send;
    usp_stage_close(&stage);
    return 0;
}

int usp_body_constant_traffic(usp_rank *rank, void *argument) {
    static const usp_layout layouts[] = {USP_LAYOUT_ZIGZAG, USP_LAYOUT_CONTIGUOUS};
    usp_trace *trace = usp_trace_insert(rank->world);
    (void)argument;
    for (int i = 0; i < 6; i++) {
        int64_t once[2], twice[2];
        usp_case c = {.attention = USP_LINEAR,
                      .mask = USP_MASK_CAUSAL,
                      .decay = 1,
                      .layout = layouts[i % 2],
                      .ring = rank->size,
                      .state_exchange = (usp_state_exchange)(i / 2)};
        if (ring_bytes(rank, c, 64, trace, once) || ring_bytes(rank, c, 128, trace, twice)) return 1;
        if (once[0] != twice[0] || once[1] != twice[1])
            usp_say(rank, "the ring moves %lld + %lld bytes for 64 tokens, %lld + %lld for 128", (long long)once[0],
                    (long long)once[1], (long long)twice[0], (long long)twice[1]);
        if (rank->size > 1 && c.state_exchange == USP_STATE_GATHER && once[0] == 0)
            usp_say(rank, "the ring moves nothing");
        usp_count(rank);
    }
    return 0;
}

/* ---- formulas ---------------------------------------------------------------------------------------------------- */

static int expect_cost(usp_rank *rank, const usp_case *c, int64_t ulysses, int64_t ring, double flops) {
    char name[512];
    usp_stage stage;
    usp_cost cost = {.struct_size = sizeof cost};
    if (usp_stage_open(rank, c, &stage) != USP_OK) return usp_say(rank, "%s", usp_last_error());
    usp_case_print(&stage.c, name, sizeof name);
    usp_layer_get_cost(stage.layer, USP_PASS_FORWARD, &cost);
    if (cost.ulysses_send != ulysses || cost.ulysses_recv != ulysses || cost.ring_send != ring ||
        cost.ring_recv != ring)
        usp_say(rank, "%s: %lld and %lld bytes stated, not %lld and %lld", name, (long long)cost.ulysses_send,
                (long long)cost.ring_send, (long long)ulysses, (long long)ring);
    if (flops > 0 && (cost.flops_mean < 0.999999 * flops || cost.flops_mean > 1.000001 * flops))
        usp_say(rank, "%s: %g flops a rank stated, not %g", name, cost.flops_mean, flops);
    if (cost.flops > 1.000001 * cost.flops_max || cost.flops_mean > 1.000001 * cost.flops_max)
        usp_say(rank, "%s: the busiest rank has less than another", name);
    usp_stage_close(&stage);
    usp_count(rank);
    return 0;
}

/* q and out: all heads but the own; k and v likewise. The ring passes one block of keys and values R - 1 times. */
int usp_body_formulas(usp_rank *rank, void *argument) {
    enum { TOKENS = 96, HEADS = 8, DIM = 16 };
    (void)argument;
    for (int s = 0; s < USP_SPLITS; s++) {
        int u = usp_splits[s].ulysses, r = usp_splits[s].ring;
        if (u * r != rank->size || HEADS % u != 0 || TOKENS % (2 * u * r) != 0) continue;
        usp_case c = {.ulysses = u,
                      .ring = r,
                      .tokens = TOKENS,
                      .heads = HEADS,
                      .head_dim = DIM,
                      .mask = USP_MASK_CAUSAL,
                      .route = USP_ROUTE_RELAY};
        int64_t operand = TOKENS / (u * r) * (HEADS * DIM) * 4, block = TOKENS / r * (HEADS / u * DIM) * 4;
        double pairs = TOKENS * (TOKENS + 1) / 2.0;
        if (expect_cost(rank, &c, 4 * operand * (u - 1) / u, 2 * block * (r - 1), 4 * pairs * HEADS * DIM / rank->size))
            return 1;
        int64_t state = HEADS / u * DIM * DIM * 4;
        c.attention = USP_LINEAR;
        c.route = USP_ROUTE_AUTO;
        c.layout = USP_LAYOUT_CONTIGUOUS;
        c.state_exchange = USP_STATE_GATHER;
        if (expect_cost(rank, &c, 4 * operand * (u - 1) / u, state * (r - 1), 0)) return 1;
    }
    return 0;
}

/* ---- how states travel ------------------------------------------------------------------------------------------- */

/* States that ring rank r of R sends and receives while a state goes through all chunks, forwards or in reverse. */
typedef struct travel {
    int64_t send, recv;
} travel;

/* Zigzag: two chunks a rank, but for the last, whose two are one piece. */
static int64_t own_chunks(const usp_case *c, int r) {
    return c->layout == USP_LAYOUT_ZIGZAG && r < c->ring - 1 ? 2 : 1;
}

static travel gathered(const usp_case *c, int r) {
    int64_t own = own_chunks(c, r), all = c->layout == USP_LAYOUT_ZIGZAG ? 2 * c->ring - 1 : c->ring;
    return (travel){own * (c->ring - 1), all - own};
}

/* Contiguous: R - 1 hops, one way. Zigzag: R - 1 hops one way and R - 1 back, the turn being inside the last rank. */
static travel chained(const usp_stage *stage, int r, int reverse) {
    int up = r > 0, down = r < stage->c.ring - 1;
    if (stage->c.layout == USP_LAYOUT_ZIGZAG) return (travel){up + down, up + down};
    return reverse ? (travel){up, down} : (travel){down, up};
}

/* The state after the last chunk goes from its rank to all others where all want it. */
static travel spread(const usp_stage *stage, int r, int reverse) {
    int last = !reverse && stage->c.layout == USP_LAYOUT_CONTIGUOUS ? stage->c.ring - 1 : 0;
    int wanted = stage->c.mask == USP_MASK_FULL || (reverse ? stage->c.initial_state : stage->c.final_state);
    if (!wanted) return (travel){0, 0};
    return r == last ? (travel){stage->c.ring - 1, 0} : (travel){0, 1};
}

static travel flow(const usp_stage *stage, int reverse) {
    int r = stage->p / stage->c.ulysses;
    if (stage->c.state_exchange == USP_STATE_GATHER) return gathered(&stage->c, r);
    travel hops = chained(stage, r, reverse), end = spread(stage, r, reverse);
    return (travel){hops.send + end.send, hops.recv + end.recv};
}

static int64_t state_bytes(const usp_case *c) {
    return (int64_t)c->batch * (c->heads / c->ulysses) * c->head_dim * c->value_dim * 4;
}

static void expect_travel(usp_stage *stage, const char *pass, const usp_traffic *traffic, travel expected) {
    char name[512];
    by_axis seen = sort_traffic(stage, traffic);
    int64_t one = state_bytes(&stage->c);
    if (seen.ring_send == expected.send * one && seen.ring_recv == expected.recv * one) return;
    usp_case_print(&stage->c, name, sizeof name);
    usp_say(stage->rank, "%s: %s: %lld and %lld bytes on the ring, not %lld and %lld states of %lld", name, pass,
            (long long)seen.ring_send, (long long)seen.ring_recv, (long long)expected.send, (long long)expected.recv,
            (long long)one);
}

static int check_travel(usp_rank *rank, const usp_case *c, usp_trace *trace, size_t *saved) {
    usp_stage stage;
    usp_traffic forward, backward;
    if (usp_stage_open(rank, c, &stage) != USP_OK) return usp_say(rank, "%s", usp_last_error());
    if (run_traced(&stage, trace, &forward, &backward)) return 1;
    travel there = flow(&stage, 0), back = flow(&stage, 1);
    if (c->recompute_state) back = (travel){back.send + there.send, back.recv + there.recv};
    expect_travel(&stage, "forward", &forward, there);
    expect_travel(&stage, "backward", &backward, back);
    check_bytes(&stage, USP_PASS_FORWARD, &forward);
    check_bytes(&stage, USP_PASS_BACKWARD, &backward);
    *saved = stage.sizes.saved;
    usp_stage_close(&stage);
    usp_count(rank);
    return 0;
}

/* What is kept for backward is the state before each own chunk (room for the most that a rank has), or no state. */
static int check_kept(usp_rank *rank, usp_case c, usp_trace *trace) {
    size_t kept, again, alignment = 256;
    usp_case complete = usp_case_complete(c);
    size_t states = (size_t)(state_bytes(&complete) * own_chunks(&c, 0));
    if (check_travel(rank, &c, trace, &kept)) return 1;
    c.recompute_state = 1;
    if (check_travel(rank, &c, trace, &again)) return 1;
    states = (states + alignment - 1) / alignment * alignment;
    if (kept != again + states || (c.ulysses == 1 && again != 0))
        return usp_say(rank, "%zu bytes saved, and %zu without states of %zu bytes", kept, again, states);
    return 0;
}

int usp_body_travel(usp_rank *rank, void *argument) {
    enum { TOKENS = 96, WAYS = 24 };
    usp_trace *trace = usp_trace_insert(rank->world);
    (void)argument;
    for (int i = 0; i < WAYS; i++) {
        size_t saved;
        usp_case c = {.attention = USP_LINEAR,
                      .mask = i / 4 % 3 == 2 ? USP_MASK_FULL : USP_MASK_CAUSAL,
                      .layout = i % 2 ? USP_LAYOUT_ZIGZAG : USP_LAYOUT_CONTIGUOUS,
                      .state_exchange = i / 2 % 2 ? USP_STATE_CHAIN : USP_STATE_GATHER,
                      .batch = 2,
                      .value_dim = 12,
                      .tokens = TOKENS,
                      .ulysses = i >= WAYS / 2 && rank->size % 2 == 0 ? 2 : 1};
        c.ring = rank->size / c.ulysses;
        if (check_kept(rank, c, trace)) return 1;
        c.final_state = 1;
        c.initial_state = i / 4 % 3 == 1;
        if (check_travel(rank, &c, trace, &saved)) return 1;
    }
    return 0;
}

/* ---- floating-point operations ----------------------------------------------------------------------------------- */

/* Pairs of a query of ring rank r, contiguous, and a key that it may see. */
static double allowed_pairs(const usp_case *c, int r) {
    double rows = (double)c->tokens / c->ring, first = rows * r;
    return c->mask == USP_MASK_CAUSAL ? rows * first + rows * (rows + 1) / 2 : rows * (double)c->tokens;
}

static double rank_flops(const usp_case *c, usp_pass pass, int r) {
    int forward = pass == USP_PASS_FORWARD, d = c->head_dim, e = c->value_dim;
    double heads = (double)c->batch * c->heads / c->ulysses;
    if (c->attention == USP_LINEAR) return heads * (double)c->tokens / c->ring * (forward ? 4 : 10) * d * e;
    return heads * allowed_pairs(c, r) * (forward ? 2 * (d + e) : 2 * (3 * d + 2 * e));
}

static int is_near(double a, double b) {
    return a > 0.999999 * b && a < 1.000001 * b;
}

static void expect_flops(usp_stage *stage, usp_pass pass) {
    char name[512];
    double most = 0, sum = 0, own = rank_flops(&stage->c, pass, stage->p / stage->c.ulysses);
    usp_cost cost = {.struct_size = sizeof cost};
    for (int r = 0; r < stage->c.ring; r++) {
        double flops = rank_flops(&stage->c, pass, r);
        sum += flops / stage->c.ring;
        if (flops > most) most = flops;
    }
    usp_layer_get_cost(stage->layer, pass, &cost);
    if (is_near(cost.flops, own) && is_near(cost.flops_max, most) && is_near(cost.flops_mean, sum)) return;
    usp_case_print(&stage->c, name, sizeof name);
    usp_say(stage->rank, "%s: pass %d: %.9g flops, most %.9g, mean %.9g; not %.9g, %.9g, %.9g", name, (int)pass,
            cost.flops, cost.flops_max, cost.flops_mean, own, most, sum);
}

int usp_body_flops(usp_rank *rank, void *argument) {
    enum { TOKENS = 96, HEADS = 8 };
    (void)argument;
    for (int i = 0; i < 4 * USP_SPLITS; i++) {
        usp_stage stage;
        usp_split split = usp_splits[i / 4];
        usp_case c = {.attention = i % 2 ? USP_LINEAR : USP_SOFTMAX,
                      .mask = i % 4 < 2 ? USP_MASK_CAUSAL : USP_MASK_FULL,
                      .layout = USP_LAYOUT_CONTIGUOUS,
                      .batch = 2,
                      .heads = HEADS,
                      .kv_heads = 2,
                      .head_dim = 16,
                      .value_dim = 12,
                      .tokens = TOKENS,
                      .ulysses = split.ulysses,
                      .ring = split.ring};
        if (split.ulysses * split.ring != rank->size || HEADS % split.ulysses != 0) continue;
        if (usp_stage_open(rank, &c, &stage) != USP_OK) return usp_say(rank, "%s", usp_last_error());
        expect_flops(&stage, USP_PASS_FORWARD);
        expect_flops(&stage, USP_PASS_BACKWARD);
        usp_stage_close(&stage);
        usp_count(rank);
    }
    return 0;
}

/* ---- what is enqueued, in which order ---------------------------------------------------------------------------- */

/* Of all that a pass did, what `letters` names must be `expected`; exchanges in a row count as one if `runs`. */
static void expect_order(usp_stage *stage, const char *pass, const usp_traffic *traffic, const char *letters, int runs,
                         const char *expected) {
    char name[512], seen[USP_TRACE_STEPS] = "";
    int count = 0;
    for (const char *at = traffic->order; *at; at++) {
        if (!strchr(letters, *at) || (runs && count && *at == 'X' && seen[count - 1] == 'X')) continue;
        seen[count++] = *at;
    }
    if (strcmp(seen, expected) == 0) return;
    usp_case_print(&stage->c, name, sizeof name);
    usp_say(stage->rank, "%s: %s: of \"%s\" seen \"%s\", not \"%s\" (all: %s)", name, pass, letters, seen, expected,
            traffic->order);
}

/* What both passes of a case do, of what `letters` names. */
typedef struct order {
    const char *letters;
    int runs;
    const char *forward, *backward;
} order;

static int check_order(usp_rank *rank, const usp_case *c, usp_trace *trace, const order *o) {
    usp_stage stage;
    usp_traffic forward, backward;
    if (usp_stage_open(rank, c, &stage) != USP_OK) return usp_say(rank, "%s", usp_last_error());
    if (run_traced(&stage, trace, &forward, &backward)) return 1;
    expect_order(&stage, "forward", &forward, o->letters, o->runs, o->forward);
    expect_order(&stage, "backward", &backward, o->letters, o->runs, o->backward);
    usp_stage_close(&stage);
    usp_count(rank);
    return 0;
}

static const usp_case ordered_cases[] = {
    {.mask = USP_MASK_CAUSAL, .kv_heads = 2, .return_lse = 1},
    {.dtype = USP_BF16, .batch = 2, .arrangement = USP_BHSD},
    {.mask = USP_MASK_CAUSAL, .arrangement = USP_PADDED, .layout = USP_LAYOUT_CONTIGUOUS},
    {.attention = USP_LINEAR, .mask = USP_MASK_CAUSAL, .decay = 1, .initial_state = 1, .final_state = 1},
    {.attention = USP_LINEAR, .mask = USP_MASK_CAUSAL, .batch = 2, .arrangement = USP_BHSD, .recompute_state = 1},
    {.attention = USP_LINEAR, .dtype = USP_BF16, .arrangement = USP_PADDED, .layout = USP_LAYOUT_CONTIGUOUS}};
enum { ORDERED_CASES = sizeof ordered_cases / sizeof ordered_cases[0] };

/* Forward: q, k and v in, then out with lse and states. Backward: dout with delta in, then dq, dk, dv and states. */
int usp_body_exchanges(usp_rank *rank, void *argument) {
    const order o = {.letters = "X", .forward = "XX", .backward = "XX"};
    usp_trace *trace = usp_trace_insert(rank->world);
    (void)argument;
    for (int i = 0; i < ORDERED_CASES; i++) {
        usp_case c = ordered_cases[i];
        c.tokens = 96;
        c.heads = 8;
        c.ulysses = rank->size;
        if (check_order(rank, &c, trace, &o)) return 1;
    }
    return 0;
}

/* Without ulysses the ring stage works on the caller's tensors. A softmax ring packs k and v in one list a pass; at the
 * end of backward it adds what each reader of the own keys sends, and writes the gradients. By a relay all read them.
 */
int usp_body_copies(usp_rank *rank, void *argument) {
    const order none = {.letters = "C+", .forward = "", .backward = ""};
    char backward[32] = "C";
    usp_trace *trace = usp_trace_insert(rank->world);
    usp_trace_watch(trace, rank->world);
    (void)argument;
    for (int r = 1; r < rank->size; r++) strcat(backward, "+");
    strcat(backward, "C");
    const order packed = {.letters = "C+", .forward = "C", .backward = backward};
    for (int i = 0; i < ORDERED_CASES; i++) {
        usp_case c = ordered_cases[i];
        c.tokens = 96;
        c.ring = rank->size;
        if (c.attention != USP_LINEAR) c.route = USP_ROUTE_RELAY;
        if (check_order(rank, &c, trace, c.attention == USP_LINEAR || c.ring == 1 ? &none : &packed)) return 1;
    }
    return 0;
}

/* The travel begins (F) before and ends (W) behind all work that needs no state from elsewhere. dq needs none in
 * backward where the forward states were kept; computed again, they travel as well. */
static order ring_order(const usp_case *c) {
    order o = {.letters = "FXWIA", .runs = 1};
    if (c->mask == USP_MASK_CAUSAL) {
        o.forward = "FIXWA";
        o.backward = c->recompute_state ? "FFIIIXWWAAA" : "FIIIXWAA";
    } else {
        o.forward = "FXWA";
        o.backward = c->recompute_state ? "FFXWWAAA" : "FAXWAA";
    }
    return o;
}

int usp_body_overlap(usp_rank *rank, void *argument) {
    enum { WAYS = 32 };
    usp_trace *trace = usp_trace_insert(rank->world);
    usp_trace_watch(trace, rank->world);
    (void)argument;
    for (int i = 0; i < WAYS; i++) {
        char forward[64], backward[64];
        usp_case c = {.attention = USP_LINEAR,
                      .tokens = 96,
                      .layout = i & 1 ? USP_LAYOUT_ZIGZAG : USP_LAYOUT_CONTIGUOUS,
                      .state_exchange = i & 2 ? USP_STATE_CHAIN : USP_STATE_GATHER,
                      .recompute_state = i / 4 % 2,
                      .mask = i & 8 ? USP_MASK_FULL : USP_MASK_CAUSAL,
                      .ulysses = i & 16 && rank->size == 4 ? 2 : 1};
        order o = ring_order(&c);
        const char *heads = c.ulysses > 1 ? "FXW" : ""; /* the exchange of heads before and behind */
        c.ring = rank->size / c.ulysses;
        snprintf(forward, sizeof forward, "%s%s%s", heads, o.forward, heads);
        snprintf(backward, sizeof backward, "%s%s%s", heads, o.backward, heads);
        o.forward = forward;
        o.backward = backward;
        if (check_order(rank, &c, trace, &o)) return 1;
    }
    return 0;
}
