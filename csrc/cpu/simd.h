// Vectors of the level being compiled: what the kernels are written in. Include it in files of csrc/cpu/kernels alone,
// which CMake compiles once per level with CFRT_LEVEL = plain | avx2 | avx512 | avx512bf16 and CFRT_SIMD = 0 | 1 | 2
// | 3.
//
// Everything lies in a namespace of the level and inside it in an anonymous one, and no template or inline function of
// the standard library is used: the linker keeps one copy of such a function for the whole program, and that might be
// one which only the newest CPU can run.
//
//   Vec   kLanes floats        + - * / as usual; the rest below
//   Int   kLanes int32
//
// Partial loads give zero in the lanes they do not read; n is in 0..kLanes, and nothing beyond n is touched.
// NaN: min and max give their second operand where either is one.
#pragma once

#include <cstddef>
#include <cstdint>

#if CFRT_SIMD >= 1
#include <immintrin.h>
#endif

#define CFRT_INLINE [[gnu::always_inline]] inline

namespace cfrt::CFRT_LEVEL {
namespace {

// ------------------------------------------------------------------------------------------------------------- scalars

template <class T>
constexpr T least(T a, T b) {
    return b < a ? b : a;
}

template <class T>
constexpr T most(T a, T b) {
    return a < b ? b : a;
}

// 1.5 * 2^23. Where |x| < 2^22, adding it leaves the nearest whole number, ties to even, in the low bits.
constexpr float kRounder = 12582912.0f;

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) {
    return (a + b - 1) / b;
}

// ---------------------------------------------------------------------------------------------------- AVX-512: 16
// lanes
#if CFRT_SIMD >= 2

constexpr int kLanes = 16;
using Vec = __m512;
using Int = __m512i;

CFRT_INLINE __mmask16 first(int n) {
    return static_cast<__mmask16>((1u << n) - 1u);
}

CFRT_INLINE Vec zero() {
    return _mm512_setzero_ps();
}
CFRT_INLINE Vec splat(float x) {
    return _mm512_set1_ps(x);
}
CFRT_INLINE Vec load(const float* p) {
    return _mm512_loadu_ps(p);
}
CFRT_INLINE Vec load(const float* p, int n) {
    return _mm512_maskz_loadu_ps(first(n), p);
}
CFRT_INLINE void store(float* p, Vec x) {
    _mm512_storeu_ps(p, x);
}
CFRT_INLINE void store(float* p, Vec x, int n) {
    _mm512_mask_storeu_ps(p, first(n), x);
}
CFRT_INLINE Vec fma(Vec a, Vec b, Vec c) {
    return _mm512_fmadd_ps(a, b, c);
}
CFRT_INLINE Vec min(Vec a, Vec b) {
    return _mm512_min_ps(a, b);
}
CFRT_INLINE Vec max(Vec a, Vec b) {
    return _mm512_max_ps(a, b);
}
CFRT_INLINE Vec abs(Vec x) {
    return _mm512_abs_ps(x);
}
CFRT_INLINE Vec round(Vec x) {
    return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

CFRT_INLINE Int isplat(std::int32_t x) {
    return _mm512_set1_epi32(x);
}
CFRT_INLINE Int iload(const std::int32_t* p) {
    return _mm512_loadu_si512(p);
}
CFRT_INLINE void istore(std::int32_t* p, Int x) {
    _mm512_storeu_si512(p, x);
}
CFRT_INLINE Int iadd(Int a, Int b) {
    return _mm512_add_epi32(a, b);
}
CFRT_INLINE Int isub(Int a, Int b) {
    return _mm512_sub_epi32(a, b);
}
CFRT_INLINE Vec to_float(Int x) {
    return _mm512_cvtepi32_ps(x);
}
CFRT_INLINE Int to_int(Vec x) {  // to nearest, ties to even
    return _mm512_cvtps_epi32(x);
}

CFRT_INLINE float sum(Vec x) {
    return _mm512_reduce_add_ps(x);
}
CFRT_INLINE float highest(Vec x) {
    return _mm512_reduce_max_ps(x);
}

CFRT_INLINE Vec widen_bf16(__m256i x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}
CFRT_INLINE Vec load_bf16(const std::uint16_t* p) {
    return widen_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
CFRT_INLINE Vec load_bf16(const std::uint16_t* p, int n) {
    return widen_bf16(_mm256_maskz_loadu_epi16(first(n), p));
}
CFRT_INLINE __m256i narrow_bf16(Vec x) {
#if CFRT_SIMD >= 3
    return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x));
#else
    const Int bits = _mm512_castps_si512(x);
    const Int odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), isplat(1));
    Int rounded = iadd(bits, iadd(odd, isplat(0x7fff)));
    rounded = _mm512_mask_or_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), bits, isplat(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
#endif
}
CFRT_INLINE void store_bf16(std::uint16_t* p, Vec x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_bf16(x));
}
CFRT_INLINE void store_bf16(std::uint16_t* p, Vec x, int n) {
    _mm256_mask_storeu_epi16(p, first(n), narrow_bf16(x));
}

// ------------------------------------------------------------------------------------------------------- AVX2: 8 lanes
#elif CFRT_SIMD == 1

constexpr int kLanes = 8;
using Vec = __m256;
using Int = __m256i;

CFRT_INLINE Int first(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

CFRT_INLINE Vec zero() {
    return _mm256_setzero_ps();
}
CFRT_INLINE Vec splat(float x) {
    return _mm256_set1_ps(x);
}
CFRT_INLINE Vec load(const float* p) {
    return _mm256_loadu_ps(p);
}
CFRT_INLINE Vec load(const float* p, int n) {
    return _mm256_maskload_ps(p, first(n));
}
CFRT_INLINE void store(float* p, Vec x) {
    _mm256_storeu_ps(p, x);
}
CFRT_INLINE void store(float* p, Vec x, int n) {
    _mm256_maskstore_ps(p, first(n), x);
}
CFRT_INLINE Vec fma(Vec a, Vec b, Vec c) {
    return _mm256_fmadd_ps(a, b, c);
}
CFRT_INLINE Vec min(Vec a, Vec b) {
    return _mm256_min_ps(a, b);
}
CFRT_INLINE Vec max(Vec a, Vec b) {
    return _mm256_max_ps(a, b);
}
CFRT_INLINE Vec abs(Vec x) {
    return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x);
}
CFRT_INLINE Vec round(Vec x) {
    return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

CFRT_INLINE Int isplat(std::int32_t x) {
    return _mm256_set1_epi32(x);
}
CFRT_INLINE Int iload(const std::int32_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const Int*>(p));
}
CFRT_INLINE void istore(std::int32_t* p, Int x) {
    _mm256_storeu_si256(reinterpret_cast<Int*>(p), x);
}
CFRT_INLINE Int iadd(Int a, Int b) {
    return _mm256_add_epi32(a, b);
}
CFRT_INLINE Int isub(Int a, Int b) {
    return _mm256_sub_epi32(a, b);
}
CFRT_INLINE Vec to_float(Int x) {
    return _mm256_cvtepi32_ps(x);
}
CFRT_INLINE Int to_int(Vec x) {
    return _mm256_cvtps_epi32(x);
}

CFRT_INLINE float sum(Vec x) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
CFRT_INLINE float highest(Vec x) {
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}

CFRT_INLINE Vec load_bf16(const std::uint16_t* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
CFRT_INLINE Vec load_bf16(const std::uint16_t* p, int n) {
    std::uint16_t whole[kLanes] = {};
    __builtin_memcpy(whole, p, static_cast<std::size_t>(n) * 2);
    return load_bf16(whole);
}
CFRT_INLINE void store_bf16(std::uint16_t* p, Vec x) {
    const Int bits = _mm256_castps_si256(x);
    const Int odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), isplat(1));
    const Int rounded = iadd(bits, iadd(odd, isplat(0x7fff))), quiet = _mm256_or_si256(bits, isplat(0x400000));
    const Vec unordered = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
    const Int chosen =
        _mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(rounded), _mm256_castsi256_ps(quiet), unordered));
    const Int high = _mm256_srli_epi32(chosen, 16);
    const Int packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
CFRT_INLINE void store_bf16(std::uint16_t* p, Vec x, int n) {
    std::uint16_t whole[kLanes];
    store_bf16(whole, x);
    __builtin_memcpy(p, whole, static_cast<std::size_t>(n) * 2);
}

// --------------------------------------------------------- plain C++: 4 lanes, by the compiler's portable vector types
#else

constexpr int kLanes = 4;
typedef float Vec __attribute__((vector_size(16)));
typedef std::int32_t Int __attribute__((vector_size(16)));

CFRT_INLINE Vec zero() {
    return Vec{};
}
CFRT_INLINE Vec splat(float x) {
    return Vec{x, x, x, x};
}
CFRT_INLINE Vec load(const float* p) {
    Vec x;
    __builtin_memcpy(&x, p, sizeof x);
    return x;
}
CFRT_INLINE Vec load(const float* p, int n) {
    Vec x{};
    __builtin_memcpy(&x, p, static_cast<std::size_t>(n) * 4);
    return x;
}
CFRT_INLINE void store(float* p, Vec x) {
    __builtin_memcpy(p, &x, sizeof x);
}
CFRT_INLINE void store(float* p, Vec x, int n) {
    __builtin_memcpy(p, &x, static_cast<std::size_t>(n) * 4);
}
CFRT_INLINE Vec fma(Vec a, Vec b, Vec c) {  // rounds twice: not every CPU has the instruction
    return a * b + c;
}
CFRT_INLINE Vec min(Vec a, Vec b) {
    return a < b ? a : b;
}
CFRT_INLINE Vec max(Vec a, Vec b) {
    return a > b ? a : b;
}
CFRT_INLINE Vec abs(Vec x) {
    return (Vec)((Int)x & Int{0x7fffffff, 0x7fffffff, 0x7fffffff, 0x7fffffff});
}

CFRT_INLINE Int isplat(std::int32_t x) {
    return Int{x, x, x, x};
}
CFRT_INLINE Int iload(const std::int32_t* p) {
    Int x;
    __builtin_memcpy(&x, p, sizeof x);
    return x;
}
CFRT_INLINE void istore(std::int32_t* p, Int x) {
    __builtin_memcpy(p, &x, sizeof x);
}
CFRT_INLINE Int iadd(Int a, Int b) {
    return a + b;
}
CFRT_INLINE Int isub(Int a, Int b) {
    return a - b;
}
CFRT_INLINE Vec to_float(Int x) {
    return __builtin_convertvector(x, Vec);
}
CFRT_INLINE Vec round(Vec x) {  // |x| < 2^22
    return (x + splat(kRounder)) - splat(kRounder);
}
CFRT_INLINE Int to_int(Vec x) {  // |x| < 2^22
    return (Int)(x + splat(kRounder)) - (Int)splat(kRounder);
}

CFRT_INLINE float sum(Vec x) {
    return (x[0] + x[2]) + (x[1] + x[3]);
}
CFRT_INLINE float highest(Vec x) {
    return most(most(x[0], x[2]), most(x[1], x[3]));
}

typedef std::uint16_t Half __attribute__((vector_size(8)));
typedef std::uint32_t Bits __attribute__((vector_size(16)));

CFRT_INLINE Vec load_bf16(const std::uint16_t* p) {
    Half x;
    __builtin_memcpy(&x, p, sizeof x);
    return (Vec)(__builtin_convertvector(x, Bits) << 16);
}
CFRT_INLINE Vec load_bf16(const std::uint16_t* p, int n) {
    std::uint16_t whole[kLanes] = {};
    __builtin_memcpy(whole, p, static_cast<std::size_t>(n) * 2);
    return load_bf16(whole);
}
CFRT_INLINE Half narrow_bf16(Vec x) {
    const Bits bits = (Bits)x;
    const Bits rounded = bits + ((bits >> 16) & 1u) + 0x7fffu, quiet = bits | 0x400000u;
    return __builtin_convertvector((x == x ? rounded : quiet) >> 16, Half);
}
CFRT_INLINE void store_bf16(std::uint16_t* p, Vec x) {
    const Half half = narrow_bf16(x);
    __builtin_memcpy(p, &half, sizeof half);
}
CFRT_INLINE void store_bf16(std::uint16_t* p, Vec x, int n) {
    const Half half = narrow_bf16(x);
    __builtin_memcpy(p, &half, static_cast<std::size_t>(n) * 2);
}

#endif

}  // namespace
}  // namespace cfrt::CFRT_LEVEL
