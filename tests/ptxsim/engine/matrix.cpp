// The tensor core's warp-wide instructions: ldmatrix and mma.sync (PTX ISA 9.7.14). Which lane holds which element is
// the PTX ISA's fragment figures; tests/test_ptxsim_layouts.py compares them with CuTe's traits.
#include <algorithm>
#include <array>

#include "floats.h"
#include "lanes.h"
#include "memory.h"

namespace ptxsim {
namespace {

void whole_warp(Warp& warp, const Instruction& at, u32 mask, const char* what) {
    if (mask == kAllLanes) return;
    char text[100];
    std::snprintf(text, sizeof text, "%s needs all 32 lanes, got lane mask %08x", what, mask);
    trap(warp, at, Kind::kDivergence, -1, text);
}

// arg: matrices, transposed. Lane l of matrix m gets two neighbours of a row, or of a column when transposed.
void load_matrix(Warp& warp, const Instruction& at, u32 mask) {
    whole_warp(warp, at, mask, "ldmatrix");
    const int matrices = at.arg[0];
    const bool transposed = at.arg[1];
    const Operand& from = at.operand[matrices];
    u64 address[kLanes];
    alignas(16) u8 row[kLanes][16];
    for (int l = 0; l < 8 * matrices; ++l) {
        address[l] = address_of(warp, from, l);
        const u8* bytes = shared_at(warp, at, l, address[l], 16, Access::kRead);
        if (bytes)
            std::memcpy(row[l], bytes, 16);
        else
            std::memset(row[l], 0xff, 16);
    }
    count_wavefronts(warp, at, address, matrices == 4 ? kAllLanes : (1u << 8 * matrices) - 1, 16);
    for (int m = 0; m < matrices; ++m) {
        u32* d = warp.lanes<u32>(at.operand[m]);
        for (int l = 0; l < kLanes; ++l) {
            const int major = l / 4, minor = 2 * (l % 4);
            u16 pair[2];
            for (int e = 0; e < 2; ++e)
                std::memcpy(&pair[e],
                            transposed ? &row[8 * m + minor + e][2 * major] : &row[8 * m + major][2 * (minor + e)], 2);
            d[l] = pair[0] | u32(pair[1]) << 16;
        }
    }
}

// D (16 x 8) = A (16 x kK) B (kK x 8) + C. kBits: of an element of A and B; value: its bits as a number of type T.
// Registers hold 32 / kBits neighbours in k; register r of A is row group + 8 (r % 2), columns from half (r / 2).
template <class T, int kK, int kBits, class Value>
void multiply(const u32* const* a, const u32* const* b, T (*c)[kLanes], Value value) {
    constexpr int kPer = 32 / kBits, kHalf = kK / 2, kRegistersA = 4, kRegistersB = 2;
    constexpr u32 kMask = kBits == 32 ? ~0u : (1u << kBits) - 1;
    typedef T Row __attribute__((vector_size(32)));  // 8 columns; floats and 32-bit integers
    T A[16][kK];
    Row B[kK], C[16];
    for (int l = 0; l < kLanes; ++l) {
        const int group = l / 4, k = kPer * (l % 4);
        for (int r = 0; r < kRegistersA; ++r)
            for (int e = 0; e < kPer; ++e)
                A[group + 8 * (r % 2)][k + kHalf * (r / 2) + e] = value(a[r][l] >> (kBits * e) & kMask);
        for (int r = 0; r < kRegistersB; ++r)
            for (int e = 0; e < kPer; ++e) B[k + kHalf * r + e][group] = value(b[r][l] >> (kBits * e) & kMask);
        for (int r = 0; r < 4; ++r) C[group + 8 * (r / 2)][2 * (l % 4) + r % 2] = c[r][l];
    }
    for (int i = 0; i < 16; ++i)
        for (int k = 0; k < kK; ++k) C[i] += A[i][k] * B[k];
    for (int l = 0; l < kLanes; ++l)
        for (int r = 0; r < 4; ++r) c[r][l] = C[l / 4 + 8 * (r / 2)][2 * (l % 4) + r % 2];
}

struct Fragments {
    const u32 *a[4], *b[2];
};

// arg: registers of d (and c). Operands: d, a (4), b (2), c.
Fragments fragments(Warp& warp, const Instruction& at, u32 mask) {
    whole_warp(warp, at, mask, "mma.sync");
    const Operand* o = at.operand + at.arg[0];
    Fragments found;
    for (int r = 0; r < 4; ++r) found.a[r] = warp.lanes<u32>(o[r]);
    for (int r = 0; r < 2; ++r) found.b[r] = warp.lanes<u32>(o[4 + r]);
    return found;
}

template <class T, int kK, int kBits, class Value>
void mma(Warp& warp, const Instruction& at, u32 mask, Value value, bool fp8) {
    const Fragments in = fragments(warp, at, mask);
    T c[4][kLanes];
    for (int r = 0; r < 4; ++r) std::memcpy(c[r], warp.lanes<T>(at.operand[10 + r]), sizeof c[r]);
    multiply<T, kK, kBits>(in.a, in.b, c, value);
    // Ada keeps fewer bits of an FP8 product's sum: sign, 8 of exponent, 13 of mantissa (SageAttention2, section 3.3).
    if (fp8 && warp.block->launch->options.fp8_accumulator_bits == 22)
        for (auto& row : c)
            for (auto& x : row) {
                u32 bits;
                std::memcpy(&bits, &x, 4);
                bits &= ~0x3ffu;
                std::memcpy(&x, &bits, 4);
            }
    for (int r = 0; r < 4; ++r) std::memcpy(warp.lanes<T>(at.operand[r]), c[r], sizeof c[r]);
}

// The same with C and D in halves, two to a register; the sum is rounded to half once.
template <int kK, int kBits, class Value>
void mma_half(Warp& warp, const Instruction& at, u32 mask, Value value) {
    const Fragments in = fragments(warp, at, mask);
    const float* half = decoded<F16>();
    float c[4][kLanes];
    for (int r = 0; r < 4; ++r)
        for (int l = 0; l < kLanes; ++l)
            c[r][l] = half[warp.lanes<u32>(at.operand[8 + r / 2])[l] >> (16 * (r % 2)) & 0xffff];
    multiply<float, kK, kBits>(in.a, in.b, c, value);
    for (int r = 0; r < 2; ++r)
        for (int l = 0; l < kLanes; ++l)
            warp.lanes<u32>(at.operand[r])[l] = F16::encode(c[2 * r][l]) | F16::encode(c[2 * r + 1][l]) << 16;
}

}  // namespace

void register_matrix() {
    auto& table = handlers();
    table["ldmatrix"].run = load_matrix;
    const std::string m16n8k16 = "mma.m16n8k16.row.col.", m16n8k32 = "mma.m16n8k32.row.col.";
    table[m16n8k16 + "f32.bf16.bf16.f32"].run = [](Warp& w, const Instruction& i, u32 m) {
        mma<float, 16, 16>(w, i, m, [](u32 x) { return bf16_to_float(x); }, false);
    };
    table[m16n8k16 + "f32.f16.f16.f32"].run = [](Warp& w, const Instruction& i, u32 m) {
        mma<float, 16, 16>(w, i, m, [](u32 x) { return decoded<F16>()[x]; }, false);
    };
    table[m16n8k16 + "f16.f16.f16.f16"].run = [](Warp& w, const Instruction& i, u32 m) {
        mma_half<16, 16>(w, i, m, [](u32 x) { return decoded<F16>()[x]; });
    };
    table[m16n8k32 + "s32.s8.s8.s32"].run = [](Warp& w, const Instruction& i, u32 m) {
        mma<i32, 32, 8>(w, i, m, [](u32 x) { return i32(i8(x)); }, false);
    };
    table[m16n8k32 + "f32.e4m3.e4m3.f32"].run = [](Warp& w, const Instruction& i, u32 m) {
        mma<float, 32, 8>(w, i, m, [](u32 x) { return decoded<E4m3>()[x]; }, true);
    };
    table[m16n8k32 + "f32.e5m2.e5m2.f32"].run = [](Warp& w, const Instruction& i, u32 m) {
        mma<float, 32, 8>(w, i, m, [](u32 x) { return decoded<E5m2>()[x]; }, true);
    };
    table[m16n8k32 + "f16.e4m3.e4m3.f16"].run = [](Warp& w, const Instruction& i, u32 m) {
        mma_half<32, 8>(w, i, m, [](u32 x) { return decoded<E4m3>()[x]; });
    };
}

}  // namespace ptxsim
