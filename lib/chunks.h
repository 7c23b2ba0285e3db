/* chunks.h - a sequence as linear attention sees it: runs of consecutive positions, in ascending order over all ring
 * ranks, the own ones cut in blocks; and where documents begin and end in them. Plain integers. */
#ifndef USP_CHUNKS_H
#define USP_CHUNKS_H
#include "device.h"
#include "documents.h"
#include "ring.h"

/* Consecutive positions held by one ring rank: rows row .. row + count of its block. */
typedef struct usp_chunk {
    int32_t owner, place; /* ring rank; index among all chunks, owner by owner */
    int64_t start, row, count;
} usp_chunk;

/* What the device reads, and the host's copy of it. */
typedef struct usp_chunk_arrays {
    usp_block *block;          /* [block_capacity] of the own chunks */
    usp_scan_step *block_step; /* [block_capacity] */
    usp_scan_step *chunk_step; /* [chunk_capacity] */
    int32_t *chunk_place;      /* [chunk_capacity] of chunks in position order */
    int32_t *begins, *ends;    /* [own rows] as usp_linear has them; NULL: one document */
} usp_chunk_arrays;

typedef struct usp_chunk_list {
    int64_t chunks, own_chunks, blocks;
    int64_t *first; /* [ring + 1] of each owner: its first place */
    int64_t chunk_capacity, own_chunk_limit, block_capacity;
    usp_chunk *chunk; /* [chunk_capacity] in position order */
    usp_chunk_arrays to;
} usp_chunk_list;

/* Chunks of all ring ranks and the most of any one, as they are now. */
int64_t usp_chunks_count(const usp_ring_side *side, const usp_grid *grid, int64_t *most);

/* `block`: rows of a block at most. */
void usp_chunks_fill(usp_chunk_list *list, const usp_ring_side *side, const usp_grid *grid,
                     const usp_document_list *documents, int64_t block);

#endif
