/* output.c - a temporary file beside the target, which takes its place by a rename.
 * Links are followed first, so that the target is replaced and not the link. */
#include "output.h"
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { MOST_LINKS = 40, MOST_TRIES = 100 };

static usp_status failure(usp_tool_error *error, const char *path) {
    return usp_tool_fail(error, USP_INVALID, "%s: cannot write: %s", path, strerror(errno));
}

/* ---- where a path leads ---------------------------------------------------------------------------------------- */

/* Length of what comes before the name: "a/b" -> 2. */
static int folder_length(const char *path) {
    const char *slash = strrchr(path, '/');
    return slash ? (int)(slash - path) + 1 : 0;
}

/* The own descriptor that a link in /proc stands for, as /dev/stdout leads to one; -1: it is no such link. */
static int descriptor_of(const char *path) {
    struct stat proc, link, there, own;
    int number = atoi(path + folder_length(path));
    if (stat("/proc/self/fd", &proc) || lstat(path, &link) || link.st_dev != proc.st_dev) return -1;
    if (stat(path, &there) || fstat(number, &own)) return -1;
    return there.st_dev == own.st_dev && there.st_ino == own.st_ino ? number : -1;
}

/* What the link at `path` says, seen from where `path` is; NULL: it is no link. */
static char *read_link(const char *path) {
    char text[PATH_MAX], *next;
    ssize_t length = readlink(path, text, sizeof text - 1);
    if (length < 0) return NULL;
    text[length] = 0;
    return asprintf(&next, "%.*s%s", text[0] == '/' ? 0 : folder_length(path), path, text) < 0 ? NULL : next;
}

/* Whether the file at the end of the links is there or not; NULL: no memory. */
static char *find_target(const char *path) {
    char *target = strdup(path);
    for (int links = 0; target && links < MOST_LINKS && descriptor_of(target) < 0; links++) {
        char *next = read_link(target);
        if (!next) break;
        free(target);
        target = next;
    }
    return target;
}

/* 1 if there is a folder that the file at `path` lies in. */
static int find_folder(const char *path, struct stat *folder) {
    char *name;
    if (asprintf(&name, "%.*s.", folder_length(path), path) < 0) return 0;
    int found = stat(name, folder) == 0;
    free(name);
    return found;
}

/* By the file where both are there, else by its name and its folder. */
static int same_target(const char *a, const char *b) {
    struct stat one, other;
    int there = stat(a, &one) == 0 && stat(b, &other) == 0;
    if (there && !S_ISREG(one.st_mode)) return 0;
    if (!there && strcmp(a + folder_length(a), b + folder_length(b))) return 0;
    if (!there && (!find_folder(a, &one) || !find_folder(b, &other))) return 0;
    return one.st_dev == other.st_dev && one.st_ino == other.st_ino;
}

int usp_output_same(const char *a, const char *b) {
    char *one = find_target(a), *other = find_target(b);
    int same = one && other && same_target(one, other);
    free(one);
    free(other);
    return same;
}

/* ---- open and close -------------------------------------------------------------------------------------------- */

/* A device, a pipe, or what an own descriptor leads to. */
static int open_itself(const char *target) {
    int descriptor = descriptor_of(target);
    if (descriptor >= 0) return fcntl(descriptor, F_DUPFD_CLOEXEC, 0);
    return open(target, O_WRONLY | O_CLOEXEC | O_NOCTTY);
}

/* A new file with the mode of the one that it will replace. The longest names leave no room for more behind them. */
static int open_beside(usp_output *output, const struct stat *there) {
    const char *target = output->target;
    int file = -1, folder = folder_length(target);
    if (there && access(target, W_OK)) return -1;
    errno = EEXIST;
    for (int i = 0; i < MOST_TRIES && file < 0 && errno == EEXIST; i++) {
        free(output->temporary);
        if (asprintf(&output->temporary, "%.*s%.200s.%ld-%d", folder, target, target + folder, (long)getpid(), i) < 0)
            output->temporary = NULL;
        if (!output->temporary) return -1;
        file = open(output->temporary, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    }
    if (file >= 0 && there) fchmod(file, there->st_mode & 0777);
    return file;
}

static int open_target(usp_output *output) {
    struct stat there;
    int found = stat(output->target, &there) == 0;
    if (!found && errno != ENOENT) return -1;
    int replaceable = !found || (S_ISREG(there.st_mode) && descriptor_of(output->target) < 0);
    return replaceable ? open_beside(output, found ? &there : NULL) : open_itself(output->target);
}

static void forget(usp_output *output) {
    free(output->temporary);
    free(output->target);
    *output = (usp_output){.stream = NULL};
}

usp_status usp_output_open(usp_output *output, const char *path, usp_tool_error *error) {
    *output = (usp_output){.path = path, .target = find_target(path)};
    int file = output->target ? open_target(output) : -1;
    if (file >= 0) output->stream = fdopen(file, "w");
    if (output->stream) return USP_OK;
    usp_status status = failure(error, path);
    if (file >= 0) close(file);
    if (file >= 0 && output->temporary) unlink(output->temporary);
    forget(output);
    return status;
}

usp_status usp_output_close(usp_output *output, usp_status status, usp_tool_error *error) {
    if (!output->stream) return status;
    int bad = fflush(output->stream) || ferror(output->stream), why = errno;
    if (fclose(output->stream) && !bad) bad = 1, why = errno;
    errno = why;
    if (status == USP_OK && bad) status = failure(error, output->path);
    if (status == USP_OK && output->temporary && rename(output->temporary, output->target))
        status = failure(error, output->path);
    if (status != USP_OK && output->temporary) unlink(output->temporary);
    forget(output);
    return status;
}
