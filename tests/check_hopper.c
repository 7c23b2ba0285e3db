/* check_hopper.c - the kernels for Hopper on an emulated one, against the CPU's, as gpu_kernels.c compares a GPU. What
 * they do not serve the CPU computes on both sides. It needs no GPU; speed and what real memory does are not seen.
 *
 *   check_hopper                              all but poison, warps by turns
 *   check_hopper softmax | views | repeats | jobs | poison
 *   check_hopper schedules [FIXED [DRAWN]]    softmax, some warps held back or ahead: by the first schedules, or all,
 *                                             and by so many that are drawn */
#include <cuda.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../cuda/softmax.h"
#include "emulated/jobs.h"
#include "emulated/schedule.h"
#include "gpu_test.h"

/* ---- the device -------------------------------------------------------------------------------------------------- */

/* As tests/emulated/hopper.h reads it. */
typedef struct map {
    const char *data;
    int64_t extent[4], stride[3], rows;
} map;

static CUresult encode(CUtensorMap *to, CUtensorMapDataType type, cuuint32_t rank, void *data, const cuuint64_t *extent,
                       const cuuint64_t *stride, const cuuint32_t *box, const cuuint32_t *step,
                       CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                       CUtensorMapFloatOOBfill fill) {
    map m = {.data = data, .rows = box[1]};
    cuuint32_t columns = type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32 ? 32 : 64;
    (void)step, (void)interleave, (void)promotion, (void)fill;
    if (rank != 4 || box[0] != columns || swizzle != CU_TENSOR_MAP_SWIZZLE_128B || (uintptr_t)data % 16)
        return CUDA_ERROR_INVALID_VALUE;
    for (int i = 0; i < 4; i++) {
        m.extent[i] = (int64_t)extent[i];
        if (extent[i] == 0) return CUDA_ERROR_INVALID_VALUE;
    }
    for (int i = 0; i < 3; i++) {
        m.stride[i] = (int64_t)stride[i];
        if (stride[i] % 16 || stride[i] >> 40 || (stride[i] == 0 && extent[i + 1] > 1)) return CUDA_ERROR_INVALID_VALUE;
    }
    memcpy(to, &m, sizeof m);
    return CUDA_SUCCESS;
}

static usp_gpu hopper = {90, 2, 227 * 1024, NULL};
static int calls;

/* The two passes keep of a row what suits them: they come from one device. */
static int serves(const usp_softmax *args) {
    return usp_softmax_wgmma.fits(&hopper, args, USP_CALL_FORWARD) &&
           usp_softmax_wgmma.fits(&hopper, args, USP_CALL_BACKWARD);
}

static usp_device *cpu;

static usp_status forward(usp_device *device, const usp_softmax *args, usp_stream stream) {
    (void)device;
    if (!serves(args)) return cpu->ops->softmax_forward(cpu, args, stream);
    calls++;
    usp_emulated_in_order(0);
    return usp_softmax_wgmma.call[USP_CALL_FORWARD](&hopper, args, stream);
}

static usp_status backward(usp_device *device, const usp_softmax *args, usp_stream stream) {
    (void)device;
    if (!serves(args)) return cpu->ops->softmax_backward(cpu, args, stream);
    calls++;
    usp_emulated_in_order(args->deterministic);
    return usp_softmax_wgmma.call[USP_CALL_BACKWARD](&hopper, args, stream);
}

static usp_status delta(usp_device *device, const usp_softmax *args, float *to, usp_stream stream) {
    (void)device;
    return usp_cuda_softmax_delta(args, to, stream);
}

/* The CPU keeps the same of a row in another unit: natural, not base 2. */
static usp_status sinks(usp_device *device, const usp_softmax *args, float *gradient, usp_stream stream) {
    usp_softmax natural = *args;
    int64_t lines = args->batch * args->heads * args->queries;
    float *top = malloc((size_t)lines * sizeof *top + 1);
    (void)device;
    if (!serves(args)) {
        free(top);
        return cpu->ops->softmax_sinks(cpu, args, gradient, stream);
    }
    for (int64_t i = 0; i < lines; i++) top[i] = args->top[i] * 0.6931471805599453f;
    natural.top = top;
    usp_status status = cpu->ops->softmax_sinks(cpu, &natural, gradient, stream);
    free(top);
    return status;
}

/* ---- schedules --------------------------------------------------------------------------------------------------- */

/* Warps of the forward kernel: 0 copies, 1 notes rows, 2 and 3 watch values; of the backward ones: 0 copies, 1 and 2
 * note queries, 3 adds dq; of all: 4 to 7 and 8 to 11 compute. */
static const usp_schedule schedules[] = {
    {"warps 1 to 3 last", 0, 0x00e, 0, 0, 0, 0, 0},
    {"warps 1 to 3 first, all at once", 0x00e, 0, 0, 1, 0, 1, 0},
    {"copies late", 0, 0, 0, 0, 0, 0, 1},
    {"lanes 1 to 31 last", 0, 0, ~1u, 0, 0, 0, 0},
    {"lane 0 last, all at once", 0, 0, 1, 1, 0, 0, 0},
    {"warps 2, 3 last", 0, 0x00c, 0, 0, 0, 0, 0},
    {"warps 2, 3 first", 0x00c, 0, 0, 0, 0, 0, 0},
    {"warps 1, 2 last, all at once", 0, 0x006, 0, 1, 0, 0, 0},
    {"warps 1, 2 first", 0x006, 0, 0, 0, 0, 0, 0},
    {"warp 3 last, all at once", 0, 0x008, 0, 1, 0, 0, 0},
    {"warps 0, 8 to 11 last", 0, 0xf01, 0, 0, 0, 0, 0},
    {"warps 0, 4 to 7 first, all at once", 0x0f1, 0, 0, 1, 0, 1, 0},
};
static const usp_schedule any = {"drawn", 0, 0, 0, 0, 1, 1, 0};
enum { SCHEDULES = sizeof schedules / sizeof *schedules };

/* The same data by all of them. */
static void check_schedule(usp_gpu_test *t, const usp_schedule *schedule, uint64_t seed) {
    int failures = t->failures;
    t->random = 271828182;
    usp_emulated_schedule(schedule, seed);
    usp_gpu_check_passes(t);
    if (t->failures > failures)
        printf("so it was by this schedule: %s, seed %llu\n", schedule->name, (unsigned long long)seed);
}

static void check_schedules(usp_gpu_test *t, int fixed, int drawn) {
    for (int i = 0; i < fixed && i < SCHEDULES; i++) check_schedule(t, &schedules[i], 0);
    for (int seed = 1; seed <= drawn; seed++) check_schedule(t, &any, (uint64_t)seed);
}

/* ---- kinds ------------------------------------------------------------------------------------------------------- */

/* Whatever jobs a block has, and however its warps run. */
static void check_repeats(usp_gpu_test *t) {
    usp_emulated_schedule(&any, 0);
    usp_gpu_check_repeats(t);
}

/* A clean run and a poisoned one add to dq in one order. */
static void check_poison(usp_gpu_test *t) {
    static const usp_schedule drawn = {"drawn, jobs in order", 0, 0, 0, 0, 1, 0, 0};
    usp_emulated_schedule(&drawn, 0);
    usp_gpu_check_poison(t);
}

/* Heads that fill bundles and that do not, items few and many, long heads and short ones. */
static void check_jobs(usp_gpu_test *t) {
    static const int heads[] = {1, 3, 4, 5, 7, 16, 17, 31, 33, 64}, items[] = {1, 2, 5, 32, 130};
    for (size_t h = 0; h < sizeof heads / sizeof *heads; h++)
        for (size_t i = 0; i < sizeof items / sizeof *items; i++)
            for (int way = 0; way < 8; way++) {
                int wrong = usp_emulated_jobs(1 + (way & 1), heads[h], items[i], way >> 1 & 1, way >> 2 ? 65536 : 4096);
                snprintf(t->name, sizeof t->name, "jobs of %d heads with %d items, way %d", heads[h], items[i], way);
                usp_gpu_expect(t, wrong == 0, "each job once");
            }
    calls++;
}

static const struct kind {
    const char *name;
    void (*check)(usp_gpu_test *);
    int asked; /* 1: only where it is asked for */
} kinds[] = {{"softmax", usp_gpu_check_softmax, 0},
             {"views", usp_gpu_check_views, 0},
             {"poison", check_poison, 1},
             {"repeats", check_repeats, 0},
             {"jobs", check_jobs, 0}};

/* One, or all that need not be asked for. */
static void check_kinds(usp_gpu_test *t, const char *name) {
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++)
        if (name ? strcmp(kinds[i].name, name) == 0 : !kinds[i].asked) kinds[i].check(t);
}

/* ---- program ----------------------------------------------------------------------------------------------------- */

static char *host_slab(void) {
    char *slab = calloc(1, USP_GPU_ROOM);
    if (!slab) exit(1);
    return slab;
}

int main(int argc, char **argv) {
    usp_world_config defaults = {.struct_size = sizeof defaults};
    usp_host host = usp_host_from_config(&defaults);
    usp_gpu_test t = {.random = 314159265};
    setvbuf(stdout, NULL, _IOLBF, 0);
    if (usp_device_create_cpu(&host, &cpu) != USP_OK || usp_device_create_cpu(&host, &t.gpu.device) != USP_OK) return 1;
    usp_device_ops ops = *cpu->ops;
    CUresult (*entry)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *, const cuuint64_t *, const cuuint64_t *,
                      const cuuint32_t *, const cuuint32_t *, CUtensorMapInterleave, CUtensorMapSwizzle,
                      CUtensorMapL2promotion, CUtensorMapFloatOOBfill) = encode;
    memcpy(&hopper.encode_map, &entry, sizeof entry);
    ops.softmax_forward = forward;
    ops.softmax_backward = backward;
    ops.softmax_delta = delta;
    ops.softmax_sinks = sinks;
    t.exact.device = t.plain.device = cpu;
    t.gpu.device->ops = &ops;
    t.exact.base = host_slab(), t.plain.base = host_slab(), t.before = host_slab(), t.after = host_slab();
    t.again = host_slab(), t.free_to_write = host_slab(), t.gpu.base = host_slab();
    t.exact.scratch = t.plain.scratch = t.gpu.scratch = aligned_alloc(64, USP_GPU_SCRATCH);
    if (argc > 1 && strcmp(argv[1], "schedules") == 0)
        check_schedules(&t, argc > 2 ? atoi(argv[2]) : SCHEDULES, argc > 3 ? atoi(argv[3]) : 0);
    else
        check_kinds(&t, argc > 1 ? argv[1] : NULL);
    printf("%d checks, %d failed, largest error %.2f of its budget, %d emulated calls\n", t.checks, t.failures, t.worst,
           calls);
    return t.failures > 0 || calls == 0;
}
