/* wide.cpp - the backward kernels for Hopper and wide heads, and their launcher, on the emulated machine. */
#include "hopper.h"

#include "../../cuda/softmax_wgmma_wide.cu"
