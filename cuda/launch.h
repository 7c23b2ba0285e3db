/* launch.h - a GPU's limits, and the launchers that belong to no kind of attention, as device.c calls them.
 * They run on the thread's current GPU and check nothing about their arguments. */
#ifndef USP_CUDA_LAUNCH_H
#define USP_CUDA_LAUNCH_H

#ifdef __cplusplus
extern "C" {
#endif
#include "device.h"

/* What decides which kernels a GPU can run, and how they are launched. Read once, when a device is made. */
typedef struct usp_gpu {
    int capability; /* of its architecture, 10 x major + minor */
    int processors;
    size_t shared;    /* bytes of shared memory that one thread block may have */
    void *encode_map; /* the driver's cuTensorMapEncodeTiled; NULL: it has none */
} usp_gpu;

const usp_gpu *usp_cuda_gpu(const usp_device *device);

/* What a .cu file is compiled for (meson.build lists it): sm_80 and all that came later; sm_90a, whose code runs on
 * that alone. A file's family names its target in its table. */
typedef enum usp_cuda_target { USP_SM_80 = 80, USP_SM_90A = 90 } usp_cuda_target;

static inline int usp_gpu_runs(const usp_gpu *gpu, usp_cuda_target target) {
    return target == USP_SM_90A ? gpu->capability == 90 : gpu->capability >= (int)target;
}

/* Thread blocks of one launch: as many as a grid takes in x. What needs more is launched in parts; tests give less. */
enum { USP_CUDA_GRID = INT32_MAX };

/* Elements, or 16-byte pieces of rows, of one launch: so few that kernels divide 32-bit numbers. A row has fewer. */
enum { USP_COPY_UNITS = 1 << 30 };

/* `most`: USP_COPY_UNITS. */
usp_status usp_cuda_copy_rows(const usp_copy *copies, int count, int64_t most, usp_stream stream);
usp_status usp_cuda_scale(float *data, int64_t count, float factor, usp_stream stream);
/* Zeros, in the order of the stream: sooner than the runtime's memset, behind which a kernel begins late. */
usp_status usp_cuda_clear(int *words, int64_t count, usp_stream stream);

#ifdef __cplusplus
}
#endif
#endif
