/* options.c - argp's tables for usp_bench.
 * Whether a case is possible is for the library to say: refused ones become comment lines. */
#include "options.h"
#include "layer_options.h"
#include "output.h"
#include <stddef.h>
#include <string.h>

enum {
    KEY_KIND = 256,
    KEY_LAYOUT,
    KEY_HEADS,
    KEY_KV_HEADS,
    KEY_HEAD_DIM,
    KEY_VALUE_DIM,
    KEY_BATCH,
    KEY_CAUSAL,
    KEY_FULL,
    KEY_PASS,
    KEY_DEVICE,
    KEY_TRANSPORT,
    KEY_DECAY,
    KEY_SLOPES,
    KEY_SINKS,
    KEY_DOCUMENTS,
    KEY_MAX_DOCUMENTS,
    KEY_SHARED_MEMORY,
    KEY_BASELINE,
    KEY_PLAN,
    KEY_CSV,
    KEY_COMMIT,
    KEY_QUIET,
    KEY_BUDGET,
    KEY_INFO
};

static const struct argp_option option_table[] = {
    {NULL, 0, NULL, 0, "Ranks (none of -t, -g: the job of torchrun, usp_launch, mpirun or srun; else one rank):", 1},
    {"threads", 't', "N", 0, "N thread-ranks, in practice some hundreds at most, on the CPU or all on one GPU", 0},
    {"gpus", 'g', "N", 0, "N GPUs, a thread-rank each, joined by NCCL", 0},
    {"transport", KEY_TRANSPORT, "auto|nccl|peer", 0,
     "What moves tensors between GPUs (auto: for each axis what serves its ranks; peer: in a launcher's job)", 0},
    {"device", KEY_DEVICE, "auto|cpu|cuda", 0, "Where to run (auto: a GPU if one is usable)", 0},
    {"timeout", 'T', "SECONDS", 0, "Longest wait for another rank (600)", 0},
    {"shared-memory", KEY_SHARED_MEMORY, NULL, 0, "Workspace and saved in memory registered with all ranks", 0},

    {NULL, 0, NULL, 0, "Sweep (lists are separated by commas):", 2},
    {"minlength", 'b', "SEQ", 0, "Shortest sequence, K and M for 1024 and 1024^2 (1K)", 0},
    {"maxlength", 'e', "SEQ", 0, "Longest sequence (4K, or -b if that is longer)", 0},
    {"stepfactor", 'f', "FACTOR", 0, "Lengths grow by this factor (2)", 0},
    {"stepsize", 'i', "TOKENS", 0, "Lengths grow by this many tokens instead", 0},
    {"ulysses", 'u', "LIST", 0, "Ulysses degrees, or auto: with -r auto all factorisations of the ranks (auto)", 0},
    {"ring", 'r', "LIST", 0, "Ring degrees, or auto; pairs whose product is the number of ranks run (auto)", 0},
    {"kind", KEY_KIND, "LIST", 0, "softmax, linear or both (both)", 0},
    {"layout", KEY_LAYOUT, "LIST", 0,
     "zigzag, contiguous, stripe, documents (zigzag inside each; without --documents of four, of 1, 2, 3 and 4 tenths "
     "of the length) or all (zigzag)",
     0},
    {"documents", KEY_DOCUMENTS, "LEAST:MOST|LIST", 0,
     "Packed documents of random lengths, always the same, or of these lengths in turn; the last one is cut (one)", 0},
    {"max-documents", KEY_MAX_DOCUMENTS, "N", 0, "Plan with room for other documents, N at most; 0: none (0)", 0},
    {"datatype", 'd', "LIST", 0, "f32, f16, bf16 or all (f32 on the CPU, bf16 on GPUs)", 0},
    {"heads", KEY_HEADS, "LIST", 0, "Query heads (8)", 0},
    {"kv-heads", KEY_KV_HEADS, "LIST", 0, "Key and value heads; 0: as many as query heads (0)", 0},
    {"head-dim", KEY_HEAD_DIM, "LIST", 0, "Head dimension of queries and keys (64)", 0},
    {"value-dim", KEY_VALUE_DIM, "LIST", 0, "Head dimension of values; 0: as queries (0)", 0},
    {"batch", KEY_BATCH, "LIST", 0, "Batch (1)", 0},
    {"pass", KEY_PASS, "fwd|bwd|both", 0, "Which passes to time, a row each (both)", 0},
    {"causal", KEY_CAUSAL, NULL, 0, "Causal mask (the default)", 0},
    {"full", KEY_FULL, NULL, 0, "No mask", 0},
    {"decay", KEY_DECAY, "none|alibi", 0, "Linear, causal: no decay, or the heads' ALiBi slopes (alibi)", 0},
    {"slopes", KEY_SLOPES, "none|alibi", 0, "Softmax: scores fall with distance by the heads' ALiBi slopes (none)", 0},
    {"sinks", KEY_SINKS, NULL, 0, "Softmax: a random attention sink a head", 0},

    {NULL, 0, NULL, 0, "Measuring:", 4},
    {"iters", 'n', "N", 0, "Timed iterations (20)", 0},
    {"warmup_iters", 'w', "N", 0, "Passes before them (3)", 0},
    {"agg_iters", 'm', "N", 0, "Passes in one iteration; 0: enough for 2 ms, at most 20 (0)", 0},
    {"cudagraph", 'G', "N", 0,
     "Record an iteration's passes as a CUDA graph and launch that N times an iteration; 0: no graph (0)", 0},
    {"budget", KEY_BUDGET, "SECONDS", 0, "End a row's iterations after this time, but not before 3; 0: never (10)", 0},
    {"check", 'c', "0|1", 0, "Check results against a double-precision reference at sampled rows (1)", 0},
    {"baseline", KEY_BASELINE, NULL, 0, "Also time one rank alone at the same length and print the speed-up", 0},
    {"plan", KEY_PLAN, NULL, 0,
     "Under every row what a model of GPUs of one host expects, there and of 2, 4 and 8 ranks (with --baseline)", 0},

    {NULL, 0, NULL, 0, "Output:", 5},
    {"json", 'J', "FILE", 0, "Also write everything as JSON", 0},
    {"csv", KEY_CSV, "FILE", 0, "Also write the rows as CSV", 0},
    {"memory", 'M', NULL, 0, "A comment line on memory under every row", 0},
    {"iteration-statistics", 'I', NULL, 0, "A comment line of statistics over iterations under every row", 0},
    {"commit", KEY_COMMIT, "TEXT", 0, "Revision to note in the JSON file", 0},
    {"quiet", KEY_QUIET, NULL, 0, "No progress bar", 0},
    {"info", KEY_INFO, NULL, 0, "Print versions and devices, and leave", 0},
    {NULL, 'h', NULL, 0, "The same as --help", -1},
    {0}};

static const char description[] =
    "Times attention over sequence-parallel ranks and checks every result it times."
    "\vThe time is that of the slowest rank, per pass: the median and the 99th percentile of the iterations. TFLOP/s "
    "is "
    "per rank, by the layer's own count. bytes(ulysses) and bytes(ring) are what the busiest rank sends in one pass, "
    "mem(MiB) its workspace and saved. maxerr is the largest |x - reference| / (|reference| + natural size of the row) "
    "of the sampled elements; those above 1e-4 (f32), 4 epsilon (f16 and bf16: 3.9e-3 and 3.1e-2) or not finite count "
    "as #wrong. The files of --json and --csv appear when the run ends, also badly or by a signal if it has a row; "
    "until then they grow beside, as FILE.PID-N. Exit status: 0 all right, 1 a wrong result, 2 an error, 64 "
    "a wrong command line.";

/* ---- parsing --------------------------------------------------------------------------------------------------- */

static void parse_names(struct argp_state *state, const char *option, const char *text, const usp_name *names,
                        const char *all, usp_list *list) {
    list->count = 0;
    if (strcmp(text, all) == 0)
        for (; names->name; names++) {
            int seen = 0;
            for (int i = 0; i < list->count; i++) seen |= list->item[i] == names->value;
            if (!seen) list->item[list->count++] = names->value;
        }
    else if (!usp_parse_list(text, names, list)) {
        char known[USP_NAMES_BYTES];
        argp_error(state, "--%s: '%s' is no list of %s, nor %s", option, text, usp_name_join(names, known), all);
    }
}

static void parse_numbers(struct argp_state *state, const char *option, const char *text, int64_t low, usp_list *list) {
    int good = usp_parse_list(text, NULL, list);
    for (int i = 0; i < list->count && good; i++) good = list->item[i] >= low && list->item[i] <= 1 << 20;
    if (!good) argp_error(state, "--%s: '%s' is not a list of whole numbers from %d", option, text, (int)low);
}

static int64_t parse_number(struct argp_state *state, const char *option, const char *text, int64_t low, int64_t high) {
    int64_t value = 0;
    if (!usp_parse_size(text, &value) || value < low || value > high)
        argp_error(state, "--%s: '%s' is not a whole number from %lld to %lld", option, text, (long long)low,
                   (long long)high);
    return value;
}

static int parse_name(struct argp_state *state, const char *option, const char *text, const usp_name *names) {
    int value = 0;
    char known[USP_NAMES_BYTES];
    if (!usp_name_find(names, text, &value))
        argp_error(state, "--%s: '%s' is none of %s", option, text, usp_name_join(names, known));
    return value;
}

static void parse_pass(struct argp_state *state, const char *text, int passes[2]) {
    int both = strcmp(text, "both") == 0;
    passes[USP_PASS_FORWARD] = both || strcmp(text, "fwd") == 0;
    passes[USP_PASS_BACKWARD] = both || strcmp(text, "bwd") == 0;
    if (!passes[0] && !passes[1]) argp_error(state, "--pass: '%s' is none of fwd, bwd, both", text);
}

static double parse_seconds(struct argp_state *state, const char *option, const char *text) {
    double value = 0;
    if (!usp_parse_real(text, &value) || value < 0 || value > 1e6)
        argp_error(state, "--%s: '%s' is not a number of seconds", option, text);
    return value;
}

static void parse_degrees(struct argp_state *state, const char *option, const char *text, usp_list *list) {
    list->count = 0;
    if (strcmp(text, "auto")) parse_numbers(state, option, text, 1, list);
}

static error_t parse_ranks(int key, char *text, struct argp_state *state, usp_options *o) {
    switch (key) {
    case 't':
        o->ranks.threads = (int)parse_number(state, "threads", text, 1, 4096);
        break;
    case 'g':
        o->ranks.gpus = (int)parse_number(state, "gpus", text, 1, 4096);
        break;
    case 'T':
        o->ranks.timeout_ms = (int)parse_number(state, "timeout", text, 1, 1000000) * 1000;
        break;
    case KEY_DEVICE:
        o->ranks.device = (usp_device_kind)parse_name(state, "device", text, usp_names_device());
        break;
    case KEY_TRANSPORT:
        o->ranks.transport = (usp_transport_kind)parse_name(state, "transport", text, usp_names_transport());
        break;
    case KEY_SHARED_MEMORY:
        o->shared_memory = 1;
        break;
    default:
        return ARGP_ERR_UNKNOWN;
    }
    return 0;
}

/* The options whose value is a list, of names or of numbers from `low`. */
typedef struct usp_list_option {
    int key;
    const char *name;
    const usp_name *(*names)(void);
    const char *all; /* stands for all names */
    int low;
    size_t offset; /* of the list in usp_options */
} usp_list_option;

static const usp_list_option list_options[] = {
    {'d', "datatype", usp_names_dtype, "all", 0, offsetof(usp_options, dtypes)},
    {KEY_KIND, "kind", usp_names_attention, "both", 0, offsetof(usp_options, kinds)},
    {KEY_LAYOUT, "layout", usp_names_layout, "all", 0, offsetof(usp_options, layouts)},
    {KEY_HEADS, "heads", NULL, NULL, 1, offsetof(usp_options, heads)},
    {KEY_KV_HEADS, "kv-heads", NULL, NULL, 0, offsetof(usp_options, kv_heads)},
    {KEY_HEAD_DIM, "head-dim", NULL, NULL, 1, offsetof(usp_options, dims)},
    {KEY_VALUE_DIM, "value-dim", NULL, NULL, 0, offsetof(usp_options, value_dims)},
    {KEY_BATCH, "batch", NULL, NULL, 1, offsetof(usp_options, batches)}};

static error_t parse_lists(int key, char *text, struct argp_state *state, usp_options *o) {
    for (size_t i = 0; i < sizeof list_options / sizeof *list_options; i++) {
        const usp_list_option *option = &list_options[i];
        usp_list *list = (usp_list *)((char *)o + option->offset);
        if (option->key != key) continue;
        if (option->names)
            parse_names(state, option->name, text, option->names(), option->all, list);
        else
            parse_numbers(state, option->name, text, option->low, list);
        return 0;
    }
    return ARGP_ERR_UNKNOWN;
}

static error_t parse_sweep(int key, char *text, struct argp_state *state, usp_options *o) {
    switch (key) {
    case 'b':
        o->begin = parse_number(state, "minlength", text, 1, INT32_MAX);
        break;
    case 'e':
        o->end = parse_number(state, "maxlength", text, 1, INT32_MAX);
        break;
    case 'f':
        o->factor = parse_number(state, "stepfactor", text, 2, 1 << 20);
        break;
    case 'i':
        o->step = parse_number(state, "stepsize", text, 1, INT32_MAX);
        break;
    case 'u':
        parse_degrees(state, "ulysses", text, &o->ulysses);
        break;
    case 'r':
        parse_degrees(state, "ring", text, &o->ring);
        break;
    case KEY_PASS:
        parse_pass(state, text, o->passes);
        break;
    default:
        return ARGP_ERR_UNKNOWN;
    }
    return 0;
}

static int parse_alibi(struct argp_state *state, const char *option, const char *text) {
    if (strcmp(text, "alibi") && strcmp(text, "none"))
        argp_error(state, "--%s: '%s' is none of none, alibi", option, text);
    return strcmp(text, "alibi") == 0;
}

static error_t parse_layer(int key, char *text, struct argp_state *state, usp_options *o) {
    switch (key) {
    case KEY_CAUSAL:
        o->mask = USP_MASK_CAUSAL;
        break;
    case KEY_FULL:
        o->mask = USP_MASK_FULL;
        break;
    case KEY_DECAY:
        o->decay = parse_alibi(state, "decay", text);
        break;
    case KEY_SLOPES:
        o->slopes = parse_alibi(state, "slopes", text);
        break;
    case KEY_SINKS:
        o->layer.sinks = 1;
        break;
    case KEY_DOCUMENTS:
        o->packed = text;
        if (!usp_document_rule_parse(text, &o->documents))
            argp_error(state, "--documents: '%s' is neither LEAST:MOST nor a list of lengths from 1", text);
        break;
    case KEY_MAX_DOCUMENTS:
        o->max_documents = (int)parse_number(state, "max-documents", text, 0, INT32_MAX);
        break;
    default:
        return ARGP_ERR_UNKNOWN;
    }
    return 0;
}

static error_t parse_measuring(int key, char *text, struct argp_state *state, usp_options *o) {
    switch (key) {
    case 'n':
        o->iterations = (int)parse_number(state, "iters", text, 1, 1000000);
        break;
    case 'w':
        o->warmup = (int)parse_number(state, "warmup_iters", text, 0, 1000000);
        break;
    case 'm':
        o->aggregate = (int)parse_number(state, "agg_iters", text, 0, 1000000);
        break;
    case 'G':
        o->graphs = (int)parse_number(state, "cudagraph", text, 0, 1000000);
        break;
    case 'c':
        o->check = (int)parse_number(state, "check", text, 0, 1);
        break;
    case KEY_BUDGET:
        o->budget = parse_seconds(state, "budget", text);
        break;
    case KEY_BASELINE:
        o->baseline = 1;
        break;
    case KEY_PLAN:
        o->baseline = o->plan = 1;
        break;
    default:
        return ARGP_ERR_UNKNOWN;
    }
    return 0;
}

static void check_options(struct argp_state *state, const usp_options *o) {
    if (o->ranks.threads && o->ranks.gpus) argp_error(state, "-t and -g exclude each other");
    if (o->end && o->end < o->begin) argp_error(state, "--maxlength is less than --minlength");
    if (o->ranks.gpus && o->ranks.device == USP_DEVICE_CPU) argp_error(state, "-g excludes --device cpu");
    if (o->csv && o->json && usp_output_same(o->csv, o->json)) argp_error(state, "--csv and --json are the same file");
}

static error_t parse_output(int key, char *text, struct argp_state *state, usp_options *o) {
    switch (key) {
    case 'J':
        o->json = text;
        break;
    case 'M':
        o->memory = 1;
        break;
    case 'I':
        o->statistics = 1;
        break;
    case 'h':
        argp_state_help(state, stdout, ARGP_HELP_STD_HELP);
        break;
    case KEY_CSV:
        o->csv = text;
        break;
    case KEY_COMMIT:
        o->commit = text;
        break;
    case KEY_QUIET:
        o->quiet = 1;
        break;
    case KEY_INFO:
        o->info = 1;
        break;
    case ARGP_KEY_INIT:
        state->child_inputs[0] = &o->layer;
        break;
    case ARGP_KEY_ARG:
        argp_error(state, "'%s' is not an option", text);
        break;
    case ARGP_KEY_END:
        check_options(state, o);
        break;
    default:
        return ARGP_ERR_UNKNOWN;
    }
    return 0;
}

static error_t parse_option(int key, char *text, struct argp_state *state) {
    usp_options *o = state->input;
    error_t error = parse_ranks(key, text, state, o);
    if (error == ARGP_ERR_UNKNOWN) error = parse_lists(key, text, state, o);
    if (error == ARGP_ERR_UNKNOWN) error = parse_sweep(key, text, state, o);
    if (error == ARGP_ERR_UNKNOWN) error = parse_layer(key, text, state, o);
    if (error == ARGP_ERR_UNKNOWN) error = parse_measuring(key, text, state, o);
    if (error == ARGP_ERR_UNKNOWN) error = parse_output(key, text, state, o);
    return error;
}

void usp_options_parse(usp_options *options, int argc, char **argv) {
    usp_layer_options layer;
    const struct argp_child *children =
        usp_layer_options_make(&layer, "Layer (of each case what its kind and mask have):", 3);
    const struct argp argp = {option_table, parse_option, NULL, description, children, NULL, NULL};
    const usp_list one_zero = {.count = 1};
    *options = (usp_options){.begin = 1024,
                             .factor = 2,
                             .iterations = 20,
                             .warmup = 3,
                             .check = 1,
                             .budget = 10,
                             .kinds = {.count = 2, .item = {USP_SOFTMAX, USP_LINEAR}},
                             .layouts = {.count = 1, .item = {USP_LAYOUT_ZIGZAG}},
                             .heads = {.count = 1, .item = {8}},
                             .kv_heads = one_zero,
                             .dims = {.count = 1, .item = {64}},
                             .value_dims = one_zero,
                             .batches = {.count = 1, .item = {1}},
                             .mask = USP_MASK_CAUSAL,
                             .passes = {1, 1},
                             .decay = 1};
    argp_program_version_hook = usp_tool_print_version;
    argp_parse(&argp, argc, argv, 0, NULL, options);
    if (!options->end) options->end = options->begin > 4096 ? options->begin : 4096;
}
