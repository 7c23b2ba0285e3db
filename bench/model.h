/* model.h - what a pass should take on several ranks of one host, from what it takes on one: to be printed beside what
 * it does take, and for ranks that are not there. */
#ifndef USP_MODEL_H
#define USP_MODEL_H
#include "options.h"

/* Seconds of a pass of softmax attention on ulysses x ring ranks over the peer transport, in shared memory; 0: of
 * another kind, or heads that do not divide. `alone`: what one rank takes. */
double usp_model_pass(const usp_case *c, usp_pass pass, int ulysses, int ring, double alone);

#endif
