// The ring of the CUDA kernels: granules of attention.h in one allocation on the device, which is the caller's, zeroed
// once. This class says where each layer's keys and values lie in it, and what a pass reads and writes; it touches no
// memory, so that it needs no CUDA. Which frame each slot holds is csrc/frames.h.
//
// An exact snapshot is the allocation's bytes and `state`; taking and restoring one is the caller's copy. What a pass
// reads and writes is a cfrt_pass (pass.h): to be copied to the device, or into the fields of a call.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "../frames.h"
#include "attention.h"

namespace cfrt {

struct CudaRingShape {
    Geometry geometry;
    std::int64_t frame_tokens, layers, heads, dim;
    bool int8;  // keys in int8 with scales, values in e4m3; else both in bf16
};

class CudaRing {
  public:
    explicit CudaRing(const CudaRingShape& shape);

    // Bytes from the start of the allocation.
    struct Layer {
        std::int64_t k, v, k_scale;  // k_scale only in 8 bits
    };
    Layer layer(std::int64_t i) const;
    std::int64_t bytes() const { return shape_.layers * layer_bytes_; }

    // What a pass over `unit` reads and writes: a piece for each frame that it sees. Frames::open says what is an
    // Error.
    cfrt_pass open(std::int64_t unit, std::uint64_t seed);
    Frames& frames() { return frames_; }
    const Frames& frames() const { return frames_; }

    // The shape and the frames, to go with the bytes; `load` refuses another shape's.
    std::vector<std::int64_t> state() const;
    void load(const std::vector<std::int64_t>& state);

  private:
    std::int32_t granule_of(std::int64_t frame) const;

    CudaRingShape shape_;
    Frames frames_;
    std::vector<std::int64_t> seen_;
    std::int64_t frame_granules_, side_bytes_, layer_bytes_;
};

}  // namespace cfrt
