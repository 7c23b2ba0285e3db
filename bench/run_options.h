/* run_options.h - the command line of usp_run.
 * Every option is documented here once, in the text that --help prints. */
#ifndef USP_RUN_OPTIONS_H
#define USP_RUN_OPTIONS_H
#include "ranks.h"
#include "tensor_file.h"

/* All tensors and states that can be a file; the first eight are read, the rest written. */
enum {
    USP_RUN_Q,
    USP_RUN_K,
    USP_RUN_V,
    USP_RUN_DOUT,
    USP_RUN_INITIAL_STATE,
    USP_RUN_DFINAL_STATE,
    USP_RUN_SINKS,
    USP_RUN_DLSE,
    USP_RUN_OUT,
    USP_RUN_LSE,
    USP_RUN_DQ,
    USP_RUN_DK,
    USP_RUN_DV,
    USP_RUN_FINAL_STATE,
    USP_RUN_DINITIAL_STATE,
    USP_RUN_DSINKS,
    USP_RUN_MAX_LOGIT,
    USP_RUN_FILES,
    USP_RUN_INPUTS = USP_RUN_OUT
};

/* Numbers a head: by slopes, or as given, 1 for all heads. */
typedef struct usp_head_numbers {
    int alibi, count;
    float *item;
} usp_head_numbers;

/* Numbers a document; none: not given. */
typedef struct usp_document_numbers {
    int64_t count, *item;
} usp_document_numbers;

/* A custom layout's segments: rank r owns segment[first[r]] .. segment[first[r + 1] - 1]. No lists: not given. */
typedef struct usp_rank_segments {
    int64_t lists, *first;
    usp_segment *segment;
} usp_rank_segments;

typedef struct usp_run_options {
    usp_ranks_config ranks;
    const char *path[USP_RUN_FILES];
    usp_order order;                                        /* of the axes of files */
    int ulysses, ring;                                      /* 0: what is left of the ranks; both 0: ring over all */
    int layout;                                             /* usp_layout */
    usp_document_numbers ends, key_ends, prefixes, parents; /* as in usp_documents */
    usp_rank_segments segments, key_segments;
    usp_attention kind;
    usp_mask mask;
    int dtype;              /* usp_dtype, or -1: as the files */
    usp_layer_config layer; /* its fields that are options */
    int verbose;
    usp_head_numbers decay, slopes; /* lambda; ALiBi */
    uint64_t dropout_state[2];      /* seed, offset */
} usp_run_options;

/* Leaves the program with a message on a wrong command line, or after --help and --version. */
void usp_run_options_parse(usp_run_options *options, int argc, char **argv);
void usp_run_options_free(usp_run_options *options);
/* The option's name of a file: "dq". */
const char *usp_run_file_name(int file);

#endif
