// Everything between the products and the attention. All kernels work on rows [begin, end), each row by itself: its
// bits do not depend on the others, nor on how the rows are shared among threads. Rows are `stride` elements apart.
#pragma once

#include <cstdint>

#include "attention.h"
#include "gemm.h"

namespace cfrt {

// out = (x - mean) / sqrt(variance + eps) * gain + shift, in the format of the next product. With gain = 1 + scale it
// is the modulated norm of the DiT, with one group of rows the affine norm.
struct LayerNorm {
    const float* x;  // [rows][width]
    std::int64_t x_stride, width;
    const float *gain, *shift;  // [groups][width]; row m uses group m / group_rows
    std::int64_t group_rows, group_stride;
    float eps;
    Precision format;  // of out; behind `width` a row gets zeros up to `depth`
    void* out;
    std::int64_t out_stride, depth;
    float* out_scale;  // [rows], int8 only
};

// x w / sqrt(mean(x^2) + eps) over the full width, then the turn of every pair (2i, 2i + 1) in every head.
struct Turned {
    const float* x;  // [rows][heads * dim]
    std::int64_t x_stride;
    const float* weight;  // [heads * dim]; null: not normed
    float eps;
    const float* turn;  // [rows][2][dim], csrc/cpu/tables.h; null: not turned
};

struct Queries {
    Turned q;
    std::int64_t heads, dim;
    float* out;  // [rows][heads * dim]; may be q.x
    std::int64_t out_stride;
    const float* sink_turn;  // like q.turn; null: there is no second rotation
    float* sink_out;         // rows out_stride elements apart, too
};

// Keys and values of rows into rows place[m] of `to`.
struct Append {
    Turned k;
    const float* v;  // [rows][heads * dim]
    std::int64_t v_stride;
    const KeyValues* to;
    const std::int64_t* place;
};

// out[f][p] = time[f][p] + table[p], plus one where `ones` has bit p: shift, gain and gate of a layer out of the time
// embedding (rows are frames). time_stride is from part to part, 0 where all parts share one.
struct Modulation {
    const float* time;
    std::int64_t frame_stride, part_stride;
    const float* table;  // [parts][width]
    std::int64_t parts, width;
    unsigned ones;
    float* out;  // [frames][parts][width]
};

// The last step of the small decoder: x [rows][columns] positions of frames * 3 * fold * fold channels, as its last
// convolution leaves them, to pixels: value = x * gain + offset, cut to [0, 1], in 255 steps to nearest even.
// out [frames - first_frame][rows * fold][columns * fold][3]. Rows of this kernel are rows of positions.
struct Pixels {
    const float* x;
    std::int64_t x_stride;  // from position to position
    std::int64_t rows, columns, frames, first_frame, fold;
    float gain, offset;
    std::uint8_t* out;
};
constexpr std::int64_t kMostPixelChannels = 1024;

struct PointwiseKernels {
    void (*layer_norm)(const LayerNorm&, std::int64_t begin, std::int64_t end);
    void (*queries)(const Queries&, std::int64_t begin, std::int64_t end);
    void (*append)(const Append&, std::int64_t begin, std::int64_t end);
    void (*modulation)(const Modulation&, std::int64_t begin, std::int64_t end);
    void (*pixels)(const Pixels&, std::int64_t begin, std::int64_t end);
    // Over elements; out may be x.
    void (*silu)(float* out, const float* x, std::int64_t begin, std::int64_t end);
    void (*gelu)(float* out, const float* x, std::int64_t begin, std::int64_t end);
};

}  // namespace cfrt
