// Eight neighbouring numbers of a row: what a thread of the kernels that are bound by memory reads as one access.
#pragma once

#include "device.cuh"

namespace cfrt {

constexpr float kLeastRange = 1e-12f;  // of a row whose scale is asked for: scales are positive

// Four words of bf16, as floats.
struct Eight {
    float x[8];

    __device__ __forceinline__ void read(const std::uint16_t* from) {
        const uint4 words = *reinterpret_cast<const uint4*>(from);
        const std::uint32_t word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) x[2 * i] = low_bf16(word[i]), x[2 * i + 1] = high_bf16(word[i]);
    }

    __device__ __forceinline__ void write(std::uint16_t* to) const {
        store(to,
              make_uint4(pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]), pack_bf16(x[4], x[5]), pack_bf16(x[6], x[7])));
    }

    __device__ __forceinline__ float squares() const {
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < 8; ++i) sum += x[i] * x[i];
        return sum;
    }

    __device__ __forceinline__ float range() const {
        float most = 0.0f;
#pragma unroll
        for (int i = 0; i < 8; ++i) most = fmaxf(most, fabsf(x[i]));
        return most;
    }

    __device__ __forceinline__ Eight times(const Eight& y, float scale) const {
        Eight z;
#pragma unroll
        for (int i = 0; i < 8; ++i) z.x[i] = x[i] * scale * y.x[i];
        return z;
    }

    // Each pair turned by its cosine and sine, `step` apart.
    __device__ __forceinline__ Eight turned(const float2* turn, int step) const {
        Eight z;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float a = x[2 * i], b = x[2 * i + 1];
            z.x[2 * i] = a * turn[i * step].x - b * turn[i * step].y;
            z.x[2 * i + 1] = a * turn[i * step].y + b * turn[i * step].x;
        }
        return z;
    }

    // To nearest even, in units of 1 / inverse.
    __device__ __forceinline__ uint2 int8(float inverse) const {
        std::uint32_t word[2] = {};
#pragma unroll
        for (int i = 0; i < 8; ++i)
            word[i / 4] |= (static_cast<std::uint32_t>(__float2int_rn(x[i] * inverse)) & 255u) << (i % 4 * 8);
        return make_uint2(word[0], word[1]);
    }
};

// The largest of a warp's numbers, in all lanes.
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, step));
    return x;
}

}  // namespace cfrt
