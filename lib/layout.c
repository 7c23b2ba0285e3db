/* layout.c - the layouts that are formulas, as lists of segments. Knows nothing of heads or masks. */
#include "layout.h"
#include "search.h"

usp_status usp_sharding_alloc(const usp_host *host, usp_sharding *sharding, int64_t segments, int64_t zigzags) {
    usp_status status = USP_OK;
    sharding->capacity = usp_least(segments, sharding->tokens);
    sharding->first = usp_host_array(host, sharding->ranks + 1, sizeof *sharding->first, "sequence", &status);
    sharding->local = usp_host_array(host, sharding->ranks, sizeof *sharding->local, "sequence", &status);
    sharding->segment = usp_host_array(host, sharding->capacity, sizeof *sharding->segment, "segments", &status);
    sharding->zigzag = usp_host_array(host, zigzags, sizeof *sharding->zigzag, "sequence", &status);
    return status;
}

void usp_sharding_free(const usp_host *host, usp_sharding *sharding) {
    usp_host_free(host, sharding->first);
    usp_host_free(host, sharding->local);
    usp_host_free(host, sharding->segment);
    usp_host_free(host, sharding->zigzag);
}

void usp_sharding_begin(usp_sharding *sharding, int rank) {
    if (rank == 0) sharding->first[0] = 0;
    sharding->first[rank + 1] = sharding->first[rank];
    sharding->local[rank] = 0;
}

void usp_sharding_add(usp_sharding *sharding, int rank, int64_t start, int64_t length, int64_t stride) {
    if (length <= 0) return;
    int64_t *end = &sharding->first[rank + 1];
    usp_segment *last = *end > sharding->first[rank] ? &sharding->segment[*end - 1] : NULL;
    sharding->local[rank] += length;
    if (last && last->stride == 1 && stride == 1 && last->start + last->length == start)
        last->length += length;
    else
        sharding->segment[(*end)++] = (usp_segment){start, length, length == 1 ? 1 : stride};
}

static int64_t cut(int64_t part, int64_t parts, int64_t length) {
    return part * length / parts;
}

/* Chunks p and 2N-1-p: the later one does less or more causal work than the earlier one by as much as the other ranks'
 * do, so the sum is the same everywhere. */
static void add_zigzag(usp_sharding *sharding, int rank) {
    int64_t parts = 2 * (int64_t)sharding->ranks, chunks[] = {rank, parts - 1 - rank};
    for (int i = 0; i < 2; i++) {
        int64_t begin = cut(chunks[i], parts, sharding->tokens);
        usp_sharding_add(sharding, rank, begin, cut(chunks[i] + 1, parts, sharding->tokens) - begin, 1);
    }
}

void usp_sharding_fill(usp_sharding *sharding, usp_layout layout) {
    int64_t tokens = sharding->tokens, ranks = sharding->ranks;
    for (int rank = 0; rank < ranks; rank++) {
        int64_t begin = cut(rank, ranks, tokens);
        usp_sharding_begin(sharding, rank);
        if (layout == USP_LAYOUT_ZIGZAG) add_zigzag(sharding, rank);
        if (layout == USP_LAYOUT_CONTIGUOUS)
            usp_sharding_add(sharding, rank, begin, cut(rank + 1, ranks, tokens) - begin, 1);
        if (layout == USP_LAYOUT_STRIPE)
            usp_sharding_add(sharding, rank, rank, (tokens - rank + ranks - 1) / ranks, ranks);
    }
}
