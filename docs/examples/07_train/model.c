/* model.c - forward and backward of the model, each a straight line; libusp computes the attention layers.
 * It sums no gradients over ranks and moves no tokens: those are the trainer's and the library's work. */
#include "model.h"

#include "ops.h"
#include "random.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* ---- parameters -------------------------------------------------------------------------------------------------- */

static size_t take(size_t *next, size_t count) {
    size_t at = *next;
    *next += count;
    return at;
}

model_layout model_layout_of(const model_config *config) {
    size_t width = (size_t)config->width, hidden = (size_t)config->hidden, next = 0;
    model_layout layout = {.embed = take(&next, MODEL_VOCABULARY * width)};
    for (int i = 0; i < config->layers; i++) {
        model_block *block = &layout.block[i];
        block->norm1 = take(&next, width);
        block->qkv = take(&next, width * 3 * width);
        block->mixed_norm = take(&next, width);
        block->out = take(&next, width * width);
        block->norm2 = take(&next, width);
        block->gate_up = take(&next, width * 2 * hidden);
        block->down = take(&next, hidden * width);
    }
    layout.norm = take(&next, width);
    layout.head = take(&next, width * MODEL_VOCABULARY);
    layout.count = next;
    return layout;
}

typedef struct initialiser {
    uint64_t random;
    float *parameters;
    unsigned char *decays;
} initialiser;

static void set_matrix(initialiser *to, size_t at, size_t count, double deviation) {
    for (size_t i = at; i < at + count; i++) to->parameters[i] = (float)(deviation * random_normal(&to->random));
    memset(to->decays + at, 1, count);
}

static void set_gain(initialiser *to, size_t at, size_t count) {
    for (size_t i = at; i < at + count; i++) to->parameters[i] = 1;
    memset(to->decays + at, 0, count);
}

void model_initialise(const model_config *config, uint64_t seed, float *parameters, unsigned char *decays) {
    model_layout layout = model_layout_of(config);
    initialiser to = {seed, parameters, decays};
    size_t width = (size_t)config->width, hidden = (size_t)config->hidden;
    double in = 1 / sqrt((double)width), residual = 1 / sqrt(2.0 * config->layers);
    set_matrix(&to, layout.embed, MODEL_VOCABULARY * width, 1);
    for (int i = 0; i < config->layers; i++) {
        const model_block *block = &layout.block[i];
        set_gain(&to, block->norm1, width);
        set_matrix(&to, block->qkv, width * 3 * width, in);
        set_gain(&to, block->mixed_norm, width);
        set_matrix(&to, block->out, width * width, in * residual);
        set_gain(&to, block->norm2, width);
        set_matrix(&to, block->gate_up, width * 2 * hidden, in);
        set_matrix(&to, block->down, hidden * width, residual / sqrt((double)hidden));
    }
    set_gain(&to, layout.norm, width);
    set_matrix(&to, layout.head, width * MODEL_VOCABULARY, 0.1 * in);
}

/* ---- create ------------------------------------------------------------------------------------------------------ */

static usp_status create_layers(model *m) {
    const model_config *config = &m->config;
    float decay[64];
    for (int h = 0; h < config->heads; h++) decay[h] = log1pf(-ldexpf(1, -2 - h));
    for (int i = 0; i < config->layers; i++) {
        usp_layer_config layer = {
            .struct_size = sizeof layer,
            .attention = i % 2 == 0 ? USP_SOFTMAX : USP_LINEAR,
            .mask = USP_MASK_CAUSAL,
            .dtype = USP_F32,
            .batch = config->batch,
            .heads = config->heads,
            .head_dim = config->width / config->heads,
            .scale = 1 / sqrtf((float)(config->width / config->heads)),
            .decay = i % 2 == 0 ? NULL : decay,
        };
        usp_status status = usp_layer_create(m->mesh, m->sequence, &layer, &m->layer[i]);
        if (status != USP_OK) return status;
    }
    return USP_OK;
}

static usp_status create_objects(usp_world *world, model *m) {
    usp_status status = usp_mesh_create(world, m->config.ulysses, m->config.ring, &m->mesh);
    if (status != USP_OK) return status;
    usp_sequence_config sequence = {.struct_size = sizeof sequence, .tokens = m->config.tokens};
    status = usp_sequence_create(m->mesh, &sequence, &m->sequence);
    if (status != USP_OK) return status;
    return create_layers(m);
}

/* Memory for what the layers ask; aligned_alloc wants whole multiples of the alignment. */
static int allocate_saved(model *m) {
    size_t alignment = sizeof(void *);
    for (int i = 0; i < m->config.layers; i++) {
        usp_sizes sizes = {.struct_size = sizeof sizes};
        if (usp_layer_get_sizes(m->layer[i], &sizes) != USP_OK) return 0;
        size_t most =
            sizes.forward_workspace > sizes.backward_workspace ? sizes.forward_workspace : sizes.backward_workspace;
        if (sizes.alignment > alignment) alignment = sizes.alignment;
        if (most > m->workspace_bytes) m->workspace_bytes = most;
        m->activations[i].saved = aligned_alloc(alignment, (sizes.saved / alignment + 1) * alignment);
        if (!m->activations[i].saved) return 0;
    }
    m->workspace_bytes = (m->workspace_bytes / alignment + 1) * alignment;
    m->workspace = aligned_alloc(alignment, m->workspace_bytes);
    return m->workspace != NULL;
}

/* A rank may own no token at all: zero rows are fine everywhere, also here. */
static float *rows_of(const model *m, int columns) {
    return calloc(m->rows * (size_t)columns + 1, sizeof(float));
}

static int allocate_activations(model *m) {
    int width = m->config.width, hidden = m->config.hidden, complete = 1;
    for (int i = 0; i < m->config.layers; i++) {
        model_activations *a = &m->activations[i];
        *a = (model_activations){
            rows_of(m, width), rows_of(m, width), rows_of(m, 3 * width),  rows_of(m, width),  rows_of(m, width),
            rows_of(m, width), rows_of(m, width), rows_of(m, 2 * hidden), rows_of(m, hidden), NULL};
        complete = complete && a->input && a->norm1 && a->qkv && a->attended && a->normed && a->middle && a->norm2 &&
                   a->gate_up && a->active;
    }
    m->last = rows_of(m, width);
    m->last_norm = rows_of(m, width);
    m->logits = rows_of(m, MODEL_VOCABULARY);
    m->turns = calloc(m->local_tokens * (size_t)(width / m->config.heads) + 1, sizeof(float));
    m->dx = rows_of(m, width);
    m->dwidth = rows_of(m, width);
    m->dwide = rows_of(m, 4 * width > 2 * hidden ? 4 * width : 2 * hidden);
    m->dhidden = rows_of(m, hidden);
    return complete && m->last && m->last_norm && m->logits && m->turns && m->dx && m->dwidth && m->dwide && m->dhidden;
}

usp_status model_create(usp_world *world, const model_config *config, model *m) {
    *m = (model){.config = *config, .layout = model_layout_of(config)};
    usp_status status = create_objects(world, m);
    if (status != USP_OK) return status;
    m->local_tokens = (size_t)usp_sequence_own_tokens(m->sequence);
    m->rows = m->local_tokens * (size_t)config->batch;
    int32_t *positions = calloc(m->local_tokens + 1, sizeof *positions);
    if (!positions || !allocate_activations(m) || !allocate_saved(m))
        status = USP_NO_MEMORY;
    else
        status = usp_sequence_positions(m->sequence, positions);
    if (status == USP_OK) model_set_positions(m, positions);
    free(positions);
    return status;
}

void model_set_positions(model *m, const int32_t *positions) {
    rope_table(m->turns, positions, m->local_tokens, (size_t)(m->config.width / m->config.heads));
}

static void destroy_activations(model_activations *a) {
    free(a->input), free(a->norm1), free(a->qkv), free(a->attended), free(a->normed);
    free(a->middle), free(a->norm2), free(a->gate_up), free(a->active), free(a->saved);
}

void model_destroy(model *m) {
    for (int i = m->config.layers - 1; i >= 0; i--) {
        usp_layer_destroy(m->layer[i]);
        destroy_activations(&m->activations[i]);
    }
    usp_sequence_destroy(m->sequence);
    usp_mesh_destroy(m->mesh);
    free(m->workspace), free(m->last), free(m->last_norm), free(m->logits), free(m->turns);
    free(m->dx), free(m->dwidth), free(m->dwide), free(m->dhidden);
}

/* ---- attention: libusp works on strided views of the packed projection ------------------------------------------- */

/* Part 0, 1, 2 of qkv [batch, local tokens, 3, heads, dim]: q, k, v. */
static usp_tensor packed_part(const model *m, float *qkv, int part) {
    int64_t width = m->config.width;
    return (usp_tensor){qkv + part * width, (int64_t)m->local_tokens * 3 * width, 3 * width, width / m->config.heads};
}

static usp_tensor plain(const model *m, float *data) {
    int64_t width = m->config.width;
    return (usp_tensor){data, (int64_t)m->local_tokens * width, width, width / m->config.heads};
}

static usp_status attention_forward(model *m, int index) {
    model_activations *a = &m->activations[index];
    usp_forward args = {
        .struct_size = sizeof args,
        .q = packed_part(m, a->qkv, 0),
        .k = packed_part(m, a->qkv, 1),
        .v = packed_part(m, a->qkv, 2),
        .out = plain(m, a->attended),
        .saved = a->saved,
    };
    return usp_layer_forward(m->layer[index], &args, m->workspace, m->workspace_bytes, NULL);
}

static usp_status attention_backward(model *m, int index, float *dout, float *dqkv) {
    model_activations *a = &m->activations[index];
    usp_backward args = {
        .struct_size = sizeof args,
        .q = packed_part(m, a->qkv, 0),
        .k = packed_part(m, a->qkv, 1),
        .v = packed_part(m, a->qkv, 2),
        .out = plain(m, a->attended),
        .dout = plain(m, dout),
        .dq = packed_part(m, dqkv, 0),
        .dk = packed_part(m, dqkv, 1),
        .dv = packed_part(m, dqkv, 2),
        .saved = a->saved,
    };
    return usp_layer_backward(m->layer[index], &args, m->workspace, m->workspace_bytes, NULL);
}

/* ---- forward ----------------------------------------------------------------------------------------------------- */

/* y[rows, out] (+)= x[rows, in] weight[in, out] */
static void project(const model *m, float *y, const float *x, const float *weight, size_t in, size_t out, int add) {
    matmul(y, matrix_of(x, in), matrix_of(weight, out), m->rows, out, in, add);
}

/* next = middle + down(swiglu(gate_up(norm(middle)))), middle = input + out(norm(attend(qkv(norm(input))))) */
static usp_status block_forward(model *m, const float *parameters, int index, float *next) {
    model_activations *a = &m->activations[index];
    const model_block *p = &m->layout.block[index];
    size_t width = (size_t)m->config.width, hidden = (size_t)m->config.hidden, heads = (size_t)m->config.heads;
    size_t dim = width / heads;
    rmsnorm_forward(a->norm1, a->input, parameters + p->norm1, m->rows, width);
    project(m, a->qkv, a->norm1, parameters + p->qkv, width, 3 * width, 0);
    rope(a->qkv, m->turns, m->local_tokens, m->rows, heads, dim, 1);
    usp_status status = attention_forward(m, index);
    if (status != USP_OK) return status;
    rmsnorm_forward(a->normed, a->attended, parameters + p->mixed_norm, m->rows, width);
    memcpy(a->middle, a->input, m->rows * width * sizeof(float));
    project(m, a->middle, a->normed, parameters + p->out, width, width, 1);
    rmsnorm_forward(a->norm2, a->middle, parameters + p->norm2, m->rows, width);
    project(m, a->gate_up, a->norm2, parameters + p->gate_up, width, 2 * hidden, 0);
    swiglu_forward(a->active, a->gate_up, m->rows, hidden);
    memcpy(next, a->middle, m->rows * width * sizeof(float));
    project(m, next, a->active, parameters + p->down, hidden, width, 1);
    return USP_OK;
}

usp_status model_forward(model *m, const float *parameters, const int32_t *token, const int32_t *label, float scale,
                         double *loss) {
    size_t width = (size_t)m->config.width;
    int layers = m->config.layers;
    embed_forward(m->activations[0].input, parameters + m->layout.embed, token, m->rows, width);
    for (int i = 0; i < layers; i++) {
        usp_status status = block_forward(m, parameters, i, i + 1 < layers ? m->activations[i + 1].input : m->last);
        if (status != USP_OK) return status;
    }
    rmsnorm_forward(m->last_norm, m->last, parameters + m->layout.norm, m->rows, width);
    project(m, m->logits, m->last_norm, parameters + m->layout.head, width, MODEL_VOCABULARY, 0);
    *loss = cross_entropy(m->logits, label, m->rows, MODEL_VOCABULARY, scale);
    return USP_OK;
}

/* ---- backward: the same lines in reverse ------------------------------------------------------------------------- */

/* dx[rows, in] = dy weight^T; dweight += x^T dy */
static void project_backward(const model *m, float *dx, float *dweight, const float *dy, const float *x,
                             const float *weight, size_t in, size_t out) {
    matmul(dx, matrix_of(dy, out), matrix_transposed(weight, out), m->rows, in, out, 0);
    matmul(dweight, matrix_transposed(x, in), matrix_of(dy, out), in, out, m->rows, 1);
}

/* m->dx: gradient of middle + mlp(middle) on entry, of middle on return. */
static void mlp_backward(model *m, const float *parameters, float *gradients, int index) {
    model_activations *a = &m->activations[index];
    const model_block *p = &m->layout.block[index];
    size_t width = (size_t)m->config.width, hidden = (size_t)m->config.hidden;
    project_backward(m, m->dhidden, gradients + p->down, m->dx, a->active, parameters + p->down, hidden, width);
    swiglu_backward(m->dwide, m->dhidden, a->gate_up, m->rows, hidden);
    project_backward(m, m->dwidth, gradients + p->gate_up, m->dwide, a->norm2, parameters + p->gate_up, width,
                     2 * hidden);
    rmsnorm_backward(m->dx, gradients + p->norm2, m->dwidth, a->middle, parameters + p->norm2, m->rows, width);
}

/* m->dx: gradient of input + attention(input) on entry, of input on return. dwide: dout [width], dqkv [3 width]. */
static usp_status mixer_backward(model *m, const float *parameters, float *gradients, int index) {
    model_activations *a = &m->activations[index];
    const model_block *p = &m->layout.block[index];
    size_t width = (size_t)m->config.width, heads = (size_t)m->config.heads, dim = width / heads;
    float *dout = m->dwide, *dqkv = m->dwide + m->rows * width;
    project_backward(m, m->dwidth, gradients + p->out, m->dx, a->normed, parameters + p->out, width, width);
    memset(dout, 0, m->rows * width * sizeof(float));
    rmsnorm_backward(dout, gradients + p->mixed_norm, m->dwidth, a->attended, parameters + p->mixed_norm, m->rows,
                     width);
    usp_status status = attention_backward(m, index, dout, dqkv);
    if (status != USP_OK) return status;
    rope(dqkv, m->turns, m->local_tokens, m->rows, heads, dim, -1);
    project_backward(m, m->dwidth, gradients + p->qkv, dqkv, a->norm1, parameters + p->qkv, width, 3 * width);
    rmsnorm_backward(m->dx, gradients + p->norm1, m->dwidth, a->input, parameters + p->norm1, m->rows, width);
    return USP_OK;
}

usp_status model_backward(model *m, const float *parameters, const int32_t *token, float *gradients) {
    size_t width = (size_t)m->config.width;
    project_backward(m, m->dwidth, gradients + m->layout.head, m->logits, m->last_norm, parameters + m->layout.head,
                     width, MODEL_VOCABULARY);
    memset(m->dx, 0, m->rows * width * sizeof(float));
    rmsnorm_backward(m->dx, gradients + m->layout.norm, m->dwidth, m->last, parameters + m->layout.norm, m->rows,
                     width);
    for (int i = m->config.layers - 1; i >= 0; i--) {
        mlp_backward(m, parameters, gradients, i);
        usp_status status = mixer_backward(m, parameters, gradients, i);
        if (status != USP_OK) return status;
    }
    embed_backward(gradients + m->layout.embed, m->dx, token, m->rows, width);
    return USP_OK;
}
