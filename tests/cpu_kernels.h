/* cpu_kernels.h - what the checks of the CPU's kernels share: random numbers, tensors with their truth in double
 * precision, verdicts, and problems of softmax attention. */
#ifndef USP_TESTS_CPU_KERNELS_H
#define USP_TESTS_CPU_KERNELS_H
#include "../lib/cpu/kernels.h"

/* ---- verdicts and random numbers: check_cpu_tensors.c ------------------------------------------------------------ */

typedef struct check {
    usp_device *device;
    uint64_t random;
    int checks, failures;
    double worst_f32; /* largest relative RMS error of an f32 result */
} check;

void usp_check_verdict(check *c, int good, const char *format, ...);
int usp_check_pick(check *c, int n);      /* 0 .. n - 1 */
double usp_check_uniform(check *c);       /* -1 .. 1 */
double usp_check_bell(check *c);          /* roughly normal */
void *usp_check_memory(size_t bytes);     /* or the end */
float *usp_check_poisoned(size_t floats); /* NaN */
double usp_check_dot(const double *a, const double *b, int n);

/* 16-bit numbers, by arithmetic. */
double usp_check_decode(usp_dtype dtype, uint16_t bits);
uint16_t usp_check_encode(usp_dtype dtype, double value);

/* ---- tensors: check_cpu_tensors.c -------------------------------------------------------------------------------- */

typedef struct tensor {
    usp_tensor view;
    usp_dtype dtype;
    int tokens, batch, heads, dim;
    unsigned char *bytes;
    size_t size;
    double *truth; /* [tokens][batch][heads][dim] */
} tensor;

size_t usp_check_count(const tensor *t);
double *usp_check_truth(const tensor *t, int token, int b, int h);
double usp_check_read(const tensor *t, int token, int b, int h, int i);
void usp_check_write(const tensor *t, int token, int b, int h, int i, double value); /* and its truth */
tensor usp_check_random(check *c, usp_dtype dtype, int tokens, int batch, int heads, int dim, double size);
/* An output: poisoned, its truth zero until a reference adds to it. */
tensor usp_check_output(check *c, usp_dtype dtype, int tokens, int batch, int heads, int dim);
usp_tensor usp_check_rows(const tensor *t, int64_t first); /* from this row on */
void usp_check_tensor_free(tensor *t);

/* Compares an output with its truth, then poisons its elements again: every other byte must still be poison. */
void usp_check_compare(check *c, const tensor *t, const char *what);
void usp_check_floats(check *c, const float *got, const double *truth, size_t n, const char *what);

/* What the device says its kernels work in, poisoned, and a guard behind it, looked at when it is freed. */
void *usp_check_scratch(check *c, usp_attention attention, usp_dtype dtype, int dim, int value_dim);
void usp_check_scratch_free(check *c, void *scratch, usp_attention attention, usp_dtype dtype, int dim, int value_dim);

/* ---- problems of softmax attention ------------------------------------------------------------------------------- */

/* What is allowed; arrays of rows. */
typedef struct pairs {
    int queries, keys, tree;
    int32_t *query, *low, *high, *diagonal, *key, *last;
} pairs;

/* A list, and the memory that it is written to. */
typedef struct list {
    usp_work *work;
    usp_tile *tile;
    usp_tile_count count;
    int capacity;
} list;

/* What a problem has beside the plain attention. */
typedef struct extras {
    int cap, slopes, sinks, dlse, dropout;
} extras;

typedef struct problem {
    usp_softmax args;
    extras has;
    pairs pairs;
    list by_query, by_key;
    tensor q, k, v, out, dout, dq, dk, dv, dq_sum;
    double *lse, *peak, *delta;   /* [batch, heads, queries] */
    double *dsinks, *dsinks_size; /* [heads]; of all that is summed */
    float *top, *sum, *lse_got, *peak_got, *delta_got, *dlse, *acc;
    float slopes[4], sinks[4];
    uint64_t state[2];
} problem;

/* check_cpu_pairs.c. `from` .. `to`: columns of by_query, rows of by_key, counted from `from`. `whole`: by_query has
 * rows without tiles too. */
void usp_check_pairs_make(check *c, pairs *p, int queries, int keys);
void usp_check_pairs_free(pairs *p);
int usp_check_allowed(const pairs *p, int query, int key);
void usp_check_lists(check *c, problem *p, int from, int to, int whole);

/* check_cpu_problem.c. */
problem usp_check_problem(check *c, usp_dtype dtype, int dim, int value_dim, int queries, int keys, extras has);
void usp_check_problem_free(check *c, problem *p);
/* What is wanted, from the truth of the inputs. */
void usp_check_reference(problem *p);
/* Folds the keys in blocks, cut anywhere or in equal parts. Backward takes what forward kept, and the true delta. */
void usp_check_forward(check *c, problem *p, int blocks, int equal);
void usp_check_backward(check *c, problem *p, int blocks, int equal);
static inline size_t usp_check_stats(const problem *p) {
    return (size_t)(p->args.batch * p->args.heads) * (size_t)p->q.tokens;
}

/* ---- parts of the check ------------------------------------------------------------------------------------------ */

void usp_check_halves(check *c);      /* check_cpu_copies.c */
void usp_check_copies(check *c);      /* check_cpu_copies.c: one list of random copies */
void usp_check_exponential(check *c); /* check_cpu_panels.c */
void usp_check_viewed(check *c);      /* check_cpu_panels.c: one product some terms of which are left out */
void usp_check_softmax(check *c, usp_dtype dtype, int dim, int value_dim, int queries, int keys);
void usp_check_softmax_poison(check *c);    /* check_cpu_softmax.c: one NaN in one input */
void usp_check_softmax_exactness(check *c); /* check_cpu_softmax.c: folds of large scores */
void usp_check_linear(check *c, usp_dtype dtype, int dim, int value_dim, int tokens, int poison);
void usp_check_scan(check *c);   /* check_cpu_scan.c */
void usp_check_speeds(check *c); /* check_cpu_speeds.c */

#endif
