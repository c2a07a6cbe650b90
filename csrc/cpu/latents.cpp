#include "latents.h"

namespace cfrt {
namespace {

// visit(element of the latents, token, number within a patch: channel, row, column)
template <class Visit>
void for_each_element(const Patches& p, std::int64_t frames, Visit visit) {
    const std::int64_t across = p.width / p.pw;
    std::int64_t at = 0;
    for (std::int64_t frame = 0; frame < frames; ++frame)
        for (std::int64_t c = 0; c < p.channels; ++c)
            for (std::int64_t y = 0; y < p.height; ++y) {
                const std::int64_t token = frame * p.tokens() + y / p.ph * across, a = y % p.ph;
                for (std::int64_t x = 0; x < across; ++x)
                    for (std::int64_t b = 0; b < p.pw; ++b) visit(at++, token + x, c, a, b);
            }
}

}  // namespace

void patchify(float* rows, std::int64_t stride, const float* latents, const Patches& p, std::int64_t frames) {
    for_each_element(p, frames, [&](auto at, auto token, auto c, auto a, auto b) {
        rows[token * stride + (c * p.ph + a) * p.pw + b] = latents[at];
    });
}

void unpatchify(float* latents, const float* rows, std::int64_t stride, const Patches& p, std::int64_t frames) {
    for_each_element(p, frames, [&](auto at, auto token, auto c, auto a, auto b) {
        latents[at] = rows[token * stride + (a * p.pw + b) * p.channels + c];
    });
}

void estimate_x0(float* out, const float* x, const float* rows, std::int64_t stride, float s, const Patches& p,
                 std::int64_t frames) {
    for_each_element(p, frames, [&](auto at, auto token, auto c, auto a, auto b) {
        out[at] = x[at] - s * rows[token * stride + (a * p.pw + b) * p.channels + c];
    });
}

}  // namespace cfrt
