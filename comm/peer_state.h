/* peer_state.h - what the files of the peer transport share.
 *
 * What rank a sends to rank b is written by a's copy engine into b's memory: to where the message says that it may
 * arrive or, where it says nothing, into a slot that b has for a, from which b copies. Two flags for each ordered pair
 * say when: b is ready for a's bytes, and they are there in full. Flags lie in host memory that all ranks have mapped;
 * streams set them, wait for them and put them back, and the host of the rank that waits can release it. Flags and
 * slots are a lane's own, so that nothing of one lane waits for another one. Ranks of other hosts are known, but
 * nothing goes to them: each host has a board of its own. */
#ifndef USP_PEER_STATE_H
#define USP_PEER_STATE_H
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <pthread.h>

#include "channel.h"
#include "pieces.h"
#include "probes.h"

enum {
    USP_PEER_ALIGNMENT = 256, /* of messages in slots */
    USP_PEER_LIMIT_MS = 5000, /* longest wait of a rank that leaves */
    USP_PEER_NAME = 32
};

/* Waited for as one number: set by a stream, or stopped by the host of the rank that waits, then for ever. */
typedef struct usp_peer_flag {
    uint32_t set, stop;
} usp_peer_flag;

/* What one rank waits for from one other: to be let write into its slot and pieces; to have its own written. Apart, so
 * that flags of two pairs share no line of a cache. */
typedef struct usp_peer_flags {
    usp_peer_flag ready, full;
    char apart[112];
} usp_peer_flags;

/* The flags of a host's ranks, in a file of memory that the first of them makes. */
typedef struct usp_peer_board {
    char name[USP_PEER_NAME]; /* of the file while others have yet to open it, or empty */
    usp_peer_flags *flags;    /* [lane][seat that waits][other] */
    char *there;              /* where the GPU has them */
    uint32_t *left;           /* [seat] it has let go of all other ranks' memory */
    size_t bytes;
} usp_peer_board;

typedef CUresult (*usp_stream_batch)(CUstream, unsigned, CUstreamBatchMemOpParams *, unsigned);

/* What is to be done to flags, in order. */
typedef struct usp_peer_batch {
    CUstreamBatchMemOpParams operation[64];
    unsigned count;
} usp_peer_batch;

/* The bytes that a list has for one peer, or wants from it. */
typedef struct usp_peer_flow {
    const usp_message *messages;
    int count, peer, sends;
    int message; /* the one that moves, or USP_NO_MESSAGE */
    size_t at;   /* its bytes so far */
} usp_peer_flow;

/* Another rank. */
typedef struct usp_peer_other {
    int seat; /* its place among its host's ranks */
    int near; /* it is on this host, and not this rank itself */
    int maps; /* it is of another process: its memory is mapped, and to be let go */
    int lost; /* it is gone, and what it had mapped */
    usp_peer_flow out, in;
} usp_peer_other;

/* What a rank says while the transport is made: how a step went. */
typedef struct usp_peer_word {
    int32_t status;
    char sentence[252];
} usp_peer_word;

typedef struct usp_peer {
    usp_transport base;
    int guest; /* beside another transport, whose control this one uses and which outlives it */
    int gpu;
    int seats;   /* ranks of this host */
    int flushes; /* the GPU can see to it that what was written before a flag is there with it */
    int shown;   /* others may have mapped what is this rank's */
    usp_stream_batch batch;
    usp_peer_board board;
    usp_pieces pieces;
    char *slots; /* the first piece: [lane][seats - 1][slot_bytes] */
    size_t slot_bytes;
    usp_peer_word *words; /* [size], for what all ranks say */
    pthread_mutex_t lock; /* of the probes */
    usp_probes probes;
    usp_peer_other other[]; /* [size] */
} usp_peer;

static inline usp_peer *usp_peer_of(usp_transport *transport) {
    return (usp_peer *)transport;
}

/* A slot of `owner` for what `from` sends, as an address of this rank's own slots. */
static inline char *usp_peer_slot(const usp_peer *self, int lane, int owner, int from) {
    int seat = self->other[from].seat, before = seat - (seat > self->other[owner].seat);
    return self->slots + (size_t)(lane * (self->seats - 1) + before) * self->slot_bytes;
}

extern const usp_transport_ops usp_peer_ops;

/* ---- flags (peer_flags.c) ---------------------------------------------------------------------------------------- */

static inline usp_peer_flags *usp_peer_flags_of(const usp_peer *self, int lane, int waits, int other) {
    int row = lane * self->seats + self->other[waits].seat;
    return &self->board.flags[(size_t)row * (size_t)self->seats + (size_t)self->other[other].seat];
}

usp_status usp_peer_create_board(usp_peer *self); /* the first of its host */
usp_status usp_peer_open_board(usp_peer *self, const char *name);
void usp_peer_unlink_board(usp_peer *self); /* once all have opened it */
void usp_peer_close_board(usp_peer *self);
/* Whether the GPU's streams can do with flags what they must. */
usp_status usp_peer_try_flags(usp_peer *self);

/* Put on `stream` by run, or where there is no room for more. Waits until the flag is set, and puts it back. */
usp_status usp_peer_set(usp_peer *self, usp_peer_batch *batch, usp_peer_flag *flag, usp_stream stream);
usp_status usp_peer_await(usp_peer *self, usp_peer_batch *batch, usp_peer_flag *flag, usp_stream stream);
usp_status usp_peer_run(usp_peer *self, usp_peer_batch *batch, usp_stream stream);
/* Whatever waits for a flag of this rank's goes on, now and later, in streams and in graphs. */
void usp_peer_release(usp_peer *self);

/* ---- memory (peer_memory.c) -------------------------------------------------------------------------------------- */

/* Collective, as the entries of the table: maps the pieces of all ranks of the host. What fails here is this rank's. */
usp_status usp_peer_show_piece(usp_peer *self, usp_shared_piece *piece);
usp_status usp_peer_alloc_shared(usp_transport *transport, size_t bytes, void **memory);
usp_status usp_peer_register_shared(usp_transport *transport, void *memory);
usp_status usp_peer_free_shared(usp_transport *transport, void *memory);
/* Lets go of all other ranks' memory, and says so. */
void usp_peer_let_go(usp_peer *self);
/* Waits a bounded time until the others have let go of this rank's memory, and frees it if they have. */
void usp_peer_free_pieces(usp_peer *self);

#endif
