/* gpu_no_streams.c - gpu_streams.h in a build without CUDA. */
#include "gpu_streams.h"

usp_status usp_gpu_stream_create(usp_stream *stream) {
    *stream = NULL;
    return USP_OK;
}

void usp_gpu_stream_destroy(usp_stream stream) {
    (void)stream;
}

static int without_cuda(usp_rank *rank) {
    usp_refuse(rank, "CUDA graphs and streams: this program was built without CUDA");
    return 0;
}

int usp_body_graphs(usp_rank *rank, void *argument) {
    (void)argument;
    return without_cuda(rank);
}

int usp_body_streams(usp_rank *rank, void *argument) {
    (void)argument;
    return without_cuda(rank);
}

int usp_body_interleavings(usp_rank *rank, void *argument) {
    (void)argument;
    return without_cuda(rank);
}
