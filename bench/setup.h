/* setup.h - one case on one rank: mesh, sequence, layer, tensors, and the calls of a pass on them.
 * All device work goes through usp.h. */
#ifndef USP_SETUP_H
#define USP_SETUP_H
#include "graph.h"
#include "options.h"

enum { USP_Q, USP_K, USP_V, USP_O, USP_DOUT, USP_DQ, USP_DK, USP_DV, USP_TENSORS };

typedef struct usp_setup {
    const usp_options *options;
    const usp_case *config;
    usp_rank *rank;
    usp_mesh *mesh;
    usp_sequence *sequence;
    usp_layer *layer;
    usp_layer_config layer_config; /* as given, with its arrays */
    usp_sizes sizes;
    int64_t tokens; /* local */
    float *decay, *slopes, *sinks;
    int64_t *document_end, documents; /* NULL, 0: one */
    void *tensor[USP_TENSORS];        /* on the device, as the next ones */
    size_t bytes[USP_TENSORS];
    void *lse, *sinks_there, *dsinks, *dropout_state;
    void *workspace, *saved;
    size_t workspace_bytes, saved_bytes; /* as allocated */
    int shared;
    usp_graph *graph; /* of `recorded` passes, while they are timed; NULL: they are called */
    int recorded;
} usp_setup;

/* What dropout is given. */
extern const uint64_t usp_setup_dropout_state[2];

/* Collective. All ranks leave with the same verdict. close is fine with what open left after a failure. */
usp_status usp_setup_open(usp_setup *setup);
usp_status usp_setup_close(usp_setup *setup);

/* Enqueues one pass; makes its results what no pass writes. */
usp_status usp_setup_pass(usp_setup *setup, usp_pass pass);
usp_status usp_setup_poison(usp_setup *setup, usp_pass pass);

size_t usp_setup_workspace(const usp_setup *setup, usp_pass pass);
size_t usp_setup_lse_bytes(const usp_setup *setup);
/* A host copy of device memory; NULL of NULL. To be freed. */
usp_status usp_setup_fetch(usp_setup *setup, const void *memory, size_t bytes, void **host);

#endif
