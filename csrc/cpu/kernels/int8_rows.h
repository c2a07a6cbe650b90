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

struct Int8Scale {
    float scale, inverse;  // both zero for a row of (all but) zeros
};

CFRT_INLINE Int8Scale int8_scale(float peak) {
    if (peak < 1e-36f) return {0.0f, 0.0f};  // its inverse would overflow
    return {peak / 127.0f, 127.0f / peak};
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
