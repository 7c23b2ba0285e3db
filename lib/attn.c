/* attn.c - the attention kinds there are: the one place where a new one is entered. */
#include "attn.h"

const usp_attn_ops *const usp_attn_kinds[USP_ATTN_KINDS] = {&usp_attn_softmax, &usp_attn_linear};
