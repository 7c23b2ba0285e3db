/* meeting.h - where the ranks of a new world meet: once, over whatever all-gather the way to make the world has. */
#ifndef USP_MEETING_H
#define USP_MEETING_H
#include "lines.h"

enum { USP_CARD_ID_BYTES = 128, USP_CARD_SENTENCE = 256 };

/* An all-gather of host memory in rank order, collective over the new ranks; the way they first find each other. */
typedef struct usp_bootstrap {
    usp_status (*gather)(void *user, const void *mine, void *all, size_t bytes_per_rank);
    void *user;
    int rank, size;
    const usp_key *secret; /* that these ranks alone know and that was never sent; NULL: none */
    const usp_ip *near;    /* this rank's address on the way to the others; NULL: not known */
} usp_bootstrap;

/* What all ranks must have alike: it says which transport is built, and how. */
typedef struct usp_terms {
    int32_t version, device, timeout_ms, silence_ms, transport;
    int32_t transport_version; /* of NCCL; 0 elsewhere */
} usp_terms;

/* What a rank tells the others. */
typedef struct usp_card {
    int32_t status; /* how its own preparation went */
    usp_terms terms;
    char sentence[USP_CARD_SENTENCE]; /* of a failure */
    uint64_t node;                    /* identity of its host */
    char id[USP_CARD_ID_BYTES];       /* rank 0's: an ncclUniqueId */
    usp_address address;
} usp_card;

typedef struct usp_meeting {
    usp_bootstrap bootstrap;
    usp_card mine;
    usp_card *all; /* [size] */
    int *node;     /* [size] the first rank on the same host; there with `all` */
} usp_meeting;

/* Notes how a part of this rank's own preparation went; the first failure counts. Returns it,
 * with its sentence. */
usp_status usp_meeting_note(usp_meeting *meeting, usp_status status);
/* Collective over the bootstrap. The same verdict on all ranks: this rank's own failure, else PEER_FAILED naming a rank
 * that failed and why, else MISMATCH naming the term and two ranks, else OK and `all` and `node` are there. */
usp_status usp_meet(usp_meeting *meeting);
void usp_meeting_end(usp_meeting *meeting); /* of one that never met too */

#endif
