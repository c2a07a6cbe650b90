// Counter-based noise: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
// The C++/CUDA mirror of cfrt/noise.py, which is the definition: key = seed, counter = (element / 4, unit, step,
// purpose). The integers are equal everywhere, the normals to 2 ulp; tests/test_native_plan.py holds both.
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace cfrt {

struct Philox4 {
    std::uint32_t word[4];
};

// A counter has 32 bits for the quad: the longest array that one (seed, unit, step, purpose) can fill.
constexpr std::int64_t kMaxElements = std::int64_t{4} << 32;

// Which noise: everything but the element. One stream of normals for each value.
struct NoiseKey {
    std::uint64_t seed;
    std::uint32_t unit, step, purpose;
};

// The high and low half of a 64-bit product, one Philox S-box.
CFRT_HD std::uint32_t mul_hi(std::uint32_t a, std::uint32_t b) {
    return static_cast<std::uint32_t>((static_cast<std::uint64_t>(a) * b) >> 32);
}

CFRT_HD Philox4 philox(Philox4 counter, std::uint32_t key0, std::uint32_t key1) {
    constexpr std::uint32_t kMultiplier0 = 0xD2511F53u, kMultiplier1 = 0xCD9E8D57u;
    constexpr std::uint32_t kWeyl0 = 0x9E3779B9u, kWeyl1 = 0xBB67AE85u;
    for (int round = 0; round < 10; ++round) {
        const auto [c0, c1, c2, c3] = counter.word;
        counter = {{mul_hi(kMultiplier1, c2) ^ c1 ^ key0, kMultiplier1 * c2, mul_hi(kMultiplier0, c0) ^ c3 ^ key1,
                    kMultiplier0 * c0}};
        key0 += kWeyl0;
        key1 += kWeyl1;
    }
    return counter;
}

// The four random words that make elements 4 * quad .. 4 * quad + 3.
CFRT_HD Philox4 noise_bits(const NoiseKey& noise, std::uint32_t quad) {
    return philox({{quad, noise.unit, noise.step, noise.purpose}}, static_cast<std::uint32_t>(noise.seed),
                  static_cast<std::uint32_t>(noise.seed >> 32));
}

struct Normal4 {
    float value[4];
};

// Two uint32 -> two normals. As in the definition, u in (0, 1] and the angle are fp32 of 24 bits, and ln, sin, cos are
// taken in fp64: fp32 library functions differ by more than the 2 ulp we promise (CUDA's sinf alone by 2), and a unit's
// noise is so little work that fp64 at 1/64 rate costs a few microseconds.
CFRT_HD void box_muller(std::uint32_t radius, std::uint32_t turn, float* pair) {
    constexpr float kUnit = 0x1p-24f, kTwoPi = 6.283185307179586f;
    const float u = static_cast<float>((radius >> 8) + 1u) * kUnit;
    const double angle = static_cast<float>(turn >> 8) * kUnit * kTwoPi;
    const float r = std::sqrt(-2.0f * static_cast<float>(std::log(static_cast<double>(u))));
    pair[0] = r * static_cast<float>(std::cos(angle));
    pair[1] = r * static_cast<float>(std::sin(angle));
}

// Elements 4 * quad .. 4 * quad + 3 of the noise.
CFRT_HD Normal4 noise_normals(const NoiseKey& noise, std::uint32_t quad) {
    const Philox4 bits = noise_bits(noise, quad);
    Normal4 normals;
    box_muller(bits.word[0], bits.word[1], normals.value);
    box_muller(bits.word[2], bits.word[3], normals.value + 2);
    return normals;
}

}  // namespace cfrt
