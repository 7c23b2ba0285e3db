/* tool.c - error sentences, names, size lists, decay slopes, and a guard of standard output.
 * Parsing only: meaning is checked by the library. */
#include "tool.h"
#include <argp.h>
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

usp_status usp_tool_fail(usp_tool_error *error, usp_status status, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(error->text, sizeof error->text, format, arguments);
    va_end(arguments);
    return status;
}

void *usp_tool_alloc(usp_tool_error *error, size_t count, size_t size) {
    void *memory = calloc(count ? count : 1, size ? size : 1);
    if (!memory) usp_tool_fail(error, USP_NO_MEMORY, "cannot allocate %zu x %zu bytes of host memory", count, size);
    return memory;
}

const usp_name *usp_names_dtype(void) {
    static const usp_name names[] = {{"f32", USP_F32},     {"f16", USP_F16},       {"bf16", USP_BF16},
                                     {"float", USP_F32},   {"float32", USP_F32},   {"half", USP_F16},
                                     {"float16", USP_F16}, {"bfloat16", USP_BF16}, {NULL, 0}};
    return names;
}

const usp_name *usp_names_attention(void) {
    static const usp_name names[] = {{"softmax", USP_SOFTMAX}, {"linear", USP_LINEAR}, {NULL, 0}};
    return names;
}

const usp_name *usp_names_layout(void) {
    static const usp_name names[] = {{"zigzag", USP_LAYOUT_ZIGZAG},
                                     {"contiguous", USP_LAYOUT_CONTIGUOUS},
                                     {"stripe", USP_LAYOUT_STRIPE},
                                     {"documents", USP_LAYOUT_ZIGZAG_PER_DOCUMENT},
                                     {NULL, 0}};
    return names;
}

const usp_name *usp_names_transport(void) {
    static const usp_name names[] = {
        {"auto", USP_TRANSPORT_AUTO}, {"nccl", USP_TRANSPORT_NCCL}, {"peer", USP_TRANSPORT_PEER}, {NULL, 0}};
    return names;
}

const usp_name *usp_names_device(void) {
    static const usp_name names[] = {
        {"auto", USP_DEVICE_AUTO}, {"cpu", USP_DEVICE_CPU}, {"cuda", USP_DEVICE_CUDA}, {NULL, 0}};
    return names;
}

const usp_name *usp_names_mask(void) {
    static const usp_name names[] = {{"full", USP_MASK_FULL}, {"causal", USP_MASK_CAUSAL}, {NULL, 0}};
    return names;
}

const char *usp_name_of(const usp_name *names, int value) {
    for (; names->name; names++)
        if (names->value == value) return names->name;
    return "?";
}

int usp_name_find(const usp_name *names, const char *text, int *value) {
    for (; names->name; names++)
        if (strcmp(names->name, text) == 0) return *value = names->value, 1;
    return 0;
}

const char *usp_name_join(const usp_name *names, char text[USP_NAMES_BYTES]) {
    int at = 0;
    text[0] = 0;
    for (int i = 0; names[i].name && at < USP_NAMES_BYTES; i++)
        if (usp_name_of(names, names[i].value) == names[i].name) /* no alias */
            at += snprintf(text + at, (size_t)(USP_NAMES_BYTES - at), "%s%s", at ? ", " : "", names[i].name);
    return text;
}

static int suffix_shift(const char *suffix) {
    if (!*suffix) return 0;
    if (suffix[1]) return -1;
    switch (*suffix) {
    case 'k':
    case 'K':
        return 10;
    case 'm':
    case 'M':
        return 20;
    case 'g':
    case 'G':
        return 30;
    default:
        return -1;
    }
}

int usp_parse_size(const char *text, int64_t *value) {
    if (*text < '0' || *text > '9') return 0;
    errno = 0;
    char *end;
    long long number = strtoll(text, &end, 10);
    int shift = suffix_shift(end);
    if (errno || shift < 0 || number > INT64_MAX >> shift) return 0;
    *value = (int64_t)number << shift;
    return 1;
}

static int parse_item(const char *text, const usp_name *names, int64_t *value) {
    if (!names) return usp_parse_size(text, value);
    int number;
    if (!usp_name_find(names, text, &number)) return 0;
    *value = number;
    return 1;
}

int usp_parse_list(const char *text, const usp_name *names, usp_list *list) {
    list->count = 0;
    for (;;) {
        char item[32];
        size_t length = strcspn(text, ",");
        if (length >= sizeof item || list->count == USP_LIST_ITEMS) return 0;
        memcpy(item, text, length);
        item[length] = 0;
        if (!parse_item(item, names, &list->item[list->count++])) return 0;
        if (!text[length]) return 1;
        text += length + 1;
    }
}

int usp_parse_real(const char *text, double *value) {
    char *end;
    *value = strtod(text, &end);
    return end != text && !*end && isfinite(*value);
}

void usp_decay_slopes(int heads, float *log_decay) {
    int power = 1;
    while (power * 2 <= heads) power *= 2;
    for (int h = 0; h < power; h++) log_decay[h] = -(float)exp2(-8.0 * (h + 1) / power);
    for (int h = power; h < heads; h++) log_decay[h] = -(float)exp2(-4.0 * (2 * (h - power) + 1) / power);
}

/* argp ends the process itself after --help and --version, so this is where every end comes by. */
static void check_output(int ended, void *failed) {
    const char *why = fflush(stdout) ? strerror(errno) : ferror(stdout) ? "some of it is lost" : NULL;
    if (!why || ended) return; /* it has ended badly with a sentence of its own */
    fprintf(stderr, "%s: cannot write to standard output: %s\n", program_invocation_short_name, why);
    _exit((int)(intptr_t)failed);
}

void usp_tool_guard_output(int failed) {
    if (fcntl(STDOUT_FILENO, F_GETFD) < 0) { /* it is closed: the next file to be opened must not get its number */
        int unwritable = open("/dev/null", O_RDONLY);
        if (unwritable >= 0 && unwritable != STDOUT_FILENO) dup2(unwritable, STDOUT_FILENO);
    }
    on_exit(check_output, (void *)(intptr_t)failed);
}

void usp_tool_print_version(FILE *stream, struct argp_state *state) {
    int version = usp_version();
    fprintf(stream, "%s (libusp) %d.%d.%d\n", state->name, version / 10000, version / 100 % 100, version % 100);
}
