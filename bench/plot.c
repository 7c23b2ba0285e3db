/* plot.c - scales, ticks, marks and texts of the three charts.
 * Colours are told apart by people with any colour vision; every text is a text, so it can be searched. */
#include "plot.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* The frame of a chart in the picture, in pixels, and the values at its edges. */
typedef struct usp_frame {
    double left, right, top, bottom;
    double x_min, x_max, y_min, y_max, y_step;
    int log_x;
} usp_frame;

enum { WIDTH = 900, HEIGHT = 480, LEGEND = 210, COLORS = 8 };

static const char *color_of(int index) {
    static const char *const colors[COLORS] = {"#0072b2", "#d55e00", "#009e73", "#cc79a7",
                                               "#e69f00", "#56b4e9", "#555555", "#8c6d1f"};
    return colors[index % COLORS];
}

/* Series beyond the colours are told apart by their strokes. */
static const char *dash_of(int index) {
    static const char *const dashes[] = {"none", "6 3", "2 3", "8 3 2 3"};
    return dashes[index / COLORS % 4];
}

/* ---- series ---------------------------------------------------------------------------------------------------- */

static usp_series *find_series(usp_chart *chart, const char *name) {
    for (int i = 0; i < chart->count; i++)
        if (!strcmp(chart->series[i].name, name)) return &chart->series[i];
    if (chart->count == USP_PLOT_SERIES) return NULL;
    usp_series *made = &chart->series[chart->count];
    *made = (usp_series){.name = strdup(name)};
    if (!made->name) return NULL;
    chart->count++;
    return made;
}

static int grow(usp_series *series) {
    size_t capacity = series->capacity ? 2 * series->capacity : 64;
    double *x = realloc(series->x, capacity * sizeof *x);
    if (x) series->x = x;
    double *y = realloc(series->y, capacity * sizeof *y);
    if (y) series->y = y;
    if (!x || !y) return -1;
    series->capacity = capacity;
    return 0;
}

int usp_chart_add(usp_chart *chart, const char *name, double x, double y) {
    usp_series *series = find_series(chart, name);
    if (!series || (series->count == series->capacity && grow(series))) return -1;
    series->x[series->count] = x;
    series->y[series->count++] = y;
    return 0;
}

void usp_chart_free(usp_chart *chart) {
    for (int i = 0; i < chart->count; i++) {
        free(chart->series[i].name);
        free(chart->series[i].x);
        free(chart->series[i].y);
    }
    chart->count = 0;
}

/* ---- elements -------------------------------------------------------------------------------------------------- */

static void write_escaped(FILE *svg, const char *text) {
    for (; *text; text++) switch (*text) {
        case '&':
            fputs("&amp;", svg);
            break;
        case '<':
            fputs("&lt;", svg);
            break;
        case '>':
            fputs("&gt;", svg);
            break;
        default:
            fputc((unsigned char)*text < 0x20 ? ' ' : *text, svg);
        }
}

/* anchor: start, middle or end. */
static void draw_text(FILE *svg, double x, double y, const char *anchor, const char *style, const char *text) {
    fprintf(svg, "<text x=\"%.1f\" y=\"%.1f\" text-anchor=\"%s\" %s>", x, y, anchor, style);
    write_escaped(svg, text);
    fputs("</text>\n", svg);
}

static void draw_line(FILE *svg, double x1, double y1, double x2, double y2, const char *color) {
    fprintf(svg, "<line x1=\"%.1f\" y1=\"%.1f\" x2=\"%.1f\" y2=\"%.1f\" stroke=\"%s\"/>\n", x1, y1, x2, y2, color);
}

static void begin(FILE *svg, int width, int height, const char *title) {
    fprintf(svg,
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"%d\" height=\"%d\" viewBox=\"0 0 %d %d\" "
            "font-family=\"Helvetica, Arial, 'DejaVu Sans', sans-serif\" font-size=\"12\" fill=\"#333\">\n"
            "<rect width=\"100%%\" height=\"100%%\" fill=\"#fff\"/>\n",
            width, height, width, height);
    draw_text(svg, 24, 30, "start", "font-size=\"16\" font-weight=\"bold\"", title);
}

static void end(FILE *svg) {
    fputs("</svg>\n", svg);
}

static void draw_labels(FILE *svg, const usp_frame *f, const char *x_label, const char *y_label) {
    draw_text(svg, (f->left + f->right) / 2, f->bottom + 42, "middle", "fill=\"#666\"", x_label);
    draw_text(svg, f->left - 46, f->top - 12, "start", "fill=\"#666\"", y_label);
}

/* 1024 -> 1K; others with as few digits as show them. */
static void format_tick(double value, int binary, char text[32]) {
    static const char *const suffix[] = {"", "K", "M", "G"};
    int power = 0;
    for (; binary && power < 3 && value >= 1024 && fmod(value, 1024) == 0; power++) value /= 1024;
    snprintf(text, 32, "%.6g%s", value, suffix[power]);
}

/* ---- scales ---------------------------------------------------------------------------------------------------- */

static double place_x(const usp_frame *f, double x) {
    double low = f->log_x ? log2(f->x_min) : f->x_min, high = f->log_x ? log2(f->x_max) : f->x_max;
    return f->left + ((f->log_x ? log2(x) : x) - low) / (high - low) * (f->right - f->left);
}

static double place_y(const usp_frame *f, double y) {
    return f->bottom - (y - f->y_min) / (f->y_max - f->y_min) * (f->bottom - f->top);
}

/* 1, 2 or 5 times a power of ten, so that about `ticks` of them cover the range. */
static double nice_step(double range, int ticks) {
    double rough = range / ticks, power = pow(10, floor(log10(rough))), part = rough / power;
    return power * (part <= 1 ? 1 : part <= 2 ? 2 : part <= 5 ? 5 : 10);
}

/* A range too small for ticks that differ gets a margin. */
static void widen(double *low, double *high) {
    double size = fmax(fabs(*low), fabs(*high)), margin = size > 1e-290 ? size / 2 : 1;
    if (*high - *low > fmax(1e-13 * size, 1e-300)) return;
    *low -= margin;
    *high += margin;
}

static void find_range(const usp_chart *chart, usp_frame *f) {
    f->x_min = f->y_min = INFINITY;
    f->x_max = f->y_max = -INFINITY;
    for (int i = 0; i < chart->count; i++)
        for (size_t k = 0; k < chart->series[i].count; k++) {
            f->x_min = fmin(f->x_min, chart->series[i].x[k]);
            f->x_max = fmax(f->x_max, chart->series[i].x[k]);
            f->y_min = fmin(f->y_min, chart->series[i].y[k]);
            f->y_max = fmax(f->y_max, chart->series[i].y[k]);
        }
    if (chart->from_zero) f->y_min = fmin(f->y_min, 0);
    widen(&f->y_min, &f->y_max);
    f->y_step = nice_step(f->y_max - f->y_min, 6);
    f->y_min = floor(f->y_min / f->y_step) * f->y_step;
    f->y_max = ceil(f->y_max / f->y_step) * f->y_step;
    f->log_x = chart->log_x && f->x_min > 0 && log2(f->x_max) - log2(f->x_min) > 1e-9;
    if (!f->log_x) widen(&f->x_min, &f->x_max);
}

static void draw_y_axis(FILE *svg, const usp_frame *f) {
    char text[32];
    double step = f->y_step;
    for (int i = 0; f->y_min + i * step <= f->y_max + step / 2; i++) {
        double value = f->y_min + i * step, y = place_y(f, value);
        draw_line(svg, f->left, y, f->right, y, "#e4e4e4");
        format_tick(fabs(value) < step / 1e6 ? 0 : value, 0, text);
        draw_text(svg, f->left - 8, y + 4, "end", "", text);
    }
}

static void draw_x_tick(FILE *svg, const usp_frame *f, double value) {
    char text[32];
    double x = place_x(f, value);
    format_tick(value, f->log_x, text);
    draw_line(svg, x, f->bottom, x, f->bottom + 5, "#888");
    draw_text(svg, x, f->bottom + 20, "middle", "", text);
}

/* Powers of two, of four or more where they are many; else as along y. */
static void draw_x_axis(FILE *svg, const usp_frame *f) {
    draw_line(svg, f->left, f->bottom, f->right, f->bottom, "#888");
    if (f->log_x) {
        double low = ceil(log2(f->x_min)), high = log2(f->x_max), step = fmax(1, ceil((high - low) / 16));
        for (double power = low; power <= high; power += step) draw_x_tick(svg, f, exp2(power));
    } else {
        double step = nice_step(f->x_max - f->x_min, 8), first = ceil(f->x_min / step) * step;
        for (int i = 0; first + i * step <= f->x_max + step / 1e6; i++) {
            double value = first + i * step;
            draw_x_tick(svg, f, fabs(value) < step / 1e6 ? 0 : value);
        }
    }
}

/* ---- charts ---------------------------------------------------------------------------------------------------- */

/* Pixels that the longest name takes. */
static int name_width(const usp_chart *chart) {
    size_t longest = 0;
    for (int i = 0; i < chart->count; i++)
        if (strlen(chart->series[i].name) > longest) longest = strlen(chart->series[i].name);
    return (int)(7.2 * (double)longest);
}

static int larger(int a, int b) {
    return a > b ? a : b;
}

/* Room below the frame for as many names as there are. */
static int height_of(const usp_chart *chart) {
    return larger(HEIGHT, 80 + 20 * chart->count);
}

static void draw_legend(FILE *svg, const usp_frame *f, const usp_chart *chart) {
    for (int i = 0; i < chart->count; i++) {
        double y = f->top + 8 + 20 * i, x = f->right + 18;
        fprintf(svg,
                "<line x1=\"%.1f\" y1=\"%.1f\" x2=\"%.1f\" y2=\"%.1f\" stroke=\"%s\" stroke-width=\"3\" "
                "stroke-dasharray=\"%s\"/>\n",
                x, y - 4, x + 22, y - 4, color_of(i), dash_of(i));
        draw_text(svg, x + 29, y, "start", "", chart->series[i].name);
    }
}

/* Few points get marks; later series are thinner, so that one that lies on another leaves both to be seen. */
static void draw_series(FILE *svg, const usp_frame *f, const usp_series *s, int index, int count) {
    double width = 1.6 + (count > 1 ? 2.4 * (count - 1 - index) / (count - 1) : 0.4);
    fprintf(svg,
            "<polyline fill=\"none\" stroke=\"%s\" stroke-width=\"%.1f\" stroke-dasharray=\"%s\" "
            "stroke-linejoin=\"round\" points=\"",
            color_of(index), s->count > 30 ? width : 2.0, dash_of(index));
    for (size_t k = 0; k < s->count; k++) fprintf(svg, "%.1f,%.1f ", place_x(f, s->x[k]), place_y(f, s->y[k]));
    fputs("\"/>\n", svg);
    for (size_t k = 0; k < s->count && s->count <= 30; k++)
        fprintf(svg, "<circle cx=\"%.1f\" cy=\"%.1f\" r=\"3.2\" fill=\"%s\"><title>%g, %g</title></circle>\n",
                place_x(f, s->x[k]), place_y(f, s->y[k]), color_of(index), s->x[k], s->y[k]);
}

void usp_plot_lines(FILE *svg, const usp_chart *chart) {
    int height = height_of(chart);
    usp_frame f = {.left = 70, .right = WIDTH - LEGEND, .top = 72, .bottom = height - 60};
    find_range(chart, &f);
    begin(svg, WIDTH - LEGEND + larger(LEGEND, 60 + name_width(chart)), height, chart->title);
    draw_y_axis(svg, &f);
    draw_x_axis(svg, &f);
    draw_labels(svg, &f, chart->x_label, chart->y_label);
    for (int i = 0; i < chart->count; i++) draw_series(svg, &f, &chart->series[i], i, chart->count);
    draw_legend(svg, &f, chart);
    end(svg);
}

/* Bars lie, so that their names have room. */
static void draw_bar(FILE *svg, const usp_frame *f, const usp_series *s, double y) {
    char text[32];
    double width = f->x_max > 0 ? fmax(s->y[0], 0) / f->x_max * (f->right - f->left) : 0;
    fprintf(svg, "<rect x=\"%.1f\" y=\"%.1f\" width=\"%.1f\" height=\"18\" rx=\"2\" fill=\"%s\"/>\n", f->left, y, width,
            color_of(0));
    snprintf(text, sizeof text, "%.4g", s->y[0]);
    draw_text(svg, f->left - 8, y + 13, "end", "", s->name);
    draw_text(svg, f->left + width + 6, y + 13, "start", "fill=\"#666\"", text);
}

void usp_plot_bars(FILE *svg, const usp_chart *chart) {
    int height = 70 + 26 * chart->count + 50, left = larger(260, 20 + name_width(chart));
    usp_frame f = {.left = left, .right = left + 550, .top = 60, .bottom = height - 50};
    for (int i = 0; i < chart->count; i++) f.x_max = fmax(f.x_max, chart->series[i].y[0]);
    begin(svg, left + 640, height, chart->title);
    draw_line(svg, f.left, f.top - 4, f.left, f.bottom, "#888");
    for (int i = 0; i < chart->count; i++) draw_bar(svg, &f, &chart->series[i], f.top + 26 * i);
    draw_text(svg, f.left, f.bottom + 24, "start", "fill=\"#666\"", chart->y_label);
    end(svg);
}

/* ---- heat map -------------------------------------------------------------------------------------------------- */

/* From dark blue over green to yellow: also readable in grey. */
static void heat_color(double part, int rgb[3]) {
    static const int stops[5][3] = {{68, 1, 84}, {59, 82, 139}, {33, 145, 140}, {94, 201, 98}, {253, 231, 37}};
    double at = fmin(fmax(part, 0), 1) * 4;
    int low = at >= 4 ? 3 : (int)at;
    for (int i = 0; i < 3; i++) rgb[i] = (int)lround(stops[low][i] + (at - low) * (stops[low + 1][i] - stops[low][i]));
}

static void draw_cell(FILE *svg, double x, double y, double size, double value, double low, double high) {
    char text[32], style[64];
    int rgb[3];
    if (isnan(value)) {
        fprintf(svg, "<rect x=\"%.1f\" y=\"%.1f\" width=\"%.1f\" height=\"%.1f\" fill=\"#f2f2f2\"/>\n", x, y, size - 2,
                size - 2);
        return;
    }
    heat_color(high > low ? (value - low) / (high - low) : 1, rgb);
    fprintf(svg, "<rect x=\"%.1f\" y=\"%.1f\" width=\"%.1f\" height=\"%.1f\" fill=\"rgb(%d,%d,%d)\"/>\n", x, y,
            size - 2, size - 2, rgb[0], rgb[1], rgb[2]);
    int dark = 299 * rgb[0] + 587 * rgb[1] + 114 * rgb[2] < 140000;
    snprintf(style, sizeof style, "font-size=\"13\" fill=\"%s\"", dark ? "#fff" : "#222");
    snprintf(text, sizeof text, "%.4g", value);
    draw_text(svg, x + size / 2 - 1, y + size / 2 + 4, "middle", style, text);
}

static void heat_range(const usp_heatmap *map, double *low, double *high) {
    *low = INFINITY;
    *high = -INFINITY;
    for (int r = 0; r < map->rows; r++)
        for (int c = 0; c < map->columns; c++) {
            *low = fmin(*low, map->value[r][c]);
            *high = fmax(*high, map->value[r][c]);
        }
}

void usp_plot_heatmap(FILE *svg, const usp_heatmap *map) {
    double low, high, size = 72, left = 80, top = 66;
    int width = (int)(left + size * map->columns + 60), height = (int)(top + size * map->rows + 64);
    heat_range(map, &low, &high);
    begin(svg, width > 480 ? width : 480, height, map->title);
    for (int r = 0; r < map->rows; r++) {
        for (int c = 0; c < map->columns; c++)
            draw_cell(svg, left + size * c, top + size * r, size, map->value[r][c], low, high);
        draw_text(svg, left - 10, top + size * r + size / 2 + 4, "end", "", map->row_name[r]);
    }
    for (int c = 0; c < map->columns; c++)
        draw_text(svg, left + size * c + size / 2, top + size * map->rows + 18, "middle", "", map->column_name[c]);
    draw_text(svg, left + size * map->columns / 2, top + size * map->rows + 42, "middle", "fill=\"#666\"",
              map->x_label);
    draw_text(svg, 24, top - 10, "start", "fill=\"#666\"", map->y_label);
    end(svg);
}
