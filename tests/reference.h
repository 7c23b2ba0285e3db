/* reference.h - what a case's results should be: the oracle's answer and that of a plain computation in the same
 * precision, remembered for all meshes and layouts; and the comparison. Runs no layer. */
#ifndef USP_TESTS_REFERENCE_H
#define USP_TESTS_REFERENCE_H
#include "stage.h"

typedef struct usp_answer {
    double *out, *lse, *dq, *dk, *dv, *final_state, *dinitial_state, *dsinks, *max_logit;
} usp_answer;

/* Belongs to the case without its mesh, layout and arrangement. */
typedef struct usp_reference {
    struct usp_reference *next;
    usp_case key;
    usp_answer truth, plain; /* plain: all NULL for f32 */
} usp_reference;

/* NULL to begin with. Used by one thread at a time. */
typedef struct usp_references {
    usp_reference *first;
} usp_references;

/* Elements of an input (see usp_spot) of a complete case. */
int64_t usp_reference_elements(const usp_case *c, int input);
/* The oracle's answer, whose numbers the caller frees, where one element is another: a NaN, say, which is then in all
 * that depends on it. */
usp_answer usp_answer_spotted(const usp_case *c, const usp_spot *spot);
void usp_answer_free(usp_answer *answer);

const usp_reference *usp_reference_of(usp_references *references, const usp_case *c);
void usp_references_free(usp_references *references);

/* Says what is outside the budget; the number of tensors that are. */
int usp_compare_with_reference(usp_rank *rank, const usp_case *c, const usp_whole *whole,
                               const usp_reference *reference);
/* The RMS error of out, lse, dq, dk, dv, final_state, dinitial_state, dsinks and max_logit; 0 where there is none. */
enum { USP_ITEMS = 9 };
void usp_rms_of(const usp_whole *whole, const usp_reference *reference, double *rms);

/* Two runs that should agree: f32 within twice the budget. Says which tensors do not. */
int usp_compare_near(usp_rank *rank, const usp_case *c, const char *what, const usp_whole *a, const usp_whole *b);
/* Bit for bit. `parts` has a bit for each of the tensors below. */
enum {
    USP_SAME_OUT = 1,
    USP_SAME_LSE = 2,
    USP_SAME_DQ = 4,
    USP_SAME_DKV = 8,
    USP_SAME_STATES = 16,
    USP_SAME_HEADS = 32,
    USP_SAME_ALL = 63
};
int usp_compare_bits(usp_rank *rank, const usp_case *c, const char *what, int parts, const usp_whole *a,
                     const usp_whole *b);

#endif
