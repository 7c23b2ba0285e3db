/* graph.h - passes recorded once as a CUDA graph, then launched again and again without the host's part of every call.
 * Built without CUDA there are none, and begin says so. */
#ifndef USP_GRAPH_H
#define USP_GRAPH_H
#include "tool.h"

typedef struct usp_graph usp_graph;

/* What is enqueued on `stream` from begin to end is recorded and not run. Every begin that was OK is ended, also after
 * a failure between the two; *graph is then NULL. What the first launch would have to prepare is enqueued by end. */
usp_status usp_graph_begin(usp_stream stream, usp_tool_error *error);
usp_status usp_graph_end(usp_stream stream, usp_graph **graph, usp_tool_error *error);
usp_status usp_graph_launch(usp_graph *graph, usp_stream stream, usp_tool_error *error);
void usp_graph_destroy(usp_graph *graph); /* accepts NULL */

#endif
