/* transport.h - the transport table: moves bytes between ranks and never looks inside them.
 *
 * One data entry, exchange: lists of sends and receives of any sizes, zero allowed (a zero-byte message is skipped on
 * both sides). All-to-all, ring step, chain and gather are lists. Between two ranks the k-th send of an exchange
 * matches the k-th receive of the other's same exchange: their bytes are as many, their rows need not be. No message
 * goes to the rank itself. Exchanges are of a lane, and those of one lane on one stream: between two ranks they follow
 * each other in the order of the calls, while those of other lanes may pass them where the transport can. One thread
 * uses a transport at a time, except watch and stop, which any thread may call. */
#ifndef USP_TRANSPORT_H
#define USP_TRANSPORT_H
#include "control.h"
#include "device.h"
#include "meeting.h"

enum { USP_LANES = 2 }; /* one for each axis of a mesh */

typedef struct usp_transport usp_transport;

/* Rows of one length at one distance. What is sent is only read. `packed`, where it is given, is memory for all rows
 * side by side, which the exchange may use; both sides of a message give it or neither, bytes, distance and addresses
 * are even then, and the distance is less than 2^31. It may be where the rows lie; without it rows lie side by side. A
 * transport moves rows as they lie or by way of there.
 *
 * `there`, where it is given, is where the rows may arrive: an address of this rank's shared memory, whose place in the
 * receiver's piece is meant. Both sides of a message give the same place or none. A transport writes there, at any time
 * while both are in the exchange, and the receiver copies to `base` from there unless it is the same; or it does not
 * use it. Rows that lie apart there are cut alike on both sides. */
typedef struct usp_message {
    int peer;
    void *base;
    int64_t rows;
    size_t bytes, stride; /* of a row; from one row to the next, at least as much */
    void *packed;
    int joined; /* on both sides: `packed` is right behind that of the message before, which is of the same peer */
    void *there;
    size_t there_stride; /* from one row to the next there */
} usp_message;

/* Bytes that lie side by side, as one row. */
static inline usp_message usp_message_whole(int peer, const void *data, size_t bytes) {
    return (usp_message){.peer = peer, .base = (void *)(uintptr_t)data, .rows = 1, .bytes = bytes, .stride = bytes};
}

static inline size_t usp_message_bytes(const usp_message *message) {
    return (size_t)message->rows * message->bytes;
}

/* From the first to the last byte where it may arrive. */
static inline size_t usp_message_extent(const usp_message *message) {
    return message->rows ? (size_t)(message->rows - 1) * message->there_stride + message->bytes : 0;
}

typedef struct usp_transport_ops {
    const char *name;
    int reaches; /* 1: rows go to the places that messages name, as they lie, and need no `packed` */
    /* Local. Makes room for exchanges of at most `messages` messages and `bytes` bytes: they then allocate nothing. */
    usp_status (*prepare)(usp_transport *, int64_t messages, size_t bytes);
    /* Enqueues on `stream`, one of the device's making, where memory is the device's, else returns when done. Waits for
     * other ranks on the host only where ranks are threads or memory is the host's, and then at most timeout_ms. */
    usp_status (*exchange)(usp_transport *, int lane, const usp_message *sends, int send_count,
                           const usp_message *recvs, int recv_count, usp_stream stream);
    /* Device memory that peers may touch directly. Local: gets it, the same size on every rank. Collective, once all
     * have it: registers it. Collective once it is registered: gives it back; every rank gives the same piece, and
     * lib/world.c sees to it that all have come. Where ranks have failed nobody is waited for, and what a transport
     * must keep destroy frees. */
    usp_status (*alloc_shared)(usp_transport *, size_t bytes, void **memory);
    usp_status (*register_shared)(usp_transport *, void *memory);
    usp_status (*free_shared)(usp_transport *, void *memory);
    /* Where copies and kernels of this rank's device reach, in the peer's piece, the place that `memory` is in the own
     * registered one. NULL: nowhere. */
    void *(*reach)(usp_transport *, int peer, const void *memory);
    /* Looks whether what is under way has failed or is overdue, which then fails all ranks. Never waits. */
    usp_status (*watch)(usp_transport *);
    /* Ranks have failed: lets go of the device, where work may wait for ranks that are gone, and waits at most so long
     * for that. */
    void (*stop)(usp_transport *, int milliseconds);
    void (*destroy)(usp_transport *); /* accepts a half-built one; its control, unless NULL, is still there */
} usp_transport_ops;

/* Backends embed this first. */
struct usp_transport {
    const usp_transport_ops *ops;
    int rank, size;
    int timeout_ms; /* -1: no limit */
    usp_device *device;
    const usp_host *host;
    usp_control *control; /* of the same ranks, made with it */
    usp_transport *near;  /* beside it, of the same ranks and control, between those of one host; NULL: none */
};

/* ---- control and transports together ----------------------------------------------------------------------------- */

/* The failure that has hit the ranks or a transport, or OK. Sticky. Never waits. Any thread. */
usp_status usp_transport_poll(usp_transport *);
/* usp_control_ops.allgather, fail, overdue and abort, behind which failed transports are stopped: abort and overdue
 * wait some seconds for that, the others do not. abort by any thread. */
usp_status usp_transport_allgather(usp_transport *, const void *mine, void *all, size_t bytes_per_rank);
usp_status usp_transport_fail(usp_transport *, usp_status status);
usp_status usp_transport_overdue(usp_transport *);
void usp_transport_abort(usp_transport *);
/* The end of all, half-built ones too; NULL is fine. */
void usp_transport_end(usp_transport *);

/* Entries for transports that need no room, watch nothing, hold nothing, and whose ranks read no memory but their own.
 */
usp_status usp_plain_prepare(usp_transport *, int64_t messages, size_t bytes);
usp_status usp_plain_alloc_shared(usp_transport *, size_t bytes, void **memory);
usp_status usp_plain_register_shared(usp_transport *, void *memory);
usp_status usp_plain_free_shared(usp_transport *, void *memory);
void *usp_plain_reach(usp_transport *, int peer, const void *memory);
usp_status usp_plain_watch(usp_transport *);
void usp_plain_stop(usp_transport *, int milliseconds);

/* ---- constructors ------------------------------------------------------------------------------------------------ */

typedef struct usp_transport_config {
    usp_device *device;
    const usp_host *host;
    int timeout_ms, silence_ms; /* -1: no limit */
} usp_transport_config;

/* Only lib/world.c calls them. All collective over the new ranks: each prepares what is its own, meets the others, and
 * builds control and transport where all can. A rank whose meeting->mine has failed comes to tell the others, and needs
 * no device. socket, peer and nccl meet over the bootstrap that is there, the others make one. The transport is written
 * on success alone. */
usp_status usp_transport_create_threads(const usp_transport_config *, usp_meeting *, usp_rendezvous *, int rank,
                                        usp_transport **);
usp_status usp_transport_create_socket(const usp_transport_config *, usp_meeting *, usp_transport **);
usp_status usp_transport_create_peer(const usp_transport_config *, usp_meeting *, usp_transport **);
usp_status usp_transport_create_mpi(const usp_transport_config *, usp_meeting *, int fortran_comm, usp_transport **);
usp_status usp_transport_create_nccl(const usp_transport_config *, usp_meeting *, usp_transport **);
usp_status usp_transport_create_nccl_id(const usp_transport_config *, usp_meeting *, const usp_unique_id *, int size,
                                        int rank, usp_transport **);
usp_status usp_transport_create_nccl_borrowed(const usp_transport_config *, usp_meeting *, struct ncclComm *,
                                              usp_transport **);
/* Collective over a transport that stands: puts a peer transport beside it, between GPUs of one host. `node`: of each
 * rank, a number of its host. Where a rank cannot have it no rank does, which is logged and OK. */
usp_status usp_transport_create_near(const usp_transport_config *, const int *node, usp_transport *);

#endif
