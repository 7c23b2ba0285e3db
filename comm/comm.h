/* comm.h - the communication table: moves bytes between ranks and never looks inside them.
 *
 * One data entry, exchange: lists of sends and receives of any sizes, zero allowed (a zero-byte message is skipped on
 * both sides). All-to-all, ring step, chain and gather are lists. Between two ranks the k-th send of an exchange
 * matches the k-th receive of the other's same exchange. No message goes to the rank itself. One thread uses a comm at
 * a time, except poll and abort, which any thread may call. */
#ifndef USP_COMM_H
#define USP_COMM_H
#include "device.h"
#include "meeting.h"

typedef struct usp_comm usp_comm;

typedef struct usp_send {
    int peer;
    const void *data;
    size_t bytes;
} usp_send;

typedef struct usp_recv {
    int peer;
    void *data;
    size_t bytes;
} usp_recv;

typedef struct usp_comm_ops {
    const char *name;
    /* Local. Makes room for exchanges of at most `messages` messages and `bytes` bytes: they then allocate nothing. */
    usp_status (*prepare)(usp_comm *, int64_t messages, size_t bytes);
    /* Enqueues on `stream` where memory is the device's, else returns when done. Waits for other ranks on the host only
     * where ranks are threads or memory is the host's, and then at most timeout_ms. */
    usp_status (*exchange)(usp_comm *, const usp_send *sends, int send_count, const usp_recv *recvs, int recv_count,
                           usp_stream stream);
    /* Host memory, collective over all ranks, in rank order; at most timeout_ms. */
    usp_status (*allgather)(usp_comm *, const void *mine, void *all, size_t bytes_per_rank);
    /* Device memory that peers may touch directly. Local: gets it, the same size on every rank. Collective, once all
     * have it: registers it. Collective once it is registered: gives it back; every rank gives the same piece, and
     * lib/world.c sees to it that all have come. On a comm that has failed nobody is waited for, and what a transport
     * must keep destroy frees. */
    usp_status (*alloc_shared)(usp_comm *, size_t bytes, void **memory);
    usp_status (*register_shared)(usp_comm *, void *memory);
    usp_status (*free_shared)(usp_comm *, void *memory);
    /* Collective: the caller's own communicator over the ranks that pass the same colour, ordered by key. All ranks
     * make the colours by one rule: lib/mesh.c sees to it. */
    usp_status (*split)(usp_comm *, int colour, int key, struct ncclComm **);
    void (*split_destroy)(usp_comm *, struct ncclComm *);
    /* This rank has re-planned a sequence over `ranks` ranks, to what `hash` says. Ranks of one data copy that differ
     * fail by MISMATCH: threads at their next exchange, others with the beats. */
    void (*note_plan)(usp_comm *, int ranks, uint64_t hash);
    /* The failure that has hit the comm, with its sentence, or OK. Sticky. Never waits. */
    usp_status (*poll)(usp_comm *);
    /* This rank has failed by `status`, for the reason in usp_last_error(): fails the comm, and all ranks hear of it,
     * at once where they wait. Returns the failure that came first. Does not wait. */
    usp_status (*fail)(usp_comm *, usp_status status);
    /* The stream's work has not ended in time: finds the rank to blame, aborts, returns TIMEOUT or PEER_LOST. */
    usp_status (*overdue)(usp_comm *);
    void (*abort)(usp_comm *);
    void (*destroy)(usp_comm *); /* accepts a half-built comm */
} usp_comm_ops;

/* Backends embed this first. */
struct usp_comm {
    const usp_comm_ops *ops;
    int rank, size;
    int timeout_ms; /* -1: no limit */
    usp_device *device;
    const usp_host *host;
};

typedef struct usp_comm_config {
    usp_device *device;
    const usp_host *host;
    int timeout_ms, silence_ms; /* -1: no limit */
} usp_comm_config;

/* Constructors; only lib/world.c calls them. All collective over the new ranks: each prepares what is its own, meets
 * the others, and builds the transport where all can. A rank whose meeting->mine has failed comes to tell the others,
 * and needs no device. socket and nccl meet over the bootstrap that is there, the others make one. The comm is written
 * on success alone. */
usp_status usp_comm_create_threads(const usp_comm_config *, usp_meeting *, usp_rendezvous *, int rank, usp_comm **);
usp_status usp_comm_create_socket(const usp_comm_config *, usp_meeting *, usp_comm **);
usp_status usp_comm_create_mpi(const usp_comm_config *, usp_meeting *, int fortran_comm, usp_comm **);
usp_status usp_comm_create_nccl(const usp_comm_config *, usp_meeting *, usp_comm **);
usp_status usp_comm_create_nccl_id(const usp_comm_config *, usp_meeting *, const usp_unique_id *, int size, int rank,
                                   usp_comm **);
usp_status usp_comm_create_nccl_borrowed(const usp_comm_config *, usp_meeting *, struct ncclComm *, usp_comm **);
usp_status usp_nccl_unique_id(usp_unique_id *);

#endif
