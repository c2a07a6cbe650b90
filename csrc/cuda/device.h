// What the launchers ask before they launch.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace cfrt {

constexpr std::int64_t kAlignment = 16;

inline bool aligned(const void* pointer) {
    return reinterpret_cast<std::uintptr_t>(pointer) % kAlignment == 0;
}

// Compute capability 8.9 is the first with products of e4m3.
inline cudaError_t check_fp8() {
    int device = 0, major = 0, minor = 0;
    if (const cudaError_t wrong = cudaGetDevice(&device)) return wrong;
    if (const cudaError_t wrong = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device))
        return wrong;
    if (const cudaError_t wrong = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device))
        return wrong;
    return 10 * major + minor >= 89 ? cudaSuccess : cudaErrorNotSupported;
}

}  // namespace cfrt
