/* sequence.c - creates sequences. Giving them other documents is replan.c. */
#include "sequence.h"
#include "abi.h"
#include "error.h"
#include "size.h"

/* ---- checks ------------------------------------------------------------------------------------------------------ */

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

static usp_status check_extents(const usp_sequence_config *config) {
    USP_REQUIRE(config->layout >= USP_LAYOUT_ZIGZAG && config->layout <= USP_LAYOUT_CUSTOM,
                "usp_sequence_config.layout is %d: no such layout", (int)config->layout);
    USP_REQUIRE(config->tokens >= 0 && config->tokens < INT32_MAX,
                "usp_sequence_config.tokens is %lld: must be in 0 .. 2^31 - 2", (long long)config->tokens);
    USP_REQUIRE(config->key_tokens >= 0 && config->key_tokens < INT32_MAX,
                "usp_sequence_config.key_tokens is %lld: must be in 0 .. 2^31 - 2", (long long)config->key_tokens);
    USP_REQUIRE(config->max_documents >= 0, "usp_sequence_config.max_documents is %d: must not be negative",
                config->max_documents);
    USP_REQUIRE(config->documents >= 0, "usp_sequence_config.documents is %lld: must not be negative",
                (long long)config->documents);
    return USP_OK;
}

/* Are the keys another tensor? One of as many tokens has documents of its own, or there is nothing to tell apart. */
static int is_cross(const usp_sequence_config *config) {
    return config->key_tokens && (config->key_tokens != config->tokens || config->key_document_ends);
}

static usp_documents documents_of(const usp_sequence_config *config) {
    return (usp_documents){sizeof(usp_documents),     config->documents, config->document_ends,
                           config->key_document_ends, config->prefixes,  config->parents};
}

static usp_status check_given_documents(const usp_sequence_config *config) {
    const usp_documents given = documents_of(config);
    USP_TRY(
        usp_documents_check(&given, "usp_sequence_config.", config->tokens, is_cross(config) ? config->key_tokens : 0));
    USP_REQUIRE(!config->max_documents || config->documents <= config->max_documents,
                "usp_sequence_config.max_documents is %d: less than documents", config->max_documents);
    USP_REQUIRE(config->layout != USP_LAYOUT_ZIGZAG_PER_DOCUMENT || given.ends[given.count - 1] == config->tokens,
                "usp_sequence_config.document_ends: the last end is %lld, tokens is %lld",
                (long long)given.ends[given.count - 1], (long long)config->tokens);
    return USP_OK;
}

static usp_status check_documents(const usp_sequence_config *config) {
    USP_REQUIRE(config->documents || !config->document_ends,
                "usp_sequence_config.documents is 0 while document_ends is given");
    USP_REQUIRE(config->documents || (!config->key_document_ends && !config->prefixes && !config->parents),
                "usp_sequence_config.documents is 0 while key_document_ends, prefixes or parents are given");
    USP_REQUIRE(config->layout != USP_LAYOUT_ZIGZAG_PER_DOCUMENT || config->documents || config->max_documents,
                "usp_sequence_config.documents is not set, nor max_documents: the per-document layout takes documents");
    return config->documents ? check_given_documents(config) : USP_OK;
}

static usp_status check_config(const usp_sequence_config *config) {
    int custom = config->layout == USP_LAYOUT_CUSTOM;
    USP_TRY(check_extents(config));
    USP_REQUIRE(custom || (!config->segments && !config->segment),
                "usp_sequence_config.segments (or segment) is set: only the custom layout takes segments");
    if ((custom || config->layout == USP_LAYOUT_ZIGZAG_PER_DOCUMENT) && is_cross(config))
        return usp_fail(USP_UNSUPPORTED, "usp_sequence_config.key_tokens: a custom or per-document layout has no rule "
                                         "for keys of another length");
    USP_TRY(check_documents(config));
    return custom ? check_segments(config) : USP_OK;
}

static usp_status read_config(const usp_sequence_config *given, usp_sequence_config *config) {
    USP_TRY(usp_abi_read(config, sizeof *config, given, "usp_sequence_config"));
    USP_REQUIRE(config->tokens != 0, "usp_sequence_config.tokens is not set: give their number, or USP_NO_TOKENS");
    if (config->tokens == USP_NO_TOKENS) config->tokens = 0;
    return check_config(config);
}

/* ---- agreement --------------------------------------------------------------------------------------------------- */

/* What must be equal on all ranks of a data copy, and the first two everywhere: a custom layout takes more collective
 * steps. Its segments are each rank's own. */
typedef struct agreed_fields {
    int64_t mesh_ranks, custom, layout, tokens, key_tokens, max_documents, documents;
    uint64_t ends, key_ends, prefixes, parents; /* hashes */
} agreed_fields;

static uint64_t hash_array(const int64_t *array, int64_t count) {
    return array ? usp_hash(1, array, (size_t)count * sizeof *array) : 0;
}

static usp_status agree_on_config(const usp_mesh *mesh, usp_status mine, const usp_sequence_config *config) {
    enum { WORD = sizeof(int64_t) };
    static const usp_field fields[] = {{"mesh", 0, WORD},
                                       {"layout", WORD, 2 * WORD},
                                       {"tokens", 3 * WORD, WORD},
                                       {"key_tokens", 4 * WORD, WORD},
                                       {"max_documents", 5 * WORD, WORD},
                                       {"documents", 6 * WORD, WORD},
                                       {"document_ends", 7 * WORD, WORD},
                                       {"key_document_ends", 8 * WORD, WORD},
                                       {"prefixes", 9 * WORD, WORD},
                                       {"parents", 10 * WORD, WORD}};
    _Static_assert(sizeof(agreed_fields) <= USP_AGREE_BYTES, "a ballot holds the record");
    agreed_fields record = {.mesh_ranks = mesh->ranks, .custom = config->layout == USP_LAYOUT_CUSTOM};
    if (mine == USP_OK)
        record = (agreed_fields){mesh->ranks,
                                 config->layout == USP_LAYOUT_CUSTOM,
                                 config->layout,
                                 config->tokens,
                                 config->key_tokens,
                                 config->max_documents,
                                 config->documents,
                                 hash_array(config->document_ends, config->documents),
                                 hash_array(config->key_document_ends, config->documents),
                                 hash_array(config->prefixes, config->documents),
                                 hash_array(config->parents, config->documents)};
    return usp_world_agree(mesh->world, mine,
                           &(usp_agreement){"sequence", mesh->copy, &record, sizeof record, fields,
                                            sizeof fields / sizeof *fields, 2 * WORD});
}

static uint64_t hash_segments(uint64_t seed, const usp_sharding *sharding) {
    size_t ranks = (size_t)sharding->ranks, segments = (size_t)sharding->first[ranks];
    uint64_t hash = usp_hash(seed, sharding->first, (ranks + 1) * sizeof *sharding->first);
    return usp_hash(hash, sharding->segment, segments * sizeof *sharding->segment);
}

uint64_t usp_sequence_identity(const usp_sequence *sequence) {
    const int64_t extents[] = {sequence->layout, sequence->max_tokens, sequence->documents.capacity, sequence->cross};
    uint64_t hash = usp_documents_hash(usp_hash(0, extents, sizeof extents), &sequence->documents);
    return hash_segments(hash_segments(hash, &sequence->query), &sequence->key);
}

/* ---- create ------------------------------------------------------------------------------------------------------ */

static void set_extents(usp_sequence *sequence, const usp_sequence_config *config) {
    int64_t most = config->max_documents > config->documents ? config->max_documents : config->documents;
    sequence->layout = config->layout;
    sequence->max_tokens = config->tokens;
    sequence->documents.capacity = most ? most : 1;
    sequence->cross = is_cross(config);
    sequence->replans = config->max_documents > 0;
    sequence->trees = config->parents != NULL;
    sequence->prefixes = config->prefixes != NULL;
    sequence->query = (usp_sharding){.tokens = config->tokens, .ranks = sequence->ranks};
    sequence->key = (usp_sharding){.tokens = config->key_tokens, .ranks = sequence->ranks};
}

static usp_status allocate_arrays(usp_sequence *sequence, int64_t most) {
    const usp_host *host = &sequence->world->host;
    int custom = sequence->layout == USP_LAYOUT_CUSTOM,
        per_document = sequence->layout == USP_LAYOUT_ZIGZAG_PER_DOCUMENT;
    int64_t segments = 0, capacity = sequence->documents.capacity;
    void *documents = NULL;
    const usp_factor factors[] = {{custom ? "usp_sequence_config.segments" : "2 x usp_sequence_config.max_documents",
                                   (uint64_t)(custom         ? most
                                              : per_document ? 2 * capacity
                                                             : 2)},
                                  {"ranks", (uint64_t)sequence->ranks}};
    USP_TRY(usp_size_add(&segments, factors, 2));
    USP_TRY(usp_host_alloc(host, (size_t)(capacity + 1) * sizeof(usp_document), "documents", &documents));
    sequence->documents.document = documents;
    USP_TRY(usp_sharding_alloc(host, &sequence->query, segments));
    if (sequence->cross) USP_TRY(usp_sharding_alloc(host, &sequence->key, segments));
    usp_device *device = sequence->world->device;
    for (int i = 0; i < 2 && sequence->replans; i++) USP_TRY(device->ops->stream_create(device, &sequence->uploads[i]));
    return USP_OK;
}

static void set_documents(usp_sequence *sequence, const usp_documents *given) {
    int64_t tokens = sequence->max_tokens;
    if (sequence->layout == USP_LAYOUT_ZIGZAG_PER_DOCUMENT && given->ends) tokens = given->ends[given->count - 1];
    sequence->query.tokens = tokens;
    usp_documents_set(&sequence->documents, given, tokens, sequence->cross ? sequence->key.tokens : tokens);
}

static void fill_per_document(usp_sharding *sharding, const usp_document_list *list) {
    for (int rank = 0; rank < sharding->ranks; rank++) {
        usp_sharding_begin(sharding, rank);
        for (int64_t d = 0; d < list->count; d++)
            usp_sharding_add_zigzag(sharding, rank, list->document[d].begin,
                                    list->document[d].end - list->document[d].begin);
    }
}

/* Who owns what, by a formula. */
static void fill(const usp_sequence *sequence, usp_sharding *sharding) {
    if (sequence->layout == USP_LAYOUT_ZIGZAG_PER_DOCUMENT)
        fill_per_document(sharding, &sequence->documents);
    else
        usp_sharding_fill(sharding, sequence->layout);
}

/* The most tokens of any rank. With documents to come: of each, two chunks, each rounded up by less than one. */
static void set_limit(usp_sharding *sharding, const usp_sequence *sequence) {
    sharding->limit = 0;
    for (int rank = 0; rank < sharding->ranks; rank++)
        if (sharding->local[rank] > sharding->limit) sharding->limit = sharding->local[rank];
    if (!usp_sequence_moves(sequence)) return;
    int64_t tokens = sequence->max_tokens / sequence->ranks + 2 * sequence->documents.capacity;
    sharding->limit = tokens < sequence->max_tokens ? tokens : sequence->max_tokens;
}

static usp_status build(usp_sequence *sequence, const usp_sequence_config *config) {
    int custom = config->layout == USP_LAYOUT_CUSTOM;
    const usp_documents given = documents_of(config);
    int64_t most = 0;
    set_extents(sequence, config);
    if (custom) USP_TRY(usp_world_largest(sequence->world, "sequence", config->segments, &most));
    usp_status status = allocate_arrays(sequence, most);
    USP_TRY(usp_world_agree(sequence->world, status, &(usp_agreement){.what = "sequence"}));
    set_documents(sequence, &given);
    if (custom)
        USP_TRY(usp_sharding_gather(sequence->world, &sequence->query, sequence->copy, config, most));
    else
        fill(sequence, &sequence->query);
    set_limit(&sequence->query, sequence);
    if (sequence->cross) {
        fill(sequence, &sequence->key);
        set_limit(&sequence->key, sequence);
    } else {
        sequence->key = sequence->query;
    }
    return USP_OK;
}

void usp_sequence_set_documents(usp_sequence *sequence, const usp_documents *documents) {
    set_documents(sequence, documents);
    if (!usp_sequence_moves(sequence)) return;
    fill(sequence, &sequence->query);
    sequence->key = sequence->query;
}

/* Layers hold the sequence, and its plans: none of these is left. */
static void free_sequence(usp_object *object) {
    usp_sequence *sequence = (usp_sequence *)object;
    const usp_host *host = &sequence->world->host;
    usp_device *device = sequence->world->device;
    for (int i = 0; i < 2; i++)
        if (sequence->uploads[i]) device->ops->stream_destroy(device, sequence->uploads[i]);
    if (sequence->cross) usp_sharding_free(host, &sequence->key);
    usp_sharding_free(host, &sequence->query);
    usp_host_free(host, sequence->documents.document);
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

void usp_sequence_destroy(usp_sequence *sequence) {
    if (sequence) usp_object_drop(&sequence->object);
}
