/* pieces.h - shared memory of transports whose ranks reach each other's: where the piece that is here is on the others.
 */
#ifndef USP_PIECES_H
#define USP_PIECES_H
#include "host.h"

typedef struct usp_shared_piece {
    struct usp_shared_piece *next;
    char *memory;
    size_t bytes;
    int shown;  /* others may have it */
    char *at[]; /* [ranks] where this rank reaches theirs; NULL: not there (yet); the own one's is `memory` */
} usp_shared_piece;

typedef struct usp_pieces {
    usp_shared_piece *first;
} usp_pieces;

/* A piece that no other rank is known to have yet. */
usp_status usp_pieces_add(usp_pieces *pieces, const usp_host *host, void *memory, size_t bytes, int rank, int ranks);
/* The piece that `address` is in, or NULL. */
usp_shared_piece *usp_pieces_find(const usp_pieces *pieces, const void *address);
/* The same place of `peer`'s piece, or NULL if there are not so many bytes. */
void *usp_pieces_reach(const usp_pieces *pieces, int peer, const void *address, size_t bytes);
void usp_pieces_remove(usp_pieces *pieces, const usp_host *host, usp_shared_piece *piece);

#endif
