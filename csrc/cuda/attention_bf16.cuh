// Attention in bf16 with fp32 sums (FlashAttention-2, arXiv:2307.08691), over granules of 32 keys read in place.
//
// A block takes 128 queries of one head, a warp 32 of them, and walks over its part of the keys a granule at a time: K
// of the next granule is on its way while the softmax and the product with V run, V of this one during the product with
// K. Scores, weights and sums stay in registers.
//
// The running maximum is allowed to be stale by 2^kSlack, as in FlashAttention-4: what it divides out cancels in the
// end, and the multiplication of all sums, 128 instructions of a granule, is left out of nearly all granules.
//
// predicted for an RTX 4090 (benchmarks/sass_gate.py); not timed yet
#pragma once

#include "walk.cuh"

namespace cfrt {

constexpr float kSlack = 8.0f;  // in powers of two

template <int kDim, bool kRows>
struct AttentionBf16 {
    static constexpr int kGranule = CFRT_GRANULE_BF16;
    static constexpr int kRowBytes = 2 * kDim, kChunks = kRowBytes / 16;
    static constexpr int kStepRows = kThreads / kChunks;  // rows that the block copies at once
    static constexpr int kTileBytes = kGranule * kRowBytes;
    static constexpr int kSharedBytes = kBlockRows * kRowBytes + 2 * kTileBytes;
    static constexpr int kColumns = kDim / 8;  // accumulators of 8 columns
    using Element = std::uint16_t;
    using At = Cursor<std::int64_t, kGranule>;

    const Call& call;
    const int head = blockIdx.y;
    int thread = threadIdx.x;
    unsigned char* const shared;
    const SharedAddress queries = shared_address(shared), keys = queries + kBlockRows * kRowBytes;
    const SharedAddress values = keys + kTileBytes;
    SharedAddress my_query, my_key, my_value;  // where this lane's first fragments lie

    float sums[2][kColumns][4] = {};     // of weights times values
    float top[2][2], weight[2][2] = {};  // of each row: the maximum in powers of two, the sum of this lane's weights
    float scores[2][4][4];

    __device__ AttentionBf16(const Call& c, unsigned char* memory) : call(c), shared(memory) {
#pragma unroll
        for (int i = 0; i < 4; ++i) top[i / 2][i % 2] = kHidden;
    }

    __device__ void run() {
        if (is_idle(call)) return;
#pragma unroll 1
        for (int turn = 0; turn < 2; ++turn) look_from(turn ? call.a.q : call.a.q_sink, part_of(call, turn == 0));
        write();
    }

    // ------------------------------------------------------------------------------------------- memory

    __device__ void find_fragments() {
        const int lane = forget(thread) % kLanes, warp = thread / kLanes;
        my_query = queries + swizzled<kRowBytes>(warp * kWarpRows + lane % 16, lane / 16);
        my_key = keys + swizzled<kRowBytes>(lane % 8 + lane / 16 * 8, lane / 8 % 2);
        my_value = values + swizzled<kRowBytes>(lane % 16, lane / 16);
    }

    __device__ void copy_granule(SharedAddress to, const void* from, const At& at) {
        const int copy_row = thread / kChunks, copy_chunk = thread % kChunks;
        to += swizzled<kRowBytes>(copy_row, copy_chunk);
        const Element* tile = static_cast<const Element*>(from) + at.offset;
        tile += kRows ? copy_row * call.a.row_stride + copy_chunk * 8 : thread * 8;
#pragma unroll
        for (int i = 0; i < kGranule / kStepRows; ++i) {
            const SharedAddress there = to + i * kStepRows * kRowBytes;
            if constexpr (kRows)
                copy_async(there, tile + i * kStepRows * call.a.row_stride, copy_row + i * kStepRows < at.rows);
            else
                copy_async(there, tile + i * kThreads * 8);
        }
    }

    // ------------------------------------------------------------------------------------------- one part of the keys

    // An earlier position's queries and values have been used by all when it ends.
    __device__ void look_from(const void* position, Granules part) {
        if (part.first >= part.last) return;
        find_fragments();
        copy_queries<kRowBytes, Element>(call, position, queries);
        walk(*this, part);
    }

    __device__ void copy_keys(const At& at) { copy_granule(keys, call.a.k, at); }
    __device__ void copy_values(const At& at) { copy_granule(values, call.a.v, at); }

    __device__ void score(const At& at) {
        multiply_by_keys();
        if (at.rows < kGranule) hide(at.rows);
    }

    __device__ void multiply_by_keys() {
        forget(my_query), forget(my_key);
#pragma unroll
        for (int i = 0; i < 32; ++i) scores[i / 16][i / 4 % 4][i % 4] = 0.0f;
#pragma unroll
        for (int depth = 0; depth < kDim / 16; ++depth) {
            std::uint32_t a[2][4];
#pragma unroll
            for (int t = 0; t < 2; ++t) load_matrices(a[t], across(my_query, depth * 2) + t * 16 * kRowBytes);
#pragma unroll
            for (int n = 0; n < 4; n += 2) {
                std::uint32_t b[4];
                load_matrices(b, across(my_key, depth * 2) + n * 8 * kRowBytes);
#pragma unroll
                for (int t = 0; t < 2; ++t) {
                    multiply_bf16(scores[t][n], a[t], b[0], b[1]);
                    multiply_bf16(scores[t][n + 1], a[t], b[2], b[3]);
                }
            }
        }
    }

    // Keys from `rows` on are padding.
    __device__ void hide(int rows) {
        const int column = thread % 4 * 2;
#pragma unroll
        for (int i = 0; i < 32; ++i)
            if (i / 4 % 4 * 8 + column + i % 2 >= rows) scores[i / 16][i / 4 % 4][i % 4] = kHidden;
    }

    // Scores become weights, 2^(score - top); the sums follow `top` where it must rise.
    __device__ void weigh() {
        float fresh[2][2];
        bool rises = false;
#pragma unroll
        for (int t = 0; t < 2; ++t)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float most = kHidden;
#pragma unroll
                for (int i = 0; i < 8; ++i) most = fmaxf(most, scores[t][i / 2][half * 2 + i % 2]);
                fresh[t][half] = quad_max(most);
                rises |= fmaf(fresh[t][half], call.scale_log2, -top[t][half]) > kSlack;
            }
        if (__any_sync(kAllLanes, rises)) raise(fresh);
#pragma unroll
        for (int t = 0; t < 2; ++t)
#pragma unroll
            for (int half = 0; half < 2; ++half)
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    float& score = scores[t][i / 2][half * 2 + i % 2];
                    score = exp2_fast(fmaf(score, call.scale_log2, -top[t][half]));
                    weight[t][half] += score;
                }
    }

    __device__ void raise(const float (&fresh)[2][2]) {
#pragma unroll
        for (int t = 0; t < 2; ++t)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float higher = fmaxf(top[t][half], fresh[t][half] * call.scale_log2);
                const float shrink = exp2_fast(top[t][half] - higher);
                top[t][half] = higher;
                weight[t][half] *= shrink;
#pragma unroll
                for (int n = 0; n < kColumns; ++n) {
                    sums[t][n][half * 2] *= shrink;
                    sums[t][n][half * 2 + 1] *= shrink;
                }
            }
    }

    __device__ void multiply_by_values() {
        forget(my_value);
#pragma unroll
        for (int depth = 0; depth < 2; ++depth) {
            std::uint32_t a[2][4];  // the accumulators of the scores are the fragments of the weights
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const float (&pair)[4] = scores[i / 4][depth * 2 + i % 4 / 2];
                a[i / 4][i % 4] = pack_bf16(pair[i % 2 * 2], pair[i % 2 * 2 + 1]);
            }
#pragma unroll
            for (int n = 0; n < kColumns; n += 2) {
                std::uint32_t b[4];
                load_matrices_transposed(b, across(my_value, n) + depth * 16 * kRowBytes);
#pragma unroll
                for (int t = 0; t < 2; ++t) {
                    multiply_bf16(sums[t][n], a[t], b[0], b[1]);
                    multiply_bf16(sums[t][n + 1], a[t], b[2], b[3]);
                }
            }
        }
    }

    // ------------------------------------------------------------------------------------------- the answer

    __device__ void write() {
        wait_for_copies();
#pragma unroll
        for (int t = 0; t < 2; ++t)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float total = quad_sum(weight[t][half]), share = reciprocal(total);
#pragma unroll
                for (int n = 0; n < kColumns; ++n) {
                    sums[t][n][half * 2] *= share;
                    sums[t][n][half * 2 + 1] *= share;
                }
                top[t][half] += __log2f(total);
            }
        if (gridDim.z == 1)
            write_rows<kDim>(call, shared + thread / kLanes * kWarpRows * kRowBytes, sums);
        else
            write_partial<kDim>(call, sums, top);
    }
};

template <int kDim, bool kRows>
__global__ void __launch_bounds__(kThreads, 2) attention_bf16(const __grid_constant__ Call call) {
    extern __shared__ __align__(128) unsigned char shared[];
    AttentionBf16<kDim, kRows>(call, shared).run();
}

}  // namespace cfrt
