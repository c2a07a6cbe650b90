// C = A W^T of whole numbers, summed exactly, then scaled: value = sum * (scale of the row * scale of the column).

#include "gemm_block.h"
#include "int8_rows.h"

namespace cfrt::CFRT_LEVEL {
namespace {

#if CFRT_SIMD >= 3

// Four of K at once: unsigned rows times signed weights.
constexpr int kGroup = 4;
struct Weights {
    Int bytes;
};
CFRT_INLINE Weights load_weights(const std::int8_t* p) {
    return {_mm512_loadu_si512(p)};
}
CFRT_INLINE Int splat_row(const Int8* p) {
    std::int32_t bits;
    __builtin_memcpy(&bits, p, 4);
    return isplat(bits);
}
CFRT_INLINE Int dot(Int x, Weights y, Int sum) {
    return _mm512_dpbusd_epi32(sum, x, y.bytes);
}

#elif CFRT_SIMD >= 1

// Two of K at once, in 16 bits.
constexpr int kGroup = 2;
struct Weights {
    Int pairs;
};
CFRT_INLINE Weights load_weights(const std::int8_t* p) {
#if CFRT_SIMD == 2
    return {_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
#else
    return {_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
#endif
}
CFRT_INLINE Int splat_row(const Int8* p) {
    std::int32_t bits;
    __builtin_memcpy(&bits, p, 4);
    return isplat(bits);
}
CFRT_INLINE Int dot(Int x, Weights y, Int sum) {
#if CFRT_SIMD == 2
    return iadd(sum, _mm512_madd_epi16(x, y.pairs));
#else
    return iadd(sum, _mm256_madd_epi16(x, y.pairs));
#endif
}

#endif

#if CFRT_SIMD >= 1

struct Product {
    using A = Int8;
    using W = std::int8_t;
    using Sum = std::int32_t;
    static constexpr int kGroup = CFRT_LEVEL::kGroup;

    template <int R>
    static void block(const A* a, std::int64_t stride, const W* w, std::int64_t groups, Sum* sums) {
        Int acc[R][kVecs];
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
            for (int v = 0; v < kVecs; ++v) acc[r][v] = isplat(0);
        for (std::int64_t k = 0; k < groups; ++k, w += kGroup * kPanel) {
            Weights b[kVecs];
#pragma GCC unroll 4
            for (int v = 0; v < kVecs; ++v) b[v] = load_weights(w + kGroup * v * kLanes);
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) {
                const Int x = splat_row(a + r * stride + kGroup * k);
#pragma GCC unroll 4
                for (int v = 0; v < kVecs; ++v) acc[r][v] = dot(x, b[v], acc[r][v]);
            }
        }
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
            for (int v = 0; v < kVecs; ++v) istore(sums + r * kPanel + v * kLanes, acc[r][v]);
    }

    CFRT_INLINE static Vec value(const Gemm& g, const Tile& t, const Sum* row, int r, int v) {
        const std::int64_t column = t.column + v * kLanes;  // scale and offset are padded to whole panels
        Int sum = iload(row + v * kLanes);
        if (kInt8Offset) sum = isub(sum, iload(g.w->offset + column));
        return to_float(sum) * (splat(g.a_scale[t.row + r]) * load(g.w->scale + column));
    }
};

#else

// Whole numbers as floats: 127^2 * 1024 < 2^24, so 1024 products add up exactly before they go to an integer.
struct Product {
    using A = Int8;
    using W = std::int8_t;
    using Sum = std::int32_t;
    static constexpr int kGroup = 1, kExact = 1024;

    template <int R>
    static void block(const A* a, std::int64_t stride, const W* w, std::int64_t groups, Sum* sums) {
        for (int i = 0; i < R * kPanel; ++i) sums[i] = 0;
        for (std::int64_t begin = 0; begin < groups; begin += kExact) {
            const std::int64_t end = least(groups, begin + kExact);
            Vec acc[R][kVecs] = {};
            for (std::int64_t k = begin; k < end; ++k, w += kPanel) {
                Vec b[kVecs];
#pragma GCC unroll 4
                for (int v = 0; v < kVecs; ++v) b[v] = widen(w + v * kLanes);
#pragma GCC unroll 16
                for (int r = 0; r < R; ++r) {
                    const Vec x = splat(a[r * stride + k]);
#pragma GCC unroll 4
                    for (int v = 0; v < kVecs; ++v) acc[r][v] = fma(x, b[v], acc[r][v]);
                }
            }
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
                for (int v = 0; v < kVecs; ++v) {
                    Sum* to = sums + r * kPanel + v * kLanes;
                    istore(to, iadd(iload(to), __builtin_convertvector(acc[r][v], Int)));
                }
        }
    }

    CFRT_INLINE static Vec widen(const W* p) {
        typedef std::int8_t Bytes __attribute__((vector_size(4)));
        Bytes bytes;
        __builtin_memcpy(&bytes, p, sizeof bytes);
        return __builtin_convertvector(bytes, Vec);
    }

    CFRT_INLINE static Vec value(const Gemm& g, const Tile& t, const Sum* row, int r, int v) {
        return to_float(iload(row + v * kLanes)) *
               (splat(g.a_scale[t.row + r]) * load(g.w->scale + t.column + v * kLanes));
    }
};

#endif

}  // namespace

extern const GemmKernel gemm_int8;
constinit const GemmKernel gemm_int8{kPanel, Product::kGroup, sizeof(Int8), kInt8Offset, tiles, run<Product>};

}  // namespace cfrt::CFRT_LEVEL
