/* linear.c - linear attention on the CPU: state totals of blocks, their scan, and outputs from scores and states.
 *
 * As in softmax.c a strip is a few rows of one head, and scores are stored [column][row]. Powers of lambda are formed
 * in double precision from integer distances and are never larger than 1. It knows no ranks and allocates nothing. */
#include <math.h>
#include <string.h>

#include "kernels.h"

enum { USP_SCAN_LINE = 1024 };

typedef struct usp_linear_strip {
    _Alignas(64) int32_t position[USP_CPU_BLOCK]; /* of rows */
    _Alignas(64) int32_t low[USP_CPU_BLOCK];      /* first and last row that a row may look at */
    _Alignas(64) int32_t high[USP_CPU_BLOCK];
    _Alignas(64) float weight[USP_CPU_BLOCK];                                     /* of rows */
    _Alignas(64) float band[2 * USP_CPU_BLOCK];                                   /* of pairs, by distance */
    _Alignas(64) float power[2 * USP_CPU_BLOCK];                                  /* lambda^i */
    int32_t column[USP_CPU_BLOCK], lowest[USP_CPU_BLOCK], highest[USP_CPU_BLOCK]; /* of columns; no bounds */
    float *row, *key, *value; /* [dim][width] queries, transposed; [block][dim]; [block][value_dim] */
    float *score, *out;       /* [block][width]; [width][value_dim] */
    float *state;             /* [block][value_dim, or dim if transposed]: a few lines of a state */
    const usp_panel *panel;
    const usp_linear *args;
    double log_decay;
    int dim, value_dim; /* padded */
    int block, width;   /* columns of a tile at most; rows, padded */
    int begin, count;   /* rows of the tensors */
    int batch, head;
} usp_linear_strip;

/* ---- strips ------------------------------------------------------------------------------------------------------ */

/* lambda^n; 1 for n = 0, also where lambda is 0. */
static double power(double log_decay, int64_t n) {
    return n ? exp(log_decay * (double)n) : 1;
}

static void strip_init(usp_linear_strip *s, const usp_panel *panel, const usp_linear *args) {
    float *free = args->scratch;
    s->panel = panel;
    s->args = args;
    s->dim = usp_cpu_pad(args->dim);
    s->value_dim = usp_cpu_pad(args->value_dim);
    s->block = usp_cpu_block(args->dim, args->value_dim);
    s->row = free, free += s->dim * s->block;
    s->key = free, free += s->dim * s->block;
    s->value = free, free += s->value_dim * s->block;
    s->score = free, free += s->block * s->block;
    s->out = free, free += s->value_dim * s->block;
    s->state = free;
    for (int i = 0; i < USP_CPU_BLOCK; i++) s->lowest[i] = INT32_MIN, s->highest[i] = INT32_MAX;
}

static void strip_head(usp_linear_strip *s, int batch, int head) {
    s->batch = batch;
    s->head = head;
    s->log_decay = s->args->log_decay ? s->args->log_decay[head] : 0;
    for (int i = 0; i < 2 * s->block; i++) s->power[i] = (float)power(s->log_decay, i);
}

static void strip_rows(usp_linear_strip *s, int begin, int end) {
    s->begin = begin;
    s->count = end - begin < s->block ? end - begin : s->block;
    s->width = usp_cpu_pad(s->count);
    for (int i = 0; i < s->width; i++) {
        int row = begin + i, own = i < s->count ? row : begin + s->count - 1; /* padding has no document */
        s->position[i] = row;
        s->low[i] = s->args->reverse ? row : s->args->begins ? s->args->begins[own] : INT32_MIN;
        s->high[i] = !s->args->reverse ? row : s->args->ends ? s->args->ends[own] : INT32_MAX;
    }
}

/* Does row i know a state that is before all rows from `begin` to `end` - 1 (reverse: behind)? */
static int sees_state(const usp_linear_strip *s, int i, int begin, int end) {
    return s->args->reverse ? s->high[i] >= end : s->low[i] < begin;
}

static void load_line(const usp_linear_strip *s, const usp_tensor *tensor, usp_head_map map, int64_t token, float *to,
                      int n) {
    usp_dtype dtype = s->args->dtype;
    s->panel->load(dtype, usp_cpu_row(tensor, dtype, token, s->batch, usp_cpu_head(map, s->head)), to, n);
}

static void load_queries(usp_linear_strip *s) {
    const usp_linear *a = s->args;
    float line[USP_CPU_DIM];
    if (s->count < s->width) memset(s->row, 0, sizeof *s->row * (size_t)(s->dim * s->width));
    for (int i = 0; i < s->count; i++) {
        load_line(s, &a->q, a->q_map, s->begin + i, line, a->dim);
        for (int c = 0; c < a->dim; c++) s->row[c * s->width + i] = a->scale * line[c];
    }
}

/* Rows of zeros follow up to a multiple of USP_CPU_ROWS, as products want. */
static void load_columns(usp_linear_strip *s, float *to, const usp_tensor *tensor, usp_head_map map, int dim, int begin,
                         int count) {
    int stride = usp_cpu_pad(dim), rows = (count + USP_CPU_ROWS - 1) / USP_CPU_ROWS * USP_CPU_ROWS;
    for (int j = 0; j < count; j++, to += stride) {
        load_line(s, tensor, map, begin + j, to, dim);
        memset(to + dim, 0, sizeof *to * (size_t)(stride - dim));
    }
    memset(to, 0, sizeof *to * (size_t)((rows - count) * stride));
}

/* weight[i] = lambda^(distance of row i), where the first row's distance is given and falls or rises by one a row. */
static void set_weights(usp_linear_strip *s, int64_t distance, int falling) {
    int64_t nearest = falling ? distance - (s->count - 1) : distance;
    double base = power(s->log_decay, nearest);
    for (int i = 0; i < s->width; i++) s->weight[i] = 0;
    for (int i = 0; i < s->count; i++) s->weight[i] = (float)(base * s->power[falling ? s->count - 1 - i : i]);
}

typedef void (*usp_block_fn)(usp_linear_strip *s, int index);

static usp_status run_blocks(usp_device *device, const usp_linear *args, usp_block_fn run) {
    usp_linear_strip strip;
    strip_init(&strip, usp_cpu_panel(device), args);
    for (int b = 0; b < args->batch; b++)
        for (int h = 0; h < args->heads; h++) {
            strip_head(&strip, b, h);
            for (int i = 0; i < args->blocks; i++) run(&strip, i);
        }
    return USP_OK;
}

static float *state_at(const usp_linear_strip *s, int index) {
    const usp_linear *a = s->args;
    return a->states + (((int64_t)index * a->batch + s->batch) * a->heads + s->head) * a->dim * a->value_dim;
}

/* ---- totals ------------------------------------------------------------------------------------------------------ */

/* One side of k_j v_j^T, and the tile for its rows. */
typedef struct usp_factor {
    const usp_tensor *tensor;
    usp_head_map map;
    int dim;
    float *tile;
} usp_factor;

/* A block of the state's lines, from `line` on: += sum over the strip's rows j of left_j (weight_j right_j)^T. */
static void add_totals(usp_linear_strip *s, const usp_factor *left, const usp_factor *right, int line) {
    int left_dim = usp_cpu_pad(left->dim), right_dim = usp_cpu_pad(right->dim);
    int lines = left_dim - line < s->block ? left_dim - line : s->block;
    load_columns(s, left->tile, left->tensor, left->map, left->dim, s->begin, s->count);
    load_columns(s, right->tile, right->tensor, right->map, right->dim, s->begin, s->count);
    s->panel->scale(right->tile, s->weight, s->count, right_dim);
    usp_product p = {.m = lines, .n = right_dim, .k = s->count, .accumulate = 1};
    p.a = left->tile + line, p.a_row = 1, p.a_step = left_dim;
    p.b = right->tile, p.b_row = right_dim;
    p.c = s->state, p.c_row = right_dim;
    s->panel->multiply(&p);
}

static void store_totals(const usp_linear_strip *s, int index, int left_dim, int right_dim, int line) {
    float *to = state_at(s, index) + (int64_t)line * right_dim;
    for (int i = 0; i < s->block && line + i < left_dim; i++)
        memcpy(to + (int64_t)i * right_dim, s->state + i * usp_cpu_pad(right_dim), sizeof *to * (size_t)right_dim);
}

/* The rows of the block's last document (reverse: of the first one): what the others hold does not leave the block. */
static void find_document(const usp_linear *a, const usp_block *block, int *begin, int *end) {
    *begin = block->begin, *end = block->begin + block->count;
    if (!a->begins || block->count == 0) return;
    int first = a->begins[*end - 1], last = a->ends[*begin];
    if (!a->reverse && first > *begin) *begin = first;
    if (a->reverse && last < *end - 1) *end = last + 1;
}

static void totals_block(usp_linear_strip *s, int index) {
    const usp_linear *a = s->args;
    const usp_block *block = a->block + index;
    usp_factor key = {&a->k, a->k_map, a->dim, s->key}, value = {&a->v, a->v_map, a->value_dim, s->value};
    const usp_factor *left = a->transposed ? &value : &key, *right = a->transposed ? &key : &value;
    int first, end;
    find_document(a, block, &first, &end);
    for (int line = 0; line < left->dim; line += s->block) {
        memset(s->state, 0, sizeof(float) * (size_t)(s->block * usp_cpu_pad(right->dim)));
        for (int begin = first; begin < end; begin += s->count) {
            strip_rows(s, begin, end);
            set_weights(s, (a->reverse ? begin - block->begin : end - 1 - begin) + a->shift, !a->reverse);
            add_totals(s, left, right, line);
        }
        store_totals(s, index, left->dim, right->dim, line);
    }
}

usp_status usp_cpu_linear_totals(usp_device *device, const usp_linear *args, usp_stream stream) {
    (void)stream;
    return run_blocks(device, args, totals_block);
}

/* ---- scan -------------------------------------------------------------------------------------------------------- */

/* Elements [at, at + n) of one head's states [begin, end), all of one group. */
static void scan_line(const usp_scan *a, int begin, int end, int64_t at, int64_t stride, double log_decay, float *x,
                      int n) {
    for (int i = 0; i < end - begin; i++) {
        int index = a->reverse ? end - 1 - i : begin + i;
        int anew = a->reverse ? a->step[index].ends : a->step[index].begins;
        int64_t place = a->place ? a->place[index] : index;
        float keep = (float)power(log_decay, a->step[index].length), *data = a->data + place * stride + at;
        for (int c = 0; c < n; c++) {
            float total = data[c];
            data[c] = x[c];
            x[c] = anew ? total : keep * x[c] + total;
        }
    }
}

static void scan_head(const usp_scan *a, int group, int begin, int end, int64_t row) {
    int64_t stride = (int64_t)a->batch * a->heads * a->elements;
    double log_decay = a->log_decay ? a->log_decay[row % a->heads] : 0;
    float x[USP_SCAN_LINE];
    for (int64_t c = 0; c < a->elements; c += USP_SCAN_LINE) {
        int n = (int)(a->elements - c < USP_SCAN_LINE ? a->elements - c : USP_SCAN_LINE);
        int64_t at = row * a->elements + c;
        memset(x, 0, sizeof x);
        if (a->initial) memcpy(x, a->initial + group * stride + at, sizeof *x * (size_t)n);
        scan_line(a, begin, end, at, stride, log_decay, x, n);
        if (a->final) memcpy(a->final + group * stride + at, x, sizeof *x * (size_t)n);
    }
}

usp_status usp_cpu_linear_scan(usp_device *device, const usp_scan *a, usp_stream stream) {
    (void)device, (void)stream;
    for (int group = 0, begin = 0, end = 0; group < a->groups; group++, begin = end) {
        while (end < a->states && a->step[end].group == group) end++;
        for (int64_t row = 0; row < (int64_t)a->batch * a->heads; row++) scan_head(a, group, begin, end, row);
    }
    return USP_OK;
}

/* ---- outputs ----------------------------------------------------------------------------------------------------- */

/* state[0 .. lines) = lines `first` .. of the state as [dim][value_dim], padded with zeros. */
static void load_state(usp_linear_strip *s, const float *from, int first, int lines) {
    const usp_linear *a = s->args;
    memset(s->state, 0, sizeof *s->state * (size_t)(lines * s->value_dim));
    for (int c = 0; c < lines; c++) {
        float *to = s->state + c * s->value_dim;
        if (!a->transposed) memcpy(to, from + (int64_t)(first + c) * a->value_dim, sizeof *to * (size_t)a->value_dim);
        for (int e = 0; a->transposed && e < a->value_dim; e++) to[e] = from[(int64_t)e * a->dim + first + c];
    }
}

/* out[i] = weight[i] * (scale q_i)^T state, 0 where that is not of the row's document. The state is before all rows
 * from `begin` to `end` - 1 (reverse: behind). */
static void apply_state(usp_linear_strip *s, const float *state, int begin, int end) {
    for (int first = 0; first < s->args->dim; first += s->block) {
        int lines = s->args->dim - first < s->block ? s->args->dim - first : s->block;
        usp_product p = {.m = s->width, .n = s->value_dim, .k = lines, .accumulate = first > 0};
        load_state(s, state, first, lines);
        p.a = s->row + first * s->width, p.a_row = 1, p.a_step = s->width;
        p.b = s->state, p.b_row = s->value_dim;
        p.c = s->out, p.c_row = s->value_dim;
        s->panel->multiply(&p);
    }
    s->panel->scale(s->out, s->weight, s->width, s->value_dim);
    for (int i = 0; i < s->width && s->args->begins; i++)
        if (!sees_state(s, i, begin, end)) memset(s->out + i * s->value_dim, 0, sizeof(float) * (size_t)s->value_dim);
}

/* score[j][i] *= lambda^(i - j) where column j is not after row i; by reverse, not before and j - i. */
static void decay_scores(usp_linear_strip *s, int begin, int count) {
    int sign = s->args->reverse ? -1 : 1, distances = s->width + count - 1;
    int64_t lowest = (int64_t)sign * (s->begin - begin) - (s->args->reverse ? s->count - 1 : count - 1);
    int64_t from = lowest > 0 ? lowest : 0;
    double base = power(s->log_decay, from);
    for (int n = 0; n < distances; n++) { /* band[n]: row i, column j of the tile with i - j = n - (count - 1) */
        int64_t distance = sign * ((int64_t)s->begin - begin + n - (count - 1));
        s->band[n] = distance >= from ? (float)(base * s->power[distance - from]) : 0;
    }
    for (int j = 0; j < count; j++)
        for (int i = 0; i < s->width; i++) s->score[j * s->width + i] *= s->band[i - j + count - 1];
}

/* Which columns come after a row, or are of another document; whether there are any. Bounds of rows ascend. */
static int find_view(usp_linear_strip *s, int begin, int count, usp_pair_view *view) {
    int masked = s->low[s->count - 1] > begin || s->high[0] < begin + count - 1;
    for (int j = 0; j < count && masked; j++) s->column[j] = begin + j;
    *view = (usp_pair_view){{s->position, s->low, s->high, NULL}, {s->column, s->lowest, s->highest, NULL}};
    return masked;
}

/* out[i] += sum over the columns j of the decayed scores times v_j. What comes after a row is left out before it is
 * multiplied, as in softmax.c. */
static void add_columns(usp_linear_strip *s, int begin, int count) {
    const usp_linear *a = s->args;
    usp_pair_view view;
    int masked = find_view(s, begin, count, &view);
    load_columns(s, s->key, &a->k, a->k_map, a->dim, begin, count);
    load_columns(s, s->value, &a->v, a->v_map, a->value_dim, begin, count);
    usp_product scores = {.m = (count + USP_CPU_ROWS - 1) / USP_CPU_ROWS * USP_CPU_ROWS, .n = s->width, .k = a->dim};
    scores.a = s->key, scores.a_row = s->dim, scores.a_step = 1;
    scores.b = s->row, scores.b_row = s->width;
    scores.c = s->score, scores.c_row = s->width;
    s->panel->multiply(&scores);
    if (masked) s->panel->mask((usp_scores){s->score, count, s->width}, &view, 0);
    decay_scores(s, begin, count);
    usp_product out = {.m = s->width, .n = s->value_dim, .k = count, .accumulate = 1};
    out.a = s->score, out.a_row = 1, out.a_step = s->width;
    out.b = s->value, out.b_row = s->value_dim;
    out.c = s->out, out.c_row = s->value_dim;
    if (masked && !s->panel->finite(s->value, count * s->value_dim)) out.view = &view;
    s->panel->multiply(&out);
}

static void store_out(usp_linear_strip *s) {
    const usp_linear *a = s->args;
    for (int i = 0; i < s->count; i++) {
        int64_t token = s->begin + i;
        float *acc = a->acc + ((token * a->batch + s->batch) * a->heads + s->head) * a->value_dim;
        float *row = s->out + i * s->value_dim;
        for (int c = 0; !a->first && c < a->value_dim; c++) row[c] += acc[c];
        if (a->last)
            s->panel->store(a->dtype, row, usp_cpu_row(&a->out, a->dtype, token, s->batch, s->head), a->value_dim);
        else
            memcpy(acc, row, sizeof *acc * (size_t)a->value_dim);
    }
}

static void output_block(usp_linear_strip *s, int index) {
    const usp_linear *a = s->args;
    const usp_block *block = a->block + index;
    int end = block->begin + block->count;
    for (int begin = block->begin; begin < end; begin += s->count) {
        strip_rows(s, begin, end);
        load_queries(s);
        set_weights(s, (a->reverse ? end - 1 - begin : begin - block->begin) + a->shift, a->reverse);
        apply_state(s, state_at(s, index), block->begin, end);
        int from = s->low[0] > block->begin ? s->low[0] : block->begin, last = s->high[s->count - 1];
        int to = last < end ? last + 1 : end;
        for (int j = from; j < to; j += s->block) add_columns(s, j, to - j < s->block ? to - j : s->block);
        store_out(s);
    }
}

usp_status usp_cpu_linear_output(usp_device *device, const usp_linear *args, usp_stream stream) {
    (void)stream;
    return run_blocks(device, args, output_block);
}

static void apply_block(usp_linear_strip *s, int index) {
    const usp_linear *a = s->args;
    const usp_block *block = a->block + index;
    int end = block->begin + block->count, first = block->begin - block->distance;
    for (int begin = block->begin; begin < end; begin += s->count) {
        int64_t before = (int64_t)block->distance + begin - block->begin;
        strip_rows(s, begin, end);
        load_queries(s);
        set_weights(s, (a->reverse ? block->chunk_rows - 1 - before : before) + a->shift, a->reverse);
        for (int i = 0; !a->causal && i < s->count; i++) s->weight[i] = 1;
        apply_state(s, state_at(s, block->chunk), first, first + block->chunk_rows);
        store_out(s);
    }
}

usp_status usp_cpu_linear_apply(usp_device *device, const usp_linear *args, usp_stream stream) {
    (void)stream;
    return run_blocks(device, args, apply_block);
}
