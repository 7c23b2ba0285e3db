/* text.c - reads a tree of text files into two byte strings.
 * It interprets nothing: a token is a byte. */
#define _XOPEN_SOURCE 700
#include "text.h"

#include "random.h"

#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

enum { STRETCH = 2048, HELD_OUT_EVERY = 8, TEXT_LEAST = 16384, PATH_MOST = 4096 };

static int append(text_part *part, const unsigned char *bytes, size_t length) {
    unsigned char *grown = realloc(part->bytes, part->length + length);
    if (!grown) return ENOMEM;
    memcpy(grown + part->length, bytes, length);
    part->bytes = grown;
    part->length += length;
    return 0;
}

static int append_file(const char *path, text_part *whole) {
    unsigned char block[STRETCH];
    size_t got;
    int error = 0;
    FILE *file = fopen(path, "rb");
    if (!file) return errno;
    while (!error && (got = fread(block, 1, sizeof block, file)) > 0) error = append(whole, block, got);
    if (!error && ferror(file)) error = EIO;
    fclose(file);
    return error;
}

static int wanted(const struct dirent *entry) {
    size_t length = strlen(entry->d_name);
    int text_file = length > 3 && strcmp(entry->d_name + length - 3, ".md") == 0;
    return text_file || (entry->d_name[0] != '.' && !strchr(entry->d_name, '.'));
}

static int append_tree(const char *path, text_part *whole);

static int append_entry(const char *folder, const char *name, text_part *whole) {
    char path[PATH_MOST];
    struct stat info;
    if ((size_t)snprintf(path, sizeof path, "%s/%s", folder, name) >= sizeof path) return ENAMETOOLONG;
    if (stat(path, &info) != 0) return errno;
    if (S_ISDIR(info.st_mode)) return append_tree(path, whole);
    return strchr(name, '.') ? append_file(path, whole) : 0;
}

/* In order of names, so that the text is the same on every machine. */
static int append_tree(const char *path, text_part *whole) {
    struct dirent **entry;
    int error = 0, count = scandir(path, &entry, wanted, alphasort);
    if (count < 0) return errno;
    for (int i = 0; i < count; i++) {
        if (!error) error = append_entry(path, entry[i]->d_name, whole);
        free(entry[i]);
    }
    free(entry);
    return error;
}

static int split(const text_part *whole, text *t) {
    int error = whole->length < TEXT_LEAST ? EINVAL : 0;
    for (size_t at = 0, i = 0; !error && at < whole->length; at += STRETCH, i++) {
        size_t left = whole->length - at;
        text_part *part = i % HELD_OUT_EVERY == HELD_OUT_EVERY - 1 ? &t->held_out : &t->training;
        error = append(part, whole->bytes + at, left < STRETCH ? left : STRETCH);
    }
    return error;
}

static int append_path(const char *path, text_part *whole) {
    struct stat info;
    if (stat(path, &info) != 0) return errno;
    return S_ISDIR(info.st_mode) ? append_tree(path, whole) : append_file(path, whole);
}

int text_load(const char *const *path, int paths, text *t, const char **unreadable) {
    text_part whole = {0};
    int error = 0;
    *t = (text){0};
    for (int i = 0; !error && i < paths; i++) {
        error = append_path(path[i], &whole);
        *unreadable = error ? path[i] : NULL;
    }
    if (!error) error = split(&whole, t);
    if (error) text_free(t);
    free(whole.bytes);
    return error;
}

void text_free(text *t) {
    free(t->training.bytes);
    free(t->held_out.bytes);
    *t = (text){0};
}

static void copy_window(const text_part *part, size_t at, int64_t tokens, int32_t *window) {
    for (int64_t i = 0; i < tokens; i++) window[i] = part->bytes[at + (size_t)i];
}

void text_draw(const text_part *part, uint64_t *random, int64_t tokens, int32_t *window) {
    copy_window(part, random_bits(random) % (part->length - (size_t)tokens + 1), tokens, window);
}

void text_spread(const text_part *part, int64_t i, int64_t count, int64_t tokens, int32_t *window) {
    size_t places = part->length - (size_t)tokens;
    copy_window(part, places * (size_t)i / (size_t)count, tokens, window);
}
