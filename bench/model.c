/* model.c - a pass as the sum of its part of one rank's work, of what travels and cannot hide, and of what sums over
 * stages cost. Numbers of two H200s (docs/performance-log.md): H100s have 2.9 TB/s of memory. */
#include "model.h"

static const double link_rate = 370e9, memory_rate = 3.8e12; /* bytes a second */
static const double exchange_time = 20e-6;                   /* of an exchange beside its bytes: flags, events, skew */
enum { SLICES = 4 };                                         /* of the last stage's gradients */

/* Bytes of one rank. */
typedef struct volume {
    double exchanged; /* all head exchanges of the pass */
    double keys;      /* of a stage */
    double gradients; /* of a stage's keys, fp32 */
    double sums;      /* of all rows' running output, fp32 */
} volume;

/* Forward q, k, v and out travel, backward dout and dq, dk, dv: as many. */
static volume volume_of(const usp_case *c, int ulysses, int ring) {
    double size = (double)usp_dtype_size(c->dtype), tokens = (double)c->seq * c->batch / ring; /* of a block */
    double kv = c->kv_heads > ulysses ? c->kv_heads : ulysses;                                 /* as they travel */
    double in = c->heads * c->dim + kv * (c->dim + c->value_dim), out = (double)c->heads * c->value_dim;
    double away = tokens / ulysses * (ulysses - 1) / ulysses;
    return (volume){.exchanged = away * (in + out) * size,
                    .keys = tokens * kv / ulysses * (c->dim + c->value_dim) * size,
                    .gradients = tokens * kv / ulysses * (c->dim + c->value_dim) * sizeof(float),
                    .sums = tokens * c->heads / ulysses * c->value_dim * sizeof(float)};
}

/* What a ring adds to its ranks' work: keys that arrive later than the stage before ends; forward running sums that are
 * written and read again; backward the last gradients' way home, what arrives added, and all rounded. */
static double ring_time(const volume *v, usp_pass pass, int ring, double work) {
    double late = v->keys / link_rate + exchange_time - work / ring;
    double time = late > 0 ? (ring - 1) * late : 0;
    if (pass == USP_PASS_FORWARD) return time + (ring - 1) * 2 * v->sums / memory_rate;
    time += v->gradients / SLICES / link_rate + exchange_time;
    return time + ((ring - 1) * 3 + 1.5) * v->gradients / memory_rate;
}

double usp_model_pass(const usp_case *c, usp_pass pass, int ulysses, int ring, double alone) {
    double work = alone / (ulysses * ring);
    volume v = volume_of(c, ulysses, ring);
    if (c->kind != USP_SOFTMAX || c->heads % ulysses || (c->kv_heads % ulysses && ulysses % c->kv_heads)) return 0;
    if (ulysses > 1) work += v.exchanged / link_rate + 2 * exchange_time;
    return ring > 1 ? work + ring_time(&v, pass, ring, alone / (ulysses * ring)) : work;
}
