/* check_cpu_copies.c - 16-bit numbers, every one of them, and lists of copies through row maps, bit for bit. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "../lib/cpu/half.h"
#include "cpu_kernels.h"

/* ---- 16-bit numbers ---------------------------------------------------------------------------------------------- */

static void check_pattern(check *c, usp_dtype dtype, uint16_t bits) {
    float value = dtype == USP_F16 ? usp_half_to_float(bits) : usp_bfloat_to_float(bits);
    uint16_t back = dtype == USP_F16 ? usp_float_to_half(value) : usp_float_to_bfloat(value);
    double truth = usp_check_decode(dtype, bits);
    if (isnan(truth)) {
        usp_check_verdict(c, isnan(value) && isnan(usp_check_decode(dtype, back)) && (back & 0x8000) == (bits & 0x8000),
                          "NaN %04x of dtype %d is lost", bits, (int)dtype);
        return;
    }
    usp_check_verdict(c, (double)value == truth && !signbit(value) == !signbit(truth),
                      "%04x of dtype %d gives %g, not %g", bits, (int)dtype, (double)value, truth);
    usp_check_verdict(c, back == bits, "%04x of dtype %d comes back as %04x", bits, (int)dtype, back);
}

/* Halfway between a number and the next one, and its neighbours: where rounding goes wrong. */
static void check_rounding(check *c, usp_dtype dtype, uint16_t bits) {
    double low = usp_check_decode(dtype, bits), high = usp_check_decode(dtype, (uint16_t)(bits + 1));
    if (isnan(low) || isnan(high) || isinf(low)) return;
    if (isinf(high)) high = low + (low - usp_check_decode(dtype, (uint16_t)(bits - 1)));
    float middle = (float)((low + high) / 2), values[3];
    values[0] = nextafterf(middle, -INFINITY), values[1] = middle, values[2] = nextafterf(middle, INFINITY);
    for (int i = 0; i < 3; i++) {
        uint16_t got = dtype == USP_F16 ? usp_float_to_half(values[i]) : usp_float_to_bfloat(values[i]);
        uint16_t wanted = usp_check_encode(dtype, (double)values[i]);
        usp_check_verdict(c, got == wanted, "%a as dtype %d is %04x, not %04x", (double)values[i], (int)dtype, got,
                          wanted);
    }
}

void usp_check_halves(check *c) {
    for (int dtype = USP_F16; dtype <= USP_BF16; dtype++)
        for (uint32_t bits = 0; bits < 65536; bits++) {
            check_pattern(c, (usp_dtype)dtype, (uint16_t)bits);
            check_rounding(c, (usp_dtype)dtype, (uint16_t)bits);
        }
}

/* ---- copies ------------------------------------------------------------------------------------------------------ */

enum { COPIES = 3 };

typedef struct copy {
    usp_copy args;
    tensor from, to;
    int32_t *from_row, *to_row; /* of as many tokens */
} copy;

/* Rows of a tensor of `rows` in any order, which are enough; each at most once if `once`. */
static int32_t *rows_make(check *c, int tokens, int rows, int once) {
    int32_t *row = usp_check_memory(sizeof *row * (size_t)rows);
    for (int i = 0; i < rows; i++) row[i] = i;
    for (int i = 0; i < tokens; i++) {
        int at = once ? i + usp_check_pick(c, rows - i) : usp_check_pick(c, rows);
        int32_t other = row[at];
        if (once) row[at] = row[i];
        row[i] = once ? other : at;
    }
    return row;
}

static copy copy_make(check *c) {
    const int dims[] = {1, 5, 16, 17, 64, 300};
    copy p = {.args = {.tokens = usp_check_pick(c, 7), .batch = 1 + usp_check_pick(c, 2)}};
    usp_copy *a = &p.args;
    int tokens = (int)a->tokens, from_rows = tokens + 1 + usp_check_pick(c, 4), to_rows = tokens + usp_check_pick(c, 4);
    a->heads = 1 + usp_check_pick(c, 3), a->dim = dims[usp_check_pick(c, 6)];
    a->from_dtype = (usp_dtype)usp_check_pick(c, 3), a->to_dtype = (usp_dtype)usp_check_pick(c, 3);
    a->accumulate = a->to_dtype == USP_F32 && usp_check_pick(c, 2);
    p.from = usp_check_random(c, a->from_dtype, from_rows, a->batch, a->heads, a->dim, 3);
    p.to = usp_check_random(c, a->to_dtype, to_rows, a->batch, a->heads, a->dim, 3);
    p.from_row = rows_make(c, tokens, from_rows, 0), p.to_row = rows_make(c, tokens, to_rows, 1);
    a->from = p.from.view, a->to = p.to.view;
    a->from_row = usp_check_pick(c, 2) ? p.from_row : NULL, a->to_row = usp_check_pick(c, 2) ? p.to_row : NULL;
    return p;
}

static double wanted(const usp_copy *a, double before, double from) {
    double sum = (a->accumulate ? before : 0) + from;
    return a->to_dtype == USP_F32 ? (double)(float)sum
                                  : usp_check_decode(a->to_dtype, usp_check_encode(a->to_dtype, sum));
}

static void copy_reference(copy *p) {
    const usp_copy *a = &p->args;
    for (int n = 0; n < (int)a->tokens * a->batch * a->heads; n++) {
        int t = n / a->heads / a->batch, b = n / a->heads % a->batch, h = n % a->heads;
        const double *from = usp_check_truth(&p->from, a->from_row ? a->from_row[t] : t, b, h);
        double *to = usp_check_truth(&p->to, a->to_row ? a->to_row[t] : t, b, h);
        for (int i = 0; i < a->dim; i++) to[i] = wanted(a, to[i], from[i]);
    }
}

/* A copy has one right answer, bit for bit; rows that it does not name stay. */
static void copy_compare(check *c, const copy *p) {
    const tensor *to = &p->to;
    int wrong = 0;
    for (int n = 0; n < to->tokens * to->batch * to->heads; n++) {
        int t = n / to->heads / to->batch, b = n / to->heads % to->batch, h = n % to->heads;
        for (int i = 0; i < to->dim; i++) wrong += usp_check_read(to, t, b, h, i) != usp_check_truth(to, t, b, h)[i];
    }
    usp_check_verdict(c, !wrong, "%d elements of a copy from dtype %d to %d, accumulate %d", wrong,
                      (int)p->args.from_dtype, (int)p->args.to_dtype, p->args.accumulate);
    usp_check_compare(c, to, "copy");
}

void usp_check_copies(check *c) {
    copy all[COPIES];
    usp_copy args[COPIES];
    int count = usp_check_pick(c, COPIES + 1);
    for (int i = 0; i < COPIES; i++) {
        all[i] = copy_make(c), args[i] = all[i].args;
        if (i < count) copy_reference(&all[i]);
    }
    c->device->ops->copy_rows(c->device, args, count, NULL);
    for (int i = 0; i < COPIES; i++) {
        copy_compare(c, &all[i]);
        usp_check_tensor_free(&all[i].from), usp_check_tensor_free(&all[i].to);
        free(all[i].from_row), free(all[i].to_row);
    }
}
