/* tool.h - what every tool shares: error sentences, names of the library's kinds, and lists of sizes.
 * It knows nothing of ranks, tensors or what is in files. */
#ifndef USP_TOOL_H
#define USP_TOOL_H
#include <stdio.h>
#include <usp.h>

struct argp_state;

/* Leaves the function with the status of a call that failed. */
#define USP_TRY(call)                                                                                                  \
    do {                                                                                                               \
        usp_status usp_try_status = (call);                                                                            \
        if (usp_try_status != USP_OK) return usp_try_status;                                                           \
    } while (0)

/* The sentence of a tool's own failure; empty when the library's usp_last_error() has it. */
typedef struct usp_tool_error {
    char text[1024];
} usp_tool_error;

/* Records the sentence and returns `status`. */
usp_status usp_tool_fail(usp_tool_error *error, usp_status status, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
/* Zeroed memory of count * size bytes (never NULL for zero), or NULL with a sentence. */
void *usp_tool_alloc(usp_tool_error *error, size_t count, size_t size);

/* One row of a table of names; a table ends with a NULL name. The first row of a value is its own name, more are
 * aliases. */
typedef struct usp_name {
    const char *name;
    int value;
} usp_name;

const usp_name *usp_names_dtype(void);
const usp_name *usp_names_attention(void);
const usp_name *usp_names_layout(void); /* all but custom, which no name can describe */
const usp_name *usp_names_device(void);
const usp_name *usp_names_transport(void);
const usp_name *usp_names_mask(void);
const char *usp_name_of(const usp_name *names, int value);
/* 1 and *value if `text` is a name of the table, else 0. */
int usp_name_find(const usp_name *names, const char *text, int *value);
/* "softmax, linear": every value's own name, for messages. */
enum { USP_NAMES_BYTES = 128 };
const char *usp_name_join(const usp_name *names, char text[USP_NAMES_BYTES]);

/* A short list of numbers, as `1,2,4` gives it. */
enum { USP_LIST_ITEMS = 32 };
typedef struct usp_list {
    int count;
    int64_t item[USP_LIST_ITEMS];
} usp_list;

/* A whole number >= 0 with an optional suffix K (1024), M or G; 1 on success. */
int usp_parse_size(const char *text, int64_t *value);
/* A comma list of sizes, or of names where `names` is not NULL; 1 on success. */
int usp_parse_list(const char *text, const usp_name *names, usp_list *list);
/* A number; 1 if all of `text` is one and it is finite. */
int usp_parse_real(const char *text, double *value);

/* lambda_h = e^(-s_h): fills the logarithms -s_h with the ALiBi slopes: powers of 2^(-8 / heads), and where heads is no
 * power of two the slopes of the next lower one followed by every other slope of the next higher one. */
void usp_decay_slopes(int heads, float *log_decay);

/* To be called first of all: a program that would end well, --help and --version too, ends with `failed` and a sentence
 * if not all of its standard output could be written. */
void usp_tool_guard_output(int failed);

/* argp's hook for --version. */
void usp_tool_print_version(FILE *stream, struct argp_state *state);

#endif
