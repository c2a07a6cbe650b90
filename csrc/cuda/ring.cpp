#include "ring.h"

#include <algorithm>

#include "../check.h"

namespace cfrt {
namespace {

constexpr std::int64_t kAlignment = 256;  // of what cudaMalloc gives
constexpr std::size_t kShape = 8;         // numbers of the shape in a state

std::int64_t up(std::int64_t x, std::int64_t unit) {
    return (x + unit - 1) / unit * unit;
}

}  // namespace

CudaRing::CudaRing(const CudaRingShape& shape) : shape_(shape), frames_(shape.geometry) {
    check(shape.layers >= 1 && shape.frame_tokens >= 1 && shape.heads >= 1,
          "expected at least one layer, head and token a frame, got ", shape.layers, ", ", shape.heads, " and ",
          shape.frame_tokens);
    check(shape.dim == 64 || shape.dim == 128, "expected heads of 64 or 128 numbers, got ", shape.dim);
    const Geometry& g = shape.geometry;
    check(g.window + g.sinks <= CFRT_MOST_PIECES, "expected a window and sinks of at most ", int{CFRT_MOST_PIECES},
          " frames together, got ", g.window, " and ", g.sinks);
    check(g.unit <= CFRT_MOST_FRAMES, "expected units of at most ", int{CFRT_MOST_FRAMES}, " frames, got ", g.unit);
    const std::int64_t rows = shape.int8 ? CFRT_GRANULE_INT8 : CFRT_GRANULE_BF16;
    frame_granules_ = (shape.frame_tokens + rows - 1) / rows;
    const std::int64_t granules = g.capacity() * frame_granules_ * shape.heads;
    check(granules < (std::int64_t{1} << 31), "expected fewer than 2^31 granules of all heads, got ", granules);
    side_bytes_ = up(granules * rows * shape.dim * (shape.int8 ? 1 : 2), kAlignment);
    layer_bytes_ = 2 * side_bytes_ + (shape.int8 ? up(granules * 4, kAlignment) : 0);
}

CudaRing::Layer CudaRing::layer(std::int64_t i) const {
    check(0 <= i && i < shape_.layers, "expected a layer of 0 to ", shape_.layers - 1, ", got ", i);
    const std::int64_t start = i * layer_bytes_;
    return {start, start + side_bytes_, start + 2 * side_bytes_};
}

std::int32_t CudaRing::granule_of(std::int64_t frame) const {
    return static_cast<std::int32_t>(shape_.geometry.slot(frame) * frame_granules_);
}

cfrt_pass CudaRing::open(std::int64_t unit, std::uint64_t seed) {
    const Geometry& g = shape_.geometry;
    frames_.open(unit, seen_);
    cfrt_pass pass{};
    pass.seed = seed, pass.unit = static_cast<std::uint32_t>(unit), pass.first_frame = unit * g.unit;
    for (const std::int64_t frame : seen_) {
        pass.pieces[pass.piece_count++] = {granule_of(frame), static_cast<std::int32_t>(shape_.frame_tokens)};
        pass.sink_pieces += frame < g.sinks;
    }
    const auto granules = static_cast<std::int32_t>(frame_granules_);
    pass.granules = pass.piece_count * granules, pass.sink_granules = pass.sink_pieces * granules;
    for (std::int64_t frame = pass.first_frame; frame < g.unit_end(unit); ++frame)
        pass.place[pass.frames++] = granule_of(frame);
    return pass;
}

std::vector<std::int64_t> CudaRing::state() const {
    const Geometry& g = shape_.geometry;
    std::vector<std::int64_t> state{g.unit,        g.window,     g.sinks,    shape_.frame_tokens,
                                    shape_.layers, shape_.heads, shape_.dim, shape_.int8};
    state.resize(kShape + frames_.state_size());
    frames_.save(state.data() + kShape);
    return state;
}

void CudaRing::load(const std::vector<std::int64_t>& state) {
    const std::vector<std::int64_t> mine = this->state();
    check(state.size() == mine.size() && std::equal(mine.begin(), mine.begin() + kShape, state.begin()),
          "expected the state of a ring of this shape: the state is another model's");
    frames_.load(state.data() + kShape);
}

}  // namespace cfrt
