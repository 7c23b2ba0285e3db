/* expect.h - a run of thread-ranks as one Criterion expectation. Nothing else; only for files that use Criterion. */
#ifndef USP_TESTS_EXPECT_H
#define USP_TESTS_EXPECT_H
#include "ranks.h"

#include <criterion/criterion.h>

/* Runs the body on `size` CPU thread-ranks; what they say becomes the message of one failed expectation. */
static inline void usp_expect_ranks(int size, int seconds, usp_body body, void *argument) {
    const usp_ranks ranks = {.device = USP_DEVICE_CPU, .size = size, .seconds = seconds};
    usp_report report;
    int failed = usp_ranks_run(&ranks, body, argument, &report);
    cr_expect(!failed, "%d ranks: %d failures\n%s", size, report.failures, report.text);
    cr_expect(failed || report.done > 0, "%d ranks: nothing ran", size);
}

#endif
