/* starter.c - the process that started the ranks of a job on this host. A launcher gives each rank variables of its
 * own, and shells, debuggers or timers between the two hand them on: so it is the first without them, going up. */
#define _GNU_SOURCE
#include "starter.h"
#include "hash.h"
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef struct usp_process {
    int id, parent;
    unsigned long long start;       /* in ticks of this boot: numbers of processes come again */
    unsigned long long code, stack; /* where its program and its stack begin; 0: that may not be known */
} usp_process;

static int open_about(int process, const char *what) {
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/%s", process, what);
    return open(path, O_RDONLY | O_CLOEXEC);
}

/* Whether there is such a process. Its program's name, in brackets, may hold anything. */
static int read_process(int id, usp_process *process) {
    char text[1024] = "";
    int file = open_about(id, "stat");
    ssize_t got = file < 0 ? -1 : read(file, text, sizeof text - 1);
    const char *rest = got > 0 ? strrchr(text, ')') : NULL;
    if (file >= 0) close(file);
    process->id = id;
    return rest && sscanf(rest,
                          ") %*c %d %*d %*d %*d %*d %*u %*u %*u %*u %*u %*u %*u %*d %*d %*d %*d %*d %*d %llu %*u %*d "
                          "%*u %llu %*u %llu",
                          &process->parent, &process->start, &process->code, &process->stack) == 4;
}

/* Finds "NAME=" at the begin of one of the strings that a process began with, read piece by piece. */
static int began_with(int process, const char *variable) {
    char piece[512];
    size_t length = strlen(variable), matched = 0; /* of NAME=; length + 2: not this string */
    ssize_t got;
    int file = open_about(process, "environ"), found = 0;
    if (file < 0) return 0;
    while (!found && (got = read(file, piece, sizeof piece)) > 0)
        for (ssize_t i = 0; i < got && !found; i++) {
            if (piece[i] == 0)
                matched = 0;
            else if (matched <= length)
                matched = piece[i] == (matched < length ? variable[matched] : '=') ? matched + 1 : length + 2;
            found = matched == length + 1;
        }
    close(file);
    return found;
}

/* A part of a script, or a process that another has split off, is that other one still: it lies in memory as that does.
 */
static usp_process whole_of(usp_process process) {
    usp_process parent;
    while (process.stack && process.parent > 0 && read_process(process.parent, &parent) &&
           parent.stack == process.stack && parent.code == process.code)
        process = parent;
    return process;
}

void usp_starter_name(const char *variable, char *name, size_t room) {
    usp_process process;
    name[0] = 0;
    for (int id = getppid(); id > 0; id = process.parent) {
        if (!read_process(id, &process)) return;
        if (began_with(id, variable)) continue;
        process = whole_of(process);
        snprintf(name, room, "%d.%llu.%016llx", process.id, process.start, (unsigned long long)usp_hash_boot(0));
        return;
    }
}
