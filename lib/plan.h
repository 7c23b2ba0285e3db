/* plan.h - a sequence seen from one place of one mesh shape under one mask: blocks, routes, pairs, tiles or chunks, on
 * the host and on the device. Shared by all layers of that shape, kept by the sequence, planned again with it. */
#ifndef USP_PLAN_H
#define USP_PLAN_H
#include "arena.h"
#include "chunks.h"
#include "route.h"
#include "sequence.h"
#include "tiles.h"

/* What tells plans of one sequence apart. */
typedef struct usp_shape {
    usp_grid grid;
    usp_attention attention;
    usp_rule rule;
    usp_route route; /* softmax */
} usp_shape;

/* What the device reads, and the host's copy of it. */
typedef struct usp_plan_arrays {
    usp_tile_count *count; /* [2][stages] items by query and by key */
    usp_work *work;        /* [stages][query_works], then [stages][key_works] */
    usp_tile *tile;
    int32_t *query, *low, *high, *diagonal; /* [query_limit] own rows */
    int32_t *key, *last;                    /* own rows, then those of every other stage */
    int32_t *query_landing, *key_landing;   /* rows of the own block by u, where there is an exchange */
    int32_t *map;                           /* of parcels */
    usp_chunk_arrays chunks;                /* linear */
} usp_plan_arrays;

typedef struct usp_plan {
    struct usp_plan *next;
    int users; /* layers */
    usp_shape shape;
    usp_ring_side query, key;       /* key shares query's arrays unless the sequence is cross */
    int64_t query_limit, key_limit; /* no ring rank ever holds more rows, whatever the documents become */
    int32_t *low, *high, *diagonal; /* of every query, block after block */
    usp_route_plan route;           /* softmax */
    int64_t query_works, key_works; /* items of a stage at most */
    int64_t tiles, tile_capacity;
    usp_chunk_list chunks; /* linear */
    usp_span *spans;       /* scratch, as the next three */
    int64_t *runs;
    usp_order *order;
    int32_t *family_end;
    size_t bytes;                         /* of the arrays */
    void *host_memory[2], *device_memory; /* the second one where documents are to come */
    usp_plan_arrays host, device;         /* host: the newest copy */
} usp_plan;

/* The sequence's plan for a shape, made and uploaded now if it is new. UNSUPPORTED with the reason where a linear layer
 * has no order to follow. release gives it back. */
usp_status usp_plan_acquire(usp_sequence *sequence, const usp_shape *shape, usp_plan **plan);
void usp_plan_release(usp_sequence *sequence, usp_plan *plan);

/* Plans all again after the sequence's documents changed, into the host copy of the sequence's turn, and uploads them;
 * sequence->uploads ends with that. */
usp_status usp_plan_again_all(usp_sequence *sequence, usp_stream stream);

/* Rows of ring rank r's block; of the own one. */
static inline int64_t usp_plan_queries(const usp_plan *plan) {
    return usp_ring_rows(&plan->query, plan->shape.grid.r);
}
static inline int64_t usp_plan_keys(const usp_plan *plan) {
    return usp_ring_rows(&plan->key, plan->shape.grid.r);
}

/* Planning in its parts (plan.c), as plan_store.c calls them: who holds which rows; what travels; pairs and work, into
 * plan->host. Without memory for tiles these are counted. */
void usp_plan_owners(usp_sequence *sequence, usp_plan *plan);
usp_sides usp_plan_sides(const usp_plan *plan);
void usp_plan_routes(usp_plan *plan);
void usp_plan_fill(usp_sequence *sequence, usp_plan *plan);

/* Where the keys of stage t lie among all stages'. */
static inline int64_t usp_plan_first_key(const usp_plan *plan, int t) {
    return t ? plan->key_limit + (t - 1) * plan->route.limit : 0;
}

/* Stage t as kernels take it: pairs, and items by query and by key, in `arrays` (the host's or the device's). */
usp_pairs usp_plan_pairs(const usp_plan *plan, const usp_plan_arrays *arrays, int t);
usp_tiles usp_plan_tiles(const usp_plan *plan, const usp_plan_arrays *arrays, int t, int by_key);

/* (query, key) pairs that ring rank r computes, per head and batch. */
double usp_plan_work(const usp_sequence *sequence, const usp_plan *plan, int r);

#endif
