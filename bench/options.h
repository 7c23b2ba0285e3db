/* options.h - the command line of usp_bench.
 * Every option is documented here once, in the text that --help prints. */
#ifndef USP_OPTIONS_H
#define USP_OPTIONS_H
#include "packing.h"
#include "ranks.h"

/* One row's configuration: everything but the pass. */
typedef struct usp_case {
    int64_t seq;
    int batch, heads, kv_heads, dim, value_dim;
    usp_dtype dtype;
    usp_attention kind;
    usp_layout layout;
    usp_mask mask;
    int ulysses, ring;
} usp_case;

typedef struct usp_options {
    usp_ranks_config ranks;
    int64_t begin, end, step, factor;         /* step 0: by factor */
    int iterations, warmup, aggregate, check; /* aggregate 0: by the warm-up's time */
    int graphs;                               /* launches of a graph in one iteration; 0: calls, no graph */
    double budget;                            /* seconds a row may take; 0: no limit */
    usp_list ulysses, ring;                   /* both empty: all factorisations */
    usp_list dtypes, kinds, layouts, heads, kv_heads, dims, value_dims, batches;
    usp_mask mask;
    int passes[2];          /* by usp_pass */
    int decay;              /* linear: 1: slopes, where causal */
    int slopes;             /* softmax: 1: ALiBi */
    usp_layer_config layer; /* its fields that are options: of each case those that its kind and mask have */
    usp_document_rule documents;
    int max_documents; /* room for so many; 0: never re-planned */
    int shared_memory, baseline, plan, memory, statistics, quiet, info;
    const char *json, *csv, *commit;
    const char *packed;  /* documents, as given */
    const char *command; /* the whole command line, for the header */
} usp_options;

/* Leaves the program with a message on a wrong command line, or after --help and --version. */
void usp_options_parse(usp_options *options, int argc, char **argv);

#endif
