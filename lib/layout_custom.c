/* layout_custom.c - the custom layout: every rank brings its segments, and all see that they cover every token once. */
#include "error.h"
#include "layout.h"
#include "size.h"
#include <string.h>

static usp_status mark_segment(unsigned char *seen, const usp_segment *segment, int rank) {
    for (int64_t i = 0; i < segment->length; i++) {
        int64_t token = segment->start + i * segment->stride;
        unsigned char bit = (unsigned char)(1 << (token % 8));
        USP_REQUIRE(!(seen[token / 8] & bit), "usp_sequence_config.segment: token %lld is owned twice, also by rank %d",
                    (long long)token, rank);
        seen[token / 8] |= bit;
    }
    return USP_OK;
}

/* The segments of all ranks as they were gathered, [ranks][most], own every token once: so they fit the sharding. */
static usp_status check_coverage(const usp_host *host, const usp_sharding *sharding, const usp_segment *gathered,
                                 int64_t most) {
    void *memory = NULL;
    int64_t covered = 0;
    USP_TRY(usp_host_alloc(host, (size_t)sharding->tokens / 8 + 1, "coverage", &memory));
    usp_status status = USP_OK;
    for (int64_t i = 0; i < sharding->ranks * most && status == USP_OK; i++) {
        status = mark_segment(memory, &gathered[i], (int)(i / most));
        covered += gathered[i].length;
    }
    usp_host_free(host, memory);
    USP_TRY(status);
    USP_REQUIRE(covered == sharding->tokens, "usp_sequence_config.segment: %lld of %lld tokens are owned by no rank",
                (long long)(sharding->tokens - covered), (long long)sharding->tokens);
    return USP_OK;
}

usp_status usp_world_largest(usp_world *world, const char *what, int64_t mine, int64_t *most) {
    void *memory = NULL;
    usp_status status = usp_host_alloc(&world->host, (size_t)world->comm->size * sizeof mine, "counts", &memory);
    status = usp_world_agree(world, status, &(usp_agreement){.what = what});
    int64_t *counts = memory;
    if (status == USP_OK) status = world->comm->ops->allgather(world->comm, &mine, counts, sizeof mine);
    *most = 0;
    for (int rank = 0; rank < world->comm->size; rank++)
        if (status == USP_OK && counts[rank] > *most) *most = counts[rank];
    usp_host_free(&world->host, memory);
    return status;
}

/* Brings all ranks' segments together: [world size][most], unused ones of length 0. */
static usp_status gather_segments(usp_world *world, const usp_sequence_config *config, int64_t most, void **all) {
    size_t bytes = (size_t)most * sizeof(usp_segment);
    int64_t whole = 0;
    void *mine = NULL;
    const usp_factor factors[] = {{"usp_sequence_config.segments", (uint64_t)most},
                                  {"bytes", sizeof(usp_segment)},
                                  {"ranks", (uint64_t)world->comm->size}};
    usp_status status = usp_size_add(&whole, factors, 3);
    if (status == USP_OK) status = usp_host_alloc(&world->host, bytes, "segments", &mine);
    if (status == USP_OK) status = usp_host_alloc(&world->host, (size_t)whole, "segments", all);
    status = usp_world_agree(world, status, &(usp_agreement){.what = "sequence"});
    if (status == USP_OK) {
        if (config->segments) memcpy(mine, config->segment, (size_t)config->segments * sizeof(usp_segment));
        status = world->comm->ops->allgather(world->comm, mine, *all, bytes);
    }
    usp_host_free(&world->host, mine);
    return status;
}

static void fill(usp_sharding *sharding, const usp_segment *gathered, int64_t most) {
    for (int rank = 0; rank < sharding->ranks; rank++) {
        usp_sharding_begin(sharding, rank);
        for (int64_t i = 0; i < most; i++) {
            const usp_segment *segment = &gathered[rank * most + i];
            usp_sharding_add(sharding, rank, segment->start, segment->length, segment->stride);
        }
    }
}

usp_status usp_sharding_gather(usp_world *world, usp_sharding *sharding, int copy, const usp_sequence_config *config,
                               int64_t most) {
    void *all = NULL;
    usp_status status = gather_segments(world, config, most, &all);
    if (status == USP_OK) {
        const usp_segment *gathered = (usp_segment *)all + (int64_t)copy * sharding->ranks * most;
        status = check_coverage(&world->host, sharding, gathered, most);
        status = usp_world_agree(world, status, &(usp_agreement){.what = "sequence"});
        if (status == USP_OK) fill(sharding, gathered, most);
    }
    usp_host_free(&world->host, all);
    return status;
}
