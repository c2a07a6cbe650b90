#include "attention.h"

#include <cstdint>

#include "../check.h"

namespace cfrt {
namespace {

std::int64_t one_scratch(const Kernels& kernels, const Attention& call) {
    return (kernels.attention(call.kv->precision).scratch(call) + 63) / 64 * 64;
}

// Multiply-adds below which other threads are left alone: a few microseconds.
constexpr std::int64_t kWorthSharing = 1 << 19;

std::int64_t multiply_adds(const Attention& call) {
    std::int64_t keys = 0;
    for (int i = 0; i < call.range_count; ++i) keys += call.ranges[i].stop - call.ranges[i].start;
    return 2 * call.m * keys * call.kv->heads * call.kv->dim;
}

}  // namespace

void check_attention(const Attention& call) {
    const KeyValues& kv = *call.kv;
    const std::int64_t width = kv.heads * kv.dim;
    check(kv.precision != Precision::int8, "expected keys and values in fp32 or bf16, got int8");
    check(kv.dim >= 16 && kv.dim % 16 == 0, "expected a head of a multiple of 16 numbers, got ", kv.dim);
    check(kv.rows % 2 == 0, "expected room for an even number of keys, got ", kv.rows);
    check(call.m >= 1, "expected at least one query, got ", call.m);
    check(call.q_stride >= width && call.out_stride >= width, "expected rows at least ", width,
          " elements apart, got queries ", call.q_stride, " and results ", call.out_stride);
    std::int64_t read = 0;
    for (int i = 0; i < call.range_count; ++i) {
        const Span& span = call.ranges[i];
        check(0 <= span.start && span.start < span.stop && span.stop <= kv.rows, "expected ranges within the ", kv.rows,
              " rows, none empty, got [", span.start, ", ", span.stop, ")");
        read += span.stop - span.start;
    }
    check(read >= 1, "expected at least one key to look at");
    check(0 <= call.sink_rows && call.sink_rows <= read, "expected 0 to ", read,
          " rows of sinks, as many as are read, got ", call.sink_rows);
    check(call.sink_rows == 0 || call.q_sink != nullptr, "expected queries turned for the sinks");
}

std::size_t attention_scratch(const Kernels& kernels, const Attention& call, int threads) {
    return static_cast<std::size_t>(one_scratch(kernels, call) * threads);
}

void attend(const Kernels& kernels, Threads& threads, const Attention& call, void* scratch) {
    const AttentionKernel& kernel = kernels.attention(call.kv->precision);
    const std::int64_t tiles = kernel.tiles(call), bytes = one_scratch(kernels, call), count = threads.count();
    if (count == 1 || multiply_adds(call) < kWorthSharing) return kernel.run(call, 0, tiles, scratch);
    threads.run([&](int thread) {
        const std::int64_t begin = tiles * thread / count, end = tiles * (thread + 1) / count;
        if (begin < end) kernel.run(call, begin, end, static_cast<std::byte*>(scratch) + thread * bytes);
    });
}

}  // namespace cfrt
