/* route.c - plans the stages of the three routes from what the queries of every ring rank see. */
#include "route.h"
#include "search.h"
#include "sort.h"

/* ---- what a ring rank sees --------------------------------------------------------------------------------------- */

static int by_low(const void *a, const void *b) {
    const usp_span *x = a, *y = b;
    return (x->low > y->low) - (x->low < y->low);
}

/* Adds an interval to spans of ascending lows, joining what touches the last one. */
static int64_t add_span(usp_span *spans, int64_t count, int32_t low, int32_t high) {
    if (low > high) return count;
    if (count && low <= spans[count - 1].high + 1) {
        if (high > spans[count - 1].high) spans[count - 1].high = high;
        return count;
    }
    spans[count] = (usp_span){low, high};
    return count + 1;
}

/* The union of all intervals of a ring rank's queries. Inside a run they ascend. */
static int64_t find_spans(const usp_sides *sides, int r, usp_span *spans) {
    const usp_ring_side *query = sides->query;
    int64_t count = 0, joined = 0;
    for (int64_t i = query->first_run[r]; i < query->first_run[r + 1]; i++) {
        int64_t begin = count;
        for (int64_t row = query->run[i]; row < query->run[i + 1]; row++)
            count = begin + add_span(spans + begin, count - begin, sides->low[row], sides->high[row]);
    }
    if (query->first_run[r + 1] - query->first_run[r] <= 1) return count;
    usp_sort(spans, (size_t)count, sizeof *spans, by_low);
    for (int64_t i = 0; i < count; i++) joined = add_span(spans, joined, spans[i].low, spans[i].high);
    return joined;
}

/* Rows of ring rank s's block of keys that the spans hold, as ranges of rows. */
typedef struct walk {
    int32_t *map;                           /* every row is written here, as far as there is room */
    int64_t room, rows, ranges, first, end; /* first: of the first range; end: of the last */
} walk;

static void add_range(walk *w, int64_t begin, int64_t end) {
    int64_t written = usp_least(end - begin, w->room - w->rows);
    if (begin >= end) return;
    if (w->rows == 0) w->first = begin;
    if (w->rows == 0 || begin != w->end) w->ranges++;
    for (int64_t i = 0; i < written; i++) w->map[w->rows + i] = (int32_t)(begin + i);
    w->rows += end - begin;
    w->end = end;
}

static void walk_rows(walk *w, const usp_ring_side *key, int s, const usp_span *spans, int64_t count) {
    for (int64_t i = key->first_run[s]; i < key->first_run[s + 1]; i++)
        for (int64_t j = 0, end = key->run[i]; j < count; j++) {
            int64_t begin = usp_first_at_least(key->position, end, key->run[i + 1], spans[j].low);
            end = usp_first_at_least(key->position, begin, key->run[i + 1], (int64_t)spans[j].high + 1);
            add_range(w, begin - key->first[s], end - key->first[s]);
        }
}

/* ---- counting ---------------------------------------------------------------------------------------------------- */

usp_route_rows usp_route_count(const usp_sides *sides, usp_span *spans) {
    int ring = sides->grid->ring;
    usp_route_rows rows = {.relay = (ring - 1) * sides->key->first[ring]};
    for (int r = 0; r < ring; r++) {
        int64_t count = find_spans(sides, r, spans), gathered = 0;
        for (int s = 0; s < ring; s++) {
            walk w = {0};
            if (s == r) continue;
            walk_rows(&w, sides->key, s, spans, count);
            gathered += w.rows;
            rows.direct_most = usp_most(rows.direct_most, w.rows);
        }
        rows.direct += gathered;
        rows.gathered_most = usp_most(rows.gathered_most, gathered);
    }
    return rows;
}

usp_route usp_route_choose(const usp_route_rows *rows, int ring) {
    int buffers = ring > 2 ? 2 : 1; /* of keys that arrive and keys that are here */
    if (rows->gathered_most <= buffers * rows->direct_most) return USP_ROUTE_GATHERED;
    return rows->direct < rows->relay ? USP_ROUTE_DIRECT : USP_ROUTE_RELAY;
}

/* ---- stages ------------------------------------------------------------------------------------------------------ */

static usp_parcel whole_block(const usp_ring_side *key, int owner, int other) {
    return (usp_parcel){other, usp_ring_rows(key, owner), 0, -1, 0};
}

/* What `reader`, whose spans these are, reads of `owner`'s keys, as a parcel with `other`; its map, if it takes one,
 * comes behind the plan's others. */
static usp_parcel seen_block(usp_route_plan *plan, const usp_ring_side *key, int owner, int other,
                             const usp_span *spans, int64_t count) {
    walk w = {0};
    if (plan->map) w = (walk){.map = plan->map + plan->maps, .room = plan->map_capacity - plan->maps};
    walk_rows(&w, key, owner, spans, count);
    usp_parcel parcel = {other, w.rows, w.first, w.ranges > 1 ? plan->maps : -1, 0};
    if (w.ranges > 1) plan->maps += w.rows;
    return parcel;
}

static void begin_stages(usp_route_plan *plan, const usp_sides *sides) {
    int ring = sides->grid->ring, gathered = plan->route == USP_ROUTE_GATHERED;
    plan->stages = gathered && ring > 1 ? 2 : ring;
    plan->maps = 0;
    plan->stage[0] = (usp_route_stage){.rows = usp_ring_rows(sides->key, sides->grid->r)};
    for (int t = 1; t < plan->stages; t++) {
        int64_t first = t - 1, count = gathered ? ring - 1 : 1;
        plan->stage[t] = (usp_route_stage){.source = first, .sources = count, .reader = first, .readers = count};
    }
}

/* In every stage, in ring order: the keys of r - 1, r - 2, ...; the own ones are read by r + 1, r + 2, ... */
static void fill_relay(usp_route_plan *plan, const usp_sides *sides) {
    int ring = sides->grid->ring, r = sides->grid->r;
    for (int i = 1; i < ring; i++) {
        int owner = (r - i + ring) % ring;
        plan->source[i - 1] = whole_block(sides->key, owner, owner);
        plan->reader[i - 1] = whole_block(sides->key, r, (r + i) % ring);
    }
}

static int64_t count_seen(const usp_ring_side *key, int owner, const usp_span *spans, int64_t count) {
    walk w = {0};
    walk_rows(&w, key, owner, spans, count);
    return w.rows;
}

/* A gathered stage has the keys of r - 1, r - 2, ... one behind the other, and their readers' gradients come in the
 * order r + 1, r + 2, ...: so before what goes from rank r to owner r - i comes what r - m, for all m < i, has for it.
 */
static void find_sources_before(usp_route_plan *plan, const usp_sides *sides, usp_span *spans) {
    int ring = sides->grid->ring, r = sides->grid->r;
    for (int m = 1; m < ring - 1; m++) {
        int64_t count = find_spans(sides, (r - m + ring) % ring, spans);
        for (int i = m + 1; i < ring; i++)
            plan->source[i - 1].before += count_seen(sides->key, (r - i + ring) % ring, spans, count);
    }
}

static void fill_seen(usp_route_plan *plan, const usp_sides *sides, usp_span *spans) {
    int ring = sides->grid->ring, r = sides->grid->r;
    int64_t count = find_spans(sides, r, spans);
    for (int i = 1; i < ring; i++) {
        int owner = (r - i + ring) % ring;
        plan->source[i - 1] = seen_block(plan, sides->key, owner, owner, spans, count);
    }
    for (int i = 1; i < ring; i++) {
        int reader = (r + i) % ring;
        count = find_spans(sides, reader, spans);
        plan->reader[i - 1] = seen_block(plan, sides->key, r, reader, spans, count);
        for (int j = 1; j < i && plan->route == USP_ROUTE_GATHERED; j++)
            plan->reader[i - 1].before += count_seen(sides->key, (reader - j + ring) % ring, spans, count);
    }
    if (plan->route == USP_ROUTE_GATHERED) find_sources_before(plan, sides, spans);
}

/* Sums of parcels. */
static void finish_stages(usp_route_plan *plan) {
    plan->last = 0;
    for (int t = 1; t < plan->stages; t++) {
        usp_route_stage *stage = &plan->stage[t];
        for (int64_t i = 0; i < stage->sources; i++) stage->rows += plan->source[stage->source + i].rows;
        if (stage->rows) plan->last = t;
    }
}

void usp_route_fill(usp_route_plan *plan, const usp_sides *sides, usp_span *spans) {
    begin_stages(plan, sides);
    if (plan->route == USP_ROUTE_RELAY)
        fill_relay(plan, sides);
    else
        fill_seen(plan, sides, spans);
    finish_stages(plan);
}
