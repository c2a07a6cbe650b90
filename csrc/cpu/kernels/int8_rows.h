// How a level stores the whole numbers of an int8 row, for the kernels that write such rows (gemm.h has the contract).
//
//   avx512bf16     uint8, 128 added: vpdpbusd multiplies unsigned by signed
//   avx512, avx2   int16: vpmaddwd; the byte product of these levels (vpmaddubsw) would saturate
//   plain          float: products of whole numbers below 2^24 are exact
#pragma once

#include "../simd.h"

namespace cfrt::CFRT_LEVEL {
namespace {

#if CFRT_SIMD >= 3
using Int8 = std::uint8_t;
constexpr int kInt8Offset = 128;
#elif CFRT_SIMD >= 1
using Int8 = std::int16_t;
constexpr int kInt8Offset = 0;
#else
using Int8 = float;
constexpr int kInt8Offset = 0;
#endif
constexpr Int8 kInt8Zero = kInt8Offset;

// A row is x / scale, rounded. A scale of zero or NaN comes with an inverse of zero, and a row of zeros.
struct Int8Scale {
    float scale, inverse;
};

// The scale of a row of which every number has been seen. Numbers that are none make it NaN, and so the whole row of
// the product: a result that looks sound must not come from a row that was not.
struct RowPeak {
    Vec peak = zero(), none = zero();

    CFRT_INLINE void see(Vec x) {
        peak = max(peak, abs(x));
        none = fma(x, zero(), none);  // NaN as soon as x is infinite or NaN
    }

    CFRT_INLINE Int8Scale scale() const {
        const float none_seen = sum(none), highest_seen = highest(peak);
        if (none_seen != 0.0f) return {none_seen, 0.0f};
        if (highest_seen < 1e-36f) return {0.0f, 0.0f};  // its inverse would overflow
        return {highest_seen / 127.0f, 127.0f / highest_seen};
    }
};

CFRT_INLINE void fill_zeros(Int8* p, std::int64_t n) {
    for (std::int64_t i = 0; i < n; ++i) p[i] = kInt8Zero;
}

// x holds values already divided by the scale; |x| <= 127 up to rounding.
CFRT_INLINE void store_int8(Int8* p, Vec x) {
#if CFRT_SIMD >= 3
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(iadd(to_int(x), isplat(kInt8Offset))));
#elif CFRT_SIMD == 2
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(to_int(x)));
#elif CFRT_SIMD == 1
    const Int whole = to_int(x), packed = _mm256_permute4x64_epi64(_mm256_packs_epi32(whole, whole), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
#else
    store(p, round(x));
#endif
}

CFRT_INLINE void store_int8(Int8* p, Vec x, int n) {
    Int8 whole[kLanes];
    store_int8(whole, x);
    __builtin_memcpy(p, whole, static_cast<std::size_t>(n) * sizeof(Int8));
}

}  // namespace
}  // namespace cfrt::CFRT_LEVEL
