/* backward.cpp - the backward kernels for Hopper and their launcher, on the emulated machine. */
#include "hopper.h"

#include "../../cuda/softmax_wgmma_backward.cu"
