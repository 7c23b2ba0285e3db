/* tiles.c - finds the columns of each work item by searching in the bounds of a few rows: positions and intervals
 * ascend inside a run, so the rows' extremes decide which columns any of them sees, and which all of them see. */
#include "tiles.h"
#include "search.h"
#include "sort.h"

/* ---- the list ---------------------------------------------------------------------------------------------------- */

/* Columns begin .. end of which all are seen by every row in full_begin .. full_end, which is cut to fit. */
static void add_tile(usp_tile_list *list, int64_t begin, int64_t end, int64_t full_begin, int64_t full_end) {
    full_begin = usp_most(full_begin, begin);
    full_end = usp_least(full_end, end);
    if (begin >= end) return;
    if (full_begin >= full_end) full_begin = full_end = end;
    if (list->tile)
        list->tile[list->tiles] = (usp_tile){(int32_t)begin, (int32_t)end, (int32_t)full_begin, (int32_t)full_end};
    list->tiles++;
}

static int64_t columns_of(const usp_tile_list *list, int64_t first, int64_t end) {
    int64_t columns = 0;
    for (int64_t i = first; list->tile && i < end; i++) columns += list->tile[i].end - list->tile[i].begin;
    return columns;
}

/* The largest power of two up to x, 0 for 0. */
static int64_t power_below(int64_t x) {
    int64_t power = 1;
    while (power <= x / 2) power *= 2;
    return x ? power : 0;
}

/* An item of `count` rows whose tiles are the last ones added. `first`: the list's first item; those of the same
 * `weight` stay in the order of their rows. */
static void add_work(usp_tile_list *list, int64_t first, int64_t begin, int64_t count, int64_t first_tile,
                     int64_t weight) {
    if (list->work) {
        int64_t index = list->works - first;
        usp_work work = {(int32_t)begin, (int32_t)count, (int32_t)first_tile, (int32_t)(list->tiles - first_tile)};
        list->order[index] = (usp_order){(uint64_t)(INT32_MAX - weight) << 32 | (uint64_t)index, work};
    }
    list->works++;
}

static int by_key(const void *a, const void *b) {
    const usp_order *x = a, *y = b;
    return (x->key > y->key) - (x->key < y->key);
}

static void put_in_order(usp_tile_list *list, int64_t first) {
    if (!list->work) return;
    usp_sort(list->order, (size_t)(list->works - first), sizeof *list->order, by_key);
    for (int64_t i = first; i < list->works; i++) list->work[i] = list->order[i - first].work;
}

static int64_t columns_of_work(const usp_tile_list *list, const usp_work *work) {
    return columns_of(list, work->first_tile, work->first_tile + work->tiles);
}

usp_tile_count usp_tiles_count(const usp_tile_list *list) {
    const usp_work *first = list->work;
    int even =
        first && list->works > 0 && columns_of_work(list, first) == columns_of_work(list, first + list->works - 1);
    return (usp_tile_count){(int32_t)list->works, even};
}

/* ---- by query ---------------------------------------------------------------------------------------------------- */

/* Extremes of the rows of an item: of those that see anything, and of all. */
typedef struct extremes {
    int64_t low, high, last_low, first_high, first, last;
} extremes;

static extremes extremes_of(const usp_query_rows *q, int64_t begin, int64_t end) {
    extremes e = {INT32_MAX, INT32_MIN, INT32_MIN, INT32_MAX, INT32_MAX, INT32_MIN};
    for (int64_t i = begin; i < end; i++) {
        int seen = q->low[i] <= q->high[i];
        e.low = seen ? usp_least(e.low, q->low[i]) : e.low;
        e.high = seen ? usp_most(e.high, q->high[i]) : e.high;
        e.last_low = usp_most(e.last_low, q->low[i]);
        e.first_high = usp_least(e.first_high, q->high[i]);
        e.first = usp_least(e.first, q->position[i]);
        e.last = usp_most(e.last, q->position[i]);
    }
    return e;
}

void usp_tiles_find_families(const usp_key_rows *keys, int32_t *family_end) {
    for (int64_t i = keys->rows - 1; i >= 0; i--) {
        int same = i + 1 < keys->rows && keys->last[i + 1] == keys->last[i];
        family_end[i] = same ? family_end[i + 1] : (int32_t)(i + 1);
    }
}

/* In a tree, columns begin .. end without those that no row of the item may see any more: in so few tiles that re-plans
 * have room for them, of which the last one may have such columns in it. */
static void add_family_tiles(usp_tile_list *list, const usp_key_rows *k, const extremes *e, int64_t begin, int64_t end,
                             int64_t full_begin, int64_t full_end) {
    for (int tiles = 1; begin < end; tiles++) {
        if (tiles == USP_FAMILY_TILES) {
            add_tile(list, begin, end, end, end);
            return;
        }
        int64_t stop = begin, whole = begin; /* of what is seen by some; of what is seen by all */
        for (int64_t at = begin; at < end && k->last[at] >= e->first; at = stop) {
            stop = usp_least(k->family_end[at], end);
            if (whole == at && k->last[at] >= e->last) whole = stop;
        }
        add_tile(list, begin, stop, full_begin, usp_least(full_end, whole));
        for (begin = stop; begin < end && k->last[begin] < e->first;) begin = k->family_end[begin];
    }
}

static void add_query_tiles(usp_tile_list *list, const usp_key_rows *k, const extremes *e) {
    for (int64_t i = 0; i < k->runs; i++) {
        int64_t from = k->run[i] - k->run[0], to = k->run[i + 1] - k->run[0];
        int64_t begin = usp_first_at_least(k->position, from, to, e->low),
                end = usp_first_at_least(k->position, begin, to, e->high + 1);
        int64_t full_begin = usp_first_at_least(k->position, begin, to, e->last_low),
                full_end = usp_first_at_least(k->position, begin, to, e->first_high + 1);
        if (k->last)
            add_family_tiles(list, k, e, begin, end, full_begin, full_end);
        else
            add_tile(list, begin, end, full_begin, full_end);
    }
}

void usp_tiles_by_query(usp_tile_list *list, const usp_query_rows *queries, const usp_key_rows *keys, int whole) {
    int64_t first = list->works;
    for (int64_t begin = 0; begin < queries->rows; begin += USP_WORK_ROWS) {
        int64_t count = usp_least(queries->rows - begin, USP_WORK_ROWS), first_tile = list->tiles;
        extremes e = extremes_of(queries, begin, begin + count);
        if (e.low <= e.high) add_query_tiles(list, keys, &e);
        if (whole || list->tiles > first_tile)
            add_work(list, first, begin, count, first_tile, columns_of(list, first_tile, list->tiles));
    }
    put_in_order(list, first);
}

/* ---- by key ------------------------------------------------------------------------------------------------------ */

typedef struct key_extremes {
    int64_t first, last, first_last, last_last; /* positions; last queries, where they are given */
} key_extremes;

static key_extremes key_extremes_of(const usp_key_rows *k, int64_t begin, int64_t end) {
    key_extremes e = {INT32_MAX, INT32_MIN, INT32_MAX, INT32_MIN};
    for (int64_t i = begin; i < end; i++) {
        e.first = usp_least(e.first, k->position[i]);
        e.last = usp_most(e.last, k->position[i]);
    }
    for (int64_t i = begin; i < end && k->last; i++) {
        e.first_last = usp_least(e.first_last, k->last[i]);
        e.last_last = usp_most(e.last_last, k->last[i]);
    }
    return e;
}

/* Queries that see some of the keys reach the first one and begin before the last one; others the other way round. */
static void add_key_tiles(usp_tile_list *list, const usp_query_rows *q, const key_extremes *e, int family) {
    for (int64_t i = 0; i < q->runs; i++) {
        int64_t from = q->run[i] - q->run[0], to = q->run[i + 1] - q->run[0];
        int64_t begin = usp_first_at_least(q->high, from, to, e->first),
                end = usp_first_at_least(q->low, begin, to, e->last + 1);
        int64_t full_begin = usp_first_at_least(q->high, begin, to, e->last),
                full_end = usp_first_at_least(q->low, begin, to, e->first + 1);
        if (family) {
            end = usp_least(end, usp_first_at_least(q->position, begin, to, e->last_last + 1));
            full_end = usp_least(full_end, usp_first_at_least(q->position, begin, to, e->first_last + 1));
        }
        add_tile(list, begin, end, full_begin, full_end);
    }
}

/* Neighbours see nearly the same queries, which are read and added to: they are worked on together. */
void usp_tiles_by_key(usp_tile_list *list, const usp_query_rows *queries, const usp_key_rows *keys) {
    int64_t first = list->works;
    for (int64_t begin = 0; begin < keys->rows; begin += USP_WORK_ROWS) {
        int64_t count = usp_least(keys->rows - begin, USP_WORK_ROWS), first_tile = list->tiles;
        key_extremes e = key_extremes_of(keys, begin, begin + count);
        add_key_tiles(list, queries, &e, keys->last != NULL);
        add_work(list, first, begin, count, first_tile, power_below(columns_of(list, first_tile, list->tiles)));
    }
    put_in_order(list, first);
}
