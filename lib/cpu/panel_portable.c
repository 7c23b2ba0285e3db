/* panel_portable.c - the panel for any processor the compiler knows: four lanes, no fused multiply-add.
 * It is the fallback where no panel of a wider instruction set runs. */
#include <math.h>
#include <stddef.h>

#include "../dropout.h"
#include "half.h"
#include "kernels.h"

#define USP_PANEL_NAME "portable"
#define USP_PANEL_LANES 4
#define USP_PANEL_TARGET

typedef float usp_lanes __attribute__((vector_size(16), may_alias));
typedef int32_t usp_lane_bits __attribute__((vector_size(16), may_alias));

static inline usp_lanes multiply_add(usp_lanes a, usp_lanes b, usp_lanes c) {
    return a * b + c;
}

#include "panel.inc"

const usp_panel *usp_panel_portable(void) {
    return &panel;
}
