/* mask.h - masks as intervals of positions: a layer's rule and a sequence's documents give every query the keys it may
 * see, and in trees every key the queries that may see it. Nothing behind this file knows a mask by name. */
#ifndef USP_MASK_H
#define USP_MASK_H
#include "documents.h"

/* How far a query sees from its diagonal, in its document. */
typedef struct usp_rule {
    int64_t left, right; /* keys before and behind the diagonal; INT32_MAX: all */
    usp_alignment alignment;
} usp_rule;

/* As a layer's configuration says it. */
usp_rule usp_rule_of(usp_mask mask, int64_t window_left, int64_t window_right, usp_alignment alignment);

/* Of the queries at start, start + stride, ...: first and last key position, and the one opposite. Both bounds ascend
 * with the query, over all documents: what plans the work searches in them. `near`: as usp_documents_find has it; the
 * last query's document is returned. */
typedef struct usp_sight {
    int32_t *low, *high, *diagonal;
} usp_sight;
int64_t usp_mask_sight(const usp_rule *rule, const usp_document_list *documents, const usp_segment *queries,
                       int64_t near, usp_sight to);

/* Of the keys at start, start + stride, ...: the last query that may see each. near and what is returned: the same. */
int64_t usp_mask_lasts(const usp_document_list *documents, const usp_segment *keys, int64_t near, int32_t *last);

/* Pairs of one query at position x. */
int64_t usp_mask_pairs(const usp_rule *rule, const usp_document_list *documents, int64_t x);

#endif
