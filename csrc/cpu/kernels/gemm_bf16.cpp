// C = A W^T, both bf16, summed in fp32.

#include "dots.h"
#include "gemm_block.h"

namespace cfrt::CFRT_LEVEL {

extern const GemmKernel gemm_bf16;
constinit const GemmKernel gemm_bf16{kPanel, Bf16::kGroup,          sizeof(Bf16::A),
                                     0,      tiles<Floating<Bf16>>, run<Floating<Bf16>>};

}  // namespace cfrt::CFRT_LEVEL
