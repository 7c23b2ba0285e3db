/* text.h - the bytes that the model learns from: all *.md files under a folder, split into training and held-out text.
 * It draws windows by a caller's random state, so that every rank draws the same ones. */
#ifndef TRAIN_TEXT_H
#define TRAIN_TEXT_H
#include <stddef.h>
#include <stdint.h>

typedef struct text_part {
    unsigned char *bytes;
    size_t length;
} text_part;

typedef struct text {
    text_part training, held_out;
} text;

/* Each path is a file, or a folder that is searched to any depth for files ending in .md, in order of their names.
 * Every eighth stretch of 2 KiB is held out. 0 on success; else errno's value with the path that cannot be
 * read, or EINVAL and NULL for less than 16 KiB. */
int text_load(const char *const *path, int paths, text *t, const char **unreadable);
void text_free(text *t);

/* One window of `tokens` bytes at a random place. */
void text_draw(const text_part *part, uint64_t *random, int64_t tokens, int32_t *window);
/* Window i of `count` windows spread evenly over the part. */
void text_spread(const text_part *part, int64_t i, int64_t count, int64_t tokens, int32_t *window);

#endif
