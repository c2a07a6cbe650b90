// Rows for the products: fp32 -> bf16, and fp32 -> int8 with a scale per row.
//
// A row's result depends on that row alone. Both are bound by memory; the row maximum of to_int8 costs a second read
// of a row that is then in the first-level cache.

#include "../simd.h"
#include "gemm.h"
#include "int8_rows.h"

namespace cfrt::CFRT_LEVEL {
namespace {

void to_bf16(std::uint16_t* out, std::int64_t out_stride, const float* x, std::int64_t x_stride, std::int64_t k,
             std::int64_t depth, std::int64_t begin, std::int64_t end) {
    const std::int64_t whole = k / kLanes * kLanes;
    const int rest = static_cast<int>(k - whole);
    for (std::int64_t m = begin; m < end; ++m) {
        const float* from = x + m * x_stride;
        std::uint16_t* to = out + m * out_stride;
        for (std::int64_t i = 0; i < whole; i += kLanes) store_bf16(to + i, load(from + i));
        if (rest) store_bf16(to + whole, load(from + whole, rest), rest);
        for (std::int64_t i = k; i < depth; ++i) to[i] = 0;
    }
}

void to_int8(void* out, std::int64_t out_stride, float* scale, const float* x, std::int64_t x_stride, std::int64_t k,
             std::int64_t depth, std::int64_t begin, std::int64_t end) {
    const std::int64_t whole = k / kLanes * kLanes;
    const int rest = static_cast<int>(k - whole);
    for (std::int64_t m = begin; m < end; ++m) {
        const float* from = x + m * x_stride;
        Int8* to = static_cast<Int8*>(out) + m * out_stride;
        RowPeak peak;
        for (std::int64_t i = 0; i < whole; i += kLanes) peak.see(load(from + i));
        if (rest) peak.see(load(from + whole, rest));
        const Int8Scale row = peak.scale();
        scale[m] = row.scale;
        if (row.inverse == 0.0f) {
            fill_zeros(to, depth);
            continue;
        }
        const Vec inverse = splat(row.inverse);
        for (std::int64_t i = 0; i < whole; i += kLanes) store_int8(to + i, load(from + i) * inverse);
        if (rest) store_int8(to + whole, load(from + whole, rest) * inverse, rest);
        fill_zeros(to + k, depth - k);
    }
}

}  // namespace

extern const RowKernels rows;
constinit const RowKernels rows{to_bf16, to_int8};

}  // namespace cfrt::CFRT_LEVEL
