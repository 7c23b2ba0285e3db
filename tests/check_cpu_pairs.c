/* check_cpu_pairs.c - random pairs, and lists of work for them that the contract of lib/device.h allows: items of any
 * rows, tiles cut anywhere, full ranges of any pairs that are all allowed. */
#include <stdlib.h>
#include <string.h>

#include "cpu_kernels.h"

/* ---- pairs ------------------------------------------------------------------------------------------------------- */

/* How a problem's pairs are drawn: nearly all, intervals about the diagonal, any intervals, none for many rows. */
static void draw_query(check *c, pairs *p, int i, int kind, int jump) {
    int diagonal = i * jump - (jump - 1) * 10, reach = 1 + usp_check_pick(c, p->keys + 1);
    p->query[i] = 3 + diagonal, p->diagonal[i] = diagonal;
    p->low[i] = kind == 1 ? diagonal - 40 : INT32_MIN;
    p->high[i] = kind == 1 ? diagonal : INT32_MAX;
    if (kind < 2) return;
    p->low[i] = usp_check_pick(c, p->keys * jump + 20) - 20;
    p->high[i] = p->low[i] + reach - (kind == 3 ? p->keys / 2 + 1 : 1);
}

/* Positions that ascend, with gaps or without, and here and there jump back, as zigzag has them. */
static void draw_keys(check *c, pairs *p, int jump) {
    int at = -usp_check_pick(c, 5);
    for (int i = 0; i < p->keys; i++, at += usp_check_pick(c, 8) ? 1 : usp_check_pick(c, jump + 1)) {
        if (!usp_check_pick(c, 40)) at = usp_check_pick(c, p->keys);
        p->key[i] = at;
        p->last[i] = at + usp_check_pick(c, p->queries * jump / 2 + 10);
    }
}

void usp_check_pairs_make(check *c, pairs *p, int queries, int keys) {
    int32_t *of_queries = usp_check_memory(sizeof(int32_t) * 4 * (size_t)queries);
    int32_t *of_keys = usp_check_memory(sizeof(int32_t) * 2 * (size_t)keys);
    int kind = usp_check_pick(c, 4), jump = 1 + usp_check_pick(c, 2);
    p->queries = queries, p->keys = keys, p->tree = !usp_check_pick(c, 3);
    p->query = of_queries, p->low = p->query + queries, p->high = p->low + queries, p->diagonal = p->high + queries;
    p->key = of_keys, p->last = p->key + keys;
    for (int i = 0; i < queries; i++) draw_query(c, p, i, kind, jump);
    draw_keys(c, p, jump);
}

void usp_check_pairs_free(pairs *p) {
    free(p->query);
    free(p->key);
}

int usp_check_allowed(const pairs *p, int query, int key) {
    return p->low[query] <= p->key[key] && p->key[key] <= p->high[query] &&
           (!p->tree || p->query[query] <= p->last[key]);
}

/* ---- lists ------------------------------------------------------------------------------------------------------- */

/* One side of the score matrix of queries and keys [from, to). */
typedef struct side {
    const pairs *pairs;
    int keys_are_rows, from, rows, columns;
} side;

/* 0: no row of the work sees the column; 2: every one does. */
static int column_is(const side *x, const usp_work *work, int column) {
    int seen = 0;
    for (int row = work->begin; row < work->begin + work->count; row++)
        seen += x->keys_are_rows ? usp_check_allowed(x->pairs, column, x->from + row)
                                 : usp_check_allowed(x->pairs, row, x->from + column);
    return seen == 0 ? 0 : seen == work->count ? 2 : 1;
}

/* The longest full range of the tile, or a part of it, or none. */
static void find_full(check *c, const side *x, const usp_work *work, usp_tile *tile) {
    tile->full_begin = tile->full_end = tile->begin;
    for (int j = tile->begin, run = j; j < tile->end; j++) {
        if (column_is(x, work, j) < 2) run = j + 1;
        if (j + 1 - run > tile->full_end - tile->full_begin) tile->full_begin = run, tile->full_end = j + 1;
    }
    int length = tile->full_end - tile->full_begin;
    if (length && !usp_check_pick(c, 3)) tile->full_begin += usp_check_pick(c, length);
    if (!usp_check_pick(c, 4)) tile->full_end = tile->full_begin;
}

/* Tiles cut anywhere; columns without a pair may lie in one or in none. */
static void add_tiles(check *c, const side *x, usp_work *work, usp_tile *tile) {
    int cut = 1 + usp_check_pick(c, 2) * usp_check_pick(c, 200), loose = usp_check_pick(c, 2);
    for (int j = 0; j < x->columns;) {
        int most = cut > 1 ? j + 1 + usp_check_pick(c, cut) : x->columns;
        usp_tile *next = tile + work->tiles;
        if (!loose && column_is(x, work, j) == 0) {
            j++;
            continue;
        }
        *next = (usp_tile){j, most < x->columns ? most : x->columns, 0, 0};
        j = next->end;
        while (!loose && column_is(x, work, next->end - 1) == 0) next->end--;
        find_full(c, x, work, next);
        work->tiles++;
    }
}

static void swap_work(usp_work *a, usp_work *b) {
    usp_work other = *a;
    *a = *b, *b = other;
}

/* Items in any order, and rubbish behind them. */
static void make_list(check *c, const side *x, int whole, list *l) {
    int tiles = 0, most = usp_check_pick(c, 3) ? USP_WORK_ROWS : 1 + usp_check_pick(c, 40);
    l->count = (usp_tile_count){0, usp_check_pick(c, 2)}, l->capacity = x->rows + 1;
    memset(l->work, 0x7f, sizeof *l->work * (size_t)l->capacity);
    for (int begin = 0, end; begin < x->rows; begin = end) {
        int count = 1 + usp_check_pick(c, most);
        usp_work work = {begin, count < x->rows - begin ? count : x->rows - begin, tiles, 0};
        end = begin + work.count;
        add_tiles(c, x, &work, l->tile + tiles);
        tiles += work.tiles;
        if (!work.tiles && !whole) continue;
        l->work[l->count.works] = work;
        swap_work(&l->work[l->count.works], &l->work[usp_check_pick(c, l->count.works + 1)]);
        l->count.works++;
    }
}

void usp_check_lists(check *c, problem *p, int from, int to, int whole) {
    make_list(c, &(side){&p->pairs, 0, from, p->pairs.queries, to - from}, whole, &p->by_query);
    make_list(c, &(side){&p->pairs, 1, from, to - from, p->pairs.queries}, 1, &p->by_key);
    p->args.by_query = (usp_tiles){p->by_query.work, p->by_query.tile, &p->by_query.count, p->by_query.capacity};
    p->args.by_key = (usp_tiles){p->by_key.work, p->by_key.tile, &p->by_key.count, p->by_key.capacity};
}
