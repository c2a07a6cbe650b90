// All kernels of one level, as function pointers. Compiled once per level from csrc/cpu/kernels/*.cpp (CMakeLists.txt).
#pragma once

#include "isa.h"
#include "kernels/attention.h"
#include "kernels/ceiling.h"
#include "kernels/conv.h"
#include "kernels/gemm.h"
#include "kernels/pointwise.h"

namespace cfrt {

struct Kernels {
    Isa isa;
    GemmKernel gemm[3];  // by Precision
    RowKernels rows;
    AttentionKernel attentions[2];  // by Precision of the keys and values: fp32, bf16
    PointwiseKernels pointwise;
    ConvKernels conv;
    CeilingKernel ceilings[3];  // by Precision

    const GemmKernel& product(Precision precision) const { return gemm[static_cast<int>(precision)]; }
    const AttentionKernel& attention(Precision precision) const { return attentions[static_cast<int>(precision)]; }
};

// The kernels of a level that the CPU has: ask find_isa first.
const Kernels& kernels(Isa isa);

}  // namespace cfrt
