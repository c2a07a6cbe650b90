// Linear layers on a pool of threads: packed weights with their bias, the rows that they read, where results go.
#pragma once

#include <cstdint>
#include <vector>

#include "arena.h"
#include "threads.h"
#include "weights.h"

namespace cfrt {

// What computes: the kernels of a level, and the threads that share the work.
struct Machine {
    const Kernels& kernels;
    Threads& threads;

    // work(begin, end) over [0, items) of about `cost` vector operations each: on all threads, or on this one alone
    // where that takes about a microsecond, so that a small model does not wait at every step for a thread that the
    // system has given to somebody else. Bytes do not depend on which.
    template <class Work>
    void share(std::int64_t items, std::int64_t cost, const Work& work) const {
        if (items * cost < kWorthSharing)
            work(std::int64_t{0}, items);
        else
            threads.split(items, work);
    }

  private:
    static constexpr std::int64_t kWorthSharing = 1 << 14;
};

// Rows of activations in the format of a product (kernels/gemm.h), k numbers each. A view of an arena.
struct Rows {
    Precision precision;
    std::int64_t k, depth, stride, element;  // element in bytes, the others in elements
    std::byte* data;
    float* scale;  // of each row, int8 only

    static Rows take(Arena& arena, const Kernels& kernels, Precision precision, std::int64_t m, std::int64_t k);
    Rows from(std::int64_t row) const;
};

// Results of one step that the next product reads. They go straight into its rows, except to int8, whose scales need
// whole rows: then they wait in fp32 for `settle`.
struct Handover {
    Rows rows;
    float* wide;

    static Handover take(Arena& arena, const Kernels& kernels, Precision precision, std::int64_t m, std::int64_t k);
    void* out() const { return rows.precision == Precision::int8 ? static_cast<void*>(wide) : rows.data; }
    std::int64_t stride() const { return rows.precision == Precision::int8 ? rows.k : rows.stride; }
    bool bf16() const { return rows.precision == Precision::bf16; }
    Handover from(std::int64_t row) const;
    void settle(const Machine& machine, std::int64_t m) const;
};

// rows = x [m][k], rows of x `stride` elements apart.
void convert(const Machine& machine, const Rows& rows, const float* x, std::int64_t stride, std::int64_t m);

// W [n, k] packed, and its bias.
class Linear {
  public:
    Linear(const Machine& machine, Shelf& shelf, Precision precision, const std::vector<float>& w,
           std::vector<float> bias);

    const PackedWeights& w() const { return weights_.view(); }
    const float* bias() const { return bias_.data(); }
    std::size_t bytes() const { return weights_.bytes() + bias_.size() * sizeof(float); }
    void precede(const Linear& next) { weights_.precede(next.weights_); }

  private:
    std::vector<float> bias_;
    Weights weights_;
};

// What happens to the result of a product; see Gemm.
struct Result {
    void* out;
    std::int64_t stride;
    Epilogue epilogue = Epilogue::none;
    bool bf16 = false;
    const float* gate = nullptr;
    std::int64_t gate_rows = 1, gate_stride = 0;

    static Result to(const Handover& next, Epilogue epilogue = Epilogue::none) {
        return {next.out(), next.stride(), epilogue, next.bf16()};
    }
};

void multiply(const Machine& machine, const Linear& linear, const Rows& rows, std::int64_t m, const Result& result);

}  // namespace cfrt
