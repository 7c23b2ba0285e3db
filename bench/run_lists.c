/* run_lists.c - options of usp_run that are lists, taken apart.
 * A wrong one ends the program. */
#include "run_lists.h"
#include <argp.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

static void *parse_alloc(struct argp_state *state, const char *option, size_t count, size_t size) {
    void *memory = calloc(count, size);
    if (!memory) argp_failure(state, 1, 0, "no memory for --%s", option);
    return memory;
}

void usp_run_parse_heads(struct argp_state *state, const char *option, char *text, double least, double most,
                         usp_head_numbers *numbers) {
    numbers->alibi = strcmp(text, "alibi") == 0;
    if (numbers->alibi) return;
    free(numbers->item);
    numbers->count = 0;
    numbers->item = parse_alloc(state, option, strlen(text) + 1, sizeof *numbers->item);
    for (char *item; (item = strsep(&text, ","));) {
        double value = 0;
        if (!usp_parse_real(item, &value) || !((float)value > least) || value > most)
            argp_error(state, "--%s: '%s' is not a number in (%g, %g]", option, item, least, most);
        numbers->item[numbers->count++] = (float)value;
    }
}

/* Digits, which *text then points behind; 1 on success. */
static int read_whole(const char **text, int64_t *value) {
    char *end;
    if (**text < '0' || **text > '9') return 0;
    errno = 0;
    *value = strtoll(*text, &end, 10);
    *text = end;
    return errno == 0;
}

void usp_run_parse_documents(struct argp_state *state, const char *option, char *text, usp_document_numbers *numbers) {
    free(numbers->item);
    numbers->item = parse_alloc(state, option, strlen(text) + 1, sizeof *numbers->item);
    numbers->count = 0;
    for (char *item; (item = strsep(&text, ","));) {
        int64_t *value = &numbers->item[numbers->count++];
        int negative = strcmp(item, "-1") == 0; /* no parent */
        const char *rest = item + negative;
        if (!read_whole(&rest, value) || *rest) argp_error(state, "--%s: '%s' is not a whole number", option, item);
        if (negative) *value = -*value;
    }
}

void usp_run_parse_dropout_state(struct argp_state *state, char *text, uint64_t pair[2]) {
    int64_t seed = 0, offset = 0;
    const char *rest = text;
    int good = read_whole(&rest, &seed) && (!*rest || (*rest++ == ',' && read_whole(&rest, &offset) && !*rest));
    if (!good) argp_error(state, "--dropout-state: '%s' is not SEED,OFFSET", text);
    pair[0] = (uint64_t)seed;
    pair[1] = (uint64_t)offset;
}

static int parse_segment(const char *text, usp_segment *segment) {
    segment->stride = 1;
    if (!read_whole(&text, &segment->start) || *text++ != ':' || !read_whole(&text, &segment->length)) return 0;
    if (*text == ':') {
        text++;
        if (!read_whole(&text, &segment->stride)) return 0;
    }
    return !*text && segment->length >= 1 && segment->stride >= 1;
}

static void parse_segment_list(struct argp_state *state, const char *option, char *list, usp_rank_segments *segments) {
    int64_t *end = &segments->first[++segments->lists];
    *end = end[-1];
    if (!*list) return;
    for (char *item; (item = strsep(&list, ","));)
        if (!parse_segment(item, &segments->segment[(*end)++]))
            argp_error(state, "--%s: '%s' is not START:LENGTH or START:LENGTH:STRIDE, the last two from 1", option,
                       item);
}

void usp_run_parse_segments(struct argp_state *state, const char *option, char *text, usp_rank_segments *segments) {
    size_t room = strlen(text) + 2;
    free(segments->first);
    free(segments->segment);
    segments->first = parse_alloc(state, option, room, sizeof *segments->first);
    segments->segment = parse_alloc(state, option, room, sizeof *segments->segment);
    segments->lists = 0;
    for (char *list; (list = strsep(&text, ";"));) parse_segment_list(state, option, list, segments);
}
