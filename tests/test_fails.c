/* test_fails.c - fails on purpose: check_fails.sh looks for its sentences on the screen. */
#include "expect.h"

static int body(usp_rank *rank, void *argument) {
    (void)argument;
    return usp_say(rank, "as rank %d of %d should", rank->rank, rank->size);
}

Test(fails, by_value) {
    cr_expect(2 + 2 == 5, "error %.3g, limit %.3g", 0.25, 0.125);
}

Test(fails, on_ranks) {
    usp_expect_ranks(2, 10, body, NULL);
}
