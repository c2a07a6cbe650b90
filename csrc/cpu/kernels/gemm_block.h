// What the three products share: cutting C into tiles, the micro-kernel and the epilogues.
//
// A tile is `kPanel` columns by at most kRows rows. Its sums stay in registers over the whole of K and pass through a
// small buffer to the epilogue, so that the micro-kernel knows nothing of epilogues: one store and one load per element
// of C, against K multiply-adds. All rows of one panel come before the next panel: a panel is read from far away once,
// then from the second-level cache. This is the inner half of the scheme of Goto and van de Geijn ("Anatomy of
// High-Performance Matrix Multiplication", ACM TOMS 2008): weights come packed, and K is at most some thousands, so
// that a panel fits in the second-level cache whole and neither K nor M has to be blocked.
//
// The ladder, in GOP/s of one core and measured by benchmarks/bench_kernels.py. Steps 1 to 4 on an AMD EPYC (Zen 4,
// ceiling 118 in fp32, 236 in bf16, 473 in int8, 2026-11-25), from 5 on on another (Zen 5, 260, 525, 1050, 2026-11-26);
// level avx512bf16 but where another is named:
//   1  a micro-kernel for each number of rows up to 14, two vectors wide; rows shared evenly among the tiles of a
//      panel, 15 as 7 + 8 and not 14 + 1. 64 rows, K = 256: fp32 111, bf16 214, int8 390
//   2  what belongs to a column (bias, scale, offset) is fetched once a tile, not once a row: bf16 219, int8 415
//   3  up to six rows: two panels side by side, up to two rows four, since a few sums cannot fill the pipeline. Two
//      rows, K = 768: bf16 156 -> 184. One row, K = 192: 93 -> 107; the second-level cache's 32 bytes a cycle allow
//      no more
//   4  bf16 without its dot product: first the odd numbers of all words, then the even ones, and a row less, so that
//      all fits into the registers. 12 rows on avx2: 77 -> 102; plain: 23 -> 29
//   5  the next panel is asked for ahead, a line in every step. Weights read once each, as in a pass, 64 rows, K = 256,
//      N = 1024: fp32 192 -> 207, bf16 328 -> 466, int8 709 -> 904, where weights that lie in the cache give 247, 473,
//      844. With four rows and panels side by side it costs more than it brings: bf16 260 -> 245
//   -  int8 on plain in the same way, four numbers out of a word: 24 -> 16, so bytes are still widened one by one there
//   6  GELU without a division (activations.h). 64 rows, K = 256, int8: 671 -> 709
//
// GCC 12 wants sums to be vectors of int32 and not __m512i, which it copies in every step (int8 then falls to 200), and
// no counter but k, or it keeps pointers in vector registers (14 rows, fp32: 116 -> 110).
#pragma once

#include "../simd.h"
#include "activations.h"
#include "gemm.h"

namespace cfrt::CFRT_LEVEL {
namespace {

// Columns of a panel in vectors, and rows of the largest tile: accumulators fill the registers, leaving room for one
// row of the panel and a broadcast. So they do with up to kPairRows rows of two panels, and kQuadRows of four.
#if CFRT_SIMD >= 2
constexpr int kVecs = 2, kRows = 14, kPairRows = 6, kQuadRows = 2;
#elif CFRT_SIMD == 1
constexpr int kVecs = 2, kRows = 6, kPairRows = 2, kQuadRows = 0;
#else
constexpr int kVecs = 2, kRows = 4, kPairRows = 2, kQuadRows = 0;
#endif
constexpr int kPanel = kVecs * kLanes;
template <class Micro>
constexpr int kMostRows = Micro::kSteps > 1 ? kRows - 1 : kRows;  // taking numbers apart takes a register more
constexpr int kSums = most(kRows, most(2 * kPairRows, 4 * kQuadRows)) * kPanel;

struct Tile {
    std::int64_t row, column;
    int rows, columns;
};

// ------------------------------------------------------------------------------------------------------ micro-kernels

// Micro says what a product of numbers is:
//   A, W, Sum      elements of a row, of a panel, of the result: float, or int32 for whole numbers
//   kGroup         elements of K that lie together; kSteps: parts in which a group is added up
//   kExact         groups that Acc holds without loss, 0 where there is no bound
//   Acc            vector of sums; dot(x, w, acc) adds products, with x = splat(step, row), w = load(step, panel)
//   put(to, acc, first)  from Acc to Sum, adding unless it is the first
//   Column(g, column).plus(bias, sum, row)  from kLanes Sums to numbers, plus the bias

// Sums that are numbers already.
template <class Dot>
struct Floating : Dot {
    using Sum = float;
    static constexpr std::int64_t kExact = 0;

    CFRT_INLINE static void put(float* to, Vec acc, bool) { store(to, acc); }

    struct Column {
        Column(const Gemm&, std::int64_t) {}
        CFRT_INLINE Vec plus(Vec bias, const float* sum, std::int64_t) const { return load(sum) + bias; }
    };
};

// The panel after this one. A line of it is asked for in every step, the tiles of a panel share in that, so that it
// comes from far away while this one is worked on. Where panels lie side by side the CPU does as well: it is read
// without a break, which it foresees.
struct Ahead {
    const char* at;
    std::int64_t step;  // bytes
};

// The sums of R rows by V vectors over `groups`; every kVecs vectors the next panel begins, `panel` elements on.
template <class Micro, int R, int V>
CFRT_INLINE void accumulate(typename Micro::Acc (&acc)[R][V], const typename Micro::A* a, std::int64_t stride,
                            const typename Micro::W* w, std::int64_t panel, std::int64_t groups, Ahead& ahead) {
    constexpr int kGroup = Micro::kGroup;
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) acc[r][v] = typename Micro::Acc{};
    for (std::int64_t k = 0; k < groups; ++k, w += kGroup * kPanel) {
        if constexpr (R > kPairRows) {
            __builtin_prefetch(ahead.at, 0, 2);
            ahead.at += ahead.step;
        }
#pragma GCC unroll 2
        for (int step = Micro::kSteps - 1; step >= 0; --step) {
            if (Micro::kSteps > 1) asm volatile("" ::: "memory");  // else all rows are kept for the next step
            decltype(Micro::load(step, w)) b[V];
#pragma GCC unroll 8
            for (int v = 0; v < V; ++v) b[v] = Micro::load(step, w + v / kVecs * panel + v % kVecs * kGroup * kLanes);
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) {
                const auto x = Micro::splat(step, a + r * stride + kGroup * k);
#pragma GCC unroll 8
                for (int v = 0; v < V; ++v) acc[r][v] = Micro::dot(x, b[v], acc[r][v]);
            }
        }
    }
}

// R rows by P panels, `panel` elements apart: sums [P][R][kPanel].
template <class Micro, int R, int P>
void block(const typename Micro::A* a, std::int64_t stride, const typename Micro::W* w, std::int64_t panel,
           std::int64_t groups, Ahead ahead, typename Micro::Sum* sums) {
    constexpr int V = P * kVecs;
    typename Micro::Acc acc[R][V];
    const auto put = [&](bool first) {
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
            for (int v = 0; v < V; ++v)
                Micro::put(sums + (v / kVecs * R + r) * kPanel + v % kVecs * kLanes, acc[r][v], first);
    };
    std::int64_t begin = 0;
    if constexpr (Micro::kExact > 0) {
        for (; groups - begin > Micro::kExact; begin += Micro::kExact) {
            accumulate<Micro>(acc, a + begin * Micro::kGroup, stride, w + begin * Micro::kGroup * kPanel, panel,
                              Micro::kExact, ahead);
            put(begin == 0);
        }
    }
    accumulate<Micro>(acc, a + begin * Micro::kGroup, stride, w + begin * Micro::kGroup * kPanel, panel, groups - begin,
                      ahead);
    put(begin == 0);
}

template <class Micro>
using Block = void (*)(const typename Micro::A*, std::int64_t, const typename Micro::W*, std::int64_t, std::int64_t,
                       Ahead, typename Micro::Sum*);

template <int... R>
struct RowCounts {};
template <int N, int... R>
struct UpTo : UpTo<N - 1, N, R...> {};
template <int... R>
struct UpTo<0, R...> {
    using type = RowCounts<R...>;
};

// Blocks of 1, 2, ... rows by P panels.
template <class Micro, int P, class Rows>
struct Blocks;
template <class Micro, int P, int... R>
struct Blocks<Micro, P, RowCounts<R...>> {
    static constexpr Block<Micro> of[] = {block<Micro, R, P>..., nullptr};
};
template <class Micro, int P, int kMost>
constexpr const auto& blocks = Blocks<Micro, P, typename UpTo<kMost>::type>::of;

// ---------------------------------------------------------------------------------------------------------- epilogues

CFRT_INLINE Vec load_some(const float* p, int lanes) {
    return lanes == kLanes ? load(p) : load(p, lanes);
}
CFRT_INLINE void store_some(float* p, Vec x, int lanes) {
    lanes == kLanes ? store(p, x) : store(p, x, lanes);
}
CFRT_INLINE void store_some(std::uint16_t* p, Vec x, int lanes) {
    lanes == kLanes ? store_bf16(p, x) : store_bf16(p, x, lanes);
}

// Applies `finish(y, lanes, row, column)` to the vectors of a tile; lanes < kLanes at the right edge.
template <class Micro, class Finish>
CFRT_INLINE void for_each_vec(const Gemm& g, const Tile& t, const typename Micro::Sum* sums, Finish finish) {
    for (int v = 0; v < kVecs; ++v) {
        const int lanes = least(kLanes, t.columns - v * kLanes);
        if (lanes <= 0) break;
        const std::int64_t column = t.column + v * kLanes;
        const typename Micro::Column scaled(g, column);
        const Vec bias = g.bias ? load_some(g.bias + column, lanes) : zero();
        for (int r = 0; r < t.rows; ++r)
            finish(scaled.plus(bias, sums + r * kPanel + v * kLanes, t.row + r), lanes, t.row + r, column);
    }
}

// out = f(y) in fp32 or bf16.
template <class Micro, class Function>
CFRT_INLINE void write(const Gemm& g, const Tile& t, const typename Micro::Sum* sums, Function f) {
    if (g.out_bf16) {
        std::uint16_t* out = static_cast<std::uint16_t*>(g.out);
        for_each_vec<Micro>(g, t, sums, [&](Vec y, int lanes, std::int64_t row, std::int64_t column) {
            store_some(out + row * g.out_stride + column, f(y), lanes);
        });
        if (g.w->n % 2 && t.column + t.columns == g.w->n)
            for (int r = 0; r < t.rows; ++r) out[(t.row + r) * g.out_stride + g.w->n] = 0;
    } else {
        float* out = static_cast<float*>(g.out);
        for_each_vec<Micro>(g, t, sums, [&](Vec y, int lanes, std::int64_t row, std::int64_t column) {
            store_some(out + row * g.out_stride + column, f(y), lanes);
        });
    }
}

template <class Micro>
void finish_tile(const Gemm& g, const Tile& t, const typename Micro::Sum* sums) {
    const auto at = [&](std::int64_t row, std::int64_t column) {
        return static_cast<float*>(g.out) + row * g.out_stride + column;
    };
    switch (g.epilogue) {
        case Epilogue::none:
            return write<Micro>(g, t, sums, [](Vec y) { return y; });
        case Epilogue::gelu:
            return write<Micro>(g, t, sums, [](Vec y) { return gelu(y); });
        case Epilogue::silu:
            return write<Micro>(g, t, sums, [](Vec y) { return silu(y); });
        case Epilogue::add:
            return for_each_vec<Micro>(g, t, sums, [&](Vec y, int lanes, std::int64_t row, std::int64_t column) {
                float* p = at(row, column);
                store_some(p, load_some(p, lanes) + y, lanes);
            });
        case Epilogue::gate:
            return for_each_vec<Micro>(g, t, sums, [&](Vec y, int lanes, std::int64_t row, std::int64_t column) {
                float* p = at(row, column);
                const float* gate = g.gate + row / g.gate_rows * g.gate_stride + column;
                store_some(p, fma(load_some(gate, lanes), y, load_some(p, lanes)), lanes);
            });
    }
}

// ---------------------------------------------------------------------------------------------------------- the driver

template <class Micro>
std::int64_t row_blocks(const Gemm& g) {
    return ceil_div(g.m, kMostRows<Micro>);
}

template <class Micro>
std::int64_t tiles(const Gemm& g) {
    return ceil_div(g.w->n, kPanel) * row_blocks<Micro>(g);
}

// How many of the next `left` panels go together. It depends on the call, the bits of C do not depend on it.
CFRT_INLINE int side_by_side(const Gemm& g, std::int64_t left) {
    if (g.m <= kQuadRows && left >= 4) return 4;
    return g.m <= kPairRows && left >= 2 ? 2 : 1;
}

template <class Micro>
void run(const Gemm& g, std::int64_t begin, std::int64_t end) {
    using W = typename Micro::W;
    alignas(64) typename Micro::Sum sums[kSums];
    const std::int64_t row_count = row_blocks<Micro>(g), groups = g.w->depth / Micro::kGroup,
                       size = kPanel * g.w->depth;
    const auto* a = static_cast<const typename Micro::A*>(g.a);
    const auto* panels = static_cast<const W*>(g.w->panels);
    const char* onward = g.w->next ? static_cast<const char*>(g.w->next) + g.w->next_bytes * begin / tiles<Micro>(g)
                                   : static_cast<const char*>(g.w->panels);
    while (begin < end) {
        const std::int64_t panel = begin / row_count, part = begin % row_count;
        const int together = side_by_side(g, end - begin);
        Tile t;
        t.row = g.m * part / row_count;
        t.rows = static_cast<int>(g.m * (part + 1) / row_count - t.row);
        const std::int64_t after = panel + together, share = size * static_cast<std::int64_t>(sizeof(W)) / row_count;
        const char* far = after * row_count < end ? reinterpret_cast<const char*>(panels + after * size) : onward;
        const Block<Micro>* table = together == 4   ? blocks<Micro, 4, kQuadRows>
                                    : together == 2 ? blocks<Micro, 2, kPairRows>
                                                    : blocks<Micro, 1, kMostRows<Micro>>;
        table[t.rows - 1](a + t.row * g.stride, g.stride, panels + panel * size, size, groups,
                          {far + part * share, share / groups}, sums);
        for (int p = 0; p < together; ++p) {
            t.column = (panel + p) * kPanel;
            t.columns = static_cast<int>(least<std::int64_t>(kPanel, g.w->n - t.column));
            finish_tile<Micro>(g, t, sums + p * t.rows * kPanel);
        }
        begin += together;
    }
}

}  // namespace
}  // namespace cfrt::CFRT_LEVEL
