/* costs.c - bytes stated and bytes seen (see costs.h). Looks at no result. */
#include "costs.h"
#include "trace.h"

#include <stdlib.h>

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
    char name[256];
    usp_cost cost = {.struct_size = sizeof cost};
    by_axis seen = sort_traffic(stage, traffic);
    if (usp_layer_get_cost(stage->layer, pass, &cost) != USP_OK) return usp_say(stage->rank, "%s", usp_last_error());
    if (seen.ulysses_send == cost.ulysses_send && seen.ulysses_recv == cost.ulysses_recv &&
        seen.ring_send == cost.ring_send && seen.ring_recv == cost.ring_recv && seen.stray == 0)
        return 0;
    usp_case_print(&stage->c, name, sizeof name);
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
            if (usp_splits[s].ulysses * usp_splits[s].ring != rank->size) continue;
            if (c.attention == 0) c.attention = table->attention;
            c.ulysses = usp_splits[s].ulysses;
            c.ring = usp_splits[s].ring;
            if (check_case(rank, &c, trace)) return 1;
        }
    return 0;
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
    char name[256];
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
        usp_case c = {
            .ulysses = u, .ring = r, .tokens = TOKENS, .heads = HEADS, .head_dim = DIM, .mask = USP_MASK_CAUSAL};
        int64_t operand = TOKENS / (u * r) * (HEADS * DIM) * 4, block = TOKENS / r * (HEADS / u * DIM) * 4;
        double pairs = TOKENS * (TOKENS + 1) / 2.0;
        if (expect_cost(rank, &c, 4 * operand * (u - 1) / u, 2 * block * (r - 1), 4 * pairs * HEADS * DIM / rank->size))
            return 1;
        int64_t state = HEADS / u * DIM * DIM * 4;
        c.attention = USP_LINEAR;
        c.layout = USP_LAYOUT_CONTIGUOUS;
        c.state_exchange = USP_STATE_GATHER;
        if (expect_cost(rank, &c, 4 * operand * (u - 1) / u, state * (r - 1), 0)) return 1;
    }
    return 0;
}
