/* graph.c - see graph.h. The only file of the tools that calls CUDA; a graph is CUDA's own executable graph. */
#include "graph.h"

#ifdef USP_HAVE_CUDA
#include <cuda_runtime_api.h>

static usp_status check(cudaError_t result, const char *what, usp_tool_error *error) {
    if (result == cudaSuccess) return USP_OK;
    return usp_tool_fail(error, USP_DEVICE, "%s: %s", what, cudaGetErrorString(result));
}

usp_status usp_graph_begin(usp_stream stream, usp_tool_error *error) {
    return check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "recording a graph", error);
}

usp_status usp_graph_end(usp_stream stream, usp_graph **graph, usp_tool_error *error) {
    cudaGraph_t recorded = NULL;
    cudaGraphExec_t instance = NULL;
    usp_status status = check(cudaStreamEndCapture(stream, &recorded), "recording a graph", error);
    if (status == USP_OK) status = check(cudaGraphInstantiate(&instance, recorded, 0), "making a graph", error);
    if (status == USP_OK) status = check(cudaGraphUpload(instance, stream), "uploading a graph", error);
    if (recorded) cudaGraphDestroy(recorded);
    *graph = (usp_graph *)instance;
    return status;
}

usp_status usp_graph_launch(usp_graph *graph, usp_stream stream, usp_tool_error *error) {
    return check(cudaGraphLaunch((cudaGraphExec_t)graph, stream), "launching a graph", error);
}

void usp_graph_destroy(usp_graph *graph) {
    if (graph) cudaGraphExecDestroy((cudaGraphExec_t)graph);
}

#else

static usp_status none(usp_tool_error *error) {
    return usp_tool_fail(error, USP_UNSUPPORTED, "built without CUDA: there are no graphs");
}

usp_status usp_graph_begin(usp_stream stream, usp_tool_error *error) {
    (void)stream;
    return none(error);
}

usp_status usp_graph_end(usp_stream stream, usp_graph **graph, usp_tool_error *error) {
    (void)stream;
    *graph = NULL;
    return none(error);
}

usp_status usp_graph_launch(usp_graph *graph, usp_stream stream, usp_tool_error *error) {
    (void)graph, (void)stream;
    return none(error);
}

void usp_graph_destroy(usp_graph *graph) {
    (void)graph;
}
#endif
