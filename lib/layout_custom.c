/* layout_custom.c - the custom layout: every rank brings its segments, and all see that they cover every token once. */
#include "error.h"
#include "layout.h"
#include "size.h"

static usp_status mark_segment(unsigned char *seen, const usp_segment *segment, const char *name, int rank) {
    for (int64_t i = 0; i < segment->length; i++) {
        int64_t token = segment->start + i * segment->stride;
        unsigned char bit = (unsigned char)(1 << (token % 8));
        USP_REQUIRE(!(seen[token / 8] & bit), "usp_sequence_config.%s: token %lld is owned twice, also by rank %d",
                    name, (long long)token, rank);
        seen[token / 8] |= bit;
    }
    return USP_OK;
}

/* The segments of all ranks as they were gathered, [ranks][most], own every token once: so they fit the sharding. */
static usp_status check_coverage(const usp_host *host, const usp_sharding *sharding, const usp_segment *gathered,
                                 int64_t most, const char *name) {
    void *memory = NULL;
    int64_t covered = 0;
    USP_TRY(usp_host_alloc(host, (size_t)sharding->tokens / 8 + 1, "coverage", &memory));
    usp_status status = USP_OK;
    for (int64_t i = 0; i < sharding->ranks * most && status == USP_OK; i++) {
        status = mark_segment(memory, &gathered[i], name, (int)(i / most));
        covered += gathered[i].length;
    }
    usp_host_free(host, memory);
    USP_TRY(status);
    USP_REQUIRE(covered == sharding->tokens, "usp_sequence_config.%s: %lld of %lld tokens are owned by no rank", name,
                (long long)(sharding->tokens - covered), (long long)sharding->tokens);
    return USP_OK;
}

/* Unused segments are of length 0. */
static void fill(usp_sharding *sharding, const usp_segment *gathered, int64_t most) {
    for (int rank = 0; rank < sharding->ranks; rank++) {
        usp_sharding_begin(sharding, rank);
        for (int64_t i = 0; i < most; i++) {
            const usp_segment *segment = &gathered[rank * most + i];
            usp_sharding_add(sharding, rank, segment->start, segment->length, segment->stride);
        }
    }
}

usp_status usp_sharding_gather(usp_world *world, usp_sharding *sharding, int copy, const usp_segment_list *mine,
                               int64_t most) {
    const size_t bytes = sizeof(usp_segment);
    const usp_factor factors[] = {{"usp_sequence_config.segments", (uint64_t)most},
                                  {"bytes", bytes},
                                  {"ranks", (uint64_t)world->transport->size}};
    int64_t whole = 0;
    void *all = NULL;
    USP_TRY(usp_size_add(&whole, factors, 3));
    usp_status status =
        usp_world_gather(world, "sequence", mine->segment, (size_t)mine->count * bytes, (size_t)most * bytes, &all);
    if (status == USP_OK) {
        const usp_segment *gathered = (usp_segment *)all + (int64_t)copy * sharding->ranks * most;
        status = check_coverage(&world->host, sharding, gathered, most, mine->name);
        status = usp_world_agree(world, status, &(usp_agreement){.what = "sequence"});
        if (status == USP_OK) fill(sharding, gathered, most);
    }
    usp_host_free(&world->host, all);
    return status;
}
