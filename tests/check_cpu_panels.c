/* check_cpu_panels.c - what panels are asked beside plain products: the exponential, and products some terms of which
 * are left out. */
#include <math.h>
#include <string.h>

#include "cpu_kernels.h"

/* The panel's exponential, through weigh with top 0 and factor 1: nothing for -inf, NaN for NaN, else within 1.5e-7. */
void usp_check_exponential(check *c) {
    _Alignas(64) float score[USP_CPU_LANE], slope[USP_CPU_LANE] = {0}, zero[USP_CPU_LANE] = {0}, one[USP_CPU_LANE];
    const usp_stats stats = {zero, one, zero};
    for (int i = 0; i < USP_CPU_LANE; i++) one[i] = 1;
    for (int round = 0; round < 20000; round++) {
        float x[USP_CPU_LANE] = {-INFINITY, NAN, -1000, 0};
        double worst = 0;
        for (int i = 4; i < USP_CPU_LANE; i++) x[i] = (float)(-43.5 + 43.5 * usp_check_uniform(c));
        memcpy(score, x, sizeof x);
        usp_cpu_panel(c->device)->weigh((usp_scores){score, 1, USP_CPU_LANE}, slope, &stats, 0);
        for (int i = 4; i < USP_CPU_LANE; i++) worst = fmax(worst, fabs((double)score[i] / exp((double)x[i]) - 1));
        usp_check_verdict(c, score[0] == 0 && isnan(score[1]) && score[2] == 0 && score[3] == 1,
                          "exp of -inf, NaN, -1000 or 0");
        usp_check_verdict(c, worst <= 1.5e-7, "exp near %g has relative error %g", (double)x[4], worst);
    }
}

enum { TERMS = 21 };

/* Marks of rows and of columns. */
typedef struct marks {
    int32_t at[USP_CPU_LANE + TERMS], low[USP_CPU_LANE + TERMS], high[USP_CPU_LANE + TERMS];
} marks;

static void marks_draw(check *c, marks *m) {
    for (int i = 0; i < USP_CPU_LANE + TERMS; i++) {
        m->at[i] = usp_check_pick(c, 30);
        m->low[i] = usp_check_pick(c, 3) ? usp_check_pick(c, 20) - 10 : INT32_MIN;
        m->high[i] = usp_check_pick(c, 3) ? usp_check_pick(c, 30) : INT32_MAX;
    }
}

static int term_counts(const usp_pair_view *v, int i, int l) {
    return v->row.low[i] <= v->column.at[l] && v->column.at[l] <= v->row.high[i] && v->column.low[l] <= v->row.at[i] &&
           v->row.at[i] <= v->column.high[l];
}

/* Whether the sums of a product are those of its terms: finite where these are. */
static int sums_are_right(const usp_product *p, const float *before) {
    int right = 1;
    for (int i = 0; i < p->m; i++)
        for (int j = 0; j < p->n; j++) {
            double truth = p->accumulate ? (double)before[i * p->c_row + j] : 0;
            float sum = p->c[i * p->c_row + j];
            for (int l = 0; l < p->k; l++)
                if (term_counts(p->view, i, l))
                    truth += (double)p->a[i * p->a_row + l * p->a_step] * (double)p->b[l * p->b_row + j];
            right &= isfinite(truth) ? fabs(truth - (double)sum) < 1e-5 : !isfinite(sum);
        }
    return right;
}

/* A NaN or infinity is in one of the terms that are left out, or in one that stays. */
void usp_check_viewed(check *c) {
    _Alignas(64) float a[TERMS * USP_CPU_ROWS], b[TERMS * USP_CPU_LANE];
    _Alignas(64) float sum[USP_CPU_ROWS * USP_CPU_LANE], before[USP_CPU_ROWS * USP_CPU_LANE];
    const float odd[] = {NAN, INFINITY, -INFINITY};
    const usp_panel *panel = usp_cpu_panel(c->device);
    marks row, column;
    marks_draw(c, &row), marks_draw(c, &column);
    const usp_pair_view view = {{row.at, row.low, row.high, NULL}, {column.at, column.low, column.high, NULL}};
    usp_product p = {
        .m = USP_CPU_ROWS, .n = USP_CPU_LANE, .k = TERMS, .accumulate = usp_check_pick(c, 2), .view = &view};
    p.a = a, p.a_row = 1, p.a_step = USP_CPU_ROWS, p.b = b, p.b_row = p.c_row = USP_CPU_LANE, p.c = sum;
    for (int i = 0; i < TERMS * USP_CPU_ROWS; i++) a[i] = (float)usp_check_uniform(c);
    for (int i = 0; i < TERMS * USP_CPU_LANE; i++) b[i] = (float)usp_check_uniform(c);
    for (int i = 0; i < USP_CPU_ROWS * USP_CPU_LANE; i++) sum[i] = before[i] = (float)usp_check_uniform(c);
    usp_check_verdict(c, panel->finite(b, TERMS * USP_CPU_LANE), "numbers are not finite");
    b[usp_check_pick(c, TERMS * USP_CPU_LANE)] = odd[usp_check_pick(c, 3)];
    usp_check_verdict(c, !panel->finite(b, TERMS * USP_CPU_LANE), "a NaN or infinity is finite");
    panel->multiply(&p);
    usp_check_verdict(c, sums_are_right(&p, before), "a product with terms left out is wrong");
}
