// What a pass computes once, in fp64, before any layer: rotary turns and the features of time. cfrt/nn/rope.py and
// cfrt/flow.py define them.
#pragma once

#include <cstdint>

namespace cfrt {

// Tokens of a frame lie in a grid, row by row; a head's first pairs turn with time, then with height, then with width.
struct Rotary {
    std::int64_t rows, columns;
    std::int64_t pairs[3];  // time, height, width
    double theta;
    std::int64_t still = 0;  // pairs behind them that do not turn

    std::int64_t tokens() const { return rows * columns; }
    std::int64_t dim() const { return 2 * (pairs[0] + pairs[1] + pairs[2] + still); }
};

// out [frames][tokens][2][dim] for the latent frames at `positions`: the cosine of each pair's angle twice, then its
// sine, first negated, so that turned = x * out[0] + swapped pairs of x * out[1]. Angles are fp64, reduced before they
// are rounded: a stream has no last frame.
void fill_turns(float* out, const Rotary& rotary, const std::int64_t* positions, std::int64_t frames);

// out [width] = [cos(t w) | sin(t w)], w_i = 10000^(-2i / width), t = 1000 s; width is even.
void fill_time_features(float* out, double t, std::int64_t width);

}  // namespace cfrt
