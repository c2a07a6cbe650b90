// C = A W^T in fp32.

#include "gemm_block.h"

namespace cfrt::CFRT_LEVEL {
namespace {

struct Fp32 {
    using A = float;
    using W = float;
    using Sum = float;
    static constexpr int kGroup = 1;

    template <int R>
    static void block(const float* a, std::int64_t stride, const float* w, std::int64_t groups, float* sums) {
        Vec acc[R][kVecs];
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
            for (int v = 0; v < kVecs; ++v) acc[r][v] = zero();
        for (std::int64_t k = 0; k < groups; ++k, w += kPanel) {
            Vec b[kVecs];
#pragma GCC unroll 4
            for (int v = 0; v < kVecs; ++v) b[v] = load(w + v * kLanes);
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
            for (int v = 0; v < kVecs; ++v) store(sums + r * kPanel + v * kLanes, acc[r][v]);
    }

    CFRT_INLINE static Vec value(const Gemm&, const Tile&, const float* row, int, int v) {
        return load(row + v * kLanes);
    }
};

}  // namespace

extern const GemmKernel gemm_fp32;
constinit const GemmKernel gemm_fp32{kPanel, Fp32::kGroup, sizeof(Fp32::A), 0, tiles, run<Fp32>};

}  // namespace cfrt::CFRT_LEVEL
