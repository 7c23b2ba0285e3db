/* peer_memory.c - how ranks come to have each other's memory mapped, and how they let go of it. */
#define _GNU_SOURCE
#include <sys/stat.h>
#include <unistd.h>

#include "error.h"
#include "peer_state.h"
#include "thread.h"

/* How others find a piece. */
typedef struct usp_peer_card {
    uint64_t process;
    char *memory;
    int32_t gpu, failed;
    cudaIpcMemHandle_t handle;
} usp_peer_card;

/* ---- the others' ------------------------------------------------------------------------------------------------- */

/* Numbers of processes are of a name space. */
static uint64_t process_identity(void) {
    struct stat space = {0};
    stat("/proc/self/ns/pid", &space);
    return (uint64_t)space.st_ino << 32 ^ (uint64_t)getpid();
}

/* Of another process, or of another thread of this one. */
static cudaError_t open_piece(usp_peer *self, const usp_peer_card *card, int peer, char **at) {
    void *mapped = card->memory;
    cudaError_t error = cudaSuccess;
    int maps = card->process != process_identity();
    self->other[peer].maps = maps;
    if (maps) error = cudaIpcOpenMemHandle(&mapped, card->handle, cudaIpcMemLazyEnablePeerAccess);
    if (!maps && card->gpu != self->gpu) error = cudaDeviceEnablePeerAccess(card->gpu, 0);
    if (error != cudaSuccess) cudaGetLastError();
    if (error == cudaErrorPeerAccessAlreadyEnabled) error = cudaSuccess;
    if (error == cudaSuccess) *at = mapped;
    return error;
}

static usp_status map_piece(usp_peer *self, int peer, const usp_peer_card *card, usp_shared_piece *piece) {
    if (card->failed) return usp_fail(USP_UNSUPPORTED, "memory of rank %d cannot be shared", peer);
    cudaError_t error = open_piece(self, card, peer, &piece->at[peer]);
    if (error == cudaSuccess) return USP_OK;
    return usp_fail(USP_UNSUPPORTED, "the memory of rank %d's GPU cannot be used: %s", peer, cudaGetErrorString(error));
}

static usp_status gather_cards(usp_peer *self, usp_shared_piece *piece, usp_peer_card *all) {
    _Static_assert(sizeof(usp_peer_card) <= sizeof(usp_peer_word), "cards come where words do");
    usp_peer_card mine = {process_identity(), piece->memory, self->gpu, 0, {{0}}};
    mine.failed = cudaIpcGetMemHandle(&mine.handle, piece->memory) != cudaSuccess;
    if (mine.failed) cudaGetLastError();
    self->shown = piece->shown = 1;
    return usp_transport_allgather(&self->base, &mine, all, sizeof mine);
}

usp_status usp_peer_show_piece(usp_peer *self, usp_shared_piece *piece) {
    usp_peer_card *all = (usp_peer_card *)(void *)self->words;
    if (self->base.size == 1) return USP_OK;
    USP_TRY(gather_cards(self, piece, all));
    for (int peer = 0; peer < self->base.size; peer++)
        if (self->other[peer].near) USP_TRY(map_piece(self, peer, &all[peer], piece));
    return USP_OK;
}

static void unmap_piece(usp_peer *self, usp_shared_piece *piece) {
    for (int peer = 0; peer < self->base.size; peer++) {
        if (!self->other[peer].near) continue;
        if (piece->at[peer] && self->other[peer].maps) cudaIpcCloseMemHandle(piece->at[peer]);
        piece->at[peer] = NULL;
    }
    cudaGetLastError();
}

/* ---- the table --------------------------------------------------------------------------------------------------- */

usp_status usp_peer_alloc_shared(usp_transport *transport, size_t bytes, void **memory) {
    usp_peer *self = usp_peer_of(transport);
    USP_TRY(usp_plain_alloc_shared(transport, bytes, memory));
    usp_status status =
        usp_pieces_add(&self->pieces, transport->host, *memory, bytes, transport->rank, transport->size);
    if (status == USP_OK) return USP_OK;
    usp_plain_free_shared(transport, *memory);
    *memory = NULL;
    return status;
}

/* A rank that cannot map another one's has failed, and with it all. */
usp_status usp_peer_register_shared(usp_transport *transport, void *memory) {
    usp_peer *self = usp_peer_of(transport);
    usp_status status = usp_peer_show_piece(self, usp_pieces_find(&self->pieces, memory));
    return status == USP_OK ? USP_OK : usp_transport_fail(transport, status);
}

/* All have come, and their work is done: nobody writes to what is let go. One that was not shown goes back as it came;
 * what ranks that have failed may still write to destroy lets go and frees. */
usp_status usp_peer_free_shared(usp_transport *transport, void *memory) {
    usp_peer *self = usp_peer_of(transport);
    usp_shared_piece *piece = usp_pieces_find(&self->pieces, memory);
    if (piece->shown) {
        USP_TRY(usp_transport_poll(transport));
        unmap_piece(self, piece);
        USP_TRY(usp_transport_allgather(transport, memory, memory, 0));
    }
    usp_pieces_remove(&self->pieces, transport->host, piece);
    return usp_plain_free_shared(transport, memory);
}

/* ---- the end ----------------------------------------------------------------------------------------------------- */

void usp_peer_let_go(usp_peer *self) {
    for (usp_shared_piece *piece = self->pieces.first; piece; piece = piece->next) unmap_piece(self, piece);
    if (self->board.flags) __atomic_store_n(&self->board.left[self->other[self->base.rank].seat], 1, __ATOMIC_RELEASE);
}

static int others_have_left(const usp_peer *self) {
    for (int peer = 0; self->shown && peer < self->base.size; peer++)
        if (self->other[peer].near && !self->other[peer].lost &&
            !__atomic_load_n(&self->board.left[self->other[peer].seat], __ATOMIC_ACQUIRE))
            return 0;
    return 1;
}

void usp_peer_free_pieces(usp_peer *self) {
    int64_t begun = usp_now_ms();
    int free_now = 0;
    for (int round = 0; !(free_now = others_have_left(self)); round++) {
        if (usp_now_ms() - begun > USP_PEER_LIMIT_MS) break;
        usp_pause(round);
    }
    while (self->pieces.first) {
        usp_shared_piece *piece = self->pieces.first;
        if (free_now) usp_plain_free_shared(&self->base, piece->memory);
        if (!free_now)
            usp_host_log(self->base.host, 1, "rank %d leaves %zu bytes of its GPU's memory to ranks that had it mapped",
                         self->base.rank, piece->bytes);
        usp_pieces_remove(&self->pieces, self->base.host, piece);
    }
}
