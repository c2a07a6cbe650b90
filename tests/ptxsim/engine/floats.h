// Small floating-point formats by their widths, and PTX's own rules for fp32. All conversions round to nearest even.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

namespace ptxsim {

// kInfinity: the largest exponent is infinity and NaN (IEEE); else only all ones is NaN (e4m3).
template <int kExponent, int kMantissa, bool kInfinity = true>
struct Small {
    static constexpr int kBits = 1 + kExponent + kMantissa, kBias = (1 << (kExponent - 1)) - 1;
    static constexpr std::uint32_t kTop = (1u << kExponent) - 1, kOnes = (1u << kMantissa) - 1;
    static constexpr std::uint32_t kSign = 1u << (kBits - 1);
    static constexpr std::uint32_t kNan = kInfinity ? kTop << kMantissa | kOnes : (kSign - 1);

    static float decode(std::uint32_t bits) {
        const std::uint32_t e = bits >> kMantissa & kTop, m = bits & kOnes;
        const float sign = bits & kSign ? -1.f : 1.f;
        if (e == kTop && (kInfinity || m == kOnes))
            return kInfinity && m == 0 ? sign * std::numeric_limits<float>::infinity()
                                       : std::numeric_limits<float>::quiet_NaN();
        if (e == 0) return sign * std::ldexp(float(m), 1 - kBias - kMantissa);
        return sign * std::ldexp(float(m | 1u << kMantissa), int(e) - kBias - kMantissa);
    }

    // saturate: what lies beyond the largest finite value becomes it, infinities too.
    static std::uint32_t encode(double x, bool saturate = false) {
        if (std::isnan(x)) return kNan;
        const std::uint32_t sign = std::signbit(x) ? kSign : 0;
        const std::uint32_t largest = kInfinity ? (kTop << kMantissa) - 1 : kNan - 1;
        const double a = std::fabs(x);
        if (a == 0) return sign;
        std::uint32_t magnitude = largest + 1;
        if (std::isfinite(a)) {
            int exponent = 0;
            std::frexp(a, &exponent);  // a in [2^(exponent-1), 2^exponent)
            const int unit = std::max(exponent - 1, 1 - kBias) - kMantissa;
            const double steps = std::nearbyint(std::ldexp(a, -unit));  // to even; a carry goes into the exponent
            const std::int64_t e = unit + kMantissa + kBias;            // biased, 1 for subnormals
            const double wide = steps + double(e - 1) * (1 << kMantissa);
            magnitude = wide > double(largest) ? largest + 1 : std::uint32_t(wide);
        }
        if (magnitude > largest) return sign | (saturate ? largest : kInfinity ? largest + 1 : kNan);
        return sign | magnitude;
    }
};

using F16 = Small<5, 10>;
using Bf16 = Small<8, 7>;
using E4m3 = Small<4, 3, false>;
using E5m2 = Small<5, 2>;

inline float bf16_to_float(std::uint32_t bits) {
    return std::bit_cast<float>(bits << 16);
}

inline std::uint32_t float_to_bf16(float x) {
    const auto bits = std::bit_cast<std::uint32_t>(x);
    if ((bits & 0x7fff'ffff) > 0x7f80'0000) return 0x7fff;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

// Every value of a format, for loops.
template <class Format>
const float* decoded() {
    static const auto table = [] {
        auto* values = new float[1u << Format::kBits];
        for (std::uint32_t b = 0; b < 1u << Format::kBits; ++b) values[b] = Format::decode(b);
        return values;
    }();
    return table;
}

inline float flush(float x) {  // .ftz: a subnormal becomes a zero of its sign
    return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.f, x) : x;
}

}  // namespace ptxsim
