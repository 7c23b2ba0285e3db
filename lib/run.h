/* run.h - what running a layer needs and moves, for layer.c to report. */
#ifndef USP_RUN_H
#define USP_RUN_H
#include "layer.h"

size_t usp_run_workspace(const usp_layer *layer, usp_pass pass);
size_t usp_run_exchange_workspace(const usp_layer *layer);
size_t usp_run_saved(const usp_layer *layer);
/* Adds the bytes of the ulysses axis. */
void usp_run_cost(const usp_layer *layer, usp_pass pass, usp_cost *cost);

#endif
