/* documents.c - checks documents, keeps them, and finds the one that holds a token. */
#include "documents.h"
#include "error.h"
#include "hash.h"
#include "search.h"

/* ---- checks ------------------------------------------------------------------------------------------------------ */

static usp_status check_ends(const int64_t *ends, int64_t count, int64_t tokens, const char *where, const char *name) {
    for (int64_t d = 0; d < count; d++) {
        USP_REQUIRE(ends[d] >= (d ? ends[d - 1] : 0), "%s%s[%lld] is %lld: ends must ascend", where, name, (long long)d,
                    (long long)ends[d]);
        USP_REQUIRE(ends[d] <= tokens, "%s%s[%lld] is %lld: beyond %lld tokens", where, name, (long long)d,
                    (long long)ends[d], (long long)tokens);
    }
    return USP_OK;
}

static usp_status check_prefixes(const usp_documents *given, const char *where) {
    for (int64_t d = 0; given->prefixes && d < given->count; d++) {
        int64_t length = given->ends[d] - (d ? given->ends[d - 1] : 0);
        USP_REQUIRE(given->prefixes[d] >= 0 && given->prefixes[d] <= length,
                    "%sprefixes[%lld] is %lld: must be in 0 .. %lld, the document's length", where, (long long)d,
                    (long long)given->prefixes[d], (long long)length);
    }
    return USP_OK;
}

/* Depth first: the parent is the document before, or one of its ancestors. */
static usp_status check_parents(const usp_documents *given, const char *where) {
    const int64_t *parents = given->parents;
    for (int64_t d = 0; parents && d < given->count; d++) {
        int64_t ancestor = d - 1;
        USP_REQUIRE(parents[d] >= -1 && parents[d] < d, "%sparents[%lld] is %lld: must be in -1 .. %lld", where,
                    (long long)d, (long long)parents[d], (long long)d - 1);
        while (ancestor >= 0 && ancestor != parents[d]) ancestor = parents[ancestor];
        USP_REQUIRE(ancestor == parents[d],
                    "%sparents[%lld] is %lld: neither the document before nor an ancestor of it", where, (long long)d,
                    (long long)parents[d]);
    }
    return USP_OK;
}

usp_status usp_documents_check(const usp_documents *given, const char *where, int64_t tokens, int64_t keys) {
    USP_REQUIRE(given->count <= INT32_MAX, "%sdocuments is %lld: must be less than 2^31", where,
                (long long)given->count);
    USP_REQUIRE(given->count >= 1 && given->ends, "%sdocument_ends is NULL while documents is %lld", where,
                (long long)given->count);
    USP_REQUIRE(!keys || given->key_ends, "%skey_document_ends is NULL: documents of cross-attention need it", where);
    USP_REQUIRE(keys || !given->key_ends, "%skey_document_ends is given: the keys are the queries", where);
    USP_REQUIRE(!given->prefixes || !given->parents, "%sprefixes is given beside parents", where);
    if (keys && (given->prefixes || given->parents))
        return usp_fail(USP_UNSUPPORTED, "%s%s is given: cross-attention has no rule for it", where,
                        given->prefixes ? "prefixes" : "parents");
    USP_TRY(check_ends(given->ends, given->count, tokens, where, "document_ends"));
    if (given->key_ends) USP_TRY(check_ends(given->key_ends, given->count, keys, where, "key_document_ends"));
    USP_TRY(check_prefixes(given, where));
    return check_parents(given, where);
}

/* ---- the list ---------------------------------------------------------------------------------------------------- */

static usp_document document_of(const usp_document_list *list, const usp_documents *given, int64_t d) {
    const int64_t *key_ends = given->key_ends ? given->key_ends : given->ends;
    usp_document document = {.begin = d ? given->ends[d - 1] : 0,
                             .end = given->ends[d],
                             .key_begin = d ? key_ends[d - 1] : 0,
                             .key_end = key_ends[d],
                             .prefix = given->prefixes ? given->prefixes[d] : 0,
                             .parent = given->parents ? given->parents[d] : -1};
    document.root = document.key_begin;
    document.last = document.end;
    if (document.parent >= 0) {
        const usp_document *parent = &list->document[document.parent];
        document.root = parent->root;
        document.depth = parent->depth + parent->end - parent->begin;
    }
    return document;
}

/* A document comes before its descendants: from the back each one's last is known. */
static void find_families(usp_document_list *list) {
    for (int64_t d = list->count - 1; d >= 0; d--) {
        const usp_document *document = &list->document[d];
        if (document->parent < 0) continue;
        usp_document *parent = &list->document[document->parent];
        if (document->last > parent->last) parent->last = document->last;
    }
}

void usp_documents_set(usp_document_list *list, const usp_documents *given, int64_t tokens, int64_t keys) {
    const usp_documents one = {.count = 1, .ends = &tokens, .key_ends = &keys};
    if (!given->ends) given = &one;
    list->count = given->count;
    for (int64_t d = 0; d < given->count; d++) list->document[d] = document_of(list, given, d);
    find_families(list);
    const usp_document *before = &list->document[list->count - 1];
    list->document[list->count] =
        (usp_document){before->end, tokens, keys, keys, 0, keys, tokens, 0, -1}; /* sees no key */
}

uint64_t usp_documents_hash(uint64_t seed, const usp_document_list *list) {
    return usp_hash(seed, list->document, (size_t)list->count * sizeof *list->document);
}

int64_t usp_documents_find(const usp_document_list *list, int64_t token, int64_t near) {
    int64_t low = near && list->document[near - 1].end <= token ? near : 0, step = 1;
    for (; low + step <= list->count && list->document[low + step - 1].end <= token; step *= 2) low += step;
    int64_t high = usp_least(list->count, low + step - 1);
    while (low < high) {
        int64_t middle = (low + high) / 2;
        if (list->document[middle].end > token)
            high = middle;
        else
            low = middle + 1;
    }
    return low;
}
