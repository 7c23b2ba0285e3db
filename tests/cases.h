/* cases.h - one configuration of world, mesh, sequence and layer in one flat struct, the tables of those that are
 * tested, and the library's config structs made from it. Runs nothing. */
#ifndef USP_TESTS_CASES_H
#define USP_TESTS_CASES_H
#include "tensors.h"

/* Zero means the default everywhere, so a case says only what is special about it. */
typedef struct usp_case {
    int ulysses, ring, copies; /* 0: 1 */
    usp_attention attention;   /* 0: softmax */
    usp_mask mask;
    usp_dtype dtype;
    usp_layout layout;
    usp_arrangement arrangement;
    int batch;                                             /* 0: 1 */
    int heads, kv_heads, value_heads, head_dim, value_dim; /* 0: 4, heads, kv_heads, 8, head_dim */
    int64_t tokens, key_tokens;
    int64_t first_token; /* the inputs are those of a later part of a longer sequence (one batch) */
    float scale;
    int return_lse, deterministic, recompute_state, initial_state, final_state;
    int decay; /* 1: heads fade at different rates; 2: all at the same, slow one */
    usp_state_exchange state_exchange;
    int seed;
    /* Softmax, but documents. */
    int documents;     /* a pattern of lengths (see usp_case_documents); 0: one, of the per-document layout 1 */
    int max_documents; /* room for re-planning */
    int prefixes;      /* 1: documents have some, but the first of three; 2: all of each document is one */
    int parents;       /* 1: documents have some */
    int64_t window_left, window_right;
    usp_alignment alignment;
    usp_route route;
    float soft_cap, dropout;
    int slopes, sinks, dlse, max_logit;
    int64_t first_key; /* as first_token, of keys that are another tensor */
    int shared_memory; /* 1: workspace and saved are */
    int head_groups;
} usp_case;

/* What a create call of the case may do. */
typedef enum usp_expectation { USP_WORKS, USP_MAY_REFUSE, USP_MUST_REFUSE } usp_expectation;

usp_case usp_case_complete(usp_case c); /* with the defaults filled in */
/* No token and no segment, yet a state from every one of the ulysses ranks to every other. */
usp_case usp_case_states_alone(int ulysses);
usp_expectation usp_case_expectation(const usp_case *c);
int usp_case_out_heads(const usp_case *c); /* H */
int64_t usp_case_keys(const usp_case *c);  /* global key tokens */
size_t usp_case_print(const usp_case *c, char *text, size_t capacity);
void usp_case_decay(const usp_case *c, float *decay);   /* [H] */
void usp_case_slopes(const usp_case *c, float *slopes); /* [heads] */

/* The config structs of a completed case; the arrays they point to are in here too. */
enum { USP_CASE_SEGMENTS = 1024, USP_CASE_HEADS = 128, USP_CASE_DOCUMENTS = 256 };

/* The documents of a case. Patterns: 1 of many lengths, 2 three long ones, 3 empty ones among others, 4 short ones, 5
 * tokens behind the last one that belong to none, 6 one. */
typedef struct usp_case_document_list {
    int64_t count; /* 0: none given */
    int64_t ends[USP_CASE_DOCUMENTS], key_ends[USP_CASE_DOCUMENTS], prefixes[USP_CASE_DOCUMENTS],
        parents[USP_CASE_DOCUMENTS];
} usp_case_document_list;
void usp_case_documents(const usp_case *c, usp_case_document_list *list);

typedef struct usp_case_configs {
    usp_sequence_config sequence, keys; /* keys: the keys' tokens as a sequence of their own */
    usp_layer_config layer;
    usp_segment segment[USP_CASE_SEGMENTS], key_segment[USP_CASE_SEGMENTS];
    usp_case_document_list documents;
    float decay[USP_CASE_HEADS], slopes[USP_CASE_HEADS];
} usp_case_configs;

/* For sequence rank p of n. */
void usp_case_configure(const usp_case *c, int p, int n, usp_case_configs *configs);

/* ---- tables ------------------------------------------------------------------------------------------------------ */

/* Cases without a mesh; each is run on every mesh. */
typedef struct usp_table {
    const char *name;
    usp_attention attention; /* of the cases that name none */
    const usp_case *cases;
    int count;
} usp_table;

extern const usp_table usp_mask_table; /* every mask and feature of softmax attention, and documents */
extern const usp_table usp_softmax_table, usp_linear_table, usp_half_table, usp_large_table;
extern const usp_table usp_feature_table; /* every mask and feature once, of no layout or dtype */
extern const usp_table usp_wide_table;    /* heads as wide as models have them: for GPUs */

/* As a configuration asks for them: none by their name. */
static inline int64_t usp_named_tokens(int64_t tokens) {
    return tokens ? tokens : USP_NO_TOKENS;
}

/* Every (ulysses, ring) of the sizes that are tested. */
typedef struct usp_split {
    int ulysses, ring;
} usp_split;
enum { USP_SPLITS = 18 };
extern const usp_split usp_splits[USP_SPLITS];

/* A random case, most often valid, of at most `most` tokens, for a mesh of the given shape. */
usp_case usp_case_random(uint64_t *state, usp_split split, int64_t most);

#endif
