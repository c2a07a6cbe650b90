// Planes to pixels on the GPU. A warp takes 128 pixels: a thread reads four of each colour as one access, and the 384
// bytes of the warp go by way of shared memory, so that they are written as whole words side by side.
//
// not timed yet (no GPU so far)

#include "pixels.h"

#include <cuda_runtime.h>

#include "device.cuh"
#include "numbers.cuh"

namespace cfrt {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kLanes, kWarpPixels = 4 * kLanes, kWarpWords = 3 * kLanes;

__device__ std::uint32_t level(float x, float gain, float offset) {
    const float value = __fadd_rn(__fmul_rn(x, gain), offset);  // as the CPU computes it
    return static_cast<std::uint32_t>(__float2int_rn(fminf(fmaxf(value, 0.0f), 1.0f) * 255.0f));
}

template <class T>
struct Picture {
    const T* x;
    std::uint8_t* out;
    std::int64_t plane;
    float gain, offset;

    // Four pixels a thread, all of them within the plane; both arrays lie on whole quads and words.
    __device__ void write_quads(std::int64_t start, int lane, std::uint32_t (&words)[kWarpWords]) const {
        std::uint32_t byte[12];
#pragma unroll
        for (int c = 0; c < 3; ++c) {
            const Quad<T> quad = *reinterpret_cast<const Quad<T>*>(x + c * plane + start + 4 * lane);
#pragma unroll
            for (int i = 0; i < 4; ++i) byte[3 * i + c] = level(to_float(quad.item[i]), gain, offset);
        }
#pragma unroll
        for (int w = 0; w < 12; w += 4)
            words[3 * lane + w / 4] = byte[w] | byte[w + 1] << 8 | byte[w + 2] << 16 | byte[w + 3] << 24;
        __syncwarp();
        auto* to = reinterpret_cast<std::uint32_t*>(out + start * 3);
#pragma unroll
        for (int w = 0; w < kWarpWords; w += kLanes) to[w + lane] = words[w + lane];
    }

    __device__ void write_bytes(std::int64_t start, int lane) const {
        for (std::int64_t pixel = start + lane; pixel < plane && pixel < start + kWarpPixels; pixel += kLanes)
            for (int c = 0; c < 3; ++c)
                out[pixel * 3 + c] = static_cast<std::uint8_t>(level(to_float(x[c * plane + pixel]), gain, offset));
    }
};

template <class T>
__global__ void __launch_bounds__(kThreads) pixels_kernel(Picture<T> picture, bool aligned) {
    __shared__ std::uint32_t words[kWarps][kWarpWords];
    const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
    const std::int64_t start = (static_cast<std::int64_t>(blockIdx.x) * kWarps + warp) * kWarpPixels;
    picture.x += blockIdx.y * 3 * picture.plane;
    picture.out += blockIdx.y * 3 * picture.plane;
    if (aligned && start + kWarpPixels <= picture.plane)
        picture.write_quads(start, lane, words[warp]);
    else
        picture.write_bytes(start, lane);
}

template <class T>
cudaError_t launch(std::uint8_t* out, const void* x, std::int64_t frames, std::int64_t plane, float gain, float offset,
                   cudaStream_t stream) {
    const std::int64_t block = kWarps * kWarpPixels;
    const dim3 grid(static_cast<unsigned>((plane + block - 1) / block), static_cast<unsigned>(frames));
    const bool aligned = plane % 4 == 0 && reinterpret_cast<std::uintptr_t>(x) % sizeof(Quad<T>) == 0 &&
                         reinterpret_cast<std::uintptr_t>(out) % 4 == 0;
    pixels_kernel<T><<<grid, kThreads, 0, stream>>>({static_cast<const T*>(x), out, plane, gain, offset}, aligned);
    return cudaGetLastError();
}

}  // namespace
}  // namespace cfrt

extern "C" int cfrt_pixels(uint8_t* out, const void* x, cfrt_dtype dtype, int64_t frames, int64_t plane, float gain,
                           float offset, void* stream) {
    if (frames == 0 || plane == 0) return cudaSuccess;
    if (frames < 0 || frames > 65535 || plane < 0 || plane > (int64_t{1} << 40)) return cudaErrorInvalidValue;
    auto* on = static_cast<cudaStream_t>(stream);
    switch (dtype) {
        case CFRT_FLOAT32:
            return cfrt::launch<float>(out, x, frames, plane, gain, offset, on);
        case CFRT_FLOAT16:
            return cfrt::launch<__half>(out, x, frames, plane, gain, offset, on);
        case CFRT_BFLOAT16:
            return cfrt::launch<__nv_bfloat16>(out, x, frames, plane, gain, offset, on);
    }
    return cudaErrorInvalidValue;
}
