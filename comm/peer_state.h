/* peer_state.h - what the files of the peer transport share.
 *
 * Every rank has one region of its GPU's memory that all ranks have mapped. What rank a sends to rank b in an exchange
 * is one stream of bytes, which a's copy engine writes into slots of b's region, slot after slot; b copies them to
 * where they belong. Flags say which slots are full, in the region of the one that reads, and which are free again, in
 * that of the one that writes: each is waited for where it lies, by a stream, and put back. */
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

/* Waited for as one number: set by the other rank, or stopped by the own one, then for ever. */
typedef struct usp_peer_flag {
    uint32_t set, stop;
} usp_peer_flag;

/* Flags of one rank about one other, in the region of the first: the other has written a slot, has read one. */
typedef struct usp_peer_flags {
    usp_peer_flag full[USP_PEER_SLOTS], free[USP_PEER_SLOTS];
} usp_peer_flags;

/* The other rank's region. */
typedef struct usp_peer_link {
    char *region; /* mapped here; NULL: this rank itself, or not there */
    int mapped;   /* by a handle, to be closed */
    int lost;     /* the rank is gone, and what it had mapped */
} usp_peer_link;

typedef CUresult (*usp_stream_batch)(CUstream, unsigned, CUstreamBatchMemOpParams *, unsigned);

typedef struct usp_peer {
    usp_transport base;
    int gpu;
    int flushes; /* the GPU can see to it that what was written before a flag is there with it */
    int shown;   /* others may have mapped the region */
    uint64_t exchanges;
    size_t slot_bytes;
    char *region;            /* [size] flags, [size] whether the other has let go, [size - 1][slots][slot_bytes] */
    usp_peer_flags *stopped; /* [size], page-locked: flags as they are to be when the ranks have failed */
    uint32_t *closed;        /* [size], page-locked: what was read */
    usp_stream_batch batch;
    usp_stream out, in;
    cudaStream_t rescue; /* of a priority of its own, so that it queues behind no wait */
    usp_event *begun, *sent, *received;
    cudaIpcMemHandle_t handle;
    pthread_mutex_t lock; /* of what follows */
    usp_probes probes;
    usp_peer_link link[];
} usp_peer;

static inline usp_peer_flags *usp_peer_flags_of(char *region, int rank) {
    return (usp_peer_flags *)(void *)region + rank;
}

static inline uint32_t *usp_peer_closed(const usp_peer *self, char *region) {
    return (uint32_t *)(void *)usp_peer_flags_of(region, self->base.size);
}

static inline size_t usp_peer_head_bytes(int size) {
    size_t bytes = (size_t)size * (sizeof(usp_peer_flags) + sizeof(uint32_t));
    return (bytes + USP_PEER_ALIGNMENT - 1) / USP_PEER_ALIGNMENT * USP_PEER_ALIGNMENT;
}

/* A slot of what `from` sends to `owner`, whose region it is. */
static inline char *usp_peer_slot(const usp_peer *self, char *region, int owner, int from, int slot) {
    size_t number = (size_t)(from - (from > owner)) * USP_PEER_SLOTS + (size_t)slot;
    return region + usp_peer_head_bytes(self->base.size) + number * self->slot_bytes;
}

extern const usp_transport_ops usp_peer_ops;

usp_status usp_peer_take_flag(usp_peer *self, usp_peer_flag *flag, int flushes, usp_stream stream);
usp_status usp_peer_set_flag(usp_peer *self, uint32_t *flag, usp_stream stream);
/* Looks once whether what exchanges have begun is done, but for graphs. */
int usp_peer_is_idle(usp_peer *self);
/* Of the other regions. */
void usp_peer_let_go(usp_peer *self);
/* Waits a bounded time until the others have let go of this one, and frees what is not needed. */
void usp_peer_end(usp_peer *self);

#endif
