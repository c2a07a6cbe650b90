// Attention by online softmax (Milakov and Gimelshein, arXiv:1805.02867; blocked as in FlashAttention,
// arXiv:2205.14135), with queries in the lanes.
//
// A vector holds one number of as many queries as it has lanes. Keys come as broadcasts, so that K needs no packing, no
// granule and no padding, the softmax needs no sum or maximum across lanes, and a query's result cannot depend on its
// neighbours: at any vector width a lane goes through the same operations.
//
//   tile    kTile keys by two vectors of queries: their scores stay in registers, become weights there and are kept
//   block   kBlock keys: then the values, kTile numbers of a head by two vectors at a time, are added to the output
//   group   kGroup queries that use a block of keys while it is in the first-level cache
//
// bf16: words of two numbers of a key against words of two numbers of the queries, by the dot product of two bf16 where
// the level has it, else widened to two fp32 on the way from memory; then two tokens at a time for the values.
//
// The ladder, in GOP/s of one core. Steps 1 and 2 on Zen 4, avx512bf16, ceiling 236 in bf16 and 118 in fp32, 64
// queries, 768 keys, head_dim 64 and 128, measured on 2026-11-25 (torch SDPA reaches 67 and 75 in bf16):
//   1  this with blocks of 96 keys                                          bf16 199 and 210, fp32 106 and 110.5
//   2  blocks of 192: sums of values come from memory half as often         bf16 199 and 212, fp32 106.5 and 110.5
//   -  2^x by vreduceps and vscalefps, nine instructions down to six: no change, so the softmax is hidden already
// Step 3 on Zen 5, ceiling 525, bf16, head_dim 64, measured on 2026-11-26:
//   3  keys and values asked for ahead. One layer of 12 heads after the other, 12 in all, 38 MB: 258 -> 408; 256
//      queries, 3072 keys, of four heads: 357 -> 413
#include "attention.h"

#include "../simd.h"
#include "lanes.h"

namespace cfrt::CFRT_LEVEL {
namespace {

// Keys that a tile of scores covers, and numbers of a head that a tile of values covers: accumulators are kTile by two
// vectors. Keys whose weights are kept before the values are gone through. Queries in flight together: they share a
// block of keys while it is in the first-level cache.
constexpr int kTile = CFRT_SIMD >= 2 ? 8 : 4;
constexpr int kBlock = 192;
constexpr int kGroup = 64;
constexpr int kAhead = 4 * kTile;  // keys

// The running maximum stands still until it is passed by a factor of 2^kSlack: that costs no precision, since weights
// are floating-point numbers too, and saves the rescaling of what has been summed up.
constexpr float kSlack = 20.0f;

template <bool kBf16, int L, int J>
struct Attend {
    using F = typename Lanes<L>::Floats;
    static constexpr int kWidth = J * L;         // queries side by side
    static constexpr int kPair = kBf16 ? 2 : 1;  // elements to a word
    static constexpr bool kWiden = kBf16 && CFRT_SIMD < 3;
    // Words of packed queries, or of weights, that go with one word of a key, or of a value.
    static constexpr int kStep = kWiden ? 2 * kWidth : kWidth;
    static constexpr bool kRough = kBf16;

    struct Queries {
        float *near, *far;         // packed, [dim / kPair][kStep]; far ones look at sinks
        float* out;                // [dim][kWidth], sums of weight times value
        float *top, *minus, *sum;  // [kWidth]: maximum, its scaled negative, sum of weights
    };

    const Attention& a;
    const std::int64_t dim, key_words;
    const F scale;                           // to powers of two, from here on
    const float *k = nullptr, *v = nullptr;  // of this head
    float *weights = nullptr, *edge_values = nullptr;
    Queries group[kGroup / kWidth];
    int groups = 0;

    explicit Attend(const Attention& call)
        : a(call), dim(a.kv->dim), key_words(dim / kPair), scale(all<F>(a.scale * 1.44269504f)) {}

    // acc[i][j] += sum over steps of word i of `x` times row j of `y`.
    template <int I>
    CFRT_INLINE static void dots(F (&acc)[I][J], const float* x, std::int64_t apart, std::int64_t step, const float* y,
                                 std::int64_t steps) {
        for (std::int64_t s = 0; s < steps; ++s, x += step, y += kStep) {
            F even[J], odd[J];
#pragma GCC unroll 4
            for (int j = 0; j < J; ++j) {
                even[j] = get<F>(y + j * L);
                if constexpr (kWiden) odd[j] = get<F>(y + kWidth + j * L);
            }
#pragma GCC unroll 16
            for (int i = 0; i < I; ++i) {
                const F word = all<F>(x[i * apart]);
#pragma GCC unroll 4
                for (int j = 0; j < J; ++j) {
                    if constexpr (kWiden)
                        acc[i][j] = fma(upper(word), odd[j], fma(lower(word), even[j], acc[i][j]));
                    else if constexpr (kBf16)
                        acc[i][j] = dot(acc[i][j], word, even[j]);
                    else
                        acc[i][j] = fma(word, even[j], acc[i][j]);
                }
            }
        }
    }

    CFRT_INLINE static F dot(F acc, F x, F y) {
#if CFRT_SIMD >= 3
        if constexpr (sizeof(F) == 64) return _mm512_dpbf16_ps(acc, (__m512bh)x, (__m512bh)y);
        if constexpr (sizeof(F) == 32) return _mm256_dpbf16_ps(acc, (__m256bh)x, (__m256bh)y);
        if constexpr (sizeof(F) == 16) return _mm_dpbf16_ps(acc, (__m128bh)x, (__m128bh)y);
#else
        (void)x, (void)y;
        return acc;
#endif
    }

    // Weights of keys [key, key + I) into rows `at`.. of the block: I is even for bf16.
    template <int I>
    CFRT_INLINE void scores(const Queries& q, const float* packed, std::int64_t key, int at) const {
        F acc[I][J];
#pragma GCC unroll 16
        for (int i = 0; i < I; ++i)
#pragma GCC unroll 4
            for (int j = 0; j < J; ++j) acc[i][j] = F{};
        dots<I>(acc, k + key * key_words, key_words, 1, packed, key_words);
        bool passed = false;
        F top[J];
#pragma GCC unroll 4
        for (int j = 0; j < J; ++j) {
            top[j] = acc[0][j];
#pragma GCC unroll 16
            for (int i = 1; i < I; ++i) top[j] = max(top[j], acc[i][j]);
            const F minus = get<F>(q.minus + j * L);
            passed |= any_above(fma(top[j], scale, minus), all<F>(kSlack));
        }
        if (passed) [[unlikely]] {
            float peaks[kWidth];
            for (int j = 0; j < J; ++j) put(peaks + j * L, top[j]);
            raise(q, peaks, at);
        }
#pragma GCC unroll 4
        for (int j = 0; j < J; ++j) {
            const F minus = get<F>(q.minus + j * L);
            F sum[2];
#pragma GCC unroll 16
            for (int i = 0; i < I; ++i) {
                acc[i][j] = exp2<kRough>(fma(acc[i][j], scale, minus));
                sum[i % 2] = i < 2 ? acc[i][j] : sum[i % 2] + acc[i][j];
            }
            float* total = q.sum + j * L;
            put(total, get<F>(total) + (I > 1 ? sum[0] + sum[1] : sum[0]));
            if constexpr (kBf16 && !kWiden) {
#pragma GCC unroll 16
                for (int i = 0; i < I; i += 2) keep(at + i, j, pair_up(acc[i][j], acc[i + 1][j]));
            } else {
#pragma GCC unroll 16
                for (int i = 0; i < I; ++i) keep(at + i, j, acc[i][j]);
            }
        }
    }

    // Words of weights: row `at` of the block is in lanes of vector j.
    CFRT_INLINE float* place(int at, int j) const {
        return weights + (kBf16 && !kWiden ? at / 2 : at) * kWidth + j * L;
    }
    CFRT_INLINE void keep(int at, int j, F x) const { put(place(at, j), x); }

    // Queries whose maximum was passed get a new one; what they have summed up so far is brought to it. The others are
    // multiplied by one.
    [[gnu::noinline, gnu::cold]] void raise(const Queries& q, const float* peaks, int kept) const {
        for (int j = 0; j < J; ++j) {
            const int lane = j * L;
            const F peak = get<F>(peaks + lane), old = get<F>(q.top + lane), minus = get<F>(q.minus + lane);
            const auto passed = fma(peak, scale, minus) > all<F>(kSlack);
            const F top = passed ? peak : old;
            const F down = passed ? exp2<kRough>((old - top) * scale) : all<F>(1.0f);
            put(q.top + lane, top);
            put(q.minus + lane, F{} - top * scale);
            put(q.sum + lane, get<F>(q.sum + lane) * down);
            for (std::int64_t d = 0; d < dim; ++d) {
                float* o = q.out + d * kWidth + lane;
                put(o, get<F>(o) * down);
            }
            if constexpr (kBf16 && !kWiden) {
                for (int at = 0; at < kept; at += 2) {
                    const F both = get<F>(place(at, j));
                    keep(at, j, pair_up(lower(both) * down, upper(both) * down));
                }
            } else {
                for (int at = 0; at < kept; ++at) keep(at, j, get<F>(place(at, j)) * down);
            }
        }
    }

    // out += weights of `count` keys times their values.
    CFRT_INLINE void values(const Queries& q, const float* from, int count) const {
        for (std::int64_t d = 0; d < dim; d += kTile) {
            F acc[kTile][J];
#pragma GCC unroll 16
            for (int i = 0; i < kTile; ++i)
#pragma GCC unroll 4
                for (int j = 0; j < J; ++j) acc[i][j] = F{};
            dots<kTile>(acc, from + d, 1, dim, weights, count / kPair);
#pragma GCC unroll 16
            for (int i = 0; i < kTile; ++i)
#pragma GCC unroll 4
                for (int j = 0; j < J; ++j) {
                    float* o = q.out + (d + i) * kWidth + j * L;
                    put(o, get<F>(o) + acc[i][j]);
                }
        }
    }

    CFRT_INLINE static void fetch(const float* words, std::int64_t count) {
        for (std::int64_t i = 0; i < count; i += 16) __builtin_prefetch(words + i);
    }

    // Asks for the values of the kTile keys from `key` on, and for keys some tiles ahead: the first queries of a group
    // would wait for each line of them.
    CFRT_INLINE void look_ahead(std::int64_t key) const {
        fetch(k + (key + kAhead) * key_words, kTile * key_words);
        fetch(v + key * key_words, kTile * key_words);
    }

    // Keys [start, stop) of whole words, at most kBlock.
    void block(std::int64_t start, std::int64_t stop, bool far) const {
        for (int g = 0; g < groups; ++g) {
            const Queries& q = group[g];
            const float* packed = far ? q.far : q.near;
            const int count = static_cast<int>(stop - start);
            int at = 0;
            for (; at + kTile <= count; at += kTile) {
                if (g == 0) look_ahead(start + at);
                scores<kTile>(q, packed, start + at, at);
            }
            if constexpr (kTile > 4)
                for (; at + 4 <= count; at += 4) scores<4>(q, packed, start + at, at);
            for (; at + 2 <= count; at += 2) scores<2>(q, packed, start + at, at);
            if constexpr (!kBf16)
                if (at < count) scores<1>(q, packed, start + at, at);
            values(q, v + start * dim / kPair, count);
        }
    }

    // One bf16 key whose neighbour in the word of values is not to be seen.
    void lone(std::int64_t key, bool far) const {
        const std::uint32_t half = key % 2 ? 0xffff0000u : 0x0000ffffu;
        const float* pairs = v + key / 2 * dim;
        for (std::int64_t d = 0; d < dim; ++d) {
            std::uint32_t word;
            __builtin_memcpy(&word, pairs + d, sizeof word);
            word &= half;
            __builtin_memcpy(edge_values + d, &word, sizeof word);
        }
        for (int g = 0; g < groups; ++g) {
            const Queries& q = group[g];
            lone_score(q, far ? q.far : q.near, key);
            values(q, edge_values, 2);
        }
    }

    void lone_score(const Queries& q, const float* packed, std::int64_t key) const {
        F acc[1][J];
        for (int j = 0; j < J; ++j) acc[0][j] = F{};
        dots<1>(acc, k + key * key_words, key_words, 1, packed, key_words);
        float peaks[kWidth];
        for (int j = 0; j < J; ++j) put(peaks + j * L, acc[0][j]);
        raise(q, peaks, 0);
        for (int j = 0; j < J; ++j) {
            const F p = exp2<kRough>(fma(acc[0][j], scale, get<F>(q.minus + j * L)));
            float* total = q.sum + j * L;
            put(total, get<F>(total) + p);
            const F even = key % 2 ? F{} : p, odd = key % 2 ? p : F{};
            if constexpr (!kWiden) {
                keep(0, j, pair_up(even, odd));
            } else {
                keep(0, j, even);
                keep(1, j, odd);
            }
        }
    }

    void range(std::int64_t start, std::int64_t stop, bool far) const {
        if (kBf16 && start % 2) lone(start++, far);
        const std::int64_t whole = kBf16 ? stop - (stop - start) % 2 : stop;
        for (; start < whole; start += kBlock) block(start, least(start + kBlock, whole), far);
        if (whole < stop) lone(whole, far);
    }

    // q rows [first, first + count) to columns; zeros stand for rows beyond.
    void pack(float* packed, const float* q, std::int64_t first, std::int64_t count) const {
        alignas(16) static constexpr float none[4] = {};
        for (int lane = 0; lane < kWidth; lane += 4) {
            const float* rows[4];
            for (int r = 0; r < 4; ++r) rows[r] = lane + r < count ? q + (first + lane + r) * a.q_stride : nullptr;
            for (std::int64_t d = 0; d < dim; d += 4) {
                F4 x[4];
                for (int r = 0; r < 4; ++r) x[r] = get<F4>(rows[r] ? rows[r] + d : none);
                transpose(x[0], x[1], x[2], x[3]);
                if constexpr (kBf16 && !kWiden) {
                    put(packed + (d / 2) * kWidth + lane, pair_up(x[0], x[1]));
                    put(packed + (d / 2 + 1) * kWidth + lane, pair_up(x[2], x[3]));
                } else {
                    for (int i = 0; i < 4; ++i) put(packed + (d + i) * kWidth + lane, x[i]);
                }
            }
        }
    }

    void unpack(const Queries& q, std::int64_t head, std::int64_t first, std::int64_t count) const {
        for (int lane = 0; lane < kWidth && lane < count; lane += 4) {
            const F4 share = all<F4>(1.0f) / get<F4>(q.sum + lane);
            const int rows = static_cast<int>(least<std::int64_t>(4, count - lane));
            for (std::int64_t d = 0; d < dim; d += 4) {
                F4 x[4];
                for (int i = 0; i < 4; ++i) x[i] = get<F4>(q.out + (d + i) * kWidth + lane) * share;
                transpose(x[0], x[1], x[2], x[3]);
                for (int r = 0; r < rows; ++r) write((first + lane + r) * a.out_stride + head * dim + d, x[r]);
            }
        }
    }

    CFRT_INLINE void write(std::int64_t to, F4 x) const {
        if (!a.out_bf16) return put(static_cast<float*>(a.out) + to, x);
        float two[4];
        put(two, pair_up(__builtin_shufflevector(x, x, 0, 2, 0, 2), __builtin_shufflevector(x, x, 1, 3, 1, 3)));
        __builtin_memcpy(static_cast<std::uint16_t*>(a.out) + to, two, 8);
    }

    // Words of scratch for `queries` side by side.
    static std::int64_t words(std::int64_t dim, std::int64_t queries) {
        return queries * (3 * dim + 3) + kBlock * kWidth + dim;
    }

    void run(std::int64_t head, std::int64_t first, std::int64_t count, float* scratch) {
        const KeyValues& kv = *a.kv;
        k = static_cast<const float*>(kv.k) + head * kv.rows * key_words;
        v = static_cast<const float*>(kv.v) + head * kv.rows * key_words;
        fetch(k + a.ranges[0].start * key_words, kAhead * key_words);
        groups = static_cast<int>(ceil_div(count, kWidth));
        float* next = scratch;
        const auto take = [&](std::int64_t size) { return next += size, next - size; };
        weights = take(kBlock * kWidth);
        for (int g = 0; g < groups; ++g) {
            Queries& q = group[g];
            q.near = take(dim * kWidth), q.far = take(dim * kWidth), q.out = take(dim * kWidth);
            q.top = take(kWidth), q.minus = take(kWidth), q.sum = take(kWidth);
            const std::int64_t row = first + g * kWidth, left = count - g * kWidth;
            pack(q.near, a.q + head * dim, row, left);
            if (a.sink_rows > 0) pack(q.far, a.q_sink + head * dim, row, left);
            for (std::int64_t i = 0; i < dim * kWidth; i += L) put(q.out + i, F{});
            for (int j = 0; j < kWidth; j += L) {
                put(q.top + j, all<F>(-__builtin_inff()));
                put(q.minus + j, all<F>(__builtin_inff()));
                put(q.sum + j, F{});
            }
        }
        edge_values = take(dim);
        std::int64_t sinks = a.sink_rows;
        for (int r = 0; r < a.range_count; ++r) {
            const Span& span = a.ranges[r];
            const std::int64_t border = span.start + least(sinks, span.stop - span.start);
            if (span.start < border) range(span.start, border, true);
            if (border < span.stop) range(border, span.stop, false);
            sinks -= border - span.start;
        }
        for (int g = 0; g < groups; ++g) unpack(group[g], head, first + g * kWidth, count - g * kWidth);
    }
};

template <bool kBf16, int L, int J>
void attend(const Attention& a, std::int64_t head, std::int64_t first, std::int64_t count, void* scratch) {
    Attend<kBf16, L, J>(a).run(head, first, count, static_cast<float*>(scratch));
}

constexpr int kTileQueries = 2 * kLanes;

std::int64_t blocks(const Attention& a) {
    return ceil_div(a.m, kTileQueries);
}

std::int64_t tiles(const Attention& a) {
    return a.kv->heads * blocks(a);
}

std::int64_t scratch(const Attention& a) {
    return 4 * Attend<false, kLanes, 2>::words(a.kv->dim, least<std::int64_t>(kGroup, blocks(a) * kTileQueries));
}

// A tile is one head of kTileQueries queries; neighbours of one head are worked on together. Few queries take narrow
// vectors.
template <bool kBf16>
void run(const Attention& a, std::int64_t begin, std::int64_t end, void* scratch) {
    const std::int64_t per_head = blocks(a);
    while (begin < end) {
        const std::int64_t head = begin / per_head, block = begin % per_head, first = block * kTileQueries;
        const std::int64_t together = least(least(end - begin, per_head - block), std::int64_t{kGroup / kTileQueries});
        const std::int64_t count = least(together * kTileQueries, a.m - first), rest = count % kTileQueries;
        if (count > rest) attend<kBf16, kLanes, 2>(a, head, first, count - rest, scratch);
        const std::int64_t last = first + count - rest;
        if (rest > kLanes)
            attend<kBf16, kLanes, 2>(a, head, last, rest, scratch);
        else if (rest > kLanes / 2)
            attend<kBf16, kLanes, 1>(a, head, last, rest, scratch);
#if CFRT_SIMD >= 2
        else if (rest > 4)
            attend<kBf16, 8, 1>(a, head, last, rest, scratch);
#endif
        else if (rest > 0)
            attend<kBf16, 4, 1>(a, head, last, rest, scratch);
        begin += together;
    }
}

}  // namespace

extern const AttentionKernel attention_fp32, attention_bf16;
constinit const AttentionKernel attention_fp32{scratch, tiles, run<false>};
constinit const AttentionKernel attention_bf16{scratch, tiles, run<true>};

}  // namespace cfrt::CFRT_LEVEL
