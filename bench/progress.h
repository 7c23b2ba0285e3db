/* progress.h - a progress bar on standard error, only where that is a terminal.
 * NO_COLOR takes its colour away, --quiet or TERM=dumb the whole bar. */
#ifndef USP_PROGRESS_H
#define USP_PROGRESS_H
#include <stddef.h>

typedef struct usp_progress {
    int shown; /* 0: every call does nothing */
    int color, width;
    double begin, drawn; /* seconds of the monotonic clock */
    double total;
} usp_progress;

usp_progress usp_progress_open(size_t total, int quiet);
/* `done` of total; the label says what runs now. Draws at most ten times a second. */
void usp_progress_show(usp_progress *progress, double done, const char *label);
/* The line, drawn or not; from any thread. */
void usp_progress_erase(const usp_progress *progress);
/* Clears the line, before anything else is printed and at the end. */
void usp_progress_clear(usp_progress *progress);

#endif
