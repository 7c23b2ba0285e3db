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
 * tokens. The last unit of all may reach beyond the tokens. */
static int64_t find_zigzags(usp_sharding *sharding, const usp_document_list *list, int keys, int64_t unit) {
    int64_t share = usp_most((sharding->tokens + sharding->ranks - 1) / sharding->ranks, 1);
    int64_t count = 0, low = 0, high = 0;
    for (int64_t d = 0, first = 0, begin = 0, end; d < list->count; d++, begin = end) {
        end = keys ? list->document[d].key_end : list->document[d].end;
        if (d == 0 || usp_most(begin - first, end - begin) >= share) {
            first = begin;
            low = high;
            count++;
        }
        high = nearest(end, unit);
        sharding->zigzag[count - 1] = (usp_zigzag){low, usp_least(high, sharding->tokens), low, high};
    }
    return count;
}

/* The rank's part of the first `tokens` of all, in whole units: less than one more than the N-th part, and the sum over
 * all ranks is `tokens` to the nearest unit. */
static int64_t part_of(const usp_sharding *sharding, int rank, int64_t tokens, int64_t unit) {
    return nearest((rank + 1) * tokens / sharding->ranks, unit) - nearest(rank * tokens / sharding->ranks, unit);
}

/* What brings the rank to its part of the first `tokens`, unless it has more already or less is left. */
static int64_t lack(const usp_sharding *sharding, int rank, int64_t tokens, int64_t unit, int64_t left) {
    return usp_least(usp_most(part_of(sharding, rank, tokens, unit) - sharding->local[rank], 0), left);
}

/* From both ends of what the ranks before have left: an early chunk, and a late one that does less or more causal work
 * than it by as much as the other ranks' do. The last rank leaves nothing, since those before it have their parts. */
static void take(usp_sharding *sharding, int rank, usp_zigzag *z, int64_t unit) {
    int64_t tokens = sharding->tokens, early = lack(sharding, rank, (z->begin + z->end) / 2, unit, z->high - z->low);
    usp_sharding_add(sharding, rank, z->low, usp_least(early, tokens - z->low), 1);
    z->low += early;
    int64_t late = lack(sharding, rank, z->end, unit, z->high - z->low);
    z->high -= late;
    usp_sharding_add(sharding, rank, z->high, usp_least(late, tokens - z->high), 1);
}

/* Less than half a unit that is left in the end is the first rank's. */
void usp_sharding_fill_zigzags(usp_sharding *sharding, const usp_document_list *list, int keys) {
    int64_t unit = usp_sharding_unit(sharding, sharding->tokens), whole = nearest(sharding->tokens, unit);
    int64_t zigzags = find_zigzags(sharding, list, keys, unit);
    for (int rank = 0; rank < sharding->ranks; rank++) {
        usp_sharding_begin(sharding, rank);
        for (int64_t z = 0; z < zigzags; z++) take(sharding, rank, &sharding->zigzag[z], unit);
        if (rank == 0) usp_sharding_add(sharding, 0, whole, sharding->tokens - whole, 1);
    }
}
