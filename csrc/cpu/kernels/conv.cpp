// What surrounds the products of a convolution. A row is gathered once and read by every panel of the weights, so the
// copy costs about one store for each N multiply-adds of 16 lanes, N the columns of the product.
//
// The decoder of the embedded student (64 x 64 pixels, 234 MFLOP a latent frame, padding counted), measured on
// 2026-11-25 on one core of an AMD EPYC (Zen 4), best of 600 calls, decode to uint8 included; `gemm` alone reaches 113,
// 219 and 402 GFLOP/s there on 56 x 64 x 576:
//
//   fp32   2.20 ms   106 GFLOP/s   1.09 ms with two threads
//   bf16   1.14 ms   206 GFLOP/s   0.60 ms
//   int8   0.76 ms   309 GFLOP/s   0.39 ms   (each gathered row is measured and rounded anew)

#include "conv.h"

#include "../simd.h"
#include "activations.h"

namespace cfrt::CFRT_LEVEL {
namespace {

CFRT_INLINE void copy(float* to, const float* from, std::int64_t count) {
    std::int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i));
    if (i < count) store(to + i, load(from + i, static_cast<int>(count - i)), static_cast<int>(count - i));
}

void gather(const Gather& a, std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) {
        const std::int32_t* taps = a.taps + row * a.count;
        float* to = a.out + (row - begin) * a.out_stride;
        for (std::int64_t tap = 0; tap < a.count; ++tap)
            copy(to + tap * a.width, a.plane + taps[tap] * a.width, a.width);
        for (std::int64_t i = a.count * a.width; i < a.depth; ++i) to[i] = 0;
    }
}

CFRT_INLINE void put(float* p, Vec x, int lanes) {
    lanes == kLanes ? store(p, x) : store(p, x, lanes);
}
CFRT_INLINE void put(std::uint16_t* p, Vec x, int lanes) {
    lanes == kLanes ? store_bf16(p, x) : store_bf16(p, x, lanes);
}

template <class T, class Function>
CFRT_INLINE void map(const Activate& a, std::int64_t begin, std::int64_t end, Function f) {
    for (std::int64_t row = begin; row < end; ++row) {
        const float* from = a.x + row * a.width;
        T* to = static_cast<T*>(a.out) + row * a.out_stride;
        for (std::int64_t i = 0; i < a.width; i += kLanes) {
            const int lanes = static_cast<int>(least<std::int64_t>(kLanes, a.width - i));
            put(to + i, f(lanes == kLanes ? load(from + i) : load(from + i, lanes)), lanes);
        }
        for (std::int64_t i = a.width; i < a.out_stride; ++i) to[i] = 0;
    }
}

template <class T>
void activate_as(const Activate& a, std::int64_t begin, std::int64_t end) {
    a.silu ? map<T>(a, begin, end, [](Vec y) { return silu(y); }) : map<T>(a, begin, end, [](Vec y) { return y; });
}

void activate(const Activate& a, std::int64_t begin, std::int64_t end) {
    a.bf16 ? activate_as<std::uint16_t>(a, begin, end) : activate_as<float>(a, begin, end);
}

}  // namespace

extern const ConvKernels conv;
constinit const ConvKernels conv{gather, activate};

}  // namespace cfrt::CFRT_LEVEL
