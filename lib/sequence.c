/* sequence.c - creates sequences. Giving them other documents is replan.c. */
#include "sequence.h"
#include "abi.h"
#include "error.h"
#include "size.h"

/* ---- checks ------------------------------------------------------------------------------------------------------ */

static usp_status check_segments(const usp_segment_list *list, int64_t tokens) {
    const char *name = list->name;
    USP_REQUIRE(list->count >= 0, "usp_sequence_config.%ss is %lld: must not be negative", name,
                (long long)list->count);
    USP_REQUIRE(list->count <= tokens, "usp_sequence_config.%ss is %lld: more than tokens", name,
                (long long)list->count);
    USP_REQUIRE(!list->count || list->segment, "usp_sequence_config.%s is NULL while %ss is %lld", name, name,
                (long long)list->count);
    for (int64_t i = 0; i < list->count; i++) {
        usp_segment s = list->segment[i];
        int fits = s.start >= 0 && s.length >= 1 && s.stride >= 1 && s.start < tokens && s.length <= tokens &&
                   (s.length == 1 || s.stride <= tokens) && s.start + (s.length - 1) * s.stride < tokens;
        USP_REQUIRE(fits, "usp_sequence_config.%s[%lld] (start %lld, length %lld, stride %lld) leaves the tokens", name,
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

/* Are the keys another tensor? One of as many tokens has documents or segments of its own, or there is nothing to tell
 * apart. */
static int is_cross(const usp_sequence_config *config) {
    int apart = config->key_document_ends || config->layout == USP_LAYOUT_CUSTOM;
    return config->key_tokens && (config->key_tokens != config->tokens || apart);
}

/* Of the queries; of the keys of cross-attention. */
static usp_segment_list segments_of(const usp_sequence_config *config, int keys) {
    return keys ? (usp_segment_list){"key_segment", config->key_segments, config->key_segment}
                : (usp_segment_list){"segment", config->segments, config->segment};
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
    if (config->layout != USP_LAYOUT_ZIGZAG_PER_DOCUMENT) return USP_OK;
    int64_t end = given.ends[given.count - 1], key_end = given.key_ends ? given.key_ends[given.count - 1] : 0;
    USP_REQUIRE(end == config->tokens, "usp_sequence_config.document_ends: the last end is %lld, tokens is %lld",
                (long long)end, (long long)config->tokens);
    USP_REQUIRE(!given.key_ends || key_end == config->key_tokens,
                "usp_sequence_config.key_document_ends: the last end is %lld, key_tokens is %lld", (long long)key_end,
                (long long)config->key_tokens);
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

/* Lists of segments that the ranks bring together: of queries, and of keys in cross-attention. */
static int lists_of(const usp_sequence_config *config) {
    return config->layout == USP_LAYOUT_CUSTOM ? 1 + is_cross(config) : 0;
}

static usp_status check_config(const usp_sequence_config *config) {
    USP_TRY(check_extents(config));
    USP_TRY(check_documents(config));
    for (int keys = 0; keys < 2; keys++) {
        usp_segment_list list = segments_of(config, keys);
        USP_REQUIRE(keys < lists_of(config) || (!list.count && !list.segment),
                    "usp_sequence_config.%ss (or %s) is set: only the custom layout takes segments%s", list.name,
                    list.name, keys ? ", of keys in cross-attention" : "");
        if (keys < lists_of(config)) USP_TRY(check_segments(&list, keys ? config->key_tokens : config->tokens));
    }
    return USP_OK;
}

static usp_status read_config(const usp_sequence_config *given, usp_sequence_config *config) {
    USP_TRY(usp_abi_read(config, sizeof *config, given, "usp_sequence_config"));
    USP_REQUIRE(config->tokens != 0, "usp_sequence_config.tokens is not set: give their number, or USP_NO_TOKENS");
    if (config->tokens == USP_NO_TOKENS) config->tokens = 0;
    return check_config(config);
}

/* ---- agreement --------------------------------------------------------------------------------------------------- */

static int64_t hash_array(const int64_t *array, int64_t count) {
    return array ? (int64_t)usp_hash(1, array, (size_t)count * sizeof *array) : 0;
}

/* What must be equal on all ranks of a data copy, and the first two everywhere: each list of segments takes more
 * collective steps. The segments are each rank's own. */
static usp_status agree_on_config(const usp_mesh *mesh, usp_status mine, const usp_sequence_config *config) {
    enum { FIELDS = 11, WORD = sizeof(int64_t) };
    static const char *const names[FIELDS] = {
        "mesh",          "layout or cross-attention", "layout",   "tokens", "key_tokens", "max_documents", "documents",
        "document_ends", "key_document_ends",         "prefixes", "parents"};
    int64_t count = mine == USP_OK ? config->documents : 0;
    const int64_t record[FIELDS] = {mesh->ranks,
                                    lists_of(config),
                                    config->layout,
                                    config->tokens,
                                    config->key_tokens,
                                    config->max_documents,
                                    config->documents,
                                    hash_array(config->document_ends, count),
                                    hash_array(config->key_document_ends, count),
                                    hash_array(config->prefixes, count),
                                    hash_array(config->parents, count)};
    usp_field fields[FIELDS];
    _Static_assert(sizeof record <= USP_AGREE_BYTES, "a ballot holds the record");
    for (int i = 0; i < FIELDS; i++) fields[i] = (usp_field){names[i], (size_t)i * WORD, WORD};
    return usp_world_agree(mesh->world, mine,
                           &(usp_agreement){"sequence", mesh->copy, record, sizeof record, fields, FIELDS, 2 * WORD});
}

static uint64_t hash_segments(uint64_t seed, const usp_sharding *sharding) {
    size_t ranks = (size_t)sharding->ranks, segments = (size_t)sharding->first[ranks];
    uint64_t hash = usp_hash(seed, sharding->first, (ranks + 1) * sizeof *sharding->first);
    return usp_hash(hash, sharding->segment, segments * sizeof *sharding->segment);
}

uint64_t usp_sequence_identity(const usp_sequence *sequence) {
    const int64_t extents[] = {sequence->layout, sequence->query.max_tokens, sequence->key.max_tokens,
                               sequence->documents.capacity, sequence->cross};
    uint64_t hash = usp_documents_hash(usp_hash(0, extents, sizeof extents), &sequence->documents);
    return hash_segments(hash_segments(hash, &sequence->query), &sequence->key);
}

/* ---- create ------------------------------------------------------------------------------------------------------ */

static void set_extents(usp_sequence *sequence, const usp_sequence_config *config) {
    int64_t most = config->max_documents > config->documents ? config->max_documents : config->documents;
    sequence->layout = config->layout;
    sequence->documents.capacity = most ? most : 1;
    sequence->cross = is_cross(config);
    sequence->replans = config->max_documents > 0;
    sequence->trees = config->parents != NULL;
    sequence->prefixes = config->prefixes != NULL;
    sequence->query = (usp_sharding){.tokens = config->tokens, .max_tokens = config->tokens, .ranks = sequence->ranks};
    sequence->key =
        (usp_sharding){.tokens = config->key_tokens, .max_tokens = config->key_tokens, .ranks = sequence->ranks};
}

static usp_status allocate_arrays(usp_sequence *sequence, int64_t most) {
    const usp_host *host = &sequence->world->host;
    int64_t segments = 0, zigzags = 0, capacity = sequence->documents.capacity;
    void *documents = NULL;
    if (sequence->layout == USP_LAYOUT_ZIGZAG_PER_DOCUMENT) zigzags = usp_sequence_zigzags(sequence);
    int64_t each = sequence->layout == USP_LAYOUT_CUSTOM ? most : 2 * usp_most(zigzags, 1);
    const usp_factor factors[] = {{"usp_sequence_config.segments", (uint64_t)each},
                                  {"ranks", (uint64_t)sequence->ranks}};
    USP_TRY(usp_size_add(&segments, factors, 2));
    USP_TRY(usp_host_alloc(host, (size_t)(capacity + 1) * sizeof(usp_document), "documents", &documents));
    sequence->documents.document = documents;
    USP_TRY(usp_sharding_alloc(host, &sequence->query, segments, zigzags));
    if (sequence->cross) USP_TRY(usp_sharding_alloc(host, &sequence->key, segments, zigzags));
    usp_device *device = sequence->world->device;
    for (int i = 0; i < 2 && sequence->replans; i++) USP_TRY(device->ops->stream_create(device, &sequence->uploads[i]));
    return USP_OK;
}

static void set_documents(usp_sequence *sequence, const usp_documents *given) {
    usp_sharding *query = &sequence->query, *key = &sequence->key;
    if (sequence->layout == USP_LAYOUT_ZIGZAG_PER_DOCUMENT) {
        query->tokens = given->ends ? given->ends[given->count - 1] : query->max_tokens;
        key->tokens = given->key_ends ? given->key_ends[given->count - 1] : key->max_tokens;
    }
    usp_documents_set(&sequence->documents, given, query->tokens, sequence->cross ? key->tokens : query->tokens);
}

/* Who owns what, by a formula. */
static void fill(const usp_sequence *sequence, usp_sharding *sharding, int keys) {
    if (sequence->layout == USP_LAYOUT_ZIGZAG_PER_DOCUMENT)
        usp_sharding_fill_zigzags(sharding, &sequence->documents, keys);
    else
        usp_sharding_fill(sharding, sequence->layout);
}

/* Where owners follow documents each is at most a unit ahead of its share. */
int64_t usp_sequence_limit(const usp_sequence *sequence, const usp_sharding *sharding, int parts) {
    int64_t limit = 0, each = sharding->ranks / parts, most = sharding->max_tokens;
    if (usp_sequence_moves(sequence)) return usp_least(most / parts + each * usp_sharding_unit(sharding, most), most);
    for (int64_t part = 0, rank = 0; part < parts; part++) {
        int64_t tokens = 0;
        for (; rank < (part + 1) * each; rank++) tokens += sharding->local[rank];
        limit = usp_most(limit, tokens);
    }
    return limit;
}

static usp_status share_out(usp_sequence *sequence, const usp_sequence_config *config, int keys, int64_t most) {
    usp_sharding *sharding = keys ? &sequence->key : &sequence->query;
    const usp_segment_list mine = segments_of(config, keys);
    if (config->layout == USP_LAYOUT_CUSTOM)
        USP_TRY(usp_sharding_gather(sequence->world, sharding, sequence->copy, &mine, most));
    else
        fill(sequence, sharding, keys);
    sharding->limit = usp_sequence_limit(sequence, sharding, sharding->ranks);
    return USP_OK;
}

static usp_status build(usp_sequence *sequence, const usp_sequence_config *config) {
    const usp_documents given = documents_of(config);
    int64_t most = usp_most(config->segments, config->key_segments);
    set_extents(sequence, config);
    if (config->layout == USP_LAYOUT_CUSTOM) USP_TRY(usp_world_largest(sequence->world, "sequence", most, &most));
    usp_status status = allocate_arrays(sequence, most);
    USP_TRY(usp_world_agree(sequence->world, status, &(usp_agreement){.what = "sequence"}));
    set_documents(sequence, &given);
    USP_TRY(share_out(sequence, config, 0, most));
    if (sequence->cross) return share_out(sequence, config, 1, most);
    sequence->key = sequence->query;
    return USP_OK;
}

void usp_sequence_set_documents(usp_sequence *sequence, const usp_documents *documents) {
    set_documents(sequence, documents);
    if (!usp_sequence_moves(sequence)) return;
    fill(sequence, &sequence->query, 0);
    if (sequence->cross)
        fill(sequence, &sequence->key, 1);
    else
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
