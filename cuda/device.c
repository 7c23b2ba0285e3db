/* device.c - the CUDA device table: memory, streams and events of one GPU, and the kernels through their launchers.
 * It decides nothing about kernels: each launcher's file does. */
#include <cuda_runtime_api.h>

#include "device.h"
#include "error.h"
#include "launch.h"
#include "linear.h"
#include "softmax.h"

typedef struct usp_cuda_device {
    usp_device base;
    int index;
    usp_gpu gpu;
} usp_cuda_device;

/* ---- errors ------------------------------------------------------------------------------------------------------ */

/* Records what failed and forgets CUDA's own note of it, which a later launch would take for its own. */
static usp_status fail(const char *what, cudaError_t error) {
    usp_status status = error == cudaErrorMemoryAllocation ? USP_NO_MEMORY : USP_DEVICE;
    cudaGetLastError();
    return usp_fail(status, "%s failed: %s", what, cudaGetErrorString(error));
}

static usp_status check(const char *what, cudaError_t error) {
    return error == cudaSuccess ? USP_OK : fail(what, error);
}

/* Ranks may be threads on several GPUs, and the current GPU belongs to the thread: every entry begins here. */
static usp_status enter(const usp_device *device) {
    return check("cudaSetDevice", cudaSetDevice(((const usp_cuda_device *)device)->index));
}

const usp_gpu *usp_cuda_gpu(const usp_device *device) {
    return &((const usp_cuda_device *)device)->gpu;
}

/* ---- memory ------------------------------------------------------------------------------------------------------ */

static usp_status cuda_alloc(usp_device *device, size_t bytes, void **memory) {
    USP_TRY(enter(device));
    cudaError_t error = cudaMalloc(memory, bytes > 0 ? bytes : 1);
    if (error == cudaSuccess) return USP_OK;
    cudaGetLastError();
    return usp_fail(error == cudaErrorMemoryAllocation ? USP_NO_MEMORY : USP_DEVICE,
                    "cannot allocate %zu bytes on GPU %d: %s", bytes, ((usp_cuda_device *)device)->index,
                    cudaGetErrorString(error));
}

static void cuda_free(usp_device *device, void *memory) {
    if (memory != NULL && enter(device) == USP_OK) cudaFree(memory);
}

static usp_status cuda_copy(usp_device *device, void *to, const void *from, size_t bytes, usp_stream stream) {
    if (bytes == 0) return USP_OK;
    USP_TRY(enter(device));
    return check("cudaMemcpyAsync", cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream));
}

static usp_status cuda_copy_2d(usp_device *device, void *to, size_t to_stride, const void *from, size_t from_stride,
                               size_t bytes, int64_t rows, usp_stream stream) {
    if (bytes == 0 || rows == 0) return USP_OK;
    USP_TRY(enter(device));
    return check("cudaMemcpy2DAsync",
                 cudaMemcpy2DAsync(to, to_stride, from, from_stride, bytes, (size_t)rows, cudaMemcpyDefault, stream));
}

static usp_status cuda_zero(usp_device *device, void *memory, size_t bytes, usp_stream stream) {
    if (bytes == 0) return USP_OK;
    USP_TRY(enter(device));
    return check("cudaMemsetAsync", cudaMemsetAsync(memory, 0, bytes, stream));
}

static usp_status cuda_alloc_host(usp_device *device, size_t bytes, void **memory) {
    USP_TRY(enter(device));
    cudaError_t error = cudaMallocHost(memory, bytes > 0 ? bytes : 1);
    if (error == cudaSuccess) return USP_OK;
    cudaGetLastError();
    return usp_fail(error == cudaErrorMemoryAllocation ? USP_NO_MEMORY : USP_DEVICE,
                    "cannot allocate %zu bytes of page-locked memory: %s", bytes, cudaGetErrorString(error));
}

static void cuda_free_host(usp_device *device, void *memory) {
    if (memory != NULL && enter(device) == USP_OK) cudaFreeHost(memory);
}

/* ---- streams and events ------------------------------------------------------------------------------------------ */

/* For transfers: they should start before the kernels that fill the GPU, and never wait for the default stream. */
static usp_status cuda_stream_create(usp_device *device, usp_stream *stream) {
    int lowest, highest;
    USP_TRY(enter(device));
    USP_TRY(check("cudaDeviceGetStreamPriorityRange", cudaDeviceGetStreamPriorityRange(&lowest, &highest)));
    return check("cudaStreamCreateWithPriority", cudaStreamCreateWithPriority(stream, cudaStreamNonBlocking, highest));
}

static void cuda_stream_destroy(usp_device *device, usp_stream stream) {
    if (stream != NULL && enter(device) == USP_OK) cudaStreamDestroy(stream);
}

static usp_status busy_status(const char *what, cudaError_t error, int *busy) {
    *busy = error == cudaErrorNotReady;
    if (*busy) {
        cudaGetLastError();
        return USP_OK;
    }
    return check(what, error);
}

/* A query may come from a watchdog while another thread captures a graph, which it must not spoil: hence relaxed. */
static usp_status cuda_query(usp_device *device, usp_stream stream, int *busy) {
    enum cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    USP_TRY(enter(device));
    USP_TRY(check("cudaThreadExchangeStreamCaptureMode", cudaThreadExchangeStreamCaptureMode(&mode)));
    usp_status status = busy_status("work on the stream", cudaStreamQuery(stream), busy);
    cudaThreadExchangeStreamCaptureMode(&mode);
    return status;
}

static usp_status cuda_event_create(usp_device *device, usp_event **event) {
    USP_TRY(enter(device));
    return check("cudaEventCreateWithFlags", cudaEventCreateWithFlags((cudaEvent_t *)event, cudaEventDisableTiming));
}

static void cuda_event_destroy(usp_device *device, usp_event *event) {
    if (event != NULL && enter(device) == USP_OK) cudaEventDestroy((cudaEvent_t)event);
}

static usp_status cuda_event_record(usp_device *device, usp_event *event, usp_stream stream) {
    USP_TRY(enter(device));
    return check("cudaEventRecord", cudaEventRecord((cudaEvent_t)event, stream));
}

static usp_status cuda_event_wait(usp_device *device, usp_event *event, usp_stream stream) {
    USP_TRY(enter(device));
    return check("cudaStreamWaitEvent", cudaStreamWaitEvent(stream, (cudaEvent_t)event, 0));
}

static usp_status cuda_event_query(usp_device *device, usp_event *event, int *busy) {
    enum cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    USP_TRY(enter(device));
    USP_TRY(check("cudaThreadExchangeStreamCaptureMode", cudaThreadExchangeStreamCaptureMode(&mode)));
    usp_status status = busy_status("work before the event", cudaEventQuery((cudaEvent_t)event), busy);
    cudaThreadExchangeStreamCaptureMode(&mode);
    return status;
}

static usp_status cuda_capturing(usp_device *device, usp_stream stream, int *yes) {
    enum cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
    USP_TRY(enter(device));
    USP_TRY(check("cudaStreamIsCapturing", cudaStreamIsCapturing(stream, &capture)));
    *yes = capture == cudaStreamCaptureStatusActive;
    return USP_OK;
}

/* ---- kernels ----------------------------------------------------------------------------------------------------- */

static usp_status cuda_supports(usp_device *device, const usp_kernel_shape *shape) {
    USP_TRY(enter(device));
    return shape->attention == USP_LINEAR ? usp_cuda_linear_supports(shape)
                                          : usp_cuda_softmax_supports(usp_cuda_gpu(device), shape);
}

static usp_status cuda_copy_rows(usp_device *device, const usp_copy *copies, int count, usp_stream stream) {
    USP_TRY(enter(device));
    return usp_cuda_copy_rows(copies, count, USP_COPY_UNITS, stream);
}

static usp_status cuda_softmax_forward(usp_device *device, const usp_softmax *softmax, usp_stream stream) {
    USP_TRY(enter(device));
    return usp_cuda_softmax_forward(usp_cuda_gpu(device), softmax, stream);
}

static usp_status cuda_softmax_delta(usp_device *device, const usp_softmax *softmax, float *delta, usp_stream stream) {
    USP_TRY(enter(device));
    return usp_cuda_softmax_delta(softmax, delta, stream);
}

static usp_status cuda_softmax_backward(usp_device *device, const usp_softmax *softmax, usp_stream stream) {
    USP_TRY(enter(device));
    return usp_cuda_softmax_backward(usp_cuda_gpu(device), softmax, stream);
}

static usp_status cuda_softmax_sinks(usp_device *device, const usp_softmax *softmax, float *gradient,
                                     usp_stream stream) {
    USP_TRY(enter(device));
    return usp_cuda_softmax_sinks(softmax, gradient, stream);
}

static usp_status cuda_softmax_peaks(usp_device *device, const usp_softmax *softmax, float *most, usp_stream stream) {
    USP_TRY(enter(device));
    return usp_cuda_softmax_peaks(softmax, most, stream);
}

/* About two for each of a Hopper's processors. */
enum { BUSY_ITEMS = 256 };

static usp_kernel_needs cuda_needs(usp_device *device, const usp_kernel_shape *shape) {
    return (usp_kernel_needs){.scratch = shape->attention == USP_SOFTMAX ? USP_WGMMA_SCRATCH : 0,
                              .items = BUSY_ITEMS,
                              .query_sums = usp_cuda_softmax_sums_queries(usp_cuda_gpu(device), shape)};
}

/* Longer blocks move fewer states through memory, shorter ones give short inputs enough blocks to fill the GPU; the
 * steps are where the one began to win over the other (docs/performance-log.md). */
static int64_t cuda_linear_block(usp_device *device, int64_t rows) {
    (void)device;
    return rows <= 1024 ? 64 : rows <= 2048 ? 128 : rows <= 8192 ? 256 : 512;
}

static usp_status cuda_linear_totals(usp_device *device, const usp_linear *linear, usp_stream stream) {
    USP_TRY(enter(device));
    return usp_cuda_linear(usp_cuda_gpu(device), linear, USP_CALL_TOTALS, USP_CUDA_GRID, stream);
}

static usp_status cuda_linear_scan(usp_device *device, const usp_scan *scan, usp_stream stream) {
    USP_TRY(enter(device));
    return usp_cuda_linear_scan(scan, stream);
}

static usp_status cuda_linear_output(usp_device *device, const usp_linear *linear, usp_stream stream) {
    USP_TRY(enter(device));
    return usp_cuda_linear(usp_cuda_gpu(device), linear, USP_CALL_OUTPUT, USP_CUDA_GRID, stream);
}

static usp_status cuda_linear_apply(usp_device *device, const usp_linear *linear, usp_stream stream) {
    USP_TRY(enter(device));
    return usp_cuda_linear(usp_cuda_gpu(device), linear, USP_CALL_APPLY, USP_CUDA_GRID, stream);
}

static usp_status cuda_scale(usp_device *device, float *data, int64_t count, float factor, usp_stream stream) {
    USP_TRY(enter(device));
    return usp_cuda_scale(data, count, factor, stream);
}

/* ---- the table --------------------------------------------------------------------------------------------------- */

static void cuda_destroy(usp_device *device) {
    if (device != NULL) usp_host_free(device->host, device);
}

static const usp_device_ops cuda_ops = {
    .name = "cuda",
    .kind = USP_DEVICE_CUDA,
    .alloc = cuda_alloc,
    .free = cuda_free,
    .alloc_host = cuda_alloc_host,
    .free_host = cuda_free_host,
    .copy = cuda_copy,
    .copy_2d = cuda_copy_2d,
    .zero = cuda_zero,
    .stream_create = cuda_stream_create,
    .stream_destroy = cuda_stream_destroy,
    .query = cuda_query,
    .event_create = cuda_event_create,
    .event_destroy = cuda_event_destroy,
    .event_record = cuda_event_record,
    .event_wait = cuda_event_wait,
    .event_query = cuda_event_query,
    .capturing = cuda_capturing,
    .supports = cuda_supports,
    .needs = cuda_needs,
    .copy_rows = cuda_copy_rows,
    .softmax_forward = cuda_softmax_forward,
    .softmax_delta = cuda_softmax_delta,
    .softmax_backward = cuda_softmax_backward,
    .softmax_sinks = cuda_softmax_sinks,
    .softmax_peaks = cuda_softmax_peaks,
    .linear_block = cuda_linear_block,
    .linear_totals = cuda_linear_totals,
    .linear_scan = cuda_linear_scan,
    .linear_output = cuda_linear_output,
    .linear_apply = cuda_linear_apply,
    .scale = cuda_scale,
    .destroy = cuda_destroy,
};

/* The driver's entry by its name, or NULL: the library does not link the driver. */
static void *driver_entry(const char *name) {
    enum cudaDriverEntryPointQueryResult found;
    void *entry = NULL;
    cudaError_t error = cudaGetDriverEntryPointByVersion(name, &entry, 12000, cudaEnableDefault, &found);
    if (error == cudaSuccess && found == cudaDriverEntryPointSuccess) return entry;
    cudaGetLastError();
    return NULL;
}

/* The thread's GPU and its limits; UNSUPPORTED with the reason unless the kernels are built for it. */
static usp_status current_gpu(int *index, usp_gpu *gpu) {
    int major = 0, minor = 0, processors = 0, shared = 0;
    const struct {
        enum cudaDeviceAttr attribute;
        int *value;
    } limits[] = {{cudaDevAttrComputeCapabilityMajor, &major},
                  {cudaDevAttrComputeCapabilityMinor, &minor},
                  {cudaDevAttrMultiProcessorCount, &processors},
                  {cudaDevAttrMaxSharedMemoryPerBlockOptin, &shared}};
    cudaError_t error = cudaGetDevice(index);
    for (size_t i = 0; i < sizeof limits / sizeof limits[0] && error == cudaSuccess; i++)
        error = cudaDeviceGetAttribute(limits[i].value, limits[i].attribute, *index);
    if (error != cudaSuccess) {
        cudaGetLastError();
        return usp_fail(USP_UNSUPPORTED, "no usable GPU: %s", cudaGetErrorString(error));
    }
    *gpu = (usp_gpu){10 * major + minor, processors, (size_t)shared, driver_entry("cuTensorMapEncodeTiled")};
    if (usp_gpu_runs(gpu, USP_SM_80)) return USP_OK;
    return usp_fail(USP_UNSUPPORTED, "GPU %d has compute capability %d.%d; the kernels need 8.0", *index, major, minor);
}

usp_status usp_device_create_cuda(const usp_host *host, usp_device **device) {
    int index = 0;
    usp_gpu gpu;
    void *memory = NULL;
    USP_TRY(current_gpu(&index, &gpu));
    USP_TRY(usp_host_alloc(host, sizeof(usp_cuda_device), "the device", &memory));
    usp_cuda_device *cuda = memory;
    *cuda = (usp_cuda_device){{&cuda_ops, host}, index, gpu};
    *device = &cuda->base;
    return USP_OK;
}

int usp_device_count_cuda(void) {
    int count = 0;
    if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
    cudaGetLastError();
    return 0;
}

usp_status usp_device_select_cuda(int index) {
    int count = 0;
    cudaError_t error = cudaGetDeviceCount(&count);
    if (error != cudaSuccess) {
        cudaGetLastError();
        return usp_fail(USP_UNSUPPORTED, "no usable GPU: %s", cudaGetErrorString(error));
    }
    USP_REQUIRE(index >= 0 && index < count, "GPU %d does not exist: there are %d", index, count);
    return check("cudaSetDevice", cudaSetDevice(index));
}
