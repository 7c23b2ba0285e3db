/* gpu_test.h - how the entries of the CUDA device are compared with the CPU's: three slabs of memory with one layout,
 * views into them, a run that checks, and a clock. It knows no attention kind.
 *
 * The slabs are `exact` (CPU, f32), `plain` (CPU, the dtype) and one on the GPU. They start as NaN. After a kernel ran
 * on all three, outputs are compared, every other byte of the GPU's slab must be what it was, and a second run must
 * give the same bytes. */
#ifndef USP_TESTS_GPU_TEST_H
#define USP_TESTS_GPU_TEST_H
#include "device.h"

enum { USP_GPU_OUTPUTS = 18, USP_GPU_ROOM = 192 << 20, USP_GPU_SCRATCH = 1 << 18 };

/* A device, the memory of its slab, and the dtype in which it computes. */
typedef struct usp_gpu_world {
    usp_device *device;
    usp_stream stream;
    char *base;
    usp_dtype dtype;
    void *scratch; /* USP_GPU_SCRATCH bytes that kernels work in */
} usp_gpu_world;

/* Element [b, t, h, x] is number first + b stride_batch + t stride_token + h stride_head + x from `at`. Every element
 * has four bytes of room, whatever the dtype, so that a view has one place in all slabs. */
typedef struct usp_gpu_view {
    const char *name;
    size_t at, bytes;
    int64_t tokens, first, stride_batch, stride_token, stride_head;
    int batch, heads, dim;
    int wide;      /* fp32 in every world */
    int own;       /* in a unit of each device: written, and not compared */
    int unordered; /* summed in any order: two runs may differ */
    int strict;    /* computed in fp32 all the way: no rounding of a 16-bit dtype is forgiven */
} usp_gpu_view;

typedef struct usp_gpu_test {
    usp_gpu_world exact, plain, gpu;
    char *before, *after, *again; /* the GPU's slab on the host */
    char *free_to_write;          /* by byte of the slab */
    size_t used;
    const usp_gpu_view *output[USP_GPU_OUTPUTS];
    int outputs;
    char name[160];
    uint64_t random;
    int cases, every; /* so far; of those with usp_gpu_run, and of poisoned ones, about one in `every` runs; 0: all */
    int checks, failures;
    double worst; /* largest error over its budget */
} usp_gpu_test;

typedef enum usp_gpu_arrangement { BSHD, BHSD, SBHD, PACKED, ODD, ARRANGEMENTS } usp_gpu_arrangement;

/* ---- cases ---------------------------------------------------------------------------------------------------------
 */

/* Empties the slabs; `dtype` is that of the plain one and of the GPU's. */
void usp_gpu_begin_case(usp_gpu_test *t, usp_dtype dtype);
void usp_gpu_fail(usp_gpu_test *t, const char *what, const char *why);
void usp_gpu_expect(usp_gpu_test *t, int condition, const char *what);

/* Every slab's next `bytes` bytes, poisoned; or filled alike: integers and fp32 tables. */
size_t usp_gpu_take(usp_gpu_test *t, size_t bytes);
size_t usp_gpu_put(usp_gpu_test *t, const void *data, size_t bytes);
/* `room` bytes, of which the first ones are filled. */
size_t usp_gpu_put_part(usp_gpu_test *t, const void *data, size_t bytes, size_t room);

/* PACKED: the middle one of three tensors side by side. ODD: rows apart, and the first one not on any boundary. */
usp_gpu_view usp_gpu_make_view(usp_gpu_test *t, const char *name, usp_gpu_arrangement how, int64_t tokens, int batch,
                               int heads, int dim);
/* Dense fp32 [tokens, batch, heads, dim]. */
usp_gpu_view usp_gpu_make_wide(usp_gpu_test *t, const char *name, int64_t tokens, int batch, int heads, int dim);
int64_t usp_gpu_count(const usp_gpu_view *v);
void *usp_gpu_at(const usp_gpu_world *w, size_t at);
usp_tensor usp_gpu_tensor(const usp_gpu_world *w, const usp_gpu_view *v);

/* Element i of a view, counted in the order of usp_gpu_make_wide, as it lies in a copy of the GPU's slab. */
float usp_gpu_get(const usp_gpu_test *t, const usp_gpu_view *v, const char *slab, int64_t i);
void usp_gpu_set(const usp_gpu_test *t, const usp_gpu_view *v, char *slab, int64_t i, float value);

/* The same numbers, about N(0, size^2), all of which the dtype can hold, for every slab. */
void usp_gpu_fill(usp_gpu_test *t, const usp_gpu_view *v, float size);
float usp_gpu_normal(uint64_t *state);

/* ---- running -------------------------------------------------------------------------------------------------------
 */

typedef usp_status (*usp_gpu_call)(const usp_gpu_world *world, const void *args);

/* Runs one entry in all worlds and checks what the views given by `outputs` (ended by NULL) hold then. fp32 outputs are
 * inputs of what comes next: all slabs go on from the exact ones. */
void usp_gpu_run(usp_gpu_test *t, const char *what, usp_gpu_call call, const void *args,
                 const usp_gpu_view *const *outputs);
/* Whether the case is one of those that run. */
int usp_gpu_is_drawn(const usp_gpu_test *t);
/* On the GPU alone, from `before` to `result`; 0 if it failed. */
int usp_gpu_run_alone(usp_gpu_test *t, const char *what, usp_gpu_call call, const void *args, char *result);
/* Waits for the stream; 0 if `status` or the work failed. */
int usp_gpu_finish(usp_gpu_test *t, const char *what, usp_status status);

/* ---- speed ---------------------------------------------------------------------------------------------------------
 */

/* Median milliseconds of one call. Short calls are timed many at once, so that none waits for the host. */
float usp_gpu_time(usp_gpu_test *t, usp_gpu_call call, const void *args);
/* Of two calls by turns, so that both meet the same clocks: milliseconds of each, and the first one's over the second
 * one's, turn by turn. Median, and what half of all lie between. */
typedef struct usp_gpu_spread {
    float low, median, high;
} usp_gpu_spread;
typedef struct usp_gpu_turns {
    usp_gpu_spread ms[2], ratio;
} usp_gpu_turns;
usp_gpu_turns usp_gpu_time_by_turns(usp_gpu_test *t, const usp_gpu_call call[2], const void *args);
/* What follows lies in the GPU's slab alone: dense [1, tokens, heads, dim], a table, and numbers from its begin to
 * `bytes`. */
usp_gpu_view usp_gpu_timed_view(usp_gpu_test *t, int64_t tokens, int heads, int dim, int wide);
size_t usp_gpu_upload(usp_gpu_test *t, const void *data, size_t bytes);
void usp_gpu_fill_alone(usp_gpu_test *t, size_t bytes);

/* ---- kinds ---------------------------------------------------------------------------------------------------------
 */

void usp_gpu_check_linear(usp_gpu_test *t);
void usp_gpu_check_softmax(usp_gpu_test *t);
/* Only the passes of 16-bit cases, once each. */
void usp_gpu_check_passes(usp_gpu_test *t);
void usp_gpu_check_poison(usp_gpu_test *t);
void usp_gpu_check_repeats(usp_gpu_test *t);
void usp_gpu_check_views(usp_gpu_test *t);
/* Tables on standard output; bytes_per_ms: what a copy on the device reads and writes. */
void usp_gpu_time_linear(usp_gpu_test *t, double bytes_per_ms);
void usp_gpu_time_softmax(usp_gpu_test *t);

#endif
