// GELU and SiLU: x times a logistic function of x, which is 1 / (1 + 2^z).
//
// On 16 lanes the division is an estimate and one step of Newton's: the divider takes as long as a whole exponential.
// GELU of a row of int8 sums, K = 256, cost 40 % of the product before (Zen 5; exp by Cephes, then a division).
#pragma once

#include "lanes.h"

namespace cfrt::CFRT_LEVEL {
namespace {

// x / (1 + 2^z), to 3 ulp where z is exact. At z = 126 it stops shrinking.
CFRT_INLINE Vec share(Vec x, Vec z) {
    const Vec whole = splat(1.0f) + exp2<false>(min(splat(126.0f), z));
#if CFRT_SIMD >= 2
    const Vec rough = _mm512_rcp14_ps(whole);
    return x * fma(rough, _mm512_fnmadd_ps(whole, rough, splat(1.0f)), rough);
#else
    return x / whole;
#endif
}

// x / (1 + e^-x)
CFRT_INLINE Vec silu(Vec x) {
    return share(x, x * splat(-1.44269504f));
}

// GELU in its tanh form: x (1 + tanh u) / 2 = x / (1 + e^-2u), u = sqrt(2 / pi) (x + 0.044715 x^3).
CFRT_INLINE Vec gelu(Vec x) {
    return share(x, x * fma(x * x, splat(-0.1029432396f), splat(-2.302208198f)));
}

}  // namespace
}  // namespace cfrt::CFRT_LEVEL
