#include "query.h"

#include <cuda_runtime.h>

#include <utility>

extern "C" int cfrt_query_device(int32_t index, cfrt_device* out) {
    *out = {};
    int driver = 0, devices = 0, major = 0, minor = 0, processors = 0;
    if (const cudaError_t wrong = cudaDriverGetVersion(&driver)) return wrong;
    out->driver = driver;
    if (const cudaError_t wrong = cudaGetDeviceCount(&devices)) return wrong;
    out->devices = devices;
    if (index < 0 || index >= devices) return cudaErrorInvalidDevice;
    for (const auto [value, attribute] : {std::pair{&major, cudaDevAttrComputeCapabilityMajor},
                                          {&minor, cudaDevAttrComputeCapabilityMinor},
                                          {&processors, cudaDevAttrMultiProcessorCount}})
        if (const cudaError_t wrong = cudaDeviceGetAttribute(value, attribute, index)) return wrong;
    out->capability = 10 * major + minor;
    out->processors = processors;
    return cudaSuccess;
}
