// C = A W^T with what follows it fused in, and the rows it reads. W [N, K] is packed once (csrc/cpu/weights.h).
//
// Rows: activations A [M, K] lie row by row, `stride` elements apart, in the format of the product's precision:
//   fp32   float
//   bf16   the upper 16 bits of a float, rounded to nearest even
//   int8   whole numbers in -127..127, stored as the level's product wants them (GemmKernel::element bytes), and one
//          float for each row, the scale: value = number * scale
// Behind its K elements a row has zeros up to `depth`, K rounded up to whole groups; RowKernels write them.
//
// Each element of C is one sum over k in rising order, whatever M is, whichever rows are in the call and however the
// tiles are shared among threads: its bits depend on its row of A, its row of W and the level, and on nothing else.
#pragma once

#include <cstdint>

namespace cfrt {

enum class Precision { fp32, bf16, int8 };

// What happens to a product y = A W^T, y += bias first where there is one.
enum class Epilogue {
    none,  // out = y
    gelu,  // out = gelu(y), tanh form
    silu,  // out = silu(y)
    add,   // out += y
    gate,  // out += gate * y
};

// W in panels of GemmKernel::panel columns of C; zeros fill up the last panel and each group.
struct PackedWeights {
    Precision precision;
    std::int64_t n, k, depth;
    const void* panels;          // [panel][k / group][column][k % group]
    const float* scale;          // int8: what a column's whole numbers are multiplied with
    const std::int32_t* offset;  // int8: what a column's sum has too much, because the rows are stored with an offset
    const void* next = nullptr;  // panels of the weights that are wanted after these, to be asked for in time
    std::int64_t next_bytes = 0;
};

struct Gemm {
    const PackedWeights* w;
    const void* a;
    std::int64_t m, stride;  // stride >= depth
    const float* a_scale;    // [M], int8 only
    const float* bias;       // [N] or null
    Epilogue epilogue;
    void* out;  // [M, N], rows out_stride elements apart; bf16 only where the epilogue is none, gelu or silu
    std::int64_t out_stride;
    bool out_bf16;      // then a row gets a zero behind it where N is odd, and out_stride has room for it
    const float* gate;  // row m is gated by gate + m / gate_rows * gate_stride, [N]
    std::int64_t gate_rows, gate_stride;
};

struct GemmKernel {
    int panel;    // columns of C that a panel covers
    int group;    // elements of K that lie side by side for each column
    int element;  // bytes of an element of A
    int offset;   // int8: added to each whole number of A before it is stored

    // The work in `tiles` equal pieces, of which a call does [begin, end); see Threads::split.
    std::int64_t (*tiles)(const Gemm&);
    void (*run)(const Gemm&, std::int64_t begin, std::int64_t end);
};

// One row of a call each; x and out are row-major with strides in elements.
struct RowKernels {
    // out[m][k] = bf16(x[m][k]), with zeros from k to depth.
    void (*to_bf16)(std::uint16_t* out, std::int64_t out_stride, const float* x, std::int64_t x_stride, std::int64_t k,
                    std::int64_t depth, std::int64_t begin, std::int64_t end);
    // scale[m] = max |x[m]| / 127, out[m][k] = x[m][k] / scale[m] to nearest even. Where the maximum is below 1e-36 the
    // scale is zero, where the row holds NaN or an infinity it is NaN, and the whole numbers are zeros.
    void (*to_int8)(void* out, std::int64_t out_stride, float* scale, const float* x, std::int64_t x_stride,
                    std::int64_t k, std::int64_t depth, std::int64_t begin, std::int64_t end);
};

}  // namespace cfrt
