/* gpu_streams.h - bodies for usp_ranks_run on GPUs: graphs and streams. Empty, but for streams that are NULL, in a
 * build without CUDA (gpu_no_streams.c). */
#ifndef USP_TESTS_GPU_STREAMS_H
#define USP_TESTS_GPU_STREAMS_H
#include "bodies.h"

usp_status usp_gpu_stream_create(usp_stream *stream);
void usp_gpu_stream_destroy(usp_stream stream);

/* Replayed graphs give the results of the calls themselves, with other documents too. argument: none. */
int usp_body_graphs(usp_rank *rank, void *argument);
/* A layer gives the same bits alone and beside another one on another stream. argument: none. */
int usp_body_streams(usp_rank *rank, void *argument);
/* Calls of two layers, forward and backward, on three streams in random order end, and leave results as they are.
 * argument: const int *, how many. */
int usp_body_interleavings(usp_rank *rank, void *argument);

#endif
