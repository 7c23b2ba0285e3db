/* world.h - the world inside the library: one transport with its control, another one beside it for the ranks of a
 * host, one device, a transfer stream for each lane, and collective agreement. */
#ifndef USP_WORLD_H
#define USP_WORLD_H
#include "transport.h"
#include "guard.h"
#include "hash.h"
#include <pthread.h>

/* Shared memory that is not given back yet. */
typedef struct usp_piece {
    struct usp_piece *next;
    void *memory;
    size_t bytes;
    uint64_t number; /* counts pieces from 1: the same on all ranks */
} usp_piece;

/* A place in shared memory, as all ranks can name it. */
typedef struct usp_place {
    uint64_t piece, offset;
} usp_place;

/* Where the exchanges of one axis go, in the order of the calls and beside those of the other. */
typedef struct usp_lane {
    usp_transport *transport;
    int number;
} usp_lane;

struct usp_world {
    usp_object object;
    usp_turn turn;
    usp_host host;
    usp_device *device;
    usp_transport *transport;       /* and its control */
    usp_stream transfer[USP_LANES]; /* every transfer of every mesh and layer of a lane, in the order of the calls */
    usp_event *event;               /* the moving end of fork */
    usp_meeting meeting;            /* the memory of its cards serves usp_world_agree from now on */
    usp_piece *pieces;
    uint64_t piece_count, sequence_count; /* made so far */
    int timeout_ms, silence_ms;           /* -1: no limit */
    int nodes, local_rank, local_size;
    int watching;    /* the watchdog runs */
    atomic_int stop; /* asks the watchdog to end */
    pthread_t watchdog;
};

/* usp_world_synchronize, within a call. */
usp_status usp_world_wait(usp_world *world, usp_stream stream);

/* `to` waits for all that `from` has now. Nothing if they are the same stream. */
usp_status usp_world_fork(usp_world *world, usp_stream from, usp_stream to);

/* How a call has ended whose arguments were right and which may have enqueued work: other ranks rely on that, so its
 * failure is the world's, DEVICE where the device had no memory. UNSUPPORTED (an exchange that cannot be captured) was
 * found before anything moved. */
usp_status usp_world_conclude(usp_world *world, usp_status status);

/* Where so many bytes of shared memory are; piece 0 if they are not all of one piece. */
usp_place usp_world_find_place(const usp_world *world, const void *memory, size_t bytes);

/* The transport's exchange on the lane's transfer stream. The caller forks to it before and from it where the data is
 * needed. */
usp_status usp_world_exchange(usp_world *world, const usp_lane *lane, const usp_message *sends, int send_count,
                              const usp_message *recvs, int recv_count);

/* One named field of the record that ranks compare. */
typedef struct usp_field {
    const char *name;
    size_t offset, size;
} usp_field;

enum { USP_AGREE_BYTES = 192 };

/* What a rank brings to a collective create. Ranks of different `group` (data copies) may bring different records, but
 * for the first `common` bytes: what says which ranks make a group, and which collective steps follow. */
typedef struct usp_agreement {
    const char *what; /* "mesh", "layer", ... */
    int group;
    const void *record; /* at most USP_AGREE_BYTES; NULL: none */
    size_t size;
    const usp_field *fields; /* common ones first */
    int field_count;
    size_t common;
} usp_agreement;

/* Collective over the world. Where `mine` failed: it, with its sentence; where only others failed: PEER_FAILED; else
 * MISMATCH everywhere (naming the field and a rank) if records differ in a group or ranks are in different calls. */
usp_status usp_world_agree(usp_world *world, usp_status mine, const usp_agreement *agreement);

/* Collective: the largest of all ranks' numbers; all ranks' parts, of which this rank's has `own` bytes, in `all`,
 * [world size][piece], zero behind each, for the caller to free. `what` names the call. */
usp_status usp_world_largest(usp_world *world, const char *what, int64_t mine, int64_t *most);
usp_status usp_world_gather(usp_world *world, const char *what, const void *mine, size_t own, size_t piece, void **all);

#endif
