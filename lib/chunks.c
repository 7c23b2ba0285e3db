/* chunks.c - collects chunks, cuts the own ones in blocks, and marks the documents. */
#include "chunks.h"
#include "sort.h"

_Static_assert(sizeof(usp_chunk) <= USP_SORT_BYTES, "chunks are sorted");

/* ---- chunks ------------------------------------------------------------------------------------------------------ */

/* The row behind the chunk that begins with `row`. */
static int64_t end_of_chunk(const usp_ring_side *side, int64_t row, int64_t end) {
    int64_t next = row + 1;
    while (next < end && side->position[next] == side->position[next - 1] + 1) next++;
    return next;
}

int64_t usp_chunks_count(const usp_ring_side *side, const usp_grid *grid, int64_t *most) {
    int64_t chunks = 0;
    *most = 0;
    for (int r = 0; r < grid->ring; r++) {
        int64_t own = 0;
        for (int64_t row = side->first[r]; row < side->first[r + 1]; own++)
            row = end_of_chunk(side, row, side->first[r + 1]);
        if (own > *most) *most = own;
        chunks += own;
    }
    return chunks;
}

static int by_start(const void *a, const void *b) {
    const usp_chunk *x = a, *y = b;
    return (x->start > y->start) - (x->start < y->start);
}

static void collect(usp_chunk_list *list, const usp_ring_side *side, const usp_grid *grid) {
    list->chunks = 0;
    for (int r = 0; r < grid->ring; r++) {
        int64_t first = side->first[r], end = side->first[r + 1];
        for (int64_t row = first, next; row < end; row = next) {
            next = end_of_chunk(side, row, end);
            list->chunk[list->chunks++] = (usp_chunk){r, 0, side->position[row], row - first, next - row};
        }
    }
    usp_sort(list->chunk, (size_t)list->chunks, sizeof *list->chunk, by_start);
}

/* Gives each owner's chunks, in position order, places one behind the other. */
static void find_places(usp_chunk_list *list, const usp_grid *grid) {
    int64_t *next = list->first + 1; /* of each owner, which in the end is the next one's first */
    for (int r = 0; r <= grid->ring; r++) list->first[r] = 0;
    for (int64_t c = 0; c < list->chunks; c++)
        if (list->chunk[c].owner + 1 < grid->ring) next[list->chunk[c].owner + 1]++;
    for (int r = 1; r < grid->ring; r++) next[r] += next[r - 1];
    for (int64_t c = 0; c < list->chunks; c++)
        list->to.chunk_place[c] = list->chunk[c].place = (int32_t)next[list->chunk[c].owner]++;
    list->own_chunks = list->first[grid->r + 1] - list->first[grid->r];
}

/* ---- documents --------------------------------------------------------------------------------------------------- */

/* The first document of the sequence goes on with the initial state, and the last one with the final state's
 * gradient: neither begins nor ends anew. */
static usp_scan_step step_of(const usp_chunk_list *list, const usp_document_list *documents, int64_t start,
                             int64_t count, int group) {
    usp_scan_step step = {(int32_t)count, group, 0, 0};
    if (!list->to.begins) return step;
    int64_t tokens = documents->document[documents->count].end;
    for (int64_t d = usp_documents_find(documents, start, 0); d <= documents->count; d++) {
        int64_t begin = documents->document[d].begin, end = documents->document[d].end;
        if (begin >= start + count) break;
        if (begin == end) continue;
        step.begins |= begin > 0 && begin >= start;
        step.ends |= end < tokens && end <= start + count;
    }
    return step;
}

/* Rows of one chunk. What belongs to no document sees nothing, itself neither. */
static void mark_rows(usp_chunk_list *list, const usp_document_list *documents, const usp_chunk *chunk) {
    int64_t end = chunk->start + chunk->count, tokens = documents->document[documents->count].end;
    const usp_document *d = documents->document + usp_documents_find(documents, chunk->start, 0);
    for (int64_t x = chunk->start; x < end; d++)
        for (; x < end && x < d->end; x++) {
            int64_t row = chunk->row + x - chunk->start, nobody = d == documents->document + documents->count;
            int64_t before = d->begin < chunk->start || d->begin == 0, behind = d->end > end || d->end == tokens;
            list->to.begins[row] = (int32_t)(nobody   ? row + 1
                                             : before ? chunk->row - 1
                                                      : chunk->row + d->begin - chunk->start);
            list->to.ends[row] = (int32_t)(nobody   ? row - 1
                                           : behind ? chunk->row + chunk->count
                                                    : chunk->row + d->end - 1 - chunk->start);
        }
}

/* ---- blocks ------------------------------------------------------------------------------------------------------ */

/* `own`: its index among the own ones. */
static void cut_chunk(usp_chunk_list *list, const usp_document_list *documents, const usp_chunk *chunk, int64_t own,
                      int64_t most) {
    for (int64_t done = 0; done < chunk->count; done += most) {
        int64_t count = chunk->count - done < most ? chunk->count - done : most;
        list->to.block[list->blocks] = (usp_block){.begin = (int32_t)(chunk->row + done),
                                                   .count = (int32_t)count,
                                                   .chunk = (int32_t)own,
                                                   .distance = (int32_t)done,
                                                   .chunk_rows = (int32_t)chunk->count};
        list->to.block_step[list->blocks++] = step_of(list, documents, chunk->start + done, count, (int)own);
    }
}

void usp_chunks_fill(usp_chunk_list *list, const usp_ring_side *side, const usp_grid *grid,
                     const usp_document_list *documents, int64_t block) {
    list->blocks = 0;
    collect(list, side, grid);
    find_places(list, grid);
    for (int64_t c = 0; c < list->chunks; c++) {
        const usp_chunk *chunk = &list->chunk[c];
        list->to.chunk_step[c] = step_of(list, documents, chunk->start, chunk->count, 0);
        if (chunk->owner != grid->r) continue;
        cut_chunk(list, documents, chunk, chunk->place - list->first[grid->r], block);
        if (list->to.begins) mark_rows(list, documents, chunk);
    }
}
