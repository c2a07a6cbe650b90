// The kernels behind append.h. Bound by memory: a token's rows are read once, 16 bytes a thread, and written once.
//
// not timed yet (no GPU so far)
#pragma once

#include "append.h"
#include "attention.h"
#include "device.cuh"
#include "eight.cuh"

namespace cfrt {

constexpr int kMostWarps = 32;

// The granule at which a frame of the unit starts, and the position of its first frame.
__device__ __forceinline__ std::int64_t place_of(const cfrt_append& call, unsigned frame) {
    return call.pass ? call.pass->place[frame] : call.granules[frame];
}
__device__ __forceinline__ std::int64_t first_frame_of(const cfrt_append& call) {
    return call.pass ? call.pass->first_frame : call.first_frame;
}

// A thread's eight numbers of a query; in 8 bits with a scale for each head, whose lanes are neighbours.
template <int kDim, bool kInt8>
__device__ __forceinline__ void write_queries(const cfrt_append& call, const Eight& q, void* out, float* scale,
                                              std::int64_t token, bool real) {
    const int channel = threadIdx.x * 8;
    const std::int64_t at = token * call.heads * kDim + channel;
    if constexpr (kInt8) {
        float range = fmaxf(q.range(), kLeastRange);
#pragma unroll
        for (int step = 1; step < kDim / 8; step *= 2) range = fmaxf(range, __shfl_xor_sync(kAllLanes, range, step));
        if (!real) return;
        *reinterpret_cast<uint2*>(static_cast<std::int8_t*>(out) + at) = q.int8(127.0f / range);
        if (channel % kDim == 0) scale[token * call.heads + channel / kDim] = range / 127.0f;
    } else {
        if (real) q.write(static_cast<std::uint16_t*>(out) + at);
    }
}

// One block is one token: blockIdx.x within its frame, blockIdx.y the frame.
template <int kDim, bool kInt8>
__global__ void __launch_bounds__(1024) append_rows(const __grid_constant__ cfrt_append call) {
    constexpr int kPairs = kDim / 2;
    constexpr int kEights = kDim / 8;  // of a head
    // Cosine and sine, from the token's own position and from the sinks' view; of pair 4 n + i at [i][n], since a
    // thread wants those of its four pairs.
    __shared__ float2 turns[2][4][kEights];
    __shared__ float squares[2][kMostWarps];
    const int thread = threadIdx.x, lane = thread % kLanes, warp = thread / kLanes, warps = blockDim.x / kLanes;
    const int width = call.heads * kDim, channel = thread * 8, head = channel / kDim;
    const std::int64_t token = static_cast<std::int64_t>(blockIdx.y) * gridDim.x + blockIdx.x;
    const bool real = channel < width;

    Eight q{}, k{};
    if (real) {
        q.read(static_cast<const std::uint16_t*>(call.q) + token * call.stride + channel);
        k.read(static_cast<const std::uint16_t*>(call.k) + token * call.stride + channel);
    }

    for (int i = thread; i < 2 * kPairs; i += blockDim.x) {
        const int slot = i % kPairs, pair = slot % kEights * 4 + slot / kEights;
        const std::int64_t frame = first_frame_of(call) + blockIdx.y;
        std::int64_t position = i < kPairs ? frame : min(frame, call.last_sink_view);
        if (pair >= call.pairs[0])
            position = pair < call.pairs[0] + call.pairs[1] ? blockIdx.x / call.columns : blockIdx.x % call.columns;
        const std::uint64_t phase = static_cast<std::uint64_t>(position) * call.turns[pair];
        const float half_turns = static_cast<float>(static_cast<std::int32_t>(phase >> 32)) * 0x1p-31f;
        float2& turn = turns[i / kPairs][slot / kEights][slot % kEights];
        sincospif(half_turns, &turn.y, &turn.x);
    }
    float sum[2] = {q.squares(), k.squares()};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int step = kLanes / 2; step > 0; step /= 2) sum[i] += __shfl_xor_sync(kAllLanes, sum[i], step);
        if (lane == 0) squares[i][warp] = sum[i];
    }
    __syncthreads();
    float root[2] = {};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        for (int w = 0; w < warps; ++w) root[i] += squares[i][w];
        root[i] = rsqrtf(root[i] / static_cast<float>(width) + call.eps);
    }

    Eight weight{};
    if (real) weight.read(static_cast<const std::uint16_t*>(call.q_weight) + channel);
    q = q.times(weight, root[0]);
    if (real) weight.read(static_cast<const std::uint16_t*>(call.k_weight) + channel);
    k = k.times(weight, root[1]);
    const float2 *own = &turns[0][0][thread % kEights], *from_sinks = own + kPairs;
    write_queries<kDim, kInt8>(call, q.turned(own, kEights), call.q_out, call.q_scale, token, real);
    if (call.q_sink_out)
        write_queries<kDim, kInt8>(call, q.turned(from_sinks, kEights), call.q_sink_out, call.q_sink_scale, token,
                                   real);
    if (!real) return;
    k = k.turned(own, kEights);
    if constexpr (kInt8) {
        k.write(static_cast<std::uint16_t*>(call.scratch) + token * width + channel);
    } else {
        const std::int64_t granule = place_of(call, blockIdx.y) + blockIdx.x / CFRT_GRANULE_BF16;
        const std::int64_t row = (granule * call.heads + head) * CFRT_GRANULE_BF16 + blockIdx.x % CFRT_GRANULE_BF16;
        k.write(static_cast<std::uint16_t*>(call.k_out) + row * kDim + channel % kDim);
        const auto* v = static_cast<const std::uint16_t*>(call.v) + token * call.stride + channel;
        store(static_cast<std::uint16_t*>(call.v_out) + row * kDim + channel % kDim,
              *reinterpret_cast<const uint4*>(v));
    }
}

// One block is one granule (blockIdx.x within its frame, blockIdx.z) of one head (blockIdx.y).
template <int kDim>
__global__ void __launch_bounds__(128) quantise_granule(const __grid_constant__ cfrt_append call) {
#ifdef CFRT_FP8
    constexpr int kThreads = 128, kChunks = kDim / 8, kStepRows = kThreads / kChunks, kGranule = CFRT_GRANULE_INT8;
    __shared__ __align__(16) std::uint16_t values[kGranule * kDim];
    __shared__ float ranges[kThreads / kLanes];
    const int thread = threadIdx.x, chunk = thread % kChunks, head = blockIdx.y;
    const int tokens = call.rows * call.columns, first = blockIdx.x * kGranule;
    const std::int64_t frame = static_cast<std::int64_t>(blockIdx.z) * tokens, width = call.heads * kDim;
    const std::int64_t granule = (place_of(call, blockIdx.z) + blockIdx.x) * call.heads + head;

    // Chunks of a row change places with row / 16, so that values can be read back by columns of 16 tokens.
    Eight keys[kGranule / kStepRows];
    float range = kLeastRange;
#pragma unroll
    for (int i = 0; i < kGranule / kStepRows; ++i) {
        const int row = i * kStepRows + thread / kChunks;
        const std::int64_t token = frame + first + row, column = head * kDim + chunk * 8;
        const bool real = first + row < tokens;
        keys[i] = Eight{};
        uint4 value{};
        if (real) {
            keys[i].read(static_cast<const std::uint16_t*>(call.scratch) + token * width + column);
            value = *reinterpret_cast<const uint4*>(static_cast<const std::uint16_t*>(call.v) + token * call.stride +
                                                    column);
        }
        range = fmaxf(range, keys[i].range());
        *reinterpret_cast<uint4*>(values + row * kDim + (chunk ^ (row / 16)) * 8) = value;
    }
    range = warp_max(range);
    if (thread % kLanes == 0) ranges[thread / kLanes] = range;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kThreads / kLanes; ++i) range = fmaxf(range, ranges[i]);
    if (thread == 0) call.k_scale[granule] = range / 127.0f;
    auto* k_out = static_cast<std::int8_t*>(call.k_out) + granule * kGranule * kDim + thread * 8;
#pragma unroll
    for (int i = 0; i < kGranule / kStepRows; ++i)
        *reinterpret_cast<uint2*>(k_out + i * kThreads * 8) = keys[i].int8(127.0f / range);

    // A thread takes 16 tokens of a channel at a time, in the order of cfrt_fp8_position.
    auto* v_out = static_cast<std::int8_t*>(call.v_out) + granule * kGranule * kDim + thread * 16;
#pragma unroll
    for (int i = 0; i < kDim; i += kThreads / 4) {
        const int channel = i + thread / 4, part = thread % 4;
        const float inverse = 1.0f / call.v_scale[head * kDim + channel];
        const std::uint16_t* column = values + part * 16 * kDim + ((channel / 8) ^ part) * 8 + channel % 8;
        std::uint32_t word[4];
#pragma unroll
        for (int w = 0; w < 4; ++w) {
            float x[4];
#pragma unroll
            for (int e = 0; e < 4; ++e) x[e] = low_bf16(column[(w * 2 + e % 2 + e / 2 * 8) * kDim]) * inverse;
            word[w] = pack_fp8(x[0], x[1], x[2], x[3]);
        }
        store(v_out + i * kGranule, make_uint4(word[0], word[1], word[2], word[3]));
    }
#else
    __trap();  // the launcher refuses such a device
#endif
}

}  // namespace cfrt
