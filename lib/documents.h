/* documents.h - the documents of a sequence: where each begins and ends among queries and keys, how far it sees both
 * ways, and behind which it continues. */
#ifndef USP_DOCUMENTS_H
#define USP_DOCUMENTS_H
#include "host.h"

/* A document's queries, keys and, in a tree, family: whose keys it may see and who may see its own. */
typedef struct usp_document {
    int64_t begin, end, key_begin, key_end;
    int64_t prefix; /* the first so many keys are seen by all of its queries */
    int64_t root;   /* first key of its oldest ancestor; key_begin outside of trees */
    int64_t last;   /* end of its last descendant; end outside of trees */
    int64_t depth;  /* tokens of all its ancestors */
    int64_t parent; /* or -1 */
} usp_document;

typedef struct usp_document_list {
    int64_t count, capacity;
    usp_document *document; /* [capacity + 1]; behind the last one: what belongs to none, up to all tokens */
    int prefixes, trees;    /* may any have a prefix, a parent? */
} usp_document_list;

/* As the caller gave them, of a sequence that has room for `tokens` queries and `keys` keys (0: the queries are the
 * keys). INVALID, UNSUPPORTED with the field's name behind `where`. */
usp_status usp_documents_check(const usp_documents *given, const char *where, int64_t tokens, int64_t keys);

/* Takes over what was checked; NULL ends: one document of everything. */
void usp_documents_set(usp_document_list *list, const usp_documents *given, int64_t tokens, int64_t keys);

/* The same for equal documents. */
uint64_t usp_documents_hash(uint64_t seed, const usp_document_list *list);

/* Index of the document that holds a query: the first one that ends beyond it; `count` if none does. It is found the
 * sooner, the less it is behind `near`; 0 is always right. */
int64_t usp_documents_find(const usp_document_list *list, int64_t token, int64_t near);

#endif
