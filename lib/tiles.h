/* tiles.h - cuts the score matrix of one stage in work items and tiles, by query rows and key rows. Plain integers. */
#ifndef USP_TILES_H
#define USP_TILES_H
#include "device.h"

/* Queries row after row. Inside each run, rows run[i] .. run[i + 1], positions and bounds ascend. */
typedef struct usp_query_rows {
    int64_t rows, runs;
    const int64_t *run; /* [runs + 1], counted from run[0] */
    const int32_t *position, *low, *high;
} usp_query_rows;

/* Keys of a stage in the same form; `last` as in usp_pairs, or NULL. */
typedef struct usp_key_rows {
    int64_t rows, runs;
    const int64_t *run;
    const int32_t *position, *last;
    const int32_t *family_end; /* where `last` is given: the row behind those that have the same */
} usp_key_rows;

enum { USP_FAMILY_TILES = 32 }; /* of an item and run of columns at most, in trees; else 1 */

void usp_tiles_find_families(const usp_key_rows *keys, int32_t *family_end);

/* Where items and tiles are written; with NULL arrays they are only counted. `order` is scratch for the items of one
 * list. */
typedef struct usp_order {
    uint64_t key;
    usp_work work;
} usp_order;

typedef struct usp_tile_list {
    usp_work *work;
    usp_tile *tile;
    usp_order *order;
    int64_t works, tiles;
} usp_tile_list;

/* Appends one stage's items, those with most columns first; without `whole`, only those that have tiles. By key, items
 * with as many columns to a power of two are in the order of their rows. */
void usp_tiles_by_query(usp_tile_list *list, const usp_query_rows *queries, const usp_key_rows *keys, int whole);
void usp_tiles_by_key(usp_tile_list *list, const usp_query_rows *queries, const usp_key_rows *keys);
/* Of a list of one stage. */
usp_tile_count usp_tiles_count(const usp_tile_list *list);

#endif
