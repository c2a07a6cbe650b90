// What the attention kernels share: a call as a kernel takes it, the walk over its keys, and the shape of a block.
#pragma once

#include "../host_device.h"
#include "attention.h"
#include "device.cuh"

namespace cfrt {

constexpr int kWarps = 4, kThreads = kWarps * kLanes;
constexpr int kWarpRows = 32;                   // queries of a warp: two fragments of 16
constexpr int kBlockRows = kWarps * kWarpRows;  // queries of a block
constexpr float kHidden = -1e30f;               // the score of a padding row; finite, so that no difference is NaN

// A granule is what a block looks at in one turn: so many keys of one piece, fewer at its end.
template <int kGranule>
CFRT_HD constexpr std::int32_t granules_of(std::int32_t rows) {
    return (rows + kGranule - 1) / kGranule;
}

struct Call {
    cfrt_attention a;
    std::int32_t granules, sink_granules;  // of all pieces, and of those that q_sink looks at
    std::int32_t split_granules;           // of one part
    std::int64_t unit, step, head;         // how far it is from start to start + 1, granule to granule, head to head
    float scale_log2;                      // scale log2(e): the kernels work in powers of two
};

// Piece i: of the record in device memory where the call has one.
__device__ __forceinline__ cfrt_piece piece_of(const Call& call, int i) {
    return call.a.pass ? call.a.pass->pieces[i] : call.a.pieces[i];
}

// The granule that a block is at, in the keys of one head.
template <class Offset, int kGranule>
struct Cursor {
    int piece = 0;
    int rows;       // of the piece, from here on
    Offset offset;  // from k, and from v: in elements for bf16, in granules of a head for 8 bits

    __device__ __forceinline__ Cursor(const Call& call, int head, int granule) {
        for (int n; granule >= (n = granules_of<kGranule>(piece_of(call, piece).rows)); ++piece) granule -= n;
        enter(call, head);
        rows -= granule * kGranule;
        offset += granule * static_cast<Offset>(call.step);
    }

    __device__ __forceinline__ void advance(const Call& call, int head) {
        rows -= kGranule;
        offset += static_cast<Offset>(call.step);
        if (rows <= 0) {
            ++piece;
            enter(call, head);
        }
    }

  private:
    __device__ __forceinline__ void enter(const Call& call, int head) {
        const cfrt_piece here = piece_of(call, piece);
        rows = here.rows;
        offset = here.start * static_cast<Offset>(call.unit) + head * static_cast<Offset>(call.head);
    }
};

// How the granules are dealt out: as the host has planned it, or those of a record in device memory evenly, in which
// case the last parts may be empty.
struct Deal {
    int granules, sinks, part;

    __device__ __forceinline__ explicit Deal(const Call& call)
        : granules(call.granules), sinks(call.sink_granules), part(call.split_granules) {
        if (const cfrt_pass* pass = call.a.pass) {
            granules = pass->granules;
            sinks = call.a.q_sink ? pass->sink_granules : 0;
            part = (granules + call.a.splits - 1) / call.a.splits;
        }
    }

    __device__ __forceinline__ int parts() const { return (granules + part - 1) / part; }
};

// The granules [first, last) that block z looks at from one of the two positions.
struct Granules {
    int first, last;
};
__device__ __forceinline__ Granules part_of(const Call& call, bool sink) {
    const Deal deal(call);
    const int first = blockIdx.z * deal.part, last = min(first + deal.part, deal.granules);
    return sink ? Granules{first, min(last, deal.sinks)} : Granules{max(first, deal.sinks), last};
}

// Whether nothing is left for block z.
__device__ __forceinline__ bool is_idle(const Call& call) {
    const Deal deal(call);
    return blockIdx.z * deal.part >= deal.granules;
}

// ------------------------------------------------------------------------------------------------ the answer

// The query that a lane's values 2 half, 2 half + 1 of fragment t belong to.
__device__ __forceinline__ int query_of(int t, int half) {
    return blockIdx.x * kBlockRows + threadIdx.x / kLanes * kWarpRows + t * 16 + threadIdx.x % kLanes / 4 + half * 8;
}

// A warp's 32 rows as bf16, by way of its own shared memory, 32 rows of kDim, so that rows are written 16 bytes at
// once.
template <int kDim>
__device__ __forceinline__ void write_rows(const Call& call, unsigned char* shared,
                                           const float (&rows)[2][kDim / 8][4]) {
    constexpr int kRowBytes = 2 * kDim, kChunks = kRowBytes / 16, kStepRows = kLanes / kChunks;
    const int lane = threadIdx.x % kLanes;
    __syncwarp();
#pragma unroll
    for (int t = 0; t < 2; ++t)
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int n = 0; n < kDim / 8; ++n)
                *reinterpret_cast<std::uint32_t*>(shared + swizzled<kRowBytes>(t * 16 + half * 8 + lane / 4, n) +
                                                  lane % 4 * 4) =
                    pack_bf16(rows[t][n][half * 2], rows[t][n][half * 2 + 1]);
    __syncwarp();
    auto* out = static_cast<std::uint16_t*>(call.a.out) + blockIdx.y * kDim + lane % kChunks * 8;
    const int first = blockIdx.x * kBlockRows + threadIdx.x / kLanes * kWarpRows;
#pragma unroll
    for (int i = 0; i < kWarpRows; i += kStepRows) {
        const int row = i + lane / kChunks;
        if (first + row < call.a.queries)
            store(out + (first + row) * call.a.out_stride,
                  *reinterpret_cast<const uint4*>(shared + swizzled<kRowBytes>(row, lane % kChunks)));
    }
}

// The same for one part of the keys: fp32 [split][query][head][dim] of `scratch`, then [split][query][head] logarithms
// of the sums of weights, which attention_merge puts together.
template <int kDim>
__device__ __forceinline__ void write_partial(const Call& call, const float (&rows)[2][kDim / 8][4],
                                              const float (&logarithm)[2][2]) {
    const int lane = threadIdx.x % kLanes;
    const std::int64_t all = static_cast<std::int64_t>(gridDim.z) * call.a.queries * call.a.heads;
#pragma unroll
    for (int t = 0; t < 2; ++t)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int query = query_of(t, half);
            if (query >= call.a.queries) continue;
            const std::int64_t at =
                (static_cast<std::int64_t>(blockIdx.z) * call.a.queries + query) * call.a.heads + blockIdx.y;
            float* out = call.a.scratch + at * kDim + lane % 4 * 2;
#pragma unroll
            for (int n = 0; n < kDim / 8; ++n)
                *reinterpret_cast<float2*>(out + n * 8) = make_float2(rows[t][n][half * 2], rows[t][n][half * 2 + 1]);
            if (lane % 4 == 0) call.a.scratch[all * kDim + at] = logarithm[t][half];
        }
}

}  // namespace cfrt
