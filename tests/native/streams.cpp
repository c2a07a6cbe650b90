// Streams as the engine drives them, on pools of several threads, two streams at once in one process: products,
// the ring's passes, appends, attention. The bytes must be those of one thread alone.
#include <algorithm>
#include <thread>
#include <vector>

#include "cpu/attention.h"
#include "cpu/ring.h"
#include "cpu/weights.h"
#include "tests.h"

using namespace cfrt;

namespace {

constexpr std::int64_t kHeads = 2, kDim = 16, kWidth = kHeads * kDim, kTokens = 9, kUnits = 12;

std::vector<float> numbers(std::int64_t count, unsigned seed) {
    std::vector<float> x(static_cast<std::size_t>(count));
    for (float& value : x) {
        seed = seed * 1664525u + 1013904223u;
        value = static_cast<float>(seed >> 8) / 8388608.0f - 1.0f;
    }
    return x;
}

// One layer of a model: queries, keys and values by a product each, the ring, attention, a product that is added.
class Stream {
  public:
    Stream(Isa isa, Precision precision, int threads)
        : kernels_(cfrt::kernels(isa)),
          threads_(threads),
          precision_(precision),
          ring_({{1, 4, 1}, kTokens, 1, kHeads, kDim, precision == Precision::int8 ? Precision::bf16 : precision}),
          stride_(row_stride(kernels_, precision, kWidth)),
          rows_(static_cast<std::size_t>(kTokens * stride_ * kernels_.product(precision).element)),
          scale_(kTokens * sizeof(float)) {
        for (unsigned seed = 1; seed <= 4; ++seed)
            weights_.emplace_back(kernels_, precision, numbers(kWidth * kWidth, seed).data(), kWidth, kWidth, threads_);
    }

    // The hidden rows after every unit, one behind the other.
    std::vector<float> run() {
        std::vector<float> x = numbers(kTokens * kWidth, 9), all;
        for (std::int64_t unit = 0; unit < kUnits; ++unit) {
            ring_.open(unit, pass_);
            layer(x.data());
            ring_.commit(unit);
            all.insert(all.end(), x.begin(), x.end());
        }
        return all;
    }

  private:
    void layer(float* x) {
        std::vector<float> q(kTokens * kWidth), k(q), v(q), seen(q);
        round(x);
        multiply(0, q.data(), Epilogue::none), multiply(1, k.data(), Epilogue::silu),
            multiply(2, v.data(), Epilogue::gelu);
        const Append append{
            {k.data(), kWidth, nullptr, 0.0f, nullptr}, v.data(), kWidth, &ring_.layer(0), pass_.place.data()};
        threads_.split(kTokens, [&](std::int64_t b, std::int64_t e) { kernels_.pointwise.append(append, b, e); });
        look(q.data(), seen.data());
        round(seen.data());
        multiply(3, x, Epilogue::add);
        for (std::int64_t i = 0; i < kTokens * kWidth; ++i) x[i] *= 0.5f;
    }

    void round(const float* x) {
        threads_.split(kTokens, [&](std::int64_t begin, std::int64_t end) {
            if (precision_ == Precision::bf16)
                kernels_.rows.to_bf16(rows_.as<std::uint16_t>(), stride_, x, kWidth, kWidth, kWidth, begin, end);
            else if (precision_ == Precision::int8)
                kernels_.rows.to_int8(rows_.data(), stride_, scale_.as<float>(), x, kWidth, kWidth, kWidth, begin, end);
            else
                for (std::int64_t row = begin; row < end; ++row)
                    std::copy_n(x + row * kWidth, kWidth, rows_.as<float>() + row * stride_);
        });
    }

    void multiply(int which, float* out, Epilogue epilogue) {
        Gemm g{};
        g.w = &weights_[static_cast<std::size_t>(which)].view();
        g.a = rows_.data(), g.m = kTokens, g.stride = stride_, g.a_scale = scale_.as<float>();
        g.epilogue = epilogue, g.out = out, g.out_stride = kWidth;
        check_gemm(kernels_, g);
        const GemmKernel& kernel = kernels_.product(precision_);
        threads_.split(kernel.tiles(g), [&](std::int64_t begin, std::int64_t end) { kernel.run(g, begin, end); });
    }

    void look(const float* q, float* out) {
        Attention call{};
        call.kv = &ring_.layer(0), call.ranges = pass_.ranges.data();
        call.range_count = static_cast<int>(pass_.ranges.size()), call.sink_rows = pass_.sink_rows;
        call.q = q, call.q_sink = q, call.m = kTokens, call.q_stride = kWidth, call.scale = 0.25f;
        call.out = out, call.out_stride = kWidth;
        check_attention(call);
        Buffer scratch(attention_scratch(kernels_, call, threads_.count()));
        attend(kernels_, threads_, call, scratch.data());
    }

    const Kernels& kernels_;
    Threads threads_;
    Precision precision_;
    Ring ring_;
    RingPass pass_;
    std::vector<Weights> weights_;
    std::int64_t stride_;
    Buffer rows_, scale_;
};

// Calls of a pool that write what the next call reads, shares without an item among them.
void pool(int count) {
    Threads threads(count);
    std::vector<std::int64_t> square(7), sum(7);
    for (std::int64_t round = 0; round < 300; ++round) {
        threads.split(7, [&](std::int64_t begin, std::int64_t end) {
            for (std::int64_t i = begin; i < end; ++i) square[static_cast<std::size_t>(i)] = i * round;
        });
        threads.split(7, [&](std::int64_t begin, std::int64_t end) {
            for (std::int64_t i = begin; i < end; ++i)
                sum[static_cast<std::size_t>(i)] = square[0] + square[static_cast<std::size_t>(6 - i)];
        });
        CFRT_REQUIRE(sum[0] == 6 * round && sum[6] == 0);
        if (round % 100 == 99)
            std::this_thread::sleep_for(std::chrono::milliseconds(2));  // let the workers fall asleep
    }
}

}  // namespace

void test_streams() {
    for (const int count : {1, 2, 3, 5}) pool(count);
    for (const Isa isa : supported_isas()) {
        for (const Precision precision : {Precision::fp32, Precision::bf16, Precision::int8}) {
            const std::vector<float> alone = Stream(isa, precision, 1).run();
            std::vector<float> results[2];
            std::thread other([&] { results[1] = Stream(isa, precision, 3).run(); });
            results[0] = Stream(isa, precision, 2).run();
            other.join();
            for (const auto& result : results)
                CFRT_REQUIRE(result.size() == alone.size() &&
                             std::memcmp(result.data(), alone.data(), alone.size() * sizeof(float)) == 0);
        }
    }
}

void mutant_race() {
    Threads threads(2);
    int count = 0;
    for (int round = 0; round < 100; ++round) threads.run([&](int) { ++count; });
    std::printf("%d\n", count);
}
