/* run_options.c - argp's table for usp_run.
 * Shapes and files are checked later, when they have been read. */
#include "run_options.h"
#include "layer_options.h"
#include "output.h"
#include "run_lists.h"
#include <float.h>
#include <stdlib.h>
#include <string.h>

enum {
    KEY_FILE = 256, /* + index of the file */
    KEY_LAYOUT = KEY_FILE + USP_RUN_FILES,
    KEY_DOCUMENTS,
    KEY_KEY_DOCUMENTS,
    KEY_PREFIXES,
    KEY_PARENTS,
    KEY_SEGMENTS,
    KEY_KEY_SEGMENTS,
    KEY_KIND,
    KEY_MASK,
    KEY_DECAY,
    KEY_SLOPES,
    KEY_DROPOUT_STATE,
    KEY_DEVICE,
    KEY_DTYPE,
    KEY_ORDER,
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
    {"sinks", KEY_FILE + USP_RUN_SINKS, "FILE", 0, "Softmax: attention sinks [heads]", 0},
    {"dlse", KEY_FILE + USP_RUN_DLSE, "FILE", 0, "Softmax: gradient of lse [B, heads, S]", 0},

    {NULL, 0, NULL, 0, "Write (at least one):", 2},
    {"out", KEY_FILE + USP_RUN_OUT, "FILE", 0, "Output [B, S, out heads, E]", 0},
    {"lse", KEY_FILE + USP_RUN_LSE, "FILE", 0, "Softmax: log-sum-exp [B, heads, S]", 0},
    {"dq", KEY_FILE + USP_RUN_DQ, "FILE", 0, "Gradient of the queries", 0},
    {"dk", KEY_FILE + USP_RUN_DK, "FILE", 0, "Gradient of the keys", 0},
    {"dv", KEY_FILE + USP_RUN_DV, "FILE", 0, "Gradient of the values", 0},
    {"final-state", KEY_FILE + USP_RUN_FINAL_STATE, "FILE", 0, "Linear: state after the last token", 0},
    {"dinitial-state", KEY_FILE + USP_RUN_DINITIAL_STATE, "FILE", 0, "Linear: gradient of the initial state", 0},
    {"dsinks", KEY_FILE + USP_RUN_DSINKS, "FILE", 0, "Softmax: gradient of the sinks", 0},
    {"max-logit", KEY_FILE + USP_RUN_MAX_LOGIT, "FILE", 0, "Softmax: largest score of each head", 0},

    {NULL, 0, NULL, 0,
     "Ranks (none of -n, -g: the job of torchrun, usp_launch, mpirun or srun; else as many thread-ranks as --ulysses "
     "and "
     "--ring make):",
     3},
    {"ranks", 'n', "N", 0, "N thread-ranks, in practice some hundreds at most, on the CPU or all on one GPU", 0},
    {"gpus", 'g', "N", 0, "N GPUs, a thread-rank each, joined by NCCL", 0},
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
     "Packed documents: where each ends, ascending; nothing sees across an end (one)", 0},
    {"key-documents", KEY_KEY_DOCUMENTS, "END,END,...", 0, "The same among keys of another length", 0},
    {"prefixes", KEY_PREFIXES, "N,N,...", 0, "How many first tokens of each document see each other both ways", 0},
    {"parents", KEY_PARENTS, "N,N,...", 0, "The document behind which each one continues, or -1, depth first", 0},
    {"segments", KEY_SEGMENTS, "START:LENGTH[:STRIDE],...;...", 0,
     "Each rank's own tokens START, START + STRIDE, ..., LENGTH of them, in its order: a list a rank, ';' between "
     "ranks, an empty list for a rank without tokens; every token once; implies --layout custom",
     0},
    {"key-segments", KEY_KEY_SEGMENTS, "START:LENGTH[:STRIDE],...;...", 0, "The same of keys of another length", 0},
    {"dtype", KEY_DTYPE, "f32|f16|bf16", 0, "Type of the elements (as the files; uint16 files need bf16)", 0},
    {"order", KEY_ORDER, "bshd|bhsd|sbhd", 0, "Order of the axes of all files but states and lse (bshd)", 0},
    {"decay", KEY_DECAY, "LIST|alibi", 0,
     "Linear, causal: lambda in (0, 1] for all heads or one each, or by ALiBi slopes", 0},
    {"slopes", KEY_SLOPES, "LIST|alibi", 0, "Softmax: by how much a score falls with each token of distance", 0},
    {"dropout-state", KEY_DROPOUT_STATE, "SEED,OFFSET", 0, "Which pairs are dropped (0,0)", 0},

    {"verbose", 'v', NULL, 0, "Describe the layer on standard error", 5},
    {NULL, 'h', NULL, 0, "The same as --help", -1},
    {0}};

static const char description[] =
    "Runs one attention layer on tensors from .npy files, over any number of ranks."
    "\vTensors are float32, float16, bf16 (as JAX and ml_dtypes save it, or as uint16 with --dtype bf16) or float64, "
    "which is computed in float32. States and lse are float32, or float64. Results have the type of the queries' file "
    "and the axes of --order, little-endian and in C order; inputs may be big-endian or in Fortran order. What is "
    "converted is said on standard error. There may be no tokens: the results are empty then. "
    "H, the "
    "heads of the output, is the number of query heads; for linear attention the largest of "
    "the three tensors' head counts. Results appear whole or not at all; devices and pipes are written as they are. "
    "Exit status: 0 all right, 1 an error, of "
    "which one sentence is on standard error, 64 a wrong command line.";

const char *usp_run_file_name(int file) {
    static const char *const names[] = {
        "q",   "k",  "v",  "dout", "initial-state", "dfinal-state",   "sinks",  "dlse",     "out",
        "lse", "dq", "dk", "dv",   "final-state",   "dinitial-state", "dsinks", "max-logit"};
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

static int parse_layout(struct argp_state *state, const char *text) {
    int value = USP_LAYOUT_CUSTOM;
    char known[USP_NAMES_BYTES];
    if (strcmp(text, "custom") && !usp_name_find(usp_names_layout(), text, &value))
        argp_error(state, "--layout: '%s' is none of %s, custom", text, usp_name_join(usp_names_layout(), known));
    return value;
}

/* Segments imply their layout; a layout without its list, or segments beside another, is a mistake. */
static void choose_layout(struct argp_state *state, usp_run_options *o) {
    if (o->layout == USP_LAYOUT_ZIGZAG_PER_DOCUMENT && !o->ends.count)
        argp_error(state, "--layout documents needs --documents");
    int64_t lists = o->segments.lists;
    if (o->layout == USP_LAYOUT_CUSTOM && !lists) argp_error(state, "--layout custom needs --segments");
    if (o->key_segments.lists && !lists) argp_error(state, "--key-segments needs --segments");
    if (lists && o->layout >= 0 && o->layout != USP_LAYOUT_CUSTOM)
        argp_error(state, "--segments excludes another --layout");
    if (o->layout < 0) o->layout = lists ? USP_LAYOUT_CUSTOM : USP_LAYOUT_ZIGZAG;
}

/* The other lists say something for each document. */
static void check_documents(struct argp_state *state, const usp_run_options *o) {
    const usp_document_numbers *lists[] = {&o->key_ends, &o->prefixes, &o->parents};
    static const char *const names[] = {"key-documents", "prefixes", "parents"};
    for (int i = 0; i < 3; i++)
        if (lists[i]->count && lists[i]->count != o->ends.count)
            argp_error(state, "--%s has %lld numbers for %lld --documents", names[i], (long long)lists[i]->count,
                       (long long)o->ends.count);
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

/* Files and numbers of the other kind. */
static void check_kind(struct argp_state *state, const usp_run_options *o) {
    const int linear[] = {USP_RUN_INITIAL_STATE, USP_RUN_DFINAL_STATE, USP_RUN_FINAL_STATE, USP_RUN_DINITIAL_STATE};
    const int softmax[] = {USP_RUN_LSE, USP_RUN_SINKS, USP_RUN_DLSE, USP_RUN_DSINKS, USP_RUN_MAX_LOGIT};
    for (int i = 0; i < 4 && o->kind == USP_SOFTMAX; i++)
        if (o->path[linear[i]]) argp_error(state, "--%s needs --kind linear", usp_run_file_name(linear[i]));
    for (int i = 0; i < 5 && o->kind == USP_LINEAR; i++)
        if (o->path[softmax[i]]) argp_error(state, "--%s needs --kind softmax", usp_run_file_name(softmax[i]));
    if (o->kind == USP_SOFTMAX && (o->decay.alibi || o->decay.count)) argp_error(state, "--decay needs --kind linear");
    if (o->kind == USP_LINEAR && (o->slopes.alibi || o->slopes.count))
        argp_error(state, "--slopes needs --kind softmax");
}

static void check_options(struct argp_state *state, usp_run_options *o) {
    check_files(state, o);
    for (int file = USP_RUN_Q; file <= USP_RUN_V; file++)
        if (!o->path[file]) argp_error(state, "--%s is missing", usp_run_file_name(file));
    int results = 0;
    for (int file = USP_RUN_INPUTS; file < USP_RUN_FILES; file++) results += o->path[file] != NULL;
    if (!results) argp_error(state, "no result is asked for: --out is missing, or another file to write");
    check_ranks(state, o);
    const int backward[] = {USP_RUN_DQ,           USP_RUN_DK,   USP_RUN_DV,    USP_RUN_DINITIAL_STATE,
                            USP_RUN_DFINAL_STATE, USP_RUN_DLSE, USP_RUN_DSINKS};
    for (int i = 0; i < 7 && !o->path[USP_RUN_DOUT]; i++)
        if (o->path[backward[i]]) argp_error(state, "--%s needs --dout", usp_run_file_name(backward[i]));
    if (o->path[USP_RUN_DSINKS] && !o->path[USP_RUN_SINKS]) argp_error(state, "--dsinks needs --sinks");
    check_kind(state, o);
    check_documents(state, o);
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
        usp_run_parse_documents(state, "documents", text, &o->ends);
        break;
    case KEY_KEY_DOCUMENTS:
        usp_run_parse_documents(state, "key-documents", text, &o->key_ends);
        break;
    case KEY_PREFIXES:
        usp_run_parse_documents(state, "prefixes", text, &o->prefixes);
        break;
    case KEY_PARENTS:
        usp_run_parse_documents(state, "parents", text, &o->parents);
        break;
    case KEY_SEGMENTS:
        usp_run_parse_segments(state, "segments", text, &o->segments);
        break;
    case KEY_KEY_SEGMENTS:
        usp_run_parse_segments(state, "key-segments", text, &o->key_segments);
        break;
    default:
        return ARGP_ERR_UNKNOWN;
    }
    return 0;
}

static error_t parse_layer(int key, char *text, struct argp_state *state, usp_run_options *o) {
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
    case KEY_DECAY:
        usp_run_parse_heads(state, "decay", text, 0, 1, &o->decay);
        break;
    case KEY_SLOPES:
        usp_run_parse_heads(state, "slopes", text, -FLT_MAX, FLT_MAX, &o->slopes);
        break;
    case KEY_DROPOUT_STATE:
        usp_run_parse_dropout_state(state, text, o->dropout_state);
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
    case ARGP_KEY_INIT:
        state->child_inputs[0] = &o->layer;
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
    usp_layer_options layer;
    const struct argp_child *children = usp_layer_options_make(&layer, NULL, 4);
    const struct argp argp = {option_table, parse_option, NULL, description, children, NULL, NULL};
    *options = (usp_run_options){.kind = USP_SOFTMAX, .mask = USP_MASK_CAUSAL, .layout = -1, .dtype = -1};
    argp_program_version_hook = usp_tool_print_version;
    argp_parse(&argp, argc, argv, 0, NULL, options);
}

void usp_run_options_free(usp_run_options *options) {
    free(options->decay.item);
    free(options->slopes.item);
    free(options->ends.item);
    free(options->key_ends.item);
    free(options->prefixes.item);
    free(options->parents.item);
    free(options->segments.first);
    free(options->segments.segment);
    free(options->key_segments.first);
    free(options->key_segments.segment);
}
