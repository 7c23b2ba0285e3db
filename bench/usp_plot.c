/* usp_plot.c - draws the CSV files of usp_bench and of the trainer as SVG.
 * It chooses columns and names series; plot.c draws. */
#include "csv.h"
#include "output.h"
#include "plot.h"
#include "plot_options.h"
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { NAME_BYTES = 4608 }; /* a path and more: cut names could be alike */

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

/* Whether the rows of some files differ in a column. */
static int varies(const usp_plot_options *o, const usp_csv *csv, int files, const char *name) {
    const char *first = NULL;
    for (int i = 0; i < files; i++) {
        int column = usp_csv_column(&csv[i], name);
        for (size_t row = 0; row < csv[i].rows && column >= 0; row++) {
            if (!wanted(o, &csv[i], row)) continue;
            const char *cell = usp_csv_cell(&csv[i], row, column);
            if (first && strcmp(first, cell)) return 1;
            first = cell;
        }
    }
    return 0;
}

/* "results/a.csv" -> "a", and its length. */
static const char *base_of(const char *path, int *length) {
    const char *slash = strrchr(path, '/'), *base = slash ? slash + 1 : path, *dot = strrchr(base, '.');
    *length = dot > base ? (int)(dot - base) : (int)strlen(base);
    return base;
}

/* What tells the series of one of several files apart: the file's name, or its path where another has that name. */
static int label_file(const usp_plot_options *o, int file, char name[NAME_BYTES]) {
    int length, other_length;
    const char *base = base_of(o->file[file], &length);
    if (o->files == 1) return 0;
    for (int i = 0; i < o->files; i++) {
        const char *other = base_of(o->file[i], &other_length);
        if (i != file && length == other_length && !memcmp(base, other, (size_t)length))
            return snprintf(name, NAME_BYTES, "%.4095s", o->file[file]);
    }
    return snprintf(name, NAME_BYTES, "%.*s", length < 4095 ? length : 4095, base);
}

/* Columns of usp_bench that say what a row is, how they are shown, and what stands before the value. */
typedef struct usp_key {
    const char *column, *prefix;
} usp_key;

static const usp_key keys[] = {{"kind", ""},        {"pass", ""},     {"layout", ""},  {"mask", ""},
                               {"type", ""},        {"ulysses", "U"}, {"ring", "R"},   {"batch", "b"},
                               {"heads", "heads "}, {"kv", "kv "},    {"dim", "dim "}, {"value_dim", "value dim "},
                               {"seq", "seq "}};

/* Of the file and the keys that differ between rows: "softmax fwd U2 R2". */
static void name_row(const usp_plot_options *o, const usp_csv *csv, int file, size_t row, const char *x,
                     char name[NAME_BYTES]) {
    int at = label_file(o, file, name);
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++) {
        int column = usp_csv_column(&csv[file], keys[i].column);
        if (column < 0 || !strcmp(keys[i].column, x) || !varies(o, csv, o->files, keys[i].column)) continue;
        at += snprintf(name + at, (size_t)(NAME_BYTES - at), "%s%s%.40s", at ? " " : "", keys[i].prefix,
                       usp_csv_cell(&csv[file], row, column));
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

static usp_status check_number(double value, const char *whose, usp_tool_error *error) {
    if (fabs(value) <= USP_PLOT_LARGEST) return USP_OK;
    return usp_tool_fail(error, USP_INVALID, "'%s': %g is too large to draw", whose, value);
}

static usp_status add_point(usp_chart *chart, const char *name, double x, double y, usp_tool_error *error) {
    USP_TRY(check_number(x, name, error));
    USP_TRY(check_number(y, name, error));
    if (usp_chart_add(chart, name, x, y) == 0) return USP_OK;
    return usp_tool_fail(error, USP_INVALID, "more than %d series; choose rows with --where", USP_PLOT_SERIES);
}

static usp_status add_bench_rows(const usp_plot_options *o, const usp_csv *csv, int file, usp_chart *chart,
                                 usp_tool_error *error) {
    int x_column, y_column;
    const usp_csv *rows = &csv[file];
    USP_TRY(find_column(rows, o->file[file], o->x, &x_column, error));
    USP_TRY(find_column(rows, o->file[file], o->y ? o->y : "tflops_per_rank", &y_column, error));
    const char *skip = o->type == USP_PLOT_BARS ? "" : o->x;
    for (size_t row = 0; row < rows->rows; row++) {
        char name[NAME_BYTES];
        double x, y;
        if (!wanted(o, rows, row) || !usp_csv_number(rows, row, y_column, &y)) continue;
        if (!usp_csv_number(rows, row, x_column, &x)) continue;
        name_row(o, csv, file, row, skip, name);
        USP_TRY(add_point(chart, name, x, y, error));
    }
    return USP_OK;
}

static usp_status add_curves(const usp_plot_options *o, const usp_csv *csv, int file, usp_chart *chart,
                             usp_tool_error *error) {
    int x_column;
    const usp_csv *rows = &csv[file];
    USP_TRY(find_column(rows, o->file[file], o->x, &x_column, error));
    for (int column = 0; column < rows->columns; column++) {
        char name[NAME_BYTES];
        if (column == x_column || (o->y && strcmp(rows->cell[column], o->y))) continue;
        int at = label_file(o, file, name);
        snprintf(name + at, (size_t)(NAME_BYTES - at), "%s%s", at ? " " : "", rows->cell[column]);
        for (size_t row = 0; row < rows->rows; row++) {
            double x, y;
            if (wanted(o, rows, row) && usp_csv_number(rows, row, x_column, &x) &&
                usp_csv_number(rows, row, column, &y))
                USP_TRY(add_point(chart, name, x, y, error));
        }
    }
    return USP_OK;
}

/* A bar shows one number: that no row is left out unseen. */
static usp_status check_bars(const usp_chart *chart, usp_tool_error *error) {
    for (int i = 0; i < chart->count; i++)
        if (chart->series[i].count > 1)
            return usp_tool_fail(error, USP_INVALID, "%zu rows are '%s', a bar shows one; choose rows with --where",
                                 chart->series[i].count, chart->series[i].name);
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
        USP_TRY(check_number(y, path, error));
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

/* Defaults that depend on the files; their kind and columns on the first. */
static void choose(usp_plot_options *o, const usp_csv *csv, char title[NAME_BYTES]) {
    int curves = !strcmp(csv->cell[0], "step"), lines = curves;
    snprintf(title, NAME_BYTES, o->files > 1 ? "%.150s and %d more" : "%.150s", o->file[0], o->files - 1);
    if (!o->title) o->title = title;
    if (!o->x) o->x = curves ? "step" : "seq";
    if (!o->y && !curves) o->y = "tflops_per_rank";
    if (!strcmp(o->x, "seq")) o->log_x = 1;
    for (int i = 0; i < o->files; i++) lines |= varies(o, &csv[i], 1, o->x);
    if (o->type == USP_PLOT_AUTO) o->type = lines || usp_csv_column(csv, o->x) < 0 ? USP_PLOT_LINE : USP_PLOT_BARS;
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
        status = strcmp(csv[i].cell[0], "step") ? add_bench_rows(o, csv, i, &chart, error)
                                                : add_curves(o, csv, i, &chart, error);
    if (status == USP_OK && !chart.count) status = usp_tool_fail(error, USP_INVALID, "no row to draw");
    if (status == USP_OK && o->type == USP_PLOT_BARS) status = check_bars(&chart, error);
    if (status == USP_OK && o->type == USP_PLOT_BARS)
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
    return o->type == USP_PLOT_HEATMAP ? draw_heatmap(o, csv, svg, error) : draw_chart(o, csv, svg, error);
}

static usp_status draw(usp_plot_options *o, const usp_csv *csv, usp_tool_error *error) {
    char title[NAME_BYTES];
    usp_output output;
    choose(o, csv, title);
    if (o->output) {
        USP_TRY(usp_output_open(&output, o->output, error));
        return usp_output_close(&output, draw_to(o, csv, output.stream, error), error);
    }
    USP_TRY(draw_to(o, csv, stdout, error));
    if (fflush(stdout) == 0 && !ferror(stdout)) return USP_OK;
    return usp_tool_fail(error, USP_INVALID, "cannot write to standard output: %s", strerror(errno));
}

int main(int argc, char **argv) {
    usp_plot_options options;
    usp_csv csv[USP_PLOT_FILES] = {{.columns = 0}};
    usp_tool_error error = {""};
    usp_status status = USP_OK;
    usp_tool_guard_output(1);
    usp_plot_options_parse(&options, argc, argv);
    for (int i = 0; i < options.files && status == USP_OK; i++) {
        status = usp_csv_read(options.file[i], &csv[i], &error);
        if (status == USP_OK) status = check_wheres(&options, &csv[i], options.file[i], &error);
    }
    if (status == USP_OK) status = draw(&options, csv, &error);
    if (status != USP_OK) fprintf(stderr, "usp_plot: %s\n", error.text);
    for (int i = 0; i < options.files; i++) usp_csv_free(&csv[i]);
    return status == USP_OK ? 0 : 1;
}
