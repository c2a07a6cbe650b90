// What the three products share: cutting C into tiles, and the epilogues.
//
// A tile is `panel` columns by at most `Micro::kRows` rows. Its sums stay in registers over the whole of K and pass
// through a small buffer to the epilogue, so that the micro-kernels know nothing of epilogues: one store and one load
// per element of C, against K multiply-adds.
#pragma once

#include "../simd.h"
#include "gemm.h"

namespace cfrt::CFRT_LEVEL {
namespace {

// Columns of a panel in vectors, and rows of the largest tile: accumulators fill the registers, leaving room for one
// row of the panel and a broadcast.
#if CFRT_SIMD >= 2
constexpr int kVecs = 2, kRows = 14;
#elif CFRT_SIMD == 1
constexpr int kVecs = 2, kRows = 6;
#else
constexpr int kVecs = 2, kRows = 4;
#endif
constexpr int kPanel = kVecs * kLanes;

struct Tile {
    std::int64_t row, column;
    int rows, columns;
};

// Applies `finish(y, lanes, row, column)` to the vectors of a tile; lanes < kLanes at the right edge.
template <class Load, class Finish>
CFRT_INLINE void for_each_vec(const Tile& t, const float* bias, Load load_sum, Finish finish) {
    for (int r = 0; r < t.rows; ++r) {
        for (int v = 0; v < kVecs; ++v) {
            const int lanes = least(kLanes, t.columns - v * kLanes);
            if (lanes <= 0) break;
            const std::int64_t column = t.column + v * kLanes;
            Vec y = load_sum(r, v, lanes);
            if (bias) y = y + (lanes == kLanes ? load(bias + column) : load(bias + column, lanes));
            finish(y, lanes, t.row + r, column);
        }
    }
}

CFRT_INLINE Vec load_some(const float* p, int lanes) {
    return lanes == kLanes ? load(p) : load(p, lanes);
}
CFRT_INLINE void store_some(float* p, Vec x, int lanes) {
    lanes == kLanes ? store(p, x) : store(p, x, lanes);
}
CFRT_INLINE void store_some(std::uint16_t* p, Vec x, int lanes) {
    lanes == kLanes ? store_bf16(p, x) : store_bf16(p, x, lanes);
}

// out = f(y) in fp32 or bf16.
template <class Load, class Function>
CFRT_INLINE void write(const Gemm& g, const Tile& t, Load load_sum, Function f) {
    if (g.out_bf16) {
        std::uint16_t* out = static_cast<std::uint16_t*>(g.out);
        for_each_vec(t, g.bias, load_sum, [&](Vec y, int lanes, std::int64_t row, std::int64_t column) {
            store_some(out + row * g.out_stride + column, f(y), lanes);
        });
        if (g.w->n % 2 && t.column + t.columns == g.w->n)
            for (int r = 0; r < t.rows; ++r) out[(t.row + r) * g.out_stride + g.w->n] = 0;
    } else {
        float* out = static_cast<float*>(g.out);
        for_each_vec(t, g.bias, load_sum, [&](Vec y, int lanes, std::int64_t row, std::int64_t column) {
            store_some(out + row * g.out_stride + column, f(y), lanes);
        });
    }
}

template <class Load>
CFRT_INLINE void finish_tile(const Gemm& g, const Tile& t, Load load_sum) {
    switch (g.epilogue) {
        case Epilogue::none:
            return write(g, t, load_sum, [](Vec y) { return y; });
        case Epilogue::gelu:
            return write(g, t, load_sum, [](Vec y) { return gelu(y); });
        case Epilogue::silu:
            return write(g, t, load_sum, [](Vec y) { return silu(y); });
        case Epilogue::add:
            return for_each_vec(t, g.bias, load_sum, [&](Vec y, int lanes, std::int64_t row, std::int64_t column) {
                float* p = static_cast<float*>(g.out) + row * g.out_stride + column;
                store_some(p, load_some(p, lanes) + y, lanes);
            });
        case Epilogue::gate:
            return for_each_vec(t, g.bias, load_sum, [&](Vec y, int lanes, std::int64_t row, std::int64_t column) {
                float* p = static_cast<float*>(g.out) + row * g.out_stride + column;
                const float* gate = g.gate + row / g.gate_rows * g.gate_stride + column;
                store_some(p, fma(load_some(gate, lanes), y, load_some(p, lanes)), lanes);
            });
    }
}

// ---------------------------------------------------------------------------------------------------------- the driver

// Micro: A = element of a row, W = element of a panel, Sum = float or int32, kGroup, and
//   block<R>(rows of A, stride, panel, groups, sums [R][kPanel])
template <class Micro>
using Block = void (*)(const typename Micro::A*, std::int64_t, const typename Micro::W*, std::int64_t,
                       typename Micro::Sum*);

template <class Micro, class Rows>
struct Blocks;

template <int... R>
struct RowCounts {};

template <class Micro, int... R>
struct Blocks<Micro, RowCounts<R...>> {
    static constexpr Block<Micro> of[] = {Micro::template block<R>...};
};

template <int N, int... R>
struct UpTo : UpTo<N - 1, N, R...> {};
template <int... R>
struct UpTo<0, R...> {
    using type = RowCounts<R...>;
};

std::int64_t row_blocks(const Gemm& g) {
    return ceil_div(g.m, kRows);
}

std::int64_t tiles(const Gemm& g) {
    return ceil_div(g.w->n, kPanel) * row_blocks(g);
}

// Panel by panel, all rows of one panel before the next: a panel is read from far away once, then from the cache.
template <class Micro>
void run(const Gemm& g, std::int64_t begin, std::int64_t end) {
    using Sum = typename Micro::Sum;
    using Table = Blocks<Micro, typename UpTo<kRows>::type>;
    alignas(64) Sum sums[kRows * kPanel];
    const std::int64_t blocks = row_blocks(g), groups = g.w->depth / Micro::kGroup;
    const auto* a = static_cast<const typename Micro::A*>(g.a);
    const auto* panels = static_cast<const typename Micro::W*>(g.w->panels);
    for (std::int64_t tile = begin; tile < end; ++tile) {
        const std::int64_t panel = tile / blocks, block = tile % blocks;
        Tile t;
        t.row = g.m * block / blocks, t.column = panel * kPanel;
        t.rows = static_cast<int>(g.m * (block + 1) / blocks - t.row);
        t.columns = static_cast<int>(least<std::int64_t>(kPanel, g.w->n - t.column));
        Table::of[t.rows - 1](a + t.row * g.stride, g.stride, panels + panel * kPanel * g.w->depth, groups, sums);
        finish_tile(g, t, [&](int r, int v, int) { return Micro::value(g, t, sums + r * kPanel, r, v); });
    }
}

}  // namespace
}  // namespace cfrt::CFRT_LEVEL
