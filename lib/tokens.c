/* tokens.c - what users do with a sequence's tokens: counts, global and local indices, positions, labels, scatter and
 * gather. */
#include "error.h"
#include "sequence.h"
#include "size.h"
#include <string.h>

usp_status usp_sequence_segments(const usp_sequence *sequence, int rank, int64_t capacity, usp_segment *segments,
                                 int64_t *count) {
    USP_REQUIRE(sequence, "sequence is NULL");
    USP_TRY(usp_guard_process(sequence->world));
    USP_REQUIRE(rank >= 0 && rank < sequence->ranks, "rank is %d: must be in 0 .. %d", rank, sequence->ranks - 1);
    USP_REQUIRE(count, "count is NULL");
    USP_REQUIRE(capacity >= 0 && (capacity == 0 || segments), "segments is NULL or capacity is negative");
    const usp_sharding *sharding = &sequence->query;
    *count = sharding->first[rank + 1] - sharding->first[rank];
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

static const usp_document *document_of(const usp_sequence *sequence, int64_t token) {
    return &sequence->documents.document[usp_documents_find(&sequence->documents, token, 0)];
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
        int64_t token = next_token(&at);
        const usp_document *document = document_of(sequence, token);
        positions[i] = (int32_t)(document->depth + token - document->begin);
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
        int64_t token = next_token(&at);
        const usp_document *document = document_of(sequence, token);
        int inside = document < sequence->documents.document + sequence->documents.count && token + 1 < document->end;
        labels[i] = inside ? tokens[token + 1] : ignore;
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
                                  {"ranks", (uint64_t)sequence->world->transport->size}};
    USP_TRY(usp_size_add(&all, factors, 4));
    *bytes = all / sequence->world->transport->size;
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
    USP_TRY(usp_world_largest(sequence->world, "gather", bytes, &piece)); /* data copies may hold different sequences */
    status = usp_world_gather(sequence->world, "gather", local, own, (size_t)piece, &all);
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
