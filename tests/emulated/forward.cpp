/* forward.cpp - the forward kernels for Hopper and their launcher, on the emulated machine. */
#include "hopper.h"

#include "../../cuda/softmax_wgmma_forward.cu"
