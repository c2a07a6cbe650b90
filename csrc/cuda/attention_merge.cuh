// Puts the parts together that the keys were dealt into: out = sum of w_i out_i, w_i = 2^(log_i - log of the sum).
// A kernel of its own, so that no block waits for another. Bound by memory.
#pragma once

#include "keys.cuh"

namespace cfrt {

// A thread writes four numbers of one query and head.
template <int kDim>
__global__ void __launch_bounds__(kThreads) attention_merge(const __grid_constant__ Call call) {
    constexpr int kQuads = kDim / 4;
    const std::int64_t heads = call.a.heads, rows = call.a.queries * heads;
    const std::int64_t index = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    const std::int64_t row = index / kQuads, quad = index % kQuads;
    if (row >= rows) return;
    const float* part = call.a.scratch + row * kDim + quad * 4;
    const float* logarithm = call.a.scratch + call.a.splits * rows * kDim + row;
    const int parts = Deal(call).parts();  // the others have not been written
    float top = logarithm[0];
    for (int i = 1; i < parts; ++i) top = fmaxf(top, logarithm[i * rows]);
    float total = 0.0f, sum[4] = {};
    for (int i = 0; i < parts; ++i) {
        const float weight = exp2_fast(logarithm[i * rows] - top);
        const float4 x = *reinterpret_cast<const float4*>(part + i * rows * kDim);
        total += weight;
        sum[0] += weight * x.x, sum[1] += weight * x.y, sum[2] += weight * x.z, sum[3] += weight * x.w;
    }
    const float share = reciprocal(total);
    auto* out = static_cast<std::uint16_t*>(call.a.out) + row / heads * call.a.out_stride + row % heads * kDim;
    store(out + quad * 4,
          make_uint2(pack_bf16(sum[0] * share, sum[1] * share), pack_bf16(sum[2] * share, sum[3] * share)));
}

}  // namespace cfrt
