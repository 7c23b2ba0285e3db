/* launch.h - the launchers that belong to no kind of attention, as device.c calls them.
 * They run on the thread's current GPU and check nothing about their arguments. */
#ifndef USP_CUDA_LAUNCH_H
#define USP_CUDA_LAUNCH_H

#ifdef __cplusplus
extern "C" {
#endif
#include "device.h"

/* Shared memory that one block may have on the current GPU; 0 if the GPU does not answer. */
size_t usp_cuda_shared_limit(void);

/* Thread blocks of one launch: as many as a grid takes in x. What needs more is launched in parts; tests give less. */
enum { USP_CUDA_GRID = INT32_MAX };

/* Elements, or 16-byte pieces of rows, of one launch: so few that kernels divide 32-bit numbers. A row has fewer. */
enum { USP_COPY_UNITS = 1 << 30 };

/* `most`: USP_COPY_UNITS. */
usp_status usp_cuda_copy_rows(const usp_copy *copy, int64_t most, usp_stream stream);
usp_status usp_cuda_scale(float *data, int64_t count, float factor, usp_stream stream);

#ifdef __cplusplus
}
#endif
#endif
