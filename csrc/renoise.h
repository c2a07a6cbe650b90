// Few-step sampling puts new noise on its x0 estimate: x_s = (1 - s) x0 + s e (cfrt/flow.py, add_noise), with e made
// in place from its counter. One quad of elements, for both compilers; the loops are in cpu/noise.cpp and
// cuda/renoise.cu.
#pragma once

#include "philox.h"

namespace cfrt {

struct Renoise {
    float signal, sigma;  // 1 - s and s, each rounded once
    NoiseKey noise;
};

inline Renoise make_renoise(double s, const NoiseKey& noise) {
    return {static_cast<float>(1.0 - s), static_cast<float>(s), noise};
}

// x[0 .. 3] are elements 4 * quad .. 4 * quad + 3 of the latents, replaced in place.
CFRT_HD void renoise_quad(const Renoise& how, std::uint32_t quad, float* x) {
    const Normal4 e = noise_normals(how.noise, quad);
    for (int i = 0; i < 4; ++i) x[i] = how.signal * x[i] + how.sigma * e.value[i];
}

}  // namespace cfrt
