/* lanes.c - axes whose exchanges go over two transports give what they give over one. */
#include "bodies.h"
#include "trace.h"

#include <stdio.h>
#include <string.h>

/* The axes that go beside the world's transport are those whose rows are on one host. */
static void check_lanes(usp_rank *rank, const usp_case *c, usp_trace *trace) {
    usp_world_info info = {.struct_size = sizeof info};
    usp_traffic traffic = usp_trace_take(trace);
    usp_stage stage;
    char text[2048], wanted[64];
    if (usp_world_get_info(rank->world, &info) != USP_OK || usp_stage_open(rank, c, &stage) != USP_OK) {
        usp_say(rank, "%s", usp_last_error());
        return;
    }
    int ulysses = info.local_size % c->ulysses == 0, ring = info.local_size % (c->ulysses * c->ring) == 0;
    if (c->ring == 1) ring = 1;
    snprintf(wanted, sizeof wanted, "ulysses by %s, ring by %s", ulysses ? "near" : "far", ring ? "near" : "far");
    usp_layer_describe(stage.layer, text, sizeof text);
    if (!strstr(text, wanted)) usp_say(rank, "not %s: %s", wanted, text);
    int near = (ulysses && c->ulysses > 1) || (ring && c->ring > 1), far = !(ulysses && ring);
    if ((traffic.near > 0) != near || (traffic.far > 0) != far || traffic.strays)
        usp_say(rank, "%s: %lld bytes near, %lld far, %d messages that strayed", wanted, (long long)traffic.near,
                (long long)traffic.far, traffic.strays);
    usp_stage_close(&stage);
}

static int lanes_case(usp_rank *rank, const usp_case *c, usp_trace *trace) {
    usp_whole one, two;
    usp_trace_near(trace, 0);
    if (usp_run_case(rank, c, &one)) return 1;
    usp_trace_near(trace, 1);
    usp_trace_take(trace);
    if (usp_run_case(rank, c, &two)) return 1;
    check_lanes(rank, c, trace);
    if (rank->rank == 0) usp_compare_bits(rank, c, "over two transports", USP_SAME_ALL, &two, &one);
    usp_whole_free(&one);
    usp_whole_free(&two);
    usp_count(rank);
    return 0;
}

int usp_body_lanes(usp_rank *rank, void *argument) {
    static const usp_case cases[] = {
        {.tokens = 96, .head_dim = 16, .heads = 24, .kv_heads = 6, .return_lse = 1},
        {.tokens = 96, .head_dim = 16, .heads = 24, .shared_memory = 1, .sinks = 1, .max_logit = 1},
        {.tokens = 77, .head_dim = 16, .heads = 5, .shared_memory = 1, .mask = USP_MASK_FULL, .dtype = USP_BF16},
        {.tokens = 96, .head_dim = 16, .heads = 24, .shared_memory = 1, .window_left = 5, .route = USP_ROUTE_DIRECT},
        {.tokens = 96, .head_dim = 16, .heads = 24, .shared_memory = 1, .head_groups = 3},
        {.attention = USP_LINEAR, .tokens = 96, .head_dim = 16, .heads = 24, .shared_memory = 1, .decay = 1},
        {.attention = USP_LINEAR, .tokens = 77, .head_dim = 16, .heads = 5, .state_exchange = USP_STATE_CHAIN}};
    usp_trace *trace = usp_trace_insert(rank->world);
    (void)argument;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        for (int s = 0; s < USP_SPLITS; s++) {
            usp_case c = cases[i];
            c.ulysses = usp_splits[s].ulysses;
            c.ring = usp_splits[s].ring;
            c.deterministic = 1;
            if (!c.mask) c.mask = USP_MASK_CAUSAL;
            if (c.ulysses * c.ring == rank->size && lanes_case(rank, &c, trace)) return 1;
        }
    return 0;
}
