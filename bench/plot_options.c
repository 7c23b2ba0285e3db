/* plot_options.c - argp's table for usp_plot.
 * Columns are looked for later, when the files have been read. */
#include "plot_options.h"
#include "output.h"
#include <argp.h>
#include <string.h>

enum { KEY_TYPE = 256, KEY_TITLE, KEY_X, KEY_Y, KEY_WHERE, KEY_LOG_X };

static const struct argp_option option_table[] = {
    {"output", 'o', "FILE", 0, "SVG file to write, whole or not at all (standard output)", 0},
    {"type", KEY_TYPE, "auto|line|bars|heatmap", 0, "Chart (auto: lines, or bars where no file has rows of two x)", 0},
    {"title", KEY_TITLE, "TEXT", 0, "Title (the file's name)", 0},
    {"x", KEY_X, "COLUMN", 0, "Column along the line (step, or seq for usp_bench's files)", 0},
    {"y", KEY_Y, "COLUMN", 0, "Column of values (all but step, or tflops_per_rank)", 0},
    {"where", KEY_WHERE, "COLUMN=VALUE", 0, "Only rows with this cell; may be given several times", 0},
    {"log-x", KEY_LOG_X, NULL, 0, "Logarithmic x axis (the default where x is seq)", 0},
    {NULL, 'h', NULL, 0, "The same as --help", -1},
    {0}};

static const char description[] =
    "Draws CSV files as SVG: loss curves (first column: step), and the rows of usp_bench."
    "\vFiles of loss curves have a heading `step,NAME,...` and numbers; each column becomes a line. Rows of usp_bench "
    "become lines over seq, one for every combination of the other columns that differ; a heat map has the Ulysses "
    "degree across and the ring degree down, with the mean of the rows that fall into one cell. "
    "Exit status: 0 all right, 1 an error, 64 a wrong command line.";

static int parse_type(struct argp_state *state, const char *text) {
    static const usp_name types[] = {{"auto", USP_PLOT_AUTO},
                                     {"line", USP_PLOT_LINE},
                                     {"bars", USP_PLOT_BARS},
                                     {"heatmap", USP_PLOT_HEATMAP},
                                     {NULL, 0}};
    int type = USP_PLOT_AUTO;
    char known[USP_NAMES_BYTES];
    if (!usp_name_find(types, text, &type))
        argp_error(state, "--type: '%s' is none of %s", text, usp_name_join(types, known));
    return type;
}

static void check_files(struct argp_state *state, const usp_plot_options *o) {
    if (!o->files) argp_error(state, "no CSV file given");
    for (int i = 0; i < o->files; i++) {
        if (o->output && usp_output_same(o->output, o->file[i]))
            argp_error(state, "--output would overwrite %s", o->file[i]);
        for (int other = 0; other < i; other++)
            if (usp_output_same(o->file[other], o->file[i])) argp_error(state, "%s is given twice", o->file[i]);
    }
}

static error_t parse_option(int key, char *text, struct argp_state *state) {
    usp_plot_options *o = state->input;
    switch (key) {
    case 'o':
        o->output = text;
        break;
    case KEY_TYPE:
        o->type = parse_type(state, text);
        break;
    case KEY_TITLE:
        o->title = text;
        break;
    case KEY_X:
        o->x = text;
        break;
    case KEY_Y:
        o->y = text;
        break;
    case KEY_LOG_X:
        o->log_x = 1;
        break;
    case KEY_WHERE:
        if (o->wheres == USP_PLOT_WHERE || !strchr(text, '='))
            argp_error(state, "--where: '%s' is not COLUMN=VALUE", text);
        o->where[o->wheres++] = text;
        break;
    case 'h':
        argp_state_help(state, stdout, ARGP_HELP_STD_HELP);
        break;
    case ARGP_KEY_ARG:
        if (o->files == USP_PLOT_FILES) argp_error(state, "more than %d files", USP_PLOT_FILES);
        o->file[o->files++] = text;
        break;
    case ARGP_KEY_END:
        check_files(state, o);
        break;
    default:
        return ARGP_ERR_UNKNOWN;
    }
    return 0;
}

void usp_plot_options_parse(usp_plot_options *options, int argc, char **argv) {
    const struct argp argp = {option_table, parse_option, "FILE.csv...", description, NULL, NULL, NULL};
    *options = (usp_plot_options){.files = 0};
    argp_program_version_hook = usp_tool_print_version;
    argp_parse(&argp, argc, argv, 0, NULL, options);
}
