/* ring.c - plans the blocks of all ring ranks and where the own one's rows come from. */
#include "ring.h"

/* The owner of a token and its place there. */
typedef struct place {
    int32_t rank, local;
} place;

usp_status usp_ring_side_alloc(const usp_host *host, usp_ring_side *side, const usp_grid *grid,
                               const usp_sharding *sharding, int64_t tokens) {
    usp_status status = USP_OK;
    int64_t runs = grid->ulysses > 1 ? grid->ring : sharding->capacity;
    side->first = usp_host_array(host, grid->ring + 1, sizeof *side->first, "plan", &status);
    side->first_run = usp_host_array(host, grid->ring + 1, sizeof *side->first_run, "plan", &status);
    side->landing_end = usp_host_array(host, grid->ulysses, sizeof *side->landing_end, "plan", &status);
    side->position = usp_host_array(host, tokens, sizeof *side->position, "plan", &status);
    side->run = usp_host_array(host, runs + 1, sizeof *side->run, "plan", &status);
    if (grid->ulysses == 1) return status;
    side->landing = usp_host_array(host, sharding->limit * grid->ulysses, sizeof *side->landing, "plan", &status);
    side->landing_runs = usp_host_array(host, grid->ulysses, sizeof *side->landing_runs, "plan", &status);
    side->scratch = usp_host_array(host, tokens, sizeof(place), "plan", &status);
    return status;
}

void usp_ring_side_free(const usp_host *host, usp_ring_side *side) {
    usp_host_free(host, side->first);
    usp_host_free(host, side->first_run);
    usp_host_free(host, side->landing_end);
    usp_host_free(host, side->landing_runs);
    usp_host_free(host, side->position);
    usp_host_free(host, side->run);
    usp_host_free(host, side->landing);
    usp_host_free(host, side->scratch);
}

static void find_places(const usp_sharding *sharding, place *places) {
    for (int rank = 0; rank < sharding->ranks; rank++) {
        int32_t local = 0;
        for (int64_t i = sharding->first[rank]; i < sharding->first[rank + 1]; i++) {
            const usp_segment *s = &sharding->segment[i];
            for (int64_t j = 0; j < s->length; j++) places[s->start + j * s->stride] = (place){rank, local++};
        }
    }
}

/* Tokens in order go to the next row of their ring rank. */
static void deal_rows(usp_ring_side *side, const usp_sharding *sharding, const usp_grid *grid) {
    const place *places = side->scratch;
    int64_t *next = side->first_run; /* free until runs are found */
    for (int r = 0; r < grid->ring; r++) next[r] = side->first[r];
    for (int64_t token = 0; token < sharding->tokens; token++) {
        int r = places[token].rank / grid->ulysses, u = places[token].rank % grid->ulysses;
        if (r == grid->r)
            side->landing[(u ? side->landing_end[u - 1] : 0) + places[token].local] =
                (int32_t)(next[r] - side->first[r]);
        side->position[next[r]++] = (int32_t)token;
    }
}

static usp_landing_runs landing_runs_of(const int32_t *landing, int64_t tokens) {
    usp_landing_runs found = {0};
    for (int64_t i = 0; i < tokens && found.runs <= USP_MOST_RUNS; i++) {
        if (i > 0 && landing[i] == landing[i - 1] + 1) continue;
        if (found.runs < USP_MOST_RUNS) found.begin[found.runs] = i;
        found.runs++;
    }
    if (found.runs <= USP_MOST_RUNS) found.begin[found.runs] = tokens;
    return found;
}

static void find_landing_runs(usp_ring_side *side, int ulysses) {
    int64_t begin = 0;
    for (int u = 0; u < ulysses; u++) {
        side->landing_runs[u] = landing_runs_of(side->landing + begin, side->landing_end[u] - begin);
        begin = side->landing_end[u];
    }
}

/* Without an exchange a block is its rank's tokens. */
static void list_rows(usp_ring_side *side, const usp_sharding *sharding) {
    int32_t *position = side->position;
    for (int64_t i = 0; i < sharding->first[sharding->ranks]; i++)
        for (int64_t j = 0; j < sharding->segment[i].length; j++)
            *position++ = (int32_t)(sharding->segment[i].start + j * sharding->segment[i].stride);
}

static void find_runs(usp_ring_side *side, int ring) {
    int64_t runs = 0;
    for (int r = 0; r < ring; r++) {
        side->first_run[r] = runs;
        for (int64_t row = side->first[r]; row < side->first[r + 1]; row++)
            if (row == side->first[r] || side->position[row] < side->position[row - 1]) side->run[runs++] = row;
    }
    side->first_run[ring] = runs;
    side->run[runs] = side->first[ring];
}

void usp_ring_side_plan(usp_ring_side *side, const usp_sharding *sharding, const usp_grid *grid) {
    for (int r = 0; r <= grid->ring; r++) side->first[r] = 0;
    for (int rank = 0; rank < sharding->ranks; rank++) side->first[rank / grid->ulysses + 1] += sharding->local[rank];
    for (int r = 0; r < grid->ring; r++) side->first[r + 1] += side->first[r];
    for (int u = 0; u < grid->ulysses; u++)
        side->landing_end[u] = (u ? side->landing_end[u - 1] : 0) + sharding->local[grid->r * grid->ulysses + u];
    if (grid->ulysses > 1) {
        find_places(sharding, side->scratch);
        deal_rows(side, sharding, grid);
        find_landing_runs(side, grid->ulysses);
    } else {
        list_rows(side, sharding);
    }
    find_runs(side, grid->ring);
}
