/* usp.h - unified sequence parallelism for C: one attention layer whose tokens are spread over many ranks.
 *
 * A world is all the ranks a trainer brings. A mesh is a ulysses x ring grid over consecutive ranks of a world, with
 * data-parallel copies beside it. A sequence says which rank owns which token. A layer is one attention operator
 * planned for a mesh, a sequence and a shape, and run many times. The caller owns tensors, workspace and saved.
 *
 * "Collective" means: every rank of the world makes the call, in the same order, and all succeed or all fail: a rank
 * with its own reason, the others with PEER_FAILED. Everything not marked collective is local. A call that fails
 * changes nothing and leaves nothing allocated; one sentence of why is in usp_last_error(). No call exits, prints, or
 * waits for ever: see usp_world_config.timeout_ms.
 *
 * Structs begin with struct_size, which the caller sets to sizeof the struct; all other bytes zero means "the default".
 * Fields are only ever appended, so a program built against an older header keeps working; a newer program's unknown
 * fields must be zero. No struct has padding.
 *
 * On the CPU any call runs on a stack of 64 KiB, which is less than the default of any system.
 * A world and its objects are used by one thread at a time: a call that finds another thread in one is INVALID and
 * does nothing; usp_world_poll, usp_world_abort, what only reads a sequence or a layer, and memory calls may be made
 * from any thread. Objects are destroyed in any order, each once, from any thread: what others still use lives until
 * they are gone, and while another thread is in a call, until that ends. NULL is fine. A child of fork has copies of
 * objects that are no use to it: each call with one is INVALID there, at once, and destroy does nothing; what it
 * inherits (sockets) it holds until it ends or calls exec.
 * This header needs no CUDA, NCCL or MPI header and is clean in C99, C11 and C++17. */
#ifndef USP_H
#define USP_H

#include <stddef.h>
#include <stdint.h>

#define USP_VERSION_MAJOR 0
#define USP_VERSION_MINOR 2
#define USP_VERSION_PATCH 0

#if defined(__GNUC__)
#define USP_API __attribute__((visibility("default")))
#else
#define USP_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* ---- status ------------------------------------------------------------------------------------------------------ */

/* One list for code, number and sentence. */
#define USP_STATUS_MAP(X)                                                                                              \
    X(OK, 0, "success")                                                                                                \
    X(INVALID, 1, "invalid argument or configuration")                                                                 \
    X(UNSUPPORTED, 2, "valid request that this build, device or layout cannot serve")                                  \
    X(NO_MEMORY, 3, "host or device allocation failed")                                                                \
    X(WORKSPACE, 4, "workspace or saved is missing, too small or misaligned")                                          \
    X(DEVICE, 5, "a device call failed")                                                                               \
    X(COMM, 6, "communication failed or was aborted")                                                                  \
    X(MISMATCH, 7, "ranks passed different configurations")                                                            \
    X(PEER_FAILED, 8, "another rank failed this collective call")                                                      \
    X(PEER_LOST, 9, "another rank died or left")                                                                       \
    X(TIMEOUT, 10, "another rank did not arrive in time")                                                              \
    X(INTERNAL, 11, "broken invariant; please report")

typedef enum usp_status {
#define USP_STATUS_ENUM(name, value, text) USP_##name = value,
    USP_STATUS_MAP(USP_STATUS_ENUM)
#undef USP_STATUS_ENUM
        USP_STATUS_COUNT
} usp_status;

/* The sentence of a status; never NULL. */
USP_API const char *usp_status_string(usp_status status);

/* One sentence about this thread's last failure, naming the field, rank or step; "" if none. Valid until the next call
 * of this thread that fails. */
USP_API const char *usp_last_error(void);

/* major * 10000 + minor * 100 + patch of the library that runs (the macros above are those of the header). */
USP_API int usp_version(void);

/* ---- kinds ------------------------------------------------------------------------------------------------------- */

typedef enum usp_dtype { USP_F32 = 0, USP_F16 = 1, USP_BF16 = 2 } usp_dtype;
typedef enum usp_device_kind { USP_DEVICE_AUTO = 0, USP_DEVICE_CPU = 1, USP_DEVICE_CUDA = 2 } usp_device_kind;
typedef enum usp_attention { USP_SOFTMAX = 1, USP_LINEAR = 2 } usp_attention;
typedef enum usp_mask { USP_MASK_CAUSAL = 1, USP_MASK_FULL = 2 } usp_mask; /* none by default: say which */
/* Where the diagonal of queries and keys of different length lies: query 0 opposite key 0, or the last query opposite
 * the last key; with documents, of each document. */
typedef enum usp_alignment { USP_ALIGN_TOP_LEFT = 0, USP_ALIGN_BOTTOM_RIGHT = 1 } usp_alignment;
/* What travels on the ring axis of softmax attention: all keys from neighbour to neighbour (arXiv 2310.01889); or, from
 * their owner, what the queries of a rank see: a stage for each owner, or all at once. */
typedef enum usp_route {
    USP_ROUTE_AUTO = 0, /* the one that moves fewest bytes; of equal ones gathered, if it needs no more memory than the
                           others, else relay */
    USP_ROUTE_RELAY = 1,
    USP_ROUTE_DIRECT = 2,
    USP_ROUTE_GATHERED = 3
} usp_route;
typedef enum usp_pass { USP_PASS_FORWARD = 0, USP_PASS_BACKWARD = 1 } usp_pass;

/* The very type of cudaStream_t. NULL on the CPU, where every call returns when its work is done. */
typedef struct CUstream_st *usp_stream;
struct ncclComm;

/* Bytes of one element; 0 for a value that is no dtype. */
USP_API size_t usp_dtype_size(usp_dtype dtype);

/* Devices of a kind that this process can use now: 1 for the CPU, the number of GPUs for CUDA (0 without driver or
 * without CUDA in the build). */
USP_API int usp_device_count(usp_device_kind kind);

/* Makes GPU `index` the calling thread's current device, as cudaSetDevice does; nothing on the CPU. A world takes the
 * current device at create, and a call on it or on its objects may leave the world's GPU current: a thread that drives
 * several GPUs selects its own again before its own CUDA calls. */
USP_API usp_status usp_device_select(usp_device_kind kind, int index);

/* ---- world: all the ranks a trainer brings ----------------------------------------------------------------------- */

typedef struct usp_world usp_world;

/* What moves tensors between GPUs, where ranks are processes, or a thread a GPU. PEER: copy engines, which write into
 * the memory of other GPUs of one host; it takes no processor of a GPU, and at most 128 MiB of its memory, or 2 MiB
 * for each other rank if that is more; it is fastest where layers are promised shared memory. Graphs that hold its
 * exchanges, and calls beside them, must run one after the other, and have ended before destroy. AUTO: NCCL, and PEER
 * beside it where ranks share a host and their GPUs can: each axis of a mesh takes PEER if all its rows lie on one
 * host each, else NCCL (usp_layer_describe says which). NCCL, PEER: that one alone. Over the environment or a
 * call-back all three; over an id or the caller's communicator AUTO or NCCL; elsewhere AUTO alone, which has no such
 * choice; all else is INVALID. UNSUPPORTED: no GPU, no NCCL; of PEER several hosts, a GPU whose memory another cannot
 * use, ranks that share no /dev/shm. Alike on all ranks, else MISMATCH. */
typedef enum usp_transport_kind {
    USP_TRANSPORT_AUTO = 0,
    USP_TRANSPORT_NCCL = 1,
    USP_TRANSPORT_PEER = 2
} usp_transport_kind;

typedef struct usp_world_config {
    size_t struct_size;
    usp_device_kind device; /* auto: CUDA where a GPU is usable, else the CPU. CUDA takes the thread's current device */
    int timeout_ms;         /* longest wait for another rank; 0: 600000, -1: no limit */
    int watchdog;           /* 1: a thread of the library polls; 0: the caller does, by usp_world_poll or synchronize */
    int node;               /* identity of this host, > 0; 0: found out. Set it to emulate hosts */
    void (*log)(void *user, int level, const char *text); /* NULL: silent; also from the library's threads.
                                                               level: 1 warning, 2 info, 3 trace */
    void *log_user;
    void *(*host_alloc)(void *user, size_t bytes); /* both or neither; NULL: malloc and free. 16-byte aligned. No
                                                      callback may call this library */
    void (*host_free)(void *user, void *memory);
    void *host_user;
    int silence_ms; /* a rank of another process that gives no sign of life for so long is lost, though its connections
                       stand (a stopped process; one that died while a child of its fork lives). At least 160;
                       0: a quarter of timeout_ms, but 2000 to 10000, and no more than timeout_ms; -1: no limit */
    usp_transport_kind transport;
} usp_world_config;

typedef struct usp_world_info {
    size_t struct_size;
    int rank, size;
    usp_device_kind device;     /* what auto became */
    int timeout_ms;             /* what 0 became */
    char transport[16];         /* "threads", "socket", "nccl", "nccl+peer", "peer" or "mpi" */
    int nodes;                  /* hosts, by usp_world_config.node */
    int local_rank, local_size; /* this rank among those of its host */
    int watchdog;
    int silence_ms; /* what 0 became */
    int reserved;
} usp_world_info;

/* Where the thread-ranks of one process meet, at most 4096: one per world, made by any thread. */
typedef struct usp_rendezvous usp_rendezvous;
USP_API usp_status usp_rendezvous_create(int size, usp_rendezvous **rendezvous);
USP_API void usp_rendezvous_destroy(usp_rendezvous *rendezvous);

/* The bytes of an ncclUniqueId, made by one rank and brought to the others by the caller. UNSUPPORTED without NCCL. */
typedef struct usp_unique_id {
    char bytes[128];
} usp_unique_id;
USP_API usp_status usp_unique_id_create(usp_unique_id *id);

/* Gathers bytes_per_rank from every rank, in rank order, into `all`; 0 on success. Host memory. */
typedef int (*usp_allgather_fn)(void *user, const void *mine, void *all, size_t bytes_per_rank);

/* Six ways to make a world; all collective among the ranks of the new world. `config` NULL means all defaults.
 * Errors: INVALID, UNSUPPORTED (no such backend here), NO_MEMORY, MISMATCH (library version, device, transport,
 * timeout_ms or silence_ms differ between ranks), PEER_FAILED, TIMEOUT, COMM. Multi-process worlds open TCP connections
 * between all ranks for liveness. A rank whose own arguments are wrong waits for the others and tells them, except
 * where it has no way to (nccl, nccl_id; a rank out of range or taken, no callback, no communicator): there they wait
 * for the time limit. */

/* Ranks are threads of this process, each making the call with its own rank. CPU, or CUDA with any number of ranks a
 * GPU. */
USP_API usp_status usp_world_create_threads(const usp_world_config *config, usp_rendezvous *rendezvous, int rank,
                                            usp_world **world);
/* NCCL from a unique id: one process or one thread a GPU. */
USP_API usp_status usp_world_create_nccl_id(const usp_world_config *config, const usp_unique_id *id, int size, int rank,
                                            usp_world **world);
/* NCCL from the caller's communicator, which is only borrowed during this call and stays the caller's. */
USP_API usp_status usp_world_create_nccl(const usp_world_config *config, struct ncclComm *comm, usp_world **world);
/* MPI_Comm_c2f(comm) of a communicator of an initialised MPI; borrowed. Host memory. After TIMEOUT make no other world
 * of that communicator: a collective that a rank never came to is still in it. */
USP_API usp_status usp_world_create_mpi(const usp_world_config *config, int fortran_comm, usp_world **world);
/* Any bootstrap: the callback gathers bytes over all ranks. NCCL or peer on CUDA, TCP sockets on the CPU. The callback
 * is used only during this call. */
USP_API usp_status usp_world_create_callback(const usp_world_config *config, usp_allgather_fn allgather, void *user,
                                             int size, int rank, usp_world **world);
/* Reads the environment that a launcher has made: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT (torchrun,
 * usp_launch), else that of Open MPI, of PMI (MPICH's and Intel's mpiexec) or of SLURM; none of them: a world of one.
 * On CUDA selects GPU LOCAL_RANK. MPI's and SLURM's need MASTER_ADDR, the same on all ranks, unless all are on this
 * host. USP_JOB_TOKEN, the same on all ranks and secret, keeps a job apart from all others; USP_INTERFACE, as
 * NCCL_SOCKET_IFNAME, chooses where ranks listen. Further errors: MISMATCH (the ranks do not agree on their number),
 * INVALID (variables; a rank that comes twice). */
USP_API usp_status usp_world_create_env(const usp_world_config *config, usp_world **world);

USP_API usp_status usp_world_get_info(const usp_world *world, usp_world_info *info);

/* The failure that has hit the world, if any: OK, PEER_LOST, TIMEOUT, COMM, MISMATCH or DEVICE. Waits for no rank. Once
 * failed, a world stays failed: every later call returns the same status; destroy it and create another. */
USP_API usp_status usp_world_poll(usp_world *world);
/* Waits until all work on `stream` is done, at most timeout_ms, polling the world meanwhile. Work that has failed fails
 * the world. */
USP_API usp_status usp_world_synchronize(usp_world *world, usp_stream stream);
/* Gives the world up: this rank and, at their next wait, all others leave with an error that names this rank.
 * From any thread, any number of times. */
USP_API void usp_world_abort(usp_world *world);
/* Once no mesh, sequence or layer of the world is left, frees everything but the memory of usp_world_alloc and
 * usp_world_alloc_shared, which is to be freed before. Waits for no call of another rank, and for what this one has
 * begun a short time only: between threads at most 5 s for a rank that still copies, on NCCL at most 5 s for transfers
 * to end and 5 s more for them to be aborted, on peer as long and 5 s more until the others have let go of this GPU's
 * memory. What is not free then is left behind, with a warning. Ranks still waiting for this one get PEER_LOST. */
USP_API void usp_world_destroy(usp_world *world);

/* Memory of the world's device, for programs without CUDA headers; 256-byte aligned. */
USP_API usp_status usp_world_alloc(usp_world *world, size_t bytes, void **memory);
USP_API void usp_world_free(usp_world *world, void *memory);
/* Between any two of host and device memory, in stream order; host memory may be read until the stream is synchronized.
 */
USP_API usp_status usp_world_copy(usp_world *world, void *to, const void *from, size_t bytes, usp_stream stream);
/* Collective. Device memory that the transport has registered with every rank (peer, where it is beside NCCL):
 * workspace and saved in it make exchanges faster (up to 1.7 x measured between GPUs of one node); both or neither,
 * and on all ranks alike, since NCCL may wait for ever between memory of two kinds. Every rank gets as much as the one
 * that asks for most. free is collective too, when all work that uses the memory is done, and every rank gives the
 * same piece: else INVALID (NULL or no piece of this world) or MISMATCH, and nothing is freed. Over NCCL alone, once a
 * call has been captured in a CUDA graph, what is freed stays with the world and serves who asks next. */
USP_API usp_status usp_world_alloc_shared(usp_world *world, size_t bytes, void **memory);
USP_API usp_status usp_world_free_shared(usp_world *world, void *memory);

/* ---- mesh: ulysses x ring, with data-parallel copies beside it --------------------------------------------------- */

typedef struct usp_mesh usp_mesh;
typedef enum usp_axis { USP_AXIS_ULYSSES = 0, USP_AXIS_RING = 1, USP_AXIS_SEQUENCE = 2, USP_AXIS_DATA = 3 } usp_axis;

/* Collective. World rank = (data * ring + r) * ulysses + u; the sequence axis has N = ulysses * ring ranks, p = r *
 * ulysses + u; there are size / N data copies. Any number of meshes may be alive on one world.
 * Errors: INVALID (a degree < 1, or N does not divide the world), MISMATCH, PEER_FAILED, NO_MEMORY, and the world's. */
USP_API usp_status usp_mesh_create(usp_world *world, int ulysses, int ring, usp_mesh **mesh);
/* This rank's place on an axis, and the axis' length; either may be NULL. */
USP_API usp_status usp_mesh_axis(const usp_mesh *mesh, usp_axis axis, int *rank, int *size);
/* Collective. An ncclComm_t over this rank's row of the axis, for the caller's own collectives; made at the first call
 * for an axis, owned by the mesh. MISMATCH if ranks name different axes or meshes; UNSUPPORTED on transports other than
 * NCCL. */
USP_API usp_status usp_mesh_axis_comm(usp_mesh *mesh, usp_axis axis, struct ncclComm **comm);
USP_API void usp_mesh_destroy(usp_mesh *mesh);

/* ---- sequence: which rank owns which token; the same for every (ulysses, ring) of one N -------------------------- */

typedef struct usp_sequence usp_sequence;

typedef enum usp_layout {
    USP_LAYOUT_ZIGZAG = 0,              /* rank p owns chunks p and 2N-1-p of 2N; chunk c is [c S / 2N, (c+1) S / 2N) */
    USP_LAYOUT_CONTIGUOUS = 1,          /* rank p owns [p S / N, (p+1) S / N) */
    USP_LAYOUT_STRIPE = 2,              /* rank p owns p, p + N, p + 2N, ... */
    USP_LAYOUT_ZIGZAG_PER_DOCUMENT = 3, /* a zigzag of each document of S / N tokens or more; shorter ones that follow
                                           each other share one until they are as many: even work for long ones. All
                                           cuts lie on multiples of a unit, the largest power of two of at most 128 and
                                           S / 8N tokens, or 1: no rank owns more than S / N and a unit */
    USP_LAYOUT_CUSTOM = 4               /* each rank brings its segments */
} usp_layout;

/* Tokens start, start + stride, ..., `length` of them. A rank's local order is its segments one after the other. */
typedef struct usp_segment {
    int64_t start, length, stride;
} usp_segment;

#define USP_NO_TOKENS (-1) /* an empty sequence, which nobody gets by forgetting a field */

/* Sequences packed into one: token rows of `count` documents, one after the other, on every layout. No token sees one
 * of another document, except of its ancestors in a tree; states of linear attention begin anew with each. Documents
 * may be empty. What the pointers name is copied. */
typedef struct usp_documents {
    size_t struct_size;
    int64_t count;
    const int64_t *ends;     /* [count] ascending: where each ends among the queries */
    const int64_t *key_ends; /* [count] cross-attention: the same among the keys; else NULL */
    const int64_t *prefixes; /* [count] prefix-LM, under a causal mask: the first so many tokens of each document see
                                each other both ways; NULL: none */
    const int64_t *parents;  /* [count] shared-prefix trees, under a causal mask: the document behind which each one
                                continues, whose tokens and whose ancestors' it sees, or -1. Depth first: a document's
                                parent is the one before it or an ancestor of that. NULL: none */
} usp_documents;

typedef struct usp_sequence_config {
    size_t struct_size;
    usp_layout layout;
    int max_documents;  /* room for re-planning to so many documents; 0: never re-planned */
    int64_t tokens;     /* S: global query length, 1 .. 2^31 - 2, or USP_NO_TOKENS for none; the maximum where documents
                           are re-planned */
    int64_t key_tokens; /* global key length where keys are another tensor (cross-attention); 0: as queries, and as many
                           as tokens: the same, but with key_document_ends or on the custom layout */
    int64_t documents;  /* their number; 0: one, with max_documents for those to come */
    const int64_t *document_ends;     /* as usp_documents.ends; NULL: one document. Per-document layout: the last one =
                                         tokens (of keys: key_tokens); other layouts: tokens behind it belong to none
                                         and see nothing */
    int64_t segments;                 /* custom layout: this rank's number of segments */
    const usp_segment *segment;       /* custom layout: all ranks' segments must cover every token exactly once */
    const int64_t *key_document_ends; /* as usp_documents.key_ends, prefixes, parents */
    const int64_t *prefixes;          /* given here they may be given to re-plans; so may parents */
    const int64_t *parents;
    int64_t key_segments; /* custom layout, cross-attention: the same of the keys */
    const usp_segment *key_segment;
} usp_sequence_config;

/* Collective. Usable with every mesh of the same N on the same world. Copies what the config points to. The helpers
 * below speak of queries; for those of cross-attention's keys make a second sequence, of key_tokens tokens (and with
 * the keys' segments, or on the per-document layout their documents).
 * Errors: INVALID, MISMATCH, PEER_FAILED, NO_MEMORY, UNSUPPORTED (prefixes or parents in cross-attention), the
 * world's. */
USP_API usp_status usp_sequence_create(const usp_mesh *mesh, const usp_sequence_config *config,
                                       usp_sequence **sequence);
/* Local, the same on every rank, while no other thread of the rank asks the sequence anything. Gives a sequence with
 * max_documents other documents, at most that many and at most `tokens` (key_tokens) in all. Layers on the sequence
 * follow; nothing is allocated. Device work of earlier calls must be complete or on `stream`, and later calls on other
 * streams must be made to wait for `stream`. The host waits for nothing unless the uploads of both re-plans before are
 * still to come; then at most timeout_ms.
 * Per-document layout: the last ends are the new lengths, and graphs that hold calls of layers on the sequence are
 * stale: counts, offsets and grids are in them; capture again. On every other layout ownership does not depend on
 * documents: messages are as large as without any, and captured graphs replay with the new ones.
 * Errors: INVALID (also while `stream` is captured), after which the plan is what it was; the world's: a DEVICE error
 * fails the world. Ranks of one data copy that give different documents fail the world by MISMATCH: threads at their
 * next exchange, processes within a second; a rank that does not re-plan at all is not noticed before it does. */
USP_API usp_status usp_sequence_replan(usp_sequence *sequence, int64_t documents, const int64_t *document_ends,
                                       usp_stream stream);
/* The same with everything that documents may have. */
USP_API usp_status usp_sequence_replan_documents(usp_sequence *sequence, const usp_documents *documents,
                                                 usp_stream stream);
/* The segments of sequence rank `rank`: writes at most `capacity`, always the whole number to *count. */
USP_API usp_status usp_sequence_segments(const usp_sequence *sequence, int rank, int64_t capacity,
                                         usp_segment *segments, int64_t *count);
/* Tokens that sequence rank `rank` owns (of keys: for cross-attention); -1 if there is no such rank. */
USP_API int64_t usp_sequence_local_tokens(const usp_sequence *sequence, int rank);
USP_API int64_t usp_sequence_local_key_tokens(const usp_sequence *sequence, int rank);
/* The same of this rank; -1 for NULL. */
USP_API int64_t usp_sequence_own_tokens(const usp_sequence *sequence);
USP_API int64_t usp_sequence_own_key_tokens(const usp_sequence *sequence);
/* Global index of local token `local` of `rank`, or -1; owner and local index of a global token. */
USP_API int64_t usp_sequence_to_global(const usp_sequence *sequence, int rank, int64_t local);
USP_API usp_status usp_sequence_to_local(const usp_sequence *sequence, int64_t global, int *rank, int64_t *local);
/* The position of each own token, for RoPE: its index in its document; in a tree, behind all its ancestors.
 * [local_tokens], host memory. */
USP_API usp_status usp_sequence_positions(const usp_sequence *sequence, int32_t *positions);
/* Next-token labels of own tokens from the whole token row [tokens] (host): label = tokens[global + 1], shifted before
 * sharding; `ignore` after the last token of the row or document. */
USP_API usp_status usp_sequence_labels(const usp_sequence *sequence, const int32_t *tokens, int32_t ignore,
                                       int32_t *labels);
/* Own part of a whole tensor [batch, tokens, token_bytes] into [batch, local_tokens, token_bytes]; host memory. */
USP_API usp_status usp_sequence_scatter(const usp_sequence *sequence, int64_t batch, size_t token_bytes,
                                        const void *whole, void *local);
/* Collective. The inverse: every rank gets the whole tensor; host memory. */
USP_API usp_status usp_sequence_gather(const usp_sequence *sequence, int64_t batch, size_t token_bytes,
                                       const void *local, void *whole);
USP_API void usp_sequence_destroy(usp_sequence *sequence);

/* ---- layer: one attention operator, planned once, run often ------------------------------------------------------ */

typedef struct usp_layer usp_layer;

/* How linear attention carries its state over the ring axis. */
typedef enum usp_state_exchange {
    USP_STATE_AUTO = 0,  /* gather on rings of up to 8 ranks, else chain */
    USP_STATE_CHAIN = 1, /* point to point, chunk after chunk (LASP, arXiv 2404.02882) */
    USP_STATE_GATHER = 2 /* every chunk's state to every rank at once (LASP-2, arXiv 2502.07563) */
} usp_state_exchange;

/* Softmax: heads >= kv_heads, a multiple; k and v have kv_heads.
 * Linear: q has heads, k kv_heads, v value_heads; the layer has H = max of the three, each of the three divides H, and
 * output head h reads head h * x / H of a tensor with x heads. In what follows H is that, for softmax H = heads. */
typedef struct usp_layer_config {
    size_t struct_size;
    usp_attention attention;
    usp_mask mask;
    usp_dtype dtype;
    int batch;         /* 1 .. 65536 */
    int heads;         /* 1 .. 65536 */
    int kv_heads;      /* 0: heads */
    int value_heads;   /* linear only; 0: kv_heads */
    int head_dim;      /* of q and k; at most 512 (linear on GPUs 1024, where shared memory holds them) */
    int value_dim;     /* of v and out; 0: head_dim */
    float scale;       /* > 0; 0: 1 / sqrt(head_dim) for softmax, 1 for linear. With final_state in
                          2^-64 .. 2^64: backward divides dfinal_state by it */
    int return_lse;    /* softmax: 1: forward writes the log-sum-exp of own tokens */
    int deterministic; /* 1: never choose a kernel whose result depends on timing */
    usp_state_exchange state_exchange; /* linear */
    int recompute_state; /* linear: 1: saved keeps no states, backward exchanges them again (LASP "naive"; 0: "cache")
                          */
    int initial_state;   /* linear, causal: 1: forward reads initial_state, backward writes dinitial_state */
    int final_state;     /* linear: 1: forward writes final_state, backward reads dfinal_state */
    const float
        *decay; /* linear, causal: [H] natural logarithms of lambda, <= 0, host memory, copied; NULL: lambda = 1 */
    /* Softmax only, from here on. */
    int64_t window_left;     /* keys before the diagonal that a query sees; 0: all, USP_NO_KEYS: none */
    int64_t window_right;    /* keys behind the diagonal (mask full only); 0: all, USP_NO_KEYS: none */
    usp_alignment alignment; /* of the diagonal */
    usp_route route;
    float soft_cap;      /* score = soft_cap tanh(score / soft_cap); 0: none (Gemma 2, arXiv 2408.00118) */
    float dropout;       /* the part of all probabilities that is dropped, in [0, 0.95], rounded to 2^-15; 0: none */
    int sinks;           /* 1: forward and backward read sinks, backward writes dsinks (arXiv 2309.17453, learned) */
    int dlse;            /* 1, with return_lse: backward reads dlse */
    int max_logit;       /* 1: forward writes max_logit */
    int shared_memory;   /* both kinds: 1: workspace and saved of all calls are shared memory (usp_world_alloc_shared),
                            at the same place of the same piece on all ranks of the mesh, and saved is given on all or
                            none: transports that can, as peer, then write where tokens belong, if tokens and heads
                            divide evenly. Calls: INVALID if it is not, MISMATCH where ranks are found to differ */
    const float *slopes; /* ALiBi (arXiv 2108.12409): [heads], host memory, copied; score minus slope times distance
                            from the diagonal; NULL: none */
    int head_groups;     /* with ulysses: own heads are exchanged and worked on in at most so many groups, one group's
                            exchange during another's work, by more launches and in more workspace; usp_layer_describe
                            says in how many. One, whatever is given, of several batch entries, on rings of several
                            ranks, and where ulysses does not divide heads and kv_heads. The same bits. 0: one */
    int reserved;        /* 0 */
} usp_layer_config;

#define USP_NO_KEYS (-1)

/* [batch, token, head, dim] by strides in elements; dim is dense. So [B,S,H,D], [B,H,S,D], [S,B,H,D] and the three
 * parts of a packed [B,S,3,H,D] all go in as they are. */
typedef struct usp_tensor {
    void *data;
    int64_t stride_batch, stride_token, stride_head;
} usp_tensor;

/* All tensors hold this rank's own tokens, in local order. States are fp32 [batch, H, head_dim, value_dim], the same on
 * every rank of the mesh, and always the state after a token. sinks, dsinks and max_logit are fp32, of all heads.
 * Strides of inputs may be any numbers. Those of outputs must nest (INVALID else): ordered by size, each at least as
 * long as all that lies within it, as in any view of a dense tensor, so that no two elements share a place. out must
 * not overlap q, k or v (equal addresses are found and refused, other overlaps are not). A NaN or infinity in a token
 * reaches only the results that depend on it by the mask. */
typedef struct usp_forward {
    size_t struct_size;
    usp_tensor q;               /* [batch, local_tokens, heads, head_dim] */
    usp_tensor k;               /* [batch, local_key_tokens, kv_heads, head_dim] */
    usp_tensor v;               /* [batch, local_key_tokens, kv or value_heads, value_dim] */
    usp_tensor out;             /* [batch, local_tokens, H, value_dim] */
    float *lse;                 /* [batch, heads, local_tokens] natural logarithm; if return_lse, else NULL */
    const float *initial_state; /* if config.initial_state, of the first document that has tokens; else NULL */
    float *final_state;         /* if config.final_state: behind the last token of all, so 0 if that is of no document;
                                   else NULL */
    void *saved;                /* kept for backward; NULL: no backward will follow */
    const float *sinks;         /* [heads] if config.sinks, else NULL */
    float *max_logit; /* [heads] if config.max_logit: the largest score of each head over all tokens and the batch, the
                         same on every rank; -inf if there is no pair. Else NULL */
    const uint64_t *dropout_state; /* if config.dropout: {seed, offset}, device memory, the same on every rank, read
                                      when the call runs. A pair is kept or dropped by them and by (batch, head, query,
                                      key), whatever the mesh, layout, route and device. Else NULL */
} usp_forward;

/* q, k, v, out are the tensors of forward, unchanged. Gradients are overwritten, not added to, and must not overlap
 * anything (found as above). */
typedef struct usp_backward {
    size_t struct_size;
    usp_tensor q, k, v, out, dout, dq, dk, dv;
    const float *dfinal_state;     /* if config.final_state, else NULL */
    float *dinitial_state;         /* if config.initial_state, else NULL */
    const void *saved;             /* what forward wrote */
    const float *initial_state;    /* if config.initial_state: as in forward; else NULL */
    const float *sinks;            /* as in forward */
    float *dsinks;                 /* [heads] if config.sinks: the whole gradient, the same on every rank; else NULL */
    const float *dlse;             /* [batch, heads, local_tokens] if config.dlse: the gradient of lse; else NULL */
    const uint64_t *dropout_state; /* as in forward */
} usp_backward;

/* Bytes. forward_workspace is enough for any forward; one that is given `saved` needs forward_saving_workspace only. */
typedef struct usp_sizes {
    size_t struct_size;
    size_t forward_workspace, backward_workspace, exchange_workspace, saved;
    size_t alignment; /* of workspace and saved */
    size_t forward_saving_workspace;
} usp_sizes;

/* What this rank does in one pass. Bytes are exact: what the transport is given, with what nobody reads: on a
 * contiguous causal ring the keys after the last query, and where states are gathered those of later chunks. */
typedef struct usp_cost {
    size_t struct_size;
    double flops;      /* softmax: 4 or 10 x allowed pairs x head_dim-like terms; linear: 4 or 10 x
                          tokens x heads x head_dim x value_dim, as the recurrence counts */
    double flops_max;  /* of the busiest rank of the mesh: flops_max / mean is the imbalance */
    double flops_mean; /* over the ranks of the mesh */
    int64_t ulysses_send, ulysses_recv, ring_send, ring_recv;
} usp_cost;

/* The heads and tokens that the inner (ring) stage of this rank works on, after the head exchange. */
typedef struct usp_shard {
    size_t struct_size;
    int64_t tokens, key_tokens;
    int first_head, heads;             /* of q */
    int first_key_head, key_heads;     /* of k */
    int first_value_head, value_heads; /* of v */
    int first_out_head, out_heads;     /* of out */
} usp_shard;

/* Collective. Errors: INVALID (names the field), UNSUPPORTED (says why), MISMATCH (names the field and a rank),
 * PEER_FAILED, NO_MEMORY, DEVICE, and the world's. `config` is copied. */
USP_API usp_status usp_layer_create(const usp_mesh *mesh, usp_sequence *sequence, const usp_layer_config *config,
                                    usp_layer **layer);
USP_API usp_status usp_layer_get_sizes(const usp_layer *layer, usp_sizes *sizes);
USP_API usp_status usp_layer_get_cost(const usp_layer *layer, usp_pass pass, usp_cost *cost);
USP_API usp_status usp_layer_get_shard(const usp_layer *layer, usp_shard *shard);
/* A text for people, cut to `capacity` and ended by 0; returns the whole length, like snprintf. */
USP_API size_t usp_layer_describe(const usp_layer *layer, char *text, size_t capacity);

/* Collective among the ranks of one data copy, in the same order for all layers of a world. Enqueue on `stream` and
 * return (on the CPU: return when done). Allocate nothing, never wait for the device, may be captured in a CUDA graph
 * (UNSUPPORTED where ranks of usp_world_create_threads exchange).
 * workspace: `bytes` long, contents free; one workspace serves any number of layers that run one after the other on one
 * stream. Errors: INVALID, WORKSPACE, UNSUPPORTED (captured between thread-ranks): programming errors, found before
 * anything moved, after which the caller should usp_world_abort since other ranks may wait; else the world's: a DEVICE
 * error of this rank fails the world on all ranks. */
USP_API usp_status usp_layer_forward(usp_layer *layer, const usp_forward *args, void *workspace, size_t bytes,
                                     usp_stream stream);
USP_API usp_status usp_layer_backward(usp_layer *layer, const usp_backward *args, void *workspace, size_t bytes,
                                      usp_stream stream);

/* The inner stage alone: tensors are the shards of usp_layer_get_shard, lse is [batch, out_heads, tokens], states have
 * out_heads heads. Same workspace and saved sizes. */
USP_API usp_status usp_layer_inner_forward(usp_layer *layer, const usp_forward *args, void *workspace, size_t bytes,
                                           usp_stream stream);
USP_API usp_status usp_layer_inner_backward(usp_layer *layer, const usp_backward *args, void *workspace, size_t bytes,
                                            usp_stream stream);

/* The head exchange alone, for one operand: own tokens of all heads -> all tokens of the ring rank for own heads, and
 * its transpose, which for a head that several ranks hold (kv_heads smaller than ulysses) is the sum of theirs, in fp32
 * in rank order. workspace: exchange_workspace bytes. */
typedef enum usp_operand { USP_QUERY = 0, USP_KEY = 1, USP_VALUE = 2, USP_OUT = 3 } usp_operand;
USP_API usp_status usp_layer_tokens_to_heads(usp_layer *layer, usp_operand operand, const usp_tensor *tokens,
                                             const usp_tensor *heads, void *workspace, size_t bytes, usp_stream stream);
USP_API usp_status usp_layer_heads_to_tokens(usp_layer *layer, usp_operand operand, const usp_tensor *heads,
                                             const usp_tensor *tokens, void *workspace, size_t bytes,
                                             usp_stream stream);
USP_API void usp_layer_destroy(usp_layer *layer);

#ifdef __cplusplus
}
#endif
#endif
