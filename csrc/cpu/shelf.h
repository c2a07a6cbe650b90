// Memory for many packed weights side by side: a matrix of a small model is too small for a huge page of its own, and a
// product that streams its weights through small pages waits for their addresses (fp32, size S: 5 % of a pass).
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

#include "buffer.h"

namespace cfrt {

class Shelf {
  public:
    // Zeroed, aligned to cache lines, there as long as the shelf is.
    std::byte* take(std::size_t bytes) {
        const std::size_t whole = (bytes + 63) / 64 * 64;
        if (boards_.empty() || used_ + whole > boards_.back().size()) {
            boards_.emplace_back(std::max(whole, kBoard));
            used_ = 0;
        }
        used_ += whole;
        return boards_.back().data() + used_ - whole;
    }

  private:
    static constexpr std::size_t kBoard = std::size_t{4} << 20;

    std::vector<Buffer> boards_;
    std::size_t used_ = 0;  // of the last board
};

}  // namespace cfrt
