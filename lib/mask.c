/* mask.c - from (rule, document) to an interval. One formula serves causal and full masks, windows, packed documents,
 * prefixes and trees: a query sees [diagonal - left, diagonal + right], inside of what its document shows it. */
#include "mask.h"

usp_rule usp_rule_of(usp_mask mask, int64_t window_left, int64_t window_right, usp_alignment alignment) {
    int64_t left = window_left == USP_NO_KEYS ? 0 : window_left ? window_left : INT32_MAX;
    int64_t right = window_right == USP_NO_KEYS ? 0 : window_right ? window_right : INT32_MAX;
    return (usp_rule){left, mask == USP_MASK_CAUSAL ? 0 : right, alignment};
}

static int64_t between(int64_t least, int64_t x, int64_t most) {
    return x < least ? least : x > most ? most : x;
}

/* From a query's position to the key position opposite. */
static int64_t shift_of(const usp_rule *rule, const usp_document *d) {
    return rule->alignment == USP_ALIGN_TOP_LEFT ? d->key_begin - d->begin : d->key_end - d->end;
}

static int64_t low_of(const usp_rule *rule, const usp_document *d, int64_t diagonal) {
    return between(d->root, diagonal - rule->left, d->key_end);
}

static int64_t high_of(const usp_rule *rule, const usp_document *d, int64_t diagonal) {
    return between(d->key_begin + d->prefix - 1, diagonal + rule->right, d->key_end - 1);
}

/* How many of start, start + stride, ... from index i on lie before `end`, at most those left of the segment. */
static int64_t count_before(const usp_segment *segment, int64_t i, int64_t end) {
    int64_t room = end - (segment->start + i * segment->stride);
    return between(0, (room + segment->stride - 1) / segment->stride, segment->length - i);
}

int64_t usp_mask_sight(const usp_rule *rule, const usp_document_list *documents, const usp_segment *queries,
                       int64_t near, usp_sight to) {
    const usp_document *d = documents->document + usp_documents_find(documents, queries->start, near);
    for (int64_t i = 0; i < queries->length; d++) {
        int64_t end = i + count_before(queries, i, d->end), shift = shift_of(rule, d);
        for (; i < end; i++) {
            int64_t diagonal = queries->start + i * queries->stride + shift;
            to.low[i] = (int32_t)low_of(rule, d, diagonal);
            to.high[i] = (int32_t)high_of(rule, d, diagonal);
            if (to.diagonal) to.diagonal[i] = (int32_t)diagonal;
        }
    }
    return d - 1 - documents->document;
}

int64_t usp_mask_lasts(const usp_document_list *documents, const usp_segment *keys, int64_t near, int32_t *last) {
    const usp_document *d = documents->document + usp_documents_find(documents, keys->start, near);
    for (int64_t i = 0; i < keys->length; d++) {
        int64_t end = i + count_before(keys, i, d->end);
        for (; i < end; i++) last[i] = (int32_t)(d->last - 1);
    }
    return d - 1 - documents->document;
}

int64_t usp_mask_pairs(const usp_rule *rule, const usp_document_list *documents, int64_t x) {
    const usp_document *d = documents->document + usp_documents_find(documents, x, 0);
    int64_t diagonal = x + shift_of(rule, d);
    if (d->parent >= 0) return d->depth + x - d->begin + 1; /* of its ancestors all, of their other descendants none */
    return high_of(rule, d, diagonal) - low_of(rule, d, diagonal) + 1;
}
