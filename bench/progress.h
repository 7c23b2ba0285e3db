/* progress.h - a progress bar on standard error, only where that is a terminal; it fits any width at any time.
 * NO_COLOR takes its colour away, --quiet or TERM=dumb the whole bar. */
#ifndef USP_PROGRESS_H
#define USP_PROGRESS_H
#include <stdatomic.h>
#include <stddef.h>

typedef struct usp_progress {
    int shown; /* 0: every call does nothing */
    int color;
    atomic_int length;   /* columns that the bar takes as it was drawn last */
    double begin, drawn; /* seconds of the monotonic clock */
    double total;
} usp_progress;

usp_progress usp_progress_open(size_t total, int quiet);
/* `done` of total; the label says what runs now. Draws at most ten times a second. */
void usp_progress_show(usp_progress *progress, double done, const char *label);
/* Clears the line, drawn or not; from any thread. */
void usp_progress_erase(const usp_progress *progress);
/* Clears the line if it is drawn, before anything else is printed and at the end. */
void usp_progress_clear(usp_progress *progress);

#endif
