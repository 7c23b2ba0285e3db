/* layout.h - who owns which token: each rank's list of segments, by a formula or as the ranks bring them. */
#ifndef USP_LAYOUT_H
#define USP_LAYOUT_H
#include "documents.h"
#include "world.h"

/* Tokens begin .. end of a zigzag, and low .. high of them that no rank has taken yet. */
typedef struct usp_zigzag {
    int64_t begin, end, low, high;
} usp_zigzag;

/* The segments of all ranks over `tokens` tokens. Rank p's are segment[first[p]] .. segment[first[p + 1]]. */
typedef struct usp_sharding {
    int64_t tokens, max_tokens; /* now; whatever the documents become */
    int ranks;
    int64_t capacity;     /* of segment */
    int64_t limit;        /* no rank ever owns more tokens, whatever the documents become */
    int64_t *first;       /* [ranks + 1] */
    int64_t *local;       /* [ranks] tokens owned */
    usp_segment *segment; /* none empty; a rank's adjacent ones are joined */
    usp_zigzag *zigzag;   /* of the per-document layout */
} usp_sharding;

/* What one rank brings to a custom layout. */
typedef struct usp_segment_list {
    const char *name; /* of its field */
    int64_t count;
    const usp_segment *segment;
} usp_segment_list;

/* Room for `segments`, or for as many as there are tokens: none is empty; and for `zigzags` of the per-document layout.
 * `tokens` and `ranks` are set. */
usp_status usp_sharding_alloc(const usp_host *host, usp_sharding *sharding, int64_t segments, int64_t zigzags);
void usp_sharding_free(const usp_host *host, usp_sharding *sharding);

/* Appends tokens start, start + stride, ... to `rank`, the one being filled, joining what continues a segment. */
void usp_sharding_begin(usp_sharding *sharding, int rank);
void usp_sharding_add(usp_sharding *sharding, int rank, int64_t start, int64_t length, int64_t stride);

/* Fills a layout that is a formula of all tokens. */
void usp_sharding_fill(usp_sharding *sharding, usp_layout layout);

/* The per-document layout of so many tokens is cut at multiples of a unit: the largest power of two of at most 128 and
 * an eighth of a rank's share, or 1. */
int64_t usp_sharding_unit(const usp_sharding *sharding, int64_t tokens);

/* Fills the per-document layout, of documents' queries or keys. */
void usp_sharding_fill_zigzags(usp_sharding *sharding, const usp_document_list *list, int keys);

/* Collective: fills a custom layout from all ranks' segments, of which `most` is the largest number. INVALID unless
 * those of this data copy cover every token once. */
usp_status usp_sharding_gather(usp_world *world, usp_sharding *sharding, int copy, const usp_segment_list *mine,
                               int64_t most);

#endif
