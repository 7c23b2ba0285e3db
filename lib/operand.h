/* operand.h - what goes into a call and comes out of it, as rows of a table: each attention kind lists its operands,
 * and the call walks the list. A new kind's tensors, gates, states and scales are rows, not code. */
#ifndef USP_OPERAND_H
#define USP_OPERAND_H
#include "usp.h"

typedef enum usp_form {
    USP_FORM_TENSOR, /* usp_tensor of the layer's dtype: [batch, tokens, heads, dim] */
    USP_FORM_ROWS,   /* fp32 numbers, one a token: [batch, heads, tokens] */
    USP_FORM_STATES, /* fp32 [batch, heads, head_dim, value_dim] */
    USP_FORM_HEADS,  /* fp32 [heads] */
    USP_FORM_SHARED  /* device memory that the kind reads as it is */
} usp_form;

typedef enum usp_use {
    USP_USE_IN,      /* of own tokens and all heads, wanted for own heads */
    USP_USE_KEPT,    /* the same, once: backward finds what forward was given */
    USP_USE_DERIVED, /* the same, but found from the others by the kind's `derive` before it travels */
    USP_USE_LOCAL,   /* read by `derive` alone */
    USP_USE_OUT      /* of own heads, wanted for own tokens; parts of a shared head are summed */
} usp_use;

typedef struct usp_operand_row {
    const char *name; /* "usp_forward.q" */
    size_t given;     /* offset in usp_forward or usp_backward: a usp_tensor, or a pointer; not of what is derived */
    size_t inner;     /* offset in usp_inner: the same */
    usp_form form;
    usp_operand like; /* has its tokens and heads */
    usp_use use;
    int bundle;   /* neighbouring rows of one number, but 0, travel together */
    size_t asked; /* offset in usp_layer_config of what asks for it; 0: nothing has to */
} usp_operand_row;

/* For tables of rows: a field's name and place; where it is in usp_inner; what asks for it. */
#define USP_GIVEN(struct_, field) #struct_ "." #field, offsetof(struct_, field)
#define USP_INNER(field) offsetof(usp_inner, field)
#define USP_ASKED(field) offsetof(usp_layer_config, field)

static inline int usp_is_key(usp_operand operand) {
    return operand == USP_KEY || operand == USP_VALUE;
}

#endif
