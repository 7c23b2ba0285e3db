/* check_model.c - compares the model's gradients with finite differences of its loss, one parameter tensor at a time.
 * It runs a tiny configuration on one rank; that meshes agree is the business of check_train.sh. */
#include "model.h"
#include "random.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { TOKENS = 24, BATCH = 2, DIRECTIONS = 4 };

typedef struct check {
    model model;
    float *parameters, *moved, *gradients;
    int32_t token[BATCH * TOKENS], label[BATCH * TOKENS];
    uint64_t random;
    int failures;
} check;

static void must(usp_status status) {
    if (status == USP_OK) return;
    fprintf(stderr, "check_model: %s: %s\n", usp_status_string(status), usp_last_error());
    exit(1);
}

static double loss_of(check *c, const float *parameters, float scale) {
    double loss;
    must(model_forward(&c->model, parameters, c->token, c->label, scale, &loss));
    return loss;
}

/* Difference quotient along `direction`, over [at, at + count). */
static double quotient(check *c, size_t at, size_t count, const double *direction) {
    double step = 0.004, loss[2];
    memcpy(c->moved, c->parameters, c->model.layout.count * sizeof(float));
    for (int side = 0; side < 2; side++) {
        for (size_t i = 0; i < count; i++)
            c->moved[at + i] = (float)(c->parameters[at + i] + (side ? step : -step) * direction[i]);
        loss[side] = loss_of(c, c->moved, 0);
    }
    return (loss[1] - loss[0]) / (2 * step);
}

/* Direction 0 is the gradient itself, 1 its largest element alone, the others are random; all of length 1. */
static void choose_direction(check *c, int which, const float *gradient, size_t count, double *direction) {
    double squares = 0;
    size_t largest = 0;
    for (size_t i = 0; i < count; i++) {
        if (fabsf(gradient[i]) > fabsf(gradient[largest])) largest = i;
        direction[i] = which == 0 ? gradient[i] : which == 1 ? 0 : random_normal(&c->random);
    }
    if (which == 1) direction[largest] = 1;
    for (size_t i = 0; i < count; i++) squares += direction[i] * direction[i];
    for (size_t i = 0; i < count; i++) direction[i] /= sqrt(squares);
}

static void check_tensor(check *c, const char *name, size_t at, size_t count) {
    const float *gradient = c->gradients + at;
    double *direction = malloc(count * sizeof *direction), norm = 0, worst = 0;
    if (!direction) must(USP_NO_MEMORY);
    for (size_t i = 0; i < count; i++) norm += (double)gradient[i] * gradient[i];
    norm = sqrt(norm);
    for (int which = 0; which < DIRECTIONS; which++) {
        double expected = 0;
        choose_direction(c, which, gradient, count, direction);
        for (size_t i = 0; i < count; i++) expected += gradient[i] * direction[i];
        double error = fabs(quotient(c, at, count, direction) - expected) / norm;
        if (!(error <= worst)) worst = error;
    }
    int good = norm > 0.01 && worst < 4e-3;
    printf("%-12s norm %8.4f  error %.1e  %s\n", name, norm, worst, good ? "ok" : "WRONG");
    c->failures += !good;
    free(direction);
}

static void check_block(check *c, int index) {
    const model_block *b = &c->model.layout.block[index];
    size_t width = (size_t)c->model.config.width, hidden = (size_t)c->model.config.hidden;
    printf("-- layer %d, %s\n", index, index % 2 == 0 ? "softmax" : "linear");
    check_tensor(c, "norm1", b->norm1, width);
    check_tensor(c, "qkv", b->qkv, 3 * width * width);
    check_tensor(c, "mixed_norm", b->mixed_norm, width);
    check_tensor(c, "out", b->out, width * width);
    check_tensor(c, "norm2", b->norm2, width);
    check_tensor(c, "gate_up", b->gate_up, 2 * width * hidden);
    check_tensor(c, "down", b->down, hidden * width);
}

static void prepare(check *c, usp_world *world) {
    model_config config = {
        .layers = 4, .width = 24, .heads = 3, .hidden = 20, .batch = BATCH, .tokens = TOKENS, .ulysses = 1, .ring = 1};
    must(model_create(world, &config, &c->model));
    size_t count = c->model.layout.count;
    unsigned char *decays = malloc(count);
    c->parameters = malloc(count * sizeof(float));
    c->moved = malloc(count * sizeof(float));
    c->gradients = calloc(count, sizeof(float));
    if (!decays || !c->parameters || !c->moved || !c->gradients) must(USP_NO_MEMORY);
    model_initialise(&config, 7, c->parameters, decays);
    for (size_t i = 0; i < BATCH * TOKENS; i++) c->token[i] = (int32_t)(random_bits(&c->random) % 16);
    for (size_t i = 0; i < BATCH * TOKENS; i++) c->label[i] = i % TOKENS == TOKENS - 1 ? -1 : c->token[i + 1];
    free(decays);
}

static void check_all(check *c) {
    const model_layout *layout = &c->model.layout;
    size_t width = (size_t)c->model.config.width;
    loss_of(c, c->parameters, 1);
    must(model_backward(&c->model, c->parameters, c->token, c->gradients));
    check_tensor(c, "embed", layout->embed, MODEL_VOCABULARY * width);
    for (int i = 0; i < c->model.config.layers; i++) check_block(c, i);
    puts("-- output");
    check_tensor(c, "norm", layout->norm, width);
    check_tensor(c, "head", layout->head, width * MODEL_VOCABULARY);
}

int main(void) {
    check c = {.random = 5};
    usp_rendezvous *rendezvous;
    usp_world *world;
    usp_world_config config = {.struct_size = sizeof config, .device = USP_DEVICE_CPU};
    must(usp_rendezvous_create(1, &rendezvous));
    must(usp_world_create_threads(&config, rendezvous, 0, &world));
    prepare(&c, world);
    check_all(&c);
    free(c.parameters), free(c.moved), free(c.gradients);
    model_destroy(&c.model);
    usp_world_destroy(world);
    usp_rendezvous_destroy(rendezvous);
    return c.failures != 0;
}
