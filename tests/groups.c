/* groups.c - heads exchanged and worked on in groups give what they give at once. */
#include "bodies.h"

#include <stdlib.h>
#include <string.h>

/* Heads worked on in `groups` groups, where ulysses ranks have heads of as many as `expected`: their results are those
 * of all heads at once, bit by bit. */
static int grouped_case(usp_rank *rank, usp_case c, int groups, int expected) {
    usp_whole one, several;
    usp_stage stage;
    char text[2048];
    c.head_groups = 0;
    if (usp_run_case(rank, &c, &one)) return 1;
    c.head_groups = groups;
    if (usp_run_case(rank, &c, &several)) return 1;
    if (rank->rank == 0) usp_compare_bits(rank, &c, "in groups of heads", USP_SAME_ALL, &several, &one);
    usp_whole_free(&one);
    usp_whole_free(&several);
    if (usp_stage_open(rank, &c, &stage) != USP_OK) return 1;
    usp_layer_describe(stage.layer, text, sizeof text);
    const char *said = strstr(text, " in ");
    if ((said ? atoi(said + 4) : 1) != expected) usp_say(rank, "not %d groups: %s", expected, text);
    usp_stage_close(&stage);
    usp_count(rank);
    return 0;
}

int usp_body_groups(usp_rank *rank, void *argument) {
    const struct {
        usp_case c;
        int groups, expected;
    } cases[] = {
        {{.heads = 4, .head_dim = 16}, 4, 4},
        {{.heads = 4, .head_dim = 16, .shared_memory = 1, .sinks = 1, .max_logit = 1, .return_lse = 1, .dlse = 1},
         2,
         2},
        {{.heads = 12, .kv_heads = 4, .head_dim = 16, .slopes = 1, .dtype = USP_BF16}, 3, 2},
        {{.heads = 6, .head_dim = 16, .value_dim = 8, .dropout = 0.25f, .arrangement = USP_BHSD}, 64, 6},
        {{.heads = 4, .head_dim = 16, .mask = USP_MASK_FULL, .layout = USP_LAYOUT_STRIPE, .shared_memory = 1}, 4, 4},
        {{.heads = 4, .head_dim = 16, .documents = 4, .layout = USP_LAYOUT_ZIGZAG_PER_DOCUMENT}, 4, 4},
        {{.heads = 4, .head_dim = 16, .batch = 2}, 4, 1}};
    (void)argument;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        usp_case c = cases[i].c;
        c.ulysses = rank->size;
        c.tokens = 61;
        c.deterministic = 1;
        c.heads *= rank->size;
        c.kv_heads *= rank->size;
        if (!c.mask) c.mask = USP_MASK_CAUSAL;
        if (grouped_case(rank, c, cases[i].groups, rank->size == 1 ? 1 : cases[i].expected)) return 1;
    }
    return 0;
}
