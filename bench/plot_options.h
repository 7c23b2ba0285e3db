/* plot_options.h - the command line of usp_plot.
 * Every option is documented here once, in the text that --help prints. */
#ifndef USP_PLOT_OPTIONS_H
#define USP_PLOT_OPTIONS_H
#include "tool.h"

enum { USP_PLOT_FILES = 16, USP_PLOT_WHERE = 16 };

typedef enum usp_plot_type {
    USP_PLOT_AUTO = 0,
    USP_PLOT_LINE = 1,
    USP_PLOT_BARS = 2,
    USP_PLOT_HEATMAP = 3
} usp_plot_type;

typedef struct usp_plot_options {
    const char *file[USP_PLOT_FILES], *output, *title, *x, *y;
    char *where[USP_PLOT_WHERE]; /* "column=value" */
    int files, wheres, log_x;
    int type; /* usp_plot_type */
} usp_plot_options;

/* Leaves the program with a message on a wrong command line, or after --help and --version. */
void usp_plot_options_parse(usp_plot_options *options, int argc, char **argv);

#endif
