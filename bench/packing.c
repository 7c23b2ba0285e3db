/* packing.c - lengths of documents from a rule. */
#include "packing.h"
#include "number.h"
#include <string.h>

enum { SEED = 7 };

static int parse_range(const char *text, const char *colon, usp_document_rule *rule) {
    char least[32];
    size_t length = (size_t)(colon - text);
    if (length >= sizeof least) return 0;
    memcpy(least, text, length);
    least[length] = 0;
    return usp_parse_size(least, &rule->least) && usp_parse_size(colon + 1, &rule->most) && rule->least >= 1 &&
           rule->most >= rule->least;
}

int usp_document_rule_parse(const char *text, usp_document_rule *rule) {
    const char *colon = strchr(text, ':');
    *rule = (usp_document_rule){.least = 0};
    if (colon) return parse_range(text, colon, rule);
    int good = usp_parse_list(text, NULL, &rule->lengths);
    for (int i = 0; i < rule->lengths.count; i++) good = good && rule->lengths.item[i] >= 1;
    return good;
}

static int64_t length_of(const usp_document_rule *rule, int64_t document) {
    if (rule->lengths.count) return rule->lengths.item[document % rule->lengths.count];
    uint64_t random = usp_number_hash(SEED, (uint64_t)document);
    return rule->least + (int64_t)(random % (uint64_t)(rule->most - rule->least + 1));
}

/* Writes them too, if `ends` is not NULL. */
static int64_t count_documents(const usp_document_rule *rule, int64_t tokens, int64_t *ends) {
    int64_t count = 0;
    for (int64_t end = 0; end < tokens; count++) {
        int64_t length = length_of(rule, count);
        end = length < tokens - end ? end + length : tokens;
        if (ends) ends[count] = end;
    }
    return count;
}

usp_status usp_documents_make(const usp_document_rule *rule, int64_t tokens, usp_tool_error *error, int64_t **ends,
                              int64_t *count) {
    *ends = NULL;
    *count = 0;
    if (!rule->least && !rule->lengths.count) return USP_OK;
    *count = count_documents(rule, tokens, NULL);
    *ends = usp_tool_alloc(error, (size_t)*count, sizeof **ends);
    if (!*ends) return USP_NO_MEMORY;
    count_documents(rule, tokens, *ends);
    return USP_OK;
}

usp_status usp_documents_number(const int64_t *ends, int64_t count, int64_t tokens, usp_tool_error *error,
                                int32_t **document) {
    int64_t at = 0;
    *document = NULL;
    if (!count) return USP_OK;
    *document = usp_tool_alloc(error, (size_t)tokens, sizeof **document);
    if (!*document) return USP_NO_MEMORY;
    for (int64_t i = 0; i < count; i++)
        while (at < ends[i]) (*document)[at++] = (int32_t)i;
    while (at < tokens) (*document)[at++] = -1;
    return USP_OK;
}
