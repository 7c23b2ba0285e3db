/* panel_avx512.c - the panel for x86 processors with AVX-512: sixteen lanes, fused multiply-add.
 * On other processors and architectures it gives no panel. */
#include <math.h>
#include <stddef.h>

#include "../dropout.h"
#include "half.h"
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define USP_PANEL_NAME "avx512"
#define USP_PANEL_LANES 16
#define USP_PANEL_TARGET __attribute__((target("avx512f")))

typedef float usp_lanes __attribute__((vector_size(64), may_alias));
typedef int32_t usp_lane_bits __attribute__((vector_size(64), may_alias));

USP_PANEL_TARGET static inline usp_lanes multiply_add(usp_lanes a, usp_lanes b, usp_lanes c) {
    return (usp_lanes)_mm512_fmadd_ps(a, b, c);
}

#include "panel.inc"

const usp_panel *usp_panel_avx512(void) {
    return __builtin_cpu_supports("avx512f") ? &panel : NULL;
}

#else

const usp_panel *usp_panel_avx512(void) {
    return NULL;
}

#endif
