/* run_lists.h - options of usp_run that are lists of numbers.
 * Each call leaves the program with a message on what is none; `text` is taken apart. */
#ifndef USP_RUN_LISTS_H
#define USP_RUN_LISTS_H
#include "run_options.h"

struct argp_state;

/* "alibi", or numbers from `least` to `most`, the first one excluded. */
void usp_run_parse_heads(struct argp_state *state, const char *option, char *text, double least, double most,
                         usp_head_numbers *numbers);
/* Whole numbers, or -1; what they mean is for the library to check. */
void usp_run_parse_documents(struct argp_state *state, const char *option, char *text, usp_document_numbers *numbers);
/* "SEED,OFFSET" or "SEED". */
void usp_run_parse_dropout_state(struct argp_state *state, char *text, uint64_t pair[2]);
void usp_run_parse_segments(struct argp_state *state, const char *option, char *text, usp_rank_segments *segments);

#endif
