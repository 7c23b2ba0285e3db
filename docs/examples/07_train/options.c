/* options.c - the trainer's command line, as one table.
 * It reads and checks; it opens nothing. */
#include "options.h"

#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void options_help(void) {
    puts("usage: train [OPTION | TEXT]...\n"
         "Trains a small language model on each TEXT: a file, or all *.md files under a folder (default docs).\n"
         "Ranks are threads: data copies x ring x ulysses of them.\n"
         "  -u, --ulysses N   ranks that exchange heads (1)\n"
         "  -r, --ring N      ranks of the ring (1)\n"
         "  -d, --data N      data copies, each with its part of the batch (1)\n"
         "      --steps N     optimiser steps (200)\n"
         "      --batch N     sequences of the global batch, the same for every mesh (4)\n"
         "      --tokens N    tokens of a sequence (512)\n"
         "      --evaluate N  held-out loss every N steps and at the end (20)\n"
         "      --seed N      of weights and batches (1)\n"
         "      --csv FILE    writes step,train,held_out\n"
         "      --plant WHAT  plants an error where ranks share a sequence: position or label\n"
         "  -h, --help        this text");
}

/* `text` is NULL where nothing follows the option. */
static int refuse(const char *name, const char *wanted, const char *text) {
    if (text)
        fprintf(stderr, "train: %s wants %s, not '%s'\n", name, wanted, text);
    else
        fprintf(stderr, "train: %s wants %s\n", name, wanted);
    return -1;
}

static int read_number(const char *name, const char *text, int least, int *number) {
    char wanted[64], *end = NULL;
    long value = text ? strtol(text, &end, 10) : 0;
    snprintf(wanted, sizeof wanted, "a whole number of at least %d", least);
    if (!text || *text == 0 || *end != 0 || value < least || value > INT_MAX) return refuse(name, wanted, text);
    *number = (int)value;
    return 0;
}

static int read_plant(const char *text, options *to) {
    const char *plant = text ? text : "";
    to->plant = strcmp(plant, "position") == 0 ? PLANT_POSITION
                : strcmp(plant, "label") == 0  ? PLANT_LABEL
                                               : PLANT_NONE;
    return to->plant != PLANT_NONE ? 0 : refuse("--plant", "position or label", text);
}

static int read_csv(const char *text, options *to) {
    to->csv = text;
    return text ? 0 : refuse("--csv", "a file", NULL);
}

static int is(const char *argument, const char *name, const char *other) {
    return strcmp(argument, name) == 0 || strcmp(argument, other) == 0;
}

static int read_option(const char *name, const char *value, int *seed, options *to) {
    if (is(name, "-u", "--ulysses")) return read_number(name, value, 1, &to->ulysses);
    if (is(name, "-r", "--ring")) return read_number(name, value, 1, &to->ring);
    if (is(name, "-d", "--data")) return read_number(name, value, 1, &to->copies);
    if (is(name, "--steps", "")) return read_number(name, value, 1, &to->steps);
    if (is(name, "--batch", "")) return read_number(name, value, 1, &to->batch);
    if (is(name, "--tokens", "")) return read_number(name, value, 2, &to->tokens);
    if (is(name, "--evaluate", "")) return read_number(name, value, 1, &to->evaluate);
    if (is(name, "--seed", "")) return read_number(name, value, 0, seed);
    if (is(name, "--plant", "")) return read_plant(value, to);
    if (is(name, "--csv", "")) return read_csv(value, to);
    fprintf(stderr, "train: unknown option '%s'; --help lists all\n", name);
    return -1;
}

/* Options may stand anywhere; the texts between them move to the front of `argument`. */
static int read_all(int count, char **argument, int *seed, options *to) {
    int texts = 0;
    for (int i = 1; i < count; i++) {
        if (is(argument[i], "-h", "--help")) return to->help = 1, 0;
        if (argument[i][0] != '-')
            argument[texts++] = argument[i];
        else if (read_option(argument[i], i + 1 < count ? argument[i + 1] : NULL, seed, to) != 0)
            return -1;
        else
            i++;
    }
    if (texts == 0) return 0;
    to->text = (const char *const *)argument;
    to->texts = texts;
    return 0;
}

int options_read(int count, char **argument, options *to) {
    static const char *const docs = "docs";
    int seed = 1;
    *to = (options){.text = &docs,
                    .texts = 1,
                    .ulysses = 1,
                    .ring = 1,
                    .copies = 1,
                    .steps = 200,
                    .batch = 4,
                    .tokens = 512,
                    .evaluate = 20};
    if (read_all(count, argument, &seed, to) != 0) return -1;
    to->seed = (uint64_t)seed;
    if (to->batch % to->copies == 0) return 0;
    fprintf(stderr, "train: %d data copies do not divide a batch of %d sequences\n", to->copies, to->batch);
    return -1;
}
