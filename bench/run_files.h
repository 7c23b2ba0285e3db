/* run_files.h - the problem that usp_run is given: files to tensors and shapes, and results to files.
 * The same for all ranks of a process; nothing here knows of ranks. */
#ifndef USP_RUN_FILES_H
#define USP_RUN_FILES_H
#include "run_options.h"

typedef struct usp_run {
    const usp_run_options *options;
    usp_npy file[USP_RUN_INPUTS]; /* dense, as [B, S, heads, D] */
    void *result[USP_RUN_FILES];  /* whole tensors, the same, written by rank 0 */
    char converted[512];          /* what files were of another form; "": none */
    usp_dtype dtype;
    usp_npy_type type; /* of results but lse and states */
    int batch, heads, key_heads, value_heads, out_heads, dim, value_dim;
    int64_t tokens, key_tokens;
    float *log_decay, *slopes; /* [out_heads] or NULL */
    int backward, initial_state, final_state;
    int root; /* rank 0 is in this process */
} usp_run;

/* Reads and checks all files, and makes room for the results. */
usp_status usp_run_read(usp_run *run, const usp_run_options *options, usp_tool_error *error);
usp_status usp_run_write(const usp_run *run, usp_tool_error *error);
void usp_run_free(usp_run *run);

/* The same on all ranks: states, and numbers a head. */
int usp_run_is_whole(int file);
/* A number for each token and head: lse and its gradient. */
int usp_run_is_rows(int file);
/* [B, S, heads, D]; rows are [B, heads, S, 1], a state [B, heads, D, E], numbers a head [heads, 1, 1, 1]. */
void usp_run_shape(const usp_run *run, int file, int64_t shape[4]);
/* Bytes of an element while it is worked on. */
size_t usp_run_element(const usp_run *run, int file);

#endif
