/* sequence.h - a sequence: who owns which token, for queries and for keys; its documents; and the plans that follow for
 * each mesh shape and mask. */
#ifndef USP_SEQUENCE_H
#define USP_SEQUENCE_H
#include "documents.h"
#include "layout.h"
#include "mesh.h"
#include "search.h"

struct usp_plan;

struct usp_sequence {
    usp_object object;
    usp_world *world;
    int ranks, rank, copy; /* N, p, data copy */
    usp_layout layout;
    int cross;       /* keys are another tensor */
    int replans;     /* there is room for other documents */
    int trees;       /* documents may have parents */
    int prefixes;    /* documents may have prefixes */
    uint64_t number; /* of the sequence among those of the world */
    usp_document_list documents;
    usp_sharding query, key; /* key shares query's arrays unless cross */
    struct usp_plan *plans;
    int turn;              /* which of each plan's two host copies is the newest */
    usp_stream uploads[2]; /* where documents are to come: busy until the upload of that copy has been read */
};

/* Does ownership follow the documents, so that counts of tokens change with them? */
static inline int usp_sequence_moves(const usp_sequence *sequence) {
    return sequence->layout == USP_LAYOUT_ZIGZAG_PER_DOCUMENT && sequence->replans;
}

/* The most zigzags of the per-document layout: N of a rank's share of tokens or more, a shorter one between any two. */
static inline int64_t usp_sequence_zigzags(const usp_sequence *sequence) {
    return usp_least(sequence->documents.capacity, 2 * (int64_t)sequence->ranks + 1);
}

/* Is it one document of all tokens, whatever it becomes? */
static inline int usp_sequence_is_whole(const usp_sequence *sequence) {
    int filled = !sequence->replans && sequence->documents.document[0].end == sequence->query.tokens;
    return sequence->documents.capacity == 1 && (filled || usp_sequence_moves(sequence));
}

/* The most tokens of one of so many equal parts of the ranks, whatever the documents become. */
int64_t usp_sequence_limit(const usp_sequence *sequence, const usp_sharding *sharding, int parts);

/* Takes over documents that were checked, and who owns what where that follows from them. */
void usp_sequence_set_documents(usp_sequence *sequence, const usp_documents *documents);

/* The same on all ranks of one sequence, and another for other tokens on any rank. */
uint64_t usp_sequence_identity(const usp_sequence *sequence);

#endif
