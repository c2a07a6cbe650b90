// Attention over keys that lie in ranges of rows, read in place: out = softmax(scale q K^T) V for every head, without a
// mask. A query row sees all rows of the ranges; rows that see different ranges go into different calls.
//
// A row of the result depends on its own query, on the keys and values, and on the list of ranges: its bits do not
// change with the other rows of the call, nor with how the tiles are shared among threads.
#pragma once

#include <cstdint>

#include "../../plan.h"
#include "gemm.h"

namespace cfrt {

// Keys and values of one layer, of a ring or of a text. A row is a token; all levels lay them out alike:
//   K       [head][row][dim]                 as they come
//   V fp32  [head][row][dim]
//   V bf16  [head][row / 2][dim][row % 2]    two rows side by side, as the dot product of two bf16 wants them
struct KeyValues {
    Precision precision;  // fp32 or bf16
    std::int64_t heads;
    std::int64_t dim;   // numbers a head: a multiple of 16
    std::int64_t rows;  // allocated: even
    void *k, *v;        // of equal size
};

struct Attention {
    const KeyValues* kv;
    const Span* ranges;  // rows to read, at least one in all; none of them empty
    int range_count;
    std::int64_t sink_rows;  // of those read, the first that many are looked at by q_sink
    const float* q;          // [m][heads * dim], rows q_stride elements apart
    const float* q_sink;     // the same with the other rotation; may be null where sink_rows is 0
    std::int64_t m, q_stride;
    float scale;
    void* out;  // [m][heads * dim], fp32 or bf16
    std::int64_t out_stride;
    bool out_bf16;
};

struct AttentionKernel {
    // Bytes of scratch, aligned to 64, that one thread needs for one call of run.
    std::int64_t (*scratch)(const Attention&);
    // The work in equal pieces, of which a call does [begin, end).
    std::int64_t (*tiles)(const Attention&);
    void (*run)(const Attention&, std::int64_t begin, std::int64_t end, void* scratch);
};

}  // namespace cfrt
