/* sequence.h - who owns which token, for queries and for keys; and the schedules that follow for each mesh shape. */
#ifndef USP_SEQUENCE_H
#define USP_SEQUENCE_H
#include "mesh.h"

/* The segments of all ranks over `tokens` tokens. Rank p's are segment[first[p]] .. segment[first[p + 1]]. */
typedef struct usp_sharding {
    int64_t tokens;
    int ranks;
    int64_t capacity;             /* of segment */
    int64_t limit, segment_limit; /* no rank ever owns more tokens or segments, whatever the documents become */
    int64_t *first;               /* [ranks + 1] */
    int64_t *local;               /* [ranks] tokens owned */
    usp_segment *segment;         /* none empty; a rank's adjacent ones are joined */
} usp_sharding;

struct usp_schedule;

struct usp_sequence {
    usp_object object;
    usp_world *world;
    int ranks, rank, copy; /* N, p, data copy */
    usp_layout layout;
    int cross; /* keys are another tensor */
    uint64_t number; /* of the sequence among those of the world */
    int64_t max_documents, max_tokens;
    int64_t documents;
    int64_t *document_ends;  /* [max_documents] */
    usp_sharding query, key; /* key shares query's arrays unless cross */
    struct usp_schedule *schedules;
    usp_stream uploads; /* with documents to come: busy until the last upload of schedules has been read */
};

/* The same on all ranks of one sequence, and another for other tokens on any rank. */
uint64_t usp_sequence_identity(const usp_sequence *sequence);

/* Segments that rank p owns of a sharding. */
static inline int64_t usp_sharding_count(const usp_sharding *sharding, int p) {
    return sharding->first[p + 1] - sharding->first[p];
}

#endif
