/* model.h - a small hybrid language model: softmax and linear attention layers alternate, all else is token-wise.
 * One `model` is one rank's share: its own tokens, the parameters and gradients that it is given. */
#ifndef TRAIN_MODEL_H
#define TRAIN_MODEL_H
#include "usp.h"

enum { MODEL_VOCABULARY = 256, MODEL_LAYERS_MAX = 16 };

typedef struct model_config {
    int layers, width, heads, hidden;
    int batch;      /* sequences of this rank's data copy */
    int64_t tokens; /* of one whole sequence */
    int ulysses, ring;
} model_config;

/* Offsets of one layer's parameters in the flat parameter array. */
typedef struct model_block {
    size_t norm1, qkv, mixed_norm, out, norm2, gate_up, down;
} model_block;

typedef struct model_layout {
    size_t embed, norm, head, count;
    model_block block[MODEL_LAYERS_MAX];
} model_layout;

model_layout model_layout_of(const model_config *config);
/* The same parameters for the same seed, on any number of ranks. decays[i] is 1 where weight decay applies to i. */
void model_initialise(const model_config *config, uint64_t seed, float *parameters, unsigned char *decays);

/* What one layer's forward leaves for its backward; [rows, ...] with rows = batch * local tokens. */
typedef struct model_activations {
    float *input;    /* [width] */
    float *norm1;    /* [width] */
    float *qkv;      /* [3, heads, dim] */
    float *attended; /* [heads, dim] */
    float *normed;   /* [width] */
    float *middle;   /* [width] */
    float *norm2;    /* [width] */
    float *gate_up;  /* [2, hidden] */
    float *active;   /* [hidden] */
    void *saved;     /* the attention layer's own */
} model_activations;

typedef struct model {
    model_config config;
    model_layout layout;
    size_t rows, local_tokens;
    usp_mesh *mesh;
    usp_sequence *sequence;
    usp_layer *layer[MODEL_LAYERS_MAX];
    void *workspace;
    size_t workspace_bytes;
    model_activations activations[MODEL_LAYERS_MAX];
    float *last, *last_norm;              /* [rows, width] */
    float *logits;                        /* [rows, vocabulary] */
    float *turns;                         /* rotary table of own tokens */
    float *dx, *dwidth, *dhidden, *dwide; /* backward: [rows, width] twice, [rows, hidden], [rows, widest] */
} model;

/* Collective. */
usp_status model_create(usp_world *world, const model_config *config, model *m);
void model_destroy(model *m);

/* Replaces the positions of own tokens, which create takes from the sequence. */
void model_set_positions(model *m, const int32_t *positions);

/* token, label: [batch, local tokens]. *loss: the sum over own tokens with label >= 0. Where scale is not 0, logits
 * turn into the gradient of scale * loss and model_backward may follow: it adds, to gradients, this rank's part of the
 * gradient of scale * (the sum of all ranks' losses). Collective among the ranks of a data copy. */
usp_status model_forward(model *m, const float *parameters, const int32_t *token, const int32_t *label, float scale,
                         double *loss);
usp_status model_backward(model *m, const float *parameters, const int32_t *token, float *gradients);

#endif
