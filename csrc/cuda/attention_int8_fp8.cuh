// Attention with int8 q K^T and e4m3 weights times e4m3 V (SageAttention2, arXiv:2411.10958 and 2505.21136), over
// granules of 64 keys read in place. Blocks, warps and the order of copies are those of attention_bf16.cuh.
//
// Two things keep the instructions between the products few:
//   The integer product starts at the bits of 1.5 * 2^23 in fp32, so that its own bits are those of the float kBias +
//   sum: no conversion, and scale, bias and maximum are one multiply-add in front of the exponential. The products with
//   V of one granule go into sums of their own. Adding them to the fp32 sums is the same instruction that follows a
//   rising maximum, and Ada's e4m3 product, which keeps about 22 bits, never sums more than 64 keys.
//
// On sm_90 and sm_100 a warp's e4m3 product is made of fp16 ones: right, but for Ada and for GeForce's Blackwell.
// predicted for an RTX 4090 (benchmarks/sass_gate.py); not timed yet
#pragma once

#include "walk.cuh"

namespace cfrt {

constexpr std::int32_t kBiasBits = 0x4b400000;  // of kBias: sums below 2^22 in magnitude fit, and 128 * 127^2 does
constexpr float kBias = 12582912.0f;
constexpr float kFullWeight = 8.80735492f;  // log2(448): the largest weight is e4m3's largest number

#ifdef CFRT_FP8

template <int kDim, bool kHalfSums>
struct AttentionInt8 {
    static constexpr int kGranule = CFRT_GRANULE_INT8, kGranuleBytes = kGranule * kDim;
    static constexpr int kSharedBytes = 2 * kBlockRows * kDim;  // queries, keys and values; then the answer in bf16
    static constexpr int kColumns = kDim / 8;
    using At = Cursor<std::int32_t, kGranule>;

    const Call& call;
    const int head = blockIdx.y;
    int thread = threadIdx.x;
    unsigned char* const shared;
    const SharedAddress queries = shared_address(shared), keys = queries + kBlockRows * kDim;
    const SharedAddress values = keys + kGranuleBytes;
    SharedAddress my_query, my_key, my_value;  // where this lane's first fragments lie

    float sums[2][kColumns][4] = {};
    float top[2][2], weight[2][2] = {}, shrink[2][2], query_scale[2][2], key_scale;
    std::int32_t products[2][8][4];
    std::uint32_t weights[2][2][4];

    __device__ AttentionInt8(const Call& c, unsigned char* memory) : call(c), shared(memory) {
#pragma unroll
        for (int i = 0; i < 4; ++i) top[i / 2][i % 2] = kHidden;
    }

    __device__ void run() {
        if (is_idle(call)) return;
#pragma unroll 1
        for (int turn = 0; turn < 2; ++turn)
            look_from(turn ? call.a.q : call.a.q_sink, turn ? call.a.q_scale : call.a.q_sink_scale,
                      part_of(call, turn == 0));
        write();
    }

    // ------------------------------------------------------------------------------------------- memory

    __device__ void find_fragments() {
        const int lane = forget(thread) % kLanes, warp = thread / kLanes;
        my_query = queries + swizzled<kDim>(warp * kWarpRows + lane % 16, lane / 16);
        my_key = keys + swizzled<kDim>(lane % 8 + lane / 16 * 8, lane / 8 % 2);
        my_value = values + swizzled<kGranule>(lane % 8 + lane / 16 * 8, lane / 8 % 2);
    }

    // K lies as [token][kDim], V as [channel][token]: a granule's bytes are contiguous either way.
    template <int kRowBytes>
    __device__ void copy_granule(SharedAddress to, const void* from, const At& at) {
        const auto* bytes = static_cast<const std::int8_t*>(from);
        bytes += static_cast<std::int64_t>(at.offset) * kGranuleBytes + thread * 16;
        to += swizzled<kRowBytes>(thread * 16 / kRowBytes, thread * 16 % kRowBytes / 16);
#pragma unroll
        for (int i = 0; i < kGranuleBytes; i += kThreads * 16) copy_async(to + i, bytes + i);
    }

    __device__ void load_query_scales(const float* scale) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int query = min(query_of(i / 2, i % 2), call.a.queries - 1);
            query_scale[i / 2][i % 2] = scale[query * call.a.heads + head] * call.scale_log2;
        }
    }

    // ------------------------------------------------------------------------------------------- one part of the keys

    // An earlier position's queries and values have been used by all when it ends.
    __device__ void look_from(const void* position, const float* scale, Granules part) {
        if (part.first >= part.last) return;
        find_fragments();
        copy_queries<kDim, std::int8_t>(call, position, queries);
        load_query_scales(scale);
        walk(*this, part);
    }

    __device__ void copy_keys(const At& at) { copy_granule<kDim>(keys, call.a.k, at); }
    __device__ void copy_values(const At& at) { copy_granule<kGranule>(values, call.a.v, at); }

    __device__ void score(const At& at) {
        key_scale = call.a.k_scale[at.offset];
        multiply_by_keys();
        if (at.rows < kGranule) hide(at.rows);
    }

    __device__ void multiply_by_keys() {
        forget(my_query), forget(my_key);
#pragma unroll
        for (int i = 0; i < 64; ++i) products[i / 32][i / 4 % 8][i % 4] = kBiasBits;
#pragma unroll
        for (int depth = 0; depth < kDim / 32; ++depth) {
            std::uint32_t a[2][4];
#pragma unroll
            for (int t = 0; t < 2; ++t) load_matrices(a[t], across(my_query, depth * 2) + t * 16 * kDim);
#pragma unroll
            for (int n = 0; n < 8; n += 2) {
                std::uint32_t b[4];
                load_matrices(b, across(my_key, depth * 2) + n * 8 * kDim);
#pragma unroll
                for (int t = 0; t < 2; ++t) {
                    multiply_int8(products[t][n], a[t], b[0], b[1]);
                    multiply_int8(products[t][n + 1], a[t], b[2], b[3]);
                }
            }
        }
    }

    // Keys from `rows` on are padding.
    __device__ void hide(int rows) {
        const int column = thread % 4 * 2;
#pragma unroll
        for (int i = 0; i < 64; ++i)
            if (i / 4 % 8 * 8 + column + i % 2 >= rows) products[i / 32][i / 4 % 8][i % 4] = __float_as_int(kHidden);
    }

    __device__ float biased(int t, int n, int half, int i) const {
        return __int_as_float(products[t][n][half * 2 + i]);
    }

    // Products become weights, 448 * 2^(score - top).
    __device__ void weigh() {
#pragma unroll
        for (int t = 0; t < 2; ++t) {
#pragma unroll
            for (int half = 0; half < 2; ++half) weigh_row(t, half);
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const int n = i / 4 * 4 + i % 4 / 2 * 2, half = i % 2;
                weights[t][i / 4][i % 4] = pack_fp8(biased(t, n, half, 0), biased(t, n, half, 1),
                                                    biased(t, n + 1, half, 0), biased(t, n + 1, half, 1));
            }
        }
    }

    __device__ void weigh_row(int t, int half) {
        const float scale = query_scale[t][half] * key_scale;
        float largest = kHidden;
#pragma unroll
        for (int i = 0; i < 16; ++i) largest = fmaxf(largest, biased(t, i / 2, half, i % 2));
        const float most = fmaxf(top[t][half], (quad_max(largest) - kBias) * scale);
        shrink[t][half] = exp2_fast(top[t][half] - most);
        top[t][half] = most;
        const float zero = fmaf(-kBias, scale, kFullWeight - most);
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            const float x = exp2_fast(fmaf(biased(t, i / 2, half, i % 2), scale, zero));
            products[t][i / 2][half * 2 + i % 2] = __float_as_int(x);
            sum += x;
        }
        weight[t][half] = fmaf(weight[t][half], shrink[t][half], sum);
    }

    __device__ void multiply_by_values() {
#pragma unroll
        for (int n = 0; n < kColumns; n += 2) {
            std::uint32_t b[2][4];
#pragma unroll
            for (int g = 0; g < 2; ++g) load_matrices(b[g], across(my_value, g * 2) + n * 8 * kGranule);
#pragma unroll
            for (int t = 0; t < 2; ++t)
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    float tile[4];
                    multiply_by_channels(tile, weights[t], b, 2 * j);
#pragma unroll
                    for (int e = 0; e < 4; ++e) sums[t][n + j][e] = fmaf(sums[t][n + j][e], shrink[t][e / 2], tile[e]);
                }
        }
    }

    __device__ void multiply_by_channels(float (&tile)[4], const std::uint32_t (&a)[2][4],
                                         const std::uint32_t (&b)[2][4], int i) {
        if constexpr (kHalfSums) {
            std::uint32_t pairs[2] = {};
            multiply_fp8(pairs, a[0], b[0][i], b[0][i + 1]);
            multiply_fp8(pairs, a[1], b[1][i], b[1][i + 1]);
            unpack_fp16(pairs[0], tile[0], tile[1]);
            unpack_fp16(pairs[1], tile[2], tile[3]);
        } else {
            tile[0] = tile[1] = tile[2] = tile[3] = 0.0f;
            multiply_fp8(tile, a[0], b[0][i], b[0][i + 1]);
            multiply_fp8(tile, a[1], b[1][i], b[1][i + 1]);
        }
    }

    // ------------------------------------------------------------------------------------------- the answer

    __device__ void write() {
        wait_for_copies();
#pragma unroll
        for (int t = 0; t < 2; ++t)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float total = quad_sum(weight[t][half]);
                shrink[t][half] = reciprocal(total);
                top[t][half] += __log2f(total);
            }
        const float* value_scale = call.a.v_scale + head * kDim + thread % 4 * 2;
#pragma unroll
        for (int n = 0; n < kColumns; ++n) {
            const float2 scale = *reinterpret_cast<const float2*>(value_scale + n * 8);
#pragma unroll
            for (int i = 0; i < 8; ++i) sums[i / 4][n][i % 4] *= shrink[i / 4][i % 4 / 2] * (i % 2 ? scale.y : scale.x);
        }
        __syncthreads();  // the answer is put where queries, keys and values have been
        if (gridDim.z == 1)
            write_rows<kDim>(call, shared + thread / kLanes * kWarpRows * 2 * kDim, sums);
        else
            write_partial<kDim>(call, sums, top);
    }
};

#endif

template <int kDim, bool kHalfSums>
__global__ void __launch_bounds__(kThreads, 2) attention_int8_fp8(const __grid_constant__ Call call) {
#ifdef CFRT_FP8
    extern __shared__ __align__(128) unsigned char shared[];
    AttentionInt8<kDim, kHalfSums>(call, shared).run();
#else
    __trap();  // the launcher refuses such a device
#endif
}

}  // namespace cfrt
