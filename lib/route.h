/* route.h - what travels on the ring axis of softmax attention: in which stage which keys meet the own queries, whose
 * they are, and who meets the own keys. Relay ring, direct and gathered are planners of one form. */
#ifndef USP_ROUTE_H
#define USP_ROUTE_H
#include "mask.h"
#include "ring.h"

/* Rows of one ring rank's block of keys that another one reads, in one message: consecutive from `row` on, or, where
 * `map` >= 0, those that map .. map + rows of a table of rows name. */
typedef struct usp_parcel {
    int r; /* the other ring rank */
    int64_t rows, row, map;
    int64_t before; /* rows in the other one's memory for the stage that lie before: of a reader, of its keys; of a
                       source, of its own keys' gradients */
} usp_parcel;

/* The keys of one stage, parcel after parcel of their owners, and what others read of the own ones. Stage 0 is the own
 * block, and no parcel. */
typedef struct usp_route_stage {
    int64_t rows; /* of its keys */
    int64_t source, sources, reader, readers;
} usp_route_stage;

typedef struct usp_route_plan {
    usp_route route; /* resolved */
    int stages;
    int last; /* the last stage that has keys for the own queries */
    usp_route_stage *stage;
    usp_parcel *source, *reader; /* [ring] each */
    int32_t *map;                /* [map_capacity] */
    int64_t maps, map_capacity;
    int64_t limit;        /* rows of a stage but the first, whatever the documents become */
    int64_t reader_limit; /* rows of all readers of a stage */
    int64_t pack_limit;   /* of those that have a map */
} usp_route_plan;

/* Is there one parcel a stage and way at most? */
static inline int usp_route_is_single(const usp_route_plan *plan) {
    return plan->stages < 2 || plan->stage[1].sources == 1;
}

/* What a side sees; see usp_plan. */
typedef struct usp_sides {
    const usp_ring_side *query, *key;
    const int32_t *low, *high; /* of every query row, block after block */
    const usp_grid *grid;
} usp_sides;

/* One interval of positions, ends included. */
typedef struct usp_span {
    int32_t low, high;
} usp_span;

/* Rows that cross the ring axis in all, by the relay ring and by the other routes, and the most rows of one direct
 * stage and of one rank's gathered stage. The same on all ranks. `spans` is scratch for a span a query row. */
typedef struct usp_route_rows {
    int64_t relay, direct, direct_most, gathered_most;
} usp_route_rows;
usp_route_rows usp_route_count(const usp_sides *sides, usp_span *spans);

/* The route that USP_ROUTE_AUTO is. */
usp_route usp_route_choose(const usp_route_rows *rows, int ring);

/* Plans `plan->route`. Maps behind map_capacity are counted, not written. */
void usp_route_fill(usp_route_plan *plan, const usp_sides *sides, usp_span *spans);

#endif
