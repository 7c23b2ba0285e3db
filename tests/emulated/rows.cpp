/* rows.cpp - sums over rows and their launchers, on the emulated machine. */
#include "hopper.h"

#include "../../cuda/softmax_rows.cu"
