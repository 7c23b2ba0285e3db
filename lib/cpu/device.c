/* device.c - the CPU's device table: memory, and streams that are always done.
 * It chooses the panel for this processor once; kernels run in the calling thread. */
#include <string.h>

#include "../error.h"
#include "kernels.h"

enum { USP_CPU_ALIGNMENT = 256 };

/* The address that the host gave is kept just below the aligned one. */
static usp_status cpu_alloc(usp_device *device, size_t bytes, void **memory) {
    size_t extra = USP_CPU_ALIGNMENT + sizeof(void *);
    void *base = NULL;
    *memory = NULL;
    if (bytes > SIZE_MAX - extra) return usp_fail(USP_NO_MEMORY, "cannot allocate %zu bytes of CPU memory", bytes);
    USP_TRY(usp_host_alloc(device->host, bytes + extra, "device memory", &base));
    uintptr_t aligned = ((uintptr_t)base + extra) / USP_CPU_ALIGNMENT * USP_CPU_ALIGNMENT;
    *memory = (void *)aligned;
    memcpy((char *)*memory - sizeof base, &base, sizeof base);
    return USP_OK;
}

static void cpu_free(usp_device *device, void *memory) {
    void *base = NULL;
    if (memory) memcpy(&base, (char *)memory - sizeof base, sizeof base);
    usp_host_free(device->host, base);
}

static usp_status cpu_copy(usp_device *device, void *to, const void *from, size_t bytes, usp_stream stream) {
    (void)device, (void)stream;
    if (bytes) memmove(to, from, bytes);
    return USP_OK;
}

static usp_status cpu_copy_2d(usp_device *device, void *to, size_t to_stride, const void *from, size_t from_stride,
                              size_t bytes, int64_t rows, usp_stream stream) {
    (void)device, (void)stream;
    for (int64_t i = 0; i < rows && bytes; i++)
        memcpy((char *)to + (size_t)i * to_stride, (const char *)from + (size_t)i * from_stride, bytes);
    return USP_OK;
}

static usp_status cpu_zero(usp_device *device, void *memory, size_t bytes, usp_stream stream) {
    (void)device, (void)stream;
    if (bytes) memset(memory, 0, bytes);
    return USP_OK;
}

static usp_status cpu_stream_create(usp_device *device, usp_stream *stream) {
    (void)device;
    *stream = NULL;
    return USP_OK;
}

static void cpu_stream_destroy(usp_device *device, usp_stream stream) {
    (void)device, (void)stream;
}

static usp_status cpu_query(usp_device *device, usp_stream stream, int *busy) {
    (void)device, (void)stream;
    *busy = 0;
    return USP_OK;
}

static usp_status cpu_event_create(usp_device *device, usp_event **event) {
    void *memory = NULL;
    USP_TRY(usp_host_alloc(device->host, 1, "an event", &memory));
    *event = memory;
    return USP_OK;
}

static void cpu_event_destroy(usp_device *device, usp_event *event) {
    usp_host_free(device->host, event);
}

static usp_status cpu_event_record(usp_device *device, usp_event *event, usp_stream stream) {
    (void)device, (void)event, (void)stream;
    return USP_OK;
}

static usp_status cpu_event_wait(usp_device *device, usp_event *event, usp_stream stream) {
    (void)device, (void)event, (void)stream;
    return USP_OK;
}

static usp_status cpu_event_query(usp_device *device, usp_event *event, int *busy) {
    (void)device, (void)event;
    *busy = 0;
    return USP_OK;
}

static usp_status cpu_capturing(usp_device *device, usp_stream stream, int *yes) {
    (void)device, (void)stream;
    *yes = 0;
    return USP_OK;
}

static usp_status cpu_supports(usp_device *device, const usp_kernel_shape *shape) {
    int wide = shape->dim > USP_CPU_DIM;
    (void)device;
    if (wide || shape->value_dim > USP_CPU_DIM)
        return usp_fail(USP_UNSUPPORTED, "%s is %d: the CPU kernels take up to %d", wide ? "head_dim" : "value_dim",
                        wide ? shape->dim : shape->value_dim, USP_CPU_DIM);
    return USP_OK;
}

/* Scratch holds all tiles of one kernel: rows, columns and totals of both dims and three tiles of scores; linear ones
 * have one total, two tiles of scores and some lines of a state less. */
static usp_kernel_needs cpu_needs(usp_device *device, const usp_kernel_shape *shape) {
    int block = usp_cpu_block(shape->dim, shape->value_dim);
    int dims = usp_cpu_pad(shape->dim) + usp_cpu_pad(shape->value_dim);
    (void)device;
    return (usp_kernel_needs){.scratch = sizeof(float) * (size_t)(block * (3 * dims + 3 * block)), .items = 1};
}

/* Inside a block the CPU compares all pairs of rows: short blocks cost least. */
static int64_t cpu_linear_block(usp_device *device, int64_t rows) {
    (void)device, (void)rows;
    return 64;
}

static usp_status cpu_scale(usp_device *device, float *data, int64_t count, float factor, usp_stream stream) {
    (void)device, (void)stream;
    for (int64_t i = 0; i < count; i++) data[i] *= factor;
    return USP_OK;
}

static void cpu_destroy(usp_device *device) {
    if (device) usp_host_free(device->host, device);
}

static const usp_device_ops cpu_ops = {
    .name = "cpu",
    .kind = USP_DEVICE_CPU,
    .alloc = cpu_alloc,
    .free = cpu_free,
    .copy = cpu_copy,
    .copy_2d = cpu_copy_2d,
    .zero = cpu_zero,
    .alloc_host = cpu_alloc,
    .free_host = cpu_free,
    .stream_create = cpu_stream_create,
    .stream_destroy = cpu_stream_destroy,
    .query = cpu_query,
    .event_create = cpu_event_create,
    .event_destroy = cpu_event_destroy,
    .event_record = cpu_event_record,
    .event_wait = cpu_event_wait,
    .event_query = cpu_event_query,
    .capturing = cpu_capturing,
    .supports = cpu_supports,
    .needs = cpu_needs,
    .copy_rows = usp_cpu_copy_rows,
    .softmax_forward = usp_cpu_softmax_forward,
    .softmax_delta = usp_cpu_softmax_delta,
    .softmax_backward = usp_cpu_softmax_backward,
    .softmax_sinks = usp_cpu_softmax_sinks,
    .softmax_peaks = usp_cpu_softmax_peaks,
    .linear_block = cpu_linear_block,
    .linear_totals = usp_cpu_linear_totals,
    .linear_scan = usp_cpu_linear_scan,
    .linear_output = usp_cpu_linear_output,
    .linear_apply = usp_cpu_linear_apply,
    .scale = cpu_scale,
    .destroy = cpu_destroy,
};

static const usp_panel *best_panel(void) {
    if (usp_panel_avx512()) return usp_panel_avx512();
    return usp_panel_avx2() ? usp_panel_avx2() : usp_panel_portable();
}

usp_status usp_device_create_cpu(const usp_host *host, usp_device **device) {
    void *memory = NULL;
    *device = NULL;
    USP_TRY(usp_host_alloc(host, sizeof(usp_cpu_device), "the CPU device", &memory));
    usp_cpu_device *cpu = memory;
    cpu->base.ops = &cpu_ops;
    cpu->base.host = host;
    cpu->panel = best_panel();
    *device = &cpu->base;
    return USP_OK;
}
