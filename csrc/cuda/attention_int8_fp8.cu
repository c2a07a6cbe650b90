// attention.h in 8 bits. Compiled by ptxas at -O1 (CMakeLists.txt): at -O3 its scheduler keeps so many fragments on
// their way that it runs out of registers and spills; at -O1 it does not, and the loop is shorter.

#include "attention_int8_fp8.cuh"

#include "launch.cuh"

namespace cfrt {
namespace {

template <int kDim>
cudaError_t launch_int8(const Call& call, bool half_sums, cudaStream_t stream) {
    return launch<kDim>(call, half_sums ? attention_int8_fp8<kDim, true> : attention_int8_fp8<kDim, false>,
                        2 * kBlockRows * kDim, stream);
}

}  // namespace
}  // namespace cfrt

extern "C" int cfrt_attention_int8_fp8(const cfrt_attention* a, cfrt_accumulate accumulate, void* stream) {
    if (const cudaError_t wrong = cfrt::check(*a, 1)) return wrong;
    if (a->row_stride || !a->q_scale || !a->k_scale || !a->v_scale || (a->q_sink && !a->q_sink_scale))
        return cudaErrorInvalidValue;
    if (const cudaError_t wrong = cfrt::check_fp8()) return wrong;
    const cfrt::Call call = cfrt::make_call<CFRT_GRANULE_INT8>(*a, 1);
    const bool half = accumulate == CFRT_ACCUMULATE_FP16;
    auto* on = static_cast<cudaStream_t>(stream);
    return a->dim == 128 ? cfrt::launch_int8<128>(call, half, on) : cfrt::launch_int8<64>(call, half, on);
}

extern "C" int32_t cfrt_fp8_position(int32_t token) {
    const int32_t in = token % 16, pair = in % 8 / 2;  // of the fragment: tokens 2t, 2t+1, 2t+8, 2t+9 are lane t's
    return token / 16 * 16 + pair * 4 + in / 8 * 2 + in % 2;
}
