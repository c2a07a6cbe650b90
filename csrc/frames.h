// Which frames a ring holds, and in what order units may be read and written. Bookkeeping alone: where a frame lives is
// csrc/plan.h, and the memory is csrc/cpu/ring.h's or csrc/cuda/ring.h's. It behaves as RingCache of cfrt/nn/ring.py
// does without gradients, which is its definition.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "plan.h"

namespace cfrt {

class Frames {
  public:
    explicit Frames(const Geometry& geometry);

    // The frames that a pass over `unit` reads, sinks first, itself last. Its slots no longer count as held. A unit
    // that is opened again sees the part of its frames that is still held. An Error when earlier units have not been
    // committed, or its slots belong to later ones. `seen`, used again, allocates nothing.
    void open(std::int64_t unit, std::vector<std::int64_t>& seen);
    // What lies in the unit's slots is its clean past from now on.
    void commit(std::int64_t unit);
    // Makes `unit` the next one. An Error when a frame that it sees has been overwritten.
    void rewind(std::int64_t unit);
    // Declares that the slot of `frame` has been written with its clean keys and values, as a commit does.
    void hold(std::int64_t frame);
    // Forgets everything.
    void clear();

    bool holds(std::int64_t frame) const { return held_[slot(frame)] == frame; }
    std::vector<std::int64_t> held() const;
    std::int64_t next_frame() const { return next_frame_; }
    const Geometry& geometry() const { return geometry_; }

    // The next frame, then what each slot holds: `state_size` numbers.
    std::size_t state_size() const { return 1 + held_.size(); }
    void save(std::int64_t* state) const;
    void load(const std::int64_t* state);

  private:
    std::size_t slot(std::int64_t frame) const { return static_cast<std::size_t>(geometry_.slot(frame)); }

    Geometry geometry_;
    std::vector<std::int64_t> held_;  // the clean frame that each slot holds, or kEmpty
    std::int64_t next_frame_ = 0;     // the first one that is not committed yet
};

// "[1, 2, 3]", for messages.
std::string listed(const std::vector<std::int64_t>& frames);

}  // namespace cfrt
