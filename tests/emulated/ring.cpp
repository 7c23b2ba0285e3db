/* ring.cpp - the forward kernels for Hopper that are given all stages, on the emulated machine. */
#include "hopper.h"

#include "../../cuda/softmax_wgmma_ring.cu"

void (*usp_emulated_bring)(void);
