/* formulas.c - layers on inputs that show what is inside (see formulas.h). Judges by the words of lib/dropout.h and by
 * the oracle. */
#include "formulas.h"
#include "bodies.h"
#include "dropout.h"
#include "oracle.h"

#include <math.h>
#include <stdlib.h>

/* ---- inputs by a formula ----------------------------------------------------------------------------------------- */

typedef double (*formula)(int64_t token, int head, int x, double size);

static void write_part(usp_stage *stage, usp_part part, formula of, double size) {
    const usp_view *view = &stage->view[part];
    for (int b = 0; b < view->batch; b++)
        for (int64_t t = 0; t < view->tokens; t++)
            for (int h = 0; h < view->heads; h++)
                for (int x = 0; x < view->dim; x++)
                    usp_store(view->dtype, usp_view_at(view, &stage->memory[part], b, t, h, x),
                              of(usp_sequence_to_global(stage->sequence, stage->p, t), h, x, size));
}

/* Uploads what was written. */
static int finish_writing(usp_stage *stage, formula q, double size) {
    return usp_stage_set(stage, &(usp_spot){USP_Q, 0, q(0, 0, 0, size)});
}

static int open_and_fill(usp_rank *rank, const usp_case *c, usp_stage *stage) {
    if (usp_stage_open(rank, c, stage) != USP_OK) return usp_say(rank, "create: %s", usp_last_error());
    return usp_stage_fill(stage);
}

/* ---- which pairs are dropped ------------------------------------------------------------------------------------- */

enum { DROPPED = 48 }; /* tokens, and the dim of v: out[query][key] is the weight of a pair */

static double nothing(int64_t token, int head, int x, double size) {
    (void)token, (void)head, (void)x;
    return 0 * size;
}

static double one_hot(int64_t token, int head, int x, double size) {
    (void)head;
    return token == x ? size : 0;
}

static void check_dropped(usp_rank *rank, const usp_case *c, const float *out) {
    for (int64_t i = 0; i < (int64_t)c->batch * DROPPED * c->heads * DROPPED; i++) {
        int key = (int)(i % DROPPED), head = (int)(i / DROPPED % c->heads);
        int query = (int)(i / DROPPED / c->heads % DROPPED), batch = (int)(i / DROPPED / c->heads / DROPPED);
        uint64_t row = usp_dropout_row(usp_dropout_words[0], usp_dropout_words[1], (uint32_t)(batch * c->heads + head),
                                       (uint32_t)query);
        int kept = key <= query && usp_dropout_number(row, (uint32_t)key) >= usp_dropout_limit(c->dropout);
        if ((out[i] != 0) != kept) {
            usp_say(rank, "batch %d head %d: query %d has %g of key %d", batch, head, query, (double)out[i], key);
            return;
        }
    }
}

static int run_dropped(usp_rank *rank, usp_case c, usp_whole *first) {
    usp_stage stage;
    usp_whole whole;
    if (open_and_fill(rank, &c, &stage)) return 1;
    write_part(&stage, USP_Q, nothing, 0);
    write_part(&stage, USP_K, nothing, 0);
    write_part(&stage, USP_V, one_hot, 1);
    if (finish_writing(&stage, nothing, 0) || usp_stage_forward(&stage, 1) || usp_stage_gather(&stage, 0, &whole))
        return 1;
    if (rank->rank == 0) check_dropped(rank, &stage.c, whole.out);
    if (rank->rank == 0 && first->out) usp_compare_bits(rank, &c, "what dropout keeps", USP_SAME_OUT, &whole, first);
    if (first->out)
        usp_whole_free(&whole);
    else
        *first = whole;
    usp_stage_close(&stage);
    usp_count(rank);
    return 0;
}

int usp_body_dropped(usp_rank *rank, void *argument) {
    usp_whole first = {0};
    int failed = 0;
    (void)argument;
    for (int i = 0; i < (USP_LAYOUT_CUSTOM + 1) * USP_SPLITS && !failed; i++) {
        const usp_split *split = &usp_splits[i % USP_SPLITS];
        usp_case c = {.ulysses = split->ulysses,
                      .ring = split->ring,
                      .layout = (usp_layout)(i / USP_SPLITS),
                      .mask = USP_MASK_CAUSAL,
                      .tokens = DROPPED,
                      .value_dim = DROPPED,
                      .batch = 2,
                      .heads = 4,
                      .kv_heads = 2,
                      .dropout = 0.4f};
        if (c.layout == USP_LAYOUT_ZIGZAG_PER_DOCUMENT || split->ulysses * split->ring != rank->size) continue;
        failed = run_dropped(rank, c, &first);
    }
    usp_whole_free(&first);
    return failed;
}

/* ---- a common offset --------------------------------------------------------------------------------------------- */

enum { ROWS = 64, DIM = 128 };

static double near_offset(uint64_t tensor, int64_t token, int x, double offset) {
    return (double)(float)(offset + 0.1 * usp_random_at(1, tensor, (uint64_t)(token * DIM + x)));
}

static double offset_q(int64_t token, int head, int x, double size) {
    (void)head;
    return near_offset(USP_Q, token, x, size);
}

static double offset_k(int64_t token, int head, int x, double size) {
    (void)head;
    return near_offset(USP_K, token, x, -size);
}

/* The tensors of one head, with room for all that the oracle writes. */
typedef struct exact {
    double q[ROWS * DIM], k[ROWS * DIM], v[ROWS * DIM], dout[ROWS * DIM];
    double out[ROWS * DIM], lse[ROWS], dq[ROWS * DIM], dk[ROWS * DIM], dv[ROWS * DIM], state[2][DIM * DIM], head[2];
} exact;

static void answer_offset(const usp_case *c, double size, exact *e) {
    usp_oracle o = {.causal = 1, .batch = 1, .heads = 1, .key_heads = 1, .value_heads = 1};
    o.dim = o.value_dim = DIM;
    o.tokens = o.keys = ROWS;
    o.scale = (double)(1 / sqrtf(DIM));
    for (int i = 0; i < ROWS * DIM; i++) {
        e->q[i] = offset_q(i / DIM, 0, i % DIM, size);
        e->k[i] = offset_k(i / DIM, 0, i % DIM, size);
    }
    usp_whole_fill(USP_F32, e->v, ROWS * DIM, (uint64_t)c->seed, USP_V);
    usp_whole_fill(USP_F32, e->dout, ROWS * DIM, (uint64_t)c->seed, USP_DOUT);
    o.q = e->q, o.k = e->k, o.v = e->v, o.dout = e->dout;
    o.out = e->out, o.lse = e->lse, o.dq = e->dq, o.dk = e->dk, o.dv = e->dv;
    o.final_state = e->state[0], o.dinitial_state = e->state[1], o.dsinks = &e->head[0], o.max_logit = &e->head[1];
    usp_oracle_run(&o);
}

static int measure_offset(usp_rank *rank, double size, double *error) {
    usp_stage stage;
    usp_whole whole;
    usp_case c = {.tokens = ROWS, .mask = USP_MASK_CAUSAL, .heads = 1, .head_dim = DIM, .ring = rank->size, .seed = 1};
    if (open_and_fill(rank, &c, &stage)) return 1;
    write_part(&stage, USP_Q, offset_q, size);
    write_part(&stage, USP_K, offset_k, size);
    if (finish_writing(&stage, offset_q, size) || usp_stage_forward(&stage, 1) || usp_stage_backward(&stage) ||
        usp_stage_gather(&stage, 1, &whole))
        return 1;
    if (rank->rank == 0) {
        exact *e = malloc(sizeof *e);
        answer_offset(&stage.c, size, e);
        *error = usp_error_of(whole.dq, e->dq, ROWS * DIM).rms;
        free(e);
    }
    usp_whole_free(&whole);
    usp_stage_close(&stage);
    usp_count(rank);
    return 0;
}

int usp_body_offsets(usp_rank *rank, void *argument) {
    static const double lse[USP_OFFSETS] = {1, 100, 10000};
    usp_offsets *offsets = argument;
    for (int i = 0; i < USP_OFFSETS; i++)
        if (measure_offset(rank, sqrt(lse[i] / sqrt(DIM)), &offsets->dq[i])) return 1;
    return 0;
}
