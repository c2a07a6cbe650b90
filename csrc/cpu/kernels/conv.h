// A convolution as a product: the rows that GemmKernel reads are gathered from a plane by a table of neighbours. The
// planes are of positions, channels last; in which order positions lie is the table's business alone.
#pragma once

#include <cstdint>

#include "gemm.h"

namespace cfrt {

// Row m of out = positions taps[m][0 .. count - 1] of the plane side by side, then zeros up to `depth`. Position -1 is
// what the plane has before its begin: zeros, where the picture ends. Sizes are words of 32 bits. For int8 the plane
// holds floats and a row becomes what RowKernels::to_int8 makes of it, with its scale; then out's sizes are elements.
struct Gather {
    const float* plane;
    std::int64_t width;        // of a position
    const std::int32_t* taps;  // [rows][count]
    std::int64_t count;
    void* out;  // row `begin` of a call comes first, as in `scale`
    std::int64_t out_stride, depth;
};

// out[m] = x[m] or silu(x[m]) as fp32 or bf16, with zeros from `width` to out_stride.
struct Activate {
    const float* x;  // [rows][width], without gaps
    std::int64_t width;
    bool silu, bf16;
    void* out;
    std::int64_t out_stride;  // elements
};

struct ConvKernels {
    void (*gather)(const Gather&, std::int64_t begin, std::int64_t end);
    void (*gather_int8)(const Gather&, float* scale, std::int64_t begin, std::int64_t end);
    void (*activate)(const Activate&, std::int64_t begin, std::int64_t end);
};

}  // namespace cfrt
