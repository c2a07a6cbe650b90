// C = A W^T in fp32.

#include "dots.h"
#include "gemm_block.h"

namespace cfrt::CFRT_LEVEL {

extern const GemmKernel gemm_fp32;
constinit const GemmKernel gemm_fp32{kPanel, Fp32::kGroup,          sizeof(Fp32::A),
                                     0,      tiles<Floating<Fp32>>, run<Floating<Fp32>>};

}  // namespace cfrt::CFRT_LEVEL
