#include "ring.h"

#include <cstring>

#include "../check.h"

namespace cfrt {
namespace {

std::int64_t even(std::int64_t rows) {
    return rows + rows % 2;
}

// Bytes of K, and of V, rounded up to cache lines.
std::size_t side_bytes(Precision precision, std::int64_t heads, std::int64_t dim, std::int64_t rows) {
    check(precision != Precision::int8, "expected keys and values in fp32 or bf16, got int8");
    check(heads >= 1 && rows >= 1, "expected at least one head and one key, got ", heads, " and ", rows);
    check(dim >= 16 && dim % 16 == 0, "expected a head of a multiple of 16 numbers, got ", dim);
    const std::int64_t bytes = heads * even(rows) * dim * (precision == Precision::fp32 ? 4 : 2);
    return static_cast<std::size_t>((bytes + 63) / 64 * 64);
}

constexpr std::size_t kShape = 8;

float widen(std::uint16_t half) {
    const std::uint32_t bits = std::uint32_t{half} << 16;
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

}  // namespace

// ----------------------------------------------------------------------------------------------------------------
// memory

KeyValueStore::KeyValueStore(Precision precision, std::int64_t heads, std::int64_t dim, std::int64_t rows)
    : data_(2 * side_bytes(precision, heads, dim, rows)),
      view_{precision, heads, dim, even(rows), data_.data(), data_.data() + data_.size() / 2} {}

Ring::Ring(const RingShape& shape) : shape_(shape), frames_(shape.geometry) {
    check(shape.layers >= 1 && shape.frame_tokens >= 1, "expected at least one layer and one token a frame, got ",
          shape.layers, " and ", shape.frame_tokens);
    const std::int64_t capacity = shape.geometry.capacity(), rows = capacity * shape.frame_tokens;
    const std::size_t side = side_bytes(shape.precision, shape.heads, shape.dim, rows);
    data_ = Buffer(2 * side * static_cast<std::size_t>(shape.layers));
    for (std::int64_t i = 0; i < shape.layers; ++i) {
        std::byte* k = data_.data() + 2 * side * static_cast<std::size_t>(i);
        layers_.push_back({shape.precision, shape.heads, shape.dim, even(rows), k, k + side});
    }
}

// ----------------------------------------------------------------------------------------------------------------
// passes

void Ring::open(std::int64_t unit, RingPass& pass) {
    const Geometry& g = shape_.geometry;
    const std::int64_t tokens = shape_.frame_tokens;
    frames_.open(unit, pass.frames);
    pass.ranges.clear(), pass.place.clear(), pass.sink_rows = 0;
    for (const std::int64_t frame : pass.frames) {
        const std::int64_t row = first_row(frame);
        if (!pass.ranges.empty() && pass.ranges.back().stop == row && row != g.sinks * tokens)
            pass.ranges.back().stop = row + tokens;
        else
            pass.ranges.push_back({row, row + tokens});
        if (frame < g.sinks) pass.sink_rows += tokens;
    }
    for (std::int64_t frame = unit * g.unit; frame < g.unit_end(unit); ++frame)
        for (std::int64_t token = 0; token < tokens; ++token) pass.place.push_back(first_row(frame) + token);
}

// ----------------------------------------------------------------------------------------------------------------
// frames

void Ring::write(const Kernels& kernels, std::int64_t layer, std::int64_t frame, const float* k, const float* v) {
    const std::int64_t width = shape_.heads * shape_.dim, row = first_row(frame);
    std::vector<std::int64_t> place(static_cast<std::size_t>(shape_.frame_tokens));
    for (std::size_t i = 0; i < place.size(); ++i) place[i] = row + static_cast<std::int64_t>(i);
    Append a{};
    a.k.x = k, a.k.x_stride = width;
    a.v = v, a.v_stride = width;
    a.to = &this->layer(layer), a.place = place.data();
    kernels.pointwise.append(a, 0, shape_.frame_tokens);
}

void Ring::read(std::int64_t layer, std::int64_t frame, float* k, float* v) const {
    check(holds(frame), "frame ", frame, " is not in the ring any more; it holds ", listed(held()));
    const KeyValues& from = this->layer(layer);
    for (std::int64_t token = 0; token < shape_.frame_tokens; ++token) {
        const std::int64_t row = first_row(frame) + token;
        for (std::int64_t head = 0; head < from.heads; ++head) {
            const std::int64_t base = head * from.rows * from.dim, at = base + row * from.dim;
            const std::int64_t pair = base + row / 2 * 2 * from.dim + row % 2;
            for (std::int64_t i = 0; i < from.dim; ++i, ++k, ++v) {
                if (from.precision == Precision::fp32) {
                    *k = static_cast<const float*>(from.k)[at + i];
                    *v = static_cast<const float*>(from.v)[at + i];
                } else {
                    *k = widen(static_cast<const std::uint16_t*>(from.k)[at + i]);
                    *v = widen(static_cast<const std::uint16_t*>(from.v)[pair + 2 * i]);
                }
            }
        }
    }
}

// -------------------------------------------------------------------------------------------------------------
// snapshots

// What a state begins with: the shape in kShape numbers, then the frames.
std::vector<std::int64_t> Ring::header() const {
    const Geometry& g = shape_.geometry;
    std::vector<std::int64_t> header{
        g.unit,        g.window,     g.sinks,    shape_.frame_tokens,
        shape_.layers, shape_.heads, shape_.dim, static_cast<std::int64_t>(shape_.precision)};
    header.resize(header.size() + frames_.state_size());
    frames_.save(header.data() + kShape);
    return header;
}

std::size_t Ring::state_bytes() const {
    return header().size() * sizeof(std::int64_t) + data_.size();
}

void Ring::save(std::byte* state) const {
    const std::vector<std::int64_t> head = header();
    const std::size_t bytes = head.size() * sizeof(std::int64_t);
    std::memcpy(state, head.data(), bytes);
    std::memcpy(state + bytes, data_.data(), data_.size());
}

void Ring::load(const std::byte* state, std::size_t size) {
    std::vector<std::int64_t> head = header();
    const std::size_t bytes = head.size() * sizeof(std::int64_t);
    check(size == state_bytes() && std::memcmp(state, head.data(), kShape * sizeof(std::int64_t)) == 0,
          "expected the state of a ring of this shape, ", state_bytes(), " bytes; got ", size,
          " bytes: the state is another model's");
    std::memcpy(head.data(), state, bytes);
    frames_.load(head.data() + kShape);
    std::memcpy(data_.data(), state + bytes, data_.size());
}

}  // namespace cfrt
