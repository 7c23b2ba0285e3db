/* tensors.h - what tests put into layers and take out: numbers from a seed, lower precisions, poisoned and strided
 * memory, and errors with their budget. Knows tensors and ranks' tokens, not attention. */
#ifndef USP_TESTS_TENSORS_H
#define USP_TESTS_TENSORS_H
#include "usp.h"

/* About N(0,1), within +-3.5; a pure function, so every rank can make its own part of a whole tensor. */
double usp_random_at(uint64_t seed, uint64_t tensor, uint64_t index);
/* The next of a stream of 64 random bits. */
uint64_t usp_random_next(uint64_t *state);
/* Uniform in 0 .. below-1. */
int usp_random_below(uint64_t *state, int below);

/* x as the dtype would hold it, to the nearest, ties to even. */
double usp_round_to(usp_dtype dtype, double x);
double usp_round_f16(double x);
double usp_round_bf16(double x);
/* Half of the spacing of numbers near 1. */
double usp_unit_roundoff(usp_dtype dtype);
void usp_store(usp_dtype dtype, void *to, double x);
double usp_load(usp_dtype dtype, const void *from);

/* Memory of the world with a twin on the host. Made full of bytes 0xff: NaN in every dtype. */
typedef struct usp_buffer {
    usp_world *world;
    usp_stream stream;
    unsigned char *host;
    void *device;
    size_t bytes;
    int shared;
} usp_buffer;

usp_status usp_buffer_create(usp_world *world, usp_stream stream, size_t bytes, usp_buffer *buffer);
/* Collective, in shared memory. Its destroy is collective too. */
usp_status usp_buffer_create_shared(usp_world *world, usp_stream stream, size_t bytes, usp_buffer *buffer);
usp_status usp_buffer_upload(const usp_buffer *buffer);
usp_status usp_buffer_download(const usp_buffer *buffer); /* waits for the stream */
void usp_buffer_destroy(usp_buffer *buffer);

/* How [batch, token, head, dim] lies in memory. PACKED: heads of several tensors side by side in one buffer,
 * [B,S,3,H,D]. PADDED: every stride larger than it must be, and the first element not aligned. */
typedef enum usp_arrangement { USP_BSHD, USP_BHSD, USP_SBHD, USP_PACKED, USP_PADDED, USP_ARRANGEMENTS } usp_arrangement;

/* One tensor inside a buffer: element [b, t, h, x] is at offset + b stride_batch + t stride_token + h stride_head + x.
 */
typedef struct usp_view {
    usp_dtype dtype;
    int batch, heads, dim;
    int64_t tokens, offset, stride_batch, stride_token, stride_head;
} usp_view;

/* All but PACKED. */
usp_view usp_view_make(usp_arrangement arrangement, usp_dtype dtype, int batch, int64_t tokens, int heads, int dim);
/* A part of rows of `row_heads` heads, from `first_head`. */
usp_view usp_view_packed(usp_dtype dtype, int batch, int64_t tokens, int heads, int dim, int first_head, int row_heads);
size_t usp_view_bytes(const usp_view *view); /* of a buffer that holds it */
void *usp_view_at(const usp_view *view, const usp_buffer *buffer, int b, int64_t t, int h, int x); /* on the host */
usp_tensor usp_view_tensor(const usp_view *view, const usp_buffer *buffer);

/* Which tokens of a whole tensor a view's are. */
typedef struct usp_tokens {
    const usp_sequence *sequence;
    int rank;
    int64_t whole, first; /* tokens of the whole tensor, and the number of its first one */
} usp_tokens;

/* Fills the view, on the host, with random numbers of `tensor`: element [b, t, h, x] is number
 * ((b * whole + first + global(t)) * heads + h) * dim + x. */
void usp_view_fill(const usp_view *view, const usp_buffer *buffer, const usp_tokens *tokens, uint64_t seed,
                   uint64_t tensor);
/* Dense [b, t, h, x]; exact. */
void usp_view_read(const usp_view *view, const usp_buffer *buffer, float *dense);
/* Poisons the view's elements again; afterwards an untouched buffer is all 0xff. */
void usp_view_poison(const usp_view *view, const usp_buffer *buffer);
int usp_buffer_is_poison(const usp_buffer *buffer);

/* The whole tensor as random numbers rounded to the dtype, [count]. */
void usp_whole_fill(usp_dtype dtype, double *whole, int64_t count, uint64_t seed, uint64_t tensor);

typedef struct usp_error {
    double rms;      /* of the difference, over that of the true tensor; of one that is 0 in truth: over 1 */
    double max;      /* largest difference */
    double true_max; /* largest absolute value of the true tensor */
    int64_t worst;   /* where */
} usp_error;

/* Infinities must agree; a NaN is an infinite error. */
usp_error usp_error_of(const float *given, const double *truth, int64_t count);
/* The same, over at least `floor`. */
usp_error usp_error_over(const float *given, const double *truth, int64_t count, double floor);

/* 0 if `given` is good: f32: RMS error at most 1e-5; else max error at most twice that of `plain`, a plain computation
 * in the same precision, + 1e-5 of the largest value (of a tensor that is 0 in truth: + 1e-5). Otherwise says why, in
 * `why`. */
int usp_within_budget(const char *name, usp_dtype dtype, const float *given, const double *truth, const double *plain,
                      int64_t count, char *why, size_t capacity);
/* The same for kernels whose small tensors are the difference of large terms: measured against an RMS of at least
 * `floor` and a largest value of at least 10 * floor. */
int usp_within_budget_over(const char *name, usp_dtype dtype, const float *given, const double *truth,
                           const double *plain, int64_t count, double floor, char *why, size_t capacity);

#endif
