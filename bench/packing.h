/* packing.h - the documents of a case: lengths by a rule, the same on all ranks.
 * It knows nothing of layouts. */
#ifndef USP_PACKING_H
#define USP_PACKING_H
#include "tool.h"

/* Lengths one after the other, until the tokens are used up; the last one is cut. */
typedef struct usp_document_rule {
    int64_t least, most; /* random between these; 0: not */
    usp_list lengths;    /* in turn; empty: not. Neither: one document */
} usp_document_rule;

/* "256:16384", or lengths as "100,20,7"; 1 on success. */
int usp_document_rule_parse(const char *text, usp_document_rule *rule);

/* The ends of `*count` documents in `tokens` tokens, or NULL and 0 where the rule has none. To be freed. */
usp_status usp_documents_make(const usp_document_rule *rule, int64_t tokens, usp_tool_error *error, int64_t **ends,
                              int64_t *count);

/* Which document each token is in, -1 behind the last one; [tokens], to be freed. NULL without documents. */
usp_status usp_documents_number(const int64_t *ends, int64_t count, int64_t tokens, usp_tool_error *error,
                                int32_t **document);

#endif
