/* gpu_pairs.c - the pairs of softmax cases on the CUDA device, and lists of work for them that the contract of
 * lib/device.h allows: items of any rows, tiles cut anywhere, full ranges as long as they can be. */
#include <stdlib.h>
#include <string.h>

#include "gpu_softmax.h"

static int random_below(usp_gpu_test *t, int limit) {
    t->random = t->random * 6364136223846793005u + 1442695040888963407u;
    return (int)((t->random >> 33) % (uint64_t)(limit > 0 ? limit : 1));
}

/* ---- positions --------------------------------------------------------------------------------------------------- */

static int total_keys(const usp_gpu_softmax_case *c) {
    int sum = 0;
    for (int i = 0; i < USP_GPU_KEY_BLOCKS; i++) sum += c->keys[i];
    return sum;
}

/* Row i of n: a permutation of 0 .. n - 1, where 7 does not divide n, some apart, or with a gap in it. */
static int position_of(const usp_gpu_softmax_case *c, int i, int n) {
    if (c->gap) return i < 300 ? i : i + c->gap;
    return (c->scatter && n % 7 ? 7 * i % n : i) * (c->apart ? c->apart : 1);
}

static int32_t to_int32(int64_t x) {
    return (int32_t)(x < INT32_MIN ? INT32_MIN : x > INT32_MAX ? INT32_MAX : x);
}

/* Cuts the interval of a query to the document of its diagonal; documents have `length` positions, or one, by turns. */
static void keep_in_document(int length, int diagonal, int32_t *low, int32_t *high) {
    int cycle = length + 1, base = (diagonal < 0 ? diagonal - cycle + 1 : diagonal) / cycle * cycle;
    int single = diagonal == base + length;
    int begin = single ? diagonal : base, end = single ? diagonal : base + length - 1;
    if (*low < begin) *low = begin;
    if (*high > end) *high = end;
}

static void make_query(usp_gpu_test *t, usp_gpu_softmax *s, int i) {
    const usp_gpu_softmax_case *c = s->c;
    usp_gpu_pairs *p = &s->pairs;
    int keys = total_keys(c), position = position_of(c, i, c->queries) + c->shift;
    p->query[i] = p->diagonal[i] = position;
    p->low[i] = c->left == USP_GPU_NO_LIMIT ? INT32_MIN : to_int32((int64_t)position - c->left);
    p->high[i] = c->right == USP_GPU_NO_LIMIT ? INT32_MAX : to_int32((int64_t)position + c->right);
    if (c->documents > 0) keep_in_document(c->documents, position, &p->low[i], &p->high[i]);
    if (c->random) {
        p->low[i] = random_below(t, keys + 20) - 20;
        p->high[i] = p->low[i] + random_below(t, keys / 2 + 30) - 30;
    }
}

static void make_block(usp_gpu_test *t, usp_gpu_softmax *s, int block) {
    const usp_gpu_softmax_case *c = s->c;
    int first = 0, keys = total_keys(c);
    for (int i = 0; i < block; i++) first += c->keys[i];
    for (int i = 0; i < c->keys[block]; i++) {
        int position = c->gap && block > 0 ? -1 - i : position_of(c, first + i, keys);
        s->pairs.key[block][i] = position;
        s->pairs.last[block][i] = position + random_below(t, keys / 2 + 1);
    }
}

int usp_gpu_sees(const usp_gpu_softmax *s, int query, int block, int key) {
    const usp_gpu_pairs *p = &s->pairs;
    int position = p->key[block][key];
    return p->low[query] <= position && position <= p->high[query] &&
           (!s->c->tree || p->query[query] <= p->last[block][key]);
}

/* ---- lists ------------------------------------------------------------------------------------------------------- */

/* One side of the score matrix of a block of keys. */
typedef struct side {
    const usp_gpu_softmax *s;
    int block, rows, columns, keys_are_rows;
} side;

/* 0: no row of the work sees the column; 2: every one does. */
static int column_is(const side *x, const usp_work *work, int column) {
    int seen = 0;
    for (int row = work->begin; row < work->begin + work->count; row++)
        seen +=
            x->keys_are_rows ? usp_gpu_sees(x->s, column, x->block, row) : usp_gpu_sees(x->s, row, x->block, column);
    return seen == 0 ? 0 : seen == work->count ? 2 : 1;
}

/* The tile that begins at the column, of `most` columns at most, up to the last one with a pair. */
static usp_tile make_tile(const side *x, const usp_work *work, int begin, int most) {
    usp_tile tile = {begin, begin, begin, begin};
    for (int j = begin, run = begin; j < x->columns && j < begin + most; j++) {
        int is = column_is(x, work, j);
        if (is > 0) tile.end = j + 1;
        if (is < 2) run = j + 1;
        if (j + 1 - run > tile.full_end - tile.full_begin) tile.full_begin = run, tile.full_end = j + 1;
    }
    return tile;
}

static int add_tiles(usp_gpu_test *t, const side *x, usp_work *work, usp_tile *tile) {
    for (int j = 0; j < x->columns;) {
        if (column_is(x, work, j) == 0) {
            j++;
            continue;
        }
        tile[work->tiles] = make_tile(x, work, j, random_below(t, 3) ? x->columns : 1 + random_below(t, 200));
        j = tile[work->tiles++].end;
    }
    return work->tiles;
}

/* Room for more items than there are, where the slab is poisoned. */
static usp_gpu_plan make_plan(usp_gpu_test *t, const side *x) {
    usp_work *work = calloc(USP_GPU_ROWS, sizeof *work);
    usp_tile *tile = calloc(USP_GPU_ROWS * 16, sizeof *tile);
    int32_t works = 0, tiles = 0, most = x->s->c->work_rows ? x->s->c->work_rows : USP_WORK_ROWS;
    if (!work || !tile) exit(1);
    for (int at = 0; at < x->rows; at += work[works++].count) {
        int count = random_below(t, 4) ? most : 1 + random_below(t, most);
        work[works] = (usp_work){at, count < x->rows - at ? count : x->rows - at, tiles, 0};
        tiles += add_tiles(t, x, &work[works], tile + tiles);
    }
    usp_gpu_plan plan = {.capacity = works + random_below(t, 3)};
    usp_tile_count count = {works, random_below(t, 2)};
    plan.count = usp_gpu_put(t, &count, sizeof count);
    plan.tile = usp_gpu_put(t, tile, sizeof *tile * (size_t)tiles);
    plan.work = usp_gpu_put_part(t, work, sizeof *work * (size_t)works, sizeof *work * (size_t)plan.capacity);
    free(work), free(tile);
    return plan;
}

void usp_gpu_make_pairs(usp_gpu_test *t, usp_gpu_softmax *s) {
    const usp_gpu_softmax_case *c = s->c;
    size_t bytes = sizeof(int32_t) * (size_t)c->queries;
    for (int i = 0; i < c->queries; i++) make_query(t, s, i);
    s->query_at = usp_gpu_put(t, s->pairs.query, bytes), s->diagonal_at = usp_gpu_put(t, s->pairs.diagonal, bytes);
    s->low_at = usp_gpu_put(t, s->pairs.low, bytes), s->high_at = usp_gpu_put(t, s->pairs.high, bytes);
    for (int i = 0; i < s->blocks; i++) {
        make_block(t, s, i);
        s->key_at[i] = usp_gpu_put(t, s->pairs.key[i], sizeof(int32_t) * (size_t)c->keys[i]);
        s->last_at[i] = usp_gpu_put(t, s->pairs.last[i], sizeof(int32_t) * (size_t)c->keys[i]);
        s->query_plan[i] = make_plan(t, &(side){s, i, c->queries, c->keys[i], 0});
        s->key_plan[i] = make_plan(t, &(side){s, i, c->keys[i], c->queries, 1});
    }
}
