// The instructions that C++ has no words for: the only file of this project with PTX in it. Kernels above are plain
// C++.
//
// Fragments are those of the PTX manual ("Matrix fragments for mma.m16n8k16 / m16n8k32"): of a 16 x 8 accumulator, lane
// l holds row l / 4 (values 0, 1) and row l / 4 + 8 (values 2, 3) in columns 2 (l % 4) and 2 (l % 4) + 1.
#pragma once

#include <cstdint>

namespace cfrt {

constexpr int kLanes = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// ------------------------------------------------------------------------------------------------ shared memory

// An address as ldmatrix and cp.async want it: 32 bits, inside the block's shared memory.
using SharedAddress = std::uint32_t;

__device__ __forceinline__ SharedAddress shared_address(const void* pointer) {
    return static_cast<SharedAddress>(__cvta_generic_to_shared(pointer));
}

// Starts to copy 16 bytes from global memory, past the registers. Both addresses are multiples of 16.
__device__ __forceinline__ void copy_async(SharedAddress to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

// The same, or 16 zero bytes, where `from` is not read.
__device__ __forceinline__ void copy_async(SharedAddress to, const void* from, bool real) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(real ? 16 : 0) : "memory");
}

__device__ __forceinline__ void commit_copies() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Until all of this thread's copies have landed; a barrier then shows them to the other threads.
__device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_group 0;" ::: "memory");
}

// Where chunk `chunk` (16 bytes) of row `row` lies in a tile of rows of kRowBytes: chunks change places with the row,
// so that the eight rows that ldmatrix reads at once lie in different banks.
template <int kRowBytes>
__device__ __forceinline__ constexpr std::uint32_t swizzled(int row, int chunk) {
    constexpr int kRowsOfALine = kRowBytes < 128 ? 128 / kRowBytes : 1, kChunks = kRowBytes < 128 ? kRowBytes / 16 : 8;
    return static_cast<std::uint32_t>(row * kRowBytes + ((chunk ^ ((row / kRowsOfALine) & (kChunks - 1))) << 4));
}

// From the address of chunk c in such a tile to that of chunk c ^ chunks in the same row.
__device__ __forceinline__ SharedAddress across(SharedAddress address, int chunks) {
    return address ^ static_cast<SharedAddress>(chunks << 4);
}

// Makes the compiler believe that x changes here, so that it computes what follows from it anew, instead of keeping all
// of it in registers around a loop.
template <class Word>
__device__ __forceinline__ Word forget(Word& x) {
    asm volatile("" : "+r"(x));
    return x;
}

// Four 8 x 8 matrices of 16-bit elements (or 8 x 16 of 8 bits): lane l names row l % 8 of matrix l / 8.
__device__ __forceinline__ void load_matrices(std::uint32_t (&m)[4], SharedAddress row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(row)
                 : "memory");
}

__device__ __forceinline__ void load_matrices_transposed(std::uint32_t (&m)[4], SharedAddress row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(row)
                 : "memory");
}

// ------------------------------------------------------------------------------------------------ global memory

// 16 bytes as one access, which the compiler does not always make of an assignment.
__device__ __forceinline__ void store(void* to, uint4 x) {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(x.x), "r"(x.y),
                 "r"(x.z), "r"(x.w)
                 : "memory");
}

// The same with 8 bytes.
__device__ __forceinline__ void store(void* to, uint2 x) {
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(to)), "r"(x.x), "r"(x.y) : "memory");
}

// ------------------------------------------------------------------------------------------------ products

// d += a b, a 16 x 16 of bf16, b 16 x 8, d in fp32.
__device__ __forceinline__ void multiply_bf16(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                                              std::uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// d += a b, a 16 x 32 of int8, b 32 x 8, exact.
__device__ __forceinline__ void multiply_int8(std::int32_t (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                                              std::uint32_t b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 890
#define CFRT_FP8 1

// d += a b, a 16 x 32 of e4m3, b 32 x 8. Ada keeps about 22 bits of the sum: add up few products, then go on in fp32.
__device__ __forceinline__ void multiply_fp8(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                                             std::uint32_t b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The same with an fp16 sum, d two by two: twice as fast on GeForce cards.
__device__ __forceinline__ void multiply_fp8(std::uint32_t (&d)[2], const std::uint32_t (&a)[4], std::uint32_t b0,
                                             std::uint32_t b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.f16.e4m3.e4m3.f16 {%0, %1}, {%2, %3, %4, %5}, {%6, %7}, {%0, %1};"
        : "+r"(d[0]), "+r"(d[1])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four numbers as e4m3, the first in the lowest byte; to nearest even, beyond 448 cut to 448.
__device__ __forceinline__ std::uint32_t pack_fp8(float x0, float x1, float x2, float x3) {
    std::uint32_t packed;
    asm("{\n .reg .b16 low, high;\n cvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n cvt.rn.satfinite.e4m3x2.f32 high, %4, "
        "%3;"
        "\n mov.b32 %0, {low, high};\n}"
        : "=r"(packed)
        : "f"(x0), "f"(x1), "f"(x2), "f"(x3));
    return packed;
}
#endif

// ------------------------------------------------------------------------------------------------ numbers

// 2^x to 2 ulp; results below the normal range are 0.
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// 1 / x to 1 ulp.
__device__ __forceinline__ float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Two numbers as bf16, to nearest even, the first in the low half.
__device__ __forceinline__ std::uint32_t pack_bf16(float low, float high) {
    std::uint32_t packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

__device__ __forceinline__ float low_bf16(std::uint32_t pair) {
    return __uint_as_float(pair << 16);
}
__device__ __forceinline__ float high_bf16(std::uint32_t pair) {
    return __uint_as_float(pair & 0xffff0000u);
}

__device__ __forceinline__ void unpack_fp16(std::uint32_t pair, float& low, float& high) {
    asm("{\n .reg .b16 l, h;\n mov.b32 {l, h}, %2;\n cvt.f32.f16 %0, l;\n cvt.f32.f16 %1, h;\n}"
        : "=f"(low), "=f"(high)
        : "r"(pair));
}

// Over the four lanes that hold a row of an accumulator.
__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
    return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(kAllLanes, x, 1);
    return x + __shfl_xor_sync(kAllLanes, x, 2);
}

}  // namespace cfrt
