/* run_options.c - argp's table for usp_run.
 * Shapes and files are checked later, when they have been read. */
#include "run_options.h"
#include "output.h"
#include <argp.h>
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum {
    KEY_FILE = 256, /* + index of the file */
    KEY_LAYOUT = KEY_FILE + USP_RUN_FILES,
    KEY_DOCUMENTS,
    KEY_SEGMENTS,
    KEY_KIND,
    KEY_MASK,
    KEY_SCALE,
    KEY_DECAY,
    KEY_DEVICE,
    KEY_DTYPE,
    KEY_ORDER,
    KEY_STATE,
    KEY_RECOMPUTE,
    KEY_DETERMINISTIC,
    MOST_RANKS = 4096
};

static const struct argp_option option_table[] = {
    {NULL, 0, NULL, 0, "Read (--q, --k and --v are required):", 1},
    {"q", KEY_FILE + USP_RUN_Q, "FILE", 0, "Queries [B, S, heads, D]", 0},
    {"k", KEY_FILE + USP_RUN_K, "FILE", 0, "Keys [B, S or another length, kv heads, D]", 0},
    {"v", KEY_FILE + USP_RUN_V, "FILE", 0, "Values [B, as keys, kv heads, E]", 0},
    {"dout", KEY_FILE + USP_RUN_DOUT, "FILE", 0, "Gradient of the output [B, S, out heads, E]; runs backward", 0},
    {"initial-state", KEY_FILE + USP_RUN_INITIAL_STATE, "FILE", 0, "Linear: state before the first token [B, H, D, E]",
     0},
    {"dfinal-state", KEY_FILE + USP_RUN_DFINAL_STATE, "FILE", 0, "Linear: gradient of the final state [B, H, D, E]", 0},

    {NULL, 0, NULL, 0, "Write (at least one):", 2},
    {"out", KEY_FILE + USP_RUN_OUT, "FILE", 0, "Output [B, S, out heads, E]", 0},
    {"lse", KEY_FILE + USP_RUN_LSE, "FILE", 0, "Softmax: log-sum-exp [B, heads, S]", 0},
    {"dq", KEY_FILE + USP_RUN_DQ, "FILE", 0, "Gradient of the queries", 0},
    {"dk", KEY_FILE + USP_RUN_DK, "FILE", 0, "Gradient of the keys", 0},
    {"dv", KEY_FILE + USP_RUN_DV, "FILE", 0, "Gradient of the values", 0},
    {"final-state", KEY_FILE + USP_RUN_FINAL_STATE, "FILE", 0, "Linear: state after the last token", 0},
    {"dinitial-state", KEY_FILE + USP_RUN_DINITIAL_STATE, "FILE", 0, "Linear: gradient of the initial state", 0},

    {NULL, 0, NULL, 0,
     "Ranks (none of -n, -g: the job of torchrun, usp_launch, mpirun or srun; else as many thread-ranks as --ulysses "
     "and "
     "--ring make):",
     3},
    {"ranks", 'n', "N", 0, "N thread-ranks, in practice some hundreds at most, on the CPU or all on one GPU", 0},
    {"gpus", 'g', "N", 0, "N GPUs, one thread-rank each, over NCCL", 0},
    {"ulysses", 'u', "N", 0, "Ulysses degree (what --ring leaves of the ranks; 1 if that is missing too)", 0},
    {"ring", 'r', "N", 0, "Ring degree (what --ulysses leaves of the ranks)", 0},
    {"device", KEY_DEVICE, "auto|cpu|cuda", 0, "Where to run (auto: a GPU if one is usable)", 0},
    {"timeout", 'T', "SECONDS", 0, "Longest wait for another rank (600)", 0},

    {NULL, 0, NULL, 0, "Layer:", 4},
    {"kind", KEY_KIND, "softmax|linear", 0, "Kind of attention (softmax)", 0},
    {"mask", KEY_MASK, "causal|full", 0, "Mask (causal)", 0},
    {"layout", KEY_LAYOUT, "zigzag|contiguous|stripe|documents|custom", 0,
     "Which rank owns which token (zigzag); the result is the same", 0},
    {"documents", KEY_DOCUMENTS, "END,END,...", 0,
     "Zigzag inside each document: where the documents end, ascending, the last one at the number of tokens; implies "
     "--layout documents",
     0},
    {"segments", KEY_SEGMENTS, "START:LENGTH[:STRIDE],...;...", 0,
     "Each rank's own tokens START, START + STRIDE, ..., LENGTH of them, in its order: a list a rank, ';' between "
     "ranks, an empty list for a rank without tokens; every token once; implies --layout custom",
     0},
    {"dtype", KEY_DTYPE, "f32|f16|bf16", 0, "Type of the elements (as the files; uint16 files need bf16)", 0},
    {"order", KEY_ORDER, "bshd|bhsd|sbhd", 0, "Order of the axes of all files but states and lse (bshd)", 0},
    {"scale", KEY_SCALE, "X", 0, "Factor of q.k, > 0 (1 / sqrt(D) for softmax, 1 for linear)", 0},
    {"decay", KEY_DECAY, "LIST|alibi", 0,
     "Linear, causal: lambda in (0, 1] for all heads or one each, or by ALiBi slopes", 0},
    {"state-exchange", KEY_STATE, "auto|chain|gather", 0, "Linear: how states travel the ring (auto)", 0},
    {"recompute-state", KEY_RECOMPUTE, NULL, 0, "Linear: backward exchanges the states again instead of keeping them",
     0},
    {"deterministic", KEY_DETERMINISTIC, NULL, 0, "No kernel whose results depend on timing", 0},

    {"verbose", 'v', NULL, 0, "Describe the layer on standard error", 5},
    {NULL, 'h', NULL, 0, "The same as --help", -1},
    {0}};

static const char description[] =
    "Runs one attention layer on tensors from .npy files, over any number of ranks."
    "\vTensors are float32, float16, bf16 (as JAX and ml_dtypes save it, or as uint16 with --dtype bf16) or float64, "
    "which is computed in float32. States and lse are float32, or float64. Results have the type of the queries' file "
    "and the axes of --order, little-endian and in C order; inputs may be big-endian or in Fortran order. What is "
    "converted is said on standard error. There may be no tokens: the results are empty then. "
    "Documents say where tokens live: attention is over the whole sequence, across their ends. H, the "
    "heads of the output, is the number of query heads; for linear attention the largest of "
    "the three tensors' head counts. Results appear whole or not at all; devices and pipes are written as they are. "
    "Exit status: 0 all right, 1 an error, of "
    "which one sentence is on standard error, 64 a wrong command line.";

const char *usp_run_file_name(int file) {
    static const char *const names[] = {"q",   "k",  "v",  "dout", "initial-state", "dfinal-state",  "out",
                                        "lse", "dq", "dk", "dv",   "final-state",   "dinitial-state"};
    return names[file];
}

static int parse_name(struct argp_state *state, const char *option, const char *text, const usp_name *names) {
    int value = 0;
    char known[USP_NAMES_BYTES];
    if (!usp_name_find(names, text, &value))
        argp_error(state, "--%s: '%s' is none of %s", option, text, usp_name_join(names, known));
    return value;
}

static int parse_count(struct argp_state *state, const char *option, const char *text, int high) {
    int64_t value = 0;
    if (!usp_parse_size(text, &value) || value < 1 || value > high)
        argp_error(state, "--%s: '%s' is not a whole number from 1 to %d", option, text, high);
    return (int)value;
}

static double parse_scale(struct argp_state *state, const char *text) {
    double value = 0;
    if (!usp_parse_real(text, &value) || !((float)value > 0) || !isfinite((float)value))
        argp_error(state, "--scale: '%s' is not a float32 greater than 0", text);
    return value;
}

static void *parse_alloc(struct argp_state *state, const char *option, size_t count, size_t size) {
    void *memory = calloc(count, size);
    if (!memory) argp_failure(state, 1, 0, "no memory for --%s", option);
    return memory;
}

static int parse_lambda(char *text, float *lambda) {
    double value;
    if (!usp_parse_real(text, &value) || !((float)value > 0) || value > 1) return 0;
    *lambda = (float)value;
    return 1;
}

static void parse_decay(struct argp_state *state, char *text, usp_run_options *options) {
    options->alibi = strcmp(text, "alibi") == 0;
    if (options->alibi) return;
    free(options->decay);
    options->decays = 0;
    options->decay = parse_alloc(state, "decay", strlen(text) + 1, sizeof *options->decay);
    for (char *item; (item = strsep(&text, ","));)
        if (!parse_lambda(item, &options->decay[options->decays++]))
            argp_error(state, "--decay: '%s' is not a number in (0, 1]", item);
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

static void parse_documents(struct argp_state *state, char *text, usp_run_options *options) {
    free(options->document_end);
    options->document_end = parse_alloc(state, "documents", strlen(text) + 1, sizeof *options->document_end);
    options->documents = 0;
    for (char *item; (item = strsep(&text, ","));) {
        int64_t *end = &options->document_end[options->documents++], last = options->documents > 1 ? end[-1] : 0;
        const char *rest = item;
        if (!read_whole(&rest, end) || *rest) argp_error(state, "--documents: '%s' is not a whole number", item);
        if (*end <= last) argp_error(state, "--documents: '%s' does not come after %lld", item, (long long)last);
    }
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

static void parse_segment_list(struct argp_state *state, char *list, usp_run_options *options) {
    int64_t *end = &options->first[++options->lists];
    *end = end[-1];
    if (!*list) return;
    for (char *item; (item = strsep(&list, ","));)
        if (!parse_segment(item, &options->segment[(*end)++]))
            argp_error(state, "--segments: '%s' is not START:LENGTH or START:LENGTH:STRIDE, the last two from 1", item);
}

static void parse_segments(struct argp_state *state, char *text, usp_run_options *options) {
    size_t room = strlen(text) + 2;
    free(options->first);
    free(options->segment);
    options->first = parse_alloc(state, "segments", room, sizeof *options->first);
    options->segment = parse_alloc(state, "segments", room, sizeof *options->segment);
    options->lists = 0;
    for (char *list; (list = strsep(&text, ";"));) parse_segment_list(state, list, options);
}

static int parse_layout(struct argp_state *state, const char *text) {
    int value = USP_LAYOUT_CUSTOM;
    char known[USP_NAMES_BYTES];
    if (strcmp(text, "custom") && !usp_name_find(usp_names_layout(), text, &value))
        argp_error(state, "--layout: '%s' is none of %s, custom", text, usp_name_join(usp_names_layout(), known));
    return value;
}

/* A list implies its layout; the layout without its list, or another beside it, is a mistake. */
static void choose_layout(struct argp_state *state, usp_run_options *o) {
    int implied = o->documents ? USP_LAYOUT_ZIGZAG_PER_DOCUMENT : o->lists ? USP_LAYOUT_CUSTOM : -1;
    if (o->documents && o->lists) argp_error(state, "--documents and --segments exclude each other");
    if (o->layout == USP_LAYOUT_ZIGZAG_PER_DOCUMENT && !o->documents)
        argp_error(state, "--layout documents needs --documents");
    if (o->layout == USP_LAYOUT_CUSTOM && !o->lists) argp_error(state, "--layout custom needs --segments");
    if (implied >= 0 && o->layout >= 0 && o->layout != implied)
        argp_error(state, "--%s excludes another --layout", o->documents ? "documents" : "segments");
    if (o->layout < 0) o->layout = implied < 0 ? USP_LAYOUT_ZIGZAG : implied;
}

/* No output may be another file of the same call. */
static void check_files(struct argp_state *state, const usp_run_options *o) {
    for (int file = USP_RUN_INPUTS; file < USP_RUN_FILES; file++)
        for (int other = 0; other < file; other++)
            if (o->path[file] && o->path[other] && usp_output_same(o->path[file], o->path[other]))
                argp_error(state, "--%s and --%s are the same file", usp_run_file_name(other), usp_run_file_name(file));
}

static void check_ranks(struct argp_state *state, usp_run_options *o) {
    int64_t mesh = (int64_t)(o->ulysses ? o->ulysses : 1) * (o->ring ? o->ring : 1);
    if (o->ranks.threads && o->ranks.gpus) argp_error(state, "-n and -g exclude each other");
    if (o->ranks.gpus && o->ranks.device == USP_DEVICE_CPU) argp_error(state, "-g excludes --device cpu");
    if (mesh > MOST_RANKS) argp_error(state, "--ulysses and --ring make more than %d ranks", MOST_RANKS);
    o->ranks.otherwise = (int)mesh;
}

static void check_options(struct argp_state *state, usp_run_options *o) {
    check_files(state, o);
    for (int file = USP_RUN_Q; file <= USP_RUN_V; file++)
        if (!o->path[file]) argp_error(state, "--%s is missing", usp_run_file_name(file));
    int results = 0;
    for (int file = USP_RUN_INPUTS; file < USP_RUN_FILES; file++) results += o->path[file] != NULL;
    if (!results) argp_error(state, "no result is asked for: --out is missing, or another file to write");
    check_ranks(state, o);
    const int backward[] = {USP_RUN_DQ, USP_RUN_DK, USP_RUN_DV, USP_RUN_DINITIAL_STATE, USP_RUN_DFINAL_STATE};
    for (int i = 0; i < 5 && !o->path[USP_RUN_DOUT]; i++)
        if (o->path[backward[i]]) argp_error(state, "--%s needs --dout", usp_run_file_name(backward[i]));
    const int linear[] = {USP_RUN_INITIAL_STATE, USP_RUN_DFINAL_STATE, USP_RUN_FINAL_STATE, USP_RUN_DINITIAL_STATE};
    for (int i = 0; i < 4 && o->kind == USP_SOFTMAX; i++)
        if (o->path[linear[i]]) argp_error(state, "--%s needs --kind linear", usp_run_file_name(linear[i]));
    if (o->kind == USP_LINEAR && o->path[USP_RUN_LSE]) argp_error(state, "--lse needs --kind softmax");
    if (o->kind == USP_SOFTMAX && (o->alibi || o->decays)) argp_error(state, "--decay needs --kind linear");
}

static error_t parse_ranks(int key, char *text, struct argp_state *state, usp_run_options *o) {
    switch (key) {
    case 'n':
        o->ranks.threads = parse_count(state, "ranks", text, MOST_RANKS);
        break;
    case 'g':
        o->ranks.gpus = parse_count(state, "gpus", text, MOST_RANKS);
        break;
    case 'u':
        o->ulysses = parse_count(state, "ulysses", text, MOST_RANKS);
        break;
    case 'r':
        o->ring = parse_count(state, "ring", text, MOST_RANKS);
        break;
    case 'T':
        o->ranks.timeout_ms = 1000 * parse_count(state, "timeout", text, 1000000);
        break;
    case KEY_DEVICE:
        o->ranks.device = (usp_device_kind)parse_name(state, "device", text, usp_names_device());
        break;
    default:
        return ARGP_ERR_UNKNOWN;
    }
    return 0;
}

static error_t parse_owners(int key, char *text, struct argp_state *state, usp_run_options *o) {
    switch (key) {
    case KEY_LAYOUT:
        o->layout = parse_layout(state, text);
        break;
    case KEY_DOCUMENTS:
        parse_documents(state, text, o);
        break;
    case KEY_SEGMENTS:
        parse_segments(state, text, o);
        break;
    default:
        return ARGP_ERR_UNKNOWN;
    }
    return 0;
}

static error_t parse_layer(int key, char *text, struct argp_state *state, usp_run_options *o) {
    const usp_name *exchanges = usp_names_state_exchange();
    switch (key) {
    case KEY_KIND:
        o->kind = (usp_attention)parse_name(state, "kind", text, usp_names_attention());
        break;
    case KEY_MASK:
        o->mask = (usp_mask)parse_name(state, "mask", text, usp_names_mask());
        break;
    case KEY_DTYPE:
        o->dtype = parse_name(state, "dtype", text, usp_names_dtype());
        break;
    case KEY_ORDER:
        o->order = (usp_order)parse_name(state, "order", text, usp_names_order());
        break;
    case KEY_STATE:
        o->state_exchange = (usp_state_exchange)parse_name(state, "state-exchange", text, exchanges);
        break;
    case KEY_SCALE:
        o->scale = parse_scale(state, text);
        break;
    case KEY_DECAY:
        parse_decay(state, text, o);
        break;
    case KEY_RECOMPUTE:
        o->recompute_state = 1;
        break;
    case KEY_DETERMINISTIC:
        o->deterministic = 1;
        break;
    default:
        return ARGP_ERR_UNKNOWN;
    }
    return 0;
}

static error_t parse_option(int key, char *text, struct argp_state *state) {
    usp_run_options *o = state->input;
    if (key >= KEY_FILE && key < KEY_FILE + USP_RUN_FILES) {
        o->path[key - KEY_FILE] = text;
        return 0;
    }
    error_t error = parse_ranks(key, text, state, o);
    if (error == ARGP_ERR_UNKNOWN) error = parse_owners(key, text, state, o);
    if (error == ARGP_ERR_UNKNOWN) error = parse_layer(key, text, state, o);
    if (error != ARGP_ERR_UNKNOWN) return error;
    switch (key) {
    case 'v':
        o->verbose = 1;
        break;
    case 'h':
        argp_state_help(state, stdout, ARGP_HELP_STD_HELP);
        break;
    case ARGP_KEY_ARG:
        argp_error(state, "'%s' is not an option", text);
        break;
    case ARGP_KEY_END:
        check_options(state, o);
        choose_layout(state, o);
        break;
    default:
        return ARGP_ERR_UNKNOWN;
    }
    return 0;
}

void usp_run_options_parse(usp_run_options *options, int argc, char **argv) {
    const struct argp argp = {option_table, parse_option, NULL, description, NULL, NULL, NULL};
    *options = (usp_run_options){.kind = USP_SOFTMAX, .mask = USP_MASK_CAUSAL, .layout = -1, .dtype = -1};
    argp_program_version_hook = usp_tool_print_version;
    argp_parse(&argp, argc, argv, 0, NULL, options);
}

void usp_run_options_free(usp_run_options *options) {
    free(options->decay);
    free(options->document_end);
    free(options->first);
    free(options->segment);
}
