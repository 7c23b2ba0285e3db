/* schedule.h - a sequence seen from the ring axis of one mesh shape: what lands where in the head exchange, and the
 * tiles or chunks of work of every ring step. Plain integers, shared by all layers of that shape, kept by the sequence.
 *
 * After the exchange ring rank r holds the tokens of ranks r * U + u, u = 0 .. U-1, as one block of rows in position
 * order: for zigzag that is the first halves by ascending u, then the second halves by descending u, which together are
 * the chunks r and 2R-1-r of a ring of R. */
#ifndef USP_SCHEDULE_H
#define USP_SCHEDULE_H
#include "sequence.h"

/* Consecutive local tokens of one ulysses rank and the rows of the ring block where they land: row, row + step, ... */
typedef struct usp_landing {
    int u;
    int64_t source, count, row, step;
} usp_landing;

/* Rows row .. row + length of a ring rank's block, at positions start, start + stride, ... */
typedef struct usp_ring_segment {
    int64_t start, length, stride, row;
} usp_ring_segment;

/* A ring rank's block: rows, and its segments in row order. */
typedef struct usp_ring_block {
    int64_t rows;
    int64_t first_segment, segments; /* in usp_ring_side.segment */
    int ordered;                     /* each segment lies behind all positions of the one before */
} usp_ring_block;

/* One side (queries or keys) of a schedule. */
typedef struct usp_ring_side {
    usp_ring_block *block;     /* [ring] */
    usp_ring_segment *segment; /* of all blocks */
    usp_landing *landing;      /* of the own block: by u, then in the local order of that rank */
    int64_t landings;
    int64_t limit, segment_limit; /* no ring rank ever holds more rows or segments, whatever the documents become */
} usp_ring_side;

/* The two views of one ring step's work, rows and columns swapped, as indices into the schedule's arrays. */
typedef struct usp_step {
    int64_t query_work, query_works, query_tile;
    int64_t key_work, key_works, key_tile;
    int64_t tiles; /* of the query view; 0: no pair is allowed in this step */
} usp_step;

/* What tells schedules of one sequence apart. */
typedef struct usp_shape {
    int ulysses, ring, u, r;
    usp_attention attention;
    usp_mask mask;
} usp_shape;

typedef struct usp_schedule {
    struct usp_schedule *next;
    int users;     /* layers */
    void *scratch; /* for planning again without allocation */
    usp_shape shape;
    usp_ring_side query, key;
    usp_step *step; /* softmax: [ring]; step t takes the keys of ring rank (r - t) mod R */
    int64_t works, tiles, work_capacity, tile_capacity;
    usp_work *work; /* host, all steps */
    usp_tile *tile;
    /* linear: every ring rank's chunks in position order, and the own ones cut in blocks */
    int64_t chunks, own_chunks, blocks;
    int64_t chunk_capacity, own_chunk_limit, block_capacity;
    struct usp_chunk *chunk;
    usp_block *block;
    usp_scan_step *block_step, *chunk_step;
    void *device_memory; /* the device's copy of the arrays above */
    usp_work *device_work;
    usp_tile *device_tile;
    usp_block *device_block;
    usp_scan_step *device_block_step, *device_chunk_step;
} usp_schedule;

/* Consecutive positions held by one ring rank: rows row .. row + count of its block. */
typedef struct usp_chunk {
    int owner, own_index; /* ring rank; index among its chunks */
    int64_t start, row, count;
} usp_chunk;

/* The sequence's schedule for a shape, planned and uploaded now if it is new. UNSUPPORTED with the reason where a
 * linear layer has no order to follow. release gives it back. */
usp_status usp_schedule_acquire(usp_sequence *sequence, const usp_shape *shape, usp_schedule **schedule);
void usp_schedule_release(usp_sequence *sequence, usp_schedule *schedule);

/* Plans all schedules again after the sequence's documents changed, and uploads them; `uploads` ends with that. The
 * upload before must have ended: it reads the same host memory. */
usp_status usp_schedule_replan(usp_sequence *sequence, usp_stream stream);
void usp_schedule_destroy_all(usp_sequence *sequence);

/* (query, key) pairs that ring rank r computes, per head and batch. */
double usp_schedule_pairs(const usp_sequence *sequence, const usp_schedule *schedule, int r);

/* Device tile lists of ring step t, by query rows and by key rows. */
usp_tiles usp_schedule_query_tiles(const usp_schedule *schedule, int t);
usp_tiles usp_schedule_key_tiles(const usp_schedule *schedule, int t);

#endif
