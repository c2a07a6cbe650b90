// Every kernel of every level that the CPU has, on arrays of exactly the size that its header asks for.
#include <climits>
#include <memory>
#include <vector>

#include "cpu/attention.h"
#include "cpu/kernels.h"
#include "cpu/latents.h"
#include "cpu/noise.h"
#include "cpu/tables.h"
#include "cpu/weights.h"
#include "guarded.h"
#include "tests.h"

using namespace cfrt;

namespace {

constexpr Precision kPrecisions[] = {Precision::fp32, Precision::bf16, Precision::int8};

// Rows of numbers in the format of a product, the last one ending with its depth.
struct Rows {
    std::int64_t depth, stride;
    Guarded<std::byte> data;
    Guarded<float> scale;

    Rows(const Kernels& kernels, Precision precision, std::int64_t m, std::int64_t k, std::int64_t gap)
        : depth(row_depth(kernels, precision, k)),
          stride(depth + gap),
          data(((m - 1) * stride + depth) * kernels.product(precision).element),
          scale(m) {
        Guarded<float> x(m * k);
        x.normal(1);
        if (precision == Precision::bf16)
            kernels.rows.to_bf16(reinterpret_cast<std::uint16_t*>(data.data()), stride, x.data(), k, k, depth, 0, m);
        else if (precision == Precision::int8)
            kernels.rows.to_int8(data.data(), stride, scale.data(), x.data(), k, k, depth, 0, m);
        else
            for (std::int64_t row = 0; row < m; ++row)
                std::copy_n(x.data() + row * k, k, reinterpret_cast<float*>(data.data()) + row * stride);
    }
};

// Packed weights as the headers size them: panels, and for int8 scales and offsets of whole panels.
struct Panels {
    Guarded<std::byte> panels;
    std::unique_ptr<Guarded<float>> scale;
    std::unique_ptr<Guarded<std::int32_t>> offset;
    PackedWeights view;

    Panels(const Kernels& kernels, const Weights& from) : panels(bytes(kernels, from.view())), view(from.view()) {
        std::memcpy(panels.data(), view.panels, static_cast<std::size_t>(panels.size()));
        view.panels = panels.data();
        if (view.precision != Precision::int8) return;
        const std::int64_t columns = whole(kernels, view);
        scale = std::make_unique<Guarded<float>>(columns), offset = std::make_unique<Guarded<std::int32_t>>(columns);
        std::copy_n(view.scale, columns, scale->data());
        std::copy_n(view.offset, columns, offset->data());
        view.scale = scale->data(), view.offset = offset->data();
    }

    static std::int64_t whole(const Kernels& kernels, const PackedWeights& w) {
        const std::int64_t panel = kernels.product(w.precision).panel;
        return (w.n + panel - 1) / panel * panel;
    }
    static std::int64_t bytes(const Kernels& kernels, const PackedWeights& w) {
        constexpr std::int64_t kBytes[] = {4, 2, 1};
        return whole(kernels, w) * w.depth * kBytes[static_cast<int>(w.precision)];
    }
};

void products(const Kernels& kernels, Precision precision, std::int64_t m, std::int64_t n, std::int64_t k) {
    Threads alone(1);
    Guarded<float> w(n * k), bias(n), gate((m + 1) / 2 * n);
    w.normal(2), bias.normal(3), gate.normal(4);
    const Weights packed(kernels, precision, w.data(), n, k, alone);
    Panels panels(kernels, packed);
    Rows rows(kernels, precision, m, k, k % 3);
    Gemm g{};
    g.w = &panels.view, g.a = rows.data.data(), g.m = m, g.stride = rows.stride, g.a_scale = rows.scale.data();
    g.bias = bias.data(), g.gate = gate.data(), g.gate_rows = 2, g.gate_stride = n;
    const GemmKernel& kernel = kernels.product(precision);
    for (const Epilogue epilogue : {Epilogue::none, Epilogue::gelu, Epilogue::silu, Epilogue::add, Epilogue::gate}) {
        g.epilogue = epilogue;
        Guarded<float> out(m * n);
        g.out = out.data(), g.out_stride = n, g.out_bf16 = false;
        check_gemm(kernels, g);
        kernel.run(g, 0, kernel.tiles(g));
        for (std::int64_t i = 0; i < m * n; ++i) CFRT_REQUIRE(out.data()[i] - out.data()[i] == 0);
        if (epilogue == Epilogue::add || epilogue == Epilogue::gate) continue;
        Guarded<std::uint16_t> half(m * (n + n % 2));
        g.out = half.data(), g.out_stride = n + n % 2, g.out_bf16 = true;
        check_gemm(kernels, g);
        kernel.run(g, 0, kernel.tiles(g));
    }
}

// Reads rows [first, last) of `rows`, in two ranges that meet inside a word of two.
void attention(const Kernels& kernels, Precision precision, std::int64_t m, std::int64_t rows, std::int64_t dim) {
    constexpr std::int64_t kHeads = 2;
    const std::int64_t even = rows + rows % 2, width = kHeads * dim, element = precision == Precision::fp32 ? 4 : 2;
    Guarded<std::byte> k(kHeads * even * dim * element), v(kHeads * even * dim * element);
    const KeyValues kv{precision, kHeads, dim, even, k.data(), v.data()};
    Guarded<float> keys(rows * width), values(rows * width), weight(width), turn(rows * 2 * dim), q(m * width);
    keys.normal(5), values.normal(6), weight.normal(7), turn.normal(8), q.normal(9);
    Guarded<std::int64_t> place(rows);
    for (std::int64_t row = 0; row < rows; ++row) place.data()[row] = rows - 1 - row;
    const Append append{
        {keys.data(), width, weight.data(), 1e-6f, turn.data()}, values.data(), width, &kv, place.data()};
    kernels.pointwise.append(append, 0, rows);

    const Span ranges[] = {{rows / 2, rows}, {0, rows / 2}};
    Attention call{};
    call.kv = &kv, call.ranges = ranges, call.range_count = rows > 1 ? 2 : 1, call.sink_rows = rows / 3;
    call.q = q.data(), call.q_sink = q.data(), call.m = m, call.q_stride = width, call.scale = 0.1f;
    for (const bool half : {false, true}) {
        Guarded<std::byte> out(m * width * (half ? 2 : 4));
        call.out = out.data(), call.out_stride = width, call.out_bf16 = half;
        check_attention(call);
        Threads alone(1);
        const std::size_t bytes = attention_scratch(kernels, call, 1);
        Guarded<std::byte> scratch(static_cast<std::int64_t>(bytes));
        attend(kernels, alone, call, scratch.data());
        for (std::int64_t i = 0; !half && i < m * width; ++i) {
            const float x = reinterpret_cast<float*>(out.data())[i];
            CFRT_REQUIRE(x - x == 0);
        }
    }
}

void norms(const Kernels& kernels, Precision precision, std::int64_t m, std::int64_t width) {
    const std::int64_t depth = row_depth(kernels, precision, width), element = kernels.product(precision).element;
    Guarded<float> x(m * width), gain((m + 1) / 2 * width), shift((m + 1) / 2 * width), scale(m);
    x.normal(1), gain.normal(2), shift.normal(3);
    Guarded<std::byte> out(m * depth * element);
    const LayerNorm norm{x.data(), width,     width,      gain.data(), shift.data(), 2,           width,
                         1e-6f,    precision, out.data(), depth,       depth,        scale.data()};
    kernels.pointwise.layer_norm(norm, 0, m);
}

void queries(const Kernels& kernels, std::int64_t m, std::int64_t heads, std::int64_t dim) {
    const std::int64_t width = heads * dim;
    Guarded<float> x(m * width), weight(width), turn(m * 2 * dim), sink_turn(m * 2 * dim), out(m * width),
        far(m * width);
    x.normal(1), weight.normal(2), turn.normal(3), sink_turn.normal(4);
    const Queries call{{x.data(), width, weight.data(), 1e-6f, turn.data()},
                       heads,
                       dim,
                       out.data(),
                       width,
                       sink_turn.data(),
                       far.data()};
    kernels.pointwise.queries(call, 0, m);
}

void pixels(const Kernels& kernels, std::int64_t rows, std::int64_t columns, std::int64_t frames, std::int64_t fold) {
    const std::int64_t channels = frames * 3 * fold * fold;
    Guarded<float> x(rows * columns * channels);
    x.normal(1);
    Guarded<std::uint8_t> out((frames - 1) * rows * fold * columns * fold * 3);
    const Pixels call{x.data(), channels, rows, columns, frames, 1, fold, 0.5f, 0.5f, out.data()};
    kernels.pointwise.pixels(call, 0, rows);
}

void elements(const Kernels& kernels, std::int64_t count) {
    Guarded<float> x(count), out(count), time(2 * count), table(3 * count), parts(6 * count);
    x.normal(1), time.normal(2), table.normal(3);
    kernels.pointwise.silu(out.data(), x.data(), 0, count);
    kernels.pointwise.gelu(x.data(), x.data(), 0, count);
    const Modulation call{time.data(), count, 0, table.data(), 3, count, 2u, parts.data()};
    kernels.pointwise.modulation(call, 0, 2);
}

// Taps of the last position and of the one before the plane, which is zeros.
void convolutions(const Kernels& kernels, std::int64_t rows, std::int64_t width) {
    constexpr std::int64_t kTaps = 3;
    const std::int64_t depth = kTaps * width + 1;
    Guarded<float> plane((rows + 1) * width), gathered(rows * depth), x(rows * width), out(rows * (width + 1));
    Guarded<std::int32_t> taps(rows * kTaps);
    for (std::int64_t i = 0; i < rows * kTaps; ++i) taps.data()[i] = static_cast<std::int32_t>(i % (rows + 1)) - 1;
    plane.normal(2);
    kernels.conv.gather({plane.data() + width, width, taps.data(), kTaps, gathered.data(), depth, depth}, 0, rows);
    Guarded<std::byte> whole(rows * depth * kernels.product(Precision::int8).element);
    Guarded<float> scale(rows);
    kernels.conv.gather_int8({plane.data() + width, width, taps.data(), kTaps, whole.data(), depth, depth},
                             scale.data(), 0, rows);
    x.normal(1);
    Guarded<std::uint16_t> half(rows * (width + 1));
    for (const bool silu : {false, true}) {
        kernels.conv.activate({x.data(), width, silu, false, out.data(), width + 1}, 0, rows);
        kernels.conv.activate({x.data(), width, silu, true, half.data(), width + 1}, 0, rows);
    }
}

void tables_and_latents() {
    const Rotary rotary{3, 5, {2, 3, 3}, 10000.0};
    Guarded<std::int64_t> positions(2);
    positions.data()[0] = 7, positions.data()[1] = std::int64_t{1} << 40;
    Guarded<float> turns(2 * rotary.tokens() * 2 * rotary.dim()), features(18);
    fill_turns(turns.data(), rotary, positions.data(), 2);
    fill_time_features(features.data(), 999.5, features.size());
    const Patches patches{5, 6, 4, 2, 2};
    const std::int64_t numbers = 2 * patches.tokens() * patches.size();
    Guarded<float> latents(numbers), rows(numbers), x0(numbers);
    latents.normal(1);
    patchify(rows.data(), patches.size(), latents.data(), patches, 2);
    unpatchify(latents.data(), rows.data(), patches.size(), patches, 2);
    estimate_x0(x0.data(), latents.data(), rows.data(), patches.size(), 0.5f, patches, 2);
}

// A product whose rows end one row before g.m says.
void one_row_too_many(const Kernels& kernels, const float* rows, std::int64_t m, std::int64_t k) {
    Threads alone(1);
    std::vector<float> w(static_cast<std::size_t>(8 * k)), out(static_cast<std::size_t>(8 * (m + 1)));
    const Weights weights(kernels, Precision::fp32, w.data(), 8, k, alone);
    Gemm g{};
    g.w = &weights.view(), g.a = rows, g.m = m + 1, g.stride = k, g.out = out.data(), g.out_stride = 8;
    kernels.product(Precision::fp32).run(g, 0, kernels.product(Precision::fp32).tiles(g));
}

}  // namespace

void test_memory() {
    for (const Isa isa : supported_isas()) {
        const Kernels& level = kernels(isa);
        for (const Precision precision : kPrecisions) {
            // Rows of every micro-kernel; columns and depths around vectors, panels and groups.
            for (std::int64_t m = 1; m <= 15; ++m) products(level, precision, m, 32 + m, 2 * m + 1);
            for (const std::int64_t n : {1, 7, 8, 17, 65, 130}) products(level, precision, 3, n, 19);
            for (const std::int64_t k : {1, 2, 3, 4, 5, 64, 1030}) products(level, precision, 2, 40, k);
            for (const std::int64_t width : {1, 3, 16, 37, 150}) norms(level, precision, 5, width);
        }
        for (const Precision precision : {Precision::fp32, Precision::bf16}) {
            for (const std::int64_t m : {1, 4, 5, 9, 17, 33, 70}) attention(level, precision, m, 13 + m, 16);
            for (const std::int64_t rows : {1, 2, 3, 97, 200}) attention(level, precision, 6, rows, 80);
        }
        queries(level, 3, 2, 48);
        for (const std::int64_t count : {1, 5, 16, 33}) elements(level, count);
        for (const std::int64_t width : {1, 8, 19, 48}) convolutions(level, 5, width);
        for (const std::int64_t fold : {1, 2, 4}) pixels(level, 3, 5, 2, fold);
    }
    tables_and_latents();
}

void mutant_heap() {
    const std::vector<float> rows(5 * 32);
    one_row_too_many(kernels(Isa::plain), rows.data(), 5, 32);
}

void mutant_guard() {
    Guarded<float> rows(5 * 32);
    one_row_too_many(kernels(best_isa()), rows.data(), 5, 32);
}

void mutant_signed() {
    volatile int large = INT_MAX;
    large = large + 1;
}
