/* test_refusals.c - values that no call may take: tensors that are not aligned, numbers that are no pass, no operand or
 * no scale. Each is refused by name, before anything moves. Runs nothing to its end. */
#include "expect.h"
#include "stage.h"

#include <math.h>
#include <stddef.h>
#include <string.h>

enum { SECONDS = 60 };

static void expect_refusal(usp_rank *rank, const char *what, const char *name, usp_status status) {
    if (status != USP_INVALID || !strstr(usp_last_error(), name))
        usp_say(rank, "%s: %s: %s, \"%s\"", what, name, usp_status_string(status), usp_last_error());
    usp_count(rank);
}

/* ---- tensors ----------------------------------------------------------------------------------------------------- */

typedef struct place {
    const char *name;
    size_t offset; /* of the tensor's address */
} place;

static const place forward_places[] = {{"usp_forward.q.data", offsetof(usp_forward, q.data)},
                                       {"usp_forward.k.data", offsetof(usp_forward, k.data)},
                                       {"usp_forward.v.data", offsetof(usp_forward, v.data)},
                                       {"usp_forward.out.data", offsetof(usp_forward, out.data)}};

static const place backward_places[] = {{"usp_backward.q.data", offsetof(usp_backward, q.data)},
                                        {"usp_backward.k.data", offsetof(usp_backward, k.data)},
                                        {"usp_backward.v.data", offsetof(usp_backward, v.data)},
                                        {"usp_backward.out.data", offsetof(usp_backward, out.data)},
                                        {"usp_backward.dout.data", offsetof(usp_backward, dout.data)},
                                        {"usp_backward.dq.data", offsetof(usp_backward, dq.data)},
                                        {"usp_backward.dk.data", offsetof(usp_backward, dk.data)},
                                        {"usp_backward.dv.data", offsetof(usp_backward, dv.data)}};

/* Moves the address by less than one element. */
static void misalign(void *arguments, size_t offset) {
    char *address;
    memcpy(&address, (char *)arguments + offset, sizeof address);
    address++;
    memcpy((char *)arguments + offset, &address, sizeof address);
}

static void try_alignment(usp_stage *s) {
    void *workspace = s->workspace.device;
    for (int i = 0; i < (int)(sizeof forward_places / sizeof forward_places[0]); i++) {
        usp_forward f = usp_stage_forward_arguments(s, 1);
        misalign(&f, forward_places[i].offset);
        expect_refusal(s->rank, "forward", forward_places[i].name,
                       usp_layer_forward(s->layer, &f, workspace, s->workspace.bytes, NULL));
        expect_refusal(s->rank, "inner forward", forward_places[i].name,
                       usp_layer_inner_forward(s->layer, &f, workspace, s->workspace.bytes, NULL));
    }
    for (int i = 0; i < (int)(sizeof backward_places / sizeof backward_places[0]); i++) {
        usp_backward b = usp_stage_backward_arguments(s);
        misalign(&b, backward_places[i].offset);
        expect_refusal(s->rank, "backward", backward_places[i].name,
                       usp_layer_backward(s->layer, &b, workspace, s->workspace.bytes, NULL));
        expect_refusal(s->rank, "inner backward", backward_places[i].name,
                       usp_layer_inner_backward(s->layer, &b, workspace, s->workspace.bytes, NULL));
    }
}

/* ---- the head exchange and the cost ------------------------------------------------------------------------------ */

static void try_operands(usp_stage *s) {
    static const int wrong[] = {-1, USP_OUT + 1, 1000};
    usp_forward f = usp_stage_forward_arguments(s, 1);
    usp_tensor odd = f.q;
    void *workspace = s->workspace.device;
    size_t bytes = s->workspace.bytes;
    odd.data = (char *)odd.data + 1;
    for (int i = 0; i < 3; i++) {
        usp_operand operand = (usp_operand)wrong[i];
        expect_refusal(s->rank, "to heads", "operand",
                       usp_layer_tokens_to_heads(s->layer, operand, &f.q, &f.out, workspace, bytes, NULL));
        expect_refusal(s->rank, "to tokens", "operand",
                       usp_layer_heads_to_tokens(s->layer, operand, &f.q, &f.out, workspace, bytes, NULL));
    }
    expect_refusal(s->rank, "to heads", "tokens.data",
                   usp_layer_tokens_to_heads(s->layer, USP_QUERY, &odd, &f.out, workspace, bytes, NULL));
    expect_refusal(s->rank, "to tokens", "heads.data",
                   usp_layer_heads_to_tokens(s->layer, USP_QUERY, &odd, &f.out, workspace, bytes, NULL));
}

static void try_passes(usp_stage *s) {
    static const int wrong[] = {-1, 2};
    for (int i = 0; i < 2; i++) {
        usp_cost cost = {.struct_size = sizeof cost};
        expect_refusal(s->rank, "cost", "pass", usp_layer_get_cost(s->layer, (usp_pass)wrong[i], &cost));
        if (cost.flops != 0) usp_say(s->rank, "a refused call writes");
    }
}

/* The last four only where backward divides by the scale. */
static void try_scales(usp_stage *s) {
    static const float wrong[] = {-1, -1e-30f, INFINITY, -INFINITY, NAN, 1e-39f, 1e-38f, 0x1.fffffep-65f, 1e20f};
    int linear = s->c.attention == USP_LINEAR;
    for (int i = 0; i < (linear ? 9 : 5); i++) {
        usp_layer *layer = NULL;
        usp_layer_config config = {.struct_size = sizeof config,
                                   .attention = s->c.attention,
                                   .mask = USP_MASK_CAUSAL,
                                   .batch = 1,
                                   .heads = 2,
                                   .head_dim = 8,
                                   .scale = wrong[i],
                                   .final_state = linear};
        expect_refusal(s->rank, "create", "usp_layer_config.scale",
                       usp_layer_create(s->mesh, s->sequence, &config, &layer));
        usp_layer_destroy(layer);
    }
}

/* All ranks err alike, so nobody waits; then the layer must still run. */
static int refusals(usp_rank *rank, void *argument) {
    static const usp_case cases[] = {{.tokens = 40, .mask = USP_MASK_CAUSAL},
                                     {.tokens = 40, .dtype = USP_BF16},
                                     {.attention = USP_LINEAR, .tokens = 40, .mask = USP_MASK_CAUSAL}};
    (void)argument;
    for (int i = 0; i < 3; i++) {
        usp_stage stage;
        usp_case c = cases[i];
        c.ulysses = rank->size;
        if (usp_stage_open(rank, &c, &stage) != USP_OK) return usp_say(rank, "%s", usp_last_error());
        if (usp_stage_fill(&stage)) return 1;
        try_alignment(&stage);
        try_operands(&stage);
        try_passes(&stage);
        try_scales(&stage);
        if (usp_stage_forward(&stage, 1) || usp_stage_backward(&stage)) return 1;
        usp_stage_close(&stage);
    }
    return 0;
}

Test(refusals, by_name) {
    usp_expect_ranks(1, SECONDS, refusals, NULL);
    usp_expect_ranks(2, SECONDS, refusals, NULL);
}
