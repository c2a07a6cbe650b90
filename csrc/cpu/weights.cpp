#include "weights.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "../check.h"

namespace cfrt {
namespace {

constexpr std::int64_t kMostDepth = 65536;  // 255 * 127 * k stays below 2^31

// panels[p][k / group][column][k % group] = value(p * panel + column, k).
template <class T, class Value>
void pack(T* panels, const GemmKernel& kernel, std::int64_t n, std::int64_t k, std::int64_t depth, Threads& threads,
          Value value) {
    const std::int64_t panel = kernel.panel, group = kernel.group;
    threads.split((n + panel - 1) / panel, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t row = begin * panel; row < std::min(n, end * panel); ++row) {
            T* to = panels + row / panel * panel * depth + row % panel * group;
            for (std::int64_t i = 0; i < k; ++i) to[i / group * group * panel + i % group] = value(row, i);
        }
    });
}

std::uint16_t to_bf16(float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (x != x) return static_cast<std::uint16_t>((bits | 0x400000u) >> 16);
    return static_cast<std::uint16_t>((bits + ((bits >> 16) & 1u) + 0x7fffu) >> 16);
}

// The largest number is 127 steps. A power of two where the whole row is steps of it: a weight that was trained to fit
// (training/rounded.py) is then not rounded at all.
float step_of(const float* row, std::int64_t k, float peak) {
    const float step = peak / 127.0f;
    int exponent;
    std::frexp(step, &exponent);
    const float power = std::ldexp(1.0f, exponent);
    return std::all_of(row, row + k, [=](float x) { return std::nearbyint(x / power) * power == x; }) ? power : step;
}

}  // namespace

Weights::Weights(const Kernels& kernels, Precision precision, const float* w, std::int64_t n, std::int64_t k,
                 Threads& threads, Shelf* shelf) {
    check(n >= 1 && k >= 1, "expected weights [n, k] with n >= 1 and k >= 1, got [", n, ", ", k, "]");
    const GemmKernel& kernel = kernels.product(precision);
    const std::int64_t depth = row_depth(kernels, precision, k);
    const std::int64_t columns = (n + kernel.panel - 1) / kernel.panel * kernel.panel;
    const std::size_t element = precision == Precision::fp32 ? 4 : precision == Precision::bf16 ? 2 : 1;
    panel_bytes_ = static_cast<std::size_t>(columns * depth) * element;
    if (shelf == nullptr) panels_ = Buffer(panel_bytes_);
    std::byte* panels = shelf == nullptr ? panels_.data() : shelf->take(panel_bytes_);
    view_ = {precision, n, k, depth, nullptr, nullptr, nullptr};
    if (precision == Precision::fp32) {
        pack(reinterpret_cast<float*>(panels), kernel, n, k, depth, threads,
             [&](std::int64_t row, std::int64_t i) { return w[row * k + i]; });
    } else if (precision == Precision::bf16) {
        pack(reinterpret_cast<std::uint16_t*>(panels), kernel, n, k, depth, threads,
             [&](std::int64_t row, std::int64_t i) { return to_bf16(w[row * k + i]); });
    } else {
        check(k <= kMostDepth, "expected at most ", kMostDepth, " inputs of an int8 product, got ", k);
        scale_ = Buffer(static_cast<std::size_t>(columns) * sizeof(float));
        offset_ = Buffer(static_cast<std::size_t>(columns) * sizeof(std::int32_t));
        float* scale = scale_.as<float>();
        std::int32_t* offset = offset_.as<std::int32_t>();
        for (std::int64_t row = 0; row < n; ++row) {
            float peak = 0;
            for (std::int64_t i = 0; i < k; ++i) {
                const float size = std::fabs(w[row * k + i]);
                check(size <= std::numeric_limits<float>::max(), "expected finite weights, got ", w[row * k + i],
                      " in row ", row);
                peak = std::max(peak, size);
            }
            scale[row] = step_of(w + row * k, k, peak);
        }
        pack(reinterpret_cast<std::int8_t*>(panels), kernel, n, k, depth, threads,
             [&](std::int64_t row, std::int64_t i) {
                 const float whole = scale[row] > 0 ? std::nearbyint(w[row * k + i] / scale[row]) : 0.0f;
                 const auto value = static_cast<std::int8_t>(std::clamp(whole, -127.0f, 127.0f));
                 offset[row] += kernel.offset * value;
                 return value;
             });
    }
    view_.panels = panels, view_.scale = scale_.as<float>(), view_.offset = offset_.as<std::int32_t>();
}

std::int64_t row_depth(const Kernels& kernels, Precision precision, std::int64_t k) {
    const std::int64_t group = kernels.product(precision).group;
    return (k + group - 1) / group * group;
}

std::int64_t row_stride(const Kernels& kernels, Precision precision, std::int64_t k) {
    const std::int64_t element = kernels.product(precision).element, line = 64 / element;
    const std::int64_t lines = (row_depth(kernels, precision, k) + line - 1) / line;
    return (lines + (lines % 2 == 0)) * line;
}

void check_gemm(const Kernels& kernels, const Gemm& g) {
    check(g.w != nullptr && g.a != nullptr && g.out != nullptr, "expected weights, rows and room for the result");
    check(g.m >= 1, "expected at least one row, got ", g.m);
    check(g.stride >= g.w->depth, "expected rows at least ", g.w->depth, " elements apart, got ", g.stride);
    check(g.w->precision != Precision::int8 || g.a_scale != nullptr, "expected a scale for each int8 row");
    const std::int64_t wide = g.w->n + (g.out_bf16 ? g.w->n % 2 : 0);
    check(g.out_stride >= wide, "expected rows of the result at least ", wide, " elements apart, got ", g.out_stride);
    const bool in_place = g.epilogue == Epilogue::add || g.epilogue == Epilogue::gate;
    check(!(g.out_bf16 && in_place), "expected an fp32 result to add to, got bf16");
    check(g.epilogue != Epilogue::gate || (g.gate != nullptr && g.gate_rows >= 1),
          "expected a gate and the number of rows that share one");
    (void)kernels;
}

}  // namespace cfrt
