/* progress.c - draws the bar by a carriage return.
 * It keeps no thread and no signal handler: callers say where they are. */
#include "progress.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

static int terminal_width(void) {
    struct winsize size = {0};
    int known = ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 0;
    return known ? size.ws_col : 80;
}

usp_progress usp_progress_open(size_t total, int quiet) {
    const char *terminal = getenv("TERM"), *no_color = getenv("NO_COLOR");
    int dumb = !terminal || strcmp(terminal, "dumb") == 0;
    return (usp_progress){.shown = !quiet && !dumb && isatty(STDERR_FILENO),
                          .color = !no_color || !*no_color,
                          .begin = now(),
                          .total = (double)total};
}

/* Terminals that have become narrower since show the line on several. */
void usp_progress_erase(const usp_progress *progress) {
    int above = progress->length ? (progress->length - 1) / terminal_width() : 0;
    if (!progress->shown) return;
    if (above) fprintf(stderr, "\033[%dA", above);
    fputs("\r\033[J", stderr);
    fflush(stderr);
}

/* The last column stays free: what fills it may wrap. */
static void draw_bar(usp_progress *progress, double part, const char *label) {
    char text[160];
    int width = terminal_width(), cells = width / 4, full = (int)(part * cells + 0.5), room = width - 1 - cells;
    double spent = now() - progress->begin, left = part > 0 ? spent / part - spent : 0;
    int length = snprintf(text, sizeof text, " %3.0f %%  %d:%02d left  %.100s", 100 * part, (int)left / 60,
                          (int)left % 60, width > 60 ? label : "");
    fputs(progress->color ? "\033[36m" : "", stderr);
    for (int i = 0; i < cells; i++) fputc(i < full ? '#' : '.', stderr);
    fprintf(stderr, "%s%.*s", progress->color ? "\033[0m" : "", room, text);
    fflush(stderr);
    progress->length = cells + (length < room ? length : room);
}

void usp_progress_show(usp_progress *progress, double done, const char *label) {
    if (!progress->shown || now() - progress->drawn < 0.1) return;
    double part = progress->total > 0 ? done / progress->total : 1;
    usp_progress_erase(progress);
    draw_bar(progress, part > 1 ? 1 : part, label);
    progress->drawn = now();
}

void usp_progress_clear(usp_progress *progress) {
    if (progress->drawn <= 0) return;
    usp_progress_erase(progress);
    progress->drawn = 0;
    progress->length = 0;
}
