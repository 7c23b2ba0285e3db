/* check_cpu_scan.c - the scan of linear attention's states against plain loops. */
#include <math.h>
#include <stdlib.h>

#include "cpu_kernels.h"

enum { STATES = 9, GROUPS = 4 };

static void reference_scan(const usp_scan *a, double *truth, double *final, size_t row, size_t stride) {
    double log_decay = a->log_decay ? (double)a->log_decay[row / (size_t)a->elements % (size_t)a->heads] : 0;
    for (int g = 0; g < a->groups; g++) {
        double x = a->initial ? (double)a->initial[(size_t)g * stride + row] : 0;
        for (int n = 0; n < a->states; n++) {
            int i = a->reverse ? a->states - 1 - n : n;
            const usp_scan_step *step = &a->step[i];
            if (step->group != g) continue;
            size_t at = (size_t)(a->place ? a->place[i] : i) * stride + row;
            truth[at] = x;
            x = (a->reverse ? step->ends : step->begins) ? 0 : exp(log_decay * step->length) * x;
            x += (double)a->data[at];
        }
        final[(size_t)g * stride + row] = x;
    }
}

/* Later groups may have no state. */
static void draw_steps(check *c, usp_scan_step *step) {
    int documents = usp_check_pick(c, 2);
    for (int i = 0, group = 0; i < STATES; i++, group += group + 1 < GROUPS && !usp_check_pick(c, 2))
        step[i] = (usp_scan_step){usp_check_pick(c, 50), group, documents && !usp_check_pick(c, 3),
                                  documents && !usp_check_pick(c, 3)};
}

static void check_states(check *c, usp_scan *a, size_t stride) {
    double *truth = usp_check_memory(STATES * stride * sizeof(double));
    double *final = usp_check_memory(GROUPS * stride * sizeof(double));
    for (size_t row = 0; row < stride; row++) reference_scan(a, truth, final, row, stride);
    c->device->ops->linear_scan(c->device, a, NULL);
    usp_check_floats(c, a->data, truth, STATES * stride, "scan");
    if (a->final) usp_check_floats(c, a->final, final, GROUPS * stride, "final state of a scan");
    free(truth), free(final);
}

void usp_check_scan(check *c) {
    const int elements[] = {1, 7, 64, 1500};
    usp_scan a = {.batch = 1 + usp_check_pick(c, 2), .heads = 1 + usp_check_pick(c, 3)};
    usp_scan_step step[STATES];
    float log_decay[3];
    int32_t place[STATES];
    a.elements = elements[usp_check_pick(c, 4)];
    size_t stride = (size_t)(a.batch * a.heads) * (size_t)a.elements;
    float *data = usp_check_poisoned(STATES * stride), *initial = usp_check_poisoned(GROUPS * stride);
    float *final = usp_check_poisoned(GROUPS * stride);
    draw_steps(c, step);
    for (int i = 0; i < STATES; i++) place[i] = (i * 2 + 3) % STATES; /* all, as 2 and 9 have no factor in common */
    for (size_t i = 0; i < STATES * stride; i++) data[i] = (float)usp_check_uniform(c);
    for (size_t i = 0; i < GROUPS * stride; i++) initial[i] = (float)usp_check_uniform(c);
    for (int h = 0; h < 3; h++) log_decay[h] = -0.1f * (float)usp_check_pick(c, 3);
    a.place = usp_check_pick(c, 2) ? place : NULL;
    a.step = step, a.states = STATES, a.groups = GROUPS, a.data = data;
    a.reverse = usp_check_pick(c, 2), a.log_decay = usp_check_pick(c, 3) ? log_decay : NULL;
    a.initial = usp_check_pick(c, 2) ? initial : NULL, a.final = usp_check_pick(c, 2) ? final : NULL;
    check_states(c, &a, stride);
    free(data), free(initial), free(final);
}
