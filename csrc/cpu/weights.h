// Weights packed for a level's product, once at load time, and the sizes of the rows that go with them.
#pragma once

#include <cstdint>

#include "buffer.h"
#include "kernels.h"
#include "shelf.h"
#include "threads.h"

namespace cfrt {

// W [n, k] in the layout that gemm.h describes. Owns its memory; `view` is what a product takes.
class Weights {
  public:
    // From fp32, row-major and contiguous. int8 is symmetric, one scale per row of W (per column of C). Panels lie on
    // the shelf, which must live as long, or in memory of their own.
    Weights(const Kernels& kernels, Precision precision, const float* w, std::int64_t n, std::int64_t k,
            Threads& threads, Shelf* shelf = nullptr);

    const PackedWeights& view() const { return view_; }
    std::size_t bytes() const { return panel_bytes_ + scale_.size() + offset_.size(); }

    // Products with these weights bring the first of `next` into the cache, which must live as long.
    void precede(const Weights& next) {
        view_.next = next.view_.panels, view_.next_bytes = static_cast<std::int64_t>(next.panel_bytes_);
    }

  private:
    PackedWeights view_;
    std::size_t panel_bytes_;
    Buffer panels_, scale_, offset_;
};

// Elements that a row of k takes, zeros behind it included.
std::int64_t row_depth(const Kernels& kernels, Precision precision, std::int64_t k);

// A stride, in elements, for rows of k: at least row_depth, whole cache lines, and an odd number of them, so that the
// rows of a tile do not fall into the same few sets of the cache.
std::int64_t row_stride(const Kernels& kernels, Precision precision, std::int64_t k);

// Refuses a product that does not fit together; the kernels do not look.
void check_gemm(const Kernels& kernels, const Gemm& gemm);

}  // namespace cfrt
