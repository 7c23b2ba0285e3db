/* test_budget.c - the error budget itself: small tensors get no more of it than large ones, and it can be exceeded.
 * Runs no layer. */
#include "tensors.h"

#include <criterion/criterion.h>

static int fails(usp_dtype dtype, float given, double truth, double plain, double floor) {
    char why[256];
    const float all[] = {given, given};
    const double truths[] = {truth, truth}, plains[] = {plain, plain};
    return usp_within_budget_over("x", dtype, all, truths, plains, 2, floor, why, sizeof why);
}

Test(budget, is_relative_to_the_tensor) {
    for (double size = 1e-6; size < 1e6; size *= 1000) {
        cr_expect(!fails(USP_F32, (float)(size * (1 + 0.8e-5)), size, size, 0), "%g", size);
        cr_expect(fails(USP_F32, (float)(size * (1 + 1.2e-5)), size, size, 0), "%g", size);
        cr_expect(!fails(USP_BF16, (float)(size * 1.017), size, size * 1.01, 0), "%g", size);
        cr_expect(fails(USP_BF16, (float)(size * 1.023), size, size * 1.01, 0), "%g", size);
    }
}

Test(budget, of_nothing_is_absolute) {
    cr_expect(!fails(USP_F32, 0.8e-5f, 0, 0, 0));
    cr_expect(fails(USP_F32, 1.2e-5f, 0, 0, 0));
    cr_expect(!fails(USP_F16, 0.8e-5f, 0, 0, 0));
    cr_expect(fails(USP_F16, 1.2e-5f, 0, 0, 0));
}

Test(budget, over_a_floor) {
    cr_expect(!fails(USP_F32, 0.01f + 0.8e-6f, 0.01, 0.01, 0.1));
    cr_expect(fails(USP_F32, 0.01f + 1.2e-6f, 0.01, 0.01, 0.1));
    cr_expect(fails(USP_F32, 0.01f + 0.8e-6f, 0.01, 0.01, 0));
    cr_expect(!fails(USP_F32, 10 + 0.8e-4f, 10, 10, 0.1));
    cr_expect(fails(USP_F32, 10 + 1.2e-4f, 10, 10, 0.1));
}
