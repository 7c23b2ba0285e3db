/* peer_state.h - what the files of the peer transport share.
 *
 * Every rank has one region of its GPU's memory that all ranks have mapped. What rank a sends to rank b is one stream
 * of bytes, which a's copy engine writes into slots of b's region, slot after slot; b copies them to where they belong.
 * Flags say which slots are full, in the region of the one that reads, and which are free again, in that of the one
 * that writes: each is waited for where it lies, by a stream, and put back to 0. */
#ifndef USP_PEER_STATE_H
#define USP_PEER_STATE_H
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <pthread.h>

#include "channel.h"
#include "probes.h"

enum {
    USP_PEER_SLOTS = 4,
    USP_PEER_ALIGNMENT = 256, /* of messages in slots */
    USP_PEER_LIMIT_MS = 5000  /* longest wait of a rank that leaves */
};

/* Flags of one rank about one other, in the region of the first. */
typedef struct usp_peer_flags {
    uint32_t full[USP_PEER_SLOTS]; /* the other one has written a slot */
    uint32_t free[USP_PEER_SLOTS]; /* the other one has read a slot of its region */
    uint32_t closed;               /* the other one touches this region no more */
    uint32_t pad[7];
} usp_peer_flags;

/* One direction to or from another rank. */
typedef struct usp_peer_way {
    usp_stream stream;
    usp_event *done;
    int slot; /* the next one */
} usp_peer_way;

typedef struct usp_peer_link {
    char *region; /* the other one's, mapped here; NULL: this rank itself, or not there */
    int mapped;   /* by a handle, to be closed */
    usp_peer_way out, in;
} usp_peer_link;

typedef CUresult (*usp_stream_batch)(CUstream, unsigned, CUstreamBatchMemOpParams *, unsigned);

typedef struct usp_peer {
    usp_transport base;
    int gpu;
    uint64_t exchanges;
    size_t slot_bytes;
    char *region;  /* [size] flags, then [size][slots][slot_bytes] */
    uint32_t *set; /* page-locked: a region's flags as they are to be set, or were read */
    usp_stream_batch batch;
    usp_stream rescue; /* never waits for another rank */
    usp_event *begun;
    pthread_mutex_t lock; /* of what follows */
    usp_probes probes;
    usp_peer_link link[];
} usp_peer;

static inline usp_peer_flags *usp_peer_flags_of(char *region, int rank) {
    return (usp_peer_flags *)(void *)region + rank;
}

static inline size_t usp_peer_flags_bytes(int size) {
    size_t bytes = (size_t)size * sizeof(usp_peer_flags);
    return (bytes + USP_PEER_ALIGNMENT - 1) / USP_PEER_ALIGNMENT * USP_PEER_ALIGNMENT;
}

/* Slot `slot` of what `from` sends to the region's rank. */
static inline char *usp_peer_slot(const usp_peer *self, char *region, int from, int slot) {
    size_t number = (size_t)from * USP_PEER_SLOTS + (size_t)slot;
    return region + usp_peer_flags_bytes(self->base.size) + number * self->slot_bytes;
}

extern const usp_transport_ops usp_peer_ops;

/* Enqueues: wait until the flag is set, and put it back; set a flag, here or in another region. */
usp_status usp_peer_take_flag(usp_peer *self, uint32_t *flag, usp_stream stream);
usp_status usp_peer_set_flag(usp_peer *self, uint32_t *flag, usp_stream stream);
/* Looks once whether all streams are idle. */
int usp_peer_is_idle(usp_peer *self);
/* Takes leave of the other regions, waits a bounded time until they have of this one, and frees what is not needed. */
void usp_peer_end(usp_peer *self);

#endif
