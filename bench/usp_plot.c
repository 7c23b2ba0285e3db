/* usp_plot.c - draws the CSV files of usp_bench and of the trainer as SVG.
 * It chooses columns and names series; plot.c draws. */
#include "csv.h"
#include "plot.h"
#include <argp.h>
#include <errno.h>
#include <libgen.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum {
    KEY_TYPE = 256,
    KEY_TITLE,
    KEY_X,
    KEY_Y,
    KEY_WHERE,
    KEY_LOG_X,
    MOST_FILES = 16,
    MOST_WHERE = 16,
    NAME_BYTES = 192
};

typedef enum usp_plot_type { PLOT_AUTO = 0, PLOT_LINE = 1, PLOT_BARS = 2, PLOT_HEATMAP = 3 } usp_plot_type;

typedef struct usp_plot_options {
    const char *file[MOST_FILES], *output, *title, *x, *y;
    char *where[MOST_WHERE]; /* "column=value" */
    int files, wheres, log_x;
    int type; /* usp_plot_type */
} usp_plot_options;

/* ---- command line ---------------------------------------------------------------------------------------------- */

static const struct argp_option option_table[] = {
    {"output", 'o', "FILE", 0, "SVG file to write (standard output)", 0},
    {"type", KEY_TYPE, "auto|line|bars|heatmap", 0, "Chart (auto: lines, or bars where all rows have one x)", 0},
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
    static const usp_name types[] = {
        {"auto", PLOT_AUTO}, {"line", PLOT_LINE}, {"bars", PLOT_BARS}, {"heatmap", PLOT_HEATMAP}, {NULL, 0}};
    int type = PLOT_AUTO;
    char known[USP_NAMES_BYTES];
    if (!usp_name_find(types, text, &type))
        argp_error(state, "--type: '%s' is none of %s", text, usp_name_join(types, known));
    return type;
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
        if (o->wheres == MOST_WHERE || !strchr(text, '=')) argp_error(state, "--where: '%s' is not COLUMN=VALUE", text);
        o->where[o->wheres++] = text;
        break;
    case 'h':
        argp_state_help(state, stdout, ARGP_HELP_STD_HELP);
        break;
    case ARGP_KEY_ARG:
        if (o->files == MOST_FILES) argp_error(state, "more than %d files", MOST_FILES);
        o->file[o->files++] = text;
        break;
    case ARGP_KEY_END:
        if (!o->files) argp_error(state, "no CSV file given");
        for (int i = 0; i < o->files; i++)
            if (o->output && usp_tool_same_file(o->output, o->file[i]))
                argp_error(state, "--output would overwrite %s", o->file[i]);
        break;
    default:
        return ARGP_ERR_UNKNOWN;
    }
    return 0;
}

/* ---- rows to series -------------------------------------------------------------------------------------------- */

/* The column of "COLUMN=VALUE", -1 if the file lacks it, and the value. */
static int where_column(const usp_csv *csv, const char *where, const char **value) {
    char name[64];
    size_t length = strcspn(where, "=");
    snprintf(name, sizeof name, "%.*s", (int)length, where);
    *value = where + length + 1;
    return usp_csv_column(csv, name);
}

static usp_status check_wheres(const usp_plot_options *o, const usp_csv *csv, const char *path, usp_tool_error *error) {
    for (int i = 0; i < o->wheres; i++) {
        const char *value;
        if (where_column(csv, o->where[i], &value) < 0)
            return usp_tool_fail(error, USP_INVALID, "%s: has no column '%.*s'", path, (int)strcspn(o->where[i], "="),
                                 o->where[i]);
    }
    return USP_OK;
}

static int holds(const usp_csv *csv, size_t row, const char *where) {
    const char *value;
    int column = where_column(csv, where, &value);
    return !strcmp(usp_csv_cell(csv, row, column), value);
}

static int wanted(const usp_plot_options *o, const usp_csv *csv, size_t row) {
    for (int i = 0; i < o->wheres; i++)
        if (!holds(csv, row, o->where[i])) return 0;
    return 1;
}

static int varies(const usp_plot_options *o, const usp_csv *csv, int column) {
    const char *first = NULL;
    for (size_t row = 0; row < csv->rows; row++) {
        if (!wanted(o, csv, row)) continue;
        const char *cell = usp_csv_cell(csv, row, column);
        if (first && strcmp(first, cell)) return 1;
        first = cell;
    }
    return 0;
}

/* Columns of usp_bench that say what a row is, how they are shown, and what stands before the value. */
typedef struct usp_key {
    const char *column, *prefix;
} usp_key;

static const usp_key keys[] = {{"kind", ""},        {"pass", ""},     {"layout", ""},  {"mask", ""},
                               {"type", ""},        {"ulysses", "U"}, {"ring", "R"},   {"batch", "b"},
                               {"heads", "heads "}, {"kv", "kv "},    {"dim", "dim "}, {"value_dim", "value dim "},
                               {"seq", "seq "}};

/* Of the keys that differ between rows: "softmax fwd U2 R2". */
static void name_row(const usp_plot_options *o, const usp_csv *csv, size_t row, const char *x, char name[NAME_BYTES]) {
    int at = 0;
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++) {
        int column = usp_csv_column(csv, keys[i].column);
        if (column < 0 || !strcmp(keys[i].column, x) || !varies(o, csv, column)) continue;
        at += snprintf(name + at, (size_t)(NAME_BYTES - at), "%s%s%.40s", at ? " " : "", keys[i].prefix,
                       usp_csv_cell(csv, row, column));
        if (at >= NAME_BYTES - 1) return;
    }
    if (!at) snprintf(name, NAME_BYTES, "%s", o->y);
}

static usp_status find_column(const usp_csv *csv, const char *path, const char *name, int *column,
                              usp_tool_error *error) {
    *column = usp_csv_column(csv, name);
    if (*column >= 0) return USP_OK;
    return usp_tool_fail(error, USP_INVALID, "%s: has no column '%s'", path, name);
}

static usp_status add_point(usp_chart *chart, const char *name, double x, double y, usp_tool_error *error) {
    if (usp_chart_add(chart, name, x, y) == 0) return USP_OK;
    return usp_tool_fail(error, USP_INVALID, "more than %d series; choose rows with --where", USP_PLOT_SERIES);
}

static usp_status add_bench_rows(const usp_plot_options *o, const usp_csv *csv, const char *path, usp_chart *chart,
                                 usp_tool_error *error) {
    int x_column, y_column;
    USP_TRY(find_column(csv, path, o->x, &x_column, error));
    USP_TRY(find_column(csv, path, o->y, &y_column, error));
    const char *skip = o->type == PLOT_BARS ? "" : o->x;
    for (size_t row = 0; row < csv->rows; row++) {
        char name[NAME_BYTES];
        double x, y;
        if (!wanted(o, csv, row) || !usp_csv_number(csv, row, y_column, &y)) continue;
        if (!usp_csv_number(csv, row, x_column, &x)) continue;
        name_row(o, csv, row, skip, name);
        USP_TRY(add_point(chart, name, x, y, error));
    }
    return USP_OK;
}

/* The column's own name; with several files their name before it. */
static void name_curve(const usp_plot_options *o, const char *path, const char *column, char name[NAME_BYTES]) {
    char copy[NAME_BYTES];
    snprintf(copy, sizeof copy, "%.*s", NAME_BYTES - 1, path);
    char *base = basename(copy), *dot = strrchr(base, '.');
    if (dot) *dot = 0;
    if (o->files > 1)
        snprintf(name, NAME_BYTES, "%.90s %.90s", base, column);
    else
        snprintf(name, NAME_BYTES, "%.180s", column);
}

static usp_status add_curves(const usp_plot_options *o, const usp_csv *csv, const char *path, usp_chart *chart,
                             usp_tool_error *error) {
    int x_column;
    USP_TRY(find_column(csv, path, o->x, &x_column, error));
    for (int column = 0; column < csv->columns; column++) {
        char name[NAME_BYTES];
        if (column == x_column || (o->y && strcmp(csv->cell[column], o->y))) continue;
        name_curve(o, path, csv->cell[column], name);
        for (size_t row = 0; row < csv->rows; row++) {
            double x, y;
            if (wanted(o, csv, row) && usp_csv_number(csv, row, x_column, &x) && usp_csv_number(csv, row, column, &y))
                USP_TRY(add_point(chart, name, x, y, error));
        }
    }
    return USP_OK;
}

/* ---- heat map -------------------------------------------------------------------------------------------------- */

/* Index of a degree among the sorted ones, which it joins if it is new; -1 if there are too many. */
static int degree_index(double degrees[USP_PLOT_SERIES], int *count, double degree) {
    int at = 0;
    while (at < *count && degrees[at] < degree) at++;
    if (at < *count && degrees[at] == degree) return at;
    if (*count == USP_PLOT_SERIES) return -1;
    memmove(degrees + at + 1, degrees + at, (size_t)(*count - at) * sizeof *degrees);
    degrees[at] = degree;
    ++*count;
    return at;
}

typedef struct usp_grid {
    double ulysses[USP_PLOT_SERIES], ring[USP_PLOT_SERIES];
    int columns, rows;
    double sum[USP_PLOT_SERIES][USP_PLOT_SERIES], count[USP_PLOT_SERIES][USP_PLOT_SERIES];
} usp_grid;

/* Twice over the rows: first the degrees, then, with `values`, their cells. */
static usp_status fill_grid(const usp_plot_options *o, const usp_csv *csv, const char *path, int values, usp_grid *grid,
                            usp_tool_error *error) {
    int u_column, r_column, y_column;
    USP_TRY(find_column(csv, path, "ulysses", &u_column, error));
    USP_TRY(find_column(csv, path, "ring", &r_column, error));
    USP_TRY(find_column(csv, path, o->y, &y_column, error));
    for (size_t row = 0; row < csv->rows; row++) {
        double u, r, y;
        if (!wanted(o, csv, row) || !usp_csv_number(csv, row, u_column, &u)) continue;
        if (!usp_csv_number(csv, row, r_column, &r) || !usp_csv_number(csv, row, y_column, &y)) continue;
        int column = degree_index(grid->ulysses, &grid->columns, u), line = degree_index(grid->ring, &grid->rows, r);
        if (column < 0 || line < 0) return usp_tool_fail(error, USP_INVALID, "%s: too many degrees", path);
        if (!values) continue;
        grid->sum[line][column] += y;
        grid->count[line][column]++;
    }
    return USP_OK;
}

static void draw_grid(FILE *svg, const usp_plot_options *o, const usp_grid *grid, usp_heatmap *map,
                      char names[2][USP_PLOT_SERIES][16]) {
    *map = (usp_heatmap){.title = o->title,
                         .x_label = "Ulysses degree",
                         .y_label = "ring degree",
                         .rows = grid->rows,
                         .columns = grid->columns};
    for (int r = 0; r < grid->rows; r++)
        for (int c = 0; c < grid->columns; c++)
            map->value[r][c] = grid->count[r][c] > 0 ? grid->sum[r][c] / grid->count[r][c] : (double)NAN;
    for (int c = 0; c < grid->columns; c++) {
        snprintf(names[0][c], 16, "%g", grid->ulysses[c]);
        map->column_name[c] = names[0][c];
    }
    for (int r = 0; r < grid->rows; r++) {
        snprintf(names[1][r], 16, "%g", grid->ring[r]);
        map->row_name[r] = names[1][r];
    }
    usp_plot_heatmap(svg, map);
}

/* ---- files ----------------------------------------------------------------------------------------------------- */

/* Defaults that depend on the first file. */
static void choose(usp_plot_options *o, const usp_csv *csv) {
    int curves = !strcmp(csv->cell[0], "step");
    if (!o->title) o->title = o->file[0];
    if (!o->x) o->x = curves ? "step" : "seq";
    if (!o->y && !curves) o->y = "tflops_per_rank";
    if (!strcmp(o->x, "seq")) o->log_x = 1;
    int x = usp_csv_column(csv, o->x);
    if (o->type == PLOT_AUTO) o->type = curves || x < 0 || varies(o, csv, x) ? PLOT_LINE : PLOT_BARS;
}

static const char *y_label(const usp_plot_options *o) {
    if (!o->y) return "loss (nats)";
    return strcmp(o->y, "tflops_per_rank") ? o->y : "TFLOP/s per rank";
}

static usp_status draw_chart(const usp_plot_options *o, const usp_csv *csv, FILE *svg, usp_tool_error *error) {
    usp_chart chart = {.title = o->title,
                       .x_label = strcmp(o->x, "seq") ? o->x : "sequence length (tokens)",
                       .y_label = y_label(o),
                       .log_x = o->log_x,
                       .from_zero = strcmp(csv->cell[0], "step") != 0};
    usp_status status = USP_OK;
    for (int i = 0; i < o->files && status == USP_OK; i++)
        status = strcmp(csv[i].cell[0], "step") ? add_bench_rows(o, &csv[i], o->file[i], &chart, error)
                                                : add_curves(o, &csv[i], o->file[i], &chart, error);
    if (status == USP_OK && !chart.count) status = usp_tool_fail(error, USP_INVALID, "no row to draw");
    if (status == USP_OK && o->type == PLOT_BARS)
        usp_plot_bars(svg, &chart);
    else if (status == USP_OK)
        usp_plot_lines(svg, &chart);
    usp_chart_free(&chart);
    return status;
}

/* The grid is large, so it is not on the stack. */
typedef struct usp_heat_work {
    usp_grid grid;
    usp_heatmap map;
    char names[2][USP_PLOT_SERIES][16];
} usp_heat_work;

static usp_status draw_heatmap(const usp_plot_options *o, const usp_csv *csv, FILE *svg, usp_tool_error *error) {
    usp_heat_work *work = usp_tool_alloc(error, 1, sizeof *work);
    if (!work) return USP_NO_MEMORY;
    usp_status status = USP_OK;
    for (int values = 0; values < 2; values++)
        for (int i = 0; i < o->files && status == USP_OK; i++)
            status = fill_grid(o, &csv[i], o->file[i], values, &work->grid, error);
    if (status == USP_OK && !work->grid.rows) status = usp_tool_fail(error, USP_INVALID, "no row to draw");
    if (status == USP_OK) draw_grid(svg, o, &work->grid, &work->map, work->names);
    free(work);
    return status;
}

static usp_status draw_to(const usp_plot_options *o, const usp_csv *csv, FILE *svg, usp_tool_error *error) {
    usp_status status = o->type == PLOT_HEATMAP ? draw_heatmap(o, csv, svg, error) : draw_chart(o, csv, svg, error);
    if (status == USP_OK && (fflush(svg) || ferror(svg)))
        status = usp_tool_fail(error, USP_INVALID, "cannot write: %s", strerror(errno));
    return status;
}

static usp_status draw(usp_plot_options *o, const usp_csv *csv, usp_tool_error *error) {
    choose(o, csv);
    if (!o->output) return draw_to(o, csv, stdout, error);
    FILE *svg = fopen(o->output, "w");
    if (!svg) return usp_tool_fail(error, USP_INVALID, "%s: cannot write: %s", o->output, strerror(errno));
    usp_status status = draw_to(o, csv, svg, error);
    fclose(svg);
    if (status != USP_OK) remove(o->output);
    return status;
}

int main(int argc, char **argv) {
    const struct argp argp = {option_table, parse_option, "FILE.csv...", description, NULL, NULL, NULL};
    usp_plot_options options = {.files = 0};
    usp_csv csv[MOST_FILES] = {{.columns = 0}};
    usp_tool_error error = {""};
    usp_status status = USP_OK;
    usp_tool_guard_output(1);
    argp_program_version_hook = usp_tool_print_version;
    argp_parse(&argp, argc, argv, 0, NULL, &options);
    for (int i = 0; i < options.files && status == USP_OK; i++) {
        status = usp_csv_read(options.file[i], &csv[i], &error);
        if (status == USP_OK) status = check_wheres(&options, &csv[i], options.file[i], &error);
    }
    if (status == USP_OK) status = draw(&options, csv, &error);
    if (status != USP_OK) fprintf(stderr, "usp_plot: %s\n", error.text);
    for (int i = 0; i < options.files; i++) usp_csv_free(&csv[i]);
    return status == USP_OK ? 0 : 1;
}
