#include "kernels.h"

#include "../check.h"

// What each level's kernels export, in a namespace of the level's name.
#define CFRT_DECLARE(level)                                              \
    namespace cfrt::level {                                              \
    extern const GemmKernel gemm_fp32, gemm_bf16, gemm_int8;             \
    extern const RowKernels rows;                                        \
    extern const AttentionKernel attention_fp32, attention_bf16;         \
    extern const PointwiseKernels pointwise;                             \
    extern const ConvKernels conv;                                       \
    extern const CeilingKernel ceiling_fp32, ceiling_bf16, ceiling_int8; \
    }
#define CFRT_TABLE(level)                                                                    \
    Kernels {                                                                                \
        Isa::level, {level::gemm_fp32, level::gemm_bf16, level::gemm_int8}, level::rows,     \
            {level::attention_fp32, level::attention_bf16}, level::pointwise, level::conv, { \
            level::ceiling_fp32, level::ceiling_bf16, level::ceiling_int8                    \
        }                                                                                    \
    }

CFRT_DECLARE(plain)
#ifdef CFRT_X86_LEVELS
CFRT_DECLARE(avx2)
CFRT_DECLARE(avx512)
CFRT_DECLARE(avx512bf16)
#endif

namespace cfrt {

const Kernels& kernels(Isa isa) {
    static const Kernels tables[] = {
        CFRT_TABLE(plain),
#ifdef CFRT_X86_LEVELS
        CFRT_TABLE(avx2),
        CFRT_TABLE(avx512),
        CFRT_TABLE(avx512bf16),
#endif
    };
    for (const Kernels& table : tables)
        if (table.isa == isa) return table;
    throw Error(std::string("this build has no kernels for ") + isa_name(isa));
}

}  // namespace cfrt
