/* check_leaks.c - makes, uses and destroys everything 200 times, refusals and aborts included: for LeakSanitizer, and
 * with a count of host memory of its own. A plain program; results are judged elsewhere. */
#include "stage.h"

#include <stdio.h>
#include <stdlib.h>

enum { ROUNDS = 200, SECONDS = 60 };

static const usp_case cases[] = {
    {.tokens = 40, .mask = USP_MASK_CAUSAL, .heads = 8, .kv_heads = 2, .return_lse = 1},
    {.attention = USP_LINEAR, .tokens = 40, .mask = USP_MASK_CAUSAL, .decay = 1, .initial_state = 1, .final_state = 1},
    {.tokens = 40, .key_tokens = 9},
    {.tokens = 40, .layout = USP_LAYOUT_CUSTOM},
    {.tokens = 40, .layout = USP_LAYOUT_ZIGZAG_PER_DOCUMENT, .mask = USP_MASK_CAUSAL},
    {.attention = USP_LINEAR, .tokens = 40, .layout = USP_LAYOUT_STRIPE, .mask = USP_MASK_CAUSAL}, /* refused */
};

/* One case, and a layer that no library would make. argument: the round. */
static int one_round(usp_rank *rank, void *argument) {
    int round = *(const int *)argument;
    usp_case c = cases[round % (int)(sizeof cases / sizeof cases[0])];
    usp_whole whole;
    usp_stage stage;
    c.ulysses = round % 3 == 0 && rank->size % 2 == 0 ? 2 : 1;
    c.ring = rank->size / c.ulysses;
    if (usp_stage_run(rank, &c, &whole) > 0) return 1;
    usp_whole_free(&whole);
    c.heads = -1;
    if (usp_stage_open(rank, &c, &stage) == USP_OK) return usp_say(rank, "a layer of -1 heads");
    usp_count(rank);
    return 0;
}

/* One rank gives up in the middle; the others must come out of it, and everything be freed. */
static int give_up(usp_rank *rank, void *argument) {
    usp_stage stage;
    usp_case c = {.tokens = 40, .mask = USP_MASK_CAUSAL, .ring = rank->size};
    (void)argument;
    usp_status status = usp_stage_open(rank, &c, &stage);
    if (status != USP_OK) return usp_say(rank, "%s", usp_last_error());
    int failed = usp_stage_fill(&stage);
    if (rank->rank == rank->size - 1)
        usp_world_abort(rank->world);
    else if (!failed && usp_stage_forward(&stage, 1) == 0 && usp_world_poll(rank->world) == USP_OK)
        usp_say(rank, "a world that was aborted goes on");
    usp_stage_close(&stage);
    usp_count(rank);
    return 0;
}

int main(void) {
    usp_report report;
    int failed = 0;
    for (int round = 0; round < ROUNDS && !failed; round++) {
        const usp_ranks ranks = {.size = 1 + round % 4, .seconds = SECONDS, .watchdog = round % 2};
        failed = usp_ranks_run(&ranks, one_round, &round, &report);
        if (failed) fprintf(stderr, "round %d\n%s", round, report.text);
    }
    for (int round = 0; round < ROUNDS / 10 && !failed; round++) {
        const usp_ranks ranks = {.size = 2 + round % 3, .seconds = SECONDS};
        usp_ranks_run(&ranks, give_up, NULL, &report);
        failed = report.done != ranks.size;
        if (failed)
            fprintf(stderr, "giving up, round %d: %d of %d came back\n%s", round, report.done, ranks.size, report.text);
    }
    printf("check_leaks: %s\n", failed ? "FAILED" : "ok");
    return failed;
}
