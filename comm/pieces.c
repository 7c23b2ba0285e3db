/* pieces.c - where pieces of shared memory are on other ranks. */
#include "pieces.h"
#include "error.h"

usp_status usp_pieces_add(usp_pieces *pieces, const usp_host *host, void *memory, size_t bytes, int rank, int ranks) {
    void *entry = NULL;
    USP_TRY(usp_host_alloc(host, sizeof(usp_shared_piece) + (size_t)ranks * sizeof(char *), "shared memory", &entry));
    usp_shared_piece *piece = entry;
    *piece = (usp_shared_piece){pieces->first, memory, bytes ? bytes : 1, 0};
    for (int i = 0; i < ranks; i++) piece->at[i] = i == rank ? memory : NULL;
    pieces->first = piece;
    return USP_OK;
}

usp_shared_piece *usp_pieces_find(const usp_pieces *pieces, const void *address) {
    usp_shared_piece *piece = pieces->first;
    while (piece && (uintptr_t)address - (uintptr_t)piece->memory >= piece->bytes) piece = piece->next;
    return piece;
}

void *usp_pieces_reach(const usp_pieces *pieces, int peer, const void *address, size_t bytes) {
    const usp_shared_piece *piece = usp_pieces_find(pieces, address);
    if (!piece || !piece->at[peer]) return NULL;
    size_t offset = (size_t)((const char *)address - piece->memory);
    return bytes <= piece->bytes - offset ? piece->at[peer] + offset : NULL;
}

void usp_pieces_remove(usp_pieces *pieces, const usp_host *host, usp_shared_piece *piece) {
    usp_shared_piece **link = &pieces->first;
    while (*link && *link != piece) link = &(*link)->next;
    if (!*link) return;
    *link = piece->next;
    usp_host_free(host, piece);
}
