// Latents [frames][channels][height][width] to the rows that the network reads and back. A patch is `ph` by `pw`.
#pragma once

#include <cstdint>

namespace cfrt {

struct Patches {
    std::int64_t channels, height, width, ph, pw;

    std::int64_t tokens() const { return height / ph * (width / pw); }
    std::int64_t size() const { return channels * ph * pw; }  // numbers of a patch
};

// rows [frames * tokens], `stride` elements apart: a patch with its channels slowest, as a convolution's weights have
// it.
void patchify(float* rows, std::int64_t stride, const float* latents, const Patches& patches, std::int64_t frames);

// latents of rows of patches with their channels fastest, as Wan's head has it.
void unpatchify(float* latents, const float* rows, std::int64_t stride, const Patches& patches, std::int64_t frames);

// out = x - s v, v in rows as for unpatchify: the estimate of x0. out may be x.
void estimate_x0(float* out, const float* x, const float* rows, std::int64_t stride, float s, const Patches& patches,
                 std::int64_t frames);

}  // namespace cfrt
