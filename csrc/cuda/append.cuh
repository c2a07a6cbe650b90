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

// Cosine and sine of a token's pairs, from its own position and from the sinks' view; of pair 4 n + i at [i][n], since
// a thread wants those of its four pairs.
template <int kDim>
struct Turns {
    static constexpr int kPairs = kDim / 2, kEights = kDim / 8;  // of a head
    float2 from[2][4][kEights];

    __device__ __forceinline__ void fill(const cfrt_append& call) {
        const std::int64_t frame = first_frame_of(call) + blockIdx.y;
        for (int i = threadIdx.x; i < 2 * kPairs; i += blockDim.x) {
            const int slot = i % kPairs, pair = slot % kEights * 4 + slot / kEights;
            std::int64_t position = i < kPairs ? frame : min(frame, call.last_sink_view);
            if (pair >= call.pairs[0])
                position = pair < call.pairs[0] + call.pairs[1] ? blockIdx.x / call.columns : blockIdx.x % call.columns;
            const std::uint64_t phase = static_cast<std::uint64_t>(position) * call.turns[pair];
            const float half_turns = static_cast<float>(static_cast<std::int32_t>(phase >> 32)) * 0x1p-31f;
            float2& turn = from[i / kPairs][slot / kEights][slot % kEights];
            sincospif(half_turns, &turn.y, &turn.x);
        }
    }

    __device__ __forceinline__ Eight turn(const Eight& x, bool sinks) const {
        return x.turned(&from[sinks][0][threadIdx.x % kEights], kEights);
    }
};

// What q and k are multiplied by to have a mean square of one over all heads. A barrier for the block.
__device__ __forceinline__ float2 inverse_roots(const Eight& q, const Eight& k, int width, float eps) {
    __shared__ float squares[2][kMostWarps];
    float root[2] = {q.squares(), k.squares()};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int step = kLanes / 2; step > 0; step /= 2) root[i] += __shfl_xor_sync(kAllLanes, root[i], step);
        if (threadIdx.x % kLanes == 0) squares[i][threadIdx.x / kLanes] = root[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        root[i] = 0.0f;
        for (int warp = 0; warp < blockDim.x / kLanes; ++warp) root[i] += squares[i][warp];
        root[i] = rsqrtf(root[i] / static_cast<float>(width) + eps);
    }
    return make_float2(root[0], root[1]);
}

// A thread's eight numbers of a key and of a value into the bf16 ring, or of a key in front of quantise_granule.
template <int kDim, bool kInt8>
__device__ __forceinline__ void write_keys(const cfrt_append& call, const Eight& k, std::int64_t token) {
    const int channel = threadIdx.x * 8;
    if constexpr (kInt8) {
        k.write(static_cast<std::uint16_t*>(call.scratch) + token * call.heads * kDim + channel);
    } else {
        const std::int64_t granule = place_of(call, blockIdx.y) + blockIdx.x / CFRT_GRANULE_BF16;
        const std::int64_t row =
            (granule * call.heads + channel / kDim) * CFRT_GRANULE_BF16 + blockIdx.x % CFRT_GRANULE_BF16;
        k.write(static_cast<std::uint16_t*>(call.k_out) + row * kDim + channel % kDim);
        const auto* v = static_cast<const std::uint16_t*>(call.v) + token * call.stride + channel;
        store(static_cast<std::uint16_t*>(call.v_out) + row * kDim + channel % kDim,
              *reinterpret_cast<const uint4*>(v));
    }
}

// One block is one token: blockIdx.x within its frame, blockIdx.y the frame.
template <int kDim, bool kInt8>
__global__ void __launch_bounds__(1024) append_rows(const __grid_constant__ cfrt_append call) {
    __shared__ Turns<kDim> turns;
    const int width = call.heads * kDim, channel = threadIdx.x * 8;
    const std::int64_t token = static_cast<std::int64_t>(blockIdx.y) * gridDim.x + blockIdx.x;
    const bool real = channel < width;
    Eight q{}, k{}, weight{};
    if (real) {
        q.read(static_cast<const std::uint16_t*>(call.q) + token * call.stride + channel);
        k.read(static_cast<const std::uint16_t*>(call.k) + token * call.stride + channel);
    }
    turns.fill(call);
    const float2 root = inverse_roots(q, k, width, call.eps);
    if (real) weight.read(static_cast<const std::uint16_t*>(call.q_weight) + channel);
    q = q.times(weight, root.x);
    if (real) weight.read(static_cast<const std::uint16_t*>(call.k_weight) + channel);
    k = k.times(weight, root.y);
    write_queries<kDim, kInt8>(call, turns.turn(q, false), call.q_out, call.q_scale, token, real);
    if (call.q_sink_out)
        write_queries<kDim, kInt8>(call, turns.turn(q, true), call.q_sink_out, call.q_sink_scale, token, real);
    if (real) write_keys<kDim, kInt8>(call, turns.turn(k, false), token);
}

#ifdef CFRT_FP8

// The keys and values of 64 tokens of one head, by 128 threads.
template <int kDim>
struct Granule {
    static constexpr int kThreads = 128, kRows = CFRT_GRANULE_INT8;
    static constexpr int kChunks = kDim / 8, kStepRows = kThreads / kChunks, kSteps = kRows / kStepRows;

    const cfrt_append& call;
    std::uint16_t* const values;  // of the block. Chunks change places with row / 16: read back by columns of 16 tokens
    const int thread = threadIdx.x, head = blockIdx.y;
    const std::int64_t granule = (place_of(call, blockIdx.z) + blockIdx.x) * call.heads + head;
    Eight keys[kSteps];

    // Returns the largest of this thread's keys.
    __device__ __forceinline__ float read() {
        const int tokens = call.rows * call.columns, chunk = thread % kChunks;
        const std::int64_t column = head * kDim + chunk * 8, width = call.heads * kDim;
        float range = kLeastRange;
#pragma unroll
        for (int i = 0; i < kSteps; ++i) {
            const int row = i * kStepRows + thread / kChunks, of_frame = blockIdx.x * kRows + row;
            const std::int64_t token = static_cast<std::int64_t>(blockIdx.z) * tokens + of_frame;
            const bool real = of_frame < tokens;
            keys[i] = Eight{};
            uint4 value{};
            if (real) {
                keys[i].read(static_cast<const std::uint16_t*>(call.scratch) + token * width + column);
                value = *reinterpret_cast<const uint4*>(static_cast<const std::uint16_t*>(call.v) +
                                                        token * call.stride + column);
            }
            range = fmaxf(range, keys[i].range());
            *reinterpret_cast<uint4*>(values + row * kDim + (chunk ^ (row / 16)) * 8) = value;
        }
        return range;
    }

    __device__ __forceinline__ void write_keys(float range) const {
        if (thread == 0) call.k_scale[granule] = range / 127.0f;
        auto* out = static_cast<std::int8_t*>(call.k_out) + granule * kRows * kDim + thread * 8;
#pragma unroll
        for (int i = 0; i < kSteps; ++i)
            *reinterpret_cast<uint2*>(out + i * kThreads * 8) = keys[i].int8(127.0f / range);
    }

    // A thread takes 16 tokens of a channel at a time, in the order of cfrt_fp8_position.
    __device__ __forceinline__ void write_values() const {
        auto* out = static_cast<std::int8_t*>(call.v_out) + granule * kRows * kDim + thread * 16;
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
            store(out + i * kRows, make_uint4(word[0], word[1], word[2], word[3]));
        }
    }
};

#endif

// One block is one granule (blockIdx.x within its frame, blockIdx.z) of one head (blockIdx.y).
template <int kDim>
__global__ void __launch_bounds__(128) quantise_granule(const __grid_constant__ cfrt_append call) {
#ifdef CFRT_FP8
    __shared__ __align__(16) std::uint16_t values[CFRT_GRANULE_INT8 * kDim];
    __shared__ float ranges[4];
    Granule<kDim> granule{call, values};
    float range = warp_max(granule.read());
    if (threadIdx.x % kLanes == 0) ranges[threadIdx.x / kLanes] = range;
    __syncthreads();
#pragma unroll
    for (int warp = 0; warp < 4; ++warp) range = fmaxf(range, ranges[warp]);
    granule.write_keys(range);
    granule.write_values();
#else
    __trap();  // the launcher refuses such a device
#endif
}

}  // namespace cfrt
