// Norms, rotation and the writing of keys, one row after another: a row is in the first-level cache after its first
// pass, so statistics, result and format cost arithmetic only.
#include "pointwise.h"

#include "../simd.h"
#include "activations.h"
#include "int8_rows.h"
#include "lanes.h"

namespace cfrt::CFRT_LEVEL {
namespace {

// ---------------------------------------------------------------------------------------------------------------- rows

// f(i, lanes) for the vectors of a row, the last of which may be partial.
template <class F>
CFRT_INLINE void for_each_vec(std::int64_t width, F f) {
    std::int64_t i = 0;
    for (; i + kLanes <= width; i += kLanes) f(i, kLanes);
    if (i < width) f(i, static_cast<int>(width - i));
}

CFRT_INLINE Vec load_some(const float* p, int lanes) {
    return lanes == kLanes ? load(p) : load(p, lanes);
}

// The sum of f(x) over a row, in four strands that do not wait for each other. f(0) must be 0 where a row may end
// inside a vector.
template <class F>
CFRT_INLINE float row_sum(const float* x, std::int64_t width, F f) {
    Vec strand[4] = {zero(), zero(), zero(), zero()};
    std::int64_t i = 0;
    for (; i + 4 * kLanes <= width; i += 4 * kLanes)
#pragma GCC unroll 4
        for (int s = 0; s < 4; ++s) strand[s] = strand[s] + f(load(x + i + s * kLanes), kLanes);
    for (; i < width; i += kLanes) {
        const int lanes = static_cast<int>(least<std::int64_t>(kLanes, width - i));
        strand[0] = strand[0] + f(load_some(x + i, lanes), lanes);
    }
    return sum((strand[0] + strand[1]) + (strand[2] + strand[3]));
}

// Lanes from n on become zero.
CFRT_INLINE Vec cut(Vec x, int n) {
    if (n == kLanes) return x;
    float whole[kLanes];
    store(whole, x);
    return load(whole, n);
}

// ---------------------------------------------------------------------------------------------------------- layer norm

// Element i.. of a normed row, without the format.
struct NormedRow {
    const float *x, *gain, *shift;
    Vec mean, scale;

    NormedRow(const LayerNorm& a, std::int64_t row)
        : x(a.x + row * a.x_stride),
          gain(a.gain + row / a.group_rows * a.group_stride),
          shift(a.shift + row / a.group_rows * a.group_stride) {
        const float width = static_cast<float>(a.width);
        mean = splat(row_sum(x, a.width, [](Vec y, int) { return y; }) / width);
        const float square = row_sum(x, a.width, [&](Vec y, int lanes) {
            const Vec off = cut(y - mean, lanes);
            return off * off;
        });
        scale = splat(1.0f / __builtin_sqrtf(square / width + a.eps));
    }

    CFRT_INLINE Vec at(std::int64_t i, int lanes) const {
        const Vec y = (load_some(x + i, lanes) - mean) * scale;
        return fma(y, load_some(gain + i, lanes), load_some(shift + i, lanes));
    }
};

void norm_fp32(const LayerNorm& a, std::int64_t row) {
    const NormedRow from(a, row);
    float* to = static_cast<float*>(a.out) + row * a.out_stride;
    for_each_vec(a.width, [&](std::int64_t i, int lanes) {
        lanes == kLanes ? store(to + i, from.at(i, lanes)) : store(to + i, from.at(i, lanes), lanes);
    });
    for (std::int64_t i = a.width; i < a.depth; ++i) to[i] = 0;
}

void norm_bf16(const LayerNorm& a, std::int64_t row) {
    const NormedRow from(a, row);
    std::uint16_t* to = static_cast<std::uint16_t*>(a.out) + row * a.out_stride;
    for_each_vec(a.width, [&](std::int64_t i, int lanes) {
        lanes == kLanes ? store_bf16(to + i, from.at(i, lanes)) : store_bf16(to + i, from.at(i, lanes), lanes);
    });
    for (std::int64_t i = a.width; i < a.depth; ++i) to[i] = 0;
}

// Normed twice, first for the peak, then for the whole numbers: cheaper than to keep the row.
void norm_int8(const LayerNorm& a, std::int64_t row) {
    const NormedRow from(a, row);
    Int8* to = static_cast<Int8*>(a.out) + row * a.out_stride;
    RowPeak peak;
    for_each_vec(a.width, [&](std::int64_t i, int lanes) { peak.see(cut(from.at(i, lanes), lanes)); });
    const Int8Scale scale = peak.scale();
    a.out_scale[row] = scale.scale;
    if (scale.inverse == 0.0f) return fill_zeros(to, a.depth);
    const Vec inverse = splat(scale.inverse);
    for_each_vec(a.width, [&](std::int64_t i, int lanes) {
        const Vec y = from.at(i, lanes) * inverse;
        lanes == kLanes ? store_int8(to + i, y) : store_int8(to + i, y, lanes);
    });
    fill_zeros(to + a.width, a.depth - a.width);
}

void layer_norm(const LayerNorm& a, std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) {
        if (a.format == Precision::fp32)
            norm_fp32(a, row);
        else if (a.format == Precision::bf16)
            norm_bf16(a, row);
        else
            norm_int8(a, row);
    }
}

// ---------------------------------------------------------------------------------------------------- queries and keys

// (x0, x1, x2, x3, ...) -> (x1, x0, x3, x2, ...)
CFRT_INLINE Vec swap_pairs(Vec x) {
#if CFRT_SIMD >= 2
    return _mm512_permute_ps(x, 0xB1);
#elif CFRT_SIMD == 1
    return _mm256_permute_ps(x, 0xB1);
#else
    return __builtin_shufflevector(x, x, 1, 0, 3, 2);
#endif
}

// Calls put(head, j, value) for the vectors of a row, numbers j.. of a head.
struct NormedHeads {
    const float *x, *weight;
    Vec scale = splat(1.0f);

    NormedHeads(const Turned& a, std::int64_t row, std::int64_t width) : x(a.x + row * a.x_stride), weight(a.weight) {
        if (weight == nullptr) return;
        const float square = row_sum(x, width, [](Vec y, int) { return y * y; });
        scale = splat(1.0f / __builtin_sqrtf(square / static_cast<float>(width) + a.eps));
    }

    CFRT_INLINE Vec at(std::int64_t i) const {
        const Vec y = load(x + i);
        return weight == nullptr ? y : y * scale * load(weight + i);
    }
};

// A turn is [cos cos of each pair | -sin sin of each pair].
CFRT_INLINE Vec rotate(Vec x, const float* turn, std::int64_t dim, std::int64_t j) {
    return fma(swap_pairs(x), load(turn + dim + j), x * load(turn + j));
}

void queries(const Queries& a, std::int64_t begin, std::int64_t end) {
    const std::int64_t width = a.heads * a.dim;
    for (std::int64_t row = begin; row < end; ++row) {
        const NormedHeads from(a.q, row, width);
        float* to = a.out + row * a.out_stride;
        float* sink_to = a.sink_turn ? a.sink_out + row * a.out_stride : nullptr;
        const float* turn = a.q.turn ? a.q.turn + row * 2 * a.dim : nullptr;
        const float* sink_turn = a.sink_turn ? a.sink_turn + row * 2 * a.dim : nullptr;
        for (std::int64_t head = 0; head < width; head += a.dim) {
            for (std::int64_t j = 0; j < a.dim; j += kLanes) {
                const Vec y = from.at(head + j);
                if (sink_to) store(sink_to + head + j, rotate(y, sink_turn, a.dim, j));
                store(to + head + j, turn ? rotate(y, turn, a.dim, j) : y);
            }
        }
    }
}

template <class Put>
CFRT_INLINE void each_key(const Append& a, std::int64_t row, Put put_vec) {
    const std::int64_t dim = a.to->dim;
    const NormedHeads from(a.k, row, a.to->heads * dim);
    const float* turn = a.k.turn ? a.k.turn + row * 2 * dim : nullptr;
    for (std::int64_t head = 0; head < a.to->heads; ++head) {
        for (std::int64_t j = 0; j < dim; j += kLanes) {
            const Vec y = from.at(head * dim + j);
            put_vec(head, j, turn ? rotate(y, turn, dim, j) : y);
        }
    }
}

void append_fp32(const Append& a, std::int64_t begin, std::int64_t end) {
    const KeyValues& to = *a.to;
    for (std::int64_t row = begin; row < end; ++row) {
        float *k = static_cast<float*>(to.k) + a.place[row] * to.dim,
              *v = static_cast<float*>(to.v) + (k - static_cast<float*>(to.k));
        const std::int64_t head_stride = to.rows * to.dim;
        each_key(a, row, [&](std::int64_t head, std::int64_t j, Vec y) { store(k + head * head_stride + j, y); });
        const float* from = a.v + row * a.v_stride;
        for (std::int64_t head = 0; head < to.heads; ++head)
            for (std::int64_t j = 0; j < to.dim; j += kLanes)
                store(v + head * head_stride + j, load(from + head * to.dim + j));
    }
}

// Two rows that share their words of values are written together.
void append_bf16(const Append& a, std::int64_t begin, std::int64_t end) {
    const KeyValues& to = *a.to;
    const std::int64_t head_stride = to.rows * to.dim;
    for (std::int64_t row = begin; row < end; ++row) {
        std::uint16_t* k = static_cast<std::uint16_t*>(to.k) + a.place[row] * to.dim;
        each_key(a, row, [&](std::int64_t head, std::int64_t j, Vec y) { store_bf16(k + head * head_stride + j, y); });
    }
    for (std::int64_t row = begin; row < end; ++row) {
        const std::int64_t place = a.place[row];
        const float* from = a.v + row * a.v_stride;
        std::uint16_t* v = static_cast<std::uint16_t*>(to.v) + place / 2 * 2 * to.dim;
        const bool both = place % 2 == 0 && row + 1 < end && a.place[row + 1] == place + 1;
        for (std::int64_t head = 0; head < to.heads; ++head) {
            for (std::int64_t j = 0; j < to.dim; j += kLanes) {
                const float* x = from + head * to.dim + j;
                std::uint16_t* pairs = v + head * head_stride + 2 * j;
                if (both) {
                    const Vec words = pair_up(load(x), load(x + a.v_stride));
                    __builtin_memcpy(pairs, &words, sizeof words);
                } else {
                    std::uint16_t halves[kLanes];
                    store_bf16(halves, load(x));
                    for (int i = 0; i < kLanes; ++i) pairs[2 * i + place % 2] = halves[i];
                }
            }
        }
        row += both;
    }
}

void append(const Append& a, std::int64_t begin, std::int64_t end) {
    a.to->precision == Precision::fp32 ? append_fp32(a, begin, end) : append_bf16(a, begin, end);
}

// ------------------------------------------------------------------------------------------------------- small matters

void modulation(const Modulation& a, std::int64_t begin, std::int64_t end) {
    for (std::int64_t frame = begin; frame < end; ++frame) {
        for (std::int64_t part = 0; part < a.parts; ++part) {
            const float* time = a.time + frame * a.frame_stride + part * a.part_stride;
            const float* table = a.table + part * a.width;
            float* out = a.out + (frame * a.parts + part) * a.width;
            const Vec one = splat(static_cast<float>(a.ones >> part & 1u));
            for_each_vec(a.width, [&](std::int64_t i, int lanes) {
                const Vec y = one + (load_some(time + i, lanes) + load_some(table + i, lanes));
                lanes == kLanes ? store(out + i, y) : store(out + i, y, lanes);
            });
        }
    }
}

void pixels(const Pixels& a, std::int64_t begin, std::int64_t end) {
    const std::int64_t fold = a.fold, channels = a.frames * 3 * fold * fold;
    const std::int64_t line = a.columns * fold * 3, picture = a.rows * fold * line;
    std::int32_t levels[kMostPixelChannels + kLanes];
    for (std::int64_t row = begin; row < end; ++row) {
        for (std::int64_t column = 0; column < a.columns; ++column) {
            const float* x = a.x + (row * a.columns + column) * a.x_stride;
            for_each_vec(channels, [&](std::int64_t i, int lanes) {
                const Vec y = load_some(x + i, lanes) * splat(a.gain) + splat(a.offset);
                istore(levels + i, to_int(min(max(y, zero()), splat(1.0f)) * splat(255.0f)));
            });
            for (std::int64_t frame = a.first_frame; frame < a.frames; ++frame) {
                for (std::int64_t i = 0; i < fold; ++i) {
                    const std::int32_t* from = levels + (frame * 3 * fold + i) * fold;
                    std::uint8_t* to =
                        a.out + (frame - a.first_frame) * picture + (row * fold + i) * line + column * fold * 3;
                    for (std::int64_t j = 0; j < fold; ++j)
                        for (std::int64_t c = 0; c < 3; ++c)
                            to[j * 3 + c] = static_cast<std::uint8_t>(from[c * fold * fold + j]);
                }
            }
        }
    }
}

template <class F>
CFRT_INLINE void map(float* out, const float* x, std::int64_t begin, std::int64_t end, F f) {
    for_each_vec(end - begin, [&](std::int64_t i, int lanes) {
        const Vec y = f(load_some(x + begin + i, lanes));
        lanes == kLanes ? store(out + begin + i, y) : store(out + begin + i, y, lanes);
    });
}

void silu_all(float* out, const float* x, std::int64_t begin, std::int64_t end) {
    map(out, x, begin, end, [](Vec y) { return silu(y); });
}

void gelu_all(float* out, const float* x, std::int64_t begin, std::int64_t end) {
    map(out, x, begin, end, [](Vec y) { return gelu(y); });
}

}  // namespace

extern const PointwiseKernels pointwise;
constinit const PointwiseKernels pointwise{layer_norm, queries, append, modulation, pixels, silu_all, gelu_all};

}  // namespace cfrt::CFRT_LEVEL
