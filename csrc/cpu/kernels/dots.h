// The multiply-adds of the three precisions, a vector at a time: what the products are made of, and what the ceilings
// measure. `step` names the part of a group that is added up.
#pragma once

#include "../simd.h"
#include "int8_rows.h"
#include "lanes.h"

namespace cfrt::CFRT_LEVEL {
namespace {

typedef std::int32_t Sums __attribute__((vector_size(sizeof(Vec))));

template <class T>
CFRT_INLINE Int splat_word(const T* p) {
    std::int32_t bits;
    __builtin_memcpy(&bits, p, sizeof bits);
    return isplat(bits);
}

// ---------------------------------------------------------------------------------------------------------------- fp32

struct Fp32 {
    using A = float;
    using W = float;
    using Acc = Vec;
    static constexpr int kGroup = 1, kSteps = 1;

    CFRT_INLINE static Vec load(int, const W* p) { return CFRT_LEVEL::load(p); }
    CFRT_INLINE static Vec splat(int, const A* p) { return CFRT_LEVEL::splat(*p); }
    CFRT_INLINE static Vec dot(Vec x, Vec w, Vec acc) { return fma(x, w, acc); }
};

// ---------------------------------------------------------------------------------------------------------------- bf16

// Pairs (k, k + 1) in words of 32 bits.
struct Bf16 {
    using A = std::uint16_t;
    using W = std::uint16_t;
    using Acc = Vec;
    static constexpr int kGroup = 2;

#if CFRT_SIMD >= 3
    static constexpr int kSteps = 1;
    CFRT_INLINE static Int load(int, const W* p) { return _mm512_loadu_si512(p); }
    CFRT_INLINE static Int splat(int, const A* p) { return splat_word(p); }
    CFRT_INLINE static Vec dot(Int x, Int w, Vec acc) { return _mm512_dpbf16_ps(acc, (__m512bh)x, (__m512bh)w); }
#else
    // First the odd numbers of the pairs, then the even ones: each is a float once its neighbour is out of the way.
    static constexpr int kSteps = 2;
    CFRT_INLINE static Vec half(int step, Int pairs) { return step == 1 ? upper((Vec)pairs) : lower((Vec)pairs); }
    CFRT_INLINE static Vec load(int step, const W* p) {
        return half(step, iload(reinterpret_cast<const std::int32_t*>(p)));
    }
    CFRT_INLINE static Vec splat(int step, const A* p) { return half(step, splat_word(p)); }
    CFRT_INLINE static Vec dot(Vec x, Vec w, Vec acc) { return fma(x, w, acc); }
#endif
};

// ---------------------------------------------------------------------------------------------------------------- int8

struct Whole {
    using A = Int8;
    using W = std::int8_t;

#if CFRT_SIMD >= 3
    // Four of K at once: unsigned rows times signed weights.
    using Acc = Sums;
    static constexpr int kGroup = 4, kSteps = 1;
    CFRT_INLINE static Int load(int, const W* p) { return _mm512_loadu_si512(p); }
    CFRT_INLINE static Int splat(int, const A* p) { return splat_word(p); }
    CFRT_INLINE static Acc dot(Int x, Int w, Acc acc) { return (Acc)_mm512_dpbusd_epi32((Int)acc, x, w); }
#elif CFRT_SIMD >= 1
    // Two of K at once, in 16 bits.
    using Acc = Sums;
    static constexpr int kGroup = 2, kSteps = 1;
    CFRT_INLINE static Int splat(int, const A* p) { return splat_word(p); }
#if CFRT_SIMD == 2
    CFRT_INLINE static Int load(int, const W* p) {
        return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }
    CFRT_INLINE static Acc dot(Int x, Int w, Acc acc) { return acc + (Acc)_mm512_madd_epi16(x, w); }
#else
    CFRT_INLINE static Int load(int, const W* p) {
        return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }
    CFRT_INLINE static Acc dot(Int x, Int w, Acc acc) { return acc + (Acc)_mm256_madd_epi16(x, w); }
#endif
#else
    // Whole numbers as floats.
    using Acc = Vec;
    static constexpr int kGroup = 1, kSteps = 1;
    CFRT_INLINE static Vec load(int, const W* p) {
        typedef std::int8_t Bytes __attribute__((vector_size(4)));
        Bytes bytes;
        __builtin_memcpy(&bytes, p, sizeof bytes);
        return __builtin_convertvector(bytes, Vec);
    }
    CFRT_INLINE static Vec splat(int, const A* p) { return CFRT_LEVEL::splat(*p); }
    CFRT_INLINE static Vec dot(Vec x, Vec w, Vec acc) { return fma(x, w, acc); }
#endif
};

}  // namespace
}  // namespace cfrt::CFRT_LEVEL
