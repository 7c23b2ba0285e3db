/* plan_store.c - the plans of a sequence: their memory on host and device, and their uploads. */
#include "error.h"
#include "plan.h"
#include "search.h"

/* ---- room -------------------------------------------------------------------------------------------------------- */

static usp_status allocate_sides(usp_sequence *sequence, usp_plan *plan) {
    usp_status status = USP_OK;
    const usp_host *host = &sequence->world->host;
    int64_t tokens = sequence->query.max_tokens, keys = sequence->key.max_tokens;
    const usp_grid *grid = &plan->shape.grid;
    USP_TRY(usp_ring_side_alloc(host, &plan->query, grid, &sequence->query, tokens));
    if (sequence->cross) USP_TRY(usp_ring_side_alloc(host, &plan->key, grid, &sequence->key, keys));
    if (plan->shape.attention != USP_SOFTMAX) return USP_OK;
    plan->low = usp_host_array(host, tokens, sizeof *plan->low, "plan", &status);
    plan->high = usp_host_array(host, tokens, sizeof *plan->high, "plan", &status);
    if (sequence->cross) plan->diagonal = usp_host_array(host, tokens, sizeof *plan->diagonal, "plan", &status);
    plan->spans = usp_host_array(host, tokens, sizeof *plan->spans, "plan", &status);
    return status;
}

/* Rows that one rank sends, packs and receives in one stage. */
static void take_limits(usp_route_plan *route) {
    for (int t = 1; t < route->stages; t++) {
        int64_t read = 0, packed = 0;
        for (int64_t i = 0; i < route->stage[t].readers; i++) {
            const usp_parcel *parcel = &route->reader[route->stage[t].reader + i];
            read += parcel->rows;
            packed += parcel->map >= 0 ? parcel->rows : 0;
        }
        route->limit = usp_most(route->limit, route->stage[t].rows);
        route->reader_limit = usp_most(route->reader_limit, read);
        route->pack_limit = usp_most(route->pack_limit, packed);
    }
}

/* What any rank sends, packs and receives at most, so that all make the same room. Plans them all, the own one last. */
static void set_route_limits(const usp_sequence *sequence, usp_plan *plan) {
    usp_route_plan *route = &plan->route;
    int ring = plan->shape.grid.ring, own = plan->shape.grid.r;
    int64_t others = route->route == USP_ROUTE_GATHERED ? ring - 1 : 1, all = others * plan->key_limit;
    for (int i = 1; i <= ring; i++) {
        plan->shape.grid.r = (own + i) % ring;
        usp_plan_routes(plan);
        take_limits(route);
    }
    if (!usp_sequence_moves(sequence) || route->stages == 1) return;
    route->limit = route->reader_limit = all;
    route->pack_limit = route->route == USP_ROUTE_RELAY ? 0 : all;
}

/* Where counts stay, the room is what is needed: found by planning without any. */
static usp_status allocate_route(usp_sequence *sequence, usp_plan *plan) {
    usp_status status = USP_OK;
    const usp_host *host = &sequence->world->host;
    int ring = plan->shape.grid.ring, relay = plan->route.route == USP_ROUTE_RELAY;
    usp_route_plan *route = &plan->route;
    route->stage = usp_host_array(host, ring + 1, sizeof *route->stage, "plan", &status);
    route->source = usp_host_array(host, ring, sizeof *route->source, "plan", &status);
    route->reader = usp_host_array(host, ring, sizeof *route->reader, "plan", &status);
    USP_TRY(status);
    set_route_limits(sequence, plan);
    route->map_capacity = route->maps;
    if (usp_sequence_moves(sequence)) route->map_capacity = relay ? 0 : 2 * (ring - 1) * plan->key_limit;
    route->map = usp_host_array(host, route->map_capacity, sizeof *route->map, "plan", &status);
    USP_TRY(status);
    usp_plan_routes(plan);
    return USP_OK;
}

static usp_status choose_route(usp_sequence *sequence, usp_plan *plan) {
    usp_sides sides = usp_plan_sides(plan);
    plan->route.route = plan->shape.route;
    if (plan->shape.route == USP_ROUTE_AUTO) {
        usp_route_rows rows = usp_route_count(&sides, plan->spans);
        plan->route.route = usp_route_choose(&rows, plan->shape.grid.ring);
    }
    return allocate_route(sequence, plan);
}

static int64_t items_of(int64_t rows) {
    return (rows + USP_WORK_ROWS - 1) / USP_WORK_ROWS;
}

static usp_status allocate_scratch(usp_sequence *sequence, usp_plan *plan) {
    usp_status status = USP_OK;
    const usp_host *host = &sequence->world->host;
    int ring = plan->shape.grid.ring;
    int64_t rows = usp_most(plan->key_limit, plan->route.limit);
    plan->query_works = items_of(plan->query_limit);
    plan->key_works = items_of(rows);
    plan->runs = usp_host_array(host, plan->key.first_run[ring] + ring + 2, sizeof *plan->runs, "plan", &status);
    plan->order =
        usp_host_array(host, usp_most(plan->query_works, plan->key_works), sizeof *plan->order, "plan", &status);
    if (sequence->trees) plan->family_end = usp_host_array(host, rows, sizeof *plan->family_end, "plan", &status);
    return status;
}

/* An item has at most a tile for each run of columns, in trees some more. Every run of keys is met in one stage; ranks
 * that hold nothing now may have one later. */
static int64_t bound_tiles(const usp_sequence *sequence, const usp_plan *plan) {
    const usp_grid *grid = &plan->shape.grid;
    int64_t stages = plan->route.stages, families = sequence->trees ? USP_FAMILY_TILES : 1;
    int64_t key_runs = plan->key.first_run[grid->ring] + grid->ring;
    int64_t query_runs = plan->query.first_run[grid->r + 1] - plan->query.first_run[grid->r] + 1;
    return plan->query_works * key_runs * families + stages * plan->key_works * query_runs;
}

/* ---- memory of the arrays ---------------------------------------------------------------------------------------- */

static usp_plan_arrays carve_softmax(const usp_sequence *sequence, const usp_plan *plan, usp_arena *arena) {
    int64_t stages = plan->route.stages, queries = plan->query_limit, keys = usp_plan_first_key(plan, (int)stages);
    size_t row = sizeof(int32_t);
    usp_plan_arrays a = {0};
    a.count = usp_carve(arena, (size_t)(2 * stages) * sizeof *a.count);
    a.work = usp_carve(arena, (size_t)(stages * (plan->query_works + plan->key_works)) * sizeof *a.work);
    a.query = usp_carve(arena, (size_t)queries * row);
    a.low = usp_carve(arena, (size_t)queries * row);
    a.high = usp_carve(arena, (size_t)queries * row);
    if (sequence->cross) a.diagonal = usp_carve(arena, (size_t)queries * row);
    a.key = usp_carve(arena, (size_t)keys * row);
    if (sequence->trees) a.last = usp_carve(arena, (size_t)keys * row);
    a.map = usp_carve(arena, (size_t)plan->route.map_capacity * row);
    return a;
}

static usp_plan_arrays carve_linear(const usp_sequence *sequence, const usp_plan *plan, usp_arena *arena) {
    const usp_chunk_list *list = &plan->chunks;
    usp_plan_arrays a = {0};
    usp_chunk_arrays *to = &a.chunks;
    to->block = usp_carve(arena, (size_t)list->block_capacity * sizeof *to->block);
    to->block_step = usp_carve(arena, (size_t)list->block_capacity * sizeof *to->block_step);
    to->chunk_step = usp_carve(arena, (size_t)list->chunk_capacity * sizeof *to->chunk_step);
    to->chunk_place = usp_carve(arena, (size_t)list->chunk_capacity * sizeof *to->chunk_place);
    if (usp_sequence_is_whole(sequence)) return a;
    to->begins = usp_carve(arena, (size_t)plan->query_limit * sizeof *to->begins);
    to->ends = usp_carve(arena, (size_t)plan->query_limit * sizeof *to->ends);
    return a;
}

/* Tiles are last: of their room, which is for any documents, only what is used is uploaded. */
static usp_plan_arrays carve(const usp_sequence *sequence, const usp_plan *plan, usp_arena *arena) {
    int softmax = plan->shape.attention == USP_SOFTMAX, exchanged = plan->shape.grid.ulysses > 1;
    usp_plan_arrays a = softmax ? carve_softmax(sequence, plan, arena) : carve_linear(sequence, plan, arena);
    if (exchanged) a.query_landing = usp_carve(arena, (size_t)plan->query_limit * sizeof *a.query_landing);
    if (exchanged) a.key_landing = usp_carve(arena, (size_t)plan->key_limit * sizeof *a.key_landing);
    if (plan->tile_capacity) a.tile = usp_carve(arena, (size_t)plan->tile_capacity * sizeof *a.tile);
    return a;
}

/* Plans into host copy `turn`. */
static void fill(usp_sequence *sequence, usp_plan *plan, int turn) {
    usp_arena arena = usp_arena_at(plan->host_memory[turn]);
    plan->host = carve(sequence, plan, &arena);
    plan->chunks.to = plan->host.chunks;
    usp_plan_fill(sequence, plan);
}

/* Where counts stay, the room for tiles is found by planning without any. */
static usp_status count_tiles(usp_sequence *sequence, usp_plan *plan) {
    const usp_host *host = &sequence->world->host;
    plan->tile_capacity = 0;
    if (sequence->replans) {
        plan->tile_capacity = bound_tiles(sequence, plan);
    } else {
        usp_arena arena = {0};
        carve(sequence, plan, &arena);
        USP_TRY(usp_host_alloc(host, arena.used, "plan", &plan->host_memory[0]));
        fill(sequence, plan, 0);
        usp_host_free(host, plan->host_memory[0]);
        plan->host_memory[0] = NULL;
        plan->tile_capacity = plan->tiles + 1; /* not 0, which is to count */
    }
    int64_t works = plan->route.stages * (plan->query_works + plan->key_works);
    if (works <= INT32_MAX && plan->tile_capacity <= INT32_MAX) return USP_OK;
    return usp_fail(USP_NO_MEMORY,
                    "usp_sequence_config: attention over its segments or documents takes %lld work items and %lld "
                    "tiles, more than 32 bits count",
                    (long long)works, (long long)plan->tile_capacity);
}

static usp_status allocate_arrays(usp_sequence *sequence, usp_plan *plan) {
    usp_device *device = sequence->world->device;
    usp_arena arena = {0};
    carve(sequence, plan, &arena);
    plan->bytes = arena.used;
    for (int i = 0; i <= sequence->replans; i++)
        USP_TRY(device->ops->alloc_host(device, arena.used, &plan->host_memory[i]));
    USP_TRY(device->ops->alloc(device, arena.used, &plan->device_memory));
    arena = usp_arena_at(plan->device_memory);
    plan->device = carve(sequence, plan, &arena);
    return USP_OK;
}

static usp_status allocate_chunks(usp_sequence *sequence, usp_plan *plan) {
    usp_device *device = sequence->world->device;
    usp_chunk_list *list = &plan->chunks;
    usp_status status = USP_OK;
    int ring = plan->shape.grid.ring;
    list->chunk_capacity = usp_chunks_count(&plan->query, &plan->shape.grid, &list->own_chunk_limit);
    if (usp_sequence_moves(sequence)) { /* two of each zigzag, and one of all on a ring of one */
        int64_t each = ring > 1 ? 2 * usp_sequence_zigzags(sequence) : 1;
        list->own_chunk_limit = usp_least(each, plan->query_limit);
        list->chunk_capacity = usp_least(each * ring, sequence->query.max_tokens);
    }
    list->block_capacity =
        plan->query_limit / device->ops->linear_block(device, plan->query_limit) + list->own_chunk_limit;
    list->first = usp_host_array(&sequence->world->host, ring + 1, sizeof *list->first, "plan", &status);
    list->chunk = usp_host_array(&sequence->world->host, list->chunk_capacity, sizeof *list->chunk, "plan", &status);
    return status;
}

static usp_status upload(usp_sequence *sequence, usp_plan *plan, int turn, usp_stream stream) {
    usp_device *device = sequence->world->device;
    size_t unused = plan->host.tile ? (size_t)(plan->tile_capacity - plan->tiles) * sizeof *plan->host.tile : 0;
    return device->ops->copy(device, plan->device_memory, plan->host_memory[turn], plan->bytes - unused, stream);
}

/* ---- one plan ---------------------------------------------------------------------------------------------------- */

static void destroy(usp_sequence *sequence, usp_plan *plan) {
    const usp_host *host = &sequence->world->host;
    usp_device *device = sequence->world->device;
    void *const memory[] = {plan->low,          plan->high,        plan->diagonal,     plan->spans,
                            plan->runs,         plan->order,       plan->family_end,   plan->chunks.chunk,
                            plan->chunks.first, plan->route.stage, plan->route.source, plan->route.reader,
                            plan->route.map};
    for (size_t i = 0; i < sizeof memory / sizeof *memory; i++) usp_host_free(host, memory[i]);
    for (int i = 0; i < 2; i++) device->ops->free_host(device, plan->host_memory[i]);
    device->ops->free(device, plan->device_memory);
    if (sequence->cross) usp_ring_side_free(host, &plan->key);
    usp_ring_side_free(host, &plan->query);
    usp_host_free(host, plan);
}

static usp_status build(usp_sequence *sequence, usp_plan *plan) {
    USP_TRY(allocate_sides(sequence, plan));
    usp_plan_owners(sequence, plan);
    plan->query_limit = usp_sequence_limit(sequence, &sequence->query, plan->shape.grid.ring);
    plan->key_limit = usp_sequence_limit(sequence, &sequence->key, plan->shape.grid.ring);
    if (plan->shape.attention == USP_SOFTMAX) {
        USP_TRY(choose_route(sequence, plan));
        USP_TRY(allocate_scratch(sequence, plan));
        USP_TRY(count_tiles(sequence, plan));
    } else {
        USP_TRY(allocate_chunks(sequence, plan));
    }
    USP_TRY(allocate_arrays(sequence, plan));
    fill(sequence, plan, sequence->turn);
    USP_TRY(upload(sequence, plan, sequence->turn, NULL));
    return usp_world_wait(sequence->world, NULL); /* any stream of the caller may read it from now on */
}

/* ---- the sequence's plans ---------------------------------------------------------------------------------------- */

/* A causal linear layer passes its state from position to position, so a ring rank must own runs of positions. */
static usp_status check_order(const usp_sequence *sequence, const usp_shape *shape) {
    const usp_grid *grid = &shape->grid;
    const usp_sharding *sharding = &sequence->query;
    if (shape->attention != USP_LINEAR) return USP_OK;
    if (sequence->cross) return usp_fail(USP_UNSUPPORTED, "linear attention needs queries and keys of one length");
    if (grid->ring > 1 && sequence->layout == USP_LAYOUT_STRIPE)
        return usp_fail(USP_UNSUPPORTED,
                        "linear attention on the stripe layout needs ring = 1: with ring %d no rank owns a run of "
                        "positions that one state could sum up; take zigzag or contiguous",
                        grid->ring);
    if (shape->rule.right || (grid->ring == 1 && grid->ulysses > 1)) return USP_OK;
    for (int64_t i = 0; i < sharding->first[sharding->ranks]; i++)
        if (sharding->segment[i].stride != 1)
            return usp_fail(USP_UNSUPPORTED,
                            "causal linear attention with ulysses %d, ring %d needs segments of stride 1; one has "
                            "stride %lld",
                            grid->ulysses, grid->ring, (long long)sharding->segment[i].stride);
    return USP_OK;
}

static int same_shape(const usp_shape *a, const usp_shape *b) {
    return a->grid.ulysses == b->grid.ulysses && a->grid.ring == b->grid.ring && a->grid.u == b->grid.u &&
           a->grid.r == b->grid.r && a->attention == b->attention && a->rule.left == b->rule.left &&
           a->rule.right == b->rule.right && a->rule.alignment == b->rule.alignment && a->route == b->route;
}

usp_status usp_plan_acquire(usp_sequence *sequence, const usp_shape *shape, usp_plan **out) {
    for (usp_plan *plan = sequence->plans; plan; plan = plan->next)
        if (same_shape(&plan->shape, shape)) {
            plan->users++;
            *out = plan;
            return USP_OK;
        }
    void *memory = NULL;
    USP_TRY(check_order(sequence, shape));
    USP_TRY(usp_host_alloc(&sequence->world->host, sizeof(usp_plan), "plan", &memory));
    usp_plan *plan = memory;
    *plan = (usp_plan){.users = 1, .shape = *shape};
    usp_status status = build(sequence, plan);
    if (status != USP_OK) {
        destroy(sequence, plan);
        return status;
    }
    plan->next = sequence->plans;
    sequence->plans = plan;
    *out = plan;
    return USP_OK;
}

void usp_plan_release(usp_sequence *sequence, usp_plan *plan) {
    if (!plan || --plan->users > 0) return;
    usp_plan **link = &sequence->plans;
    while (*link != plan) link = &(*link)->next;
    *link = plan->next;
    destroy(sequence, plan);
}

usp_status usp_plan_again_all(usp_sequence *sequence, usp_stream stream) {
    for (usp_plan *plan = sequence->plans; plan; plan = plan->next) {
        if (usp_sequence_moves(sequence)) {
            usp_plan_owners(sequence, plan);
            usp_plan_routes(plan);
        }
        fill(sequence, plan, sequence->turn);
        USP_TRY(upload(sequence, plan, sequence->turn, stream));
    }
    return usp_world_fork(sequence->world, stream, sequence->uploads[sequence->turn]);
}
