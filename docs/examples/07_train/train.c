/* train.c - trains the model on thread-ranks: a loop of draw, forward, backward, sum gradients, step.
 * The mesh (-u, -r, -d) decides who computes what and must not change what comes out: the loss curve is the same. */
#define _XOPEN_SOURCE 700
#include "adamw.h"
#include "model.h"
#include "options.h"
#include "random.h"
#include "text.h"

#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { HELD_OUT_WINDOWS = 16 };

/* What all ranks of this process share. Ranks write only their own parts, and read others' after a barrier. */
typedef struct trainer {
    options options;
    model_config model;
    text text;
    usp_rendezvous *rendezvous;
    pthread_barrier_t barrier;
    int ranks;
    size_t count;           /* of parameters */
    float *parameters;      /* [count] */
    float *sum;             /* [count]: gradients of all ranks */
    float **gradients;      /* [ranks][count] */
    unsigned char *decays;  /* [count] */
    double *loss, *counted; /* [ranks] */
    double *squares;        /* [ranks]: squared gradient norm of the rank's slice */
    adamw adamw;
    FILE *csv;
    double start;
} trainer;

/* One rank: its own world, model and tokens. */
typedef struct rank_state {
    trainer *shared;
    int rank, sequence_rank, copy;
    usp_world *world;
    model model;
    int32_t *whole, *labels; /* [tokens], [batch, local tokens] */
    int32_t *tokens;         /* [batch, local tokens] */
} rank_state;

static double seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* A trainer that cannot go on stops as a whole, the other ranks with it. */
static void must(usp_status status) {
    if (status == USP_OK) return;
    fprintf(stderr, "train: %s: %s\n", usp_status_string(status), usp_last_error());
    exit(1);
}

static void *must_allocate(size_t count, size_t size) {
    void *memory = calloc(count + 1, size);
    if (memory) return memory;
    fputs("train: out of memory\n", stderr);
    exit(1);
}

/* ---- data -------------------------------------------------------------------------------------------------------- */

/* Sequence `row` of this rank's batch: own tokens and their next-token labels. */
static void shard(rank_state *me, int row) {
    const usp_sequence *sequence = me->model.sequence;
    size_t local = me->model.local_tokens;
    int32_t *labels = me->labels + (size_t)row * local, *tokens = me->tokens + (size_t)row * local;
    must(usp_sequence_scatter(sequence, 1, sizeof *tokens, me->whole, tokens));
    must(usp_sequence_labels(sequence, me->whole, -1, labels));
    if (me->shared->options.plant == PLANT_LABEL && me->sequence_rank > 0)
        for (size_t i = 0; i + 1 < local; i++) labels[i] = tokens[i + 1]; /* shifted after sharding, as one must not */
}

/* The global batch is the same for every mesh: all draw all of it, and each copy keeps its part. */
static void draw_batch(rank_state *me, uint64_t *random) {
    const trainer *t = me->shared;
    for (int row = 0; row < t->options.batch; row++) {
        text_draw(&t->text.training, random, t->options.tokens, me->whole);
        if (row / t->model.batch == me->copy) shard(me, row % t->model.batch);
    }
}

static double counted_labels(const rank_state *me) {
    double counted = 0;
    for (size_t i = 0; i < me->model.rows; i++) counted += me->labels[i] >= 0;
    return counted;
}

/* ---- sums over ranks, always in rank order ----------------------------------------------------------------------- */

static double total(const double *values, int ranks) {
    double sum = 0;
    for (int i = 0; i < ranks; i++) sum += values[i];
    return sum;
}

/* Mean loss over all tokens of all ranks. */
static double share_loss(rank_state *me, double loss) {
    trainer *t = me->shared;
    t->loss[me->rank] = loss;
    t->counted[me->rank] = counted_labels(me);
    pthread_barrier_wait(&t->barrier);
    double mean = total(t->loss, t->ranks) / total(t->counted, t->ranks);
    pthread_barrier_wait(&t->barrier);
    return mean;
}

/* sum[begin, end) over ranks; returns its squared norm. */
static double sum_gradients(trainer *t, size_t begin, size_t end) {
    double squares = 0;
    for (size_t i = begin; i < end; i++) {
        double sum = 0;
        for (int rank = 0; rank < t->ranks; rank++) sum += t->gradients[rank][i];
        t->sum[i] = (float)sum;
        squares += sum * sum;
    }
    return squares;
}

/* Each rank sums and steps its slice of the parameters. */
static void step_parameters(rank_state *me, int step) {
    trainer *t = me->shared;
    size_t begin = t->count * (size_t)me->rank / (size_t)t->ranks;
    size_t end = t->count * ((size_t)me->rank + 1) / (size_t)t->ranks;
    t->squares[me->rank] = sum_gradients(t, begin, end);
    pthread_barrier_wait(&t->barrier);
    float scale = adamw_clip(&t->adamw, total(t->squares, t->ranks));
    adamw_step(&t->adamw, step, scale, begin, end, t->sum, t->parameters);
    pthread_barrier_wait(&t->barrier);
}

/* ---- the loop ---------------------------------------------------------------------------------------------------- */

static double train_step(rank_state *me, int step, uint64_t *random) {
    trainer *t = me->shared;
    float *gradients = t->gradients[me->rank], scale = 1.0f / (float)(t->options.batch * (t->options.tokens - 1));
    double loss;
    draw_batch(me, random);
    memset(gradients, 0, t->count * sizeof *gradients);
    must(model_forward(&me->model, t->parameters, me->tokens, me->labels, scale, &loss));
    must(model_backward(&me->model, t->parameters, me->tokens, gradients));
    double mean = share_loss(me, loss);
    step_parameters(me, step);
    return mean;
}

/* Mean loss over the same held-out windows each time, a global batch of them after the other. */
static double evaluate(rank_state *me) {
    const trainer *t = me->shared;
    int batch = t->options.batch, rounds = (HELD_OUT_WINDOWS + batch - 1) / batch;
    double sum = 0, loss;
    for (int round = 0; round < rounds; round++) {
        for (int row = 0; row < t->model.batch; row++) {
            int window = round * batch + me->copy * t->model.batch + row;
            text_spread(&t->text.held_out, window, rounds * batch, t->options.tokens, me->whole);
            shard(me, row);
        }
        must(model_forward(&me->model, t->parameters, me->tokens, me->labels, 0, &loss));
        sum += share_loss(me, loss);
    }
    return sum / rounds;
}

static void report(trainer *t, int step, double loss, int evaluated, double held_out) {
    if (t->csv) fprintf(t->csv, evaluated ? "%d,%.9g,%.9g\n" : "%d,%.9g,\n", step, loss, held_out);
    if (!evaluated) return;
    double tokens = (double)step * t->options.batch * t->options.tokens, took = seconds() - t->start;
    if (step == 0)
        printf("step    0                held-out %.4f\n", held_out);
    else
        printf("step %4d  train %.4f  held-out %.4f  %6.0f tokens/s  %5.1f s\n", step, loss, held_out, tokens / took,
               took);
    fflush(stdout);
}

/* Step 0 is the loss before any training. */
static void train(rank_state *me) {
    trainer *t = me->shared;
    uint64_t random = ~t->options.seed;
    double first = evaluate(me);
    if (me->rank == 0) report(t, 0, first, 1, first);
    for (int step = 1; step <= t->options.steps; step++) {
        double loss = train_step(me, step, &random), held_out = 0;
        int evaluated = step % t->options.evaluate == 0 || step == t->options.steps;
        if (evaluated) held_out = evaluate(me);
        if (me->rank == 0) report(t, step, loss, evaluated, held_out);
    }
}

/* ---- ranks ------------------------------------------------------------------------------------------------------- */

/* Every sequence rank but the first believes that its tokens come one later. */
static void plant_positions(rank_state *me) {
    int32_t *positions = must_allocate(me->model.local_tokens, sizeof *positions);
    must(usp_sequence_positions(me->model.sequence, positions));
    for (size_t i = 0; i < me->model.local_tokens; i++) positions[i] += me->sequence_rank > 0;
    model_set_positions(&me->model, positions);
    free(positions);
}

static void create_rank(rank_state *me) {
    trainer *t = me->shared;
    int size;
    usp_world_config config = {.struct_size = sizeof config, .device = USP_DEVICE_CPU};
    must(usp_world_create_threads(&config, t->rendezvous, me->rank, &me->world));
    must(model_create(me->world, &t->model, &me->model));
    must(usp_mesh_axis(me->model.mesh, USP_AXIS_SEQUENCE, &me->sequence_rank, &size));
    must(usp_mesh_axis(me->model.mesh, USP_AXIS_DATA, &me->copy, &size));
    me->whole = must_allocate((size_t)t->options.tokens, sizeof *me->whole);
    me->labels = must_allocate(me->model.rows, sizeof *me->labels);
    me->tokens = must_allocate(me->model.rows, sizeof *me->tokens);
    if (t->options.plant == PLANT_POSITION) plant_positions(me);
}

static void destroy_rank(rank_state *me) {
    free(me->whole), free(me->labels), free(me->tokens);
    model_destroy(&me->model);
    usp_world_destroy(me->world);
}

static void *run_rank(void *argument) {
    rank_state *me = argument;
    create_rank(me);
    train(me);
    destroy_rank(me);
    return NULL;
}

static void run_ranks(trainer *t) {
    pthread_t *thread = must_allocate((size_t)t->ranks, sizeof *thread);
    rank_state *state = must_allocate((size_t)t->ranks, sizeof *state);
    for (int rank = 0; rank < t->ranks; rank++) {
        state[rank] = (rank_state){.shared = t, .rank = rank};
        if (pthread_create(&thread[rank], NULL, run_rank, &state[rank]) != 0) must(USP_NO_MEMORY);
    }
    for (int rank = 0; rank < t->ranks; rank++) pthread_join(thread[rank], NULL);
    free(state);
    free(thread);
}

/* ---- the process ------------------------------------------------------------------------------------------------- */

static void csv_failed(const trainer *t) {
    fprintf(stderr, "train: cannot write %s: %s\n", t->options.csv, strerror(errno));
}

static int open_files(trainer *t) {
    const char *unreadable = NULL;
    int error = text_load(t->options.text, t->options.texts, &t->text, &unreadable);
    if (unreadable)
        fprintf(stderr, "train: cannot read %s: %s\n", unreadable, strerror(error));
    else if (error)
        fputs("train: too little text: 16 KiB are the least; of folders only files named *.md count\n", stderr);
    if (error) return -1;
    if (t->text.held_out.length < (size_t)t->options.tokens) {
        fprintf(stderr, "train: %d tokens are more than the held-out text has\n", t->options.tokens);
        return -1;
    }
    t->csv = t->options.csv ? fopen(t->options.csv, "w") : NULL;
    if (t->options.csv && !t->csv) return csv_failed(t), -1;
    if (t->csv) fputs("step,train,held_out\n", t->csv);
    return 0;
}

static void allocate(trainer *t) {
    const options *o = &t->options;
    t->ranks = o->ulysses * o->ring * o->copies;
    t->model = (model_config){.layers = 4,
                              .width = 96,
                              .heads = 4,
                              .hidden = 256,
                              .batch = o->batch / o->copies,
                              .tokens = o->tokens,
                              .ulysses = o->ulysses,
                              .ring = o->ring};
    t->count = model_layout_of(&t->model).count;
    t->parameters = must_allocate(t->count, sizeof(float));
    t->sum = must_allocate(t->count, sizeof(float));
    t->decays = must_allocate(t->count, 1);
    t->gradients = must_allocate((size_t)t->ranks, sizeof(float *));
    for (int rank = 0; rank < t->ranks; rank++) t->gradients[rank] = must_allocate(t->count, sizeof(float));
    t->loss = must_allocate((size_t)t->ranks, sizeof(double));
    t->counted = must_allocate((size_t)t->ranks, sizeof(double));
    t->squares = must_allocate((size_t)t->ranks, sizeof(double));
    t->adamw = (adamw){.rate = 3e-3f,
                       .decay = 0.1f,
                       .clip = 1,
                       .warmup = 20,
                       .steps = o->steps,
                       .first = must_allocate(t->count, sizeof(float)),
                       .second = must_allocate(t->count, sizeof(float)),
                       .decays = t->decays};
    model_initialise(&t->model, o->seed, t->parameters, t->decays);
}

static int release(trainer *t) {
    int failed = t->csv && fclose(t->csv) != 0;
    if (failed) csv_failed(t);
    for (int rank = 0; rank < t->ranks; rank++) free(t->gradients[rank]);
    free(t->parameters), free(t->sum), free(t->decays), free(t->gradients);
    free(t->loss), free(t->counted), free(t->squares), free(t->adamw.first), free(t->adamw.second);
    text_free(&t->text);
    return failed;
}

int main(int count, char **argument) {
    trainer t = {0};
    if (options_read(count, argument, &t.options) != 0) return 2;
    if (t.options.help) return options_help(), 0;
    if (open_files(&t) != 0) return text_free(&t.text), 1;
    allocate(&t);
    printf("%zu parameters, %zu bytes of text, ulysses %d x ring %d x data copies %d, %d x %d tokens a step\n", t.count,
           t.text.training.length + t.text.held_out.length, t.options.ulysses, t.options.ring, t.options.copies,
           t.options.batch, t.options.tokens);
    must(usp_rendezvous_create(t.ranks, &t.rendezvous));
    pthread_barrier_init(&t.barrier, NULL, (unsigned)t.ranks);
    t.start = seconds();
    run_ranks(&t);
    pthread_barrier_destroy(&t.barrier);
    usp_rendezvous_destroy(t.rendezvous);
    return release(&t);
}
