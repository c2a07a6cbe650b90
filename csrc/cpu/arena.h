// One block of memory cut into pieces, each on cache lines of its own. The same function lays it out twice: first to
// measure, when pieces are null, then to hand out.
#pragma once

#include <cstddef>
#include <cstdint>

#include "buffer.h"

namespace cfrt {

class Arena {
  public:
    // Calls lay_out(arena), which calls `take` for every piece.
    template <class LayOut>
    explicit Arena(const LayOut& lay_out) {
        lay_out(*this);
        memory_ = Buffer(used_);
        used_ = 0;
        lay_out(*this);
    }

    template <class T>
    void take(T*& piece, std::int64_t count) {
        piece = memory_.data() == nullptr ? nullptr : memory_.as<T>(used_);
        used_ += (static_cast<std::size_t>(count) * sizeof(T) + 63) / 64 * 64;
    }

    std::size_t bytes() const { return memory_.size(); }

  private:
    Buffer memory_;
    std::size_t used_ = 0;
};

}  // namespace cfrt
