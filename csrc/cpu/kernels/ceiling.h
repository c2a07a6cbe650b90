// Ceilings: what a core can do at a level when its operands never leave the registers. Benchmarks hold the products
// against them; nothing else uses them.
#pragma once

#include <cstdint>

namespace cfrt {

struct CeilingKernel {
    std::int64_t operations;  // of one round, two for a multiply-add
    void (*run)(std::int64_t rounds);
};

}  // namespace cfrt
