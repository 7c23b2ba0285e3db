/* options.h - the trainer's command line.
 * It reads and checks; it opens nothing. */
#ifndef TRAIN_OPTIONS_H
#define TRAIN_OPTIONS_H
#include <stdint.h>

enum train_plant { PLANT_NONE, PLANT_POSITION, PLANT_LABEL };

typedef struct options {
    const char *const *text; /* paths, [texts] */
    int texts;
    const char *csv;
    int ulysses, ring, copies;
    int steps, batch, tokens, evaluate;
    uint64_t seed;
    enum train_plant plant;
    int help;
} options;

/* 0, or -1 after saying on stderr what is wrong. */
int options_read(int count, char **argument, options *to);
void options_help(void);

#endif
