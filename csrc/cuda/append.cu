// The launchers behind append.h.

#include "append.h"

#include <cmath>

#include "append.cuh"
#include "device.h"

namespace cfrt {
namespace {

cudaError_t check(const cfrt_append& a, bool int8) {
    const std::int64_t width = static_cast<std::int64_t>(a.heads) * a.dim;
    const bool shape = a.heads >= 1 && (a.dim == 64 || a.dim == 128) && width <= 8192 && a.frames >= 1 &&
                       a.frames <= CFRT_MOST_FRAMES && a.rows >= 1 && a.columns >= 1 && a.stride >= width;
    const bool turns = a.pairs[0] >= 0 && a.pairs[1] >= 0 && a.pairs[2] >= 0 &&
                       2 * (a.pairs[0] + a.pairs[1] + a.pairs[2]) == a.dim && (a.pass || a.first_frame >= 0);
    const bool given = a.q && a.k && a.v && a.q_weight && a.k_weight && a.q_out && a.k_out && a.v_out;
    const bool scales = a.q_scale && a.k_scale && a.v_scale && a.scratch && (!a.q_sink_out || a.q_sink_scale);
    if (!shape || !turns || !given || (int8 && !scales)) return cudaErrorInvalidValue;
    for (int i = 0; !a.pass && i < a.frames; ++i)
        if (a.granules[i] < 0) return cudaErrorInvalidValue;
    bool placed = a.stride * 2 % kAlignment == 0;
    for (const void* pointer : {a.q, a.k, a.v, a.q_weight, a.k_weight}) placed = placed && aligned(pointer);
    for (const void* pointer : {a.q_out, a.q_sink_out, a.k_out, a.v_out, a.scratch})
        placed = placed && aligned(pointer);
    placed = placed && aligned(a.pass);
    return placed ? cudaSuccess : cudaErrorMisalignedAddress;
}

template <int kDim, bool kInt8>
cudaError_t launch(const cfrt_append& a, cudaStream_t stream) {
    const auto tokens = static_cast<unsigned>(a.rows * a.columns), frames = static_cast<unsigned>(a.frames);
    const auto threads = static_cast<unsigned>((a.heads * kDim / 8 + kLanes - 1) / kLanes * kLanes);
    append_rows<kDim, kInt8><<<dim3(tokens, frames), threads, 0, stream>>>(a);
    if constexpr (kInt8) {
        const unsigned granules = (tokens + CFRT_GRANULE_INT8 - 1) / CFRT_GRANULE_INT8;
        quantise_granule<kDim><<<dim3(granules, static_cast<unsigned>(a.heads), frames), 128, 0, stream>>>(a);
    }
    return cudaGetLastError();
}

}  // namespace
}  // namespace cfrt

extern "C" void cfrt_turns(uint64_t* turns, const int32_t pairs[3], double theta) {
    constexpr double kTurn = 6.283185307179586476925;
    for (int axis = 0; axis < 3; ++axis)
        for (int32_t j = 0; j < pairs[axis]; ++j)
            *turns++ =
                static_cast<uint64_t>(std::ldexp(std::pow(theta, -static_cast<double>(j) / pairs[axis]) / kTurn, 64));
}

extern "C" int cfrt_append_bf16(const cfrt_append* a, void* stream) {
    if (const cudaError_t wrong = cfrt::check(*a, false)) return wrong;
    auto* on = static_cast<cudaStream_t>(stream);
    return a->dim == 128 ? cfrt::launch<128, false>(*a, on) : cfrt::launch<64, false>(*a, on);
}

extern "C" int cfrt_append_int8_fp8(const cfrt_append* a, void* stream) {
    if (const cudaError_t wrong = cfrt::check(*a, true)) return wrong;
    if (const cudaError_t wrong = cfrt::check_fp8()) return wrong;
    auto* on = static_cast<cudaStream_t>(stream);
    return a->dim == 128 ? cfrt::launch<128, true>(*a, on) : cfrt::launch<64, true>(*a, on);
}
