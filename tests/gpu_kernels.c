/* gpu_kernels.c - every entry of the CUDA device against the CPU's on random inputs; with --time, their speed.
 * Exits 0 if all agree and 1 if not; without a GPU it says why and exits 77. It tests kernels, not layers.
 *
 *   gpu_kernels [common | linear | softmax | views | repeats | poison]    checks all entries, or those of one kind
 *   gpu_kernels --every N [...]                     of what is compared with the CPU, or poisoned, about one case in N
 *   gpu_kernels --time [linear | softmax]                                 times them */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../cuda/softmax.h"
#include "gpu_test.h"

enum { SKIPPED = 77 };

/* ---- copies ------------------------------------------------------------------------------------------------------ */

typedef struct copy_test {
    usp_gpu_view from, to;
    usp_dtype from_dtype, to_dtype;
    int accumulate;
    int64_t units;           /* of one launch on the GPU; 0: as many as it takes */
    size_t from_row, to_row; /* maps, where `mapped` */
    int mapped;
} copy_test;

static usp_tensor typed_tensor(const usp_gpu_world *w, const usp_gpu_view *v, usp_dtype dtype) {
    usp_gpu_world typed = *w;
    typed.dtype = dtype;
    return usp_gpu_tensor(&typed, v);
}

static usp_copy copy_args(const usp_gpu_world *w, const copy_test *c) {
    return (usp_copy){.tokens = c->from.tokens,
                      .batch = c->from.batch,
                      .heads = c->from.heads,
                      .dim = c->from.dim,
                      .from_dtype = c->from_dtype,
                      .to_dtype = c->to_dtype,
                      .accumulate = c->accumulate,
                      .from_row = c->mapped & 1 ? usp_gpu_at(w, c->from_row) : NULL,
                      .to_row = c->mapped & 2 ? usp_gpu_at(w, c->to_row) : NULL,
                      .from = typed_tensor(w, &c->from, c->from_dtype),
                      .to = typed_tensor(w, &c->to, c->to_dtype)};
}

static usp_status copy_rows(const usp_gpu_world *w, const void *args) {
    const copy_test *c = args;
    usp_copy a = copy_args(w, c);
    if (c->units > 0 && w->device->ops->kind == USP_DEVICE_CUDA) return usp_cuda_copy_rows(&a, 1, c->units, w->stream);
    return w->device->ops->copy_rows(w->device, &a, 1, w->stream);
}

/* Copies agree to the last bit; `before` of the GPU is the plain slab, which the CPU has changed meanwhile. */
static void check_copy(usp_gpu_test *t, const copy_test *c) {
    memcpy(t->before, t->plain.base, t->used);
    if (copy_rows(&t->plain, c) != USP_OK) usp_gpu_fail(t, "copy_rows", usp_last_error());
    if (!usp_gpu_run_alone(t, "copy_rows", copy_rows, c, t->after)) return;
    t->checks++;
    if (memcmp(t->plain.base, t->after, t->used) != 0) usp_gpu_fail(t, "copy_rows", "differs from the CPU's");
}

static void check_copies(usp_gpu_test *t, usp_gpu_arrangement how, usp_dtype from, usp_dtype to) {
    static const int dims[] = {1, 5, 64, 96};
    for (size_t i = 0; i < sizeof dims / sizeof *dims; i++) {
        for (int accumulate = 0; accumulate <= (to == USP_F32); accumulate++) {
            snprintf(t->name, sizeof t->name, "copy of dtype %d to %d, arrangement %d, dim %d", from, to, how, dims[i]);
            usp_gpu_begin_case(t, from);
            copy_test c = {.from_dtype = from, .to_dtype = to, .accumulate = accumulate};
            c.from = usp_gpu_make_view(t, "from", how, 37, 2, 3, dims[i]);
            c.to = usp_gpu_make_view(t, "to", (how + 1) % ARRANGEMENTS, 37, 2, 3, dims[i]);
            usp_gpu_fill(t, &c.from, 100);
            t->plain.dtype = to;
            usp_gpu_fill(t, &c.to, 1);
            check_copy(t, &c);
        }
    }
}

/* Launches of less than a row, of some heads, of some batch entries and of some tokens. */
static void check_parts(usp_gpu_test *t, usp_dtype to) {
    static const int64_t units[] = {1, 2 * 16, 7 * 16, 20 * 16, 1000};
    for (size_t i = 0; i < sizeof units / sizeof *units; i++) {
        snprintf(t->name, sizeof t->name, "copy of f32 to dtype %d, %lld units a launch", to, (long long)units[i]);
        usp_gpu_begin_case(t, USP_F32);
        copy_test c = {.from_dtype = USP_F32, .to_dtype = to, .units = units[i]};
        c.from = usp_gpu_make_view(t, "from", PACKED, 5, 3, 5, 16);
        c.to = usp_gpu_make_view(t, "to", BHSD, 5, 3, 5, 16);
        usp_gpu_fill(t, &c.from, 100);
        check_copy(t, &c);
    }
}

/* Rows by maps: from a tensor of more rows in any order, to another one's; whole and in parts. */
static void check_maps(usp_gpu_test *t, int dim, int64_t units) {
    enum { TOKENS = 53, ROWS = 60 };
    int32_t map[TOKENS];
    for (int mapped = 1; mapped <= 3; mapped++) {
        snprintf(t->name, sizeof t->name, "copy by maps %d, dim %d, %lld units", mapped, dim, (long long)units);
        usp_gpu_begin_case(t, USP_BF16);
        copy_test c = {.from_dtype = USP_BF16, .to_dtype = USP_BF16, .units = units, .mapped = mapped};
        c.from = usp_gpu_make_view(t, "from", BSHD, ROWS, 2, 3, dim);
        c.to = usp_gpu_make_view(t, "to", BHSD, ROWS, 2, 3, dim);
        for (int i = 0; i < TOKENS; i++) map[i] = (i * 7 + 3) % ROWS;
        c.from_row = usp_gpu_put(t, map, sizeof map);
        for (int i = 0; i < TOKENS; i++) map[i] = (i * 11 + 5) % ROWS;
        c.to_row = usp_gpu_put(t, map, sizeof map);
        usp_gpu_fill(t, &c.from, 100);
        c.from.tokens = TOKENS;
        check_copy(t, &c);
    }
}

enum { LISTED = 40 };

static usp_status copy_list(const usp_gpu_world *w, const void *args) {
    const copy_test *c = args;
    usp_copy list[LISTED];
    for (int i = 0; i < LISTED; i++) list[i] = copy_args(w, &c[i]);
    return w->device->ops->copy_rows(w->device, list, LISTED, w->stream);
}

/* More copies than a launch holds, of several kinds and sizes, empty ones among them. */
static void check_list(usp_gpu_test *t) {
    copy_test c[LISTED];
    snprintf(t->name, sizeof t->name, "a list of %d copies", LISTED);
    usp_gpu_begin_case(t, USP_F32);
    for (int i = 0; i < LISTED; i++) {
        int turned = i % 20 == 19, dim = i % 3 ? 16 : 5;
        c[i] = (copy_test){.from_dtype = USP_F32, .to_dtype = turned ? USP_BF16 : USP_F32, .accumulate = i % 23 == 22};
        c[i].from = usp_gpu_make_view(t, "from", BSHD, i % 7 * 30, 2, 3, dim);
        c[i].to = usp_gpu_make_view(t, "to", BHSD, i % 7 * 30, 2, 3, dim);
        usp_gpu_fill(t, &c[i].from, 100);
        usp_gpu_fill(t, &c[i].to, 1);
    }
    memcpy(t->before, t->plain.base, t->used);
    if (copy_list(&t->plain, c) != USP_OK) usp_gpu_fail(t, "copy_rows", usp_last_error());
    if (!usp_gpu_run_alone(t, "copy_rows", copy_list, c, t->after)) return;
    usp_gpu_expect(t, memcmp(t->plain.base, t->after, t->used) == 0, "the list");
}

/* One token of more elements than 32 bits count. All heads of a batch entry are the same number, so that it needs no
 * room. */
static void check_long_token(usp_gpu_test *t) {
    enum { BATCH = 65537, HEADS = 65536 };
    snprintf(t->name, sizeof t->name, "copy of a token of %d x %d elements", BATCH, HEADS);
    usp_gpu_begin_case(t, USP_F32);
    copy_test c = {.from = usp_gpu_make_view(t, "from", BSHD, 1, BATCH, 1, 1),
                   .to = usp_gpu_make_view(t, "to", BSHD, 1, BATCH, 1, 1)};
    usp_gpu_fill(t, &c.from, 100);
    c.from.heads = c.to.heads = HEADS;
    c.from.stride_head = c.to.stride_head = 0;
    memcpy(t->before, t->plain.base, t->used);
    if (!usp_gpu_run_alone(t, "copy_rows", copy_rows, &c, t->after)) return;
    usp_gpu_expect(t, memcmp(t->after + c.to.at, t->before + c.from.at, BATCH * sizeof(float)) == 0, "the copy");
}

/* ---- the rest of the table --------------------------------------------------------------------------------------- */

static void check_streams(usp_gpu_test *t) {
    usp_device *gpu = t->gpu.device;
    const usp_device_ops *ops = gpu->ops;
    usp_stream stream;
    usp_event *event;
    int busy = 1;
    usp_gpu_expect(t, ops->stream_create(gpu, &stream) == USP_OK, "stream_create");
    usp_gpu_expect(t, ops->event_create(gpu, &event) == USP_OK, "event_create");
    memset(t->before, 7, 1 << 20);
    usp_gpu_expect(t, ops->copy(gpu, t->gpu.base, t->before, 1 << 20, t->gpu.stream) == USP_OK, "copy to the GPU");
    usp_gpu_expect(t, ops->zero(gpu, t->gpu.base, 1 << 19, t->gpu.stream) == USP_OK, "zero");
    usp_gpu_expect(t, ops->event_record(gpu, event, t->gpu.stream) == USP_OK, "event_record");
    usp_gpu_expect(t, ops->event_wait(gpu, event, stream) == USP_OK, "event_wait");
    usp_gpu_expect(t, ops->copy(gpu, t->after, t->gpu.base, 1 << 20, stream) == USP_OK, "copy from the GPU");
    while (busy && ops->query(gpu, stream, &busy) == USP_OK) continue;
    usp_gpu_expect(t, !busy, "query");
    usp_gpu_expect(t, ops->event_query(gpu, event, &busy) == USP_OK && !busy, "event_query");
    usp_gpu_expect(t, t->after[0] == 0 && t->after[(1 << 19) - 1] == 0 && t->after[1 << 19] == 7,
                   "what was copied and zeroed");
    ops->event_destroy(gpu, event);
    ops->stream_destroy(gpu, stream);
}

typedef struct scale_test {
    usp_gpu_view data;
    float factor;
} scale_test;

static usp_status scale(const usp_gpu_world *w, const void *args) {
    const scale_test *s = args;
    return w->device->ops->scale(w->device, usp_gpu_at(w, s->data.at), usp_gpu_count(&s->data), s->factor, w->stream);
}

static void check_scale(usp_gpu_test *t, int count) {
    snprintf(t->name, sizeof t->name, "scale of %d", count);
    usp_gpu_begin_case(t, USP_F32);
    scale_test s = {.data = usp_gpu_make_wide(t, "data", count, 1, 1, 1), .factor = -0.3f};
    usp_gpu_fill(t, &s.data, 1);
    usp_gpu_run(t, "scale", scale, &s, (const usp_gpu_view *[]){&s.data, NULL});
}

/* What no launch can hold is refused by a sentence that names it, and nothing less is. */
static void check_limits(usp_gpu_test *t) {
    static const struct limit {
        usp_kernel_shape most, over;
        const char *named;
    } limits[] = {
        {{USP_SOFTMAX, USP_BF16, 65535, 32768, 64, 64, 0},
         {USP_SOFTMAX, USP_BF16, 65536, 32768, 64, 64, 0},
         "65536 x 32768"},
        {{USP_LINEAR, USP_BF16, 65535, 32768, 8, 8, 0}, {USP_LINEAR, USP_BF16, 65536, 32768, 8, 8, 0}, "65536 x 32768"},
        {{USP_LINEAR, USP_BF16, 65535, 1024, 64, 64, 0}, {USP_LINEAR, USP_BF16, 65536, 1024, 64, 64, 0}, "batch 65536"},
        {{USP_SOFTMAX, USP_F32, 1, 1, 64, 64, 0}, {USP_SOFTMAX, USP_F32, 1, 1, 64, 513, 0}, "513"},
        {{USP_LINEAR, USP_F32, 1, 1, 1024, 64, 0}, {USP_LINEAR, USP_F32, 1, 1, 1025, 64, 0}, "1025"},
    };
    usp_device *gpu = t->gpu.device;
    for (size_t i = 0; i < sizeof limits / sizeof *limits; i++) {
        snprintf(t->name, sizeof t->name, "limit %s", limits[i].named);
        usp_gpu_expect(t, gpu->ops->supports(gpu, &limits[i].most) == USP_OK, "the most");
        usp_gpu_expect(t, gpu->ops->supports(gpu, &limits[i].over) == USP_UNSUPPORTED, "more than the most");
        usp_gpu_expect(t, strstr(usp_last_error(), limits[i].named) != NULL, "the sentence");
    }
}

/* The limits are the GPU's; code runs where its target says; what a smaller GPU has no room for is refused. */
static void check_gpu(usp_gpu_test *t) {
    static const struct target {
        int capability;
        usp_cuda_target target;
        int runs;
    } targets[] = {{75, USP_SM_80, 0},  {80, USP_SM_80, 1},  {90, USP_SM_80, 1},  {100, USP_SM_80, 1},
                   {89, USP_SM_90A, 0}, {90, USP_SM_90A, 1}, {100, USP_SM_90A, 0}};
    const usp_gpu *gpu = usp_cuda_gpu(t->gpu.device);
    usp_kernel_shape shape = {USP_SOFTMAX, USP_F32, 1, 1, 512, 512, 0};
    usp_gpu small = {80, 1, 99 * 1024, NULL};
    snprintf(t->name, sizeof t->name, "limits of the GPU");
    usp_gpu_expect(t, gpu->capability >= 80 && gpu->processors > 0 && gpu->shared >= small.shared, "limits");
    usp_gpu_expect(t, usp_cuda_softmax_supports(&small, &shape) == USP_UNSUPPORTED, "a GPU with less shared memory");
    usp_gpu_expect(t, strstr(usp_last_error(), "101376") != NULL, "the sentence");
    for (size_t i = 0; i < sizeof targets / sizeof *targets; i++) {
        small.capability = targets[i].capability;
        usp_gpu_expect(t, usp_gpu_runs(&small, targets[i].target) == targets[i].runs, "a target");
    }
}

static void check_memory(usp_gpu_test *t) {
    usp_device *gpu = t->gpu.device;
    void *memory = NULL;
    usp_gpu_expect(t, gpu->ops->alloc(gpu, 0, &memory) == USP_OK, "alloc of nothing");
    gpu->ops->free(gpu, memory);
    usp_gpu_expect(t, gpu->ops->alloc(gpu, (size_t)1 << 60, &memory) == USP_NO_MEMORY, "alloc of too much");
    usp_gpu_expect(t, gpu->ops->alloc(gpu, 1000, &memory) == USP_OK && (uintptr_t)memory % 256 == 0,
                   "alloc after a failure");
    gpu->ops->free(gpu, memory);
    usp_gpu_expect(t, gpu->ops->alloc_host(gpu, 0, &memory) == USP_OK, "alloc_host of nothing");
    gpu->ops->free_host(gpu, memory);
    gpu->ops->free_host(gpu, NULL);
    usp_gpu_expect(t, gpu->ops->alloc_host(gpu, 1000, &memory) == USP_OK && memset(memory, 1, 1000) == memory,
                   "alloc_host");
    gpu->ops->free_host(gpu, memory);
}

/* ---- program ----------------------------------------------------------------------------------------------------- */

static void check_common(usp_gpu_test *t) {
    check_memory(t);
    check_limits(t);
    check_gpu(t);
    check_streams(t);
    check_scale(t, 0);
    check_scale(t, 100003);
    for (int how = 0; how < ARRANGEMENTS; how++)
        for (int pair = 0; pair < 9; pair++)
            check_copies(t, (usp_gpu_arrangement)how, (usp_dtype)(pair / 3), (usp_dtype)(pair % 3));
    check_parts(t, USP_F32);
    check_parts(t, USP_BF16);
    check_maps(t, 64, 0);
    check_maps(t, 64, 100);
    check_maps(t, 5, 0);
    check_list(t);
    check_long_token(t);
}

static usp_status copy_half(const usp_gpu_world *w, const void *args) {
    size_t bytes = *(const size_t *)args;
    return w->device->ops->copy(w->device, w->base, w->base + bytes, bytes, w->stream);
}

static double copy_speed(usp_gpu_test *t) {
    size_t half = (size_t)1 << 30;
    usp_gpu_fill_alone(t, 2 * half);
    double bytes_per_ms = 2.0 * (double)half / usp_gpu_time(t, copy_half, &half);
    printf("device copy: %.2f TB/s read and written\n\n", bytes_per_ms / 1e9);
    return bytes_per_ms;
}

static void time_linear(usp_gpu_test *t) {
    usp_gpu_time_linear(t, copy_speed(t));
}

/* What a kind's tests are called, in the order in which they run. */
static const struct kind_tests {
    const char *name;
    void (*check)(usp_gpu_test *);
    void (*time)(usp_gpu_test *); /* NULL: nothing to time */
} kinds[] = {
    {"common", check_common, NULL},
    {"linear", usp_gpu_check_linear, time_linear},
    {"softmax", usp_gpu_check_softmax, usp_gpu_time_softmax},
    {"views", usp_gpu_check_views, NULL},
    {"repeats", usp_gpu_check_repeats, NULL},
    {"poison", usp_gpu_check_poison, NULL},
};
enum { KINDS = sizeof kinds / sizeof *kinds };

typedef struct chosen_tests {
    int time, every, first, end; /* kinds first .. end - 1 */
} chosen_tests;

static void run_chosen(usp_gpu_test *t, const chosen_tests *chosen) {
    for (int i = chosen->first; i < chosen->end; i++) {
        if (!chosen->time) kinds[i].check(t);
        if (chosen->time && kinds[i].time) kinds[i].time(t);
    }
    if (!chosen->time)
        printf("%d checks, %d failed, largest error %.2f of its budget\n", t->checks, t->failures, t->worst);
}

static char *host_slab(void) {
    char *slab = calloc(1, USP_GPU_ROOM);
    if (!slab) exit(1);
    return slab;
}

static int run_tests(usp_gpu_test *t, const chosen_tests *chosen) {
    const usp_device_ops *ops = t->gpu.device->ops;
    size_t gpu_bytes = chosen->time ? (size_t)8 << 30 : USP_GPU_ROOM;
    if (ops->alloc(t->gpu.device, gpu_bytes, (void **)&t->gpu.base) != USP_OK ||
        ops->alloc(t->gpu.device, USP_GPU_SCRATCH, &t->gpu.scratch) != USP_OK ||
        ops->stream_create(t->gpu.device, &t->gpu.stream) != USP_OK) {
        fprintf(stderr, "%s\n", usp_last_error());
        return 1;
    }
    t->exact.base = host_slab(), t->plain.base = host_slab(), t->before = host_slab(), t->after = host_slab();
    t->again = host_slab(), t->free_to_write = host_slab();
    t->exact.scratch = t->plain.scratch = aligned_alloc(64, USP_GPU_SCRATCH);
    if (!t->exact.scratch) exit(1);
    t->every = chosen->every;
    run_chosen(t, chosen);
    free(t->exact.scratch);
    free(t->exact.base), free(t->plain.base), free(t->before), free(t->after), free(t->again), free(t->free_to_write);
    ops->stream_destroy(t->gpu.device, t->gpu.stream);
    ops->free(t->gpu.device, t->gpu.scratch), ops->free(t->gpu.device, t->gpu.base);
    if (!chosen->time && t->checks == 0) printf("no case was drawn\n");
    return t->failures > 0 || (!chosen->time && t->checks == 0);
}

static int read_every(const char *text, int *every) {
    char *end;
    long number = strtol(text, &end, 10);
    *every = (int)number;
    return *text && !*end && number >= 1 && number <= 1000;
}

/* What the arguments ask for; 0 if they are no good. */
static int choose_tests(int arguments, char **argument, chosen_tests *chosen) {
    *chosen = (chosen_tests){.end = KINDS};
    if (arguments > 0 && strcmp(argument[0], "--time") == 0) chosen->time = 1, arguments--, argument++;
    if (arguments > 1 && !chosen->time && strcmp(argument[0], "--every") == 0) {
        if (!read_every(argument[1], &chosen->every)) return 0;
        arguments -= 2, argument += 2;
    }
    for (int i = 0; i < KINDS && arguments == 1; i++)
        if (strcmp(argument[0], kinds[i].name) == 0 && (!chosen->time || kinds[i].time)) {
            chosen->first = i, chosen->end = i + 1;
            return 1;
        }
    return arguments == 0;
}

int main(int argc, char **argv) {
    chosen_tests chosen;
    usp_world_config defaults = {.struct_size = sizeof defaults};
    usp_host host = usp_host_from_config(&defaults);
    usp_gpu_test t = {.random = 314159265};
    setvbuf(stdout, NULL, _IOLBF, 0); /* a run that is stopped has shown what it had */
    if (!choose_tests(argc - 1, argv + 1, &chosen)) {
        fprintf(stderr,
                "usage: %s [--every N] [common | linear | softmax | views | repeats | poison]\n"
                "       %s --time [linear | softmax]\n",
                argv[0], argv[0]);
        return 2;
    }
    if (usp_device_create_cuda(&host, &t.gpu.device) != USP_OK) {
        printf("skipped: %s\n", usp_last_error());
        return SKIPPED;
    }
    if (usp_device_create_cpu(&host, &t.exact.device) != USP_OK) {
        fprintf(stderr, "%s\n", usp_last_error());
        return 1;
    }
    t.plain.device = t.exact.device;
    int result = run_tests(&t, &chosen);
    t.exact.device->ops->destroy(t.exact.device);
    t.gpu.device->ops->destroy(t.gpu.device);
    return result;
}
