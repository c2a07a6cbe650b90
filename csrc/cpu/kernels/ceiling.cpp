// The multiply-adds of the products, with as many independent sums as fill the pipelines, and nothing around them.

#include "ceiling.h"

#include "dots.h"

#if CFRT_SIMD >= 2
#define CFRT_REGISTER "+v"
#elif defined(__aarch64__)
#define CFRT_REGISTER "+w"
#else
#define CFRT_REGISTER "+x"
#endif

namespace cfrt::CFRT_LEVEL {
namespace {

constexpr int kCount = CFRT_SIMD >= 2 ? 24 : 10;

template <class Dot>
void run(std::int64_t rounds) {
    decltype(Dot::splat(0, nullptr)) x{};
    decltype(Dot::load(0, nullptr)) w{};
    typename Dot::Acc sums[kCount];
#pragma GCC unroll 32
    for (int i = 0; i < kCount; ++i) {
        sums[i] = typename Dot::Acc{};
        asm volatile("" : CFRT_REGISTER(sums[i]));  // each unknown: sums that start alike would be made once for all
    }
    for (std::int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 32
        for (int i = 0; i < kCount; ++i) {
            asm volatile("" : CFRT_REGISTER(x), CFRT_REGISTER(w));  // unknown from here on: no product is there already
            sums[i] = Dot::dot(x, w, sums[i]);
        }
    }
#pragma GCC unroll 32
    for (int i = 0; i < kCount; ++i) asm volatile("" : CFRT_REGISTER(sums[i]));  // used: nothing is left out
}

template <class Dot>
constexpr CeilingKernel ceiling{2 * kCount * kLanes * Dot::kGroup / Dot::kSteps, run<Dot>};

}  // namespace

extern const CeilingKernel ceiling_fp32, ceiling_bf16, ceiling_int8;
constinit const CeilingKernel ceiling_fp32 = ceiling<Fp32>, ceiling_bf16 = ceiling<Bf16>, ceiling_int8 = ceiling<Whole>;

}  // namespace cfrt::CFRT_LEVEL
