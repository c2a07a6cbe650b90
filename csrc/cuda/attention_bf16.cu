// attention.h in bf16, and what the host plans with.

#include "attention_bf16.cuh"

#include "launch.cuh"
#include "split.h"

namespace cfrt {
namespace {

template <int kDim>
cudaError_t launch_bf16(const Call& call, cudaStream_t stream) {
    const bool rows = call.a.row_stride != 0;
    return launch<kDim>(call, rows ? attention_bf16<kDim, true> : attention_bf16<kDim, false>,
                        AttentionBf16<kDim, false>::kSharedBytes, stream);
}

}  // namespace
}  // namespace cfrt

extern "C" int cfrt_attention_bf16(const cfrt_attention* a, void* stream) {
    if (const cudaError_t wrong = cfrt::check(*a, 2)) return wrong;
    const cfrt::Call call = cfrt::make_call<CFRT_GRANULE_BF16>(*a, CFRT_GRANULE_BF16 * a->dim);
    auto* on = static_cast<cudaStream_t>(stream);
    return a->dim == 128 ? cfrt::launch_bf16<128>(call, on) : cfrt::launch_bf16<64>(call, on);
}

extern "C" int32_t cfrt_attention_splits(const cfrt_attention* a, int32_t processors) {
    int32_t granules = 0;
    for (int i = 0; i < a->piece_count; ++i) granules += cfrt::granules_of<CFRT_GRANULE_BF16>(a->pieces[i].rows);
    return cfrt::balance(a->queries, a->heads, granules, processors, cfrt::kBlockRows, CFRT_MOST_SPLITS).splits;
}

extern "C" int64_t cfrt_attention_scratch(int32_t queries, int32_t heads, int32_t dim, int32_t splits) {
    return splits == 1 ? 0 : static_cast<int64_t>(splits) * queries * heads * (dim + 1);
}
