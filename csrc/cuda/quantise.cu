// The quantisers behind quantise.h. Bound by memory; not timed yet (no GPU so far).

#include "quantise.h"

#include <cuda_runtime.h>

#include "device.h"
#include "eight.cuh"

namespace cfrt {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kLanes;
constexpr int kColumns = 64, kChunks = kColumns / 8;  // that a block of value_scales looks at
constexpr int kSkew = 12;  // words, not 8: the i-th columns of all chunks lie apart so that both sides miss conflicts

// One block is one row, read twice: the second time out of the cache.
__global__ void __launch_bounds__(kThreads)
    quantise_rows(std::int8_t* out, float* scale, const std::uint16_t* x, std::int64_t width, std::int64_t stride) {
    __shared__ float ranges[kWarps];
    const std::int64_t row = blockIdx.x;
    const int thread = threadIdx.x;
    x += row * stride, out += row * width;
    Eight values;
    float range = kLeastRange;
    for (std::int64_t i = thread * 8; i < width; i += kThreads * 8) {
        values.read(x + i);
        range = fmaxf(range, values.range());
    }
    range = warp_max(range);
    if (thread % kLanes == 0) ranges[thread / kLanes] = range;
    __syncthreads();
    for (int warp = 0; warp < kWarps; ++warp) range = fmaxf(range, ranges[warp]);
    if (thread == 0) scale[row] = range / 127.0f;
    for (std::int64_t i = thread * 8; i < width; i += kThreads * 8) {
        values.read(x + i);
        *reinterpret_cast<uint2*>(out + i) = values.int8(127.0f / range);
    }
}

// One block is 64 columns: a warp takes four rows of them at a time. Few blocks, since it runs once a calibration.
__global__ void __launch_bounds__(kThreads)
    value_scales(float* scale, const std::uint16_t* v, std::int64_t rows, std::int64_t stride, float limit) {
    __shared__ float ranges[kWarps][8 * kSkew];
    const int thread = threadIdx.x, lane = thread % kLanes, warp = thread / kLanes, chunk = thread % kChunks;
    v += blockIdx.x * kColumns + chunk * 8;
    Eight values;
    float most[8] = {};
    for (std::int64_t row = thread / kChunks; row < rows; row += kThreads / kChunks) {
        values.read(v + row * stride);
#pragma unroll
        for (int i = 0; i < 8; ++i) most[i] = fmaxf(most[i], fabsf(values.x[i]));
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        for (int step = kChunks; step < kLanes; step *= 2)
            most[i] = fmaxf(most[i], __shfl_xor_sync(kAllLanes, most[i], step));
        if (lane < kChunks) ranges[warp][i * kSkew + chunk] = most[i];
    }
    __syncthreads();
    if (thread >= kColumns) return;
    float range = kLeastRange;
    for (int w = 0; w < kWarps; ++w) range = fmaxf(range, ranges[w][thread % 8 * kSkew + thread / 8]);
    float& held = scale[blockIdx.x * kColumns + thread];
    held = fmaxf(held, range / limit);
}

cudaError_t check(std::int64_t rows, std::int64_t width, std::int64_t stride, std::int64_t unit, const void* x) {
    if (rows < 1 || rows > 0x7fffffff || width < unit || width % unit || stride < width) return cudaErrorInvalidValue;
    return aligned(x) && stride * 2 % kAlignment == 0 ? cudaSuccess : cudaErrorMisalignedAddress;
}

}  // namespace
}  // namespace cfrt

extern "C" int cfrt_quantise_rows(int8_t* out, float* scale, const void* x, int64_t rows, int64_t width, int64_t stride,
                                  void* stream) {
    if (!out || !scale || !x) return cudaErrorInvalidValue;
    if (const cudaError_t wrong = cfrt::check(rows, width, stride, 16, x)) return wrong;
    if (!cfrt::aligned(out)) return cudaErrorMisalignedAddress;
    cfrt::quantise_rows<<<static_cast<unsigned>(rows), cfrt::kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        out, scale, static_cast<const std::uint16_t*>(x), width, stride);
    return cudaGetLastError();
}

extern "C" int cfrt_value_scales(float* scale, const void* v, int64_t rows, int64_t width, int64_t stride, float limit,
                                 void* stream) {
    if (!scale || !v || !(limit > 0)) return cudaErrorInvalidValue;
    if (const cudaError_t wrong = cfrt::check(rows, width, stride, cfrt::kColumns, v)) return wrong;
    const auto blocks = static_cast<unsigned>(width / cfrt::kColumns);
    cfrt::value_scales<<<blocks, cfrt::kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        scale, static_cast<const std::uint16_t*>(v), rows, stride, limit);
    return cudaGetLastError();
}
