// Re-noise on the GPU. One thread per quad of elements, which is what one Philox counter gives; a quad is read and
// written as one 8 or 16 byte access. Bound by memory: two passes over a latent of at most a few MB.
//
//   v1  grid-stride loop over quads, 256 threads; not timed yet (no GPU so far)

#include "renoise.h"

#include <cuda_runtime.h>

#include "../renoise.h"
#include "numbers.cuh"

namespace cfrt {
namespace {

constexpr int kThreads = 256;
constexpr std::int64_t kMaxBlocks = 1 << 16;

// kAligned: the arrays start on a quad's alignment, so that a quad moves as one access. Else, and for the last
// count % 4 elements, one by one.
template <class T, bool kAligned>
__global__ void __launch_bounds__(kThreads)
    renoise_kernel(T* out, const T* x0, std::int64_t count, Renoise how, const cfrt_pass* pass) {
    if (pass) how.noise.seed = pass->seed, how.noise.unit = pass->unit;
    const std::int64_t stride = 4 * kThreads * static_cast<std::int64_t>(gridDim.x);
    for (std::int64_t first = 4 * (kThreads * static_cast<std::int64_t>(blockIdx.x) + threadIdx.x); first < count;
         first += stride) {
        const bool whole = kAligned && count - first >= 4;
        Quad<T> quad{};
        if (whole)
            quad = *reinterpret_cast<const Quad<T>*>(x0 + first);
        else
            for (int i = 0; i < 4 && first + i < count; ++i) quad.item[i] = x0[first + i];

        float x[4];
        for (int i = 0; i < 4; ++i) x[i] = to_float(quad.item[i]);
        renoise_quad(how, static_cast<std::uint32_t>(first / 4), x);
        for (int i = 0; i < 4; ++i) quad.item[i] = from_float<T>(x[i]);

        if (whole)
            *reinterpret_cast<Quad<T>*>(out + first) = quad;
        else
            for (int i = 0; i < 4 && first + i < count; ++i) out[first + i] = quad.item[i];
    }
}

template <class T>
cudaError_t launch(void* out, const void* x0, std::int64_t count, const Renoise& how, const cfrt_pass* pass,
                   cudaStream_t stream) {
    const std::int64_t blocks = ((count + 3) / 4 + kThreads - 1) / kThreads;
    const auto addresses = reinterpret_cast<std::uintptr_t>(out) | reinterpret_cast<std::uintptr_t>(x0);
    const bool aligned = addresses % sizeof(Quad<T>) == 0;
    auto* kernel = aligned ? renoise_kernel<T, true> : renoise_kernel<T, false>;
    kernel<<<static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks), kThreads, 0, stream>>>(
        static_cast<T*>(out), static_cast<const T*>(x0), count, how, pass);
    return cudaGetLastError();
}

}  // namespace
}  // namespace cfrt

extern "C" int cfrt_renoise(void* out, const void* x0, int64_t count, cfrt_dtype dtype, double s, uint64_t seed,
                            uint32_t unit, uint32_t step, uint32_t purpose, const cfrt_pass* pass, void* stream) {
    if (count == 0) return cudaSuccess;
    if (count < 0 || count > cfrt::kMaxElements) return cudaErrorInvalidValue;
    const cfrt::Renoise how = cfrt::make_renoise(s, {seed, unit, step, purpose});
    auto* on = static_cast<cudaStream_t>(stream);
    switch (dtype) {
        case CFRT_FLOAT32:
            return cfrt::launch<float>(out, x0, count, how, pass, on);
        case CFRT_FLOAT16:
            return cfrt::launch<__half>(out, x0, count, how, pass, on);
        case CFRT_BFLOAT16:
            return cfrt::launch<__nv_bfloat16>(out, x0, count, how, pass, on);
    }
    return cudaErrorInvalidValue;
}

extern "C" const char* cfrt_cuda_error(int code) {
    return cudaGetErrorString(static_cast<cudaError_t>(code));
}
