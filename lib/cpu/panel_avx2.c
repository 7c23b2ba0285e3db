/* panel_avx2.c - the panel for x86 processors with AVX2 and FMA: eight lanes, fused multiply-add.
 * On other processors and architectures it gives no panel. */
#include <math.h>
#include <stddef.h>

#include "../dropout.h"
#include "half.h"
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define USP_PANEL_NAME "avx2"
#define USP_PANEL_LANES 8
#define USP_PANEL_TARGET __attribute__((target("avx2,fma")))

typedef float usp_lanes __attribute__((vector_size(32), may_alias));
typedef int32_t usp_lane_bits __attribute__((vector_size(32), may_alias));

USP_PANEL_TARGET static inline usp_lanes multiply_add(usp_lanes a, usp_lanes b, usp_lanes c) {
    return (usp_lanes)_mm256_fmadd_ps(a, b, c);
}

#include "panel.inc"

const usp_panel *usp_panel_avx2(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? &panel : NULL;
}

#else

const usp_panel *usp_panel_avx2(void) {
    return NULL;
}

#endif
