// Streams as the engine drives them, on pools of several threads, two at once in one process: the DiT with its ring and
// fused passes, and the decoder behind it. The bytes must be those of one thread alone.
#include <atomic>
#include <map>
#include <string>
#include <thread>
#include <vector>

#include "cpu/autoencoder.h"
#include "cpu/dit.h"
#include "tests.h"

using namespace cfrt;

namespace {

constexpr std::int64_t kUnits = 8, kGrid = 4, kChannels = 2;

std::vector<float> numbers(std::int64_t count, unsigned seed) {
    std::vector<float> x(static_cast<std::size_t>(count));
    for (float& value : x) {
        seed = seed * 1664525u + 1013904223u;
        value = static_cast<float>(seed >> 8) / 8388608.0f - 1.0f;
    }
    return x;
}

// Small, but its products are worth sharing among threads.
DitConfig config() {
    DitConfig c{};
    c.width = 64, c.depth = 2, c.heads = 2, c.ffn = 128, c.time_width = 16, c.text_width = 8, c.text_rows = 3;
    c.patches = {kChannels, kGrid, kGrid, 1, 1}, c.geometry = {1, 4, 1};
    c.rope_pairs = {4, 6, 6}, c.rope_theta = 10000.0, c.relative_sinks = true, c.trained_frames = 6, c.eps = 1e-6f;
    return c;
}

// Weights that follow from a tensor's name alone.
class Tensors {
  public:
    std::vector<float> read(const std::string& name, std::int64_t size) const {
        unsigned seed = 1;
        for (const char letter : name) seed = seed * 31u + static_cast<unsigned char>(letter);
        std::vector<float> x = numbers(size, seed);
        for (float& value : x) value *= 0.2f;
        return x;
    }
    const float* find(const std::string& name, std::initializer_list<std::int64_t> shape) {
        std::int64_t size = 1;
        for (const std::int64_t side : shape) size *= side;
        return (kept_[name] = read(name, size)).data();
    }

  private:
    std::map<std::string, std::vector<float>> kept_;
};

// The pixels of a stream of kUnits units, two passes each, the commit fused with the next unit's first pass.
std::vector<std::uint8_t> stream(Isa isa, Precision precision, int count) {
    const Kernels& level = kernels(isa);
    Threads threads(count);
    Tensors tensors;
    const auto read = [&](const std::string& name, std::int64_t size) { return tensors.read(name, size); };
    const auto find = [&](const std::string& name, std::initializer_list<std::int64_t> shape) {
        return tensors.find(name, shape);
    };
    Dit dit(config(), level, precision, threads, read);
    const AutoencoderShape shape{kChannels, kGrid, kGrid, {4, 8, 8, 8, 8, 4}};
    Autoencoder codec(level, precision, shape, find, 1, threads);
    dit.set_text(numbers(config().text_rows * config().text_width, 5).data());
    const std::int64_t frame = shape.latents();
    std::vector<float> x(static_cast<std::size_t>(frame)), clean(x), before(x);
    std::vector<std::uint8_t> pixels(static_cast<std::size_t>(kUnits * 4 * shape.bytes()));
    for (std::int64_t unit = 0; unit < kUnits; ++unit) {
        dit.denoise(x.data(), numbers(frame, 100 + static_cast<unsigned>(unit)).data(), 900.0, unit,
                    unit > 0 ? clean.data() : nullptr);
        dit.denoise(clean.data(), x.data(), 400.0, unit, nullptr);
        codec.decode(pixels.data() + unit * 4 * shape.bytes(), clean.data(), 1, unit > 0 ? before.data() : nullptr);
        before = clean;
    }
    dit.commit(clean.data(), kUnits - 1);
    return pixels;
}

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
            const std::vector<std::uint8_t> alone = stream(isa, precision, 1);
            std::vector<std::uint8_t> results[2];
            std::thread other([&] { results[1] = stream(isa, precision, 3); });
            results[0] = stream(isa, precision, 2);
            other.join();
            CFRT_REQUIRE(results[0] == alone && results[1] == alone);
        }
    }
}

// The two shares wait for each other, or the caller may take both of every round and nothing races. Relaxed, so that
// meeting orders nothing.
void mutant_race() {
    Threads threads(2);
    std::atomic<int> begun = 0;
    int count = 0;
    threads.run([&](int) {
        begun.fetch_add(1, std::memory_order_relaxed);
        while (begun.load(std::memory_order_relaxed) < 2) std::this_thread::yield();
        ++count;
    });
    std::printf("%d\n", count);
}
