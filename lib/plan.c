/* plan.c - plans a shape of a sequence as a whole: which part follows from which. Runs nothing. */
#include "plan.h"

/* ---- ownership: blocks and routes -------------------------------------------------------------------------------- */

static usp_sight sight_from(const usp_plan *plan, int64_t row) {
    return (usp_sight){plan->low + row, plan->high + row, plan->diagonal ? plan->diagonal + row : NULL};
}

/* The longest segment at the beginning of `rows` rows: positions of one stride. */
static usp_segment segment_at(const int32_t *x, int64_t rows) {
    int64_t count = 1, stride = rows > 1 ? (int64_t)x[1] - x[0] : 1;
    while (count < rows && (int64_t)x[count] - x[count - 1] == stride) count++;
    return stride > 0 ? (usp_segment){x[0], count, stride} : (usp_segment){x[0], 1, 1};
}

/* What ring ranks first .. end - 1 see. */
static void find_sight(usp_plan *plan, const usp_rule *rule, const usp_document_list *documents, int first, int end) {
    int64_t rows = plan->query.first[end];
    for (int64_t row = plan->query.first[first], near = 0; row < rows;) {
        usp_segment segment = segment_at(plan->query.position + row, rows - row);
        near = usp_mask_sight(rule, documents, &segment, near, sight_from(plan, row));
        row += segment.length;
    }
}

/* What travels must not depend on documents that are to come, unless the owners do: it is then what may be seen with
 * any. Prefixes see ahead; documents of cross-attention move the diagonal. */
static void find_widest_sight(usp_sequence *sequence, usp_plan *plan) {
    usp_document document[2];
    usp_document_list one = {.capacity = 1, .document = document};
    usp_rule rule = plan->shape.rule;
    if (!sequence->replans || usp_sequence_moves(sequence)) {
        find_sight(plan, &rule, &sequence->documents, 0, plan->shape.grid.ring);
        return;
    }
    if (sequence->prefixes || sequence->cross) rule = (usp_rule){INT32_MAX, INT32_MAX, rule.alignment};
    usp_documents_set(&one, &(usp_documents){0}, sequence->query.tokens, sequence->key.tokens);
    find_sight(plan, &rule, &one, 0, plan->shape.grid.ring);
}

usp_sides usp_plan_sides(const usp_plan *plan) {
    return (usp_sides){&plan->query, &plan->key, plan->low, plan->high, &plan->shape.grid};
}

void usp_plan_owners(usp_sequence *sequence, usp_plan *plan) {
    usp_ring_side_plan(&plan->query, &sequence->query, &plan->shape.grid);
    if (sequence->cross)
        usp_ring_side_plan(&plan->key, &sequence->key, &plan->shape.grid);
    else
        plan->key = plan->query;
    if (plan->shape.attention == USP_SOFTMAX) find_widest_sight(sequence, plan);
}

void usp_plan_routes(usp_plan *plan) {
    usp_sides sides = usp_plan_sides(plan);
    if (plan->shape.attention == USP_SOFTMAX) usp_route_fill(&plan->route, &sides, plan->spans);
}

/* ---- work -------------------------------------------------------------------------------------------------------- */

static usp_query_rows own_queries(const usp_plan *plan) {
    const usp_ring_side *side = &plan->query;
    int r = plan->shape.grid.r;
    int64_t first = side->first[r];
    return (usp_query_rows){.rows = usp_plan_queries(plan),
                            .runs = side->first_run[r + 1] - side->first_run[r],
                            .run = side->run + side->first_run[r],
                            .position = side->position + first,
                            .low = plan->low + first,
                            .high = plan->high + first};
}

/* Positions of a parcel's rows, of ring rank r's block. */
static void put_positions(const usp_plan *plan, const usp_parcel *parcel, int r, int32_t *to) {
    const int32_t *position = plan->key.position + plan->key.first[r];
    const int32_t *map = parcel->map >= 0 ? plan->route.map + parcel->map : NULL;
    for (int64_t i = 0; i < parcel->rows; i++) to[i] = position[map ? map[i] : parcel->row + i];
}

static void put_lasts(const usp_sequence *sequence, const int32_t *position, int64_t rows, int32_t *last) {
    for (int64_t i = 0, near = 0; i < rows;) {
        usp_segment segment = segment_at(position + i, rows - i);
        near = usp_mask_lasts(&sequence->documents, &segment, near, last + i);
        i += segment.length;
    }
}

/* Lists the keys of stage t, and the runs of their positions, in the plan's scratch. */
static usp_key_rows stage_keys(const usp_sequence *sequence, usp_plan *plan, int t) {
    const usp_route_stage *stage = &plan->route.stage[t];
    int64_t first = usp_plan_first_key(plan, t), done = 0, runs = 0;
    int32_t *position = plan->host.key + first, *last = plan->host.last ? plan->host.last + first : NULL;
    const usp_parcel own = {plan->shape.grid.r, stage->rows, 0, -1, 0};
    if (t == 0) put_positions(plan, &own, own.r, position);
    for (int64_t i = 0; i < stage->sources; done += plan->route.source[stage->source + i++].rows)
        put_positions(plan, &plan->route.source[stage->source + i], plan->route.source[stage->source + i].r,
                      position + done);
    for (int64_t i = 0; i < stage->rows; i++)
        if (i == 0 || position[i] < position[i - 1]) plan->runs[runs++] = i;
    plan->runs[runs] = stage->rows;
    usp_key_rows keys = {stage->rows, runs, plan->runs, position, last, plan->family_end};
    if (!last) return keys;
    put_lasts(sequence, position, stage->rows, last);
    usp_tiles_find_families(&keys, plan->family_end);
    return keys;
}

/* Both lists of stage t; without memory for them they are counted. */
static void plan_stage(const usp_sequence *sequence, usp_plan *plan, int t, usp_tile_list *tiles) {
    usp_key_rows keys = stage_keys(sequence, plan, t);
    usp_query_rows queries = own_queries(plan);
    usp_tile_list list = *tiles;
    int64_t stages = plan->route.stages;
    list.works = 0;
    if (list.work) list.work = plan->host.work + t * plan->query_works;
    usp_tiles_by_query(&list, &queries, &keys, t == 0 || t == plan->route.last);
    plan->host.count[t] = usp_tiles_count(&list);
    list.works = 0;
    if (list.work) list.work = plan->host.work + stages * plan->query_works + t * plan->key_works;
    usp_tiles_by_key(&list, &queries, &keys);
    plan->host.count[stages + t] = usp_tiles_count(&list);
    tiles->tiles = list.tiles;
}

static void plan_tiles(const usp_sequence *sequence, usp_plan *plan) {
    usp_tile_list list = {plan->host.work, plan->host.tile, plan->order, 0, 0};
    if (!plan->host.tile) list.work = NULL;
    for (int t = 0; t < plan->route.stages; t++) plan_stage(sequence, plan, t, &list);
    plan->tiles = list.tiles;
}

/* Where bytes go to that are the same for the device. */
static void put(int32_t *to, const int32_t *from, int64_t count) {
    for (int64_t i = 0; i < count && to; i++) to[i] = from[i];
}

static void put_owners(usp_plan *plan) {
    const usp_grid *grid = &plan->shape.grid;
    int64_t queries = plan->query.first[grid->r];
    put(plan->host.query_landing, plan->query.landing, usp_plan_queries(plan));
    put(plan->host.key_landing, plan->key.landing, usp_plan_keys(plan));
    if (plan->shape.attention != USP_SOFTMAX) return;
    put(plan->host.query, plan->query.position + queries, usp_plan_queries(plan));
    put(plan->host.map, plan->route.map, plan->route.maps);
}

static void put_sight(usp_plan *plan) {
    int64_t first = plan->query.first[plan->shape.grid.r], rows = usp_plan_queries(plan);
    put(plan->host.low, plan->low + first, rows);
    put(plan->host.high, plan->high + first, rows);
    if (plan->diagonal) put(plan->host.diagonal, plan->diagonal + first, rows);
}

void usp_plan_fill(usp_sequence *sequence, usp_plan *plan) {
    put_owners(plan);
    if (plan->shape.attention == USP_LINEAR) {
        usp_device *device = sequence->world->device;
        usp_chunks_fill(&plan->chunks, &plan->query, &plan->shape.grid, &sequence->documents,
                        device->ops->linear_block(device, plan->query_limit));
        return;
    }
    if (sequence->replans && !usp_sequence_moves(sequence)) /* else it is known since routes were planned */
        find_sight(plan, &plan->shape.rule, &sequence->documents, plan->shape.grid.r, plan->shape.grid.r + 1);
    put_sight(plan);
    plan_tiles(sequence, plan);
}

/* ---- what kernels and people ask for ----------------------------------------------------------------------------- */

usp_pairs usp_plan_pairs(const usp_plan *plan, const usp_plan_arrays *arrays, int t) {
    int64_t first = usp_plan_first_key(plan, t);
    return (usp_pairs){.query = arrays->query,
                       .low = arrays->low,
                       .high = arrays->high,
                       .key = arrays->key + first,
                       .last = arrays->last ? arrays->last + first : NULL,
                       .diagonal = arrays->diagonal ? arrays->diagonal : arrays->query};
}

usp_tiles usp_plan_tiles(const usp_plan *plan, const usp_plan_arrays *arrays, int t, int by_key) {
    int64_t stages = plan->route.stages;
    if (!by_key)
        return (usp_tiles){arrays->work + t * plan->query_works, arrays->tile, arrays->count + t,
                           (int)plan->query_works};
    return (usp_tiles){arrays->work + stages * plan->query_works + t * plan->key_works, arrays->tile,
                       arrays->count + stages + t, (int)plan->key_works};
}

double usp_plan_work(const usp_sequence *sequence, const usp_plan *plan, int r) {
    double pairs = 0;
    for (int64_t row = plan->query.first[r]; row < plan->query.first[r + 1]; row++)
        pairs += (double)usp_mask_pairs(&plan->shape.rule, &sequence->documents, plan->query.position[row]);
    return pairs;
}
