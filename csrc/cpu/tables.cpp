#include "tables.h"

#include <algorithm>
#include <cmath>

namespace cfrt {
namespace {

// Pairs of one axis at `position`, into pairs first.. of a token.
void fill_axis(float* token, std::int64_t dim, std::int64_t first, std::int64_t pairs, double theta, double position) {
    for (std::int64_t i = 0; i < pairs; ++i) {
        const double angle = position * std::pow(theta, -static_cast<double>(i) / static_cast<double>(pairs));
        const float cosine = static_cast<float>(std::cos(angle)), sine = static_cast<float>(std::sin(angle));
        float* pair = token + 2 * (first + i);
        pair[0] = pair[1] = cosine;
        pair[dim] = -sine;
        pair[dim + 1] = sine;
    }
}

void copy_axis(float* token, const float* from, std::int64_t dim, std::int64_t first, std::int64_t pairs) {
    std::copy_n(from + 2 * first, 2 * pairs, token + 2 * first);
    std::copy_n(from + dim + 2 * first, 2 * pairs, token + dim + 2 * first);
}

}  // namespace

// Each angle is computed once and copied to the other tokens of its row, column or frame.
void fill_turns(float* out, const Rotary& rotary, const std::int64_t* positions, std::int64_t frames) {
    const std::int64_t dim = rotary.dim(), time = rotary.pairs[0], height = rotary.pairs[1], width = rotary.pairs[2];
    const auto token = [&](std::int64_t frame, std::int64_t row, std::int64_t column) {
        return out + ((frame * rotary.rows + row) * rotary.columns + column) * 2 * dim;
    };
    for (std::int64_t frame = 0; frame < frames; ++frame) {
        for (std::int64_t row = 0; row < rotary.rows; ++row) {
            for (std::int64_t column = 0; column < rotary.columns; ++column) {
                float* to = token(frame, row, column);
                if (row == 0 && column == 0)
                    fill_axis(to, dim, 0, time, rotary.theta, static_cast<double>(positions[frame]));
                else
                    copy_axis(to, token(frame, 0, 0), dim, 0, time);
                if (frame == 0 && column == 0)
                    fill_axis(to, dim, time, height, rotary.theta, static_cast<double>(row));
                else
                    copy_axis(to, token(0, row, 0), dim, time, height);
                if (frame == 0 && row == 0)
                    fill_axis(to, dim, time + height, width, rotary.theta, static_cast<double>(column));
                else
                    copy_axis(to, token(0, 0, column), dim, time + height, width);
                fill_axis(to, dim, time + height + width, rotary.still, 1.0, 0.0);
            }
        }
    }
}

void fill_time_features(float* out, double t, std::int64_t width) {
    const std::int64_t half = width / 2;
    for (std::int64_t i = 0; i < half; ++i) {
        const double angle = t * std::pow(10000.0, -static_cast<double>(i) / static_cast<double>(half));
        out[i] = static_cast<float>(std::cos(angle));
        out[half + i] = static_cast<float>(std::sin(angle));
    }
}

}  // namespace cfrt
