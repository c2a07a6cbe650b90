#include "linear.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace cfrt {
namespace {

constexpr std::int64_t kLanes = 16;  // multiply-adds that go with one operation, about

}  // namespace

Rows Rows::take(Arena& arena, const Kernels& kernels, Precision precision, std::int64_t m, std::int64_t k) {
    Rows rows{precision,
              k,
              row_depth(kernels, precision, k),
              row_stride(kernels, precision, k),
              kernels.product(precision).element,
              nullptr,
              nullptr};
    arena.take(rows.data, m * rows.stride * rows.element);
    if (precision == Precision::int8) arena.take(rows.scale, m);
    return rows;
}

Rows Rows::from(std::int64_t row) const {
    Rows rest = *this;
    rest.data += row * stride * element;
    if (scale != nullptr) rest.scale += row;
    return rest;
}

Handover Handover::take(Arena& arena, const Kernels& kernels, Precision precision, std::int64_t m, std::int64_t k) {
    Handover next{Rows::take(arena, kernels, precision, m, k), nullptr};
    if (precision == Precision::int8) arena.take(next.wide, m * k);
    return next;
}

Handover Handover::from(std::int64_t row) const {
    return {rows.from(row), wide == nullptr ? nullptr : wide + row * rows.k};
}

void Handover::settle(const Machine& machine, std::int64_t m) const {
    if (rows.precision == Precision::int8) convert(machine, rows, wide, rows.k, m);
}

void convert(const Machine& machine, const Rows& rows, const float* x, std::int64_t stride, std::int64_t m) {
    const RowKernels& kernels = machine.kernels.rows;
    machine.share(m, rows.k, [&](std::int64_t begin, std::int64_t end) {
        if (rows.precision == Precision::int8)
            return kernels.to_int8(rows.data, rows.stride, rows.scale, x, stride, rows.k, rows.depth, begin, end);
        if (rows.precision == Precision::bf16)
            return kernels.to_bf16(reinterpret_cast<std::uint16_t*>(rows.data), rows.stride, x, stride, rows.k,
                                   rows.depth, begin, end);
        for (std::int64_t row = begin; row < end; ++row)  // what lies behind a row stays zero
            std::copy_n(x + row * stride, rows.k, reinterpret_cast<float*>(rows.data) + row * rows.stride);
    });
}

Linear::Linear(const Machine& machine, Shelf& shelf, Precision precision, const std::vector<float>& w,
               std::vector<float> bias)
    : bias_(std::move(bias)),
      weights_(machine.kernels, precision, w.data(), static_cast<std::int64_t>(bias_.size()),
               static_cast<std::int64_t>(w.size() / bias_.size()), machine.threads, &shelf) {}

void multiply(const Machine& machine, const Linear& linear, const Rows& rows, std::int64_t m, const Result& result) {
    const PackedWeights& w = linear.w();
    const Gemm g{
        &w,         rows.data,     m,           rows.stride, rows.scale,       linear.bias(),     result.epilogue,
        result.out, result.stride, result.bf16, result.gate, result.gate_rows, result.gate_stride};
    const GemmKernel& kernel = machine.kernels.product(w.precision);
    const std::int64_t tiles = kernel.tiles(g);
    machine.share(tiles, m * w.n / tiles * w.k / kLanes,
                  [&](std::int64_t begin, std::int64_t end) { kernel.run(g, begin, end); });
}

}  // namespace cfrt
