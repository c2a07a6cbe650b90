#include "noise.h"

#include <algorithm>

#include "../check.h"

namespace cfrt {
namespace {

// Calls work(first element, how many of four, quad) over an array.
template <class Work>
void for_each_quad(std::int64_t count, Work work) {
    check(count <= kMaxElements, "expected at most ", kMaxElements, " elements of noise, got ", count);
    for (std::int64_t first = 0; first < count; first += 4)
        work(first, std::min<std::int64_t>(4, count - first), static_cast<std::uint32_t>(first / 4));
}

}  // namespace

void fill_bits(std::uint32_t* out, std::int64_t count, const NoiseKey& noise) {
    for_each_quad(count, [&](std::int64_t first, std::int64_t size, std::uint32_t quad) {
        std::copy_n(noise_bits(noise, quad).word, size, out + first);
    });
}

void fill_normal(float* out, std::int64_t count, const NoiseKey& noise) {
    for_each_quad(count, [&](std::int64_t first, std::int64_t size, std::uint32_t quad) {
        std::copy_n(noise_normals(noise, quad).value, size, out + first);
    });
}

void renoise(float* out, const float* x0, std::int64_t count, const Renoise& how) {
    for_each_quad(count, [&](std::int64_t first, std::int64_t size, std::uint32_t quad) {
        float x[4] = {};
        std::copy_n(x0 + first, size, x);
        renoise_quad(how, quad, x);
        std::copy_n(x, size, out + first);
    });
}

}  // namespace cfrt
