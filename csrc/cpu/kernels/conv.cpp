// What surrounds the products of a convolution. A row is gathered once and read by every panel of the weights, so the
// copy costs about one store for each N multiply-adds of 16 lanes, N the columns of the product.
//
// The ladder; the decoder of the embedded student, 64 x 64 pixels, 234 MFLOP a latent frame with padding:
//   -  a product for each of the nine taps, added up, needs no gathering: 187, 352, 489 GFLOP/s in fp32, bf16, int8,
//      256 rows of 64 channels; one product over gathered rows gives 249, 495, 952 (Zen 5, measured on 2026-11-26).
//      Nine epilogues cost more than the copy
//   1  rows gathered in blocks for the second-level cache: 106, 206, 309 GFLOP/s, decode to uint8 included; products
//      alone reach 113, 219, 402 on 56 x 64 x 576 (Zen 4, one core, best of 600 calls, measured on 2026-11-25). In ms
//      2.20, 1.14, 0.76; with two threads 1.09, 0.60, 0.39
//   2  int8: rows are rounded as they are gathered, without a copy in fp32 in between. Both together took a quarter of
//      a unit's time before

#include "conv.h"

#include "../simd.h"
#include "activations.h"
#include "int8_rows.h"

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
        float* to = static_cast<float*>(a.out) + (row - begin) * a.out_stride;
        for (std::int64_t tap = 0; tap < a.count; ++tap)
            copy(to + tap * a.width, a.plane + taps[tap] * a.width, a.width);
        for (std::int64_t i = a.count * a.width; i < a.depth; ++i) to[i] = 0;
    }
}

// f(x, i, lanes) for the vectors x of a row's taps, numbers i.. of the row.
template <class F>
CFRT_INLINE void for_each_vec(const Gather& a, std::int64_t row, F f) {
    const std::int32_t* taps = a.taps + row * a.count;
    for (std::int64_t tap = 0; tap < a.count; ++tap) {
        const float* from = a.plane + taps[tap] * a.width;
        std::int64_t i = 0;
        for (; i + kLanes <= a.width; i += kLanes) f(load(from + i), tap * a.width + i, kLanes);
        const int rest = static_cast<int>(a.width - i);
        if (rest) f(load(from + i, rest), tap * a.width + i, rest);
    }
}

void gather_int8(const Gather& a, float* scale, std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) {
        Int8* to = static_cast<Int8*>(a.out) + (row - begin) * a.out_stride;
        RowPeak peak;
        for_each_vec(a, row, [&](Vec x, std::int64_t, int) { peak.see(x); });
        const Int8Scale found = peak.scale();
        scale[row - begin] = found.scale;
        if (found.inverse == 0.0f) {
            fill_zeros(to, a.depth);
            continue;
        }
        const Vec inverse = splat(found.inverse);
        for_each_vec(a, row, [&](Vec x, std::int64_t i, int lanes) {
            lanes == kLanes ? store_int8(to + i, x * inverse) : store_int8(to + i, x * inverse, lanes);
        });
        fill_zeros(to + a.count * a.width, a.depth - a.count * a.width);
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
constinit const ConvKernels conv{gather, gather_int8, activate};

}  // namespace cfrt::CFRT_LEVEL
