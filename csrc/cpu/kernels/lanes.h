// Vectors for code that runs at more than one width on the same level: 16, 8 or 4 floats, as far as the level has them.
// A lane's result is the same at every width.
#pragma once

#include "../simd.h"

namespace cfrt::CFRT_LEVEL {
namespace {

// N floats, and as many words of 32 bits.
template <int N>
struct Lanes;
template <>
struct Lanes<4> {
#if CFRT_SIMD >= 1
    using Floats = __m128;
#else
    using Floats = Vec;
#endif
    typedef std::uint32_t Words __attribute__((vector_size(16)));
};
#if CFRT_SIMD >= 1
template <>
struct Lanes<8> {
    using Floats = __m256;
    typedef std::uint32_t Words __attribute__((vector_size(32)));
};
#endif
#if CFRT_SIMD >= 2
template <>
struct Lanes<16> {
    using Floats = __m512;
    typedef std::uint32_t Words __attribute__((vector_size(64)));
};
#endif

using F4 = Lanes<4>::Floats;

template <class F>
using Words = typename Lanes<sizeof(F) / 4>::Words;

template <class F>
constexpr int lanes_of = sizeof(F) / sizeof(float);

template <class F>
CFRT_INLINE F get(const float* p) {
    F x;
    __builtin_memcpy(&x, p, sizeof x);
    return x;
}

template <class F>
CFRT_INLINE void put(float* p, F x) {
    __builtin_memcpy(p, &x, sizeof x);
}

// One word in all lanes, bit for bit.
template <class F>
CFRT_INLINE F all(float x) {
#if CFRT_SIMD >= 2
    if constexpr (sizeof(F) == 64) return _mm512_set1_ps(x);
#endif
#if CFRT_SIMD >= 1
    if constexpr (sizeof(F) == 32) return _mm256_set1_ps(x);
    if constexpr (sizeof(F) == 16) return _mm_set1_ps(x);
#else
    return F{x, x, x, x};
#endif
}

#if CFRT_SIMD >= 2
CFRT_INLINE __m256 fma(__m256 a, __m256 b, __m256 c) {
    return _mm256_fmadd_ps(a, b, c);
}
CFRT_INLINE __m256 max(__m256 a, __m256 b) {
    return _mm256_max_ps(a, b);
}
#endif
#if CFRT_SIMD >= 1
CFRT_INLINE __m128 fma(__m128 a, __m128 b, __m128 c) {
    return _mm_fmadd_ps(a, b, c);
}
CFRT_INLINE __m128 max(__m128 a, __m128 b) {
    return _mm_max_ps(a, b);
}
#endif

// Is any lane of a greater than its lane of b? NaN is not.
template <class F>
CFRT_INLINE bool any_above(F a, F b) {
#if CFRT_SIMD >= 2
    if constexpr (sizeof(F) == 64) return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) != 0;
#endif
#if CFRT_SIMD >= 1
    if constexpr (sizeof(F) == 32) return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)) != 0;
    if constexpr (sizeof(F) == 16) return _mm_movemask_ps(_mm_cmpgt_ps(a, b)) != 0;
#else
    return a[0] > b[0] || a[1] > b[1] || a[2] > b[2] || a[3] > b[3];
#endif
}

// x 2^n, where n + 1.5 * 2^23 is given: adding that constant to a number rounds it, and n is in the low bits.
template <class F>
CFRT_INLINE F times_power(F x, F shifted) {
    return (F)((Words<F>)x + ((Words<F>)shifted << 23));
}

// 2^x for x up to 127; below -126 it stays at 2^-126; NaN stays NaN, and 2^0 is 1 exactly. The nearest whole number
// goes into the exponent, a minimax polynomial on -0.5..0.5 does the rest: relative error 8e-8, or 1e-4 where rough.
template <bool kRough, class F>
CFRT_INLINE F exp2(F x) {
    x = max(all<F>(-126.0f), x);
    const F rounder = all<F>(kRounder);
    const F whole = x + rounder, rest = x - (whole - rounder);
    F p;
    if constexpr (kRough) {
        p = fma(rest, all<F>(5.5008931e-2f), all<F>(2.4221096e-1f));
        p = fma(rest, p, all<F>(6.9328293e-1f));
    } else {
        p = fma(rest, all<F>(1.5353362e-4f), all<F>(1.3398874e-3f));
        p = fma(rest, p, all<F>(9.6184374e-3f));
        p = fma(rest, p, all<F>(5.5503325e-2f));
        p = fma(rest, p, all<F>(2.4022648e-1f));
        p = fma(rest, p, all<F>(6.9314720e-1f));
    }
    p = fma(rest, p, all<F>(1.0f));
    return times_power(p, whole);
}

// Words of two bf16: the lower half and the upper one as floats.
template <class F>
CFRT_INLINE F lower(F pairs) {
    return (F)((Words<F>)pairs << 16);
}
template <class F>
CFRT_INLINE F upper(F pairs) {
    return (F)((Words<F>)pairs & 0xffff0000u);
}

// Words of two bf16, rounded to nearest even: a in the lower half, b in the upper one.
template <class F>
CFRT_INLINE F pair_up(F a, F b) {
#if CFRT_SIMD >= 3
    // One rounding instruction puts all of a below all of b; the shuffle interleaves them.
    constexpr auto index = [] {
        struct {
            alignas(64) std::uint16_t of[2 * lanes_of<F>];
        } order{};
        for (int i = 0; i < lanes_of<F>; ++i) {
            order.of[2 * i] = static_cast<std::uint16_t>(i);
            order.of[2 * i + 1] = static_cast<std::uint16_t>(lanes_of<F> + i);
        }
        return order;
    };
    static constexpr auto order = index();
    if constexpr (sizeof(F) == 64)
        return (F)_mm512_permutexvar_epi16(_mm512_load_si512(order.of), (__m512i)_mm512_cvtne2ps_pbh(b, a));
    else if constexpr (sizeof(F) == 32)
        return (F)_mm256_permutexvar_epi16(_mm256_load_si256((const __m256i*)order.of),
                                           (__m256i)_mm256_cvtne2ps_pbh(b, a));
    else
        return (F)_mm_permutexvar_epi16(_mm_load_si128((const __m128i*)order.of), (__m128i)_mm_cvtne2ps_pbh(b, a));
#else
    using W = Words<F>;
    const auto rounded = [](F x) {
        const W bits = (W)x;
        return x == x ? bits + ((bits >> 16) & 1u) + 0x7fffu : bits | 0x400000u;
    };
    return (F)((W)(rounded(a) >> 16) | ((W)rounded(b) & 0xffff0000u));
#endif
}

// The transpose of four rows of four.
CFRT_INLINE void transpose(F4& a, F4& b, F4& c, F4& d) {
    const F4 ab = __builtin_shufflevector(a, b, 0, 4, 1, 5), AB = __builtin_shufflevector(a, b, 2, 6, 3, 7);
    const F4 cd = __builtin_shufflevector(c, d, 0, 4, 1, 5), CD = __builtin_shufflevector(c, d, 2, 6, 3, 7);
    a = __builtin_shufflevector(ab, cd, 0, 1, 4, 5), b = __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
    c = __builtin_shufflevector(AB, CD, 0, 1, 4, 5), d = __builtin_shufflevector(AB, CD, 2, 3, 6, 7);
}

}  // namespace
}  // namespace cfrt::CFRT_LEVEL
