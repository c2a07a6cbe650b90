// Noise and re-noise on the CPU, over contiguous float arrays.
#pragma once

#include <cstdint>

#include "../renoise.h"

namespace cfrt {

// out[i] = word i % 4 of block i / 4, for i < count.
void fill_bits(std::uint32_t* out, std::int64_t count, const NoiseKey& noise);

// out[i] = standard normal number i, for i < count.
void fill_normal(float* out, std::int64_t count, const NoiseKey& noise);

// out[i] = (1 - s) x0[i] + s e[i], for i < count; out may be x0.
void renoise(float* out, const float* x0, std::int64_t count, const Renoise& how);

}  // namespace cfrt
