/* features.c - every mask and feature once, and together where that makes sense; usp_body_features runs each on every
 * layout in every dtype. Of 3 tokens most ranks have none; pattern 5 of documents leaves tokens behind the last one. */
#include "cases.h"

static const usp_case feature_cases[] = {
    {.tokens = 61, .mask = USP_MASK_CAUSAL},
    {.tokens = 61, .kv_heads = 2},
    {.tokens = 3, .mask = USP_MASK_CAUSAL, .kv_heads = 2},
    {.tokens = 61, .mask = USP_MASK_CAUSAL, .window_left = 9, .kv_heads = 2},
    {.tokens = 61, .window_left = 5, .window_right = 3},
    {.tokens = 61, .mask = USP_MASK_CAUSAL, .documents = 3, .kv_heads = 1},
    {.tokens = 61, .documents = 5, .kv_heads = 2},
    {.tokens = 61, .mask = USP_MASK_CAUSAL, .documents = 1, .prefixes = 1},
    {.tokens = 61, .mask = USP_MASK_CAUSAL, .documents = 4, .parents = 1, .kv_heads = 2},
    {.tokens = 61, .key_tokens = 77, .mask = USP_MASK_CAUSAL},
    {.tokens = 61, .key_tokens = 77, .mask = USP_MASK_CAUSAL, .alignment = USP_ALIGN_BOTTOM_RIGHT, .kv_heads = 2},
    {.tokens = 61, .key_tokens = 77, .mask = USP_MASK_CAUSAL, .documents = 1},
    {.tokens = 61, .mask = USP_MASK_CAUSAL, .sinks = 1, .kv_heads = 2},
    {.tokens = 61, .mask = USP_MASK_CAUSAL, .soft_cap = 3},
    {.tokens = 61, .mask = USP_MASK_CAUSAL, .slopes = 1, .kv_heads = 2},
    {.tokens = 61, .mask = USP_MASK_CAUSAL, .dropout = 0.3f, .kv_heads = 2},
    {.tokens = 61, .mask = USP_MASK_CAUSAL, .return_lse = 1, .dlse = 1},
    {.tokens = 61, .mask = USP_MASK_CAUSAL, .max_logit = 1, .kv_heads = 2},
    {.tokens = 61, .mask = USP_MASK_CAUSAL, .head_dim = 48, .value_dim = 32},
    {.tokens = 61, .window_left = 9, .window_right = 4, .documents = 1, .sinks = 1, .soft_cap = 3, .dropout = 0.2f},
    {.tokens = 61, .mask = USP_MASK_CAUSAL, .documents = 4, .parents = 1, .sinks = 1, .return_lse = 1, .dlse = 1},
    {.tokens = 61, .mask = USP_MASK_CAUSAL, .documents = 1, .prefixes = 1, .slopes = 1, .dropout = 0.4f, .kv_heads = 2},
    {.attention = USP_LINEAR, .tokens = 61, .mask = USP_MASK_CAUSAL, .decay = 1, .documents = 5, .kv_heads = 2},
    {.attention = USP_LINEAR, .tokens = 61, .mask = USP_MASK_CAUSAL, .decay = 1, .initial_state = 1, .final_state = 1},
    {.attention = USP_LINEAR, .tokens = 61}};

const usp_table usp_feature_table = {"features", USP_SOFTMAX, feature_cases,
                                     sizeof feature_cases / sizeof feature_cases[0]};
