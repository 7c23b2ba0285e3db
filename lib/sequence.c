/* sequence.c - layouts as lists of segments, and the helpers users need around them. Knows nothing of heads or masks.
 */
#include "sequence.h"
#include "abi.h"
#include "error.h"
#include "schedule.h"
#include "size.h"
#include <stdlib.h>
#include <string.h>

/* ---- layouts ----------------------------------------------------------------------------------------------------- */

/* Appends tokens start, start + stride, ... to the rank being filled, joining what continues the last segment. */
static void add_segment(usp_sharding *sharding, int rank, int64_t start, int64_t length, int64_t stride) {
    if (length <= 0) return;
    int64_t *end = &sharding->first[rank + 1];
    usp_segment *last = *end > sharding->first[rank] ? &sharding->segment[*end - 1] : NULL;
    sharding->local[rank] += length;
    if (last && last->stride == 1 && stride == 1 && last->start + last->length == start)
        last->length += length;
    else
        sharding->segment[(*end)++] = (usp_segment){start, length, length == 1 ? 1 : stride};
}

static int64_t cut(int64_t part, int64_t parts, int64_t length) {
    return part * length / parts;
}

/* Chunks p and 2N-1-p of [start, start + length): the later one does less or more causal work than the earlier one by
 * as much as the other ranks' do, so the sum is the same everywhere. */
static void add_zigzag(usp_sharding *sharding, int rank, int64_t start, int64_t length) {
    int64_t parts = 2 * (int64_t)sharding->ranks, chunks[] = {rank, parts - 1 - rank};
    for (int i = 0; i < 2; i++) {
        int64_t begin = cut(chunks[i], parts, length);
        add_segment(sharding, rank, start + begin, cut(chunks[i] + 1, parts, length) - begin, 1);
    }
}

static void add_rank(usp_sharding *sharding, int rank, const usp_sequence *sequence) {
    int64_t tokens = sharding->tokens, ranks = sharding->ranks, begin = cut(rank, ranks, tokens);
    if (sequence->layout == USP_LAYOUT_ZIGZAG) add_zigzag(sharding, rank, 0, tokens);
    if (sequence->layout == USP_LAYOUT_CONTIGUOUS)
        add_segment(sharding, rank, begin, cut(rank + 1, ranks, tokens) - begin, 1);
    if (sequence->layout == USP_LAYOUT_STRIPE)
        add_segment(sharding, rank, rank, (tokens - rank + ranks - 1) / ranks, ranks);
    if (sequence->layout == USP_LAYOUT_ZIGZAG_PER_DOCUMENT)
        for (int64_t d = 0; d < sequence->documents; d++) {
            int64_t start = d ? sequence->document_ends[d - 1] : 0;
            add_zigzag(sharding, rank, start, sequence->document_ends[d] - start);
        }
}

/* Fills the segments of a layout that is a formula. */
static void fill(usp_sharding *sharding, const usp_sequence *sequence) {
    sharding->first[0] = 0;
    for (int rank = 0; rank < sharding->ranks; rank++) {
        sharding->first[rank + 1] = sharding->first[rank];
        sharding->local[rank] = 0;
        add_rank(sharding, rank, sequence);
    }
}

/* ---- custom layout ----------------------------------------------------------------------------------------------- */

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

/* Collective: the largest of all ranks' numbers. */
static usp_status largest(usp_world *world, int64_t mine, int64_t *most) {
    void *memory = NULL;
    usp_status status = usp_host_alloc(&world->host, (size_t)world->comm->size * sizeof mine, "counts", &memory);
    status = usp_world_agree(world, status, &(usp_agreement){.what = "sequence"});
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

static void fill_custom(usp_sharding *sharding, const usp_segment *gathered, int64_t most) {
    sharding->first[0] = 0;
    for (int rank = 0; rank < sharding->ranks; rank++) {
        sharding->first[rank + 1] = sharding->first[rank];
        sharding->local[rank] = 0;
        for (int64_t i = 0; i < most; i++) {
            const usp_segment *segment = &gathered[rank * most + i];
            add_segment(sharding, rank, segment->start, segment->length, segment->stride);
        }
    }
}

/* ---- create ------------------------------------------------------------------------------------------------------ */

static usp_status check_documents(int64_t documents, const int64_t *ends, int64_t tokens) {
    USP_REQUIRE(documents <= INT32_MAX, "documents is %lld: must be less than 2^31", (long long)documents);
    USP_REQUIRE(documents >= 1 && ends, "document_ends is NULL while documents is %lld", (long long)documents);
    for (int64_t d = 0; d < documents; d++) {
        USP_REQUIRE(ends[d] >= (d ? ends[d - 1] : 0), "document_ends[%lld] is %lld: ends must ascend", (long long)d,
                    (long long)ends[d]);
        USP_REQUIRE(ends[d] <= tokens, "document_ends[%lld] is %lld: beyond %lld tokens", (long long)d,
                    (long long)ends[d], (long long)tokens);
    }
    return USP_OK;
}

static usp_status check_segments(const usp_sequence_config *config) {
    USP_REQUIRE(config->segments >= 0, "usp_sequence_config.segments is %lld: must not be negative",
                (long long)config->segments);
    USP_REQUIRE(config->segments <= config->tokens, "usp_sequence_config.segments is %lld: more than tokens",
                (long long)config->segments);
    USP_REQUIRE(!config->segments || config->segment, "usp_sequence_config.segment is NULL while segments is %lld",
                (long long)config->segments);
    for (int64_t i = 0; i < config->segments; i++) {
        usp_segment s = config->segment[i];
        int fits = s.start >= 0 && s.length >= 1 && s.stride >= 1 && s.start < config->tokens &&
                   s.length <= config->tokens && (s.length == 1 || s.stride <= config->tokens) &&
                   s.start + (s.length - 1) * s.stride < config->tokens;
        USP_REQUIRE(fits, "usp_sequence_config.segment[%lld] (start %lld, length %lld, stride %lld) leaves the tokens",
                    (long long)i, (long long)s.start, (long long)s.length, (long long)s.stride);
    }
    return USP_OK;
}

static usp_status check_config(const usp_sequence_config *config) {
    int custom = config->layout == USP_LAYOUT_CUSTOM, documents = config->layout == USP_LAYOUT_ZIGZAG_PER_DOCUMENT;
    USP_REQUIRE(config->layout >= USP_LAYOUT_ZIGZAG && config->layout <= USP_LAYOUT_CUSTOM,
                "usp_sequence_config.layout is %d: no such layout", (int)config->layout);
    USP_REQUIRE(config->tokens >= 0 && config->tokens < INT32_MAX,
                "usp_sequence_config.tokens is %lld: must be in "
                "0 .. 2^31 - 2",
                (long long)config->tokens);
    USP_REQUIRE(config->key_tokens >= 0 && config->key_tokens < INT32_MAX,
                "usp_sequence_config.key_tokens is %lld: must be in 0 .. 2^31 - 2", (long long)config->key_tokens);
    USP_REQUIRE(config->max_documents >= 0, "usp_sequence_config.max_documents is %d: must not be negative",
                config->max_documents);
    USP_REQUIRE(config->documents >= 0, "usp_sequence_config.documents is %lld: must not be negative",
                (long long)config->documents);
    USP_REQUIRE(config->documents || !config->document_ends,
                "usp_sequence_config.documents is 0 while document_ends is given");
    USP_REQUIRE(!documents || config->documents || config->max_documents,
                "usp_sequence_config.documents is not set, nor max_documents: the per-document layout takes documents");
    USP_REQUIRE(documents || (!config->documents && !config->max_documents && !config->document_ends),
                "usp_sequence_config.documents (or document_ends, max_documents) is set: only the per-document layout "
                "takes documents");
    USP_REQUIRE(custom || (!config->segments && !config->segment),
                "usp_sequence_config.segments (or segment) is set: only the custom layout takes segments");
    if ((custom || documents) && config->key_tokens && config->key_tokens != config->tokens)
        return usp_fail(USP_UNSUPPORTED, "usp_sequence_config.key_tokens: a custom or per-document layout has no rule "
                                         "for keys of another length");
    if (documents && config->documents) {
        USP_TRY(check_documents(config->documents, config->document_ends, config->tokens));
        USP_REQUIRE(config->document_ends[config->documents - 1] == config->tokens,
                    "usp_sequence_config.document_ends: the last end is %lld, tokens is %lld",
                    (long long)config->document_ends[config->documents - 1], (long long)config->tokens);
        USP_REQUIRE(!config->max_documents || config->documents <= config->max_documents,
                    "usp_sequence_config.max_documents is %d: less than documents", config->max_documents);
    }
    return custom ? check_segments(config) : USP_OK;
}

/* Room for `segments`, or for as many as there are tokens: none is empty. */
static usp_status allocate_sharding(const usp_host *host, usp_sharding *sharding, int64_t segments) {
    int64_t capacity = segments < sharding->tokens ? segments : sharding->tokens;
    void *first = NULL, *local = NULL, *segment = NULL;
    size_t ranks = (size_t)sharding->ranks;
    usp_status status = usp_host_alloc(host, (ranks + 1) * sizeof(int64_t), "sequence", &first);
    if (status == USP_OK) status = usp_host_alloc(host, ranks * sizeof(int64_t), "sequence", &local);
    if (status == USP_OK) status = usp_host_alloc(host, (size_t)capacity * sizeof(usp_segment), "segments", &segment);
    sharding->capacity = capacity;
    sharding->first = first;
    sharding->local = local;
    sharding->segment = segment;
    return status;
}

static void free_sharding(const usp_host *host, usp_sharding *sharding) {
    usp_host_free(host, sharding->first);
    usp_host_free(host, sharding->local);
    usp_host_free(host, sharding->segment);
}

static usp_status allocate_arrays(usp_sequence *sequence, int64_t most) {
    const usp_host *host = &sequence->world->host;
    usp_device *device = sequence->world->device;
    int custom = sequence->layout == USP_LAYOUT_CUSTOM;
    int64_t segments = 0;
    void *ends = NULL;
    const usp_factor factors[] = {{custom ? "usp_sequence_config.segments" : "2 x usp_sequence_config.max_documents",
                                   (uint64_t)(custom ? most : 2 * sequence->max_documents)},
                                  {"ranks", (uint64_t)sequence->ranks}};
    USP_TRY(usp_size_add(&segments, factors, 2));
    USP_TRY(usp_host_alloc(host, (size_t)sequence->max_documents * sizeof(int64_t), "documents", &ends));
    sequence->document_ends = ends;
    USP_TRY(allocate_sharding(host, &sequence->query, segments));
    if (sequence->cross) USP_TRY(allocate_sharding(host, &sequence->key, segments));
    if (sequence->layout != USP_LAYOUT_ZIGZAG_PER_DOCUMENT) return USP_OK;
    return device->ops->stream_create(device, &sequence->uploads);
}

/* The most tokens and segments of any rank. With documents to come: of each, two chunks, each rounded up by less than
 * one. */
static void set_limits(usp_sharding *sharding, const usp_sequence *sequence) {
    sharding->limit = sharding->segment_limit = 0;
    for (int rank = 0; rank < sharding->ranks; rank++) {
        int64_t segments = usp_sharding_count(sharding, rank);
        if (sharding->local[rank] > sharding->limit) sharding->limit = sharding->local[rank];
        if (segments > sharding->segment_limit) sharding->segment_limit = segments;
    }
    if (sequence->layout != USP_LAYOUT_ZIGZAG_PER_DOCUMENT) return;
    int64_t chunks = 2 * sequence->max_documents, tokens = sequence->max_tokens / sequence->ranks + chunks;
    sharding->limit = tokens < sequence->max_tokens ? tokens : sequence->max_tokens;
    sharding->segment_limit = chunks < sharding->limit ? chunks : sharding->limit;
}

static void set_documents(usp_sequence *sequence, int64_t documents, const int64_t *ends) {
    if (documents)
        memcpy(sequence->document_ends, ends, (size_t)documents * sizeof *ends);
    else
        sequence->document_ends[0] = sequence->max_tokens;
    sequence->documents = documents ? documents : 1;
    sequence->query.tokens = sequence->document_ends[sequence->documents - 1];
}

static void set_extents(usp_sequence *sequence, const usp_sequence_config *config) {
    int64_t most = config->max_documents > config->documents ? config->max_documents : config->documents;
    sequence->layout = config->layout;
    sequence->max_tokens = config->tokens;
    sequence->max_documents = most ? most : 1;
    sequence->cross = config->key_tokens && config->key_tokens != config->tokens;
    sequence->query = (usp_sharding){.tokens = config->tokens, .ranks = sequence->ranks};
    sequence->key = (usp_sharding){.tokens = config->key_tokens, .ranks = sequence->ranks};
}

static usp_status fill_custom_layout(usp_sequence *sequence, const usp_sequence_config *config, int64_t most) {
    const usp_host *host = &sequence->world->host;
    void *all = NULL;
    usp_status status = gather_segments(sequence->world, config, most, &all);
    if (status == USP_OK) {
        const usp_segment *gathered = (usp_segment *)all + (int64_t)sequence->copy * sequence->ranks * most;
        status = check_coverage(host, &sequence->query, gathered, most);
        status = usp_world_agree(sequence->world, status, &(usp_agreement){.what = "sequence"});
        if (status == USP_OK) fill_custom(&sequence->query, gathered, most);
    }
    usp_host_free(host, all);
    return status;
}

/* What must be equal on all ranks of a data copy, and the first two everywhere: a custom layout takes more collective
 * steps. Its segments are each rank's own. */
typedef struct agreed_fields {
    int64_t mesh_ranks, custom, layout, tokens, key_tokens, max_documents, documents, ends_hash;
} agreed_fields;

static usp_status agree_on_config(const usp_mesh *mesh, usp_status mine, const usp_sequence_config *config) {
    enum { WORD = sizeof(int64_t) };
    static const usp_field fields[] = {{"mesh", 0, WORD},
                                       {"layout", WORD, 2 * WORD},
                                       {"tokens", 3 * WORD, WORD},
                                       {"key_tokens", 4 * WORD, WORD},
                                       {"max_documents", 5 * WORD, WORD},
                                       {"documents", 6 * WORD, WORD},
                                       {"document_ends", 7 * WORD, WORD}};
    _Static_assert(sizeof(agreed_fields) <= USP_AGREE_BYTES, "a ballot holds the record");
    agreed_fields record = {.mesh_ranks = mesh->ranks,
                            .custom = config->layout == USP_LAYOUT_CUSTOM,
                            .layout = config->layout,
                            .tokens = config->tokens,
                            .key_tokens = config->key_tokens,
                            .max_documents = config->max_documents,
                            .documents = config->documents};
    if (mine == USP_OK && config->documents)
        record.ends_hash = (int64_t)usp_hash(0, config->document_ends, (size_t)config->documents * sizeof(int64_t));
    return usp_world_agree(mesh->world, mine,
                           &(usp_agreement){"sequence", mesh->copy, &record, sizeof record, fields, 7, 2 * WORD});
}

static usp_status build(usp_sequence *sequence, const usp_sequence_config *config) {
    int custom = config->layout == USP_LAYOUT_CUSTOM;
    int64_t most = 0;
    set_extents(sequence, config);
    if (custom) USP_TRY(largest(sequence->world, config->segments, &most));
    usp_status status = allocate_arrays(sequence, most);
    USP_TRY(usp_world_agree(sequence->world, status, &(usp_agreement){.what = "sequence"}));
    set_documents(sequence, config->documents, config->document_ends);
    if (custom)
        USP_TRY(fill_custom_layout(sequence, config, most));
    else
        fill(&sequence->query, sequence);
    set_limits(&sequence->query, sequence);
    if (sequence->cross) {
        fill(&sequence->key, sequence);
        set_limits(&sequence->key, sequence);
    } else {
        sequence->key = sequence->query;
    }
    return USP_OK;
}

static usp_status read_config(const usp_sequence_config *given, usp_sequence_config *config) {
    USP_TRY(usp_abi_read(config, sizeof *config, given, "usp_sequence_config"));
    USP_REQUIRE(config->tokens != 0, "usp_sequence_config.tokens is not set: give their number, or USP_NO_TOKENS");
    if (config->tokens == USP_NO_TOKENS) config->tokens = 0;
    return check_config(config);
}

static void free_sequence(usp_object *object) {
    usp_sequence *sequence = (usp_sequence *)object;
    const usp_host *host = &sequence->world->host;
    usp_device *device = sequence->world->device;
    usp_schedule_destroy_all(sequence);
    if (sequence->uploads) device->ops->stream_destroy(device, sequence->uploads);
    if (sequence->cross) free_sharding(host, &sequence->key);
    free_sharding(host, &sequence->query);
    usp_host_free(host, sequence->document_ends);
    usp_host_free(host, sequence);
}

static usp_status create(const usp_mesh *mesh, const usp_sequence_config *given, usp_sequence **out) {
    usp_sequence_config config = {0};
    void *memory = NULL;
    usp_status status = read_config(given, &config);
    if (status == USP_OK && !out) status = usp_fail(USP_INVALID, "sequence is NULL");
    if (status == USP_OK) status = usp_host_alloc(&mesh->world->host, sizeof(usp_sequence), "sequence", &memory);
    status = agree_on_config(mesh, status, &config);
    if (status != USP_OK) {
        usp_host_free(&mesh->world->host, memory);
        return status;
    }
    usp_sequence *sequence = memory;
    *sequence = (usp_sequence){.world = mesh->world, .ranks = mesh->ranks, .rank = mesh->p, .copy = mesh->copy};
    usp_object_begin(&sequence->object, mesh->world, &mesh->world->object, free_sequence);
    status = build(sequence, &config);
    if (status != USP_OK) {
        usp_sequence_destroy(sequence);
        return status;
    }
    sequence->number = ++mesh->world->sequence_count;
    *out = sequence;
    return USP_OK;
}

usp_status usp_sequence_create(const usp_mesh *mesh, const usp_sequence_config *config, usp_sequence **sequence) {
    USP_REQUIRE(mesh, "mesh is NULL");
    USP_TRY(usp_guard_enter(mesh->world));
    return usp_guard_leave(mesh->world, create(mesh, config, sequence));
}

/* A captured upload would read the plan again whenever the graph runs. */
static usp_status check_capture(usp_device *device, usp_stream stream) {
    int capturing = 0;
    USP_TRY(device->ops->capturing(device, stream, &capturing));
    USP_REQUIRE(!capturing, "stream is being captured: other documents are planned on the host, outside of graphs");
    return USP_OK;
}

/* Ranks that plan otherwise would compute wrongly: their comm compares. */
static void tell_plan(const usp_sequence *sequence) {
    usp_comm *comm = sequence->world->comm;
    uint64_t hash = usp_hash(sequence->number, sequence->document_ends, (size_t)sequence->documents * sizeof(int64_t));
    comm->ops->note_plan(comm, sequence->ranks, hash);
}

static usp_status replan(usp_sequence *sequence, int64_t documents, const int64_t *ends, usp_stream stream) {
    USP_REQUIRE(sequence->layout == USP_LAYOUT_ZIGZAG_PER_DOCUMENT,
                "only the per-document layout can be given other documents");
    USP_REQUIRE(documents >= 1 && documents <= sequence->max_documents, "documents is %lld: must be in 1 .. %lld",
                (long long)documents, (long long)sequence->max_documents);
    USP_TRY(check_documents(documents, ends, sequence->max_tokens));
    usp_device *device = sequence->world->device;
    USP_TRY(check_capture(device, stream));
    USP_TRY(usp_world_wait(sequence->world, sequence->uploads)); /* what is planned anew may still be read */
    set_documents(sequence, documents, ends);
    fill(&sequence->query, sequence);
    sequence->key = sequence->query;
    USP_TRY(usp_world_conclude(sequence->world, usp_schedule_replan(sequence, stream)));
    tell_plan(sequence);
    return USP_OK;
}

usp_status usp_sequence_replan(usp_sequence *sequence, int64_t documents, const int64_t *ends, usp_stream stream) {
    USP_REQUIRE(sequence, "sequence is NULL");
    USP_TRY(usp_guard_enter(sequence->world));
    return usp_guard_leave(sequence->world, replan(sequence, documents, ends, stream));
}

static uint64_t hash_segments(uint64_t seed, const usp_sharding *sharding) {
    size_t ranks = (size_t)sharding->ranks, segments = (size_t)sharding->first[ranks];
    uint64_t hash = usp_hash(seed, sharding->first, (ranks + 1) * sizeof *sharding->first);
    return usp_hash(hash, sharding->segment, segments * sizeof *sharding->segment);
}

uint64_t usp_sequence_identity(const usp_sequence *sequence) {
    const int64_t extents[] = {sequence->layout, sequence->max_tokens, sequence->max_documents, sequence->cross};
    uint64_t hash = usp_hash(0, extents, sizeof extents);
    return hash_segments(hash_segments(hash, &sequence->query), &sequence->key);
}

void usp_sequence_destroy(usp_sequence *sequence) {
    if (sequence) usp_object_drop(&sequence->object);
}

/* ---- helpers ----------------------------------------------------------------------------------------------------- */

usp_status usp_sequence_segments(const usp_sequence *sequence, int rank, int64_t capacity, usp_segment *segments,
                                 int64_t *count) {
    USP_REQUIRE(sequence, "sequence is NULL");
    USP_TRY(usp_guard_process(sequence->world));
    USP_REQUIRE(rank >= 0 && rank < sequence->ranks, "rank is %d: must be in 0 .. %d", rank, sequence->ranks - 1);
    USP_REQUIRE(count, "count is NULL");
    USP_REQUIRE(capacity >= 0 && (capacity == 0 || segments), "segments is NULL or capacity is negative");
    const usp_sharding *sharding = &sequence->query;
    *count = usp_sharding_count(sharding, rank);
    for (int64_t i = 0; i < *count && i < capacity; i++) segments[i] = sharding->segment[sharding->first[rank] + i];
    return USP_OK;
}

int64_t usp_sequence_local_tokens(const usp_sequence *sequence, int rank) {
    return sequence && rank >= 0 && rank < sequence->ranks ? sequence->query.local[rank] : -1;
}

int64_t usp_sequence_local_key_tokens(const usp_sequence *sequence, int rank) {
    return sequence && rank >= 0 && rank < sequence->ranks ? sequence->key.local[rank] : -1;
}

int64_t usp_sequence_own_tokens(const usp_sequence *sequence) {
    return sequence ? sequence->query.local[sequence->rank] : -1;
}

int64_t usp_sequence_own_key_tokens(const usp_sequence *sequence) {
    return sequence ? sequence->key.local[sequence->rank] : -1;
}

int64_t usp_sequence_to_global(const usp_sequence *sequence, int rank, int64_t local) {
    if (!sequence || rank < 0 || rank >= sequence->ranks || local < 0) return -1;
    const usp_sharding *sharding = &sequence->query;
    for (int64_t i = sharding->first[rank]; i < sharding->first[rank + 1]; i++) {
        const usp_segment *segment = &sharding->segment[i];
        if (local < segment->length) return segment->start + local * segment->stride;
        local -= segment->length;
    }
    return -1;
}

/* Index of `global` in the rank's local order, or -1. */
static int64_t find_token(const usp_sharding *sharding, int rank, int64_t global) {
    int64_t before = 0;
    for (int64_t i = sharding->first[rank]; i < sharding->first[rank + 1]; i++) {
        const usp_segment *segment = &sharding->segment[i];
        int64_t offset = global - segment->start;
        if (offset >= 0 && offset % segment->stride == 0 && offset / segment->stride < segment->length)
            return before + offset / segment->stride;
        before += segment->length;
    }
    return -1;
}

usp_status usp_sequence_to_local(const usp_sequence *sequence, int64_t global, int *rank, int64_t *local) {
    USP_REQUIRE(sequence, "sequence is NULL");
    USP_TRY(usp_guard_process(sequence->world));
    USP_REQUIRE(rank && local, "rank or local is NULL");
    USP_REQUIRE(global >= 0 && global < sequence->query.tokens, "global is %lld: must be in 0 .. %lld",
                (long long)global, (long long)sequence->query.tokens - 1);
    for (int candidate = 0; candidate < sequence->ranks; candidate++) {
        int64_t index = find_token(&sequence->query, candidate, global);
        if (index < 0) continue;
        *rank = candidate;
        *local = index;
        return USP_OK;
    }
    return usp_fail(USP_INTERNAL, "token %lld has no owner", (long long)global);
}

/* The document that holds a token: the first one that ends beyond it. */
static int64_t find_document(const usp_sequence *sequence, int64_t token) {
    int64_t low = 0, high = sequence->documents - 1;
    while (low < high) {
        int64_t middle = (low + high) / 2;
        if (sequence->document_ends[middle] > token)
            high = middle;
        else
            low = middle + 1;
    }
    return low;
}

/* Walks the own tokens in local order. */
typedef struct cursor {
    const usp_segment *segment;
    int64_t index;
} cursor;

static cursor first_token(const usp_sequence *sequence) {
    return (cursor){sequence->query.segment + sequence->query.first[sequence->rank], 0};
}

/* Global index of the token under the cursor, which then moves on. */
static int64_t next_token(cursor *at) {
    int64_t token = at->segment->start + at->index * at->segment->stride;
    if (++at->index == at->segment->length) *at = (cursor){at->segment + 1, 0};
    return token;
}

usp_status usp_sequence_positions(const usp_sequence *sequence, int32_t *positions) {
    USP_REQUIRE(sequence, "sequence is NULL");
    USP_TRY(usp_guard_process(sequence->world));
    int64_t count = sequence->query.local[sequence->rank];
    USP_REQUIRE(positions || count == 0, "positions is NULL");
    cursor at = first_token(sequence);
    for (int64_t i = 0; i < count; i++) {
        int64_t token = next_token(&at), document = find_document(sequence, token);
        positions[i] = (int32_t)(token - (document ? sequence->document_ends[document - 1] : 0));
    }
    return USP_OK;
}

usp_status usp_sequence_labels(const usp_sequence *sequence, const int32_t *tokens, int32_t ignore, int32_t *labels) {
    USP_REQUIRE(sequence, "sequence is NULL");
    USP_TRY(usp_guard_process(sequence->world));
    int64_t count = sequence->query.local[sequence->rank];
    USP_REQUIRE((tokens && labels) || count == 0, "tokens or labels is NULL");
    cursor at = first_token(sequence);
    for (int64_t i = 0; i < count; i++) {
        int64_t token = next_token(&at), end = sequence->document_ends[find_document(sequence, token)];
        labels[i] = token + 1 < end ? tokens[token + 1] : ignore;
    }
    return USP_OK;
}

/* Copies the tokens of one rank between a whole tensor and its local part, [batch, tokens, token_bytes] each. */
static void copy_tokens(const usp_sharding *sharding, int rank, int64_t batch, size_t token_bytes, char *whole,
                        char *local, int to_local) {
    for (int64_t b = 0; b < batch; b++)
        for (int64_t i = sharding->first[rank]; i < sharding->first[rank + 1]; i++)
            for (int64_t j = 0; j < sharding->segment[i].length; j++, local += token_bytes) {
                int64_t token = sharding->segment[i].start + j * sharding->segment[i].stride;
                char *there = whole + (size_t)(b * sharding->tokens + token) * token_bytes;
                memcpy(to_local ? local : there, to_local ? there : local, token_bytes);
            }
}

/* Bytes of the largest local part of this data copy; as many from every rank of the world must be countable, and so
 * the whole tensor is. */
static usp_status size_parts(const usp_sequence *sequence, int64_t batch, size_t token_bytes, int64_t *bytes) {
    int64_t most = 0, all = 0;
    for (int rank = 0; rank < sequence->ranks; rank++)
        if (sequence->query.local[rank] > most) most = sequence->query.local[rank];
    USP_REQUIRE(batch >= 0, "batch is %lld: must not be negative", (long long)batch);
    const usp_factor factors[] = {{"batch", (uint64_t)batch},
                                  {"token_bytes", token_bytes},
                                  {"tokens", (uint64_t)most},
                                  {"ranks", (uint64_t)sequence->world->comm->size}};
    USP_TRY(usp_size_add(&all, factors, 4));
    *bytes = all / sequence->world->comm->size;
    return USP_OK;
}

usp_status usp_sequence_scatter(const usp_sequence *sequence, int64_t batch, size_t token_bytes, const void *whole,
                                void *local) {
    int64_t bytes = 0;
    USP_REQUIRE(sequence, "sequence is NULL");
    USP_TRY(usp_guard_process(sequence->world));
    USP_TRY(size_parts(sequence, batch, token_bytes, &bytes));
    int empty = sequence->query.local[sequence->rank] == 0 || bytes == 0;
    USP_REQUIRE(empty || (whole && local), "whole or local is NULL");
    if (!empty) copy_tokens(&sequence->query, sequence->rank, batch, token_bytes, (char *)(uintptr_t)whole, local, 1);
    return USP_OK;
}

/* Collective: the ranks of a data copy gather tensors of one size. */
static usp_status agree_on_gather(const usp_sequence *sequence, usp_status mine, int64_t batch, size_t token_bytes) {
    enum { WORD = sizeof(uint64_t) };
    static const usp_field fields[] = {{"batch", 0, WORD}, {"token_bytes", WORD, WORD}};
    const uint64_t record[] = {(uint64_t)batch, token_bytes};
    _Static_assert(sizeof record <= USP_AGREE_BYTES, "a ballot holds the record");
    return usp_world_agree(sequence->world, mine,
                           &(usp_agreement){"gather", sequence->copy, record, sizeof record, fields, 2, 0});
}

/* Brings all ranks' parts together: [world size][piece]. */
static usp_status gather_parts(const usp_sequence *sequence, size_t own, const void *local, size_t piece, void **all) {
    usp_world *world = sequence->world;
    void *mine = NULL;
    usp_status status = usp_host_alloc(&world->host, piece, "gather", &mine);
    if (status == USP_OK) status = usp_host_alloc(&world->host, piece * (size_t)world->comm->size, "gather", all);
    status = usp_world_agree(world, status, &(usp_agreement){.what = "gather"});
    if (status == USP_OK && own) memcpy(mine, local, own);
    if (status == USP_OK) status = world->comm->ops->allgather(world->comm, mine, *all, piece);
    usp_host_free(&world->host, mine);
    return status;
}

static usp_status gather(const usp_sequence *sequence, int64_t batch, size_t token_bytes, const void *local,
                         void *whole) {
    const usp_host *host = &sequence->world->host;
    int64_t bytes = 0, piece = 0;
    void *all = NULL;
    usp_status status = size_parts(sequence, batch, token_bytes, &bytes);
    size_t own = status == USP_OK && bytes ? (size_t)(sequence->query.local[sequence->rank] * batch) * token_bytes : 0;
    if (status == USP_OK && ((bytes && !whole) || (own && !local)))
        status = usp_fail(USP_INVALID, "whole or local is NULL");
    USP_TRY(agree_on_gather(sequence, status, batch, token_bytes));
    USP_TRY(largest(sequence->world, bytes, &piece)); /* data copies may hold different sequences */
    status = gather_parts(sequence, own, local, (size_t)piece, &all);
    for (int rank = 0; rank < sequence->ranks && status == USP_OK && bytes; rank++)
        copy_tokens(&sequence->query, rank, batch, token_bytes, whole,
                    (char *)all + piece * (sequence->copy * sequence->ranks + rank), 0);
    usp_host_free(host, all);
    return status;
}

usp_status usp_sequence_gather(const usp_sequence *sequence, int64_t batch, size_t token_bytes, const void *local,
                               void *whole) {
    USP_REQUIRE(sequence, "sequence is NULL");
    USP_TRY(usp_guard_enter(sequence->world));
    return usp_guard_leave(sequence->world, gather(sequence, batch, token_bytes, local, whole));
}
