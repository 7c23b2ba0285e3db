/* schedule.c - plans, with integers alone, what each ring step computes: blocks, tiles, chunks. Runs nothing. */
#include "schedule.h"
#include "arena.h"
#include "error.h"
#include "sort.h"
#include <string.h>

/* ---- blocks: what a ring rank holds after the exchange ----------------------------------------------------------- */

/* A segment of one of the ring rank's U ranks. */
typedef struct piece {
    int u;
    int64_t index;  /* among all pieces by u, then local order */
    int64_t source; /* local index of its first token */
    usp_segment tokens;
} piece;

_Static_assert(sizeof(piece) <= USP_SORT_BYTES && sizeof(usp_chunk) <= USP_SORT_BYTES &&
                   sizeof(usp_work) <= USP_SORT_BYTES,
               "all three are sorted");

static int by_start(const void *a, const void *b) {
    const piece *x = a, *y = b;
    if (x->tokens.start != y->tokens.start) return x->tokens.start < y->tokens.start ? -1 : 1;
    return x->index < y->index ? -1 : x->index > y->index; /* one of them is empty */
}

/* The pieces of ring rank r in row order: by position; where there is no exchange, in local order. */
static int64_t collect_pieces(const usp_sharding *sharding, const usp_shape *shape, int r, piece *pieces) {
    int64_t count = 0;
    for (int u = 0; u < shape->ulysses; u++) {
        int p = r * shape->ulysses + u;
        int64_t source = 0;
        for (int64_t i = sharding->first[p]; i < sharding->first[p + 1]; i++) {
            pieces[count] = (piece){u, count, source, sharding->segment[i]};
            count++;
            source += sharding->segment[i].length;
        }
    }
    if (shape->ulysses > 1) usp_sort(pieces, (size_t)count, sizeof *pieces, by_start);
    return count;
}

/* Does a linear layer's block hold the whole sequence, so that a token's row can be its position? */
static int rows_are_positions(const usp_shape *shape) {
    return shape->attention == USP_LINEAR && shape->mask == USP_MASK_CAUSAL && shape->ring == 1 && shape->ulysses > 1;
}

static void add_block_segment(usp_ring_side *side, usp_ring_block *block, const usp_segment *tokens) {
    usp_ring_segment *segment = &side->segment[block->first_segment + block->segments];
    usp_ring_segment *last = block->segments ? segment - 1 : NULL;
    if (last && last->stride == tokens->stride && last->start + last->length * last->stride == tokens->start) {
        last->length += tokens->length;
    } else {
        if (last && last->start + (last->length - 1) * last->stride >= tokens->start) block->ordered = 0;
        *segment = (usp_ring_segment){tokens->start, tokens->length, tokens->stride, block->rows};
        block->segments++;
    }
    block->rows += tokens->length;
}

static void plan_block(usp_ring_side *side, const usp_shape *shape, int64_t first_segment, int r, const piece *pieces,
                       int64_t count) {
    usp_ring_block *block = &side->block[r];
    *block = (usp_ring_block){.first_segment = first_segment, .ordered = 1};
    if (r == shape->r) side->landings = count;
    for (int64_t i = 0; i < count; i++) {
        const piece *at = &pieces[i];
        int positions = rows_are_positions(shape);
        if (r == shape->r)
            side->landing[at->index] =
                (usp_landing){at->u, at->source, at->tokens.length, positions ? at->tokens.start : block->rows,
                              positions ? at->tokens.stride : 1};
        add_block_segment(side, block, &at->tokens);
    }
    if (rows_are_positions(shape) && count > 0) {
        block->segments = 1;
        side->segment[first_segment] = (usp_ring_segment){0, block->rows, 1, 0};
    }
}

static void plan_side(usp_ring_side *side, const usp_sharding *sharding, const usp_shape *shape, piece *scratch) {
    int64_t segments = 0;
    for (int r = 0; r < shape->ring; r++) {
        plan_block(side, shape, segments, r, scratch, collect_pieces(sharding, shape, r, scratch));
        segments += side->block[r].segments;
    }
}

/* ---- tiles ------------------------------------------------------------------------------------------------------- */

/* Allowed column position - row position. */
typedef struct band {
    int64_t low, high;
} band;

static band query_band(usp_mask mask) {
    return (band){INT32_MIN, mask == USP_MASK_CAUSAL ? 0 : INT32_MAX};
}

/* Index of the first of a segment's tokens at position >= x, at most its length. */
static int64_t first_at_least(const usp_ring_segment *segment, int64_t x) {
    int64_t offset = x - segment->start;
    if (offset <= 0) return 0;
    int64_t index = (offset + segment->stride - 1) / segment->stride;
    return index < segment->length ? index : segment->length;
}

/* The tile of rows at positions x0 .. x1 and the columns of one segment; 0 if it is empty. */
static int make_tile(const usp_ring_segment *columns, int64_t x0, int64_t x1, band allowed, int keys_are_rows,
                     usp_tile *tile) {
    int64_t begin = first_at_least(columns, x0 + allowed.low), end = first_at_least(columns, x1 + allowed.high + 1);
    int64_t full_begin = first_at_least(columns, x1 + allowed.low),
            full_end = first_at_least(columns, x0 + allowed.high + 1);
    if (begin >= end) return 0;
    if (full_begin >= full_end) full_begin = full_end = end;
    int64_t low = keys_are_rows ? -allowed.high : allowed.low, high = keys_are_rows ? -allowed.low : allowed.high;
    *tile = (usp_tile){.begin = (int32_t)(columns->row + begin),
                       .end = (int32_t)(columns->row + end),
                       .full_begin = (int32_t)(columns->row + full_begin),
                       .full_end = (int32_t)(columns->row + full_end),
                       .origin = (int32_t)(columns->start - columns->row * columns->stride),
                       .stride = (int32_t)columns->stride,
                       .low = (int32_t)(low < INT32_MIN ? INT32_MIN : low),
                       .high = (int32_t)(high > INT32_MAX ? INT32_MAX : high)};
    return 1;
}

/* Columns begin .. end, of any segments, with each of which every row may pair: their positions do not matter. */
static usp_tile full_tile(int64_t begin, int64_t end) {
    return (usp_tile){(int32_t)begin, (int32_t)end, (int32_t)begin, (int32_t)end, 0, 1, INT32_MIN, INT32_MAX};
}

static int is_full(const usp_tile *tile) {
    return tile->full_begin == tile->begin && tile->full_end == tile->end;
}

/* Where planned work is written; with NULL arrays it is only counted. */
typedef struct work_list {
    usp_work *work;
    usp_tile *tile;
    int64_t works, tiles;
    usp_tile last; /* the one that was added last */
} work_list;

/* Full tiles side by side become one: else a work item would have as many as there are segments before it. */
static void add_tile(work_list *list, int64_t first, usp_tile tile) {
    if (list->tiles > first && is_full(&list->last) && is_full(&tile) && list->last.end == tile.begin)
        tile = full_tile(list->last.begin, tile.end);
    else
        list->tiles++;
    if (list->tile) list->tile[list->tiles - 1] = tile;
    list->last = tile;
}

/* Index of the first segment of an ordered block that begins at position >= x. */
static int64_t find_segment(const usp_ring_segment *segment, int64_t segments, int64_t x) {
    int64_t low = 0, high = segments;
    while (low < high) {
        int64_t middle = (low + high) / 2;
        if (segment[middle].start >= x)
            high = middle;
        else
            low = middle + 1;
    }
    return low;
}

/* Segments outside begin .. end have no allowed column; those in full_begin .. full_end have no other. */
typedef struct reach {
    int64_t begin, full_begin, full_end, end;
} reach;

static reach find_reach(const usp_ring_segment *columns, const usp_ring_block *block, int64_t x0, int64_t x1,
                        band allowed) {
    int64_t segments = block->segments;
    if (!block->ordered) return (reach){0, 0, 0, segments};
    int64_t begin = find_segment(columns, segments, x0 + allowed.low),
            full_end = find_segment(columns, segments, x0 + allowed.high + 1);
    return (reach){.begin = begin > 0 ? begin - 1 : 0, /* the one before may end within reach, the last beyond it */
                   .full_begin = find_segment(columns, segments, x1 + allowed.low),
                   .full_end = full_end > 0 ? full_end - 1 : 0,
                   .end = find_segment(columns, segments, x1 + allowed.high + 1)};
}

static void add_tiles(work_list *list, const usp_ring_segment *columns, const usp_ring_block *block, int64_t x0,
                      int64_t x1, band allowed, int keys_are_rows) {
    reach in = find_reach(columns, block, x0, x1, allowed);
    int64_t first = list->tiles;
    for (int64_t i = in.begin; i < in.end; i++) {
        usp_tile tile;
        if (i == in.full_begin && in.full_begin < in.full_end) {
            i = in.full_end - 1;
            add_tile(list, first, full_tile(columns[in.full_begin].row, columns[i].row + columns[i].length));
        } else if (make_tile(&columns[i], x0, x1, allowed, keys_are_rows, &tile)) {
            add_tile(list, first, tile);
        }
    }
}

static void add_work(work_list *list, const usp_ring_segment *rows, int64_t offset, const usp_ring_segment *columns,
                     const usp_ring_block *column_block, band allowed, int keys_are_rows, int64_t tile_base) {
    int64_t count = rows->length - offset < USP_WORK_ROWS ? rows->length - offset : USP_WORK_ROWS;
    int64_t x0 = rows->start + offset * rows->stride, x1 = x0 + (count - 1) * rows->stride, first = list->tiles;
    add_tiles(list, columns, column_block, x0, x1, allowed, keys_are_rows);
    if (list->work)
        list->work[list->works] = (usp_work){.begin = (int32_t)(rows->row + offset),
                                             .count = (int32_t)count,
                                             .origin = (int32_t)(rows->start - rows->row * rows->stride),
                                             .stride = (int32_t)rows->stride,
                                             .first_tile = (int32_t)(first - tile_base),
                                             .tiles = (int32_t)(list->tiles - first)};
    list->works++;
}

/* Position of row i of a work item, counted from its first. */
static int32_t work_position(const usp_work *work, int32_t i) {
    return (int32_t)((uint32_t)work->origin + (uint32_t)(work->begin + i) * (uint32_t)work->stride);
}

/* Under a causal mask the last query of a work item sees most keys, and its first key is seen by most queries. */
static int later_query(const void *a, const void *b) {
    const usp_work *x = a, *y = b;
    int32_t last_x = work_position(x, x->count - 1), last_y = work_position(y, y->count - 1);
    return (last_x < last_y) - (last_x > last_y);
}

static int earlier_key(const void *a, const void *b) {
    int32_t first_x = work_position(a, 0), first_y = work_position(b, 0);
    return (first_x > first_y) - (first_x < first_y);
}

/* Every row of a block in one work item, the heaviest first: the order in which devices begin them. Only where segments
 * do not lie one behind the other is that more than to walk them from one end. */
static void add_works(work_list *list, const usp_ring_side *row_side, int row_block, const usp_ring_side *column_side,
                      int column_block, band allowed, int keys_are_rows) {
    const usp_ring_block *rows = &row_side->block[row_block], *columns = &column_side->block[column_block];
    int64_t tile_base = list->tiles, first = list->works;
    for (int64_t n = 0; n < rows->segments; n++) {
        int64_t i = keys_are_rows ? n : rows->segments - 1 - n;
        const usp_ring_segment *segment = &row_side->segment[rows->first_segment + i];
        int64_t cuts = (segment->length + USP_WORK_ROWS - 1) / USP_WORK_ROWS;
        for (int64_t c = 0; c < cuts; c++)
            add_work(list, segment, (keys_are_rows ? c : cuts - 1 - c) * USP_WORK_ROWS,
                     column_side->segment + columns->first_segment, columns, allowed, keys_are_rows, tile_base);
    }
    if (list->work && !rows->ordered)
        usp_sort(list->work + first, (size_t)(list->works - first), sizeof *list->work,
                 keys_are_rows ? earlier_key : later_query);
}
static void plan_steps(usp_schedule *schedule, work_list *list) {
    band forward = query_band(schedule->shape.mask), swapped = {-forward.high, -forward.low};
    int ring = schedule->shape.ring, r = schedule->shape.r;
    for (int t = 0; t < ring; t++) {
        int source = (r - t + ring) % ring;
        usp_step *step = &schedule->step[t];
        *step = (usp_step){.query_work = list->works, .query_tile = list->tiles};
        add_works(list, &schedule->query, r, &schedule->key, source, forward, 0);
        step->query_works = list->works - step->query_work;
        step->tiles = list->tiles - step->query_tile;
        step->key_work = list->works;
        step->key_tile = list->tiles;
        add_works(list, &schedule->key, source, &schedule->query, r, swapped, 1);
        step->key_works = list->works - step->key_work;
    }
}

/* ---- chunks and blocks of linear attention ----------------------------------------------------------------------- */

static int chunk_by_start(const void *a, const void *b) {
    const usp_chunk *x = a, *y = b;
    if (x->start != y->start) return x->start < y->start ? -1 : 1;
    return x->owner < y->owner ? -1 : x->owner > y->owner; /* one of them is empty */
}

static void collect_chunks(usp_schedule *schedule) {
    const usp_ring_side *side = &schedule->query;
    schedule->chunks = 0;
    for (int r = 0; r < schedule->shape.ring; r++) {
        const usp_ring_segment *segment = side->segment + side->block[r].first_segment;
        for (int64_t i = 0; i < side->block[r].segments; i++)
            schedule->chunk[schedule->chunks++] =
                (usp_chunk){r, 0, segment[i].start, segment[i].row, segment[i].length};
    }
    usp_sort(schedule->chunk, (size_t)schedule->chunks, sizeof *schedule->chunk, chunk_by_start);
}

static void cut_chunk(usp_schedule *schedule, const usp_chunk *chunk, int64_t most) {
    for (int64_t done = 0; done < chunk->count; done += most) {
        int64_t count = chunk->count - done < most ? chunk->count - done : most;
        schedule->block[schedule->blocks] = (usp_block){.begin = (int32_t)(chunk->row + done),
                                                        .count = (int32_t)count,
                                                        .chunk = chunk->own_index,
                                                        .distance = (int32_t)done,
                                                        .chunk_rows = (int32_t)chunk->count};
        schedule->block_step[schedule->blocks++] = (usp_scan_step){(int32_t)count, chunk->own_index};
    }
}

static void plan_chunks(usp_device *device, usp_schedule *schedule) {
    int64_t most = device->ops->linear_block(device, schedule->query.limit);
    collect_chunks(schedule);
    schedule->own_chunks = schedule->blocks = 0;
    for (int64_t c = 0; c < schedule->chunks; c++) {
        usp_chunk *chunk = &schedule->chunk[c];
        schedule->chunk_step[c] = (usp_scan_step){(int32_t)chunk->count, 0};
        int64_t before = c - 1; /* the owner's last one: a few chunks back, as ranks take turns */
        while (before >= 0 && schedule->chunk[before].owner != chunk->owner) before--;
        chunk->own_index = before >= 0 ? schedule->chunk[before].own_index + 1 : 0;
        if (chunk->owner != schedule->shape.r) continue;
        schedule->own_chunks++;
        cut_chunk(schedule, chunk, most);
    }
}

/* ---- planning as a whole ----------------------------------------------------------------------------------------- */

static void plan_sides(const usp_sequence *sequence, usp_schedule *schedule) {
    plan_side(&schedule->query, &sequence->query, &schedule->shape, schedule->scratch);
    plan_side(&schedule->key, &sequence->key, &schedule->shape, schedule->scratch);
}

/* What follows from the sides. */
static void plan_work(const usp_sequence *sequence, usp_schedule *schedule) {
    if (schedule->shape.attention == USP_LINEAR) {
        plan_chunks(sequence->world->device, schedule);
        return;
    }
    work_list list = {.work = schedule->work, .tile = schedule->tile};
    plan_steps(schedule, &list);
    schedule->works = list.works;
    schedule->tiles = list.tiles;
}

static usp_status upload(usp_sequence *sequence, usp_schedule *schedule, usp_stream stream) {
    usp_device *device = sequence->world->device;
    const struct {
        void *to;
        const void *from;
        size_t bytes;
    } copies[] = {
        {schedule->device_work, schedule->work, (size_t)schedule->works * sizeof(usp_work)},
        {schedule->device_tile, schedule->tile, (size_t)schedule->tiles * sizeof(usp_tile)},
        {schedule->device_block, schedule->block, (size_t)schedule->blocks * sizeof(usp_block)},
        {schedule->device_block_step, schedule->block_step, (size_t)schedule->blocks * sizeof(usp_scan_step)},
        {schedule->device_chunk_step, schedule->chunk_step, (size_t)schedule->chunks * sizeof(usp_scan_step)}};
    for (size_t i = 0; i < sizeof copies / sizeof copies[0]; i++)
        if (copies[i].bytes) USP_TRY(device->ops->copy(device, copies[i].to, copies[i].from, copies[i].bytes, stream));
    return USP_OK;
}

/* ---- memory ------------------------------------------------------------------------------------------------------ */

static void *allocate(const usp_host *host, int64_t count, size_t bytes, usp_status *status) {
    void *memory = NULL;
    if (*status == USP_OK) *status = usp_host_alloc(host, (size_t)count * bytes, "schedule", &memory);
    return memory;
}

static void allocate_side(const usp_host *host, const usp_sharding *sharding, const usp_shape *shape,
                          usp_ring_side *side, usp_status *status) {
    side->block = allocate(host, shape->ring, sizeof *side->block, status);
    side->segment = allocate(host, sharding->capacity, sizeof *side->segment, status);
    side->landing = allocate(host, sharding->capacity, sizeof *side->landing, status);
}

/* Room for any documents. A step's work items end at every USP_WORK_ROWS rows or with a segment, in either view. Each
 * has at most two tiles: its rows are consecutive positions, so that besides a run of segments of which it sees all
 * there is but its own segment, of which it may see a part. */
static void bound_works(usp_schedule *schedule) {
    int64_t step = schedule->query.limit / USP_WORK_ROWS + schedule->query.segment_limit;
    schedule->work_capacity = 2 * schedule->shape.ring * step;
    schedule->tile_capacity = 2 * schedule->work_capacity;
}

static usp_status allocate_works(usp_sequence *sequence, usp_schedule *schedule) {
    usp_status status = USP_OK;
    const usp_host *host = &sequence->world->host;
    schedule->step = allocate(host, schedule->shape.ring, sizeof *schedule->step, &status);
    USP_TRY(status);
    if (sequence->layout == USP_LAYOUT_ZIGZAG_PER_DOCUMENT) {
        bound_works(schedule);
    } else {
        plan_work(sequence, schedule); /* counts, the arrays being NULL */
        schedule->work_capacity = schedule->works;
        schedule->tile_capacity = schedule->tiles;
    }
    if (schedule->work_capacity > INT32_MAX || schedule->tile_capacity > INT32_MAX)
        return usp_fail(USP_NO_MEMORY,
                        "usp_sequence_config: attention over its segments or documents takes %lld work items and "
                        "%lld tiles, more than 32 bits count",
                        (long long)schedule->work_capacity, (long long)schedule->tile_capacity);
    schedule->work = allocate(host, schedule->work_capacity, sizeof *schedule->work, &status);
    schedule->tile = allocate(host, schedule->tile_capacity, sizeof *schedule->tile, &status);
    return status;
}

static usp_status allocate_chunks(usp_sequence *sequence, usp_schedule *schedule) {
    usp_status status = USP_OK;
    const usp_host *host = &sequence->world->host;
    usp_device *device = sequence->world->device;
    int64_t rows = schedule->query.limit, most = schedule->query.segment_limit, all = most * schedule->shape.ring;
    schedule->own_chunk_limit = most;
    schedule->chunk_capacity = all < sequence->query.capacity ? all : sequence->query.capacity;
    schedule->block_capacity = rows / device->ops->linear_block(device, rows) + most;
    schedule->chunk = allocate(host, schedule->chunk_capacity, sizeof *schedule->chunk, &status);
    schedule->chunk_step = allocate(host, schedule->chunk_capacity, sizeof *schedule->chunk_step, &status);
    schedule->block = allocate(host, schedule->block_capacity, sizeof *schedule->block, &status);
    schedule->block_step = allocate(host, schedule->block_capacity, sizeof *schedule->block_step, &status);
    return status;
}

static void carve_device(usp_schedule *schedule, usp_arena *arena) {
    schedule->device_work = usp_carve(arena, (size_t)schedule->work_capacity * sizeof(usp_work));
    schedule->device_tile = usp_carve(arena, (size_t)schedule->tile_capacity * sizeof(usp_tile));
    schedule->device_block = usp_carve(arena, (size_t)schedule->block_capacity * sizeof(usp_block));
    schedule->device_block_step = usp_carve(arena, (size_t)schedule->block_capacity * sizeof(usp_scan_step));
    schedule->device_chunk_step = usp_carve(arena, (size_t)schedule->chunk_capacity * sizeof(usp_scan_step));
}

static usp_status allocate_device(usp_sequence *sequence, usp_schedule *schedule) {
    usp_device *device = sequence->world->device;
    usp_arena arena = {0};
    carve_device(schedule, &arena);
    USP_TRY(device->ops->alloc(device, arena.used, &schedule->device_memory));
    arena = (usp_arena){schedule->device_memory, 0};
    carve_device(schedule, &arena);
    return USP_OK;
}

/* The most rows and segments of any ring rank. With documents to come: of each, two chunks of a zigzag of the ring,
 * each rounded up by less than one; a ring of one holds them all in one piece. */
static void set_limits(const usp_sequence *sequence, int ring, usp_ring_side *side) {
    side->limit = side->segment_limit = 0;
    for (int r = 0; r < ring; r++) {
        if (side->block[r].rows > side->limit) side->limit = side->block[r].rows;
        if (side->block[r].segments > side->segment_limit) side->segment_limit = side->block[r].segments;
    }
    if (sequence->layout != USP_LAYOUT_ZIGZAG_PER_DOCUMENT) return;
    int64_t chunks = ring > 1 ? 2 * sequence->max_documents : 1;
    int64_t rows = sequence->max_tokens / ring + 2 * sequence->max_documents;
    side->limit = rows < sequence->max_tokens ? rows : sequence->max_tokens;
    side->segment_limit = chunks < side->limit ? chunks : side->limit;
}

static void free_side(const usp_host *host, usp_ring_side *side) {
    usp_host_free(host, side->block);
    usp_host_free(host, side->segment);
    usp_host_free(host, side->landing);
}

static void destroy(usp_sequence *sequence, usp_schedule *schedule) {
    const usp_host *host = &sequence->world->host;
    usp_device *device = sequence->world->device;
    if (schedule->device_memory) device->ops->free(device, schedule->device_memory);
    free_side(host, &schedule->query);
    free_side(host, &schedule->key);
    usp_host_free(host, schedule->scratch);
    usp_host_free(host, schedule->step);
    usp_host_free(host, schedule->work);
    usp_host_free(host, schedule->tile);
    usp_host_free(host, schedule->chunk);
    usp_host_free(host, schedule->chunk_step);
    usp_host_free(host, schedule->block);
    usp_host_free(host, schedule->block_step);
    usp_host_free(host, schedule);
}

static usp_status allocate_scratch(const usp_sequence *sequence, void **scratch) {
    int64_t most =
        sequence->query.capacity > sequence->key.capacity ? sequence->query.capacity : sequence->key.capacity;
    return usp_host_alloc(&sequence->world->host, (size_t)most * sizeof(piece), "schedule", scratch);
}

static usp_status build(usp_sequence *sequence, usp_schedule *schedule) {
    usp_status status = USP_OK;
    const usp_host *host = &sequence->world->host;
    allocate_side(host, &sequence->query, &schedule->shape, &schedule->query, &status);
    allocate_side(host, &sequence->key, &schedule->shape, &schedule->key, &status);
    USP_TRY(status);
    USP_TRY(allocate_scratch(sequence, &schedule->scratch));
    plan_sides(sequence, schedule);
    set_limits(sequence, schedule->shape.ring, &schedule->query);
    set_limits(sequence, schedule->shape.ring, &schedule->key);
    int linear = schedule->shape.attention == USP_LINEAR;
    USP_TRY(linear ? allocate_chunks(sequence, schedule) : allocate_works(sequence, schedule));
    plan_work(sequence, schedule);
    USP_TRY(allocate_device(sequence, schedule));
    USP_TRY(upload(sequence, schedule, NULL));
    return usp_world_wait(sequence->world, NULL); /* any stream of the caller may read it from now on */
}

/* ---- the sequence's schedules ------------------------------------------------------------------------------------ */

/* A causal linear layer passes its state from position to position, so a ring rank must own runs of positions. */
static usp_status check_order(const usp_sequence *sequence, const usp_shape *shape) {
    if (shape->attention != USP_LINEAR) return USP_OK;
    if (sequence->cross) return usp_fail(USP_UNSUPPORTED, "linear attention needs queries and keys of one length");
    if (shape->ring > 1 && sequence->layout == USP_LAYOUT_STRIPE)
        return usp_fail(USP_UNSUPPORTED,
                        "linear attention on the stripe layout needs ring = 1: with ring %d no rank owns a run of "
                        "positions that one state could sum up; take zigzag or contiguous",
                        shape->ring);
    if (shape->mask != USP_MASK_CAUSAL || rows_are_positions(shape)) return USP_OK;
    const usp_sharding *sharding = &sequence->query;
    for (int64_t i = 0; i < sharding->first[sharding->ranks]; i++)
        if (sharding->segment[i].stride != 1)
            return usp_fail(USP_UNSUPPORTED,
                            "causal linear attention with ulysses %d, ring %d needs segments of stride 1; one has "
                            "stride %lld",
                            shape->ulysses, shape->ring, (long long)sharding->segment[i].stride);
    return USP_OK;
}

static int same_shape(const usp_shape *a, const usp_shape *b) {
    return a->ulysses == b->ulysses && a->ring == b->ring && a->u == b->u && a->r == b->r &&
           a->attention == b->attention && a->mask == b->mask;
}

usp_status usp_schedule_acquire(usp_sequence *sequence, const usp_shape *shape, usp_schedule **out) {
    for (usp_schedule *schedule = sequence->schedules; schedule; schedule = schedule->next)
        if (same_shape(&schedule->shape, shape)) {
            schedule->users++;
            *out = schedule;
            return USP_OK;
        }
    void *memory = NULL;
    USP_TRY(check_order(sequence, shape));
    USP_TRY(usp_host_alloc(&sequence->world->host, sizeof(usp_schedule), "schedule", &memory));
    usp_schedule *schedule = memory;
    *schedule = (usp_schedule){.users = 1, .shape = *shape};
    usp_status status = build(sequence, schedule);
    if (status != USP_OK) {
        destroy(sequence, schedule);
        return status;
    }
    schedule->next = sequence->schedules;
    sequence->schedules = schedule;
    *out = schedule;
    return USP_OK;
}

void usp_schedule_release(usp_sequence *sequence, usp_schedule *schedule) {
    if (!schedule || --schedule->users > 0) return;
    usp_schedule **link = &sequence->schedules;
    while (*link != schedule) link = &(*link)->next;
    *link = schedule->next;
    destroy(sequence, schedule);
}

usp_status usp_schedule_replan(usp_sequence *sequence, usp_stream stream) {
    for (usp_schedule *schedule = sequence->schedules; schedule; schedule = schedule->next) {
        plan_sides(sequence, schedule);
        plan_work(sequence, schedule);
        USP_TRY(upload(sequence, schedule, stream));
    }
    return usp_world_fork(sequence->world, stream, sequence->uploads);
}

void usp_schedule_destroy_all(usp_sequence *sequence) {
    while (sequence->schedules) {
        usp_schedule *schedule = sequence->schedules;
        sequence->schedules = schedule->next;
        destroy(sequence, schedule);
    }
}

usp_tiles usp_schedule_query_tiles(const usp_schedule *schedule, int t) {
    const usp_step *step = &schedule->step[t];
    return (usp_tiles){schedule->device_work + step->query_work, schedule->device_tile + step->query_tile,
                       (int)step->query_works};
}

usp_tiles usp_schedule_key_tiles(const usp_schedule *schedule, int t) {
    const usp_step *step = &schedule->step[t];
    return (usp_tiles){schedule->device_work + step->key_work, schedule->device_tile + step->key_tile,
                       (int)step->key_works};
}

/* A query at position x attends x + 1 keys under a causal mask, all keys otherwise. */
double usp_schedule_pairs(const usp_sequence *sequence, const usp_schedule *schedule, int r) {
    const usp_ring_block *block = &schedule->query.block[r];
    if (schedule->shape.mask != USP_MASK_CAUSAL) return (double)block->rows * (double)sequence->key.tokens;
    double pairs = 0;
    for (int64_t i = 0; i < block->segments; i++) {
        const usp_ring_segment *s = &schedule->query.segment[block->first_segment + i];
        double length = (double)s->length;
        pairs += length * ((double)s->start + 1) + (double)s->stride * length * (length - 1) / 2;
    }
    return pairs;
}
