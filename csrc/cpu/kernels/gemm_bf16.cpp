// C = A W^T, both bf16, summed in fp32.

#include "gemm_block.h"

namespace cfrt::CFRT_LEVEL {
namespace {

// A pair of bf16 (k, k + 1) in each 32-bit lane.
#if CFRT_SIMD >= 3
struct Pair {
    __m512bh both;
};
CFRT_INLINE Pair load_pair(const std::uint16_t* p) {
    return {reinterpret_cast<__m512bh>(_mm512_loadu_si512(p))};
}
CFRT_INLINE Pair splat_pair(const std::uint16_t* p) {
    std::int32_t bits;
    __builtin_memcpy(&bits, p, 4);
    return {reinterpret_cast<__m512bh>(_mm512_set1_epi32(bits))};
}
CFRT_INLINE Vec dot(Pair x, Pair y, Vec sum) {
    return _mm512_dpbf16_ps(sum, x.both, y.both);
}
#else
struct Pair {
    Vec low, high;
};
CFRT_INLINE Pair widen(Int bits) {
#if CFRT_SIMD == 2
    return {_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16)),
            _mm512_castsi512_ps(_mm512_and_si512(bits, isplat(static_cast<std::int32_t>(0xffff0000))))};
#elif CFRT_SIMD == 1
    return {_mm256_castsi256_ps(_mm256_slli_epi32(bits, 16)),
            _mm256_castsi256_ps(_mm256_and_si256(bits, isplat(static_cast<std::int32_t>(0xffff0000))))};
#else
    return {(Vec)(bits << 16), (Vec)(bits & isplat(static_cast<std::int32_t>(0xffff0000)))};
#endif
}
CFRT_INLINE Pair load_pair(const std::uint16_t* p) {
    return widen(iload(reinterpret_cast<const std::int32_t*>(p)));
}
CFRT_INLINE Pair splat_pair(const std::uint16_t* p) {
    std::int32_t bits;
    __builtin_memcpy(&bits, p, 4);
    return widen(isplat(bits));
}
CFRT_INLINE Vec dot(Pair x, Pair y, Vec sum) {
    return fma(x.low, y.low, fma(x.high, y.high, sum));
}
#endif

struct Bf16 {
    using A = std::uint16_t;
    using W = std::uint16_t;
    using Sum = float;
    static constexpr int kGroup = 2;

    template <int R>
    static void block(const A* a, std::int64_t stride, const W* w, std::int64_t groups, float* sums) {
        Vec acc[R][kVecs];
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
            for (int v = 0; v < kVecs; ++v) acc[r][v] = zero();
        for (std::int64_t k = 0; k < groups; ++k, w += 2 * kPanel) {
            Pair b[kVecs];
#pragma GCC unroll 4
            for (int v = 0; v < kVecs; ++v) b[v] = load_pair(w + 2 * v * kLanes);
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) {
                const Pair x = splat_pair(a + r * stride + 2 * k);
#pragma GCC unroll 4
                for (int v = 0; v < kVecs; ++v) acc[r][v] = dot(x, b[v], acc[r][v]);
            }
        }
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
            for (int v = 0; v < kVecs; ++v) store(sums + r * kPanel + v * kLanes, acc[r][v]);
    }

    CFRT_INLINE static Vec value(const Gemm&, const Tile&, const float* row, int, int v) {
        return load(row + v * kLanes);
    }
};

}  // namespace

extern const GemmKernel gemm_bf16;
constinit const GemmKernel gemm_bf16{kPanel, Bf16::kGroup, sizeof(Bf16::A), 0, tiles, run<Bf16>};

}  // namespace cfrt::CFRT_LEVEL
