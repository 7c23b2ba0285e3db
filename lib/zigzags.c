/* zigzags.c - the per-document layout: long documents are zigzags of their own, short ones share some. All cuts lie on
 * whole units of tokens, so that tiles of queries end where chunks do. */
#include "layout.h"
#include "search.h"

int64_t usp_sharding_unit(const usp_sharding *sharding, int64_t tokens) {
    int64_t unit = 1;
    while (unit < 128 && 16 * unit * sharding->ranks <= tokens) unit *= 2;
    return unit;
}

static int64_t nearest(int64_t tokens, int64_t unit) {
    return (tokens + unit / 2) / unit * unit;
}

/* A document of a rank's share of tokens or more is a zigzag of its own, shorter ones share one until they are as many
 * tokens. What is left of a unit in the end is in none. */
static int64_t find_zigzags(usp_sharding *sharding, const usp_document_list *list, int keys, int64_t unit) {
    int64_t share = (sharding->tokens + sharding->ranks - 1) / sharding->ranks, count = 0;
    int64_t whole = sharding->tokens / unit * unit;
    for (int64_t d = 0, first = 0, begin = 0, end; d < list->count; d++, begin = end) {
        end = keys ? list->document[d].key_end : list->document[d].end;
        if (d == 0 || usp_most(begin - first, end - begin) >= share) {
            first = begin;
            sharding->zigzag[count++].begin = usp_least(nearest(begin, unit), whole);
        }
        usp_zigzag *z = &sharding->zigzag[count - 1];
        z->low = z->begin;
        z->high = z->end = usp_least(nearest(end, unit), whole);
    }
    return count;
}

/* What brings the rank to its part of the first `tokens` of all, in whole units and at most `left`: it is never more
 * than one ahead of the N-th part, and the parts of all ranks are all. The last one has what the others leave. */
static int64_t lack(const usp_sharding *sharding, int rank, int64_t tokens, int64_t unit, int64_t left) {
    int64_t ranks = sharding->ranks, owned = sharding->local[rank];
    int64_t part = nearest((rank + 1) * tokens / ranks, unit) - nearest(rank * tokens / ranks, unit);
    return rank + 1 == ranks ? left : usp_least(usp_most(part - owned, 0), left);
}

/* From both ends of what the ranks before have left: the late chunk does less or more causal work than the early one by
 * as much as the other ranks' do. */
static void take(usp_sharding *sharding, int rank, usp_zigzag *z, int64_t unit) {
    int64_t early = lack(sharding, rank, (z->begin + z->end) / 2, unit, z->high - z->low);
    usp_sharding_add(sharding, rank, z->low, early, 1);
    z->low += early;
    int64_t late = lack(sharding, rank, z->end, unit, z->high - z->low);
    z->high -= late;
    usp_sharding_add(sharding, rank, z->high, late, 1);
}

void usp_sharding_fill_zigzags(usp_sharding *sharding, const usp_document_list *list, int keys) {
    int64_t unit = usp_sharding_unit(sharding, sharding->tokens);
    int64_t zigzags = find_zigzags(sharding, list, keys, unit);
    for (int rank = 0; rank < sharding->ranks; rank++) {
        usp_sharding_begin(sharding, rank);
        for (int64_t z = 0; z < zigzags; z++) take(sharding, rank, &sharding->zigzag[z], unit);
        if (rank == 0) usp_sharding_add(sharding, 0, sharding->tokens / unit * unit, sharding->tokens % unit, 1);
    }
}
