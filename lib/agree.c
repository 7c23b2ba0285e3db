/* agree.c - how the ranks of a world agree: each brings a ballot, all see all of them, and come to one verdict. */
#include "error.h"
#include "world.h"
#include <string.h>

/* What one rank sends; fixed size, so that ranks in different calls still understand each other. */
typedef struct ballot {
    int32_t status, group;
    uint64_t size;
    char what[16];
    unsigned char record[USP_AGREE_BYTES];
} ballot;

_Static_assert(sizeof(ballot) <= sizeof(usp_card), "a ballot lies where a card was");

static usp_status name_difference(const usp_agreement *agreement, const ballot *mine, const ballot *other, int rank,
                                  int other_rank) {
    for (int i = 0; i < agreement->field_count; i++) {
        const usp_field *field = &agreement->fields[i];
        if (memcmp(mine->record + field->offset, other->record + field->offset, field->size) != 0)
            return usp_fail(USP_MISMATCH, "%s.%s differs between rank %d and rank %d", agreement->what, field->name,
                            rank, other_rank);
    }
    return usp_fail(USP_MISMATCH, "%s differs between rank %d and rank %d", agreement->what, rank, other_rank);
}

/* Two ballots that should be equal and are not: an error that every rank of the world can find, since all see all. */
static usp_status compare_pair(const usp_agreement *agreement, const ballot *a, const ballot *b, int rank_a,
                               int rank_b) {
    if (strcmp(a->what, b->what) != 0)
        return usp_fail(USP_MISMATCH, "ranks make different calls: rank %d is at its %s, rank %d at its %s", rank_a,
                        a->what, rank_b, b->what);
    size_t bytes = a->group == b->group ? sizeof a->record : agreement->common;
    if (a->size != b->size || memcmp(a->record, b->record, bytes) != 0)
        return name_difference(agreement, a, b, rank_a, rank_b);
    return USP_OK;
}

static usp_status compare_ballots(const usp_agreement *agreement, const ballot *all, int size) {
    for (int a = 0; a < size; a++) {
        int first = a; /* the lowest rank of a's group: comparing with it is enough */
        for (int b = 0; b < a && first == a; b++)
            if (all[b].group == all[a].group) first = b;
        USP_TRY(compare_pair(agreement, &all[first], &all[a], first, a));
        USP_TRY(compare_pair(agreement, &all[0], &all[a], 0, a));
    }
    return USP_OK;
}

static usp_status other_failure(const ballot *all, int size) {
    for (int rank = 0; rank < size; rank++)
        if (all[rank].status != USP_OK)
            return usp_fail(USP_PEER_FAILED, "rank %d failed at its %s: %s", rank, all[rank].what,
                            usp_status_string((usp_status)all[rank].status));
    return USP_OK;
}

usp_status usp_world_agree(usp_world *world, usp_status mine, const usp_agreement *agreement) {
    ballot own = {.status = (int32_t)mine, .group = agreement->group, .size = agreement->size};
    strncpy(own.what, agreement->what, sizeof own.what - 1);
    if (agreement->record) memcpy(own.record, agreement->record, agreement->size);

    int size = world->transport->size;
    ballot *all = (ballot *)(void *)world->meeting.all;
    USP_TRY(usp_transport_allgather(world->transport, &own, all, sizeof own));
    USP_TRY(mine);
    USP_TRY(other_failure(all, size)); /* before comparing: a rank that failed may not have read its configuration */
    return compare_ballots(agreement, all, size);
}
