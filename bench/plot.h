/* plot.h - draws line charts, bar charts and heat maps as SVG, with no library.
 * It knows series of numbers and their names, not where they come from. */
#ifndef USP_PLOT_H
#define USP_PLOT_H
#include <stddef.h>
#include <stdio.h>

enum { USP_PLOT_SERIES = 64 };

/* Numbers of either sign beyond this have no place: their range would be infinite. */
static const double USP_PLOT_LARGEST = 1e300;

typedef struct usp_series {
    char *name;
    double *x, *y; /* [count]; bars use y[0] alone */
    size_t count, capacity;
} usp_series;

typedef struct usp_chart {
    const char *title, *x_label, *y_label;
    int log_x; /* base 2 */
    int from_zero;
    usp_series series[USP_PLOT_SERIES];
    int count;
} usp_chart;

/* values [rows, columns], NaN for an empty cell; names as texts. */
typedef struct usp_heatmap {
    const char *title, *x_label, *y_label;
    int rows, columns;
    const char *row_name[USP_PLOT_SERIES], *column_name[USP_PLOT_SERIES];
    double value[USP_PLOT_SERIES][USP_PLOT_SERIES];
} usp_heatmap;

/* Adds a point to a series of the chart; the series is made at its first point. 0 on success, -1: too many, or no
 * memory. */
int usp_chart_add(usp_chart *chart, const char *series, double x, double y);
void usp_chart_free(usp_chart *chart);

void usp_plot_lines(FILE *svg, const usp_chart *chart);
void usp_plot_bars(FILE *svg, const usp_chart *chart);
void usp_plot_heatmap(FILE *svg, const usp_heatmap *map);

#endif
